// The tests of what src/static/gateway.js concludes: what an operator has to do, and the words of the page's head.

import assert from "node:assert/strict";
import test from "node:test";

import { share } from "../../src/static/format.js";
import { advice, summary } from "../../src/static/gateway.js";

const NAMES = ["bybit", "binance", "kraken"];
const PARTS = ["exchanges", "markets", "redis", "cache", "streams"];

const exchangeOf = (more) => ({
	enabled: true,
	breaker: { state: "closed", cause: null, retry_at: null },
	budget_used_ratio: 0.1,
	markets: { count: 900, error: null },
	streams: { watched: 8, stale: 0, cause: null },
	...more,
});

const broken = (cause, state = "open") => ({ breaker: { state, cause, retry_at: null } });

/** What the gateway says of itself: all is well, but for `more` by exchange and the parts that are not `healthy`. */
function told(more = {}, { status = "healthy", parts = {} } = {}) {
	const exchanges = Object.fromEntries(NAMES.map((name) => [name, exchangeOf(more[name])]));
	const healthy = Object.fromEntries(PARTS.map((name) => [name, { status: "healthy", reason: "ok" }]));
	return { exchanges, health: { status, parts: { ...healthy, ...parts } } };
}

/** The only advice, as {words, anchor}. */
function only(document) {
	const list = advice(document);
	assert.equal(list.length, 1, JSON.stringify(list));
	const [[words, anchor]] = list;
	return { words, anchor };
}

const anchorsOf = (document) => advice(document).map(([, anchor]) => anchor);

test("where all is well there is nothing to do", () => {
	assert.deepEqual(advice(told()), []);
});

test("an open breaker is told with its cause, and with what can be set or done", () => {
	for (const [cause, ...parts] of [
		["timeout", "did not answer in time", "tried again by itself"],
		["unavailable", "cannot be reached", "tried again by itself"],
		["error", "answers with errors", "tried again by itself"],
		["bad_data", "implausible", "tried again by itself"],
		["rate_limited", "slow down", "BINANCE_BUDGET"],
		["banned", "banned this address", "wait", "BINANCE_BUDGET"],
		["geo_blocked", "location", "HTTPS_PROXY", "BINANCE_ENABLED=false"],
		["forced", "opened by hand"],
	]) {
		const { words, anchor } = only(told({ binance: broken(cause) }));
		assert.equal(anchor, "virtuosocircuitopen");
		for (const part of ["binance", ...parts]) assert.ok(words.includes(part), `${part} in: ${words}`);
	}
});

test("a cause that is not known is told as it is", () => {
	assert.ok(only(told({ kraken: broken("sunspots") })).words.includes("sunspots"));
	assert.ok(only(told({ kraken: broken(null) })).words.includes("unknown"));
});

test("a breaker that lets one call try is told as well", () => {
	assert.ok(only(told({ kraken: broken("timeout", "half_open") })).words.includes("kraken"));
});

test("where no exchange is asked this is told first", () => {
	const all = told({ bybit: broken("timeout"), binance: broken("timeout"), kraken: broken("timeout") });
	assert.deepEqual(anchorsOf(all), ["virtuosoallcircuitsopen", ...Array(3).fill("virtuosocircuitopen")]);
	assert.ok(advice(all)[0][0].includes("network"));
	const one = told({ bybit: broken("timeout"), binance: broken("timeout"), kraken: broken("timeout", "half_open") });
	assert.ok(!anchorsOf(one).includes("virtuosoallcircuitsopen"));
});

test("an exchange that is not enabled is no reason to do anything", () => {
	const off = { enabled: false };
	const document = told();
	document.exchanges.kraken = off;
	assert.deepEqual(advice(document), []);
	document.exchanges.bybit = exchangeOf(broken("timeout"));
	document.exchanges.binance = exchangeOf(broken("timeout"));
	assert.equal(anchorsOf(document)[0], "virtuosoallcircuitsopen");
	document.exchanges = { bybit: off, binance: off, kraken: off };
	assert.deepEqual(advice(document), []);
});

test("Redis that does not answer is told", () => {
	const { words, anchor } = only(told({}, { parts: { redis: { status: "degraded", reason: "does not answer" } } }));
	assert.equal(anchor, "virtuosoredisdown");
	assert.ok(words.includes("Redis"));
});

