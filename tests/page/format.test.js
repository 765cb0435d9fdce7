// The tests of src/static/format.js. The viewer's locale and zone are played here: a formatter that is made without any
// gets these, whatever the environment of the process says.

import assert from "node:assert/strict";
import test from "node:test";

import {
	MISSING,
	basisPoints,
	compact,
	countdown,
	decimalsOf,
	duration,
	isNumber,
	percent,
	points,
	price,
	rate,
	share,
	time,
} from "../../src/static/format.js";

const viewer = { locale: "en-US", zone: "Asia/Kolkata" };
const { DateTimeFormat, NumberFormat } = Intl;

Intl.NumberFormat = class extends NumberFormat {
	constructor(locales, options) {
		super(locales ?? viewer.locale, options);
	}
};
Intl.DateTimeFormat = class extends DateTimeFormat {
	constructor(locales, options) {
		super(locales ?? viewer.locale, { timeZone: viewer.zone, ...options });
	}
};

const NO_NUMBERS = [null, undefined, NaN, Infinity, -Infinity, "1.5", "", true, {}, [1]];
const SECONDS = { minute: 60, hour: 3_600, day: 86_400 };
const MOMENT = Date.UTC(2026, 10, 21, 21, 26, 16, 535); // 02:56:16 of the next day in Kolkata

/** Compare what a function makes of each value with what is promised. */
function same(work, expected) {
	for (const [value, promised] of expected) assert.equal(work(value), promised, `of ${value}`);
}

/** The module as a viewer of this locale and zone has it, with formatters of its own. */
async function seenFrom(locale, zone) {
	const before = { ...viewer };
	Object.assign(viewer, { locale, zone });
	const seen = await import(`../../src/static/format.js?seen-from=${locale}`);
	const shown = { price: seen.price(103338.9), percent: seen.percent(-1.5), clock: seen.time(MOMENT), zone: seen.time(MOMENT, "full") };
	Object.assign(viewer, before);
	return shown;
}

test("only finite numbers are numbers", () => {
	for (const value of NO_NUMBERS) assert.equal(isNumber(value), false, `of ${String(value)}`);
	for (const value of [0, -0, 1.5, -3, 1e300, Number.MIN_VALUE]) assert.equal(isNumber(value), true, `of ${value}`);
});

test("decimals are those a price carries, written out", () => {
	same(decimalsOf, [
		[103338.9, 1],
		[103338, 0],
		[100, 0],
		[0.25, 2],
		[-0.25, 2],
		[1.7e-5, 6],
		[1e-7, 7],
		[2.5e-9, 10],
		[0, 0],
		[-0, 0],
	]);
});

test("decimals behind eight digits are artefacts, and not counted", () => {
	same(decimalsOf, [
		[0.1 + 0.2, 8],
		[103338.900000001, 2],
		[1.1 * 1.1, 7],
		[123456789.123, 0],
		[0.0012345678912, 10],
	]);
});

test("there are at most eighteen decimals, and none of what is large", () => {
	same(decimalsOf, [[1.5e-13, 14], [Number.MIN_VALUE, 18], [1e21, 0], [1.7e300, 0]]);
});

test("what is no number has no decimals", () => {
	for (const value of NO_NUMBERS) assert.equal(decimalsOf(value), 0, `of ${String(value)}`);
});

test("a price has the decimals it carries", () => {
	same(price, [
		[103338.9, "103,338.9"],
		[103338, "103,338"],
		[0.000017, "0.000017"],
		[1e-7, "0.0000001"],
		[0, "0"],
		[0.1 + 0.2, "0.30000000"],
	]);
});

test("prices of one symbol can share their decimals", () => {
	assert.deepEqual([3510.3, 3510, 3509.25].map((value) => price(value, 2)), ["3,510.30", "3,510.00", "3,509.25"]);
	assert.equal(price(3510.36, 1), "3,510.4");
	assert.equal(price(3510.36, 0), "3,510");
});

test("no price is written in powers of ten", () => {
	for (let exponent = -11; exponent <= 25; exponent++) {
		const text = price(1.7 * 10 ** exponent);
		assert.match(text, /^[\d.,]+$/);
		assert.match(text, /[17]/);
	}
	assert.equal(price(1e21), "1,000,000,000,000,000,000,000");
});

