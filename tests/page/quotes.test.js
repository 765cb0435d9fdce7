// Tests of quotes.js.

import assert from "node:assert/strict";
import test from "node:test";

import { GatewayClock, Quotes, compare } from "../../src/static/quotes.js";

const NOW = Date.UTC(2026, 10, 21, 21, 26);
const [MINUTE, HOUR] = [60_000, 3_600_000];
const SYMBOL = "BTC/USDT";

/** A viewer's clock with an error, and messages with a delay. */
class Wire {
	constructor(wrong = 0) {
		this.utc = NOW;
		this.wrong = wrong;
		this.clock = new GatewayClock(() => this.utc + this.wrong);
	}

	/** Receive a message with a delay in milliseconds. */
	receive(delay) {
		this.clock.synchronize(this.utc - delay);
	}

	/** The error of the clock in milliseconds. */
	get error() {
		return this.clock.now() - this.utc;
	}
}

const ticker = (last, more = {}) => ({ last, bid: last - 1, ask: last + 1, stale: false, ...more });

/** A message of /ws. */
function message(exchange, last, fetchedAt = NOW, more = {}) {
	const data = { ...ticker(last), fetched_at: fetchedAt, ...more };
	return {
		type: "update",
		channel: "ticker",
		symbol: SYMBOL,
		exchange,
		fetched_at: fetchedAt,
		data,
	};
}

const status = (exchange, state, code) => ({
	type: "status",
	channel: "ticker",
	symbol: SYMBOL,
	exchange,
	state,
	...(code && { code }),
});

function quotesOf(...messages) {
	const quotes = new Quotes();
	for (const item of messages) quotes.update(item);
	return quotes;
}

const quoteOf = (quotes, exchange = "bybit") => quotes.of(SYMBOL).get(exchange);

/** Compare tickers by exchange. */
function compared(tickers, { ratio = 0.01, quotes = new Quotes() } = {}) {
	for (const [exchange, more] of Object.entries(tickers)) {
		quotes.update(message(exchange, more.last, NOW, more));
	}
	return compare(quotes.of(SYMBOL), { now: NOW, lifetime: 15_000, ratio });
}

const outliersOf = (lasts, ratio) => {
	const tickers = Object.fromEntries(
		Object.entries(lasts).map(([name, last]) => [name, { last }]),
	);
	return Object.fromEntries(compared(tickers, { ratio }).outliers);
};

test("without a message the clock is the viewer's clock", () => {
	assert.equal(new Wire(HOUR).error, HOUR);
});

test("a wrong clock of the viewer does not matter", () => {
	for (const wrong of [HOUR, -HOUR]) {
		const wire = new Wire(wrong);
		wire.receive(40);
		assert.equal(wire.error, -40, `wrong by ${wrong}`);
	}
});

test("the message with the least delay sets the clock", () => {
	const wire = new Wire(HOUR);
	for (const [delay, error] of [
		[500, -500],
		[50, -50],
		[300, -50],
		[51, -50],
		[20, -20],
	]) {
		wire.receive(delay);
		assert.equal(wire.error, error, `after a delay of ${delay} ms`);
	}
});

test("a measurement is replaced after a minute", () => {
	const wire = new Wire();
	wire.receive(20);
	wire.utc += MINUTE;
	wire.receive(300);
	assert.equal(wire.error, -20);
	wire.utc += 1;
	wire.receive(300);
	assert.equal(wire.error, -300);
	wire.utc += 1;
	wire.receive(30);
	assert.equal(wire.error, -30);
});

test("a better measurement starts a new minute", () => {
	const wire = new Wire();
	wire.receive(50);
	wire.utc += MINUTE - 1;
	wire.receive(20);
	wire.utc += MINUTE;
	wire.receive(300);
	assert.equal(wire.error, -20);
});

test("a correction of the viewer's clock is noticed with the next message", () => {
	for (const [wrong, right] of [
		[HOUR, 0],
		[0, HOUR],
		[-HOUR, 0],
		[HOUR, -HOUR],
	]) {
		const wire = new Wire(wrong);
		wire.receive(20);
		wire.wrong = right;
		wire.receive(70);
		assert.equal(wire.error, -70, `${wrong} became ${right}`);
	}
});

test("an unknown symbol has no quotes", () => {
	assert.equal(new Quotes().of("FOO/BAR").size, 0);
});

test("snapshots and updates are applied alike", () => {
	const quotes = quotesOf({ ...message("bybit", 100), type: "snapshot" });
	assert.equal(quoteOf(quotes).data.last, 100);
	quotes.update(message("bybit", 101, NOW + 1));
	assert.equal(quoteOf(quotes).data.last, 101);
	assert.equal(quoteOf(quotes).fetchedAt, NOW + 1);
	assert.deepEqual([...quotes.of(SYMBOL).keys()], ["bybit"]);
});

