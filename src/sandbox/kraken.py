"""kraken: REST with the old names of some assets, and sockets of version 2."""

from collections.abc import Mapping

from src.sandbox.exchange import Exchange, RefusalError, Request, Topic
from src.sandbox.knobs import Knobs
from src.sandbox.market import COINS, MAJORS, Fields, Market, Pair, Rows, iso_time, pairs

BURST = 15
"""Requests. One more is allowed per second."""
# Documented: Trades and OHLC are limited per address and pair. Unconfirmed: the numbers, which fit
# ccxt issue 20648: every fifth request of a loop with about one request per second is refused.
PAIR_BURST = 10
PAIR_PER_SECOND = 0.8
PAIR_PATHS = ("/0/public/OHLC", "/0/public/Trades")
MAX_URL_LENGTH = 4_096
"""Longer URLs are refused by Cloudflare, as users report."""
# Names that ccxt changes (its `commonCurrencies`): kraken's LUNA is LUNC elsewhere.
ASSET_NAMES = {"BTC": "XBT", "DOGE": "XDG", "LUNC": "LUNA", "LUNA": "LUNA2"}
SOCKET_NAMES = {"XBT": "BTC", "XDG": "DOGE"}
"""Sockets of version 2 do not use these old names."""
PREFIXED_ASSETS = {"BTC", "ETH", "XRP", "LTC", "XLM", "XMR"}
PREFIXED_QUOTES = {"EUR": "ZEUR", "USD": "ZUSD", "XBT": "XXBT"}
"""Recorded: markets of the prefixed assets in these have names such as XXBTZUSD and XETHXXBT."""
INTERVALS = {"1": 60, "5": 300, "15": 900, "30": 1_800, "60": 3_600, "240": 14_400}
INTERVALS |= {"1440": 86_400, "10080": 604_800, "21600": 1_296_000}
UNKNOWN = "EQuery:Unknown asset pair"
DEPTHS = (10, 25, 100, 500, 1_000)
MINUTES = tuple(map(int, INTERVALS))
TRIGGERS = ("trades", "bbo")
CHANNELS: dict[str, tuple[str, str, object, tuple[object, ...], str]] = {
    "book": ("book", "depth", 10, DEPTHS, "Subscription depth not supported"),
    "ohlc": ("candles", "interval", 1, MINUTES, "Subscription ohlc interval not supported"),
    "ticker": ("ticker", "event_trigger", "trades", TRIGGERS, "Event trigger not supported"),
    "trade": ("trades", "", None, (None,), ""),
}
"""Our name, and name, default and values of the option, and the refusal of other values."""
SNAPSHOT_CANDLES = 10
"""Recorded on 2026-09-10 and 2026-10-06: the snapshot has only the last ten minutes."""
STATUS = '{"api_version":"v2","connection_id":1,"system":"online","version":"2.0.0"}'


