"""All settings of the gateway, in one frozen object. Nothing else reads the environment.

`load_settings` reads the environment and the file `.env`; the environment takes precedence. The
environment variable of a setting is its field name in capitals: `ticker_ttl_seconds` is
`TICKER_TTL_SECONDS`. Settings of one exchange start with its name: `BYBIT_ENABLED`. An empty value
means the default, except for `REDIS_HOST`, where empty means "no Redis".
"""

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, unquote, urlsplit

from dotenv import dotenv_values
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, SecretStr
from pydantic.fields import Field, FieldInfo
from pydantic_core import ValidationError

from src.exchanges.profiles import PROFILES

EXCHANGES = tuple(PROFILES)
MAX_DASHBOARD_SYMBOLS = 100
DASHBOARD_SYMBOLS = "BTC/USDT ETH/USDT SOL/USDT XRP/USDT DOGE/USDT ADA/USDT LINK/USDT LTC/USDT"
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")
_KEY = re.compile(r"[!-~]{8,256}")
# Checks only the form: which symbols exist is not known before the market lists are loaded.
_SYMBOL = re.compile(r"(?=.{3,40}$)[\w.$]{1,24}/[\w.$]{1,24}(:[\w.$]{1,24})?")


class ConfigError(Exception):
    """A setting is invalid. The text is one line with its name, its value and what is expected."""


def _parsed(parse: Callable[[str], object], expected: str) -> BeforeValidator:
    """Return a validator that replaces a text by what `parse` returns, unless it is empty.

    For an invalid text `parse` returns None or raises `ValueError`; the error says what was
    `expected`.
    """

    def validate(value: object) -> object:
        if not isinstance(value, str) or not value:
            return value
        with suppress(ValueError):
            if (parsed := parse(value)) is not None:
                return parsed
        raise ValueError(expected)

    return BeforeValidator(validate)


def _parse_url(url: str, *schemes: str) -> str | None:
    """Check that a URL has one of the schemes (default: HTTP), and a valid port or none."""
    parts = urlsplit(url)
    return url if parts.port != 0 and parts.scheme in (schemes or ("http", "https")) else None


def _parse_base_url(url: str) -> str | None:
    """Check that a URL is absolute and has no credentials, which would appear in logs."""
    host = urlsplit(url).netloc
    is_valid = host and "@" not in host and _parse_url(url, "http", "https", "ws", "wss")
    return url.rstrip("/") if is_valid else None


def _parse_redis_url(url: str) -> str | None:
    """Check the URL of one Redis server, of Sentinels or of a Redis Cluster."""
    several = r"rediss?\+(sentinel://[^/?#\s]+/[\w.-]+(/\d+)?|cluster://[^/?#\s]+)/?"
    if not re.fullmatch(several, url):
        return _parse_url(url, "redis", "rediss", "unix")
    credentials = url.partition("://")[2].rpartition("@")[0]
    # All hosts share one user and password. "@" and "," in them are percent-encoded.
    is_valid = not set(credentials) & set("@,") and all(
        _parse_url(each, "redis", "rediss") and urlsplit(each).hostname for each in split_hosts(url)
    )
    return url if is_valid else None


def split_hosts(url: str) -> list[str]:
    """Split a valid Redis URL with several hosts into one plain URL for each host.

    Each URL has the credentials, and no path.
    """
    scheme, _, rest = url.partition("://")
    credentials, at, hosts = rest.partition("/")[0].rpartition("@")
    scheme = scheme.partition("+")[0]
    return [f"{scheme}://{credentials}{at}{host}" for host in hosts.split(",")]


def _split(text: str) -> tuple[str, ...]:
    """Split a comma-separated list, without blanks and empty items."""
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _parse_networks(text: str) -> list[IPv4Network | IPv6Network]:
    return [ip_network(item, strict=False) for item in _split(text)]


def _parse_budget(text: str) -> list[int] | None:
    """Parse `weight/seconds`, two positive whole numbers."""
    match = re.fullmatch(r"([1-9]\d{0,7})/([1-9]\d{0,4})", text)
    return [int(number) for number in match.groups()] if match else None


