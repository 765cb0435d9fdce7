"""bybit: REST and public sockets of API version 5, for spot markets and linear perpetuals."""

from collections.abc import Mapping

from src.sandbox.exchange import Exchange, RefusalError, Request, Topic
from src.sandbox.market import COMMON_PAIRS, SWAPS, Fields, Pair, pairs

REQUESTS_PER_WINDOW = 600
WINDOW_SECONDS = 5
BAN_SECONDS = 600
DEPTHS = {"1": 1, "50": 50, "200": 200, "1000": 1_000}
INTERVALS = {str(minutes): minutes * 60 for minutes in (1, 3, 5, 15, 30, 60, 120, 240, 360, 720)}
INTERVALS |= {"D": 86_400, "W": 604_800}
CHANNELS = {"tickers": "ticker", "orderbook": "book", "publicTrade": "trades", "kline": "candles"}
BLOCKED = "The Amazon CloudFront distribution is configured to block access from your country."


class Bybit(Exchange):
    """Wire formats, errors and limits of Bybit."""

    name = "bybit"
    price_factor = 1.00015
    listing = tuple(pair for pair in COMMON_PAIRS if pair.base not in {"TON", "XTZ"})
    listing += pairs(["MNT"], "USDT")
    envelope = '{"retCode":0,"retMsg":"OK","result":%s,"retExtInfo":{},"time":%%(ms)d}'
    unknown_path = (404, "404 page not found")
    unknown_symbol = (200, {"retCode": 10001, "retMsg": "Not supported symbols", "result": {}})
    invalid_interval = (200, {"retCode": 10001, "retMsg": "Invalid period!", "result": {}})
    geo_block = (403, f"<html>{BLOCKED}")
    malformed = '{"success":false,"ret_msg":"error:invalid op","conn_id":"0"}'
    rest_records = """
/v5/market/time time
{"timeSecond":"$second","timeNano":"%(ms)d000000"}

/v5/market/instruments-info markets
{"category":"$category","list":[$rows]}
 {"symbol":"$id","baseCoin":"$base","quoteCoin":"$quote","status":"Trading","settleCoin":"$quote",
 "contractType":"LinearPerpetual","lotSizeFilter":{"basePrecision":"0.00000001",
 "qtyStep":"0.00000001"},"priceFilter":{"tickSize":"$tick"}}

/v5/market/tickers tickers
{"category":"$category","list":[$rows]}
 {"symbol":"$id","lastPrice":"$last","prevPrice24h":"$open","price24hPcnt":"%(ratio).6f",
 $open_interest"highPrice24h":"$high","lowPrice24h":"$low","volume24h":"$volume",
 "turnover24h":"$turnover","bid1Price":"$bid","bid1Size":"$bid_size","ask1Price":"$ask",
 "ask1Size":"$ask_size"}

/v5/market/kline candles
{"category":"$category","symbol":"$id","list":[$rows]}
 ["$ms","$open","$high","$low","$close","$volume","0"]

/v5/market/orderbook book
{"s":"$id","b":[$bids],"a":[$asks],"ts":$ms,"u":$ms,"seq":$ms}
 ["$price","$amount"]

/v5/market/recent-trade trades
{"category":"$category","list":[$rows]}
 {"execId":"$number","symbol":"$id","price":"$price","size":"$amount","side":"$side_title",
 "time":"$ms"}
"""
    # As at the real exchange, only the ticker of a swap has bid and ask. Candles:
    # https://bybit-exchange.github.io/docs/v5/websocket/public/kline
    push_records = """
ticker
{"topic":"$name","ts":$ms,"type":"snapshot","cs":$ms,"data":{"symbol":"$id","lastPrice":"$last",
"prevPrice24h":"$open","highPrice24h":"$high","lowPrice24h":"$low","price24hPcnt":"%(ratio).6f",
"volume24h":"$volume","turnover24h":"$turnover","usdIndexPrice":"$last"}}

ticker.swap
{"topic":"$name","ts":$ms,"type":"snapshot","cs":$ms,"data":{"symbol":"$id","lastPrice":"$last",
"prevPrice24h":"$open","highPrice24h":"$high","lowPrice24h":"$low","price24hPcnt":"%(ratio).6f",
"volume24h":"$volume","turnover24h":"$turnover","openInterestValue":"0","markPrice":"$last",
"indexPrice":"$last","bid1Price":"$bid","bid1Size":"$bid_size","ask1Price":"$ask",
"ask1Size":"$ask_size"}}

book
{"topic":"$name","type":"$type","ts":$ms,"data":{"s":"$id","b":[$bids],"a":[$asks],"u":$ms,
"seq":$ms}}
 ["$price","$amount"]

candles
{"topic":"$name","data":[$rows],"ts":$ms,"type":"snapshot"}
 {"start":$ms,"end":$end,"interval":"$interval","open":"$open","close":"$close","high":"$high",
 "low":"$low","volume":"$volume","turnover":"$turnover","confirm":$is_closed,
 "timestamp":$push_ms}

trades
{"topic":"$name","ts":$ms,"type":"snapshot","data":[$rows]}
 {"s":"$id","L":"PlusTick","BT":false,"T":$ms,"S":"$side_title","v":"$amount","p":"$price",
 "i":"$number"}
"""

    def fields(self, pair: Pair) -> Fields:
        # ccxt recognizes the ticker of a swap by its open interest.
        open_interest = '"openInterestValue":"0",' if pair.is_swap else ""
        return super().fields(pair) | {"open_interest": open_interest}

    def known_pairs(self, request: Request) -> Mapping[str, Pair]:
        if "status" in request.params:  # ccxt asks for markets that are not launched yet
            return {}
        return {"spot": self.spot, "linear": SWAPS}.get(request.param("category"), {})

    def rows(self, kind: str, request: Request, requested: list[Pair]) -> dict[str, list[Fields]]:
        lists = super().rows(kind, request, requested)
        if kind in {"candles", "trades"}:  # the latest ones come first
            lists["rows"].reverse()
        return lists

    def charge(self, request: Request) -> dict[str, str]:
        """Allow 600 requests per 5 seconds, then refuse all requests for 10 minutes."""
        now = request.market.now
        limit = request.rate_limit or REQUESTS_PER_WINDOW
        reset_ms = self.start_window(now, WINDOW_SECONDS) * 1000
        self.used += 1
        if self.used > limit and now >= self.banned_until:
            self.banned_until = now + BAN_SECONDS
        if now < self.banned_until:
            message = "access too frequent, please try again later"
            raise RefusalError(403, {"retCode": 10018, "retMsg": message})
        headers = {"": limit, "-Status": limit - self.used, "-Reset-Timestamp": reset_ms}
        return {f"X-Bapi-Limit{name}": f"{value:.0f}" for name, value in headers.items()}

    def reply(self, message: Fields, path: str, topics: dict[str, Topic]) -> list[Fields]:
        verb = message["op"]
        reply = {"success": True, "ret_msg": verb, "conn_id": "0", "op": verb}
        if "req_id" in message:
            reply["req_id"] = str(message["req_id"])
        if verb == "ping":
            return [reply | {"ret_msg": "pong"}]
        try:
            self.change_topics(topics, verb, [self.topic(name, path) for name in message["args"]])
        except RefusalError as error:
            text = f"error:handler not found,topic:{error}"
            return [reply | {"success": False, "ret_msg": text}]
        return [reply]

    def topic(self, name: str, path: str) -> Topic:
        kind, *options, symbol = name.split(".")
        known = self.spot if path.endswith("spot") else SWAPS
        allowed = {"orderbook": DEPTHS, "kline": INTERVALS}.get(kind, {"": 0})
        option = ".".join(options)
        if symbol not in known or kind not in CHANNELS or option not in allowed:
            raise RefusalError(name)
        depth = DEPTHS.get(option, 0)
        seconds = INTERVALS.get(option, 0)
        return Topic(name, CHANNELS[kind], known[symbol], depth, seconds, option)
