"""Every setting of the gateway: one frozen object, read once from the environment and `.env`.

Nothing else reads the environment. The name of a setting in the environment is its field name in capitals
(`ticker_ttl_seconds` is `TICKER_TTL_SECONDS`); settings of one exchange carry its name in front
(`BYBIT_ENABLED`). The environment wins over `.env`. An empty value means the default, except `REDIS_HOST`,
where empty means "no Redis".
"""

import math
import os
import re
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, unquote, urlsplit

from dotenv import dotenv_values
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo

from src.exchanges.profiles import PROFILES

EXCHANGES = tuple(PROFILES)
MARKET_TYPES = ("spot", "swap")
_SYMBOL = re.compile(r"(?=.{3,40}$)[\w.$]{1,24}/[\w.$]{1,24}(:[\w.$]{1,24})?")  # who lists it is not known here
DEFAULT_BUDGETS = {name: profile.default_budget for name, profile in PROFILES.items()}


class ConfigError(Exception):
    """A setting has a value the gateway cannot run with; the text names it, its fault and what is allowed."""


def _split(value: object) -> object:
    """Turn a comma list into a tuple without blanks."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _is_url(value: str, *schemes: str) -> bool:
    """Whether it is a URL of one of the kinds; Python's own complaints would quote parts of it."""
    try:
        parts = urlsplit(value)
        usable = parts.port != 0
    except ValueError:
        return False
    return usable and parts.scheme in schemes


def _url(value: object) -> object:
    """Accept an absolute http(s) or ws(s) URL, or nothing; credentials in it would show in logs."""
    if isinstance(value, str) and value:
        host = urlsplit(value).netloc if _is_url(value, "http", "https", "ws", "wss") else ""
        if not host or "@" in host:
            raise ValueError("is no absolute URL; allowed: something like https://host[:port][/path]")
        return value.rstrip("/")
    return value


def _proxy_url(value: object) -> object:
    """Accept the URL of a proxy, which may carry a password."""
    if isinstance(value, str) and value and not _is_url(value, "http", "https"):
        raise ValueError("is no URL of a known kind; allowed: http://..., https://...")
    return value


def _redis_url(value: object) -> object:
    """Accept the URL of one Redis, or of several: a Sentinel or a Cluster by its hosts."""
    if isinstance(value, str) and value and not (_is_url(value, "redis", "rediss", "unix") or _names_hosts(value)):
        raise ValueError(
            "is no URL of a known kind; allowed: redis://..., rediss://..., unix://..., "
            "redis+sentinel://host:port,host:port/name, redis+cluster://host:port,host:port"
        )
    return value


def _names_hosts(url: str) -> bool:
    known = re.fullmatch(r"rediss?\+(sentinel://[^/?#\s]+/[\w.-]+(/\d+)?|cluster://[^/?#\s]+)/?", url)
    credentials = url.partition("://")[2].rpartition("@")[0]
    if not known or set(credentials) & set("@,"):  # one pair for all hosts; signs of it are percent-encoded
        return False
    return all(_is_url(one, "redis", "rediss") and urlsplit(one).hostname for one in split_hosts(url))


def split_hosts(url: str) -> list[str]:
    """Make one plain Redis URL per host out of a valid URL of several; each has the credentials, and no path."""
    scheme, _, rest = url.partition("://")
    credentials, at, hosts = rest.partition("/")[0].rpartition("@")
    return [f"{scheme.partition('+')[0]}://{credentials}{at}{host}" for host in hosts.split(",")]


def _budget(value: object) -> object:
    """Accept `weight/seconds`, both positive whole numbers."""
    if isinstance(value, str):
        if not re.fullmatch(r"[1-9]\d{0,7}/[1-9]\d{0,4}", value):
            raise ValueError("is no budget; allowed: weight/seconds, such as 6000/60")
        weight, seconds = value.split("/")
        return int(weight), int(seconds)
    return value


def _api_keys(value: object) -> object:
    """Read `name:key,name:key`; a key without a name is called after its place in the list."""
    if not isinstance(value, str):
        return value
    keys: dict[str, str] = {}
    for place, item in enumerate(value.split(","), start=1):
        name, separator, key = item.strip().rpartition(":")
        name = name if separator else f"key{place}"
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", name) or not re.fullmatch(r"[!-~]{8,256}", key) or name in keys:
            raise ValueError(
                "is no list of keys; allowed: name:key,name:key with distinct names and keys of 8 to 256 characters"
            )
        keys[name] = key
    return keys


def _host(value: object) -> object:
    """Accept a name or an address, and nothing around it."""
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z0-9._-]*|[0-9A-Fa-f:.]+", value):
        raise ValueError("is no host; allowed: a name or an address, or nothing for memory only")
    return value


