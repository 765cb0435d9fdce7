"""Requests for an exchange's own API: what may be asked, and how equal requests are recognised."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode

from src.cache.entry import Key
from src.core import errors
from src.raw.wire_api import WIRE_APIS, Params, WireApi, WirePath

KIND = "raw"  # of cache keys
MAX_PARAMS = 20  # more than any of the listed paths has
# What signed requests have. Their answers are private, so they must not reach a shared cache.
SIGNED_HEADERS = re.compile(rb"x-mbx-apikey|api-key|api-sign|x-bapi-.*|x-kraken-.*|authorization")
SIGNED_PARAMS = frozenset({"signature", "apikey", "api_key", "sign", "nonce", "otp"})


@dataclass(frozen=True, slots=True)
class RawRequest:
    """A request that the gateway may pass on."""

    exchange: str
    template: str
    """The path as `WireApi.paths` has it, for metrics."""
    path: str
    query: str
    """The parameters in alphabetical order: equal requests have equal texts."""
    params: Params
    rules: WirePath

    @property
    def api(self) -> WireApi:
        """The API of the exchange."""
        return WIRE_APIS[self.exchange]

    @property
    def is_swap(self) -> bool:
        """True if the request is about swaps."""
        is_category = self.params.get("category") in self.api.swap_categories
        return self.rules.is_swap or is_category

    @property
    def market_id(self) -> str:
        """The exchange's id of the only market that the request is about. Empty if several."""
        name = self.params.get(self.api.market_param, "")
        return "" if "," in name else name

    @property
    def timeframe(self) -> str | None:
        """The length of the requested candles. None if it is not one of `/ohlcv`."""
        return self.api.intervals.get(self.params.get("interval", "1"))

    def key(self, symbol: str) -> Key:
        """Return the key of the answer in the cache. `symbol` is that of the market."""
        return Key(self.exchange, KIND, symbol, (self.path, self.query))

    @property
    def operation(self) -> str:
        """The endpoint: calls of the same kind share its pauses."""
        return self.rules.kind or self.template

    def url(self, rest_url: str) -> str:
        """Return the address at the exchange, or at the host that replaces it."""
        host = rest_url or self.api.host_of(self.path)
        return f"{host}/{self.path}" + (f"?{self.query}" if self.query else "")


def parse(exchange: str, path: str, query: str) -> RawRequest:
    """Return the request for a path and query of an exchange's API.

    Raises `NotFound` for paths that are not listed, `PrivateRequest` for signed requests, and
    `InvalidParameter`.
    """
    api = WIRE_APIS[exchange]
    found = api.find(path)
    if found is None:
        text = f"{path} is not one of the public market-data paths of {exchange}: "
        raise errors.NotFound(text + ", ".join(api.paths))
    template, rules = found
    params = _parse_params(query)
    names = {name.lower() for name, _ in params}
    if names & SIGNED_PARAMS:
        raise errors.PrivateRequest(_refusal_of_signed(min(names & SIGNED_PARAMS)))
    ordered = sorted(params, key=lambda item: item[0])  # the order of equal names stays
    return RawRequest(exchange, template, path, urlencode(ordered), dict(ordered), rules)


def _parse_params(query: str) -> list[tuple[str, str]]:
    try:
        return parse_qsl(
            query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=MAX_PARAMS
        )
    except ValueError:
        text = f"the query is not name=value&name=value with at most {MAX_PARAMS} names"
        raise errors.InvalidParameter(text) from None


def check_headers(names: Iterable[bytes]) -> None:
    """Raise `PrivateRequest` if a header field belongs to a signed request."""
    for name in names:
        if SIGNED_HEADERS.fullmatch(name.lower()):
            raise errors.PrivateRequest(_refusal_of_signed(name.decode("latin-1")))


def _refusal_of_signed(name: str) -> str:
    text = "send signed requests and keys to the exchange itself: the gateway is read-only"
    return f"{name} belongs to a private request; {text}"
