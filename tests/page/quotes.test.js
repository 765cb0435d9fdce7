// The tests of src/static/quotes.js: the gateway's clock, what is known of prices, and how they compare.

import assert from "node:assert/strict";
import test from "node:test";

import { GatewayClock, Quotes, compare } from "../../src/static/quotes.js";

const NOW = Date.UTC(2026, 10, 21, 21, 26);
const [MINUTE, HOUR] = [60_000, 3_600_000];
const SYMBOL = "BTC/USDT";

/** A viewer's clock, which may be wrong, and a gateway whose messages take some time. */
class Wire {
	constructor(wrong = 0) {
		this.utc = NOW;
		this.wrong = wrong;
		this.clock = new GatewayClock(() => this.utc + this.wrong);
	}

	/** A message arrives that took so many milliseconds. */
	arrives(took) {
		this.clock.heard(this.utc - took);
	}

	/** How far the clock is from the gateway's. */
	get error() {
		return this.clock.now() - this.utc;
	}
}

const ticker = (last, more = {}) => ({ last, bid: last - 1, ask: last + 1, stale: false, ...more });

/** A message of /ws. */
function message(exchange, last, fetchedAt = NOW, more = {}) {
	const data = { ...ticker(last), fetched_at: fetchedAt, ...more };
	return { type: "update", channel: "ticker", symbol: SYMBOL, exchange, fetched_at: fetchedAt, data };
}

const status = (exchange, state, code) => ({ type: "status", channel: "ticker", symbol: SYMBOL, exchange, state, ...(code && { code }) });

function taken(...messages) {
	const quotes = new Quotes();
	for (const one of messages) quotes.take(one);
	return quotes;
}

const quoteOf = (quotes, exchange = "bybit") => quotes.of(SYMBOL).get(exchange);

/** Compare tickers, given by exchange. */
function compared(tickers, { ratio = 0.01, quotes = new Quotes() } = {}) {
	for (const [exchange, more] of Object.entries(tickers)) quotes.take(message(exchange, more.last, NOW, more));
	return compare(quotes.of(SYMBOL), { now: NOW, lifetime: 15_000, ratio });
}

const outliersOf = (lasts, ratio) => {
	const tickers = Object.fromEntries(Object.entries(lasts).map(([name, last]) => [name, { last }]));
	return Object.fromEntries(compared(tickers, { ratio }).outliers);
};

test("without a message the clock is the viewer's", () => {
	assert.equal(new Wire(HOUR).error, HOUR);
});

test("a viewer's clock that is wrong by an hour does not matter", () => {
	for (const wrong of [HOUR, -HOUR]) {
		const wire = new Wire(wrong);
		wire.arrives(40);
		assert.equal(wire.error, -40, `wrong by ${wrong}`);
	}
});

test("of several messages the one that travelled fastest counts", () => {
	const wire = new Wire(HOUR);
	for (const [took, error] of [[500, -500], [50, -50], [300, -50], [51, -50], [20, -20]]) {
		wire.arrives(took);
		assert.equal(wire.error, error, `after one that took ${took} ms`);
	}
});

test("what was measured holds for a minute and is then renewed", () => {
	const wire = new Wire();
	wire.arrives(20);
	wire.utc += MINUTE;
	wire.arrives(300);
	assert.equal(wire.error, -20);
	wire.utc += 1;
	wire.arrives(300);
	assert.equal(wire.error, -300);
	wire.utc += 1;
	wire.arrives(30);
	assert.equal(wire.error, -30);
});

test("a minute begins with each better measurement", () => {
	const wire = new Wire();
	wire.arrives(50);
	wire.utc += MINUTE - 1;
	wire.arrives(20);
	wire.utc += MINUTE;
	wire.arrives(300);
	assert.equal(wire.error, -20);
});

test("a viewer's clock that is put right meanwhile is learned at once", () => {
	for (const [wrong, right] of [[HOUR, 0], [0, HOUR], [-HOUR, 0], [HOUR, -HOUR]]) {
		const wire = new Wire(wrong);
		wire.arrives(20);
		wire.wrong = right;
		wire.arrives(70);
		assert.equal(wire.error, -70, `${wrong} became ${right}`);
	}
});

test("a symbol nobody told of has no quotes", () => {
	assert.equal(new Quotes().of("FOO/BAR").size, 0);
});

test("a snapshot and an update are taken alike", () => {
	const quotes = taken({ ...message("bybit", 100), type: "snapshot" });
	assert.equal(quoteOf(quotes).data.last, 100);
	quotes.take(message("bybit", 101, NOW + 1));
	assert.equal(quoteOf(quotes).data.last, 101);
	assert.equal(quoteOf(quotes).fetchedAt, NOW + 1);
	assert.deepEqual([...quotes.of(SYMBOL).keys()], ["bybit"]);
});