def _token(value: object) -> object:
    """Accept what can stand in a header as it is."""
    if isinstance(value, str) and not re.fullmatch(r"([!-~]{8,256})?", value):
        raise ValueError("is no token; allowed: 8 to 256 printable ASCII characters without blanks")
    return value


def _networks(value: object) -> object:
    """Read a comma list of addresses and networks."""
    if not isinstance(value, str):
        return value
    try:
        return tuple(str(ip_network(part.strip(), strict=False)) for part in value.split(",") if part.strip())
    except ValueError:
        raise ValueError("is no list of networks; allowed: such as 10.0.0.0/8,192.168.1.7,fd00::/8") from None


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Networks = Annotated[tuple[str, ...], BeforeValidator(_networks)]
Url = Annotated[str, BeforeValidator(_url)]
ProxyUrl = Annotated[SecretStr, BeforeValidator(_proxy_url)]
RedisUrl = Annotated[SecretStr, BeforeValidator(_redis_url)]
Host = Annotated[str, BeforeValidator(_host)]
Token = Annotated[SecretStr, BeforeValidator(_token)]
Budget = Annotated[tuple[int, int], BeforeValidator(_budget)]
ApiKeys = Annotated[dict[str, SecretStr], BeforeValidator(_api_keys)]
_FROZEN = ConfigDict(frozen=True, validate_default=True, hide_input_in_errors=True)


class ExchangeSettings(BaseModel):
    """The settings of one exchange; in the environment they carry its name in front, as in `KRAKEN_BUDGET`."""

    model_config = _FROZEN

    enabled: bool = Field(True, description="Whether the gateway asks this exchange at all.")
    api_key: SecretStr = Field(
        SecretStr(""), description="Key handed to the client (also `<EX>_KEY`); public data needs none."
    )
    api_secret: SecretStr = Field(SecretStr(""), description="Secret handed to the client (also `<EX>_SECRET`).")
    rest_url: Url = Field("", description="Replaces scheme, host and port of its REST URLs; a path goes in front.")
    ws_url: Url = Field("", description="The same for its WebSocket URLs.")
    budget: Budget = Field((1, 1), description="Request weight allowed per seconds, for all replicas together.")


