// Tests of format.js. The viewer's locale and time zone are simulated: they are the defaults of all
// formatters, independent of the environment of the process.

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
	formatBasisPoints,
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

const OTHER_VALUES = [null, undefined, NaN, Infinity, -Infinity, "1.5", "", true, {}, [1]];
const SECONDS = { minute: 60, hour: 3_600, day: 86_400 };
const MOMENT = Date.UTC(2026, 10, 21, 21, 26, 16, 535); // 02:56:16 of the next day in Kolkata

/** Compare the results of a function with the expected ones. */
function same(work, expected) {
	for (const [value, result] of expected) assert.equal(work(value), result, `of ${value}`);
}

/** Import the module again for another locale and time zone, and return some results. */
async function formatIn(locale, zone) {
	const before = { ...viewer };
	Object.assign(viewer, { locale, zone });
	const module = await import(`../../src/static/format.js?locale=${locale}`);
	const shown = {
		price: module.price(103338.9),
		percent: module.percent(-1.5),
		clock: module.time(MOMENT),
		zone: module.time(MOMENT, "full"),
	};
	Object.assign(viewer, before);
	return shown;
}

test("only finite numbers are numbers", () => {
	for (const value of OTHER_VALUES) assert.equal(isNumber(value), false, `of ${String(value)}`);
	for (const value of [0, -0, 1.5, -3, 1e300, Number.MIN_VALUE]) {
		assert.equal(isNumber(value), true, `of ${value}`);
	}
});

test("decimals are counted in decimal notation", () => {
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

test("decimals beyond eight digits are ignored", () => {
	same(decimalsOf, [
		[0.1 + 0.2, 8],
		[103338.900000001, 2],
		[1.1 * 1.1, 7],
		[123456789.123, 0],
		[0.0012345678912, 10],
	]);
});

test("there are at most eighteen decimals, and none for large numbers", () => {
	same(decimalsOf, [
		[1.5e-13, 14],
		[Number.MIN_VALUE, 18],
		[1e21, 0],
		[1.7e300, 0],
	]);
});

test("other values have no decimals", () => {
	for (const value of OTHER_VALUES) assert.equal(decimalsOf(value), 0, `of ${String(value)}`);
});

test("a price keeps its decimals", () => {
	same(price, [
		[103338.9, "103,338.9"],
		[103338, "103,338"],
		[0.000017, "0.000017"],
		[1e-7, "0.0000001"],
		[0, "0"],
		[0.1 + 0.2, "0.30000000"],
	]);
});

test("prices of one symbol can share decimals", () => {
	assert.deepEqual(
		[3510.3, 3510, 3509.25].map((value) => price(value, 2)),
		["3,510.30", "3,510.00", "3,509.25"],
	);
	assert.equal(price(3510.36, 1), "3,510.4");
	assert.equal(price(3510.36, 0), "3,510");
});

test("prices are never in scientific notation", () => {
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

test("a change has a sign unless it rounds to zero", () => {
	same(percent, [
		[1.3234, "+1.32 %"],
		[-0.5, "-0.50 %"],
		[1234.5, "+1,234.50 %"],
		[0, "0.00 %"],
		[0.001, "0.00 %"],
		[-0.001, "0.00 %"],
	]);
});

test("a share is in percent", () => {
	same(share, [
		[0, "0 %"],
		[1, "100 %"],
		[0.8123, "81.2 %"],
		[0.005, "0.5 %"],
		[0.9996, "100 %"],
	]);
});

test("basis points relate to the mean of two prices", () => {
	assert.equal(basisPoints(99.5, 100.5), 100);
	assert.equal(basisPoints(100.5, 99.5), -100);
	assert.equal(basisPoints(3, 3), 0);
});

test("basis points need two prices", () => {
	for (const value of OTHER_VALUES) {
		assert.equal(basisPoints(value, 1), null, `of ${String(value)}`);
		assert.equal(basisPoints(1, value), null, `of ${String(value)}`);
	}
	assert.equal(basisPoints(0, 0), null);
});

test("basis points below one have a second decimal", () => {
	same(formatBasisPoints, [
		[0.5, "0.50"],
		[-0.25, "-0.25"],
		[0, "0.00"],
		[1, "1.0"],
		[99.5025, "99.5"],
		[-12.34, "-12.3"],
	]);
});

test("a rate has one decimal below ten and three below one", () => {
	same(rate, [
		[0, "0"],
		[0.2617, "0.262"],
		[0.99, "0.99"],
		[9.4, "9.4"],
		[9.96, "10"],
		[10, "10"],
		[10.4, "10"],
		[12.4, "12"],
		[1234, "1,234"],
	]);
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

test("a countdown is rounded up and never negative", () => {
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

test("a time is in the viewer's time zone with 24 hours", () => {
	assert.equal(time(MOMENT), "02:56:16");
	assert.equal(time(MOMENT, "clock"), "02:56:16");
	assert.equal(time(MOMENT, "minute"), "02:56");
	assert.equal(time(MOMENT, "day"), "Nov 22");
	const full = time(MOMENT, "full");
	for (const part of ["Nov 22", "2026", "02:56:16", "GMT+5:30"]) {
		assert.ok(full.includes(part), `${part} in ${full}`);
	}
});

test("midnight is 00:00", () => {
	const midnight = Date.UTC(2026, 10, 21, 18, 30);
	assert.equal(time(midnight), "00:00:00");
	assert.equal(time(midnight, "minute"), "00:00");
	assert.equal(time(0), "05:30:00");
});

test("numbers and times follow the viewer's locale", async () => {
	const shown = await formatIn("de-DE", "America/New_York");
	assert.equal(shown.price, "103.338,9");
	assert.equal(shown.percent, "-1,50 %");
	assert.equal(shown.clock, "16:26:16");
	assert.match(shown.zone, /21\. Nov/);
});

test("missing values are shown as a dash", () => {
	assert.equal(MISSING, "–");
	for (const work of [price, compact, percent, share, formatBasisPoints, rate, duration, time]) {
		for (const value of OTHER_VALUES) {
			assert.equal(work(value), MISSING, `${work.name} of ${String(value)}`);
		}
	}
	assert.equal(price(null, 2), MISSING);
	assert.equal(time(null, "day"), MISSING);
});