test("an answer that was received earlier never replaces what was pushed later", () => {
	const quotes = taken(message("bybit", 100));
	quotes.takeAll({ tickers: { [SYMBOL]: { bybit: { ...ticker(98), fetched_at: NOW - 1, stale: true } } }, errors: {} });
	assert.equal(quoteOf(quotes).data.last, 100);
	assert.equal(quoteOf(quotes).fetchedAt, NOW);
	assert.equal(quoteOf(quotes).isStale(NOW, 15_000), false);
	quotes.take(message("bybit", 101, NOW - 60_000)); // the gateway's clock went back: what is pushed comes in order
	assert.equal(quoteOf(quotes).data.last, 101);
	assert.equal(quoteOf(quotes).age(NOW), 60_000);
});

test("a price that was asked for goes stale with its time, whoever ceases to ask", () => {
	const quotes = taken(message("bybit", 100, NOW, { source: "rest" }));
	assert.deepEqual([15_000, 15_001].map((later) => quoteOf(quotes).isStale(NOW + later, 15_000)), [false, true]);
	quotes.take(message("bybit", 100, NOW, { source: "stream" }));
	assert.equal(quoteOf(quotes).isStale(NOW + 600_000, 15_000), false);
});

test("each exchange has a quote of its own", () => {
	const quotes = taken(message("bybit", 100), message("kraken", 200, NOW - 5_000));
	assert.equal(quoteOf(quotes, "bybit").data.last, 100);
	assert.equal(quoteOf(quotes, "kraken").data.last, 200);
});

test("the direction is that of the last move", () => {
	const quotes = new Quotes();
	for (const [last, direction] of [[100, 0], [101, 1], [101, 1], [100.5, -1], [100.5, -1], [102, 1]]) {
		quotes.take(message("bybit", last));
		assert.equal(quoteOf(quotes).direction, direction, `at ${last}`);
	}
});

test("the age counts from when the gateway received it, and is never negative", () => {
	const quote = quoteOf(taken(message("bybit", 100)));
	assert.equal(quote.age(NOW + 4_000), 4_000);
	assert.equal(quote.age(NOW - 50), 0);
});

test("a price whose stream is live is not stale, however long it stays the same", () => {
	assert.equal(quoteOf(taken(message("bybit", 100))).isStale(NOW + HOUR, 15_000), false);
});

test("a price that the gateway served past its time is stale, until a newer one comes", () => {
	const quotes = taken(message("bybit", 100, NOW, { stale: true }));
	assert.equal(quoteOf(quotes).isStale(NOW, 15_000), true);
	quotes.take(message("bybit", 100, NOW + 1));
	assert.equal(quoteOf(quotes).isStale(NOW + 1, 15_000), false);
});

test("while a stream is silent, a price is good for its time", () => {
	const quotes = taken(message("bybit", 100), status("bybit", "stale"));
	const quote = quoteOf(quotes);
	assert.equal(quote.silent, true);
	assert.equal(quote.isStale(NOW + 15_000, 15_000), false);
	assert.equal(quote.isStale(NOW + 15_001, 15_000), true);
	quotes.take(message("bybit", 101, NOW + 20_000, { source: "rest" })); // REST stands in
	assert.equal(quote.silent, true);
	assert.equal(quote.isStale(NOW + 20_000, 15_000), false);
});

test("a stream that is live again is not silent", () => {
	const quotes = taken(message("bybit", 100), status("bybit", "stale"), status("bybit", "live"));
	assert.equal(quoteOf(quotes).silent, false);
	assert.equal(quoteOf(quotes).isStale(NOW + HOUR, 15_000), false);
});

test("a status without any price tells why there is none", () => {
	const quotes = taken(status("bybit", "stale", "exchange_unavailable"));
	assert.equal(quoteOf(quotes).data, null);
	assert.equal(quoteOf(quotes).problem.code, "exchange_unavailable");
	quotes.take(message("bybit", 100));
	assert.equal(quoteOf(quotes).problem, null);
});

test("a status beside a price is no problem of its own", () => {
	assert.equal(quoteOf(taken(message("bybit", 100), status("bybit", "stale", "exchange_timeout"))).problem, null);
	assert.equal(quoteOf(taken(status("bybit", "stale"))).problem, null);
});

