"""The symbols that each exchange lists. Every requested symbol is checked against them."""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain, islice
from operator import itemgetter
from typing import Any, NamedTuple

from src.core.errors import (
    BadUpstreamData,
    GatewayError,
    Maintenance,
    MalformedRequest,
    MarketHalted,
    UnknownExchange,
    UnknownSymbol,
)
from src.exchanges.profiles import ENDED, HALTED, QUOTED

MAX_SYMBOL_LENGTH = 40
MAX_QUOTE_LENGTH = 6  # no exchange has a longer quote; used to split `BTCUSDT`
MAX_SUGGESTIONS = 3
MAX_COMPARED = 64  # similar bases per unknown symbol; a request may have 100 unknown symbols
MAX_CACHED_SUGGESTIONS = 1024  # unknown symbols; a request has up to 100, for each exchange
MAX_CACHED_VARIANTS = 4096  # about the number of bases and quotes of all exchanges
# A list with less than this share of the markets of the list before it is broken. If this share of
# the markets is no longer quoted, the exchange is in maintenance.
MIN_SHARE = 0.5
# A list is kept for this long in place of broken ones, and a halted market in place of none.
KEPT_SECONDS = 86400.0
_SHAPE = re.compile(r"[\w.$]{1,24}/[\w.$]{1,24}(:[\w.$]{1,24})?")


class Market(NamedTuple):
    """One market of one exchange."""

    symbol: str
    base: str
    quote: str
    type: str
    """`spot` or `swap`."""
    id: str
    """The exchange's id, which identifies the market."""
    ws_name: str
    """The exchange's name of the market on its sockets."""
    status: str
    """The exchange's own word, such as `TRADING`."""


_fields = itemgetter(*Market._fields)


