"""Settings: names, sources, precedence, and the errors for invalid values."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from config import EXCHANGES, ConfigError, load_settings, setting_names

ROOT = Path(__file__).parents[1]
NO_FILE = Path("/nonexistent/.env")
CANARY = "c4nary-5ecret"
SECRETS = {
    **{
        f"{name.upper()}_{end}": f"{CANARY}-{name}-{end}"
        for name in EXCHANGES
        for end in ("API_KEY", "API_SECRET")
    },
    "HTTPS_PROXY": f"http://user:{CANARY}-proxy@127.0.0.1:3128",
    "REDIS_PASSWORD": f"{CANARY}-password",
    "REDIS_URL": f"rediss://user:{CANARY}-url@127.0.0.1:6379/2",
    "API_KEYS": f"bot:{CANARY}-bot,{CANARY}-other",
    "ADMIN_TOKEN": f"{CANARY}-admin",
}


def plain(value: object) -> object:
    """Return the text of a secret, and any other value unchanged."""
    return value.get_secret_value() if hasattr(value, "get_secret_value") else value


@pytest.mark.parametrize(
    ("name", "text", "path", "expected"),
    [
        ("BYBIT_ENABLED", "false", "bybit.enabled", False),
        ("BINANCE_ENABLED", "0", "binance.enabled", False),
        ("KRAKEN_ENABLED", "True", "kraken.enabled", True),
        ("BYBIT_API_KEY", "abc", "bybit.api_key", "abc"),
        ("BYBIT_KEY", "abc", "bybit.api_key", "abc"),
        ("BINANCE_API_SECRET", "abc", "binance.api_secret", "abc"),
        ("BINANCE_SECRET", "abc", "binance.api_secret", "abc"),
        ("KRAKEN_KEY", "abc", "kraken.api_key", "abc"),
        ("KRAKEN_SECRET", "abc", "kraken.api_secret", "abc"),
        ("KRAKEN_REST_URL", "http://127.0.0.1:9103/", "kraken.rest_url", "http://127.0.0.1:9103"),
        ("KRAKEN_BUDGET", "10/2", "kraken.budget", (10, 2)),
        ("CACHE_MEMORY_SIZE", "7", "cache_memory_size", 7),
        ("CACHE_MEMORY_TTL", "2.5", "cache_memory_ttl", 2.5),
        ("REDIS_HOST", "cache", "redis_address", "redis://cache:6379/0"),
        ("REDIS_HOST", "", "redis_address", ""),
        ("REDIS_HOST", "  ", "redis_address", ""),
        ("REDIS_PORT", "6380", "redis_address", "redis://localhost:6380/0"),
        ("REDIS_PASSWORD", "p@ss/w", "redis_address", "redis://:p%40ss%2Fw@localhost:6379/0"),
        ("REDIS_URL", "rediss://other:1/3", "redis_address", "rediss://other:1/3"),
        ("REDIS_URL", "redis+sentinel://:p%2C@a:1,b/x/3", "redis_address", "redis+sentinel://:p%2C@a:1,b/x/3"),
        ("REDIS_URL", "rediss+sentinel://a/my-master", "redis_address", "rediss+sentinel://a/my-master"),
        ("REDIS_URL", "redis+cluster://u:p@a:1,[::1]:2/", "redis_address", "redis+cluster://u:p@a:1,[::1]:2/"),
        ("REDIS_URL", "rediss+cluster://a", "redis_address", "rediss+cluster://a"),
        ("MAX_CONCURRENT", "9", "max_concurrent", 9),
        ("REQUEST_TIMEOUT", "1.5", "request_timeout", 1.5),
        ("CB_THRESHOLD", "3", "cb_threshold", 3),
        ("LOG_LEVEL", "debug", "log_level", "DEBUG"),
        ("LOG_FORMAT", "JSON", "log_format", "json"),
        ("MARKET_TYPES", "spot, swap", "market_types", ("spot", "swap")),
        ("CORS_ORIGINS", "http://a,https://b", "cors_origins", ("http://a", "https://b")),
        ("GATEWAY_URL", "https://gateway.example/", "gateway_url", "https://gateway.example"),
    ],
)  # fmt: skip
def test_environment_variable_sets_its_field(
    name: str, text: str, path: str, expected: object
) -> None:
    """Each environment variable sets its field. Surrounding blanks and case do not matter."""
    settings = load_settings({name: text}, NO_FILE)
    exchange, _, field = path.rpartition(".")
    owner: Any = settings.exchanges[exchange] if exchange else settings
    assert plain(getattr(owner, field)) == expected


def test_defaults() -> None:
    """Without an environment all exchanges are enabled, Redis is local and access is open."""
    settings = load_settings({}, NO_FILE)
    assert settings.enabled_exchanges == EXCHANGES
    assert [settings.exchanges[name].budget for name in EXCHANGES] == [(600, 5), (6000, 60), (5, 5)]
    assert settings.redis_address == "redis://localhost:6379/0"
    assert (settings.cache_memory_size, settings.cache_memory_ttl) == (1000, 30)
    assert (settings.max_concurrent, settings.request_timeout, settings.cb_threshold) == (100, 5, 5)
    assert (settings.ticker_ttl_seconds, settings.stale_seconds) == (15, 60)
    assert not settings.api_keys
    assert settings.secrets == ()


def test_every_setting_can_be_left_empty() -> None:
    """An empty value means the default, except for REDIS_HOST, where it means "no Redis"."""
    empty = dict.fromkeys(setting_names(), "")
    assert load_settings(empty | {"REDIS_HOST": "localhost"}, NO_FILE) == load_settings({}, NO_FILE)


def test_every_setting_has_a_description() -> None:
    """A description is one line of complete sentences. Documents are generated from it."""
    for name, (field, _) in setting_names().items():
        assert field.description, name
        assert field.description.endswith("."), name
        assert "\n" not in field.description, name


ADD_FOURTH_EXCHANGE = """
import dataclasses, os
from pathlib import Path
from src.exchanges.profiles import PROFILES