test("what is subscribed to anew is not silent until it is said so", () => {
	const quotes = taken(message("bybit", 100), status("bybit", "stale"), message("kraken", 100), status("kraken", "stale"));
	quotes.asked([{ symbol: SYMBOL, exchange: "bybit" }, { symbol: "FOO/BAR", exchange: "bybit" }]);
	assert.deepEqual(["bybit", "kraken"].map((exchange) => quoteOf(quotes, exchange).silent), [false, true]);
	assert.equal(quoteOf(quotes).data.last, 100);
});

test("the first picture brings prices of several symbols", () => {
	const quotes = new Quotes();
	const bybit = (last) => ({ bybit: { ...ticker(last), fetched_at: NOW } });
	quotes.takeAll({ tickers: { [SYMBOL]: bybit(100), "ETH/USDT": bybit(3) }, errors: {} });
	assert.equal(quoteOf(quotes).data.last, 100);
	assert.equal(quoteOf(quotes).fetchedAt, NOW);
	assert.equal(quotes.of("ETH/USDT").get("bybit").data.last, 3);
});

const failing = (code, exchange = "bybit") => ({ tickers: {}, errors: { [SYMBOL]: { [exchange]: { code, title: "it fails" } } } });

test("a symbol an exchange does not know is not listed there, and has no quote", () => {
	for (const code of ["unknown_symbol", "malformed_request"]) {
		const quotes = new Quotes();
		assert.equal(quotes.isListed(SYMBOL, "bybit"), true);
		quotes.takeAll(failing(code));
		assert.equal(quotes.isListed(SYMBOL, "bybit"), false, code);
		assert.equal(quotes.isListed(SYMBOL, "kraken"), true);
		assert.equal(quotes.isListed("ETH/USDT", "bybit"), true);
		assert.equal(quoteOf(quotes), undefined);
	}
});

test("a symbol that is listed later is listed", () => {
	const quotes = new Quotes();
	quotes.takeAll(failing("unknown_symbol"));
	quotes.takeAll({ tickers: { [SYMBOL]: { bybit: { ...ticker(100), fetched_at: NOW } } }, errors: {} });
	assert.equal(quotes.isListed(SYMBOL, "bybit"), true);
});

test("a symbol that is delisted keeps its last price, which goes stale with its time", () => {
	const quotes = taken(message("bybit", 100));
	quotes.takeAll(failing("unknown_symbol"));
	assert.equal(quotes.isListed(SYMBOL, "bybit"), false);
	assert.equal(quoteOf(quotes).data.last, 100);
	assert.deepEqual([15_000, 15_001].map((later) => quoteOf(quotes).isStale(NOW + later, 15_000)), [false, true]);
});

test("a failure keeps the price that was there, which goes stale with its time", () => {
	const quotes = taken(message("bybit", 100));
	quotes.takeAll(failing("circuit_open"));
	const quote = quoteOf(quotes);
	assert.equal(quote.data.last, 100);
	assert.equal(quote.problem.code, "circuit_open");
	assert.deepEqual([15_000, 15_001].map((later) => quote.isStale(NOW + later, 15_000)), [false, true]);
	assert.equal(quotes.isListed(SYMBOL, "bybit"), true);
	quotes.take(message("bybit", 101, NOW + 1));
	assert.equal(quote.problem, null);
	assert.equal(quote.isStale(NOW + 1, 15_000), false);
});

test("a failure without any price is told, and is no stale price", () => {
	const quotes = new Quotes();
	quotes.takeAll(failing("circuit_open"));
	assert.equal(quoteOf(quotes).data, null);
	assert.equal(quoteOf(quotes).problem.title, "it fails");
	assert.equal(quoteOf(quotes).isStale(NOW, 15_000), false);
});

test("exchanges that are switched off are forgotten", () => {
	const quotes = taken(message("bybit", 100), message("kraken", 101));
	quotes.keep(["kraken", "binance"]);
	assert.deepEqual([...quotes.of(SYMBOL).keys()], ["kraken"]);
	quotes.keep([]);
	assert.equal(quotes.of(SYMBOL).size, 0);
});

test("the best bid is the highest, the best ask the lowest", () => {
	const found = compared({
		bybit: { last: 100, bid: 99, ask: 101 },
		binance: { last: 100, bid: 99.5, ask: 101.5 },
		kraken: { last: 100, bid: 98, ask: 100.5 },
	});
	assert.deepEqual(found.bid, { exchange: "binance", price: 99.5 });
	assert.deepEqual(found.ask, { exchange: "kraken", price: 100.5 });
	assert.equal(found.crossed, null);
	assert.equal(found.apart, 0);
});

