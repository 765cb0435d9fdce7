// Charts on a canvas: candles with volume, and the depth of an order book.

import { decimalsOf, price, time } from "./format.js";

const [TICKS_APART, RIGHT, BOTTOM, LEAST] = [56, 74, 20, 5]; // pixels: between prices on the axis, room for the axes, a candle
const BESIDE = 12; // pixels beside a price on the axis
const VOLUME_SHARE = 0.18; // of the height
const STEPS = [1, 2, 2.5, 5, 10];
const ROUNDING = 1e-9; // of a step: what arithmetic may be off

/** Round numbers from `low` to `high`, about `count` of them. */
export function ticks(low, high, count) {
	const rough = (high - low) / Math.max(1, count);
	if (!(rough > 0)) return [low];
	const power = 10 ** Math.floor(Math.log10(rough));
	const step = STEPS.find((factor) => factor * power >= rough) * power;
	const [first, last] = [Math.ceil(low / step - ROUNDING), Math.floor(high / step + ROUNDING)];
	return Array.from({ length: Math.max(0, last - first + 1) }, (_, at) => Number(((first + at) * step).toPrecision(12)));
}

/** Which of `count` candles lies under a place, as a share of the width; null outside. */
export function indexAt(share, count) {
	const index = Math.floor(share * count);
	return index >= 0 && index < count ? index : null;
}

/** The running candle with a new price in it, or the one that begins with that; times are milliseconds. */
export function grown(candles, last, now, length) {
	const newest = candles.at(-1);
	if (!newest || now < newest[0]) return candles;
	if (now < newest[0] + length) {
		const [begun, open, high, low, , volume] = newest;
		return [...candles.slice(0, -1), [begun, open, Math.max(high, last), Math.min(low, last), last, volume]];
	}
	return [...candles.slice(1), [Math.floor(now / length) * length, last, last, last, last, 0]];
}

/** The levels of one side with what all better ones come to, as [price, amount, total]. */
export function totals(levels) {
	let total = 0;
	return levels.map(([at, amount]) => [at, amount, (total += amount)]);
}

const COLOURS = ["text", "muted", "line", "up", "down", "accent", "panel"];

