// Numbers, ages and times as text in the viewer's locale.

const SIGNIFICANT_DIGITS = 8; // more are floating point noise
const MAX_DECIMALS = 18; // not every browser formats more
const MAX_TIMESTAMP_MS = 8.64e15; // limit of JavaScript dates
export const MISSING = "–";

const formatters = new Map(); // expensive to create

function numberFormat(options) {
	const name = JSON.stringify(options);
	if (!formatters.has(name)) formatters.set(name, new Intl.NumberFormat(undefined, options));
	return formatters.get(name);
}

function fixed(value, decimals) {
	const options = { minimumFractionDigits: decimals, maximumFractionDigits: decimals };
	return numberFormat(options).format(value);
}

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** Count the decimals of a price: 1 for 103338.9, 6 for 1.7e-05. */
export function decimalsOf(value) {
	if (!isNumber(value) || value === 0) return 0;
	const [digits, exponent = "0"] = String(Math.abs(value)).split("e");
	const written = (digits.split(".")[1] ?? "").length - Number(exponent);
	const significant = SIGNIFICANT_DIGITS - 1 - Math.floor(Math.log10(Math.abs(value)));
	return Math.min(Math.max(Math.min(written, significant), 0), MAX_DECIMALS);
}

/** Format a price, never in scientific notation. */
export function price(value, decimals = decimalsOf(value)) {
	return isNumber(value) ? fixed(value, decimals) : MISSING;
}

/** Format an amount or a volume with four digits: 20.01, 0.07384, 2.050M. */
export function compact(value) {
	if (!isNumber(value)) return MISSING;
	if (value === 0) return "0";
	const options = { minimumSignificantDigits: 4, maximumSignificantDigits: 4 };
	if (Math.abs(value) >= 10_000) options.notation = "compact";
	return numberFormat(options).format(value);
}

export function percent(value) {
	if (!isNumber(value)) return MISSING;
	const digits = { minimumFractionDigits: 2, maximumFractionDigits: 2 };
	return `${numberFormat({ ...digits, signDisplay: "exceptZero" }).format(value)} %`;
}

export function share(value) {
	if (!isNumber(value)) return MISSING;
	return `${numberFormat({ maximumFractionDigits: 1 }).format(value * 100)} %`;
}

/** Return the difference of two prices in basis points (0.01 %) of their mean. */
export function basisPoints(low, high) {
	if (!isNumber(low) || !isNumber(high) || low + high <= 0) return null;
	return ((high - low) / ((high + low) / 2)) * 10_000;
}

export function formatBasisPoints(value) {
	return isNumber(value) ? fixed(value, Math.abs(value) < 1 ? 2 : 1) : MISSING;
}

export function rate(value) {
	if (!isNumber(value)) return MISSING;
	let decimals = 0;
	if (value < 1) decimals = 3;
	else if (value < 10) decimals = 1;
	return numberFormat({ maximumFractionDigits: decimals }).format(value);
}

/** Format a duration in its largest whole unit: now, 4 s, 3 min, 2 h, 5 d. */
export function duration(seconds) {
	if (!isNumber(seconds)) return MISSING;
	const whole = Math.max(0, Math.floor(seconds));
	if (whole < 1) return "now";
	if (whole < 60) return `${whole} s`;
	if (whole < 3_600) return `${Math.floor(whole / 60)} min`;
	if (whole < 86_400) return `${Math.floor(whole / 3_600)} h`;
	return `${Math.floor(whole / 86_400)} d`;
}

/** Format the time until an event, rounded up and at least 0 s. */
export function countdown(seconds) {
	const whole = Math.max(0, Math.ceil(seconds));
	return whole < 120 ? `${whole} s` : duration(whole);
}

const CLOCK = { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" };
const TIME_STYLES = {
	clock: CLOCK,
	minute: { hour: "2-digit", minute: "2-digit", hourCycle: "h23" },
	day: { day: "numeric", month: "short" },
	full: { year: "numeric", month: "short", day: "numeric", ...CLOCK, timeZoneName: "short" },
};

/** Format UTC milliseconds in the viewer's time zone, in one of TIME_STYLES. */
export function time(milliseconds, style = "clock") {
	if (!isNumber(milliseconds) || Math.abs(milliseconds) > MAX_TIMESTAMP_MS) return MISSING;
	const name = `time ${style}`;
	if (!formatters.has(name)) {
		formatters.set(name, new Intl.DateTimeFormat(undefined, TIME_STYLES[style]));
	}
	return formatters.get(name).format(milliseconds);
}
