// Tests of the advice and the summary in gateway_view.js.

import assert from "node:assert/strict";
import test from "node:test";

import { share } from "../../src/static/format.js";
import { advice, summary } from "../../src/static/gateway_view.js";

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

const failing = (cause, state = "open") => ({ breaker: { state, cause, retry_at: null } });

/** Return a healthy status, with changes of exchanges and parts. */
function statusOf(more = {}, { status = "healthy", parts = {} } = {}) {
	const exchanges = Object.fromEntries(NAMES.map((name) => [name, exchangeOf(more[name])]));
	const healthy = Object.fromEntries(
		PARTS.map((name) => [name, { status: "healthy", reason: "ok" }]),
	);
	return { exchanges, health: { status, parts: { ...healthy, ...parts } } };
}

/** Return the only advice as {text, anchor}. */
function only(document) {
	const list = advice(document);
	assert.equal(list.length, 1, JSON.stringify(list));
	const [[text, anchor]] = list;
	return { text, anchor };
}

const anchorsOf = (document) => advice(document).map(([, anchor]) => anchor);

test("a healthy gateway needs no advice", () => {
	assert.deepEqual(advice(statusOf()), []);
});

test("an open breaker has advice for its cause", () => {
	for (const [cause, ...parts] of [
		["timeout", "no response in time", "retries automatically"],
		["unavailable", "no connection", "retries automatically"],
		["error", "error responses", "retries automatically"],
		["bad_data", "implausible", "retries automatically"],
		["rate_limited", "limits our request rate", "BINANCE_BUDGET"],
		["banned", "banned this IP address", "wait", "BINANCE_BUDGET"],
		["geo_blocked", "location", "HTTPS_PROXY", "BINANCE_ENABLED=false"],
		["forced", "opened manually"],
	]) {
		const { text, anchor } = only(statusOf({ binance: failing(cause) }));
		assert.equal(anchor, "virtuosocircuitopen");
		for (const part of ["binance", ...parts]) {
			assert.ok(text.includes(part), `${part} in: ${text}`);
		}
	}
});

test("an unknown cause is shown as it is", () => {
	assert.ok(only(statusOf({ kraken: failing("sunspots") })).text.includes("sunspots"));
	assert.ok(only(statusOf({ kraken: failing(null) })).text.includes("unknown"));
});

test("a half-open breaker has advice", () => {
	assert.ok(only(statusOf({ kraken: failing("timeout", "half_open") })).text.includes("kraken"));
});

test("the advice for all exchanges down is first", () => {
	const all = statusOf({
		bybit: failing("timeout"),
		binance: failing("timeout"),
		kraken: failing("timeout"),
	});
	assert.deepEqual(anchorsOf(all), [
		"virtuosoallcircuitsopen",
		...Array(3).fill("virtuosocircuitopen"),
	]);
	assert.ok(advice(all)[0][0].includes("network"));
	const one = statusOf({
		bybit: failing("timeout"),
		binance: failing("timeout"),
		kraken: failing("timeout", "half_open"),
	});
	assert.ok(!anchorsOf(one).includes("virtuosoallcircuitsopen"));
});

test("disabled exchanges are ignored", () => {
	const off = { enabled: false };
	const document = statusOf();
	document.exchanges.kraken = off;
	assert.deepEqual(advice(document), []);
	document.exchanges.bybit = exchangeOf(failing("timeout"));
	document.exchanges.binance = exchangeOf(failing("timeout"));
	assert.equal(anchorsOf(document)[0], "virtuosoallcircuitsopen");
	document.exchanges = { bybit: off, binance: off, kraken: off };
	assert.deepEqual(advice(document), []);
});

test("Redis that does not respond has advice", () => {
	const { text, anchor } = only(
		statusOf({}, { parts: { redis: { status: "degraded", reason: "does not answer" } } }),
	);
	assert.equal(anchor, "virtuosoredisdown");
	assert.ok(text.includes("Redis"));
});

test("Redis that is not configured has no advice", () => {
	assert.deepEqual(
		advice(
			statusOf(
				{},
				{ parts: { redis: { status: "healthy", reason: "not configured: memory only" } } },
			),
		),
		[],
	);
});