/** The colours of the style sheet, as they are now: light or dark. */
function theme() {
	const style = getComputedStyle(document.documentElement);
	return Object.fromEntries(COLOURS.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

const margins = new WeakMap(); // canvas -> pixels of the axis of prices: long prices need more than RIGHT
const marginOf = (canvas) => margins.get(canvas) ?? RIGHT;

/** Begin a drawing as large as the canvas is on the screen. */
function begin(canvas) {
	const { clientWidth: width, clientHeight: height } = canvas;
	const ratio = Math.min(devicePixelRatio, 2); // more cannot be seen, and costs memory
	if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
		canvas.width = Math.round(width * ratio);
		canvas.height = Math.round(height * ratio);
	}
	const pen = canvas.getContext("2d");
	pen.setTransform(ratio, 0, 0, ratio, 0, 0);
	pen.clearRect(0, 0, width, height);
	pen.font = "11px system-ui, sans-serif";
	pen.textBaseline = "middle";
	return { pen, right: width, height: height - BOTTOM, colours: theme() };
}

function drawAxes({ pen, width, height, colours }, { marks, digits, y, candles, x, shape }) {
	pen.fillStyle = colours.muted;
	pen.strokeStyle = colours.line;
	pen.lineWidth = 1;
	for (const tick of marks) {
		pen.beginPath();
		pen.moveTo(0, Math.round(y(tick)) + 0.5);
		pen.lineTo(width, Math.round(y(tick)) + 0.5);
		pen.stroke();
		pen.fillText(price(tick, digits), width + 6, y(tick));
	}
	const every = Math.max(1, Math.ceil(candles.length / Math.max(1, Math.floor(width / 90))));
	pen.textAlign = "center";
	for (let at = Math.floor(every / 2); at < candles.length; at += every) {
		pen.fillText(time(candles[at][0], shape), x(at), height + BOTTOM / 2 + 2);
	}
	pen.textAlign = "left";
}

function drawCursor(sheet, { at, x, y, close, decimals }) {
	const { pen, width, height, colours } = sheet;
	pen.strokeStyle = colours.muted;
	pen.setLineDash([3, 3]);
	pen.beginPath();
	pen.moveTo(Math.round(x(at)) + 0.5, 0);
	pen.lineTo(Math.round(x(at)) + 0.5, height);
	pen.moveTo(0, Math.round(y(close)) + 0.5);
	pen.lineTo(width, Math.round(y(close)) + 0.5);
	pen.stroke();
	pen.setLineDash([]);
	drawLabel(sheet, y(close), price(close, decimals), colours.text);
}

function drawLabel({ pen, width, right, colours }, at, text, colour) {
	pen.fillStyle = colour;
	pen.fillRect(width, at - 9, right - width, 18);
	pen.fillStyle = colours.panel;
	pen.fillText(text, width + 6, at);
}

/** Draw candles as [time, open, high, low, close, volume]; rising ones are hollow, so that colour is not alone. */
export function drawCandles(canvas, candles, { decimals, cursor = null, shape = "minute" }) {
	const sheet = begin(canvas);
	const { pen, height, colours } = sheet;
	if (!candles.length) return;
	const [low, high] = [Math.min(...candles.map((one) => one[3])), Math.max(...candles.map((one) => one[2]))];
	const marks = ticks(low, high, height / TICKS_APART);
	const digits = Math.max(decimals, ...marks.map(decimalsOf));
	margins.set(canvas, Math.max(RIGHT, BESIDE + Math.ceil(pen.measureText(price(high, digits)).width)));
	const width = sheet.right - marginOf(canvas);
	sheet.width = width;
	const most = Math.max(...candles.map((one) => one[5])) || 1;
	const [top, room, step] = [10, height * (1 - VOLUME_SHARE) - 20, width / candles.length];
	const y = (value) => top + room - ((value - low) / (high - low || 1)) * room;
	const x = (at) => (at + 0.5) * step;
	drawAxes(sheet, { marks, digits, y, candles, x, shape });
	const body = Math.max(1, Math.min(step * 0.7, 12));
	for (const [at, [, open, upper, lower, close, volume]] of candles.entries()) {
		const colour = close >= open ? colours.up : colours.down;
		pen.strokeStyle = pen.fillStyle = colour;
		const [upmost, lowest] = [y(Math.max(open, close)), y(Math.min(open, close))];
		pen.beginPath();
		pen.moveTo(x(at), y(upper));
		pen.lineTo(x(at), upmost);
		pen.moveTo(x(at), lowest);
		pen.lineTo(x(at), y(lower));
		pen.stroke();
		if (close >= open && body > 3) pen.strokeRect(x(at) - body / 2, upmost, body, Math.max(1, lowest - upmost));
		else pen.fillRect(x(at) - body / 2, upmost, body, Math.max(1, lowest - upmost));
		pen.globalAlpha = 0.35;
		pen.fillRect(x(at) - body / 2, height - (volume / most) * height * VOLUME_SHARE, body, (volume / most) * height * VOLUME_SHARE);
		pen.globalAlpha = 1;
	}
	drawLabel(sheet, y(candles.at(-1)[4]), price(candles.at(-1)[4], decimals), colours.accent);
	if (cursor !== null) drawCursor(sheet, { at: cursor, x, y, close: candles[cursor][4], decimals });
}

/** How many candles there is room for. */
export function roomFor(canvas) {
	return Math.max(10, Math.floor((canvas.clientWidth - marginOf(canvas)) / LEAST));
}

export function candleAt(canvas, clientX, count) {
	const { left, width } = canvas.getBoundingClientRect();
	return indexAt((clientX - left) / (width - marginOf(canvas)), count);
}

/** Draw what the sides of a book come to, outwards from the middle. */
export function drawDepth(canvas, bids, asks) {
	const { pen, colours } = begin(canvas);
	const { clientWidth: width, clientHeight: height } = canvas;
	const [buys, sells] = [totals(bids), totals(asks)];
	if (!buys.length || !sells.length) return;
	const [low, high] = [buys.at(-1)[0], sells.at(-1)[0]];
	const most = Math.max(buys.at(-1)[2], sells.at(-1)[2]);
	const x = (at) => ((at - low) / (high - low || 1)) * width;
	const y = (total) => height - (total / most) * (height - 8);
	for (const [side, colour] of [[buys, colours.up], [sells, colours.down]]) {
		pen.beginPath();
		pen.moveTo(x(side[0][0]), height);
		let before = 0;
		for (const [at, , total] of side) {
			pen.lineTo(x(at), y(before));
			pen.lineTo(x(at), y(total));
			before = total;
		}
		pen.lineTo(x(side.at(-1)[0]), height);
		pen.strokeStyle = pen.fillStyle = colour;
		pen.globalAlpha = 0.2;
		pen.fill();
		pen.globalAlpha = 1;
		pen.stroke();
	}
}