class Markets:
    """The market lists of all exchanges. An exchange is absent until its list is loaded.

    `version` counts the calls of `replace`. Data derived at another version may be outdated.
    """

    def __init__(self, exchanges: Iterable[str], types: Iterable[str]) -> None:
        self.exchanges = tuple(exchanges)
        self.loaded_at: dict[str, float] = {}  # UTC seconds
        self.version = 0
        self.in_maintenance: set[str] = set()  # exchanges that halted most of their markets
        self._types = frozenset(types)
        self._listed: dict[str, dict[str, Market]] = {}  # exchange -> symbol in capitals -> market
        # The same for markets that an exchange lists, but whose prices are old, and since when they
        # are halted (UTC seconds).
        self._halted: dict[str, dict[str, Market]] = {}
        self._halted_since: dict[str, dict[str, float]] = {}
        # Base in capitals -> symbols, each once per exchange that lists it.
        self._by_base: Mapping[str, list[str]] = {}
        self._by_variant: Mapping[str, list[str]] = {}  # variant of a base -> bases
        # Symbols that differ from another one only in case. All others are matched in capitals.
        self._case_sensitive: set[str] = set()
        self._suggestions = lru_cache(MAX_CACHED_SUGGESTIONS)(self._find_suggestions)

    def replace(
        self, exchange: str, markets: Iterable[Mapping[str, Any]], loaded_at: float
    ) -> None:
        """Replace the list of an exchange by the markets of a snapshot.

        Leaves out ended markets and other market types.
        """
        by_key = _by_key(filter(self._is_served, markets))
        quoted = _select(by_key, QUOTED)
        self._set_halted(exchange, quoted, _select(by_key, HALTED), loaded_at)
        self._listed[exchange] = quoted
        self._index()
        self.loaded_at[exchange] = loaded_at
        self.version += 1

    def check_size(
        self, exchange: str, markets: Iterable[Mapping[str, Any]], loaded_at: float
    ) -> None:
        """Raise `BadUpstreamData` if most of the previous list is missing in a new one."""
        size = sum(map(self._is_served, markets))
        before = self.count(exchange)
        is_recent = loaded_at - self.loaded_at.get(exchange, 0.0) < KEPT_SECONDS
        if is_recent and size < before * MIN_SHARE:
            raise BadUpstreamData(
                f"the market list has {size} markets instead of {before}; the old list is kept",
                exchange=exchange,
            )

    def _is_served(self, market: Mapping[str, Any]) -> bool:
        is_open = market["state"] != ENDED and market.get("inverse") is not True
        return is_open and market["type"] in self._types

    def _set_halted(
        self,
        exchange: str,
        quoted: Mapping[str, Market],
        halted: Mapping[str, Market],
        loaded_at: float,
    ) -> None:
        """Note which markets are halted: those that traded within `KEPT_SECONDS`.

        Exchanges list delisted markets with the same status. Only in a maintenance, every halted
        market counts.
        """
        since = self._halted_since.get(exchange, {})
        known = self._listed.get(exchange, {})
        is_few = len(quoted) < max(1, self.count(exchange) * MIN_SHARE)
        is_maintenance = bool(halted) and is_few
        self._halted[exchange] = {
            symbol: market
            for symbol, market in halted.items()
            if symbol in known
            or loaded_at - since.get(symbol, -math.inf) < KEPT_SECONDS
            or (is_maintenance and not known)
        }
        self._halted_since[exchange] = {
            symbol: since.get(symbol, loaded_at) for symbol in self._halted[exchange]
        }
        self.in_maintenance.discard(exchange)
        if is_maintenance:
            self.in_maintenance.add(exchange)

    def _index(self) -> None:
        """Prepare the search for symbols and suggestions."""
        everything = chain(*self._listed.values(), *self._halted.values())
        self._case_sensitive = {key for key in everything if key != key.upper()}
        self._by_base = defaultdict(list)
        for listed in self._listed.values():
            for symbol, market in listed.items():
                self._by_base[market.base.upper()].append(symbol)
        self._by_variant = defaultdict(list)
        for base in self._by_base:
            for variant in _variants(base):
                self._by_variant[variant].append(base)
        self._suggestions.cache_clear()

    def check_exchange(self, exchange: str) -> str:
        """Return the name of a configured exchange, in lower case. Raises `UnknownExchange`."""
        name = exchange.lower()
        if name in self.exchanges:
            return name
        configured = ", ".join(self.exchanges)
        raise UnknownExchange(
            f"the exchange {_printable(exchange)!r} is not configured; use one of: {configured}"
        )

    def canonical(self, text: str) -> str:
        """Return a symbol in capitals with a slash: `btc-usdt` becomes `BTC/USDT`.

        Checks only the form; `find` checks whether an exchange lists it. Raises `MalformedRequest`.
        """
        symbol = unicodedata.normalize("NFC", text)
        if "/" not in symbol:
            symbol = symbol.replace("-", "/", 1)
        if symbol in self._case_sensitive:
            return symbol
        symbol = symbol.upper()
        if len(symbol) > MAX_SYMBOL_LENGTH or not _SHAPE.fullmatch(symbol):
            split = self._split_symbol(symbol)
            hint = f": did you mean {split}?" if split else ", as in BTC-USDT"
            raise MalformedRequest(
                f"{_printable(text)!r} is not a symbol; write BASE-QUOTE or BASE/QUOTE{hint}"
            )
        return symbol

    def find(self, exchange: str, symbol: str) -> Market | None:
        """Return the market with live prices that an exchange lists under a canonical symbol."""
        return self._listed.get(exchange, {}).get(symbol)

    def explain_missing(self, symbol: str, exchanges: Sequence[str]) -> GatewayError:
        """Return the error of a symbol that none of the exchanges has live prices for."""
        for name in exchanges:
            if symbol in self._halted.get(name, {}):
                return self._halted_error(name, self._halted[name][symbol])
        suggestions = self.suggestions(symbol)
        hint = f"; similar symbols: {', '.join(suggestions)}" if suggestions else "; see /markets"
        if ":" in symbol and "swap" not in self._types:
            hint = "; MARKET_TYPES excludes swaps" + hint
        text = f"{symbol} is not listed on {' or '.join(exchanges)}{hint}"
        return UnknownSymbol(text, symbol=symbol, suggestions=suggestions or None)

    def _halted_error(self, name: str, market: Market) -> GatewayError:
        symbol = market.symbol
        if name in self.in_maintenance:
            text = f"{name} is in maintenance (status {market.status}); ask again in a minute"
            return Maintenance(text, exchange=name, symbol=symbol)
        text = f"{name} has halted {symbol} (status {market.status}), so its prices are old"
        return MarketHalted(f"{text}; ask again later", exchange=name, symbol=symbol)

    def is_missing(self, exchanges: Iterable[str], text: str) -> bool:
        """Return True if a text is a symbol, but none of the exchanges has live prices for it."""
        try:
            symbol = self.canonical(text)
        except MalformedRequest:
            return False
        return not any(self.find(exchange, symbol) for exchange in exchanges)

    def select(
        self, exchange: str | None, base: str | None, quote: str | None
    ) -> list[dict[str, Any]]:
        """Return the matching markets, each with the exchanges that list it, sorted by symbol."""
        found: dict[str, dict[str, Any]] = {}
        for name in self.exchanges if exchange is None else (exchange,):
            for market in self._all(name).values():
                if base in (None, market.base.upper()) and quote in (None, market.quote.upper()):
                    row = found.setdefault(market.symbol, _row(market))
                    row["exchanges"].append(name)
                    row["ids"][name] = market.id
                    row["statuses"][name] = market.status
        return [found[symbol] for symbol in sorted(found)]

    def _all(self, exchange: str) -> dict[str, Market]:
        """Return the markets that an exchange lists, with those halted recently."""
        return self._listed.get(exchange, {}) | self._halted.get(exchange, {})

    def count(self, exchange: str) -> int:
        """Return the number of markets that an exchange lists, with those halted recently."""
        return len(self._all(exchange))

    def suggestions(self, symbol: str) -> list[str]:
        """Return up to `MAX_SUGGESTIONS` listed symbols similar to an unlisted one, best first.

        The result is cached until a market list changes. The work does not grow with the number of
        markets, so a request with many unknown symbols does not delay others.
        """
        return list(self._suggestions(symbol))

    def _find_suggestions(self, symbol: str) -> list[str]:
        base, _, quote = symbol.partition("/")
        found = Counter(self._by_base.get(base)) or self._count_similar(base, quote)
        del found[symbol]  # another exchange lists it
        variants = frozenset(_variants(quote))

        def distance(listed: str) -> tuple[bool, int, str]:
            is_other_quote = variants.isdisjoint(_variants(listed.partition("/")[2]))
            return is_other_quote, -found[listed], listed

        return sorted(found, key=distance)[:MAX_SUGGESTIONS]

    def _count_similar(self, base: str, quote: str) -> Counter[str]:
        """Return symbols with a similar base, preferably with this quote."""
        groups = (self._by_variant.get(variant, ()) for variant in _variants(base))
        similar = dict.fromkeys(islice(chain.from_iterable(groups), MAX_COMPARED))
        symbols = (f"{name}/{quote}" for name in similar)
        found = Counter(
            symbol for symbol in symbols for listed in self._listed.values() if symbol in listed
        )
        return found or Counter(self._by_base.get(next(iter(similar), "")))

    def _split_symbol(self, text: str) -> str | None:
        """Return `BTC-USDT` for `BTCUSDT`, if it is listed."""
        end = len(text.partition(":")[0])
        for cut in range(max(2, end - MAX_QUOTE_LENGTH), end - 1):
            symbol = f"{text[:cut]}/{text[cut:]}"
            if any(symbol in listed for listed in self._listed.values()):
                return symbol.replace("/", "-", 1)
        return None


