"""binance: REST and raw streams. Spot is below /api/v3, linear perpetuals are below /fapi/v1."""

import math
import re
from collections.abc import Set

from src.sandbox.exchange import MONDAY, Exchange, RefusalError, Request, Topic
from src.sandbox.market import (
    COMMON_PAIRS,
    DAY_SECONDS,
    SWAPS,
    Fields,
    Market,
    Pair,
    Rows,
    pairs,
)

MAX_REFUSED = 10
"""A client that is refused more often in a window is banned. Unconfirmed: the number."""
BAN_SECONDS = 120
ALL = 10**6
"""Stands for the number of symbols in a request without symbols."""
# The documented limits: weight and seconds by the start of the path, the first that fits. Requests
# of fundings and of futures/data are counted apart, without a weight and without a header.
# https://developers.binance.com/docs/derivatives/usds-margined-futures/market-data/rest-api/
POOLS = {
    "/api": (6_000, 60),
    "/fapi/v1/funding": (500, 300),
    "/fapi": (2_400, 60),
    "/futures/data": (1_000, 300),
    "/sapi": (12_000, 60),
}
UNWEIGHTED_POOLS = {"/fapi/v1/funding", "/futures/data"}
# The documented weights. Tuples: (largest size, weight), where the size is the number of symbols or
# rows.
SWAP_CANDLES = ((99, 1), (499, 2), (1_000, 5), (ALL, 10))
WINDOWS = (*((size, 4 * size) for size in range(1, 51)), (ALL, 200))
WEIGHTS = {
    "/api/v3/exchangeInfo": ((ALL, 20),),
    "/api/v3/klines": ((ALL, 2),),
    "/api/v3/aggTrades": ((ALL, 4),),
    "/api/v3/depth": ((100, 5), (500, 25), (1_000, 50), (ALL, 250)),
    "/api/v3/ticker/24hr": ((20, 2), (100, 40), (ALL, 80)),
    "/api/v3/ticker/bookTicker": ((1, 2), (ALL, 4)),
    "/api/v3/ticker/price": ((1, 2), (ALL, 4)),
    "/api/v3/ticker/tradingDay": WINDOWS,
    "/api/v3/ticker": WINDOWS,
    "/api/v3/avgPrice": ((ALL, 2),),
    "/api/v3/trades": ((ALL, 25),),
    "/api/v3/uiKlines": ((ALL, 2),),
    "/fapi/v1/klines": SWAP_CANDLES,
    "/fapi/v1/markPriceKlines": SWAP_CANDLES,
    "/fapi/v1/indexPriceKlines": SWAP_CANDLES,
    "/fapi/v1/premiumIndexKlines": SWAP_CANDLES,
    "/fapi/v1/aggTrades": ((ALL, 20),),
    "/fapi/v1/trades": ((ALL, 5),),
    "/fapi/v1/premiumIndex": ((1, 1), (ALL, 10)),
    "/fapi/v1/ticker/price": ((1, 1), (ALL, 2)),
    "/fapi/v2/ticker/price": ((1, 1), (ALL, 2)),
    "/fapi/v1/depth": ((50, 2), (100, 5), (500, 10), (ALL, 20)),
    "/fapi/v1/ticker/24hr": ((1, 1), (ALL, 40)),
    "/fapi/v1/ticker/bookTicker": ((1, 2), (ALL, 5)),
}
ONE_OBJECT = re.compile(r"/ticker(/|$)|/(premiumIndex|openInterest|avgPrice)$")
"""Paths whose answer is an object if one symbol is requested, and a list otherwise."""
WINDOW_UNITS = {"m": 60, "h": 3_600, "d": 86_400}
AVERAGE_MINUTES = 5
SWAP_DEPTHS = (5, 10, 20, 50, 100, 500, 1_000)
BOOK_LEVELS = 100
"""Levels of a book that pushes keep up to date. The real exchange pushes all levels."""
MAX_STREAMS = 1_024
"""Streams of one socket."""
PUBLIC_STREAMS = {"depth", "bookTicker"}
"""Streams of swaps that are served at /public. All others are served at /market (ccxt 4.5.90)."""
INTERVALS = {"1s": 1, "1m": 60, "3m": 180, "5m": 300, "15m": 900, "30m": 1_800, "1h": 3_600}
INTERVALS |= {"2h": 7_200, "4h": 14_400, "6h": 21_600, "8h": 28_800, "12h": 43_200}
INTERVALS |= {"1d": 86_400, "3d": 259_200, "1w": 604_800}
CHANNELS = {"ticker": "ticker", "miniTicker": "mini", "bookTicker": "top", "depth": "book"}
CHANNELS |= {"aggTrade": "trades"} | {f"kline_{interval}": "candles" for interval in INTERVALS}
PERIODS = {name: INTERVALS[name] for name in ("5m", "15m", "30m", "1h", "2h", "4h", "6h", "12h")}
PERIODS |= {"1d": INTERVALS["1d"]}