test("an older response never replaces newer streamed data", () => {
	const quotes = quotesOf(message("bybit", 100));
	quotes.updateAll({
		tickers: { [SYMBOL]: { bybit: { ...ticker(98), fetched_at: NOW - 1, stale: true } } },
		errors: {},
	});
	assert.equal(quoteOf(quotes).data.last, 100);
	assert.equal(quoteOf(quotes).fetchedAt, NOW);
	assert.equal(quoteOf(quotes).isStale(NOW, 15_000), false);
	quotes.update(message("bybit", 101, NOW - 60_000)); // the clock was set back
	assert.equal(quoteOf(quotes).data.last, 101);
	assert.equal(quoteOf(quotes).age(NOW), 60_000);
});

test("a price from REST becomes stale after its lifetime", () => {
	const quotes = quotesOf(message("bybit", 100, NOW, { source: "rest" }));
	assert.deepEqual(
		[15_000, 15_001].map((later) => quoteOf(quotes).isStale(NOW + later, 15_000)),
		[false, true],
	);
	quotes.update(message("bybit", 100, NOW, { source: "stream" }));
	assert.equal(quoteOf(quotes).isStale(NOW + 600_000, 15_000), false);
});

test("each exchange has its own quote", () => {
	const quotes = quotesOf(message("bybit", 100), message("kraken", 200, NOW - 5_000));
	assert.equal(quoteOf(quotes, "bybit").data.last, 100);
	assert.equal(quoteOf(quotes, "kraken").data.last, 200);
});

test("the direction is that of the last price change", () => {
	const quotes = new Quotes();
	for (const [last, direction] of [
		[100, 0],
		[101, 1],
		[101, 1],
		[100.5, -1],
		[100.5, -1],
		[102, 1],
	]) {
		quotes.update(message("bybit", last));
		assert.equal(quoteOf(quotes).direction, direction, `at ${last}`);
	}
});

test("the age starts when the gateway received the price, and is never negative", () => {
	const quote = quoteOf(quotesOf(message("bybit", 100)));
	assert.equal(quote.age(NOW + 4_000), 4_000);
	assert.equal(quote.age(NOW - 50), 0);
});

test("a price of a live stream does not become stale", () => {
	assert.equal(quoteOf(quotesOf(message("bybit", 100))).isStale(NOW + HOUR, 15_000), false);
});

test("a price that the gateway marks as stale is stale until a newer one arrives", () => {
	const quotes = quotesOf(message("bybit", 100, NOW, { stale: true }));
	assert.equal(quoteOf(quotes).isStale(NOW, 15_000), true);
	quotes.update(message("bybit", 100, NOW + 1));
	assert.equal(quoteOf(quotes).isStale(NOW + 1, 15_000), false);
});

test("a price of a silent stream is valid for its lifetime", () => {
	const quotes = quotesOf(message("bybit", 100), status("bybit", "stale"));
	const quote = quoteOf(quotes);
	assert.equal(quote.isSilent, true);
	assert.equal(quote.isStale(NOW + 15_000, 15_000), false);
	assert.equal(quote.isStale(NOW + 15_001, 15_000), true);
	quotes.update(message("bybit", 101, NOW + 20_000, { source: "rest" })); // from REST
	assert.equal(quote.isSilent, true);
	assert.equal(quote.isStale(NOW + 20_000, 15_000), false);
});

test("a recovered stream is not silent", () => {
	const quotes = quotesOf(
		message("bybit", 100),
		status("bybit", "stale"),
		status("bybit", "live"),
	);
	assert.equal(quoteOf(quotes).isSilent, false);
	assert.equal(quoteOf(quotes).isStale(NOW + HOUR, 15_000), false);
});

test("a status without a price gives the reason", () => {
	const quotes = quotesOf(status("bybit", "stale", "exchange_unavailable"));
	assert.equal(quoteOf(quotes).data, null);
	assert.equal(quoteOf(quotes).problem.code, "exchange_unavailable");
	quotes.update(message("bybit", 100));
	assert.equal(quoteOf(quotes).problem, null);
});

test("a status beside a price is not a problem", () => {
	assert.equal(
		quoteOf(quotesOf(message("bybit", 100), status("bybit", "stale", "exchange_timeout")))
			.problem,
		null,
	);
	assert.equal(quoteOf(quotesOf(status("bybit", "stale"))).problem, null);
});

