// Charts on a canvas: candles with volume, and the depth of an order book.

import { decimalsOf, price, time } from "./format.js";

// Pixels.
const TICK_DISTANCE = 56;
const TIME_DISTANCE = 90;
const TIME_AXIS_HEIGHT = 20;
const MIN_PRICE_AXIS_WIDTH = 74;
const PRICE_PADDING = 6;
const MIN_CANDLE_WIDTH = 5;
const MARGIN = 10;

const VOLUME_SHARE = 0.18; // of the height
const TICK_STEPS = [1, 2, 2.5, 5, 10];
const ROUNDING = 1e-9; // of a step: floating point error
const MAX_PIXEL_RATIO = 2; // more is not visible

/** Return about `count` round numbers between `low` and `high`. */
export function ticks(low, high, count) {
	const rough = (high - low) / Math.max(1, count);
	if (!(rough > 0)) return [low];
	const power = 10 ** Math.floor(Math.log10(rough));
	const step = TICK_STEPS.find((factor) => factor * power >= rough) * power;
	const first = Math.ceil(low / step - ROUNDING);
	const last = Math.floor(high / step + ROUNDING);
	const tick = (_, index) => Number(((first + index) * step).toPrecision(12));
	return Array.from({ length: Math.max(0, last - first + 1) }, tick);
}

/** Return the candle at a share of the width, or null. */
export function indexAt(share, count) {
	const index = Math.floor(share * count);
	return index >= 0 && index < count ? index : null;
}

/** Add a price to the last candle, or start the next one. Times are in milliseconds. */
export function withPrice(candles, last, now, length) {
	const newest = candles.at(-1);
	if (!newest || now < newest[0]) return candles;
	if (now < newest[0] + length) {
		const [start, open, high, low, , volume] = newest;
		const candle = [start, open, Math.max(high, last), Math.min(low, last), last, volume];
		return [...candles.slice(0, -1), candle];
	}
	return [...candles.slice(1), [Math.floor(now / length) * length, last, last, last, last, 0]];
}

/** Return [price, amount, total of this and better levels] per level. */
export function withTotals(levels) {
	let total = 0;
	return levels.map(([value, amount]) => {
		total += amount;
		return [value, amount, total];
	});
}

const COLOURS = ["text", "muted", "line", "up", "down", "accent", "panel"];

function readColours() {
	const style = getComputedStyle(document.documentElement);
	const colour = (name) => style.getPropertyValue(`--${name}`).trim();
	return Object.fromEntries(COLOURS.map((name) => [name, colour(name)]));
}

const axisWidths = new WeakMap();
const axisWidthOf = (canvas) => axisWidths.get(canvas) ?? MIN_PRICE_AXIS_WIDTH;

/** Clear a canvas and match its resolution to the screen. */
function prepare(canvas) {
	const { clientWidth: right, clientHeight: bottom } = canvas;
	const ratio = Math.min(devicePixelRatio, MAX_PIXEL_RATIO);
	const width = Math.round(right * ratio);
	const height = Math.round(bottom * ratio);
	if (canvas.width !== width || canvas.height !== height) {
		canvas.width = width;
		canvas.height = height;
	}
	const pen = canvas.getContext("2d");
	pen.setTransform(ratio, 0, 0, ratio, 0, 0);
	pen.clearRect(0, 0, right, bottom);
	pen.font = "11px system-ui, sans-serif";
	pen.textBaseline = "middle";
	return { pen, right, bottom, colours: readColours() };
}

function setColour(pen, colour) {
	pen.strokeStyle = colour;
	pen.fillStyle = colour;
}

function drawLine(pen, fromX, fromY, toX, toY) {
	pen.beginPath();
	pen.moveTo(fromX, fromY);
	pen.lineTo(toX, toY);
	pen.stroke();
}

// Lines are sharp at pixel centres.
const sharp = (value) => Math.round(value) + 0.5;

function layOut(canvas, candles, decimals) {
	const sheet = prepare(canvas);
	const low = Math.min(...candles.map((candle) => candle[3]));
	const high = Math.max(...candles.map((candle) => candle[2]));
	const height = sheet.bottom - TIME_AXIS_HEIGHT;
	const marks = ticks(low, high, height / TICK_DISTANCE);
	const digits = Math.max(decimals, ...marks.map(decimalsOf));
	const textWidth = Math.ceil(sheet.pen.measureText(price(high, digits)).width);
	axisWidths.set(canvas, Math.max(MIN_PRICE_AXIS_WIDTH, textWidth + 2 * PRICE_PADDING));
	const width = sheet.right - axisWidthOf(canvas);
	const room = height * (1 - VOLUME_SHARE) - 2 * MARGIN;
	const step = width / candles.length;
	const scale = room / (high - low || 1);
	const x = (index) => (index + 0.5) * step;
	const y = (value) => MARGIN + room - (value - low) * scale;
	return { ...sheet, width, height, marks, digits, step, x, y };
}

