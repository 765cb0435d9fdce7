"""kraken: REST with the old names of some assets, and sockets of version 2."""

from collections.abc import Mapping

import orjson

from src.sandbox.exchange import Exchange, RefusalError, Request, Topic
from src.sandbox.knobs import Knobs
from src.sandbox.market import COINS, MAJORS, Fields, Pair, iso_time, pairs

BURST = 15
"""Requests. One more is allowed per second."""
MAX_CANDLES = 720
ASSET_NAMES = {"BTC": "XBT", "DOGE": "XDG"}
PREFIXED_ASSETS = {"BTC", "ETH", "XRP", "LTC", "XLM", "XMR"}
"""Their markets in EUR and USD have names such as XXBTZUSD."""
CHANNELS = {"ticker": "ticker", "book": "book", "trade": "trades", "ohlc": "candles"}
INTERVALS = {"1": 60, "5": 300, "15": 900, "30": 1_800, "60": 3_600, "240": 14_400}
INTERVALS |= {"1440": 86_400, "10080": 604_800, "21600": 1_296_000}
UNKNOWN = '"EQuery:Unknown asset pair"'
DEPTHS = (10, 25, 100, 500, 1_000)
STATUS = '{"api_version":"v2","connection_id":1,"system":"online","version":"2.0.0"}'