class Kraken(Exchange):
    """Wire formats, errors and limits of Kraken."""

    name = "kraken"
    model = Market(0, 0.9998)
    listing = pairs([*COINS[:12], "EUR", "USDC"], "USDT") + pairs(["ETH", "XRP", "SOL"], "BTC")
    listing += pairs([*MAJORS, "XMR", "EUR", "USDC", "USDT"], "USD")
    listing += pairs([*MAJORS, "XMR"], "EUR")
    # Tokenized assets have lower-case letters.
    listing += pairs(["LUNC", "LUNA"], "USDT") + pairs(["LUNC", "LUNA", "AAPLx"], "USD")
    trading_status = "online"
    intervals = INTERVALS
    envelope = '{"error":[],"result":%s}'
    # Errors are documented to arrive with the status 200. A lockout lasts 15 minutes.
    error_format = (r"^(E\w+:.*)", r'{"error":["\1"]}')
    error_lines = f"""
unknown_path 404 EGeneral:Unknown method
no_symbol 200 {UNKNOWN}
bad_interval 200 EGeneral:Invalid arguments
bad_parameter 200 EGeneral:Invalid arguments
connection_limit 429 <html><head><title>Error 1015</title></head>
 <body>You are being rate limited</body></html>
geo_block 403 <html><head><title>Access denied</title></head><body>Error 1009</body></html>
rate_limit 200 EAPI:Rate limit exceeded
pair_limit 200 EGeneral:Too many requests
throttled 200+60 EService: Throttled: $until
banned 200 EGeneral:Temporary lockout
firewall 520 <html><head>
 <title>api.kraken.com | 520: Web server is returning an unknown error</title></head>
 <body>Cloudflare Ray ID</body></html>
busy 200 EService:Busy
unavailable 200 EService:Unavailable
timeout 200 EService:Timeout
"""
    drift_removes = ("tick_size", "p")
    drift_renames = "t"
    greeting = f'{{"channel":"status","type":"update","data":[{STATUS}]}}'
    malformed = '{"error":"Malformed request","method":"","success":false}'
    # Cloudflare allows about 150 connections in 10 minutes. Unconfirmed: the number of messages per
    # second, which depends on the load:
    # https://docs.kraken.com/exchange/guides/websockets/introduction
    connection_limit = (150, 600)
    message_limits = (("", 100),)
    too_fast = '{"error":"Exceeded msg rate","method":"subscribe","success":false}'
    # https://docs.kraken.com/exchange/api-reference/spot-websocket-v2/ohlc: "updates are generated
    # on trade events".
    pushes_only_trades = True
    has_checksums = True
    candle_snapshot = SNAPSHOT_CANDLES
    # https://docs.kraken.com/api/docs/rest-api: rows of get-order-book and get-recent-trades
    rest_records = """
/0/public/Time time
{"unixtime":$second}

/0/public/AssetPairs markets
{$rows}
 "$id":{"altname":"$altname","base":"$base","quote":"$quote","pair_decimals":$digits,
 "lot_decimals":8,"wsname":"$wsname","tick_size":"$tick","status":"$status"}

/0/public/Ticker tickers
{$rows}
 "$id":{"a":["$ask","1","$ask_size"],"b":["$bid","1","$bid_size"],"c":["$last","0.01"],
 "v":["$today_volume","$volume"],"p":["$today_average","$average"],"t":[$today_count,$count],
 "l":["$today_low","$low"],"h":["$today_high","$high"],"o":"$today_open"}

/0/public/OHLC candles 720
{"$id":[$rows],"last":$last_candle}
 [$second,"$open","$high","$low","$close","$average","$volume",$count]

/0/public/Depth book 500
{"$id":{"bids":[$bids],"asks":[$asks]}}
 ["$price","$amount",$second]

/0/public/Trades trades 1000
{"$id":[$rows],"last":"%(last_ms)d000000"}
 ["$price","$amount",$second,"$side_letter","m","",$number]
"""
    # The other endpoints are for clients that use Kraken's own format:
    # https://docs.kraken.com/api/docs/rest-api: get-system-status, get-asset-info and
    # get-recent-spreads
    rest_records += """
/0/public/SystemStatus time
{"status":"online","timestamp":"$iso"}

/0/public/Assets assets
{$rows}
 "$asset":{"aclass":"currency","altname":"$name","decimals":10,"display_decimals":5,
 "status":"enabled"}

/0/public/Spread spreads
{"$id":[$rows],"last":$second}
 [$second,"$bid","$ask"]
"""
    # Numbers have all decimals of the market: the checksum of a book is made of their digits.
    push_records = """
ticker
{"channel":"ticker","type":"$type","data":[{"symbol":"$name","bid":$bid,"bid_qty":$bid_size,
"ask":$ask,"ask_qty":$ask_size,"last":$last,"volume":$volume,"vwap":$average,"low":$low,
"high":$high,"change":$change,"change_pct":%(percent).2f,"trades":9999,"timestamp":"$iso"}]}

book
{"channel":"book","type":"$kind","data":[{"symbol":"$name","bids":[$bids],"asks":[$asks],
"checksum":$checksum,"timestamp":"$iso"}]}
 {"price":$price,"qty":$amount}

candles
{"channel":"ohlc","type":"$type","timestamp":"$iso","data":[$rows]}
 {"symbol":"$name","open":$open,"high":$high,"low":$low,"close":$close,"trades":$count,
 "volume":$volume,"vwap":$average,"interval_begin":"$begin","interval":$interval,
 "timestamp":"$close_time"}

trades
{"channel":"trade","type":"update","data":[$rows]}
 {"symbol":"$name","ord_type":"market","side":"$side","price":$price,"qty":$amount,
 "trade_id":$number,"timestamp":"$iso"}
"""

    def fields(self, pair: Pair) -> Fields:
        base = ASSET_NAMES.get(pair.base, pair.base)
        quote = ASSET_NAMES.get(pair.quote, pair.quote)
        names = {"altname": base + quote, "wsname": f"{base}/{quote}", "id": base + quote}
        assets = [SOCKET_NAMES.get(asset, asset) for asset in (base, quote)]
        names["socket_name"] = "/".join(assets)
        names |= {"base": f"X{base}" if pair.base in PREFIXED_ASSETS else base}
        names |= {"quote": PREFIXED_QUOTES.get(quote, quote)}
        if pair.base in PREFIXED_ASSETS and quote in PREFIXED_QUOTES:
            names["id"] = names["base"] + names["quote"]
        return super().fields(pair) | names

    def rows(self, kind: str, request: Request, requested: list[Pair]) -> Rows:
        if kind != "assets":
            return super().rows(kind, request, requested)
        assets: dict[str, str] = {}
        for pair in requested:
            fields = self.fields(pair)
            names = fields["wsname"].split("/")
            assets |= dict(zip((fields["base"], fields["quote"]), names, strict=True))
        wanted = request.param("asset").split(",")
        return {
            "rows": [
                {"asset": asset, "name": name}
                for asset, name in assets.items()
                if wanted == [""] or asset in wanted or name in wanted
            ]
        }

    def configure(self, knobs: Knobs) -> None:
        super().configure(knobs)
        altnames = {self.fields(pair)["altname"]: pair for pair in self.spot.values()}
        self.names = self.spot | altnames

    def requested_pairs(self, request: Request) -> list[Pair]:
        unknown = request.unknown_names(self.names)
        known = {self.names[name]: None for name in request.names if name not in unknown}
        if unknown and not known:
            raise RefusalError("no_symbol")
        return list(known or self.spot.values())

    def answer(self, request: Request) -> tuple[str, dict[str, str]]:
        if request.url_length > MAX_URL_LENGTH:
            raise RefusalError("firewall")
        text, headers = super().answer(request)
        if request.unknown_names(self.names):  # recorded: the error is beside the known markets
            text = text.replace('"error":[]', f'"error":["{UNKNOWN}"]', 1)
        return text, headers

    def charge(self, request: Request) -> dict[str, str]:
        """Allow one request per second after a burst of 15, and fewer of one pair."""
        now = request.market.now
        if not self.limits[""].take(now, request.knobs.rate_limit or BURST, 1.0):
            raise RefusalError("rate_limit")
        of_pair = self.limits[f"{request.path} {request.names}"]
        if request.path in PAIR_PATHS and not of_pair.take(now, PAIR_BURST, PAIR_PER_SECOND):
            raise RefusalError("pair_limit")
        return {}

    def candle_numbers(self, request: Request, market: Market, seconds: int) -> range:
        since = request.seconds("since") or 0
        periods = market.periods(seconds, request.most)
        first = max(periods.start, int(since // seconds) + 1)
        return range(min(first, periods.stop - 1), periods.stop)  # the last is always sent

    def reply(self, message: Fields, path: str, topics: dict[str, Topic]) -> list[Fields]:
        verb = message["method"]
        common = {"method": verb, "time_in": iso_time(0), "time_out": iso_time(0)}
        if "req_id" in message:
            common["req_id"] = message["req_id"]
        if verb == "ping":
            return [common | {"method": "pong"}]
        params = message["params"]
        known = self.socket_names()
        replies = []
        for symbol in params["symbol"]:
            try:
                topic = self.topic(symbol, params, known)
                self.check_change(topics, verb, topic)
            except RefusalError as error:
                replies.append(common | {"error": error.reason, "success": False, "symbol": symbol})
                continue
            self.change_topics(topics, verb, [topic])
            result = {"channel": params["channel"], "snapshot": True, "symbol": symbol}
            if topic.option is not None:
                result[CHANNELS[params["channel"]][1]] = topic.option
            replies.append(common | {"result": result, "success": True})
        return replies

    def socket_names(self) -> dict[str, Pair]:
        """Return the markets by their `wsname`, in which sockets write XBT as BTC and XDG as DOGE.

        The other names are Kraken's own, although ccxt renames some of them, such as LUNA.
        https://docs.kraken.com/exchange/guides/websockets/introduction
        """
        return {self.fields(pair)["socket_name"]: pair for pair in self.spot.values()}

    def topic(self, symbol: str, params: Fields, known: Mapping[str, Pair]) -> Topic:
        """Return the topic of a symbol. Kraken echoes the options of each channel."""
        if "/" not in symbol:
            raise RefusalError(f"Currency pair not in ISO 4217-A3 format {symbol}")
        if symbol not in known:
            raise RefusalError(f"Currency pair not supported {symbol}")
        channel = params["channel"]
        if channel not in CHANNELS:
            raise RefusalError("Subscription name invalid")
        kind, name, default, allowed, refusal = CHANNELS[channel]
        value = params.get(name, default)
        if value not in allowed:
            raise RefusalError(refusal)
        return Topic(symbol, kind, known[symbol], value)

    def check_change(self, topics: Mapping[str, Topic], verb: str, topic: Topic) -> None:
        """Refuse a second subscription, also with another depth or event trigger.

        An unsubscription has the same options as the subscription:
        https://docs.kraken.com/exchange/api-reference/spot-websocket-v2/ticker
        """
        if verb == "unsubscribe" and topic.key not in topics:
            raise RefusalError("Subscription Not Found")
        same = [other for other in topics.values() if other[:2] == topic[:2]]
        if topic.channel == "candles":  # a market can have several intervals
            same = [other for other in same if other.option == topic.option]
        if verb == "subscribe" and same:
            raise RefusalError("Already subscribed")
