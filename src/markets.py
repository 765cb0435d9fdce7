"""Which symbols each exchange lists: the allow-list every symbol from outside is held against."""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from src.errors import MalformedRequest, UnknownExchange

MAX_SYMBOL_LENGTH = 40
MAX_SUGGESTIONS = 3
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
        self._by_base[exchange] = by_base  # of this exchange alone: all of them took 10 ms
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
        """Symbols close to one that nobody lists; cheap enough to be asked for by a flood of wrong symbols."""
        base = symbol.split("/")[0]
        if not self._of_base(base):
            known = dict.fromkeys(each for own in self._by_base.values() for each in own)
            similar = [each for each in known if each[0] == base[0] and abs(len(each) - len(base)) <= 1]
            close = difflib.get_close_matches(base, similar[:200], n=1, cutoff=0.6)
            if not close:
                return []
            symbol, base = symbol.replace(base, close[0], 1), close[0]
        return difflib.get_close_matches(symbol, self._of_base(base), n=MAX_SUGGESTIONS, cutoff=0.0)

    def _unjoined(self, text: str) -> str | None:
        """Find `BTC-USDT` for `BTCUSDT`, if it is listed."""
        for cut in range(2, min(len(text), MAX_SYMBOL_LENGTH) - 1):
            if f"{text[:cut]}/{text[cut:]}" in self._of_base(text[:cut]):
                return f"{text[:cut]}-{text[cut:]}"
        return None

    def _of_base(self, base: str) -> list[str]:
        """Symbols with this base, of all exchanges."""
        return sorted({symbol for own in self._by_base.values() for symbol in own.get(base, ())})


def _shown(text: str) -> str:
    """What may be shown of a text from outside: its beginning, printable."""
    short = text if len(text) <= MAX_SYMBOL_LENGTH else text[:MAX_SYMBOL_LENGTH] + "..."
    return "".join(sign if sign.isprintable() else "?" for sign in short)
