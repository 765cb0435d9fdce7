"""What the three simulated exchanges say, as texts to fill in, and how they limit rates; no HTTP in here.

A record of a sheet has a path with the kind of rows it serves, one line for the text around the rows, and the text of
each row. Fields are filled in by name, from the market, the pair (`Exchange.fields`) and the call (`Exchange.answer`).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from src.sandbox.market import DAY, PRICES, Market, Pair, Row

COINS = [*list(PRICES)[:30], "EUR", "USDC"]
MAJORS = COINS[:8]
PERIODS = {"": 60, "s": 1, "m": 60, "h": 3_600, "d": DAY, "D": DAY, "w": 7 * DAY, "W": 7 * DAY}
KRAKEN_NAMES = {"BTC": "XBT", "DOGE": "XDG"}
KRAKEN_OLD = {"BTC", "ETH", "XRP", "LTC", "XLM", "XMR"}
BYBIT = """
/v5/market/time time
{"timeSecond":"%(second)d","timeNano":"%(ms)d000000"}
/v5/market/instruments-info markets
{"category":"%(category)s","list":[%(rows)s]}
{"symbol":"%(id)s","baseCoin":"%(base)s","quoteCoin":"%(quote)s","status":"Trading","settleCoin":"%(quote)s",
"contractType":"LinearPerpetual","lotSizeFilter":{"basePrecision":"0.00000001","qtyStep":"0.00000001"},
"priceFilter":{"tickSize":"%(tick)s"}}
/v5/market/tickers tickers
{"category":"%(category)s","list":[%(rows)s]}
{"symbol":"%(id)s","lastPrice":"%(last)s","prevPrice24h":"%(open)s","price24hPcnt":"%(change).6f",%(extra)s
"highPrice24h":"%(high)s","lowPrice24h":"%(low)s","volume24h":"%(volume).8f","turnover24h":"%(turnover).8f",
"bid1Price":"%(bid)s","bid1Size":"%(bid_size).8f","ask1Price":"%(ask)s","ask1Size":"%(ask_size).8f"}
/v5/market/kline candles
{"category":"%(category)s","symbol":"%(id)s","list":[%(rows)s]}
["%(ms)d","%(open)s","%(high)s","%(low)s","%(close)s","%(volume).8f","0"]
/v5/market/orderbook book
{"s":"%(id)s","b":[%(bids)s],"a":[%(asks)s],"ts":%(ms)d,"u":%(ms)d,"seq":%(ms)d}
["%(price)s","%(amount).8f"]
/v5/market/recent-trade trades
{"category":"%(category)s","list":[%(rows)s]}
{"execId":"%(number)d","symbol":"%(id)s","price":"%(price)s","size":"%(amount).8f","side":"%(side)s","time":"%(ms)d"}
"""
BINANCE = """
/api/v3/time time
{"serverTime":%(ms)d}
/api/v3/exchangeInfo markets
{"timezone":"UTC","serverTime":%(ms)d,"symbols":[%(rows)s]}
{"symbol":"%(id)s","status":"TRADING","baseAsset":"%(base)s","quoteAsset":"%(quote)s",%(extra)s
"filters":[{"filterType":"PRICE_FILTER","tickSize":"%(tick)s"},{"filterType":"LOT_SIZE","stepSize":"0.00000001"}]}
/api/v3/ticker/24hr tickers
[%(rows)s]
{"symbol":"%(id)s","lastPrice":"%(last)s","openPrice":"%(open)s","highPrice":"%(high)s","lowPrice":"%(low)s",
"volume":"%(volume).8f","quoteVolume":"%(turnover).8f","weightedAvgPrice":"%(average)s","closeTime":%(now)d,
"bidPrice":"%(bid)s","bidQty":"%(bid_size).8f","askPrice":"%(ask)s","askQty":"%(ask_size).8f"}
/fapi/v1/ticker/24hr tickers
[%(rows)s]
{"symbol":"%(id)s","lastPrice":"%(last)s","openPrice":"%(open)s","highPrice":"%(high)s","lowPrice":"%(low)s",
"volume":"%(volume).8f","quoteVolume":"%(turnover).8f","weightedAvgPrice":"%(average)s","closeTime":%(now)d}
/api/v3/klines candles
[%(rows)s]
[%(ms)d,"%(open)s","%(high)s","%(low)s","%(close)s","%(volume).8f",%(end)d,"0",0,"0","0","0"]
/api/v3/depth book
{"lastUpdateId":%(ms)d,"bids":[%(bids)s],"asks":[%(asks)s]}
["%(price)s","%(amount).8f"]
/api/v3/aggTrades trades
[%(rows)s]
{"a":%(number)d,"f":%(number)d,"l":%(number)d,"p":"%(price)s","q":"%(amount).8f","T":%(ms)d,"m":%(maker)s}
"""
KRAKEN = """
/0/public/Time time
{"unixtime":%(second)d}
/0/public/AssetPairs markets
{%(rows)s}
"%(id)s":{"altname":"%(altname)s","base":"%(base)s","quote":"%(quote)s","pair_decimals":%(digits)d,"lot_decimals":8,
"wsname":"%(base)s/%(quote)s","tick_size":"%(tick)s","status":"online"}
/0/public/Ticker tickers
{%(rows)s}
"%(id)s":{"a":["%(ask)s","1","%(ask_size).8f"],"b":["%(bid)s","1","%(bid_size).8f"],"c":["%(last)s","0.01"],
"v":["%(volume).8f","%(volume).8f"],"p":["%(average)s","%(average)s"],"t":[9999,9999],
"l":["%(low)s","%(low)s"],"h":["%(high)s","%(high)s"],"o":"%(open)s"}
/0/public/OHLC candles
{"%(id)s":[%(rows)s],"last":%(second)d}
[%(second)d,"%(open)s","%(high)s","%(low)s","%(close)s","%(close)s","%(volume).8f",0]
/0/public/Depth book
{"%(id)s":{"bids":[%(bids)s],"asks":[%(asks)s]}}
["%(price)s","%(amount).8f",%(second)d]
/0/public/Trades trades
{"%(id)s":[%(rows)s],"last":"%(ns)d"}
["%(price)s","%(amount).8f",%(second).1f,"%(letter)s","m","",%(number)d]
"""


def _pairs(coins: Iterable[str], quote: str, swap: bool = False) -> tuple[Pair, ...]:
    return tuple(Pair(coin, quote, swap) for coin in coins)


COMMON = _pairs(COINS, "USDT") + _pairs(MAJORS, "USDC") + _pairs(MAJORS[1:5], "BTC") + _pairs(MAJORS[:4], "EUR")
SWAPS = {pair.id: pair for pair in _pairs(["BTC", "ETH", "SOL", "XRP", "DOGE"], "USDT", swap=True)}


class RefusalError(Exception):
    """An answer other than data: status, body and maybe headers."""


@dataclass(frozen=True)
class Call:
    """One request, the market as it sees it, and the time it is told."""

    path: str
    params: Mapping[str, str]
    market: Market
    ms: int
    rate_limit: int = 0

    def param(self, *names: str) -> str:
        """Return the first of these parameters that is there."""
        return next((self.params[name] for name in names if name in self.params), "")

    def limit(self, default: int) -> int:
        return max(1, min(int(self.param("limit", "count") or default), 5_000))

    def seconds(self, *names: str) -> float | None:
        """Return a time that is in seconds, milliseconds or nanoseconds, which its length tells."""
        text = self.param(*names)
        return int(text) / 10 ** max(0, len(text) - 10) if text else None


class Exchange:
    """What the exchanges have in common."""

    name = ""
    bias = 0.0
    half_spread = 0.0001
    listing: tuple[Pair, ...] = COMMON
    sheet = ""
    envelope = "%s"
    missing: tuple[int, object]
    unknown: tuple[int, object]
    invalid: tuple[int, object]
    geo_block: tuple[int, object]

    def __init__(self, filler: int) -> None:
        fillers = _pairs((f"F{number:04d}" for number in range(1, filler + 1)), "USDT")
        self.spot = {self.fields(pair)["id"]: pair for pair in self.listing + fillers}
        records = re.findall(r"(\S+) (\w+)\n(.+)\n((?:[^/].*\n)*)", self.sheet)
        self.routes = {
            path: (kind, self.envelope % around, each.replace("\n", "")) for path, kind, around, each in records
        }
        self.forgive()

    def forgive(self) -> None:
        self.window, self.used, self.refused, self.banned_until = 0.0, 0.0, 0, 0.0

    def spend(self, call: Call) -> dict[str, str]:
        """Count the call towards the rate limit and return the headers that tell about it, or refuse."""
        raise NotImplementedError

    def roll(self, now: float, seconds: int) -> float:
        """Begin a new window of the rate limit when it is time, and return its end."""
        if self.window != now // seconds:
            self.window, self.used, self.refused = now // seconds, 0.0, 0
        return (self.window + 1) * seconds

    def answer(self, call: Call) -> tuple[str, dict[str, str]]:
        """Return the body and the headers, or refuse."""
        route = self.routes.get(call.path) or self.routes.get(call.path.replace("/fapi/v1", "/api/v3"))
        if route is None:
            raise RefusalError(*self.missing)
        headers = {} if call.rate_limit < 0 else self.spend(call)
        (kind, around, each), pairs = route, self.asked(call)
        if kind == "book":  # as the sockets push it, with the same numbers
            market = call.market.at(call.market.step)
            call = replace(call, market=market, ms=market.ms)
        shared = {"ms": call.ms, "now": call.ms, "second": call.ms // 1000, "category": call.param("category")}
        shared |= self.fields(pairs[0]) if pairs else {}
        lists = self.lists(kind, call, pairs)
        shared["ns"] = next((rows[-1].get("ns") for rows in lists.values() if rows), call.ms * 10**6)
        texts = {name: ",".join([each % (shared | row) for row in rows]) for name, rows in lists.items()}
        return around % (shared | texts), headers

    def lists(self, kind: str, call: Call, pairs: list[Pair]) -> dict[str, list[Row]]:
        """Return the rows of this kind, by the name of their place in the text around them."""
        market, start, end = call.market, call.seconds("start", "startTime", "since"), call.seconds("end", "endTime")
        match kind:
            case "markets":
                return {"rows": [self.fields(pair) for pair in pairs]}
            case "tickers":
                return {"rows": [self.fields(pair) | market.day(pair) for pair in pairs]}
            case "candles":
                return {"rows": market.candles(pairs[0], self.period(call), call.limit(500), start, end)}
            case "trades":
                return {"rows": market.trades(pairs[0], call.limit(500), start, end)}
            case "book":
                return {f"{side}s": market.book(pairs[0], side, call.limit(100)) for side in ("bid", "ask")}
        return {}

    def period(self, call: Call) -> int:
        matched = re.fullmatch(r"(\d*)([smhdwDW]?)", call.param("interval"))
        if matched is None:
            raise RefusalError(*self.invalid)
        return int(matched[1] or 1) * PERIODS[matched[2]]

    def asked(self, call: Call) -> list[Pair]:
        """Return the markets the request names, as one, as a JSON list or with commas; else all."""
        known, names = self.known(call), re.findall(r"\w+", call.param("symbol", "symbols", "pair"))
        if not known.keys() >= set(names):
            raise RefusalError(*self.unknown)
        return [known[name] for name in names or known]

    def known(self, call: Call) -> Mapping[str, Pair]:
        return self.spot

    def fields(self, pair: Pair) -> Row:
        """Return what texts say about a market."""
        return {"id": pair.id, "base": pair.base, "quote": pair.quote, "tick": pair.tick, "digits": pair.price_digits}


class Bybit(Exchange):
    """bybit, API version 5."""

    name = "bybit"
    bias = 0.00015
    listing = (*(pair for pair in COMMON if pair.base not in {"TON", "XTZ"}), Pair("MNT", "USDT"))
    sheet = BYBIT
    envelope = '{"retCode":0,"retMsg":"OK","result":%s,"retExtInfo":{},"time":%%(ms)d}'
    missing = (404, "404 page not found")
    unknown = (200, {"retCode": 10001, "retMsg": "Not supported symbols", "result": {}})
    invalid = (200, {"retCode": 10001, "retMsg": "Invalid period!", "result": {}})
    geo_block = (403, "<html>The Amazon CloudFront distribution is configured to block access from your country.")

    def spend(self, call: Call) -> dict[str, str]:
        """Allow 600 requests per 5 seconds, then shut the door for 10 minutes."""
        now, limit = call.market.now, call.rate_limit or 600
        end = self.roll(now, 5)
        self.used += 1
        if self.used > limit and now >= self.banned_until:
            self.banned_until = now + 600
        if now < self.banned_until:
            raise RefusalError(403, {"retCode": 10018, "retMsg": "access too frequent, please try again later"})
        told = {"": limit, "-Status": limit - self.used, "-Reset-Timestamp": end * 1000}
        return {f"X-Bapi-Limit{name}": f"{value:.0f}" for name, value in told.items()}

    def known(self, call: Call) -> Mapping[str, Pair]:
        # With a status ccxt asks for what is not launched yet.
        kinds = {} if "status" in call.params else {"spot": self.spot, "linear": SWAPS}
        return kinds.get(call.param("category"), {})

    def fields(self, pair: Pair) -> Row:
        # By its open interest ccxt tells a swap's ticker from a spot one's.
        return super().fields(pair) | {"extra": '"openInterestValue":"0",' if pair.swap else ""}

    def lists(self, kind: str, call: Call, pairs: list[Pair]) -> dict[str, list[Row]]:
        lists = super().lists(kind, call, pairs)
        return {"rows": lists["rows"][::-1]} if kind in {"candles", "trades"} else lists


class Binance(Exchange):
    """binance: spot under /api/v3, linear perpetuals under /fapi/v1."""

    name = "binance"
    half_spread = 0.00005
    listing = (*COMMON, Pair("BNB", "BTC"), Pair("BNB", "EUR"))
    sheet = BINANCE
    missing = (404, "<html><body><h2>404 Not found</h2></body></html>")
    unknown = (400, {"code": -1121, "msg": "Invalid symbol."})
    invalid = (400, {"code": -1120, "msg": "Invalid interval."})
    geo_block = (451, {"code": 0, "msg": "Service unavailable from a restricted location according to our terms."})

    def weight(self, call: Call) -> int:
        name, symbols = call.path.split("/", 3)[3], call.param("symbol", "symbols")
        if name == "ticker/24hr":
            count = symbols.count(",") + 1 if symbols else 101
            return 2 if count <= 20 else 40 if count <= 100 else 80
        if name == "depth":
            levels = call.limit(100)
            return next(cost for most, cost in ((100, 5), (500, 25), (1_000, 50), (5_000, 250)) if levels <= most)
        return {"exchangeInfo": 20, "klines": 2, "aggTrades": 4}.get(name, 1)

    def spend(self, call: Call) -> dict[str, str]:
        """Allow 6,000 weight per minute, then answer 429, and ban those who go on for 2 minutes."""
        now = call.market.now
        status, until = 429, self.roll(now, 60)
        self.used += self.weight(call)
        headers = {"X-MBX-USED-WEIGHT-1M": f"{self.used:.0f}"}
        if self.used <= (call.rate_limit or 6_000) and now >= self.banned_until:
            return headers
        self.refused += 1
        if self.refused > 10 and now >= self.banned_until:
            self.banned_until = now + 120
        if now < self.banned_until:
            status, until = 418, self.banned_until
        body = {"code": -1003, "msg": f"Too much request weight used; please wait until {until * 1000:.0f}."}
        raise RefusalError(status, body, {**headers, "Retry-After": f"{math.ceil(until - now)}"})

    def fields(self, pair: Pair) -> Row:
        swap = '"contractType":"PERPETUAL","marginAsset":"USDT",'
        return super().fields(pair) | {"extra": swap if pair.swap else '"permissions":["SPOT"],'}

    def known(self, call: Call) -> Mapping[str, Pair]:
        return self.spot if call.path.startswith("/api") else SWAPS

    def answer(self, call: Call) -> tuple[str, dict[str, str]]:
        text, headers = super().answer(call)
        single = call.path.endswith("/24hr") and "symbol" in call.params
        return text[1:-1] if single else text, headers


class Kraken(Exchange):
    """kraken, with the old names some of its assets still have."""

    name = "kraken"
    bias = -0.0002
    listing = _pairs([*COINS[:12], "EUR", "USDC"], "USDT") + _pairs(["ETH", "XRP", "SOL"], "BTC")
    listing += _pairs([*MAJORS, "XMR", "EUR", "USDC", "USDT"], "USD") + _pairs([*MAJORS, "XMR"], "EUR")
    sheet = KRAKEN
    envelope = '{"error":[],"result":%s}'
    missing = (404, {"error": ["EGeneral:Unknown method"]})
    unknown = (200, {"error": ["EQuery:Unknown asset pair"]})
    invalid = (200, {"error": ["EGeneral:Invalid arguments"]})
    geo_block = (403, "<html><head><title>Access denied</title></head><body>Error 1009</body></html>")

    def spend(self, call: Call) -> dict[str, str]:
        """Allow one call per second after a burst of 15."""
        now = call.market.now
        self.used, self.window = max(0.0, self.used - (now - self.window)), now
        if self.used + 1 > (call.rate_limit or 15):
            raise RefusalError(200, {"error": ["EGeneral:Too many requests"]})
        self.used += 1
        return {}

    def known(self, call: Call) -> Mapping[str, Pair]:
        short = self.spot.values() if "pair" in call.params else ()
        return self.spot | {self.fields(pair)["altname"]: pair for pair in short}

    def fields(self, pair: Pair) -> Row:
        base, quote = (KRAKEN_NAMES.get(asset, asset) for asset in (pair.base, pair.quote))
        old = pair.base in KRAKEN_OLD and quote in {"EUR", "USD"}
        names = {"base": base, "quote": quote, "altname": base + quote}
        return super().fields(pair) | names | {"id": f"X{base}Z{quote}" if old else base + quote}

    def lists(self, kind: str, call: Call, pairs: list[Pair]) -> dict[str, list[Row]]:
        if kind != "candles":
            return super().lists(kind, call, pairs)
        candles, since = call.market.candles(pairs[0], self.period(call), 720), call.seconds("since") or 0
        return {"rows": [candle for candle in candles if candle["second"] > since]}
