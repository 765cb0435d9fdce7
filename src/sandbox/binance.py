"""binance: REST and raw streams. Spot is below /api/v3, linear perpetuals are below /fapi/v1."""

import math
from collections.abc import Mapping

from src.sandbox.exchange import UNIT_SECONDS, Exchange, RefusalError, Request, Topic
from src.sandbox.market import COMMON_PAIRS, SWAPS, Fields, Pair, pairs

WEIGHT_PER_WINDOW = 6_000
WINDOW_SECONDS = 60
MAX_REFUSED = 10
"""A client that is refused more often in a window is banned."""
BAN_SECONDS = 120
WEIGHTS = {"exchangeInfo": 20, "klines": 2, "aggTrades": 4}
DEPTH_WEIGHTS = {100: 5, 500: 25, 1_000: 50, 5_000: 250}
"""By the most levels that have this weight."""
TICKER_WEIGHTS = {20: 2, 100: 40, 5_000: 80}
"""By the most symbols that have this weight."""
ALL_SYMBOLS = 101
"""Stands for the number of symbols in a request without symbols."""
BOOK_LEVELS = 100
"""Levels of a book that pushes keep up to date. The real exchange pushes all levels."""
CHANNELS = {"ticker": "ticker", "miniTicker": "mini", "bookTicker": "top"}
CHANNELS |= {"depth": "book", "trade": "trades"}
INTERVALS = ("1m", "3m", "5m", "15m", "30m", "1h", "2h", "4h", "6h", "8h", "12h", "1d", "3d", "1w")
BLOCKED = "Service unavailable from a restricted location according to our terms."
REST_TOP = ',"bidPrice":"$bid","bidQty":"$bid_size","askPrice":"$ask","askQty":"$ask_size"'
SPOT_RECORDS = """
/api/v3/time time
{"serverTime":$ms}

/api/v3/exchangeInfo markets
{"timezone":"UTC","serverTime":$ms,"symbols":[$rows]}
 {"symbol":"$id","status":"TRADING","baseAsset":"$base","quoteAsset":"$quote",$contract"filters":[
 {"filterType":"PRICE_FILTER","tickSize":"$tick"},
 {"filterType":"LOT_SIZE","stepSize":"0.00000001"}]}

/api/v3/ticker/24hr tickers
[$rows]
 {"symbol":"$id","lastPrice":"$last","openPrice":"$open","highPrice":"$high","lowPrice":"$low",
 "volume":"$volume","quoteVolume":"$turnover","weightedAvgPrice":"$average","closeTime":$ms$top}

/api/v3/klines candles
[$rows]
 [$ms,"$open","$high","$low","$close","$volume",$end,"0",0,"0","0","0"]

/api/v3/depth book
{"lastUpdateId":$ms,"bids":[$bids],"asks":[$asks]}
 ["$price","$amount"]

/api/v3/aggTrades trades
[$rows]
 {"a":$number,"f":$number,"l":$number,"p":"$price","q":"$amount","T":$ms,"m":$is_buyer_maker}
"""