class Settings(BaseModel):
    """All settings. Numbers ending in `_seconds`, `_ttl` or `_timeout` are seconds."""

    model_config = _FROZEN

    bybit: ExchangeSettings = ExchangeSettings()
    binance: ExchangeSettings = ExchangeSettings()
    kraken: ExchangeSettings = ExchangeSettings()
    exchange_order: Names = Field(EXCHANGES, description="Which exchange is asked first; the others follow.")
    market_types: Names = Field(("spot",), description="Kinds of markets to list: `spot`, `swap` (linear perpetuals).")
    exchange_timeout_seconds: float = Field(3, gt=0, le=60, description="Longest wait for one upstream call.")
    markets_refresh_seconds: float = Field(3600, ge=60, le=86400, description="How often market lists are read again.")
    cb_threshold: int = Field(5, ge=1, le=1000, description="Failures in a row that open an exchange's breaker.")
    cb_window_seconds: float = Field(60, gt=0, le=3600, description="Failures older than this are forgotten.")
    cb_reset_seconds: float = Field(60, gt=0, le=3600, description="How long a breaker stays open the first time.")
    cb_max_open_seconds: float = Field(120, gt=0, le=86400, description="Cap of the open time, which doubles per trip.")
    geo_block_seconds: float = Field(900, gt=0, le=86400, description="Time between probes of a geo-block.")
    https_proxy: ProxyUrl = Field(SecretStr(""), description="Proxy for calls to https exchange URLs.")

    cache_memory_size: int = Field(1000, ge=1, le=1_000_000, description="Most entries kept in memory.")
    cache_memory_ttl: float = Field(30, gt=0, le=86400, description="Longest time memory serves an entry as fresh.")
    ticker_ttl_seconds: float = Field(15, gt=0, le=3600, description="How long a ticker is fresh.")
    orderbook_ttl_seconds: float = Field(2, gt=0, le=3600, description="How long an order book is fresh.")
    ohlcv_ttl_seconds: float = Field(30, gt=0, le=3600, description="How long candles are fresh.")
    trades_ttl_seconds: float = Field(5, gt=0, le=3600, description="How long trades are fresh.")
    negative_ttl_seconds: float = Field(10, gt=0, le=3600, description="How long an exchange's refusal is remembered.")
    ttl_jitter_ratio: float = Field(0.05, ge=0, le=0.5, description="Share of a TTL taken off to spread expiries.")
    stale_seconds: float = Field(60, ge=0, le=86400, description="How long past its TTL a value may stand in, marked.")
    revalidate_seconds: float = Field(
        0, ge=0, le=3600, description="How long past its TTL a value is served, marked, during its refresh; 0 is off."
    )
    refresh_ahead: bool = Field(True, description="Whether what is asked for often is refreshed before it expires.")

    streaming: bool = Field(True, description="Whether `/ws` and `/stream` are served, and exchanges' sockets used.")
    stream_max_topics: int = Field(200, ge=1, le=10_000, description="Most streams watched at once, of all exchanges.")
    stream_idle_seconds: float = Field(
        120, gt=0, le=86400, description="How long a stream is watched after its last use."
    )
    stream_max_clients: int = Field(2000, ge=1, le=100_000, description="Most clients of `/ws` and `/stream` at once.")
    stream_max_per_client: int = Field(200, ge=1, le=100_000, description="Most clients of one API key or address.")
    stream_max_subscriptions: int = Field(100, ge=1, le=10_000, description="Most streams of one client.")

    redis_host: Host = Field("localhost", description="Host of Redis; empty means memory only.")
    redis_port: int = Field(6379, ge=1, le=65535, description="Port of Redis.")
    redis_password: SecretStr = Field(SecretStr(""), description="Password of Redis.")
    redis_url: RedisUrl = Field(SecretStr(""), description="Whole URL of Redis; wins over the three above.")
    redis_timeout_seconds: float = Field(0.15, gt=0, le=5, description="A Redis slower than this is done without.")

    max_concurrent: int = Field(100, ge=1, le=10_000, description="Most upstream loads in flight; more get 503.")
    request_timeout: float = Field(5, gt=0, le=120, description="Longest time a request may take in all.")
    api_keys: ApiKeys = Field({}, description="Keys clients must send as `X-API-Key`; empty means open.")
    admin_token: Token = Field(SecretStr(""), description="Bearer token of `/admin`; empty switches it off.")
    client_rate_limit: int = Field(0, ge=0, le=1_000_000, description="Requests a minute per client; 0 is no limit.")
    trusted_proxies: Networks = Field((), description="Proxies whose `X-Forwarded-For` is believed.")
    cors_origins: Names = Field((), description="Origins browsers may call from.")
    docs_enabled: bool = Field(True, description="Whether `/docs` and `/openapi.json` are served.")
    metrics_enabled: bool = Field(True, description="Whether `/metrics` is served.")
    dashboard_symbols: Names = Field(
        ("BTC/USDT", "ETH/USDT", "SOL/USDT", "XRP/USDT", "DOGE/USDT", "ADA/USDT", "LINK/USDT", "LTC/USDT"),
        description="Symbols the page shows until its viewer chooses others.",
    )
    dashboard_outlier_ratio: float = Field(
        0.01, gt=0, le=1, description="Share a price may differ by from other exchanges' before the page marks it."
    )
    grafana_url: Url = Field("", description="Where Grafana is, for the links of the page.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least level that is logged.")
    log_format: Literal["text", "json"] = Field("text", description="Shape of a log line.")
    gateway_url: Url = Field("http://127.0.0.1:8000", description="Where `maintenance.py` finds the gateway.")

    @model_validator(mode="after")
    def _check_names(self) -> "Settings":
        """Hold the name lists against what exists, and symbols against the form they have."""
        for name, values, allowed in (
            ("exchange_order", self.exchange_order, EXCHANGES),
            ("market_types", self.market_types, MARKET_TYPES),
        ):
            wrong = [value for value in values if value not in allowed]
            if wrong or len(set(values)) != len(values) or not values:
                raise ValueError(f"{name}: is no list of distinct known names; allowed: {', '.join(allowed)}")
        symbols = {symbol.upper().replace("-", "/", 1) for symbol in self.dashboard_symbols}
        if not all(map(_SYMBOL.fullmatch, symbols)) or not 1 <= len(symbols) == len(self.dashboard_symbols) <= 100:
            raise ValueError("dashboard_symbols: is no list of 1 to 100 distinct symbols; allowed: such as BTC-USDT")
        if self.grafana_url.startswith("ws"):
            raise ValueError("grafana_url: is no URL of a page; allowed: http://..., https://...")
        if not self.enabled_exchanges:
            raise ValueError("bybit_enabled: and all others are false; allowed: at least one that is true")
        return self

    def exchange(self, name: str) -> ExchangeSettings:
        """Return the settings of one exchange; raises `KeyError` for a name that is not in `EXCHANGES`."""
        return {"bybit": self.bybit, "binance": self.binance, "kraken": self.kraken}[name]

    @property
    def enabled_exchanges(self) -> tuple[str, ...]:
        """The enabled exchanges, most preferred first."""
        order = self.exchange_order + tuple(name for name in EXCHANGES if name not in self.exchange_order)
        return tuple(name for name in order if self.exchange(name).enabled)

    @property
    def redis_address(self) -> str:
        """The URL of Redis with its password (a secret), or an empty string for memory only."""
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
        """Every secret text that must never leave the process, longest first."""
        holders = [self.redis_password, self.redis_url, self.admin_token, self.https_proxy, *self.api_keys.values()]
        for name in EXCHANGES:
            holders += [self.exchange(name).api_key, self.exchange(name).api_secret]
        values = {holder.get_secret_value() for holder in holders}
        passwords = {urlsplit(value).password or "" for value in values if "://" in value}
        texts = values | passwords | {unquote(password) for password in passwords}
        return tuple(sorted((text for text in texts if text), key=len, reverse=True))