test("a new subscription resets the silence of its streams", () => {
	const quotes = quotesOf(
		message("bybit", 100),
		status("bybit", "stale"),
		message("kraken", 100),
		status("kraken", "stale"),
	);
	quotes.resetSilence([
		{ symbol: SYMBOL, exchange: "bybit" },
		{ symbol: "FOO/BAR", exchange: "bybit" },
	]);
	assert.deepEqual(
		["bybit", "kraken"].map((exchange) => quoteOf(quotes, exchange).isSilent),
		[false, true],
	);
	assert.equal(quoteOf(quotes).data.last, 100);
});

test("the first document has prices of several symbols", () => {
	const quotes = new Quotes();
	const bybit = (last) => ({ bybit: { ...ticker(last), fetched_at: NOW } });
	quotes.updateAll({ tickers: { [SYMBOL]: bybit(100), "ETH/USDT": bybit(3) }, errors: {} });
	assert.equal(quoteOf(quotes).data.last, 100);
	assert.equal(quoteOf(quotes).fetchedAt, NOW);
	assert.equal(quotes.of("ETH/USDT").get("bybit").data.last, 3);
});

const failing = (code, exchange = "bybit") => ({
	tickers: {},
	errors: { [SYMBOL]: { [exchange]: { code, title: "it fails" } } },
});

test("a symbol that an exchange rejects is not listed there and has no quote", () => {
	for (const code of ["unknown_symbol", "malformed_request"]) {
		const quotes = new Quotes();
		assert.equal(quotes.isListed(SYMBOL, "bybit"), true);
		quotes.updateAll(failing(code));
		assert.equal(quotes.isListed(SYMBOL, "bybit"), false, code);
		assert.equal(quotes.isListed(SYMBOL, "kraken"), true);
		assert.equal(quotes.isListed("ETH/USDT", "bybit"), true);
		assert.equal(quoteOf(quotes), undefined);
	}
});

test("a symbol can become listed later", () => {
	const quotes = new Quotes();
	quotes.updateAll(failing("unknown_symbol"));
	quotes.updateAll({
		tickers: { [SYMBOL]: { bybit: { ...ticker(100), fetched_at: NOW } } },
		errors: {},
	});
	assert.equal(quotes.isListed(SYMBOL, "bybit"), true);
});

test("a delisted symbol keeps its last price until it is stale", () => {
	const quotes = quotesOf(message("bybit", 100));
	quotes.updateAll(failing("unknown_symbol"));
	assert.equal(quotes.isListed(SYMBOL, "bybit"), false);
	assert.equal(quoteOf(quotes).data.last, 100);
	assert.deepEqual(
		[15_000, 15_001].map((later) => quoteOf(quotes).isStale(NOW + later, 15_000)),
		[false, true],
	);
});

test("an error keeps the previous price until it is stale", () => {
	const quotes = quotesOf(message("bybit", 100));
	quotes.updateAll(failing("circuit_open"));
	const quote = quoteOf(quotes);
	assert.equal(quote.data.last, 100);
	assert.equal(quote.problem.code, "circuit_open");
	assert.deepEqual(
		[15_000, 15_001].map((later) => quote.isStale(NOW + later, 15_000)),
		[false, true],
	);
	assert.equal(quotes.isListed(SYMBOL, "bybit"), true);
	quotes.update(message("bybit", 101, NOW + 1));
	assert.equal(quote.problem, null);
	assert.equal(quote.isStale(NOW + 1, 15_000), false);
});

test("an error without a price is a problem and not a stale price", () => {
	const quotes = new Quotes();
	quotes.updateAll(failing("circuit_open"));
	assert.equal(quoteOf(quotes).data, null);
	assert.equal(quoteOf(quotes).problem.title, "it fails");
	assert.equal(quoteOf(quotes).isStale(NOW, 15_000), false);
});

test("disabled exchanges are removed", () => {
	const quotes = quotesOf(message("bybit", 100), message("kraken", 101));
	quotes.retainExchanges(["kraken", "binance"]);
	assert.deepEqual([...quotes.of(SYMBOL).keys()], ["kraken"]);
	quotes.retainExchanges([]);
	assert.equal(quotes.of(SYMBOL).size, 0);
});

test("the best bid is the highest and the best ask the lowest", () => {
	const found = compared({
		bybit: { last: 100, bid: 99, ask: 101 },
		binance: { last: 100, bid: 99.5, ask: 101.5 },
		kraken: { last: 100, bid: 98, ask: 100.5 },
	});
	assert.deepEqual(found.bid, { exchange: "binance", price: 99.5 });
	assert.deepEqual(found.ask, { exchange: "kraken", price: 100.5 });
	assert.equal(found.crossedBp, null);
	assert.equal(found.rangeBp, 0);
});