class Binance(Exchange):
    """Wire formats, errors and limits of Binance: spot and USD-M swaps."""

    name = "binance"
    half_spread = 0.00005
    listing = COMMON_PAIRS + pairs(["BNB"], "BTC") + pairs(["BNB"], "EUR")
    unknown_path = (404, "<html><body><h2>404 Not found</h2></body></html>")
    unknown_symbol = (400, {"code": -1121, "msg": "Invalid symbol."})
    invalid_interval = (400, {"code": -1120, "msg": "Invalid interval."})
    geo_block = (451, {"code": 0, "msg": BLOCKED})
    malformed = '{"id":null,"error":{"code":3,"msg":"Invalid json"}}'
    pushes_snapshots = False
    # As at the real exchange, only the ticker of a spot market has bid and ask.
    rest_records = SPOT_RECORDS.replace("$top", REST_TOP)
    rest_records += SPOT_RECORDS.replace("$top", "").replace("/api/v3", "/fapi/v1")
    # The streams have the fields of
    # https://github.com/binance/binance-spot-api-docs/blob/master/web-socket-streams.md
    push_records = """
ticker
{"e":"24hrTicker","E":$ms,"s":"$id","c":"$last","o":"$open","h":"$high","l":"$low","v":"$volume",
"q":"$turnover","P":"%(percent).3f","w":"$average","O":$start,"C":$ms,"b":"$bid","B":"$bid_size",
"a":"$ask","A":"$ask_size"}

ticker.swap
{"e":"24hrTicker","E":$ms,"s":"$id","c":"$last","o":"$open","h":"$high","l":"$low","v":"$volume",
"q":"$turnover","P":"%(percent).3f","w":"$average","O":$start,"C":$ms}

mini
{"e":"24hrMiniTicker","E":$ms,"s":"$id","c":"$last","o":"$open","h":"$high","l":"$low",
"v":"$volume","q":"$turnover"}

top
{"E":$ms,"s":"$id","u":$ms,"b":"$bid","B":"$bid_size","a":"$ask","A":"$ask_size"}

top.swap
{"E":$ms,"s":"$id","u":$ms,"b":"$bid","B":"$bid_size","a":"$ask","A":"$ask_size",
"e":"bookTicker","T":$ms}

book
{"e":"depthUpdate","E":$ms,"s":"$id","U":$first_ms,"u":$ms,"b":[$bids],"a":[$asks]}
 ["$price","$amount"]

book.swap
{"e":"depthUpdate","E":$ms,"s":"$id","U":$first_ms,"u":$ms,"T":$ms,"pu":$previous_ms,"b":[$bids],
"a":[$asks]}
 ["$price","$amount"]

candles
 {"e":"kline","E":$push_ms,"s":"$id","k":{"t":$ms,"T":$end,"s":"$id","i":"$interval","f":-1,
 "L":-1,"o":"$open","c":"$close","h":"$high","l":"$low","v":"$volume","n":$count,
 "x":$is_closed,"q":"$turnover","V":"0","Q":"0","B":"0"}}

trades
 {"e":"trade","E":$push_ms,"s":"$id","M":true,"t":$number,"p":"$price","q":"$amount","T":$ms,
 "m":$is_buyer_maker}
"""

    def fields(self, pair: Pair) -> Fields:
        swap = '"contractType":"PERPETUAL","marginAsset":"USDT",'
        contract = swap if pair.is_swap else '"permissions":["SPOT"],'
        return super().fields(pair) | {"contract": contract}

    def known_pairs(self, request: Request) -> Mapping[str, Pair]:
        return self.spot if request.path.startswith("/api") else SWAPS

    def answer(self, request: Request) -> tuple[str, dict[str, str]]:
        text, headers = super().answer(request)
        is_one_ticker = request.path.endswith("/24hr") and "symbol" in request.params
        return text[1:-1] if is_one_ticker else text, headers

    def charge(self, request: Request) -> dict[str, str]:
        """Allow 6,000 weight per minute, then answer 429. Ban clients that continue."""
        now = request.market.now
        status = 429
        end = self.start_window(now, WINDOW_SECONDS)
        self.used += self.weight(request)
        headers = {"X-MBX-USED-WEIGHT-1M": f"{self.used:.0f}"}
        if self.used <= (request.rate_limit or WEIGHT_PER_WINDOW) and now >= self.banned_until:
            return headers
        self.refused += 1
        if self.refused > MAX_REFUSED and now >= self.banned_until:
            self.banned_until = now + BAN_SECONDS
        if now < self.banned_until:
            status = 418
            end = self.banned_until
        message = f"Too much request weight used; please wait until {end * 1000:.0f}."
        headers["Retry-After"] = f"{math.ceil(end - now)}"
        raise RefusalError(status, {"code": -1003, "msg": message}, headers)

    def weight(self, request: Request) -> int:
        name = request.path.split("/", 3)[3]
        if name == "ticker/24hr":
            symbols = request.param("symbol", "symbols")
            count = symbols.count(",") + 1 if symbols else ALL_SYMBOLS
            return next(weight for most, weight in TICKER_WEIGHTS.items() if count <= most)
        if name == "depth":
            count = request.limit(100)
            return next(weight for most, weight in DEPTH_WEIGHTS.items() if count <= most)
        return WEIGHTS.get(name, 1)

    def reply(self, message: Fields, path: str, topics: dict[str, Topic]) -> list[Fields]:
        try:
            changed = [self.topic(name, path) for name in message["params"]]
        except RefusalError:
            error = {"code": 2, "msg": "Invalid request: unknown stream"}
            return [{"error": error, "id": message["id"]}]
        reply = {"result": None, "id": message["id"]}
        self.change_topics(topics, message["method"].lower(), changed)
        return [reply]

    def topic(self, name: str, path: str) -> Topic:
        symbol, _, stream = name.partition("@")
        pair = (self.spot if "/stream" in path else SWAPS).get(symbol.upper())
        stream = stream.partition("@")[0]
        interval = stream.removeprefix("kline_")
        if pair and interval in INTERVALS and interval != stream:
            seconds = int(interval[:-1]) * UNIT_SECONDS[interval[-1]]
            return Topic(name, "candles", pair, seconds=seconds, interval=interval)
        channel = CHANNELS.get(stream)
        if pair is None or channel is None:
            raise RefusalError(name)
        return Topic(name, channel, pair, BOOK_LEVELS)