PROFILES["fourth"] = dataclasses.replace(PROFILES["kraken"], name="fourth", default_budget="7/2")
import config

settings = config.load_settings(
    {"FOURTH_ENABLED": "false", "FOURTH_SECRET": "abc", "EXCHANGE_ORDER": "fourth,kraken"},
    Path(os.devnull),
)
fourth = settings.exchanges["fourth"]
print(fourth.enabled, fourth.budget, fourth.api_secret.get_secret_value(), settings.exchange_order)
print(*(name[6:] for name in config.setting_names() if name.startswith("FOURTH")))
try:
    config.load_settings({"FOURTH_BUDGET": "x"}, Path(os.devnull))
except config.ConfigError as error:
    print(error)
"""


def test_exchange_added_to_profiles_has_settings() -> None:
    """A new entry of PROFILES gets all settings of an exchange without a change in config.py."""
    command = [sys.executable, "-c", ADD_FOURTH_EXCHANGE]
    output = subprocess.check_output(command, text=True, cwd=ROOT, timeout=60)
    assert output.splitlines() == [
        "False (7, 2) abc ('fourth', 'kraken')",
        "_ENABLED _API_KEY _API_SECRET _REST_URL _WS_URL _BUDGET",
        "FOURTH_BUDGET='x' is invalid: expected weight/seconds, for example 600/5.",
    ]


def test_config_names_no_exchange() -> None:
    """Everything that is specific to an exchange is in src/exchanges/profiles.py."""
    source = re.sub(r"`[A-Z_]+`", "", (ROOT / "config.py").read_text())
    assert not [name for name in EXCHANGES if name in source.lower()]


def test_at_least_one_exchange_is_enabled() -> None:
    """The gateway does not start without an exchange. The error names the settings."""
    disabled = {f"{name.upper()}_ENABLED": "false" for name in EXCHANGES}
    with pytest.raises(ConfigError, match=r"^BYBIT_ENABLED, .* expected at least one that is true"):
        load_settings(disabled, NO_FILE)


def test_lower_case_variables_are_ignored() -> None:
    """Other programs read `https_proxy`. It is not a setting of the gateway."""
    settings = load_settings({"https_proxy": "http://127.0.0.1:1", "cb_threshold": "1"}, NO_FILE)
    assert settings == load_settings({}, NO_FILE)


def test_redis_url_replaces_host_port_and_password() -> None:
    """A complete URL takes precedence, even over an empty host."""
    parts = {
        "REDIS_HOST": "",
        "REDIS_PORT": "1",
        "REDIS_PASSWORD": "x",
        "REDIS_URL": "redis://there:2/0",
    }
    assert load_settings(parts, NO_FILE).redis_address == "redis://there:2/0"


def test_long_name_of_an_exchange_key_takes_precedence() -> None:
    """If both KRAKEN_KEY and KRAKEN_API_KEY are set, KRAKEN_API_KEY is used."""
    settings = load_settings({"KRAKEN_KEY": "short", "KRAKEN_API_KEY": "long"}, NO_FILE)
    assert settings.exchanges["kraken"].api_key.get_secret_value() == "long"


def test_api_keys_have_names() -> None:
    """A key has the given name. Without one, its name is its position in the list."""
    keys = load_settings({"API_KEYS": "bot:12345678, 87654321"}, NO_FILE).api_keys
    assert {name: key.get_secret_value() for name, key in keys.items()} == {
        "bot": "12345678",
        "key2": "87654321",
    }


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("bybit", "binance", "kraken")),
        ({"EXCHANGE_ORDER": "kraken"}, ("kraken", "bybit", "binance")),
        ({"EXCHANGE_ORDER": "kraken,bybit"}, ("kraken", "bybit", "binance")),
        ({"EXCHANGE_ORDER": "kraken,bybit", "BYBIT_ENABLED": "no"}, ("kraken", "binance")),
    ],
)
def test_enabled_exchanges_are_in_order_of_preference(
    environment: dict[str, str], expected: tuple[str, ...]
) -> None:
    """The exchanges of EXCHANGE_ORDER come first. Disabled exchanges are left out."""
    assert load_settings(environment, NO_FILE).enabled_exchanges == expected


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("BYBIT_ENABLED", "perhaps", "true or false"),
        ("BYBIT_REST_URL", "api.bybit.com", "https://host"),
        ("BINANCE_REST_URL", "file:///etc/passwd", "https://host"),
        ("BINANCE_REST_URL", "http://[x", "https://host"),
        ("KRAKEN_WS_URL", "first\nsecond", "https://host"),
        ("KRAKEN_BUDGET", "5", "weight/seconds"),
        ("KRAKEN_BUDGET", "0/5", "weight/seconds"),
        ("KRAKEN_BUDGET", "5/-5", "weight/seconds"),
        ("EXCHANGE_ORDER", "bybit,mtgox", "bybit, binance, kraken"),
        ("EXCHANGE_ORDER", "bybit,bybit", "bybit, binance, kraken"),
        ("EXCHANGE_ORDER", ",", "bybit, binance, kraken"),
        ("MARKET_TYPES", "option", "spot, swap"),
        ("EXCHANGE_TIMEOUT_SECONDS", "0", "a number above 0 up to 60"),
        ("EXCHANGE_TIMEOUT_SECONDS", "nan", "a number above 0 up to 60"),
        ("EXCHANGE_TIMEOUT_SECONDS", "inf", "a number above 0 up to 60"),
        ("CB_THRESHOLD", "0", "a whole number from 1 to 1000"),
        ("CB_THRESHOLD", "2.5", "a whole number from 1 to 1000"),
        ("CACHE_MEMORY_SIZE", "1e3", "a whole number from 1 to 1000000"),
        ("CACHE_MEMORY_TTL", "soon", "a number above 0 up to 86400"),
        ("STALE_SECONDS", "-1", "a number from 0 to 86400"),
        ("TTL_JITTER_RATIO", "0.9", "a number from 0 to 0.5"),
        ("REDIS_PORT", "65536", "a whole number from 1 to 65535"),
        ("MAX_CONCURRENT", "many", "a whole number from 1 to 10000"),
        ("REQUEST_TIMEOUT", "-5", "a number above 0 up to 120"),
        ("LOG_LEVEL", "loud", "'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
        ("LOG_FORMAT", "xml", "'text' or 'json'"),
        ("GATEWAY_URL", "localhost:8000", "https://host"),
    ],
)
def test_invalid_value_is_explained(name: str, value: str, allowed: str) -> None:
    """An invalid value is reported in one line with the setting and the accepted values."""
    with pytest.raises(ConfigError) as caught:
        load_settings({name: value}, NO_FILE)
    text = str(caught.value)
    assert text.startswith(name)
    assert allowed in text
    assert text.isprintable(), "the text must be one line for any value"
    assert len(text) < 250


def test_long_invalid_value_is_shortened() -> None:
    """The length of an error message is bounded for values of any length."""
    with pytest.raises(ConfigError) as caught:
        load_settings({"REDIS_PORT": "9" * 5000}, NO_FILE)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REDIS_URL", f"http://:{CANARY}@host:6379/0"),
        ("REDIS_URL", f"{CANARY}@host"),
        ("REDIS_URL", f"redis://:[{CANARY}]@host:6379/0"),
        ("REDIS_URL", f"redis://:{CANARY}\u2100@host:6379/0"),
        ("REDIS_URL", f"redis://:{CANARY}#x@host:6379/0"),
        ("REDIS_URL", "redis://host:port/0"),
        ("REDIS_URL", "redis://one:1,two:2/0"),
        ("REDIS_URL", f"redis+cluster://:{CANARY}@"),
        ("REDIS_URL", f"redis+cluster://:{CANARY}@one:1,,two:2"),
        ("REDIS_URL", f"redis+cluster://:{CANARY}@one:1,two:0"),
        ("REDIS_URL", f"redis+cluster://:{CANARY}@one:1,two:x"),
        ("REDIS_URL", f"redis+cluster://:{CANARY}@one:1, two:2"),
        ("REDIS_URL", f"redis+cluster://:{CANARY}@one:1/0"),
        ("REDIS_URL", f"redis+cluster://:{CANARY}/x@one:1"),
        ("REDIS_URL", f"redis+cluster://:{CANARY}@one:1?socket_timeout=9"),
        ("REDIS_URL", f"redis+sentinel://:{CANARY}@one:1,two:2"),
        ("REDIS_URL", f"redis+sentinel://:{CANARY}@one:1,two:2/"),
        ("REDIS_URL", f"redis+sentinel://:{CANARY}@one:1/name/x"),
        ("REDIS_URL", f"redis+sentinel://:{CANARY}@[one/name"),
        ("REDIS_URL", f"redis+cluster://me:{CANARY}@one:1,me:{CANARY}@two:2"),
        ("REDIS_URL", f"redis+other://:{CANARY}@one:1"),
        ("REDIS_URL", f"http+cluster://:{CANARY}@one:1"),
        ("HTTPS_PROXY", f"socks5://user:{CANARY}@host:1080"),
        ("HTTPS_PROXY", f"http://user:{CANARY}[@host:1080"),
        ("API_KEYS", f"a:{CANARY},a:{CANARY}"),
        ("API_KEYS", f"bad name:{CANARY}"),
        ("API_KEYS", "c4nary"),
        ("BYBIT_REST_URL", f"https://user:{CANARY}@api.bybit.com"),
        ("GATEWAY_URL", f"https://user:{CANARY}@gateway.example"),
    ],
)
def test_invalid_secret_is_not_shown(name: str, value: str) -> None:
    """An error for a value with a secret has the setting and what is expected, not the value."""
    with pytest.raises(ConfigError) as caught:
        load_settings({name: value}, NO_FILE)
    text = str(caught.value)
    assert text.startswith(f"{name} ")
    assert " is invalid: expected " in text
    assert "c4nary" not in text
    assert text.isprintable()


def test_error_has_no_cause() -> None:
    """A traceback of the error does not print pydantic's error, which contains the values."""
    with pytest.raises(ConfigError) as caught:
        load_settings({**SECRETS, "CB_THRESHOLD": "0"}, NO_FILE)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_printed_settings_contain_no_secret() -> None:
    """No form of printing shows a secret. `secrets` has all of them."""
    settings = load_settings(SECRETS, NO_FILE)
    texts = [repr(settings), str(settings), settings.model_dump_json(), f"{settings!r:s}"]
    texts += [repr(settings.exchanges["bybit"])]
    for text in texts:
        assert CANARY not in text
    all_secrets = " ".join(settings.secrets)
    for value in (
        "proxy",
        "password",
        "url",
        "bot",
        "other",
        "admin",
        "bybit-API_KEY",
        "kraken-API_SECRET",
    ):
        assert f"{CANARY}-{value}" in settings.secrets, value
    assert all_secrets.count(CANARY) >= len(SECRETS)
    assert list(settings.secrets) == sorted(settings.secrets, key=len, reverse=True)