function drawAxes({ pen, colours, width, height, marks, digits, x, y }, candles, timeStyle) {
	pen.fillStyle = colours.muted;
	pen.strokeStyle = colours.line;
	pen.lineWidth = 1;
	for (const tick of marks) {
		drawLine(pen, 0, sharp(y(tick)), width, sharp(y(tick)));
		pen.fillText(price(tick, digits), width + PRICE_PADDING, y(tick));
	}
	const labels = Math.max(1, Math.floor(width / TIME_DISTANCE));
	const every = Math.max(1, Math.ceil(candles.length / labels));
	const middle = height + TIME_AXIS_HEIGHT / 2 + 2;
	pen.textAlign = "center";
	for (let index = Math.floor(every / 2); index < candles.length; index += every) {
		pen.fillText(time(candles[index][0], timeStyle), x(index), middle);
	}
	pen.textAlign = "left";
}

/** Draw a candle. Rising candles are hollow, to differ not only by colour. */
function drawCandle({ pen, colours, height, step, x, y }, index, candle, maxVolume) {
	const [, open, high, low, close, volume] = candle;
	const isRising = close >= open;
	const width = Math.max(1, Math.min(step * 0.7, 12));
	const left = x(index) - width / 2;
	const top = y(Math.max(open, close));
	const bottom = y(Math.min(open, close));
	const body = [left, top, width, Math.max(1, bottom - top)];
	const volumeHeight = (volume / maxVolume) * height * VOLUME_SHARE;
	setColour(pen, isRising ? colours.up : colours.down);
	drawLine(pen, x(index), y(high), x(index), top);
	drawLine(pen, x(index), bottom, x(index), y(low));
	if (isRising && width > 3) pen.strokeRect(...body);
	else pen.fillRect(...body);
	pen.globalAlpha = 0.35;
	pen.fillRect(left, height - volumeHeight, width, volumeHeight);
	pen.globalAlpha = 1;
}

function drawCursor(sheet, index, close, decimals) {
	const { pen, width, height, colours, x, y } = sheet;
	pen.strokeStyle = colours.muted;
	pen.setLineDash([3, 3]);
	drawLine(pen, sharp(x(index)), 0, sharp(x(index)), height);
	drawLine(pen, 0, sharp(y(close)), width, sharp(y(close)));
	pen.setLineDash([]);
	drawLabel(sheet, close, decimals, colours.text);
}

function drawLabel({ pen, width, right, colours, y }, value, decimals, colour) {
	pen.fillStyle = colour;
	pen.fillRect(width, y(value) - 9, right - width, 18);
	pen.fillStyle = colours.panel;
	pen.fillText(price(value, decimals), width + PRICE_PADDING, y(value));
}

/** Draw candles: [time, open, high, low, close, volume]. */
export function drawCandles(canvas, candles, { decimals, cursor = null, timeStyle = "minute" }) {
	if (!candles.length) {
		prepare(canvas);
		return;
	}
	const sheet = layOut(canvas, candles, decimals);
	const maxVolume = Math.max(...candles.map((candle) => candle[5])) || 1;
	drawAxes(sheet, candles, timeStyle);
	for (const [index, candle] of candles.entries()) drawCandle(sheet, index, candle, maxVolume);
	drawLabel(sheet, candles.at(-1)[4], decimals, sheet.colours.accent);
	if (cursor !== null) drawCursor(sheet, cursor, candles[cursor][4], decimals);
}

export function candleCapacity(canvas) {
	const width = canvas.clientWidth - axisWidthOf(canvas);
	return Math.max(10, Math.floor(width / MIN_CANDLE_WIDTH));
}

export function candleAt(canvas, clientX, count) {
	const { left, width } = canvas.getBoundingClientRect();
	return indexAt((clientX - left) / (width - axisWidthOf(canvas)), count);
}

export function drawDepth(canvas, bids, asks) {
	const { pen, right, bottom, colours } = prepare(canvas);
	if (!bids.length || !asks.length) return;
	const sides = [
		[withTotals(bids), colours.up],
		[withTotals(asks), colours.down],
	];
	const [low, high] = sides.map(([levels]) => levels.at(-1)[0]);
	const max = Math.max(...sides.map(([levels]) => levels.at(-1)[2]));
	const x = (value) => ((value - low) / (high - low || 1)) * right;
	const y = (total) => bottom - (total / max) * (bottom - 8);
	for (const [levels, colour] of sides) {
		let before = 0;
		pen.beginPath();
		pen.moveTo(x(levels[0][0]), bottom);
		for (const [value, , total] of levels) {
			pen.lineTo(x(value), y(before));
			pen.lineTo(x(value), y(total));
			before = total;
		}
		pen.lineTo(x(levels.at(-1)[0]), bottom);
		setColour(pen, colour);
		pen.globalAlpha = 0.2;
		pen.fill();
		pen.globalAlpha = 1;
		pen.stroke();
	}
}