test("Redis that is not configured is no fault", () => {
	assert.deepEqual(advice(told({}, { parts: { redis: { status: "healthy", reason: "not configured: memory only" } } })), []);
});

test("a market list that is missing or cannot be renewed is told with its error", () => {
	for (const markets of [{ count: 0, error: null }, { count: 0, error: "geo_blocked" }, { count: 900, error: "exchange_timeout" }]) {
		const { words, anchor } = only(told({ bybit: { markets } }));
		assert.equal(anchor, "exchange-errors");
		assert.ok(words.includes("market list of bybit"), words);
		if (markets.error) assert.ok(words.includes(markets.error), words);
	}
});

test("an exchange that pushes nothing is told with the cause", () => {
	const { words, anchor } = only(told({ kraken: { streams: { watched: 3, stale: 3, cause: "unavailable" } } }));
	assert.equal(anchor, "virtuosostreamstale");
	assert.ok(words.includes("kraken") && words.includes("unavailable") && words.includes("REST"), words);
});

test("an exchange that pushes nothing because its breaker is open is told once", () => {
	const streams = { watched: 3, stale: 3, cause: "geo_blocked" };
	assert.equal(only(told({ kraken: { ...broken("geo_blocked"), streams } })).anchor, "virtuosocircuitopen");
});

test("without streaming nothing is said of streams", () => {
	assert.deepEqual(advice(told({ kraken: { streams: undefined } })), []);
});

test("a budget is told of from four fifths on", () => {
	assert.deepEqual(advice(told({ kraken: { budget_used_ratio: 0.7999 } })), []);
	for (const used of [0.8, 0.95, 1]) {
		const { words, anchor } = only(told({ kraken: { budget_used_ratio: used } }));
		assert.equal(anchor, "virtuosobudgetnearlyspent");
		assert.ok(words.includes(share(used)) && words.includes("kraken"), words);
	}
});

test("several faults are all told, those of exchanges first", () => {
	const markets = { count: 0, error: "geo_blocked" };
	const redis = { status: "degraded", reason: "does not answer" };
	const document = told({ bybit: { ...broken("geo_blocked"), markets }, kraken: { budget_used_ratio: 0.9 } }, { parts: { redis } });
	assert.deepEqual(anchorsOf(document), ["virtuosocircuitopen", "exchange-errors", "virtuosobudgetnearlyspent", "virtuosoredisdown"]);
});

test("the head says that all is well", () => {
	assert.deepEqual(summary(told()), ["healthy", "All well"]);
});

test("the head names the exchanges whose breaker is not closed", () => {
	const document = told({ bybit: broken("timeout"), kraken: broken("timeout", "half_open") }, { status: "degraded" });
	const [state, words] = summary(document);
	assert.equal(state, "degraded");
	assert.match(words, /^Degraded/);
	assert.match(words, /bybit circuit open/);
	assert.match(words, /kraken circuit half-open/);
	assert.doesNotMatch(words, /binance/);
});

test("the head names an exchange with a stale stream", () => {
	const document = told({ bybit: { streams: { watched: 8, stale: 8, cause: "silent" } } }, { status: "degraded" });
	assert.deepEqual(summary(document), ["degraded", "Degraded: bybit stream stale"]);
});

test("the head does not name an exchange that is not enabled", () => {
	const document = told();
	document.exchanges.kraken = { enabled: false };
	assert.deepEqual(summary(document), ["healthy", "All well"]);
});

test("the head says why the gateway is not well where no breaker does", () => {
	const redis = { status: "degraded", reason: "does not answer" };
	const [state, words] = summary(told({}, { status: "degraded", parts: { redis } }));
	assert.equal(state, "degraded");
	assert.match(words, /^Degraded.*does not answer/);
});

test("the head shows a state it does not know as it is", () => {
	assert.deepEqual(summary(told({}, { status: "resting" })), ["resting", "resting"]);
});

test("a breaker that was opened by hand is not said to be tried again by itself", () => {
	const { words } = only(told({ kraken: broken("forced") }));
	assert.doesNotMatch(words, /by itself/);
});
