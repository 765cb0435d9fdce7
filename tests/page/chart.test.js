// Tests of the calculations in chart.js. test_page.py tests the drawings.

import assert from "node:assert/strict";
import test from "node:test";

import { indexAt, ticks, withPrice, withTotals } from "../../src/static/chart.js";

const MINUTE = 60_000;
const BEGUN = Date.UTC(2026, 10, 21, 21, 26);
const CANDLES = [
	[BEGUN - MINUTE, 10, 12, 9, 11, 5],
	[BEGUN, 11, 13, 10, 12, 7],
];

/** Ranges of all sizes as [low, high, number of ticks]. */
const SIZES = Array.from({ length: 16 }, (_, at) => 10 ** (at - 9));
const SPANS = [0, 1, 9.7, 1033.389].flatMap((low) =>
	[0.011, 0.5, 1, 1.7, 3, 7.77].map((width) => [low, low + width]),
);
const RANGES = SIZES.flatMap((size) =>
	SPANS.flatMap(([low, high]) => [2, 3.4, 5, 8].map((count) => [low * size, high * size, count])),
);

/** Return the distance to the nearest integer. */
const distance = (value) => Math.abs(value - Math.round(value));

test("ticks are round numbers at equal distances", () => {
	for (const [low, high, count] of RANGES) {
		const found = ticks(low, high, count);
		if (found.length < 2) continue;
		const step = found[1] - found[0];
		const digits = step / 10 ** Math.floor(Math.log10(step) + 1e-4);
		const description = `${found} of ${low} to ${high}`;
		assert.ok(
			[1, 2, 2.5, 5].some((round) => Math.abs(digits - round) < 1e-3),
			description,
		);
		for (const [at, tick] of found.entries()) {
			assert.ok(distance(tick / step) < 1e-3, description);
			if (at) assert.ok(Math.abs((tick - found[at - 1]) / step - 1) < 1e-3, description);
		}
	}
});

test("ticks are within the range", () => {
	for (const [low, high, count] of RANGES) {
		const slack = (high - low) * 1e-6;
		for (const tick of ticks(low, high, count)) {
			assert.ok(tick >= low - slack && tick <= high + slack, `${tick} of ${low} to ${high}`);
		}
	}
});

test("the number of ticks is close to the requested count", () => {
	for (const [low, high, count] of RANGES) {
		const { length } = ticks(low, high, count);
		assert.ok(
			length >= Math.floor(count / 2) && length <= count + 1,
			`${length} for ${count}, ${low} to ${high}`,
		);
	}
});

test("common ranges have the expected ticks", () => {
	assert.deepEqual(ticks(0, 10, 5), [0, 2, 4, 6, 8, 10]);
	assert.deepEqual(
		ticks(103_320, 103_370, 5),
		[103_320, 103_330, 103_340, 103_350, 103_360, 103_370],
	);
	assert.deepEqual(ticks(1, 2, 4), [1, 1.25, 1.5, 1.75, 2]);
	assert.deepEqual(ticks(-1, 1, 2), [-1, 0, 1]);
});

test("an empty range has one tick", () => {
	assert.deepEqual(ticks(5, 5, 4), [5]);
	assert.deepEqual(ticks(5, 4, 4), [5]);
});

test("a count below one still gives one or two ticks", () => {
	for (const count of [0, -3, 0.2]) assert.deepEqual(ticks(100, 200, count), [100, 200]);
});

test("candles share the width equally", () => {
	const found = [0, 0.24, 0.25, 0.49, 0.5, 0.75, 0.999].map((share) => indexAt(share, 4));
	assert.deepEqual(found, [0, 0, 1, 1, 2, 3, 3]);
});

test("there is no candle outside of the width", () => {
	for (const share of [-1, -0.001, 1, 1.5, NaN]) {
		assert.equal(indexAt(share, 4), null, `at ${share}`);
	}
	assert.equal(indexAt(0, 0), null);
});

test("a price in the running candle updates close, high and low", () => {
	const newest = (last) => withPrice(CANDLES, last, BEGUN + 30_000, MINUTE).at(-1);
	assert.deepEqual(newest(11.5), [BEGUN, 11, 13, 10, 11.5, 7]);
	assert.deepEqual(newest(14), [BEGUN, 11, 14, 10, 14, 7]);
	assert.deepEqual(newest(8), [BEGUN, 11, 13, 8, 8, 7]);
});

test("a candle lasts from its first to its last millisecond", () => {
	for (const now of [BEGUN, BEGUN + MINUTE - 1]) {
		const after = withPrice(CANDLES, 14, now, MINUTE);
		assert.deepEqual(
			after.map(([begun]) => begun),
			[BEGUN - MINUTE, BEGUN],
		);
		assert.equal(after.at(-1)[4], 14);
	}
});

test("a price after the running candle starts a new candle and drops the oldest", () => {
	assert.deepEqual(withPrice(CANDLES, 14, BEGUN + MINUTE, MINUTE), [
		CANDLES[1],
		[BEGUN + MINUTE, 14, 14, 14, 14, 0],
	]);
	const late = withPrice(CANDLES, 14, BEGUN + 3.5 * MINUTE, MINUTE);
	assert.deepEqual(late.at(-1), [BEGUN + 3 * MINUTE, 14, 14, 14, 14, 0]);
	assert.equal(late.length, 2);
});

test("a price before the running candle changes nothing", () => {
	assert.equal(withPrice(CANDLES, 14, BEGUN - 1, MINUTE), CANDLES);
});

test("a price does not start the first candle", () => {
	assert.deepEqual(withPrice([], 14, BEGUN, MINUTE), []);
});

test("the original candles are not modified", () => {
	const before = structuredClone(CANDLES);
	withPrice(CANDLES, 14, BEGUN, MINUTE);
	withPrice(CANDLES, 14, BEGUN + MINUTE, MINUTE);
	assert.deepEqual(CANDLES, before);
});

test("a level's total includes all better levels", () => {
	assert.deepEqual(
		withTotals([
			[100, 1],
			[99, 0.5],
			[98, 2],
		]),
		[
			[100, 1, 1],
			[99, 0.5, 1.5],
			[98, 2, 3.5],
		],
	);
	assert.deepEqual(withTotals([]), []);
});