def _by_key(rows: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the rows by symbol in capitals.

    Of two symbols that differ only in case, the one with more capitals comes first, and the other
    one keeps its own spelling: tokenised shares, such as AAPLx, differ from coins only in case.
    """
    by_key: dict[str, Mapping[str, Any]] = {}
    for row in sorted(rows, key=itemgetter("symbol")):
        symbol = row["symbol"]
        capitals = symbol.upper()
        by_key[symbol if capitals in by_key else capitals] = row
    return by_key


def _select(by_key: Mapping[str, Mapping[str, Any]], state: str) -> dict[str, Market]:
    return {key: Market._make(_fields(row)) for key, row in by_key.items() if row["state"] == state}


def _row(market: Market) -> dict[str, Any]:
    """Return a row of `/markets` without exchanges."""
    names = {"symbol": market.symbol, "base": market.base, "quote": market.quote}
    return names | {"type": market.type, "exchanges": [], "ids": {}, "statuses": {}}


@lru_cache(MAX_CACHED_VARIANTS)
def _variants(text: str) -> tuple[str, ...]:
    """Return the text, and the text without any one of its characters.

    Texts that differ by one character share a variant.
    """
    if len(text) <= 2:  # two letters with one in common are not similar
        return (text,)
    shorter = (text[:index] + text[index + 1 :] for index in range(len(text)))
    return (text, *dict.fromkeys(shorter))


def _printable(text: str) -> str:
    """Return the printable beginning of a text from outside."""
    short = text if len(text) <= MAX_SYMBOL_LENGTH else text[:MAX_SYMBOL_LENGTH] + "..."
    return "".join(character if character.isprintable() else "?" for character in short)