class Binance(Exchange):
    """Wire formats, errors and limits of Binance: spot and USD-M swaps."""

    name = "binance"
    model = Market(0, half_spread=0.00005, week_offset=MONDAY)
    listing = COMMON_PAIRS + pairs(["BNB"], "BTC") + pairs(["BNB"], "EUR")
    # Recorded in 2026: a swap whose symbol is not ASCII.
    swap_listing = SWAPS + pairs(["测试测试"], "USDT", is_swap=True)
    trading_status = "TRADING"
    intervals = INTERVALS
    periods = PERIODS
    # Documented: 403 (firewall), 418 and 429 (limits), 503 and the codes. The text of a ban has the
    # time of its end, and such bans may have no Retry-After (freqtrade issue 7865).
    error_format = (r"^(-?\d+) (.*)", r'{"code":\1,"msg":"\2"}')
    error_lines = """
unknown_path 404 <html><body><h2>404 Not found</h2></body></html>
no_symbol 400 -1121 Invalid symbol.
bad_depth 400 -4021 Invalid depth limit.
no_status 400 -1122 Invalid symbol status.
bad_interval 400 -1120 Invalid interval.
bad_parameter 400 -1100 Illegal characters found in parameter '$parameter';
 legal range is '^[0-9]{1,20}$'.
geo_block 451 0 Service unavailable from a restricted location according to our terms.
rate_limit 429 -1003 Too much request weight used; current limit is 6000 request weight per
 1 MINUTE. Please use WebSocket Streams for live updates to avoid polling the API.
banned 418+600 -1003 Way too much request weight used; IP banned until $until_ms. Please
 use WebSocket Streams for live updates to avoid bans.
firewall 403 <html><head><title>ERROR: The request could not be satisfied</title></head><body>
 <h1>403 ERROR</h1>Request blocked. Generated by cloudfront (CloudFront)</body></html>
busy 503 -1008 Server is currently overloaded with other requests.
 Please try again in a few minutes.
unavailable 503 Service Unavailable
timeout 408 -1007 Timeout waiting for response from backend server.
 Send status unknown; execution status unknown.
"""
    drift_removes = ("permissions", "weightedAvgPrice")
    drift_renames = "volume"
    malformed = '{"id":null,"error":{"code":3,"msg":"Invalid json"}}'
    # https://developers.binance.com/docs/binance-spot-api-docs/web-socket-streams: 300 connections
    # in 5 minutes, and 5 messages per second; for swaps 10. Then the socket is closed.
    connection_limit = (300, 300)
    message_limits = (("/stream", 5), ("", 10))
    pushes_snapshots = False
    # As at the real exchange, only the ticker of a spot market has bid and ask.
    rest_records = """
<spot /api/v3><swap /fapi/v1>/time time
{"serverTime":$ms}

<spot /api/v3><swap /fapi/v1>/exchangeInfo markets
{"timezone":"UTC","serverTime":$ms,"symbols":[$rows]}
 {"symbol":"$id","status":"$status","baseAsset":"$base","quoteAsset":"$quote",
 <spot "permissions":["SPOT"],><swap "contractType":"PERPETUAL","marginAsset":"USDT",>"filters":[
 {"filterType":"PRICE_FILTER","tickSize":"$tick"},
 {"filterType":"LOT_SIZE","stepSize":"0.00000001"}]}

<spot /api/v3><swap /fapi/v1>/ticker/24hr tickers
[$rows]
 {"symbol":"$id","lastPrice":"$last","openPrice":"$open","highPrice":"$high","lowPrice":"$low",
 "volume":"$volume","quoteVolume":"$turnover","weightedAvgPrice":"$average","closeTime":$close_ms
 <spot ,"bidPrice":"$bid","bidQty":"$bid_size","askPrice":"$ask","askQty":"$ask_size">}

<spot /api/v3><swap /fapi/v1>/ticker/bookTicker tickers
[$rows]
 {"symbol":"$id","bidPrice":"$bid","bidQty":"$bid_size","askPrice":"$ask","askQty":"$ask_size"
 <swap ,"time":$ms>}

<spot /api/v3><swap /fapi/v1>/klines candles <spot 1000><swap 1500>
[$rows]
 [$ms,"$open","$high","$low","$close","$volume",$end,"$turnover",$count,"0","0","0"]

<spot /api/v3><swap /fapi/v1>/depth book 5000
{"lastUpdateId":$ms,<swap "E":$ms,"T":$ms,>"bids":[$bids],"asks":[$asks]}
 ["$price","$amount"]

<spot /api/v3><swap /fapi/v1>/aggTrades trades 1000
[$rows]
 {"a":$number,"f":1$number,"l":1$number,"p":"$price","q":"$amount","T":$ms,"m":$is_buyer_maker}
"""
    # The other endpoints are for clients that use Binance's own format. Spot:
    # https://developers.binance.com/docs/binance-spot-api-docs/rest-api/market-data-endpoints
    # Swaps: https://developers.binance.com/docs/derivatives/usds-margined-futures/market-data/
    # The mark and index prices equal the last price.
    rest_records += """
<spot /api/v3><swap /fapi/v1>/ping time
{}

/sapi/v1/system/status time
{"status":0,"msg":"normal"}

<spot /api/v3/ticker/price><swap /fapi/v1/ticker/price,/fapi/v2/ticker/price> tickers
[$rows]
 {"symbol":"$id","price":"$last"<swap ,"time":$close_ms>}

<spot /api/v3><swap /fapi/v1>/trades trades 1000
[$rows]
 {"id":$number,"price":"$price","qty":"$amount","quoteQty":"$cost","time":$ms,
 "isBuyerMaker":$is_buyer_maker<spot ,"isBestMatch":true>}

/api/v3/uiKlines candles 1000
[$rows]
 [$ms,"$open","$high","$low","$close","$volume",$end,"$turnover",$count,"0","0","0"]

/api/v3/ticker,/api/v3/ticker/tradingDay window
[$rows]
 {"symbol":"$id","priceChange":"$change","priceChangePercent":"%(percent).3f",
 "weightedAvgPrice":"$average","openPrice":"$open","highPrice":"$high","lowPrice":"$low",
 "lastPrice":"$close","volume":"$volume","quoteVolume":"$turnover","openTime":$start_ms,
 "closeTime":$end_ms,"firstId":0,"lastId":$count,"count":$count}

/api/v3/avgPrice window
[$rows]
 {"mins":5,"price":"$average","closeTime":$end_ms}

/fapi/v1/markPriceKlines,/fapi/v1/indexPriceKlines candles 1500
[$rows]
 [$ms,"$open","$high","$low","$close","0",$end,"0",$count,"0","0","0"]

/fapi/v1/premiumIndexKlines candles 1500
[$rows]
 [$ms,"0.00000000","0.00000000","0.00000000","0.00000000","0",$end,"0",$count,"0","0","0"]

/fapi/v1/premiumIndex swaps
[$rows]
 {"symbol":"$id","markPrice":"$close","indexPrice":"$close","estimatedSettlePrice":"$close",
 "lastFundingRate":"$rate","interestRate":"0.00010000","nextFundingTime":$next_ms,"time":$ms}

/fapi/v1/openInterest swaps
[$rows]
 {"symbol":"$id","openInterest":"$interest","time":$ms}

/fapi/v1/fundingRate fundings 1000 100
[$rows]
 {"symbol":"$id","fundingTime":$ms,"fundingRate":"$rate","markPrice":"$mark"}

/fapi/v1/fundingInfo swaps
[$rows]
 {"symbol":"$id","adjustedFundingRateCap":"0.02000000","adjustedFundingRateFloor":"-0.02000000",
 "fundingIntervalHours":8,"disclaimer":false}

/futures/data/openInterestHist positions 500 30
[$rows]
 {"symbol":"$id","sumOpenInterest":"$interest","sumOpenInterestValue":"$interest_value",
 "CMCCirculatingSupply":"0.00000000","timestamp":$ms}

/futures/data/topLongShortAccountRatio,/futures/data/topLongShortPositionRatio,\
/futures/data/globalLongShortAccountRatio positions 500 30
[$rows]
 {"symbol":"$id","longAccount":"$long","longShortRatio":"$long_short","shortAccount":"$short",
 "timestamp":$ms}

/futures/data/takerlongshortRatio positions 500 30
[$rows]
 {"buySellRatio":"$long_short","sellVol":"$sold","buyVol":"$bought","timestamp":$ms}
"""
    # The streams have the fields of
    # https://github.com/binance/binance-spot-api-docs/blob/master/web-socket-streams.md
    push_records = """
ticker
{"e":"24hrTicker","E":$ms,"s":"$id","c":"$last","o":"$open","h":"$high","l":"$low","v":"$volume",
"q":"$turnover","P":"%(percent).3f","w":"$average","O":$start,"C":$ms
<spot ,"b":"$bid","B":"$bid_size","a":"$ask","A":"$ask_size">}

mini
{"e":"24hrMiniTicker","E":$ms,"s":"$id","c":"$last","o":"$open","h":"$high","l":"$low",
"v":"$volume","q":"$turnover"}

top
{"E":$ms,"s":"$id","u":$ms,"b":"$bid","B":"$bid_size","a":"$ask","A":"$ask_size"
<swap ,"e":"bookTicker","T":$ms>}

book
{"e":"depthUpdate","E":$ms,"s":"$id","U":$first_ms,"u":$ms,<swap "T":$ms,"pu":$previous_ms,>
"b":[$bids],"a":[$asks]}
 ["$price","$amount"]

candles
 {"e":"kline","E":$push_ms,"s":"$id","k":{"t":$ms,"T":$end,"s":"$id","i":"$interval","f":-1,
 "L":-1,"o":"$open","c":"$close","h":"$high","l":"$low","v":"$volume","n":$count,
 "x":$is_closed,"q":"$turnover","V":"0","Q":"0","B":"0"}}

trades
 {"e":"aggTrade","E":$push_ms,"s":"$id","a":$number,"p":"$price","q":"$amount","f":1$number,
 "l":1$number,"T":$ms,"m":$is_buyer_maker}
"""

    def market_type(self, request: Request) -> str:
        return "swap" if request.path.startswith("/f") else "spot"

    def requested_pairs(self, request: Request) -> list[Pair]:
        requested = super().requested_pairs(request)
        # -1122 is documented for swaps that are not traded (ccxt lists the code, too).
        is_of_trades = request.path.endswith(("lines", "depth", "rades"))
        is_swap = self.market_type(request) == "swap"
        if is_of_trades and is_swap and self.status(requested[0], request) != self.trading_status:
            raise RefusalError("no_status")
        if request.path == "/fapi/v1/depth" and request.limit(500) not in SWAP_DEPTHS:
            raise RefusalError("bad_depth")
        return requested

    def answer(self, request: Request) -> tuple[str, dict[str, str]]:
        text, headers = super().answer(request)
        is_object = ONE_OBJECT.search(request.path) and "symbol" in request.params
        return text[1:-1] if is_object else text, headers

    def rows(self, kind: str, request: Request, requested: list[Pair]) -> Rows:
        if kind != "window":
            return super().rows(kind, request, requested)
        now = request.market.now
        start = now - AVERAGE_MINUTES * 60
        if request.path.endswith("/ticker"):
            start = now - window_seconds(request)
        if request.path.endswith("/tradingDay"):
            start = now // DAY_SECONDS * DAY_SECONDS
        start = start // 60 * 60
        times = {"start_ms": int(start * 1000), "end_ms": request.ms}
        rows = [request.market.window(pair, start) for pair in requested]
        return {
            "rows": [
                self.fields(pair) | row | times for pair, row in zip(requested, rows, strict=True)
            ]
        }

    def charge(self, request: Request) -> dict[str, str]:
        """Count the weight of a minute, then answer 429. Ban clients that continue."""
        now = request.market.now
        error = "rate_limit"
        pool = next(pool for pool in POOLS if request.path.startswith(pool))
        documented, seconds = POOLS[pool]
        limit = self.limits[pool]
        end = limit.start_window(now, seconds)
        limit.used += self.weight(request)
        headers = {"X-MBX-USED-WEIGHT-1M": f"{limit.used:.0f}"}
        if pool in UNWEIGHTED_POOLS:
            headers = {}
        most = request.knobs.rate_limit or documented
        if limit.used <= most and now >= limit.banned_until:
            return headers
        limit.refused += 1
        if limit.refused > MAX_REFUSED and now >= limit.banned_until:
            limit.banned_until = now + BAN_SECONDS
        if now < limit.banned_until:
            error = "banned"
            end = limit.banned_until
        headers["Retry-After"] = f"{math.ceil(end - now)}"
        raise RefusalError(error, headers, until=end)

    def weight(self, request: Request) -> int:
        steps = WEIGHTS.get(request.path, ((ALL, 1),))
        if ONE_OBJECT.search(request.path):
            size = len(request.names) or ALL
        else:
            size = request.limit(500 if self.market_type(request) == "swap" else 100)
        return next(weight for largest, weight in steps if size <= largest)

    def reply(self, message: Fields, path: str, topics: dict[str, Topic]) -> list[Fields]:
        verb = message["method"].lower()
        try:
            changed = self.checked_topics(message["params"], path, topics.keys())
        except RefusalError as error:
            refusal = {"code": 2, "msg": f"Invalid request: {error.reason}"}
            return [{"error": refusal, "id": message["id"]}]
        self.change_topics(topics, verb, changed)
        return [{"result": None, "id": message["id"]}]

    def checked_topics(self, names: list[str], path: str, known: Set[str]) -> list[Topic]:
        """Return the topics of a message, which fails as a whole."""
        changed = [self.topic(name, path) for name in names]
        if len(known | {topic.key for topic in changed}) > MAX_STREAMS:  # unconfirmed: the text
            raise RefusalError(f"more than {MAX_STREAMS} streams")
        return changed

    def topic(self, name: str, path: str) -> Topic:
        symbol, stream = name.split("@")[:2]
        pair = (self.spot if "/stream" in path else self.swaps).get(symbol.upper())
        wrong_category = "/market/" if stream in PUBLIC_STREAMS else "/public/"
        if pair is None or stream not in CHANNELS or wrong_category in path:
            raise RefusalError("unknown stream")
        is_candle = CHANNELS[stream] == "candles"
        option = stream.removeprefix("kline_") if is_candle else BOOK_LEVELS
        return Topic(name, CHANNELS[stream], pair, option)


def window_seconds(request: Request) -> int:
    """Return the length of the window in a request, such as 7d. The default is a day."""
    match = re.fullmatch(r"(\d{1,2})([mhd])", request.param("windowSize") or "1d")
    if match is None:
        name = "windowSize"
        raise ValueError(name)
    return int(match[1]) * WINDOW_UNITS[match[2]]
