"""The symbols that each exchange lists. Every requested symbol is checked against them."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import chain, islice
from operator import itemgetter
from typing import Any, NamedTuple

from src.core.errors import MalformedRequest, UnknownExchange

MAX_SYMBOL_LENGTH = 40
MAX_QUOTE_LENGTH = 6  # no exchange has a longer quote; used to split `BTCUSDT`
MAX_SUGGESTIONS = 3
MAX_COMPARED = 64  # similar bases per unknown symbol; a request may have 100 unknown symbols
MAX_CACHED_SUGGESTIONS = 1024  # unknown symbols; a request has up to 100, for each exchange
MAX_CACHED_VARIANTS = 4096  # about the number of bases and quotes of all exchanges
_SHAPE = re.compile(r"[\w.$]{1,24}/[\w.$]{1,24}(:[\w.$]{1,24})?")


class Market(NamedTuple):
    """One market of one exchange."""

    symbol: str
    base: str
    quote: str
    type: str
    """`spot` or `swap`."""


_fields = itemgetter(*Market._fields)


class Markets:
    """The market lists of all exchanges. An exchange is absent until its list is loaded.

    `version` counts the calls of `replace`. Data derived at another version may be outdated.
    """

    def __init__(self, exchanges: Iterable[str], types: Iterable[str]) -> None:
        self.exchanges = tuple(exchanges)
        self.loaded_at: dict[str, float] = {}  # UTC seconds
        self.version = 0
        self._types = frozenset(types)
        self._listed: dict[str, dict[str, Market]] = {}  # exchange -> symbol in capitals -> market
        # Base in capitals -> symbols, each once per exchange that lists it.
        self._by_base: Mapping[str, list[str]] = {}
        self._by_variant: Mapping[str, list[str]] = {}  # variant of a base -> bases
        self._suggestions = lru_cache(MAX_CACHED_SUGGESTIONS)(self._find_suggestions)

    def __len__(self) -> int:
        return sum(len(listed) for listed in self._listed.values())

    def replace(
        self, exchange: str, markets: Iterable[Mapping[str, Any]], loaded_at: float
    ) -> None:
        """Replace the list of an exchange by ccxt's markets.

        Leaves out inactive markets and other market types.
        """
        self._listed[exchange] = {
            market["symbol"].upper(): Market._make(_fields(market))
            for market in markets
            if market["active"] is not False and market["type"] in self._types
        }
        self._by_base = defaultdict(list)
        for listed in self._listed.values():
            for symbol, market in listed.items():
                self._by_base[market.base.upper()].append(symbol)
        self._by_variant = defaultdict(list)
        for base in self._by_base:
            for variant in _variants(base):
                self._by_variant[variant].append(base)
        self._suggestions.cache_clear()
        self.loaded_at[exchange] = loaded_at
        self.version += 1

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
        symbol = unicodedata.normalize("NFC", text).upper()
        if "/" not in symbol:
            symbol = symbol.replace("-", "/", 1)
        if len(symbol) > MAX_SYMBOL_LENGTH or not _SHAPE.fullmatch(symbol):
            split = self._split_symbol(symbol)
            hint = f": did you mean {split}?" if split else ", as in BTC-USDT"
            raise MalformedRequest(
                f"{_printable(text)!r} is not a symbol; write BASE-QUOTE or BASE/QUOTE{hint}"
            )
        return symbol

    def find(self, exchange: str, symbol: str) -> Market | None:
        """Return the market that an exchange lists under a canonical symbol."""
        return self._listed.get(exchange, {}).get(symbol)

    def select(
        self, exchange: str | None, base: str | None, quote: str | None
    ) -> list[dict[str, Any]]:
        """Return the matching markets, each with the exchanges that list it, sorted by symbol."""
        found: dict[str, dict[str, Any]] = {}
        for name in self.exchanges if exchange is None else (exchange,):
            for market in self._listed.get(name, {}).values():
                if base in (None, market.base.upper()) and quote in (None, market.quote.upper()):
                    row = found.setdefault(market.symbol, {**market._asdict(), "exchanges": []})
                    row["exchanges"].append(name)
        return [found[symbol] for symbol in sorted(found)]

    def count(self, exchange: str) -> int:
        """Return the number of markets that an exchange lists."""
        return len(self._listed.get(exchange, {}))

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