def _parse_api_keys(text: str) -> dict[str, str] | None:
    """Parse `name:key,name:key`. The default name of a key is `key` and its position."""
    keys: dict[str, str] = {}
    for position, item in enumerate(text.split(","), start=1):
        name, separator, key = item.strip().rpartition(":")
        name = name if separator else f"key{position}"
        is_valid = re.fullmatch(r"[A-Za-z0-9_-]{1,32}", name) and _KEY.fullmatch(key)
        if not is_valid or name in keys:
            return None
        keys[name] = key
    return keys


def _names_out_of(*allowed: str) -> BeforeValidator:
    """Reject a list that is empty, repeats a name or has a name that is not allowed."""

    def parse(text: str) -> tuple[str, ...] | None:
        names = _split(text)
        is_valid = names and len(set(names)) == len(names) and set(names) <= set(allowed)
        return names if is_valid else None

    return _parsed(parse, f"distinct names out of {', '.join(allowed)}")


def _parse_symbols(text: str) -> tuple[str, ...] | None:
    names = _split(text)
    symbols = {name.upper().replace("-", "/", 1) for name in names}
    is_count_valid = 1 <= len(symbols) == len(names) <= MAX_DASHBOARD_SYMBOLS
    return names if is_count_valid and all(map(_SYMBOL.fullmatch, symbols)) else None


# What a setting expects, for error messages.
BASE_URL = "an absolute URL without a password, for example https://host[:port][/path]"
REDIS_URL = (
    "redis://..., rediss://..., unix://..., redis+sentinel://host:port,host:port/name "
    "or redis+cluster://host:port,host:port"
)
HOST = "a host name or an IP address, or an empty value for memory only"
KEY = "8 to 256 printable ASCII characters without blanks"
API_KEYS = "distinct names and keys of 8 to 256 characters, as name:key,name:key"
SYMBOLS = f"1 to {MAX_DASHBOARD_SYMBOLS} distinct symbols, for example BTC-USDT"
NETWORKS = "IP addresses and networks, for example 10.0.0.0/8,fd00::1"

Url = Annotated[str, _parsed(_parse_base_url, BASE_URL)]
PageUrl = Annotated[Url, _parsed(_parse_url, "http://... or https://..., without a password")]
ProxyUrl = Annotated[SecretStr, _parsed(_parse_url, "http://... or https://...")]
RedisUrl = Annotated[SecretStr, _parsed(_parse_redis_url, REDIS_URL)]
Host = Annotated[str, _parsed(lambda text: _HOST.fullmatch(text) and text, HOST)]
Token = Annotated[SecretStr, _parsed(lambda text: _KEY.fullmatch(text) and text, KEY)]
Names = Annotated[tuple[str, ...], _parsed(_split, "a comma-separated list")]
ExchangeNames = Annotated[tuple[str, ...], _names_out_of(*EXCHANGES)]
MarketTypes = Annotated[tuple[str, ...], _names_out_of("spot", "swap")]
Symbols = Annotated[tuple[str, ...], _parsed(_parse_symbols, SYMBOLS)]
Networks = Annotated[tuple[IPv4Network | IPv6Network, ...], _parsed(_parse_networks, NETWORKS)]
Budget = Annotated[tuple[int, int], _parsed(_parse_budget, "weight/seconds, for example 600/5")]
ApiKeys = Annotated[dict[str, SecretStr], _parsed(_parse_api_keys, API_KEYS)]
LogLevel = Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(str.upper)]
LogFormat = Annotated[Literal["text", "json"], BeforeValidator(str.lower)]
NO_SECRET = SecretStr("")
DEFAULT_EXCHANGES: Any = {name: profile.budgets for name, profile in PROFILES.items()}


class _Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True, validate_default=True, hide_input_in_errors=True, use_attribute_docstrings=True
    )


