"""Which symbols each exchange lists: the allow-list every symbol from outside is held against."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import chain, islice
from typing import Any, NamedTuple

from src.core.errors import MalformedRequest, UnknownExchange

MAX_SYMBOL_LENGTH = 40
MAX_QUOTE_LENGTH = 6  # where `BTCUSDT` is taken apart: no exchange has a longer quote
MAX_SUGGESTIONS = 3
MAX_COMPARED = 64  # listings of similar bases looked at for one unknown symbol; a request may have 100 of these
MAX_CACHED_SUGGESTIONS = 1024  # unknown symbols; one request has up to 100, and asks once per exchange
_SHAPE = re.compile(r"[\w.$]{1,24}/[\w.$]{1,24}(:[\w.$]{1,24})?")


class Market(NamedTuple):
    """One market of one exchange; `type` is `spot` or `swap`."""

    symbol: str
    base: str
    quote: str
    type: str


class Markets:
    """The market lists of all exchanges; an exchange is absent until its list was loaded.

    `version` counts the calls of `replace`: what was derived from the lists at another version may be wrong by now.
    """

    def __init__(self, exchanges: Iterable[str], types: Iterable[str]) -> None:
        self.exchanges = tuple(exchanges)
        self.loaded_at: dict[str, float] = {}  # UTC seconds
        self.version = 0
        self._types = frozenset(types)
        self._listed: dict[str, dict[str, Market]] = {}  # exchange -> symbol in capitals -> market
        self._by_base: dict[str, dict[str, list[str]]] = {}  # exchange -> base in capitals -> symbols
        self._by_variant: dict[str, dict[str, list[str]]] = {}  # exchange -> variant of a base -> bases
        self._suggestions = lru_cache(MAX_CACHED_SUGGESTIONS)(self._find_suggestions)

    def __len__(self) -> int:
        return sum(len(listed) for listed in self._listed.values())

    def replace(self, exchange: str, markets: Iterable[Mapping[str, Any]], loaded_at: float) -> None:
        """Take over the list of an exchange, as ccxt's market structures; inactive and other types are left out."""
        self._listed[exchange] = {
            market["symbol"].upper(): Market(market["symbol"], market["base"], market["quote"], market["type"])
            for market in markets
            if market["active"] is not False and market["type"] in self._types
        }
        by_base: dict[str, list[str]] = {}
        for symbol, market in self._listed[exchange].items():
            by_base.setdefault(market.base.upper(), []).append(symbol)
        by_variant: dict[str, list[str]] = {}
        for base in by_base:
            for variant in _variants(base):
                by_variant.setdefault(variant, []).append(base)
        self._by_base[exchange], self._by_variant[exchange] = by_base, by_variant
        self._suggestions.cache_clear()
        self.loaded_at[exchange] = loaded_at
        self.version += 1

    def check_exchange(self, exchange: str) -> str:
        """Return the name of a configured exchange, in lower case; raises `UnknownExchange`."""
        if (name := exchange.lower()) in self.exchanges:
            return name
        configured = ", ".join(self.exchanges)
        raise UnknownExchange(f"no exchange called {_shown(exchange)!r} is configured; configured: {configured}")

    def canonical(self, text: str) -> str:
        """Return a symbol in capitals with a slash: `btc-usdt` is `BTC/USDT`. Raises `MalformedRequest`.

        This is about the form only; whether anybody lists it is for `find`.
        """
        symbol = unicodedata.normalize("NFC", text).upper()
        if "/" not in symbol:
            symbol = symbol.replace("-", "/", 1)
        if len(symbol) > MAX_SYMBOL_LENGTH or not _SHAPE.fullmatch(symbol):
            hint = self._unjoined(symbol)
            raise MalformedRequest(
                f"{_shown(text)!r} is no symbol; write BASE-QUOTE or BASE/QUOTE"
                + (f": did you mean {hint}?" if hint else ", as in BTC-USDT")
            )
        return symbol

    def find(self, exchange: str, symbol: str) -> Market | None:
        """Return the market an exchange lists under a canonical symbol."""
        return self._listed.get(exchange, {}).get(symbol)

    def select(self, exchange: str | None, base: str | None, quote: str | None) -> list[dict[str, Any]]:
        """Return the markets that match, each with the exchanges that list it, by symbol."""
        found: dict[str, dict[str, Any]] = {}
        for name in self.exchanges if exchange is None else (exchange,):
            for market in self._listed.get(name, {}).values():
                if base in (None, market.base.upper()) and quote in (None, market.quote.upper()):
                    row = found.setdefault(market.symbol, {**market._asdict(), "exchanges": []})
                    row["exchanges"].append(name)
        return [found[symbol] for symbol in sorted(found)]

    def count(self, exchange: str) -> int:
        """Markets an exchange lists."""
        return len(self._listed.get(exchange, {}))

    def suggestions(self, symbol: str) -> list[str]:
        """Return up to `MAX_SUGGESTIONS` listed symbols that are spelled like an unlisted one, best first.

        The result is cached until a market list changes. The work does not grow with the number of markets, so a
        request or message with many unknown symbols does not delay others.
        """
        return list(self._suggestions(symbol))

    def _find_suggestions(self, symbol: str) -> list[str]:
        base, _, quote = symbol.partition("/")
        found = self._symbols_of(base)
        if not found:
            groups = (own.get(variant, ()) for variant in _variants(base) for own in self._by_variant.values())
            bases = dict.fromkeys(islice(chain.from_iterable(groups), MAX_COMPARED))
            same_quote = (f"{name}/{quote}" for name in bases)
            found = Counter(name for name in same_quote for listed in self._listed.values() if name in listed)
            found = found or self._symbols_of(next(iter(bases), ""))
        del found[symbol]  # another exchange lists it
        variants = frozenset(_variants(quote))

        def difference(listed: str) -> tuple[bool, int, str]:
            return variants.isdisjoint(_variants(listed.partition("/")[2])), -found[listed], listed

        return sorted(found, key=difference)[:MAX_SUGGESTIONS]

    def _symbols_of(self, base: str) -> Counter[str]:
        """Return the symbols with this base, each with the number of exchanges that list it."""
        return Counter(symbol for own in self._by_base.values() for symbol in own.get(base, ()))

    def _unjoined(self, text: str) -> str | None:
        """Find `BTC-USDT` for `BTCUSDT`, if it is listed."""
        end = len(text.partition(":")[0])
        for cut in range(max(2, end - MAX_QUOTE_LENGTH), end - 1):
            if any(f"{text[:cut]}/{text[cut:]}" in listed for listed in self._listed.values()):
                return f"{text[:cut]}-{text[cut:]}"
        return None


@lru_cache(4096)  # about as many bases and quotes as all exchanges list
def _variants(text: str) -> tuple[str, ...]:
    """Return a text, and the text without any one of its characters: texts that differ by one character share one."""
    shorter = (text[:at] + text[at + 1 :] for at in range(len(text)))
    return (text, *dict.fromkeys(shorter)) if len(text) > 2 else (text,)  # two letters with one in common are not alike


def _shown(text: str) -> str:
    """What may be shown of a text from outside: its beginning, printable."""
    short = text if len(text) <= MAX_SYMBOL_LENGTH else text[:MAX_SYMBOL_LENGTH] + "..."
    return "".join(sign if sign.isprintable() else "?" for sign in short)