class Kraken(Exchange):
    """Wire formats, errors and limits of Kraken."""

    name = "kraken"
    price_factor = 0.9998
    listing = pairs([*COINS[:12], "EUR", "USDC"], "USDT") + pairs(["ETH", "XRP", "SOL"], "BTC")
    listing += pairs([*MAJORS, "XMR", "EUR", "USDC", "USDT"], "USD")
    listing += pairs([*MAJORS, "XMR"], "EUR")
    trading_status = "online"
    intervals = INTERVALS
    envelope = '{"error":[],"result":%s}'
    # Errors are documented to arrive with the status 200. A lockout lasts 15 minutes.
    error_records = f"""
unknown_path 404
{{"error":["EGeneral:Unknown method"]}}

no_symbol 200
{{"error":[{UNKNOWN}]}}

bad_interval 200
{{"error":["EGeneral:Invalid arguments"]}}

bad_parameter 200
{{"error":["EGeneral:Invalid arguments"]}}

geo_block 403
<html><head><title>Access denied</title></head><body>Error 1009</body></html>

rate_limit 200
{{"error":["EAPI:Rate limit exceeded"]}}

pair_limit 200
{{"error":["EGeneral:Too many requests"]}}

throttled 200 60
{{"error":["EService: Throttled: $until"]}}

banned 200
{{"error":["EGeneral:Temporary lockout"]}}

firewall 520
<html><head><title>api.kraken.com | 520: Web server is returning an unknown error</title></head>
<body>Cloudflare Ray ID</body></html>

busy 200
{{"error":["EService:Busy"]}}

unavailable 200
{{"error":["EService:Unavailable"]}}

timeout 200
{{"error":["EService:Timeout"]}}
"""
    drift = (
        ('"status":"online"', '"status":"auction"'),
        ('"tick_size":"[^"]*",', ""),
        ('"p":[^]]*],', ""),
        ('"t":', '"trades":'),
    )
    greeting = f'{{"channel":"status","type":"update","data":[{STATUS}]}}'
    malformed = '{"error":"Malformed request","method":"","success":false}'
    # https://docs.kraken.com/exchange/api-reference/spot-websocket-v2/ohlc: "updates are generated
    # on trade events".
    pushes_only_trades = True
    candle_snapshot = MAX_CANDLES
    rest_records = """
/0/public/Time time
{"unixtime":$second}

/0/public/AssetPairs markets
{$rows}
 "$id":{"altname":"$altname","base":"$base","quote":"$quote","pair_decimals":$digits,
 "lot_decimals":8,"wsname":"$base/$quote","tick_size":"$tick","status":"$status"}

/0/public/Ticker tickers
{$rows}
 "$id":{"a":["$ask","1","$ask_size"],"b":["$bid","1","$bid_size"],"c":["$last","0.01"],
 "v":["$volume","$volume"],"p":["$average","$average"],"t":[9999,9999],"l":["$low","$low"],
 "h":["$high","$high"],"o":"$open"}

/0/public/OHLC candles
{"$id":[$rows],"last":$second}
 [$second,"$open","$high","$low","$close","$close","$volume",0]

/0/public/Depth book
{"$id":{"bids":[$bids],"asks":[$asks]}}
 ["$price","$amount",$second]

/0/public/Trades trades
{"$id":[$rows],"last":"%(last_ms)d000000"}
 ["$price","$amount",$second,"$side_letter","m","",$number]
"""
    # As at the real exchange, a ticker has no time. "e0" makes the amount 0 a float, as all others.
    push_records = """
ticker
{"channel":"ticker","type":"update","data":[{"symbol":"$name","last":$last,"bid":$bid,"ask":$ask,
"vwap":$average,"low":$low,"high":$high,"bid_qty":$bid_size,"ask_qty":$ask_size,"volume":$volume,
"change":$change,"change_pct":%(percent).2f}]}

book.snapshot
{"channel":"book","type":"snapshot","data":[{"symbol":"$name","checksum":0,"bids":[$bids],
"asks":[$asks]}]}
 {"price":$price,"qty":%(amount)se0}

book
{"channel":"book","type":"update","data":[{"symbol":"$name","checksum":0,"timestamp":"$iso",
"bids":[$bids],"asks":[$asks]}]}
 {"price":$price,"qty":%(amount)se0}

candles
{"channel":"ohlc","type":"$type","timestamp":"$iso","data":[$rows]}
 {"symbol":"$name","open":$open,"high":$high,"low":$low,"close":$close,"trades":$count,
 "volume":$volume,"vwap":$vwap,"interval_begin":"$begin","interval":$interval,
 "timestamp":"$close_time"}

trades
{"channel":"trade","type":"update","data":[$rows]}
 {"symbol":"$name","ord_type":"market","side":"$side","price":$price,"qty":$amount,
 "trade_id":$number,"timestamp":"$iso"}
"""

    def fields(self, pair: Pair) -> Fields:
        base = ASSET_NAMES.get(pair.base, pair.base)
        quote = ASSET_NAMES.get(pair.quote, pair.quote)
        altname = base + quote
        is_prefixed = pair.base in PREFIXED_ASSETS and quote in {"EUR", "USD"}
        pair_id = f"X{base}Z{quote}" if is_prefixed else altname
        names = {"id": pair_id, "altname": altname, "base": base, "quote": quote}
        return super().fields(pair) | names

    def configure(self, knobs: Knobs) -> None:
        super().configure(knobs)
        altnames = {self.fields(pair)["altname"]: pair for pair in self.spot.values()}
        self.names = self.spot | altnames

    def known_pairs(self, request: Request) -> Mapping[str, Pair]:
        return self.names if "pair" in request.params else self.spot

    def requested_pairs(self, request: Request) -> list[Pair]:
        unknown = request.unknown_names(self.names)
        known = {self.names[name]: None for name in request.names if name not in unknown}
        if unknown and not known:
            raise self.refusal("no_symbol", request.market.now)
        return list(known or self.spot.values())

    def answer(self, request: Request) -> tuple[str, dict[str, str]]:
        text, headers = super().answer(request)
        if request.unknown_names(self.names):  # recorded: the error is beside the known markets
            text = text.replace('"error":[]', f'"error":[{UNKNOWN}]', 1)
        return text, headers

    def charge(self, request: Request) -> dict[str, str]:
        """Allow one request per second after a burst of 15."""
        now = request.market.now
        self.used = max(0.0, self.used - (now - self.window))
        self.window = now
        if self.used + 1 > (request.knobs.rate_limit or BURST):
            raise self.refusal("rate_limit")
        self.used += 1
        return {}

    def candle_numbers(self, request: Request, pair: Pair, seconds: int) -> range:
        since = request.seconds("since") or 0
        periods = request.market.traded(pair).periods(seconds, MAX_CANDLES)
        return range(max(periods.start, int(since // seconds) + 1), periods.stop)

    def reply(self, message: Fields, path: str, topics: dict[str, Topic]) -> list[Fields]:
        verb = message["method"]
        common = {"method": verb, "time_in": iso_time(0), "time_out": iso_time(0)}
        if "req_id" in message:
            common["req_id"] = message["req_id"]
        if verb == "ping":
            return [common | {"method": "pong"}]
        params = message["params"]
        channel = params["channel"]
        replies = []
        for symbol in params["symbol"]:
            try:
                topic = self.topic(symbol, channel, params)
            except RefusalError as error:
                replies.append(common | {"error": str(error), "success": False, "symbol": symbol})
                continue
            self.change_topics(topics, verb, [topic])
            result = {"channel": channel, "snapshot": True, "symbol": symbol}
            replies.append(common | {"result": result, "success": True})
        return replies

    def topic(self, symbol: str, channel: str, params: Fields) -> Topic:
        known = {f"{pair.base}/{pair.quote}": pair for pair in self.spot.values()}
        if symbol not in known:
            raise RefusalError(f"Currency pair not supported {symbol}")
        if channel not in CHANNELS:
            raise RefusalError("Subscription name invalid")
        topic = Topic(symbol, CHANNELS[channel], known[symbol])
        if channel == "book":
            depth = params.get("depth", 10)
            if depth not in DEPTHS:
                raise RefusalError("Subscription depth not supported")
            return topic._replace(depth=depth)
        if channel == "ohlc":
            interval = str(params.get("interval", 1))
            if interval not in INTERVALS:
                raise RefusalError("Subscription ohlc interval not supported")
            return topic._replace(seconds=INTERVALS[interval], interval=interval)
        return topic

    def push(self, topic: Topic, ms: int, fields: Fields, **lists: list[Fields]) -> list[str]:
        messages = super().push(topic, ms, fields, **lists)
        # Numbers lose their trailing zeros, as in the pushes of the real exchange.
        return [orjson.dumps(orjson.loads(message)).decode() for message in messages]