test("a missing or failed market list has advice with its error", () => {
	for (const markets of [
		{ count: 0, error: null },
		{ count: 0, error: "geo_blocked" },
		{ count: 900, error: "exchange_timeout" },
	]) {
		const { text, anchor } = only(statusOf({ bybit: { markets } }));
		assert.equal(anchor, "exchange-errors");
		assert.ok(text.includes("market list of bybit"), text);
		if (markets.error) assert.ok(text.includes(markets.error), text);
	}
});

test("an exchange without updates has advice with the cause", () => {
	const { text, anchor } = only(
		statusOf({ kraken: { streams: { watched: 3, stale: 3, cause: "unavailable" } } }),
	);
	assert.equal(anchor, "virtuosostreamstale");
	assert.ok(
		text.includes("kraken") && text.includes("unavailable") && text.includes("REST"),
		text,
	);
});

test("an open breaker is the only advice for an exchange without updates", () => {
	const streams = { watched: 3, stale: 3, cause: "geo_blocked" };
	assert.equal(
		only(statusOf({ kraken: { ...failing("geo_blocked"), streams } })).anchor,
		"virtuosocircuitopen",
	);
});

test("without streaming there is no advice about streams", () => {
	assert.deepEqual(advice(statusOf({ kraken: { streams: undefined } })), []);
});

test("a budget has advice from 80 percent", () => {
	assert.deepEqual(advice(statusOf({ kraken: { budget_used_ratio: 0.7999 } })), []);
	for (const used of [0.8, 0.95, 1]) {
		const { text, anchor } = only(statusOf({ kraken: { budget_used_ratio: used } }));
		assert.equal(anchor, "virtuosobudgetnearlyspent");
		assert.ok(text.includes(share(used)) && text.includes("kraken"), text);
	}
});

test("several problems are listed, exchanges first", () => {
	const markets = { count: 0, error: "geo_blocked" };
	const redis = { status: "degraded", reason: "does not answer" };
	const document = statusOf(
		{ bybit: { ...failing("geo_blocked"), markets }, kraken: { budget_used_ratio: 0.9 } },
		{ parts: { redis } },
	);
	assert.deepEqual(anchorsOf(document), [
		"virtuosocircuitopen",
		"exchange-errors",
		"virtuosobudgetnearlyspent",
		"virtuosoredisdown",
	]);
});

test("the summary of a healthy gateway is Healthy", () => {
	assert.deepEqual(summary(statusOf()), ["healthy", "Healthy"]);
});

test("the summary names exchanges whose breaker is not closed", () => {
	const document = statusOf(
		{ bybit: failing("timeout"), kraken: failing("timeout", "half_open") },
		{ status: "degraded" },
	);
	const [state, text] = summary(document);
	assert.equal(state, "degraded");
	assert.match(text, /^Degraded/);
	assert.match(text, /bybit circuit open/);
	assert.match(text, /kraken circuit half-open/);
	assert.doesNotMatch(text, /binance/);
});

test("the summary names exchanges with a stale stream", () => {
	const document = statusOf(
		{ bybit: { streams: { watched: 8, stale: 8, cause: "silent" } } },
		{ status: "degraded" },
	);
	assert.deepEqual(summary(document), ["degraded", "Degraded: bybit stream stale"]);
});

test("the summary ignores disabled exchanges", () => {
	const document = statusOf();
	document.exchanges.kraken = { enabled: false };
	assert.deepEqual(summary(document), ["healthy", "Healthy"]);
});

test("the summary gives the reason of other parts", () => {
	const redis = { status: "degraded", reason: "does not answer" };
	const [state, text] = summary(statusOf({}, { status: "degraded", parts: { redis } }));
	assert.equal(state, "degraded");
	assert.match(text, /^Degraded.*does not answer/);
});

test("the summary shows an unknown state as it is", () => {
	assert.deepEqual(summary(statusOf({}, { status: "resting" })), ["resting", "resting"]);
});

test("the advice for a breaker that was opened manually promises no retry", () => {
	const { text } = only(statusOf({ kraken: failing("forced") }));
	assert.doesNotMatch(text, /retries/);
});
