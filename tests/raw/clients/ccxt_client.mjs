// Call the public methods of ccxt for JavaScript. Arguments: the folder with node_modules, and the
// JSON that ccxt_client.py describes, without `mode`. The output is the same.

import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const SPOT = "BTC/USDT";
const SWAP = "BTC/USDT:USDT";
const CANDLES = 20;
const LEVELS = 10;
const TIMEOUT_MS = 60_000; // longer than by default, for a busy machine

/** Return the settings of ccxt that docs/drop-in.md has: `urls.api` of public data. */
function dropInUrls(exchange, url) {
    if (exchange !== "binance") {
        return { public: url };
    }
    return {
        public: `${url}/api/v3`,
        fapiPublic: `${url}/fapi/v1`,
        fapiPublicV2: `${url}/fapi/v2`,
        fapiPublicV3: `${url}/fapi/v3`,
        fapiData: `${url}/futures/data`,
    };
}

function configuration(exchange, urls) {
    const api = dropInUrls(exchange, urls.public);
    if (exchange === "binance") {
        api.sapi = `${urls.other}/sapi/v1`;
    }
    return {
        timeout: TIMEOUT_MS,
        enableRateLimit: false,
        urls: { api },
        options: { fetchMarkets: { types: ["spot", "linear"] } },
    };
}

/** Return the calls for one market, spot or swap: name, method and arguments. */
function marketCalls(symbol, suffix = "") {
    return [
        [`fetch_ticker${suffix}`, "fetchTicker", symbol],
        [`fetch_order_book${suffix}`, "fetchOrderBook", symbol, LEVELS],
        [`fetch_ohlcv${suffix}`, "fetchOHLCV", symbol, "1m", undefined, CANDLES],
        [`fetch_trades${suffix}`, "fetchTrades", symbol, undefined, CANDLES],
    ];
}

function callsOf(client) {
    const calls = [
        ["fetch_time", "fetchTime"],
        ["fetch_status", "fetchStatus"],
        ["fetch_markets", "fetchMarkets"],
        ["fetch_currencies", "fetchCurrencies"],
        ...marketCalls(SPOT),
        ["fetch_tickers", "fetchTickers", [SPOT, "ETH/USDT"]],
        ["fetch_all_tickers", "fetchTickers"],
        ["fetch_bids_asks", "fetchBidsAsks", [SPOT]],
        ["fetch_last_prices", "fetchLastPrices", [SPOT]],
    ];
    if (SWAP in client.markets) {
        calls.push(
            ...marketCalls(SWAP, "_swap"),
            ["fetch_funding_rate", "fetchFundingRate", SWAP],
            ["fetch_funding_rates", "fetchFundingRates", [SWAP]],
            ["fetch_funding_intervals", "fetchFundingIntervals", [SWAP]],
            ["fetch_funding_rate_history", "fetchFundingRateHistory", SWAP, undefined, CANDLES],
            ["fetch_open_interest", "fetchOpenInterest", SWAP],
            ["fetch_open_interest_history", "fetchOpenInterestHistory", SWAP, "1h", undefined, CANDLES],
            ["fetch_long_short_ratio_history", "fetchLongShortRatioHistory", SWAP, "1h", undefined, CANDLES],
            ["fetch_mark_price", "fetchMarkPrice", SWAP],
            ["fetch_mark_ohlcv", "fetchMarkOHLCV", SWAP, "1m", undefined, CANDLES],
            ["fetch_index_ohlcv", "fetchIndexOHLCV", SWAP, "1m", undefined, CANDLES],
        );
    }
    return calls.filter(([, method]) => client.has[method]);
}

async function outcomeOf(call) {
    try {
        return { result: await call() };
    } catch (error) {
        return { error: error.constructor.name, message: String(error.message) };
    }
}

async function read(client, names) {
    const loaded = await outcomeOf(() => client.loadMarkets());
    if (loaded.error) {
        return { load_markets: loaded };
    }
    const outcomes = { load_markets: { result: client.symbols } };
    for (const [name, method, ...values] of callsOf(client)) {
        if (names.length === 0 || names.includes(name)) {
            outcomes[name] = await outcomeOf(() => client[method](...values));
        }
    }
    return outcomes;
}

const [folder, json] = process.argv.slice(2);
const options = JSON.parse(json);
const { default: ccxt } = await import(pathToFileURL(createRequire(`${folder}/`).resolve("ccxt")).href);
const outcomes = {};
for (const [exchange, urls] of Object.entries(options.exchanges)) {
    const client = new ccxt[exchange](configuration(exchange, urls));
    outcomes[exchange] = await read(client, options.calls ?? []);
}
process.stdout.write(JSON.stringify(outcomes));