test("a bid or an ask that is missing or nothing is not the best", () => {
	for (const none of [null, undefined, 0]) {
		const found = compared({ bybit: { last: 100, bid: none, ask: none }, kraken: { last: 100, bid: 90, ask: 110 } });
		assert.deepEqual(found.bid, { exchange: "kraken", price: 90 });
		assert.deepEqual(found.ask, { exchange: "kraken", price: 110 });
	}
	const found = compared({ bybit: { last: 100, bid: null, ask: null }, kraken: { last: 101, bid: null, ask: null } });
	assert.equal(found.bid, null);
	assert.equal(found.ask, null);
	assert.equal(found.crossed, null);
});

test("how far apart exchanges are is told in basis points of the lowest and the highest price", () => {
	assert.equal(compared({ bybit: { last: 99.5 }, kraken: { last: 100 }, binance: { last: 100.5 } }).apart, 100);
});

test("one exchange alone is not compared", () => {
	const found = compared({ bybit: { last: 100, bid: 102, ask: 101 } });
	assert.deepEqual(found.bid, { exchange: "bybit", price: 102 });
	assert.equal(found.apart, null);
	assert.equal(found.crossed, null);
	assert.equal(found.outliers.size, 0);
});

test("nothing at all compares to nothing", () => {
	const found = compared({});
	assert.deepEqual([found.bid, found.ask, found.apart, found.crossed, found.outliers.size], [null, null, null, null, 0]);
});

test("crossed is where one exchange bids more than another asks", () => {
	const asking = { last: 99, bid: 98, ask: 99.5 };
	assert.equal(compared({ bybit: asking, kraken: { last: 101, bid: 100.5, ask: 102 } }).crossed, 100);
	assert.equal(compared({ bybit: asking, kraken: { last: 101, bid: 99.5, ask: 102 } }).crossed, null);
});

test("stale prices are left out of everything", () => {
	const quotes = taken(message("bybit", 50, NOW, { bid: 200, ask: 1, stale: true }), message("okx", 70, NOW - 20_000, { bid: 300, ask: 2 }));
	quotes.take(status("okx", "stale"));
	quotes.takeAll(failing("exchange_timeout", "bitget"));
	const found = compared({ kraken: { last: 100, bid: 99, ask: 101 }, binance: { last: 100, bid: 99, ask: 101 } }, { quotes });
	assert.equal(found.bid.price, 99);
	assert.equal(found.ask.price, 101);
	assert.equal(found.apart, 0);
	assert.equal(found.crossed, null);
	assert.deepEqual([...found.outliers], []);
});

test("of two exchanges that differ by more than the ratio both stand apart, in opposite directions", () => {
	assert.deepEqual(outliersOf({ bybit: 100, kraken: 125 }, 0.1), { bybit: 100 / 125 - 1, kraken: 0.25 });
	assert.deepEqual(outliersOf({ bybit: 100, kraken: 100.9 }, 0.01), {});
});

test("of three exchanges the one that differs stands apart from the middle one", () => {
	assert.deepEqual(outliersOf({ bybit: 100, binance: 100, kraken: 125 }, 0.2), { kraken: 0.25 });
	assert.deepEqual(outliersOf({ bybit: 100, binance: 101, kraken: 75 }, 0.2), { kraken: -0.25 });
	assert.deepEqual(outliersOf({ bybit: 100, binance: 100, kraken: 100.9 }, 0.01), {});
});

test("what stands apart from two others is never best, and of two it cannot be said which does", () => {
	const [low, high] = [{ last: 100, bid: 99, ask: 101 }, { last: 110, bid: 109, ask: 111 }];
	const three = compared({ bybit: low, binance: low, kraken: high });
	assert.deepEqual([three.bid.exchange, three.ask.exchange, three.crossed], ["bybit", "bybit", null]);
	const two = compared({ bybit: low, kraken: high });
	assert.deepEqual([two.bid.exchange, two.ask.exchange], ["kraken", "bybit"]);
});

test("exactly the ratio is not apart yet", () => {
	assert.deepEqual(outliersOf({ bybit: 100, binance: 100, kraken: 150 }, 0.5), {});
	assert.deepEqual(outliersOf({ bybit: 100, binance: 100, kraken: 150.1 }, 0.5), { kraken: 150.1 / 100 - 1 });
	assert.deepEqual(outliersOf({ bybit: 100, binance: 100, kraken: 50 }, 0.5), {});
});

test("of three exchanges only the one that differs stands apart, however far", () => {
	assert.deepEqual(Object.keys(outliersOf({ bybit: 100, binance: 100, kraken: 103 }, 0.01)), ["kraken"]);
});