class ExchangeSettings(_Frozen):
    """Settings of one exchange. Their environment variables start with its name: `BYBIT_BUDGET`."""

    enabled: bool = True
    """Use this exchange."""
    api_key: SecretStr = Field(NO_SECRET, validation_alias=AliasChoices("api_key", "key"))
    """API key for the ccxt client (also `<EX>_KEY`). Public data needs none."""
    api_secret: SecretStr = Field(NO_SECRET, validation_alias=AliasChoices("api_secret", "secret"))
    """API secret for the ccxt client (also `<EX>_SECRET`)."""
    rest_url: Url = ""
    """Replaces scheme, host and port of the exchange's REST URLs. A path becomes their prefix."""
    ws_url: Url = ""
    """Replaces scheme, host and port of the exchange's WebSocket URLs, in the same way."""
    budget: Budget
    """Request weight per number of seconds (`weight/seconds`), shared by all replicas."""
    futures_budget: Budget | None = None
    """The same for swaps, which this exchange counts apart."""


class Settings(_Frozen):
    """All settings. Fields that end in `_seconds`, `_ttl` or `_timeout` are in seconds."""

    exchanges: dict[str, ExchangeSettings] = DEFAULT_EXCHANGES
    """Settings of each exchange of `PROFILES`, by its name."""

    exchange_order: ExchangeNames = EXCHANGES
    """Exchanges in order of preference. Exchanges that are not listed follow."""
    market_types: MarketTypes = ("spot",)
    """Types of markets to serve: `spot`, `swap` (linear perpetuals)."""
    exchange_timeout_seconds: float = Field(3, gt=0, le=60)
    """Timeout of one call to an exchange."""
    markets_refresh_seconds: float = Field(3600, ge=60, le=86400)
    """Interval between reloads of the market lists."""
    cb_threshold: int = Field(5, ge=1, le=1000)
    """Consecutive failures that open the circuit breaker of an exchange."""
    cb_window_seconds: float = Field(60, gt=0, le=3600)
    """Failures older than this do not count."""
    cb_reset_seconds: float = Field(60, gt=0, le=3600)
    """Time that a circuit breaker stays open the first time."""
    cb_max_open_seconds: float = Field(120, gt=0, le=86400)
    """Longest open time after failures, which doubles each time. Not of rate limits and bans."""
    geo_block_seconds: float = Field(900, gt=0, le=86400)
    """Interval between probes of an exchange that refuses this location."""
    https_proxy: ProxyUrl = NO_SECRET
    """Proxy for https and wss URLs of exchanges."""

    cache_memory_size: int = Field(1000, ge=1, le=1_000_000)
    """Maximum number of entries in memory."""
    cache_memory_bytes: int = Field(134_217_728, ge=1_048_576, le=1_099_511_627_776)
    """Maximum size of all entries in memory. The largest raw answers have 16 MB."""
    cache_memory_ttl: float = Field(30, gt=0, le=86400)
    """Longest time that an entry in memory counts as fresh."""
    ticker_ttl_seconds: float = Field(15, gt=0, le=3600)
    """TTL of tickers."""
    orderbook_ttl_seconds: float = Field(2, gt=0, le=3600)
    """TTL of order books."""
    ohlcv_ttl_seconds: float = Field(30, gt=0, le=3600)
    """TTL of candles."""
    trades_ttl_seconds: float = Field(5, gt=0, le=3600)
    """TTL of trades."""
    negative_ttl_seconds: float = Field(10, gt=0, le=3600)
    """TTL of an exchange's answer that a symbol or parameter is invalid, or without a price."""
    ttl_jitter_ratio: float = Field(0.05, ge=0, le=0.5)
    """Largest random reduction of a TTL, as a ratio of the TTL. It spreads expiries."""
    stale_seconds: float = Field(60, ge=0, le=86400)
    """How long after its TTL a value may replace an answer that failed, marked as stale."""
    stale_wait_seconds: float = Field(0.5, gt=0, le=60)
    """Longest wait for an exchange if a stale value can be served. The load continues."""
    fallback_max_deviation: float = Field(0.2, ge=0, le=100)
    """Largest price difference of a fallback to a preferred exchange, as a ratio. 0 is off."""
    revalidate_seconds: float = Field(0, ge=0, le=3600)
    """How long after its TTL a value is served, marked as stale, during its refresh. 0 is off."""
    refresh_ahead: bool = True
    """Refresh entries that are requested often before they expire."""

    streaming: bool = True
    """Serve `/ws` and `/stream`, and use the WebSocket APIs of the exchanges."""
    stream_max_topics: int = Field(200, ge=1, le=10_000)
    """Maximum number of topics that are watched."""
    stream_idle_seconds: float = Field(120, gt=0, le=86400)
    """How long a topic stays open after its last use."""
    stream_max_clients: int = Field(2000, ge=1, le=100_000)
    """Maximum number of connections to `/ws` and `/stream`."""
    stream_max_per_client: int = Field(200, ge=1, le=100_000)
    """Maximum number of streaming connections of one API key or address."""
    stream_max_subscriptions: int = Field(100, ge=1, le=10_000)
    """Maximum number of topics of one connection."""

    redis_host: Host = "localhost"
    """Host of Redis. Empty means memory only."""
    redis_port: int = Field(6379, ge=1, le=65535)
    """Port of Redis."""
    redis_password: SecretStr = NO_SECRET
    """Password of Redis."""
    redis_url: RedisUrl = NO_SECRET
    """Complete URL of Redis. It replaces host, port and password."""
    redis_timeout_seconds: float = Field(0.15, gt=0, le=5)
    """Timeout of one Redis command. After a timeout, the request continues without Redis."""

    max_concurrent: int = Field(100, ge=1, le=10_000)
    """Maximum number of concurrent loads from exchanges. Further loads are answered with 503."""
    request_timeout: float = Field(5, gt=0, le=120)
    """Timeout of a whole request."""
    api_keys: ApiKeys = Field({})
    """Keys that clients send as `X-API-Key`, as `name:key,name:key`. Empty means open access."""
    admin_token: Token = NO_SECRET
    """Bearer token of `/admin`. Empty disables `/admin`."""
    client_rate_limit: int = Field(0, ge=0, le=1_000_000)
    """Maximum number of requests per minute and client. 0 means no limit."""
    trusted_proxies: Networks = ()
    """Addresses and networks of proxies with a trusted `X-Forwarded-For` header."""
    cors_origins: Names = ()
    """Origins whose pages may call the API and open `/ws`."""
    docs_enabled: bool = True
    """Serve `/docs` and `/openapi.json`."""
    metrics_enabled: bool = True
    """Serve `/metrics`."""

    dashboard_symbols: Symbols = tuple(DASHBOARD_SYMBOLS.split())
    """Symbols that the page shows until the user selects others."""
    dashboard_outlier_ratio: float = Field(0.01, gt=0, le=1)
    """The page marks a price that differs by more than this ratio from other exchanges."""
    grafana_url: PageUrl = ""
    """URL of Grafana, for links on the page."""

    log_level: LogLevel = "INFO"
    """Lowest level that is logged."""
    log_format: LogFormat = "text"
    """Format of log lines."""
    gateway_url: Url = "http://127.0.0.1:8000"
    """URL of the gateway, for `maintenance.py`."""

    @property
    def enabled_exchanges(self) -> tuple[str, ...]:
        """The enabled exchanges in order of preference."""
        ordered = dict.fromkeys((*self.exchange_order, *EXCHANGES))
        return tuple(name for name in ordered if self.exchanges[name].enabled)

    @property
    def redis_address(self) -> str:
        """The URL of Redis with its password (a secret). Empty means memory only."""
        if url := self.redis_url.get_secret_value():
            return url
        if not self.redis_host:
            return ""
        password = self.redis_password.get_secret_value()
        credentials = f":{quote(password, safe='')}@" if password else ""
        host = f"[{self.redis_host}]" if ":" in self.redis_host else self.redis_host
        return f"redis://{credentials}{host}:{self.redis_port}/0"

    @property
    def secrets(self) -> tuple[str, ...]:
        """All secret texts, longest first. None of them may appear in logs or answers."""
        secrets = [self.redis_password, self.redis_url, self.admin_token, self.https_proxy]
        secrets += self.api_keys.values()
        for exchange in self.exchanges.values():
            secrets += [exchange.api_key, exchange.api_secret]
        texts = {secret.get_secret_value() for secret in secrets}
        passwords = {urlsplit(text).password or "" for text in texts if "://" in text}
        texts |= passwords | {unquote(password) for password in passwords}
        return tuple(sorted(texts - {""}, key=len, reverse=True))


