// Numbers, ages and times as people read them.

const SIGNIFICANT = 8; // digits of a price worth showing: what is behind them is an artefact of floating point
const MOST_DECIMALS = 18; // more no price has; more no formatter takes for sure
export const MISSING = "–";

const kept = new Map(); // making a formatter costs far more than using it

function numbers(options) {
	const name = JSON.stringify(options);
	if (!kept.has(name)) kept.set(name, new Intl.NumberFormat(undefined, options));
	return kept.get(name);
}

function fixed(value, decimals) {
	return numbers({ minimumFractionDigits: decimals, maximumFractionDigits: decimals }).format(value);
}

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** How many decimals a price carries, written out: 103338.9 has 1, 1.7e-05 has 6. */
export function decimalsOf(value) {
	if (!isNumber(value) || value === 0) return 0;
	const [digits, exponent = "0"] = String(Math.abs(value)).split("e");
	const carried = (digits.split(".")[1] ?? "").length - Number(exponent);
	const useful = SIGNIFICANT - 1 - Math.floor(Math.log10(Math.abs(value)));
	return Math.min(Math.max(Math.min(carried, useful), 0), MOST_DECIMALS);
}

/** A price with so many decimals, by default those it carries; never in powers of ten. */
export function price(value, decimals = decimalsOf(value)) {
	return isNumber(value) ? fixed(value, decimals) : MISSING;
}

/** An amount or a volume in four digits: 20.01, 0.07384, 2.050M. */
export function compact(value) {
	if (!isNumber(value) || value === 0) return isNumber(value) ? "0" : MISSING;
	const options = { minimumSignificantDigits: 4, maximumSignificantDigits: 4 };
	return numbers(Math.abs(value) < 10_000 ? options : { ...options, notation: "compact" }).format(value);
}

/** A change in percent, with its sign. */
export function percent(value) {
	if (!isNumber(value)) return MISSING;
	return `${numbers({ minimumFractionDigits: 2, maximumFractionDigits: 2, signDisplay: "exceptZero" }).format(value)} %`;
}

/** A share between 0 and 1 in percent. */
export function share(value) {
	return isNumber(value) ? `${numbers({ maximumFractionDigits: 1 }).format(value * 100)} %` : MISSING;
}

/** The distance between two prices in basis points of their middle: a hundredth of a percent each. */
export function basisPoints(low, high) {
	return isNumber(low) && isNumber(high) && low + high > 0 ? ((high - low) / ((high + low) / 2)) * 10_000 : null;
}

/** Basis points as text; small ones with more decimals. */
export function points(value) {
	return isNumber(value) ? fixed(value, Math.abs(value) < 1 ? 2 : 1) : MISSING;
}

/** A rate or a count. */
export function rate(value) {
	return isNumber(value) ? numbers({ maximumFractionDigits: value < 1 ? 3 : value < 10 ? 1 : 0 }).format(value) : MISSING;
}

/** How long something is or was, in the largest whole unit: now, 4 s, 3 min, 2 h, 5 d. */
export function duration(seconds) {
	if (!isNumber(seconds)) return MISSING;
	const whole = Math.max(0, Math.floor(seconds));
	if (whole < 1) return "now";
	if (whole < 60) return `${whole} s`;
	if (whole < 3_600) return `${Math.floor(whole / 60)} min`;
	if (whole < 86_400) return `${Math.floor(whole / 3_600)} h`;
	return `${Math.floor(whole / 86_400)} d`;
}

/** How long until something, which is never past: 0 s is the end of it. */
export function countdown(seconds) {
	const whole = Math.max(0, Math.ceil(seconds));
	return whole < 120 ? `${whole} s` : duration(whole);
}

const LAST_MOMENT = 8.64e15; // milliseconds: beyond it there are no dates
const CLOCK = { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" };
const TIMES = {
	clock: CLOCK,
	minute: { hour: "2-digit", minute: "2-digit", hourCycle: "h23" },
	day: { day: "numeric", month: "short" },
	full: { year: "numeric", month: "short", day: "numeric", ...CLOCK, timeZoneName: "short" },
};

/** A moment in UTC milliseconds, in the viewer's zone; as `clock`, `minute`, `day` or `full`. */
export function time(milliseconds, shape = "clock") {
	if (!isNumber(milliseconds) || Math.abs(milliseconds) > LAST_MOMENT) return MISSING;
	const name = `time ${shape}`;
	if (!kept.has(name)) kept.set(name, new Intl.DateTimeFormat(undefined, TIMES[shape]));
	return kept.get(name).format(milliseconds);
}