test("a missing or zero bid or ask is never best", () => {
	for (const none of [null, undefined, 0]) {
		const found = compared({
			bybit: { last: 100, bid: none, ask: none },
			kraken: { last: 100, bid: 90, ask: 110 },
		});
		assert.deepEqual(found.bid, { exchange: "kraken", price: 90 });
		assert.deepEqual(found.ask, { exchange: "kraken", price: 110 });
	}
	const found = compared({
		bybit: { last: 100, bid: null, ask: null },
		kraken: { last: 101, bid: null, ask: null },
	});
	assert.equal(found.bid, null);
	assert.equal(found.ask, null);
	assert.equal(found.crossedBp, null);
});

test("the range is in basis points of the lowest and the highest price", () => {
	assert.equal(
		compared({ bybit: { last: 99.5 }, kraken: { last: 100 }, binance: { last: 100.5 } })
			.rangeBp,
		100,
	);
});

test("a single exchange is not compared", () => {
	const found = compared({ bybit: { last: 100, bid: 102, ask: 101 } });
	assert.deepEqual(found.bid, { exchange: "bybit", price: 102 });
	assert.equal(found.rangeBp, null);
	assert.equal(found.crossedBp, null);
	assert.equal(found.outliers.size, 0);
});

test("an empty comparison has no results", () => {
	const found = compared({});
	assert.deepEqual(
		[found.bid, found.ask, found.rangeBp, found.crossedBp, found.outliers.size],
		[null, null, null, null, 0],
	);
});

test("prices are crossed if one exchange bids more than another asks", () => {
	const asking = { last: 99, bid: 98, ask: 99.5 };
	assert.equal(
		compared({ bybit: asking, kraken: { last: 101, bid: 100.5, ask: 102 } }).crossedBp,
		100,
	);
	assert.equal(
		compared({ bybit: asking, kraken: { last: 101, bid: 99.5, ask: 102 } }).crossedBp,
		null,
	);
});

test("stale prices are ignored in comparisons", () => {
	const quotes = quotesOf(
		message("bybit", 50, NOW, { bid: 200, ask: 1, stale: true }),
		message("okx", 70, NOW - 20_000, { bid: 300, ask: 2 }),
	);
	quotes.update(status("okx", "stale"));
	quotes.updateAll(failing("exchange_timeout", "bitget"));
	const found = compared(
		{ kraken: { last: 100, bid: 99, ask: 101 }, binance: { last: 100, bid: 99, ask: 101 } },
		{ quotes },
	);
	assert.equal(found.bid.price, 99);
	assert.equal(found.ask.price, 101);
	assert.equal(found.rangeBp, 0);
	assert.equal(found.crossedBp, null);
	assert.deepEqual([...found.outliers], []);
});

test("of two exchanges that differ, both are outliers", () => {
	assert.deepEqual(outliersOf({ bybit: 100, kraken: 125 }, 0.1), {
		bybit: 100 / 125 - 1,
		kraken: 0.25,
	});
	assert.deepEqual(outliersOf({ bybit: 100, kraken: 100.9 }, 0.01), {});
});

test("of three exchanges the one that differs from the median is an outlier", () => {
	assert.deepEqual(outliersOf({ bybit: 100, binance: 100, kraken: 125 }, 0.2), { kraken: 0.25 });
	assert.deepEqual(outliersOf({ bybit: 100, binance: 101, kraken: 75 }, 0.2), { kraken: -0.25 });
	assert.deepEqual(outliersOf({ bybit: 100, binance: 100, kraken: 100.9 }, 0.01), {});
});

test("an outlier among three is never best, but one of two can be", () => {
	const [low, high] = [
		{ last: 100, bid: 99, ask: 101 },
		{ last: 110, bid: 109, ask: 111 },
	];
	const three = compared({ bybit: low, binance: low, kraken: high });
	assert.deepEqual(
		[three.bid.exchange, three.ask.exchange, three.crossedBp],
		["bybit", "bybit", null],
	);
	const two = compared({ bybit: low, kraken: high });
	assert.deepEqual([two.bid.exchange, two.ask.exchange], ["kraken", "bybit"]);
});

test("a deviation of exactly the ratio is not an outlier", () => {
	assert.deepEqual(outliersOf({ bybit: 100, binance: 100, kraken: 150 }, 0.5), {});
	assert.deepEqual(outliersOf({ bybit: 100, binance: 100, kraken: 150.1 }, 0.5), {
		kraken: 150.1 / 100 - 1,
	});
	assert.deepEqual(outliersOf({ bybit: 100, binance: 100, kraken: 50 }, 0.5), {});
});

test("a large deviation does not make the other exchanges outliers", () => {
	assert.deepEqual(Object.keys(outliersOf({ bybit: 100, binance: 100, kraken: 103 }, 0.01)), [
		"kraken",
	]);
});