@pytest.mark.parametrize(
    "url",
    ["redis://:{}@a:1/0", "redis+sentinel://me:{}@a:1,b:2/name/0", "redis+cluster://:{}@a:1,b:2"],
)
def test_password_in_a_url_is_a_secret(url: str) -> None:
    """`secrets` has the password of any URL, both percent-encoded and decoded."""
    settings = load_settings({"REDIS_URL": url.format("p%40ss%2Cword")}, NO_FILE)
    assert {"p%40ss%2Cword", "p@ss,word"} < set(settings.secrets)
    assert "word" not in repr(settings).replace("password", "")


def test_settings_are_frozen() -> None:
    """Neither the settings nor those of an exchange can be changed after the start."""
    settings = load_settings({}, NO_FILE)
    with pytest.raises(ValidationError, match="frozen"):
        settings.cb_threshold = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        settings.exchanges["bybit"].enabled = False  # type: ignore[misc]


def test_environment_takes_precedence_over_file(tmp_path: Path) -> None:
    """`.env` is used for variables that are not set. An empty variable means the default."""
    file = tmp_path / ".env"
    file.write_text(
        "CB_THRESHOLD=7\nCACHE_MEMORY_SIZE=8\nMAX_CONCURRENT=9\n"
        "export KRAKEN_SECRET='a b#c'\n# REDIS_PORT=1\n"
    )
    settings = load_settings({"CB_THRESHOLD": "3", "MAX_CONCURRENT": ""}, file)
    assert (settings.cb_threshold, settings.cache_memory_size, settings.max_concurrent) == (
        3,
        8,
        100,
    )
    assert settings.exchanges["kraken"].api_secret.get_secret_value() == "a b#c"
    assert settings.redis_port == 6379


def test_sources_default_to_process_environment_and_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without arguments the process's environment and `.env` in its directory are read."""
    (tmp_path / ".env").write_text("CB_THRESHOLD=7\nCACHE_MEMORY_SIZE=8\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CB_THRESHOLD", "3")
    for name in ("CACHE_MEMORY_SIZE", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    settings = load_settings()
    assert (settings.cb_threshold, settings.cache_memory_size) == (3, 8)


@pytest.mark.parametrize(
    ("name", "value"),
    [("CB_THRESHOLD", "0"), ("REDIS_URL", f"http://:{CANARY}@host"), ("LOG_LEVEL", "loud")],
)
def test_server_does_not_start_with_an_invalid_setting(
    name: str, value: str, tmp_path: Path
) -> None:
    """The server exits with one line that names the setting, without a traceback or a secret."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), name: value}
    command = [sys.executable, "-m", "uvicorn", "src.api:app", "--port", "0"]
    process = subprocess.run(
        command,
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode != 0
    assert process.stdout == ""
    lines = process.stderr.splitlines()
    assert len(lines) == 1, process.stderr
    assert name in lines[0]
    assert "expected " in lines[0]
    assert CANARY not in lines[0]