def load_settings(environment: Mapping[str, str] | None = None, env_file: Path = Path(".env")) -> Settings:
    """Read the settings from the environment (or the mapping given instead) and, below it, from `env_file`.

    Raises `ConfigError` with one line for the first bad value; the value of a secret is never in it.
    """
    values: dict[str, str | None] = {**dotenv_values(env_file), **(os.environ if environment is None else environment)}
    found = _pick(values, Settings.model_fields)
    for name in EXCHANGES:
        prefix = f"{name.upper()}_"
        own = _pick(values, ExchangeSettings.model_fields, prefix)
        for short, full in (("KEY", "api_key"), ("SECRET", "api_secret")):
            if full not in own and (value := values.get(prefix + short)):
                own[full] = value
        found[name] = {"budget": DEFAULT_BUDGETS[name], **own}
    try:
        return Settings.model_validate(found)
    except ValidationError as error:
        raise ConfigError(_explain(error, found)) from None


def foreign_environment() -> dict[str, str]:
    """Return the environment without any setting of ours, for a process that has no business with our secrets."""
    own = set(setting_names()) | {
        f"{exchange.upper()}_{short}" for exchange in EXCHANGES for short in ("KEY", "SECRET")
    }
    return {name: value for name, value in os.environ.items() if name.upper() not in own}


def setting_names() -> dict[str, tuple[FieldInfo, object]]:
    """Map each setting's name in the environment to its field and default, in the order they are declared."""
    names: dict[str, tuple[FieldInfo, object]] = {}
    for exchange in EXCHANGES:
        for name, field in ExchangeSettings.model_fields.items():
            default = DEFAULT_BUDGETS[exchange] if name == "budget" else field.default
            names[f"{exchange}_{name}".upper()] = (field, default)
    for name, field in Settings.model_fields.items():
        if name not in EXCHANGES:
            names[name.upper()] = (field, field.default)
    return names


def _pick(values: Mapping[str, str | None], fields: Mapping[str, FieldInfo], prefix: str = "") -> dict[str, Any]:
    """Take the values that are set; LOG_LEVEL and the like are accepted in any case."""
    picked: dict[str, Any] = {}
    for name in fields:
        value = values.get(prefix + name.upper())
        if value is None or (value.strip() == "" and name != "redis_host"):
            continue
        value = value.strip()
        picked[name] = {"log_level": value.upper(), "log_format": value.lower()}.get(name, value)
    return picked


def _explain(error: ValidationError, found: Mapping[str, Any]) -> str:
    """Say the first fault in one line: the setting, what is wrong with its value, what is allowed."""
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        name, message = message.split(": ", 1)
        return f"{name.upper()} {message}"
    name = "_".join(str(part) for part in first["loc"] if part in EXCHANGES or str(part) in _ALL_FIELDS)
    field = setting_names()[name.upper()][0]
    value: Any = found
    for part in first["loc"]:
        value = value.get(part, "") if isinstance(value, dict) else value
    secret = "SecretStr" in str(field.annotation) or "@" in str(value)  # an address may carry a password
    shown = "" if secret else f"={str(value)[:60]!r}"
    if first["type"] == "value_error":
        return f"{name.upper()}{shown} {message}"
    return f"{name.upper()}{shown} is not accepted; allowed: {_allowed(field)}"


def _allowed(field: FieldInfo) -> str:
    """Describe what a field takes, from its type and bounds."""
    if field.annotation is bool:
        return "true or false"
    if field.annotation not in (int, float):
        return ", ".join(str(choice) for choice in getattr(field.annotation, "__args__", ("a text",)))
    low, high, strict = -math.inf, math.inf, False
    for bound in field.metadata:
        low, strict = getattr(bound, "ge", low), strict or hasattr(bound, "gt")
        low = getattr(bound, "gt", low)
        high = getattr(bound, "le", high)
    kind = "a whole number" if field.annotation is int else "a number"
    return f"{kind} {'above' if strict else 'from'} {low:.15g} {'up to' if strict else 'to'} {high:.15g}"


_ALL_FIELDS = frozenset(Settings.model_fields) | frozenset(ExchangeSettings.model_fields)