def load_settings(
    environment: Mapping[str, str] | None = None, env_file: Path = Path(".env")
) -> Settings:
    """Read the settings from `environment` (default: the process's) and from `env_file`.

    Raises `ConfigError` for the first invalid value. Its text never contains a secret.
    """
    values = {**dotenv_values(env_file), **(os.environ if environment is None else environment)}
    texts = {name: (text or "").strip() for name, text in values.items() if name == name.upper()}
    texts = {name: text for name, text in texts.items() if text or name == "REDIS_HOST"}
    exchanges = {
        name: default | _strip_prefix(texts, f"{name.upper()}_")
        for name, default in DEFAULT_EXCHANGES.items()
    }
    try:
        settings = Settings.model_validate(_strip_prefix(texts) | {"exchanges": exchanges})
    except ValidationError as error:
        raise ConfigError(_explain(error, texts)) from None
    if not settings.enabled_exchanges:
        names = ", ".join(f"{name.upper()}_ENABLED" for name in EXCHANGES)
        raise ConfigError(f"{names} are all false: expected at least one that is true.")
    return settings


def _strip_prefix(texts: Mapping[str, str], prefix: str = "") -> dict[str, str]:
    """Map field names to the texts of the environment variables that start with `prefix`."""
    names = [name for name in texts if name.startswith(prefix)]
    return {name.removeprefix(prefix).lower(): texts[name] for name in names}