test("an amount has four digits", () => {
	same(compact, [
		[20.01380506, "20.01"],
		[0.07384123, "0.07384"],
		[5, "5.000"],
		[9999.4, "9,999"],
		[10_000, "10.00K"],
		[12_346, "12.35K"],
		[2054734.8346119, "2.055M"],
		[1_234_567_890, "1.235B"],
		[-2_500_000, "-2.500M"],
	]);
});

test("a change has its sign, and none where it comes to nothing", () => {
	same(percent, [
		[1.3234, "+1.32 %"],
		[-0.5, "-0.50 %"],
		[1234.5, "+1,234.50 %"],
		[0, "0.00 %"],
		[0.001, "0.00 %"],
		[-0.001, "0.00 %"],
	]);
});

test("a share is told in percent", () => {
	same(share, [[0, "0 %"], [1, "100 %"], [0.8123, "81.2 %"], [0.005, "0.5 %"], [0.9996, "100 %"]]);
});

test("basis points are of the middle of two prices", () => {
	assert.equal(basisPoints(99.5, 100.5), 100);
	assert.equal(basisPoints(100.5, 99.5), -100);
	assert.equal(basisPoints(3, 3), 0);
});

test("no basis points between what are no prices", () => {
	for (const value of NO_NUMBERS) {
		assert.equal(basisPoints(value, 1), null, `of ${String(value)}`);
		assert.equal(basisPoints(1, value), null, `of ${String(value)}`);
	}
	assert.equal(basisPoints(0, 0), null);
});

test("basis points below one have a decimal more", () => {
	same(points, [[0.5, "0.50"], [-0.25, "-0.25"], [0, "0.00"], [1, "1.0"], [99.5025, "99.5"], [-12.34, "-12.3"]]);
});

test("a rate has a decimal below ten, and three below one", () => {
	same(rate, [[0, "0"], [0.2617, "0.262"], [0.99, "0.99"], [9.4, "9.4"], [9.96, "10"], [10, "10"], [10.4, "10"], [12.4, "12"], [1234, "1,234"]]);
});

test("a duration is in its largest whole unit", () => {
	const { minute, hour, day } = SECONDS;
	same(duration, [
		[-5, "now"],
		[0, "now"],
		[0.99, "now"],
		[1, "1 s"],
		[minute - 0.01, "59 s"],
		[minute, "1 min"],
		[2 * minute - 0.01, "1 min"],
		[hour - 0.01, "59 min"],
		[hour, "1 h"],
		[day - 0.01, "23 h"],
		[day, "1 d"],
		[10 * day, "10 d"],
	]);
});

test("a countdown is rounded up and never past its end", () => {
	same(countdown, [
		[-5, "0 s"],
		[0, "0 s"],
		[0.01, "1 s"],
		[59.2, "60 s"],
		[119, "119 s"],
		[119.01, "2 min"],
		[179, "2 min"],
		[180, "3 min"],
		[2 * SECONDS.hour, "2 h"],
	]);
	assert.equal(countdown(NaN), MISSING);
});

test("a time is in the viewer's zone, of 24 hours", () => {
	assert.equal(time(MOMENT), "02:56:16");
	assert.equal(time(MOMENT, "clock"), "02:56:16");
	assert.equal(time(MOMENT, "minute"), "02:56");
	assert.equal(time(MOMENT, "day"), "Nov 22");
	const full = time(MOMENT, "full");
	for (const part of ["Nov 22", "2026", "02:56:16", "GMT+5:30"]) assert.ok(full.includes(part), `${part} in ${full}`);
});

test("midnight is 00:00, not 24:00", () => {
	const midnight = Date.UTC(2026, 10, 21, 18, 30);
	assert.equal(time(midnight), "00:00:00");
	assert.equal(time(midnight, "minute"), "00:00");
	assert.equal(time(0), "05:30:00");
});

test("numbers and times are as the viewer's locale has them", async () => {
	const shown = await seenFrom("de-DE", "America/New_York");
	assert.equal(shown.price, "103.338,9");
	assert.equal(shown.percent, "-1,50 %");
	assert.equal(shown.clock, "16:26:16");
	assert.match(shown.zone, /21\. Nov/);
});

test("what is missing is shown as a dash", () => {
	assert.equal(MISSING, "–");
	for (const work of [price, compact, percent, share, points, rate, duration, time]) {
		for (const value of NO_NUMBERS) assert.equal(work(value), MISSING, `${work.name} of ${String(value)}`);
	}
	assert.equal(price(null, 2), MISSING);
	assert.equal(time(null, "day"), MISSING);
});