def foreign_environment() -> dict[str, str]:
    """Return the environment without the gateway's settings, for a process that needs no secret."""
    prefixes = tuple(f"{exchange.upper()}_" for exchange in EXCHANGES)
    names = {name for name in os.environ if not name.upper().startswith(prefixes)}
    own_names = setting_names()
    return {name: os.environ[name] for name in names if name.upper() not in own_names}


def setting_names() -> dict[str, tuple[FieldInfo, object]]:
    """Map the environment variable of each setting to its field and default, in declared order."""
    names: dict[str, tuple[FieldInfo, object]] = {}
    for exchange, profile in PROFILES.items():
        for name, field in ExchangeSettings.model_fields.items():
            if name in profile.budgets or name != "futures_budget":
                default = profile.budgets.get(name, field.default)
                names[f"{exchange}_{name}".upper()] = (field, default)
    for name, field in Settings.model_fields.items():
        if name != "exchanges":
            names[name.upper()] = (field, field.default)
    return names


def _explain(error: ValidationError, texts: Mapping[str, str]) -> str:
    """Describe the first error in one line: the setting, its value and what is expected."""
    problem = error.errors(include_url=False)[0]
    name = "_".join(str(part) for part in problem["loc"] if part != "exchanges").upper()
    field, _ = setting_names()[name]
    expected = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if field.annotation is bool:
        expected = "true or false"
    elif field.annotation in (int, float):
        kind = "a whole number" if field.annotation is int else "a number"
        minimum, maximum = field.metadata
        start = f"above {minimum.gt} up" if hasattr(minimum, "gt") else f"from {minimum.ge}"
        expected = f"{kind} {start} to {maximum.le}"
    text = texts.get(name, "")
    is_secret = "SecretStr" in str(field.annotation) or "@" in text  # a URL may have a password
    value = "" if is_secret else f"={text[:60]!r}"
    return f"{name}{value} is invalid: expected {expected}."
