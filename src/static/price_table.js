// A table of prices by symbol and exchange.

import { addressOf } from "./address.js";
import { button, el, setAttr, setText, svg } from "./dom.js";
import {
	basisPoints,
	compact,
	decimalsOf,
	duration,
	formatBasisPoints,
	isNumber,
	percent,
	price,
	time,
} from "./format.js";
import { compare } from "./quotes.js";

const HIDDEN_EVERY = 8; // drawings, for symbols out of view
const SHORT_PRICE = 8; // characters, for phones
const FADE_AGES_MS = [5_000, 15_000, 60_000];
const COLUMNS = {
	symbol: "Symbol",
	exchange: "Exchange",
	last: "Last",
	bid: "Bid",
	ask: "Ask",
	spread: "Spread, bp",
	change: "24 h",
	volume: "24 h volume",
	age: "Age",
};
export const SORTS = {
	listed: "As listed",
	symbol: "Symbol",
	change: "24 h change",
	volume: "24 h volume",
	spread: "Spread",
	age: "Age",
};
const CURVE = { width: 120, height: 28, margin: 2 };

const spreadOf = ({ bid, ask }) => basisPoints(bid, ask);

function volumeOf({ quoteVolume, baseVolume, last }) {
	return quoteVolume ?? (isNumber(baseVolume) ? baseVolume * last : null);
}

/** Return an age with its reliability, or why there is no price. */
function ageText(quote, { now, lifetime, isLive }) {
	if (!quote.data) return quote.problem?.code.replaceAll("_", " ") ?? "waiting";
	const age = duration(quote.age(now) / 1000);
	if (!isLive) return `not live, ${age}`;
	if (quote.isStale(now, lifetime)) return `stale, ${age}`;
	if (!quote.isSilent) return age;
	return `stale feed, ${quote.data.source === "rest" ? "REST " : ""}${age}`;
}

class ExchangeRow {
	constructor(exchange, decimals) {
		this.decimals = decimals;
		this.cells = {};
		this.prices = {};
		this.row = el("tr", { role: "row", "data-exchange": exchange });
		for (const name of Object.keys(COLUMNS).slice(1)) {
			const isHead = name === "exchange";
			const attributes = isHead ? { role: "rowheader", scope: "row" } : { role: "cell" };
			this.cells[name] = el(isHead ? "th" : "td", { "data-cell": name, ...attributes });
			this.row.append(this.cells[name]);
		}
		setText(this.cells.exchange, exchange);
		this.flag = el("span.flag");
		for (const name of ["last", "bid", "ask"]) {
			const note = name === "last" ? this.flag : el("span.sr-only");
			this.prices[name] = el("span");
			this.cells[name].append(this.prices[name], note);
		}
		this.arrow = el("i", { "aria-hidden": "true" });
		this.cells.last.prepend(this.arrow);
	}

	get isOutdated() {
		return this.digits !== this.decimals.max;
	}

	showPrices({ data, direction }) {
		this.shown = data;
		this.digits = this.decimals.max;
		if (!data) return;
		const change = percent(data.percentage);
		this.decimals.addLength(change.length + 1);
		for (const [name, element] of Object.entries(this.prices)) {
			const text = price(data[name], this.decimals.add(data[name]));
			setText(element, text);
			this.decimals.addLength(text.length);
		}
		setText(this.arrow, ["▼", "", "▲"][direction + 1]);
		setAttr(this.row, "data-move", direction);
		setText(this.cells.spread, formatBasisPoints(spreadOf(data)));
		setText(this.cells.change, change);
		setAttr(this.cells.change, "data-sign", Math.sign(data.percentage));
		setText(this.cells.volume, compact(volumeOf(data)));
	}

	showAge(quote, { now, lifetime, isLive }) {
		const isValid = quote.data !== null && isLive && !quote.isStale(now, lifetime);
		const passed = FADE_AGES_MS.filter((limit) => !isValid || quote.age(now) >= limit);
		const isNew = setText(this.cells.age, ageText(quote, { now, lifetime, isLive }));
		if (isNew && quote.data) {
			setAttr(this.cells.age, "title", `Received ${time(quote.fetchedAt, "full")}`);
		}
		setAttr(this.row, "data-fade", passed.length);
		setAttr(this.row, "data-stale", isValid ? null : "");
	}

	showComparison(exchange, { bid, ask, outliers }) {
		for (const [name, best] of Object.entries({ bid, ask })) {
			const isBest = best?.exchange === exchange;
			setAttr(this.cells[name], "data-best", isBest ? "" : null);
			setText(this.cells[name].lastChild, isBest ? ", best" : "");
		}
		const deviation = outliers.get(exchange);
		setText(this.flag, deviation === undefined ? "" : `${percent(deviation * 100)} off`);
	}
}

class Decimals {
	max = 0;
	longest = 0;

	add(value) {
		this.max = Math.max(this.max, decimalsOf(value));
		return this.max;
	}

	addLength(length) {
		this.longest = Math.max(this.longest, length);
	}
}

class SymbolGroup {
	constructor(symbol, { onRemove }) {
		this.symbol = symbol;
		this.decimals = new Decimals();
		this.rows = new Map();
		this.body = el("tbody", { role: "rowgroup" });
		this.summary = el("span.summary");
		this.curve = svg("polyline", { points: "" });
		this.head = this.#createHead(onRemove);
		const attributes = {
			role: "cell",
			colspan: Object.keys(COLUMNS).length - 1,
			class: "none",
		};
		this.empty = el("td", attributes, "waiting for prices");
		this.emptyRow = el("tr", { role: "row" }, this.empty);
		this.#arrange();
	}

	#createHead(onRemove) {
		const { symbol } = this;
		const base = symbol.split("/")[0];
		const rest = symbol.slice(base.length);
		const viewBox = `0 0 ${CURVE.width} ${CURVE.height}`;
		const canvas = { viewBox, preserveAspectRatio: "none", "aria-hidden": "true" };
		const head = el(
			"th",
			{ role: "rowheader", scope: "rowgroup", "data-cell": "symbol" },
			el("a", { href: addressOf(symbol) }, el("b", {}, base), rest),
			svg("svg", canvas, this.curve),
			this.summary,
		);
		if (onRemove) {
			const label = `Remove ${symbol} from the watch list`;
			const attributes = { class: "remove", "aria-label": label };
			head.append(button("×", () => onRemove(symbol), attributes));
		}
		return head;
	}

	#arrange() {
		const rows = this.rows.size
			? [...this.rows.values()].map(({ row }) => row)
			: [this.emptyRow];
		rows[0].prepend(this.head);
		this.head.setAttribute("rowspan", rows.length);
		this.body.replaceChildren(...rows);
	}

	/** Add new exchanges, and remove those without quotes. */
	#updateRows(quotes, order) {
		const names = order.filter((name) => quotes.has(name));
		if (names.length === this.rows.size && names.every((name) => this.rows.has(name))) return;
		const rowOf = (name) => this.rows.get(name) ?? new ExchangeRow(name, this.decimals);
		this.rows = new Map(names.map((name) => [name, rowOf(name)]));
		this.#arrange();
	}

	show(allQuotes, context) {
		const quotes = allQuotes.of(this.symbol);
		const comparison = compare(context.isLive ? quotes : [], context);
		const isListed = (name) => allQuotes.isListed(this.symbol, name);
		this.#updateRows(quotes, context.order);
		if (!this.rows.size && !context.order.some(isListed)) {
			setText(this.empty, "not listed");
		}
		for (const [exchange, row] of this.rows) {
			const quote = quotes.get(exchange);
			if (quote.data !== row.shown || row.isOutdated) row.showPrices(quote);
			row.showAge(quote, context);
			row.showComparison(exchange, comparison);
		}
		setAttr(this.body, "data-long", this.decimals.longest > SHORT_PRICE ? "" : null);
		this.#showSummary(comparison);
	}

	#showSummary({ rangeBp, crossedBp }) {
		const texts = [];
		if (rangeBp !== null) texts.push(`exchanges ${formatBasisPoints(rangeBp)} bp apart`);
		if (crossedBp !== null) texts.push(`crossed by ${formatBasisPoints(crossedBp)} bp`);
		setText(this.summary, texts.join(", "));
	}

	drawCurve(closes) {
		if (closes.length < 2) return;
		const low = Math.min(...closes);
		const span = Math.max(...closes) - low || 1;
		const step = CURVE.width / (closes.length - 1);
		const bottom = CURVE.height - CURVE.margin;
		const scale = (bottom - CURVE.margin) / span;
		const point = (close, index) =>
			`${(index * step).toFixed(1)},${(bottom - (close - low) * scale).toFixed(1)}`;
		setAttr(this.curve, "points", closes.map(point).join(" "));
		setAttr(this.curve, "data-sign", Math.sign(closes.at(-1) - closes[0]));
	}

	/** Return what to sort by: oldest age, lowest spread, or the first exchange's value. */
	sortValue(name, quotes, now) {
		const known = [...quotes.values()].filter((quote) => quote.data);
		if (name === "age") {
			return known.length ? Math.max(...known.map((quote) => quote.age(now))) : Infinity;
		}
		const readers = { change: (data) => data.percentage, volume: volumeOf, spread: spreadOf };
		const values = known.map((quote) => readers[name](quote.data)).filter(isNumber);
		if (!values.length) return -Infinity;
		return name === "spread" ? Math.min(...values) : values[0];
	}
}

export class PriceTable {
	groups = new Map();

	constructor(parent, label, { onRemove = null, onSort = null } = {}) {
		this.onRemove = onRemove;
		this.heads = new Map();
		for (const [name, text] of Object.entries(COLUMNS)) {
			const isButton = onSort && name in SORTS;
			const content = isButton ? button(text, () => onSort(name)) : text;
			const attributes = { role: "columnheader", scope: "col", "data-cell": name };
			this.heads.set(name, el("th", attributes, content));
		}
		const headRow = el("tr", { role: "row" }, ...this.heads.values());
		const head = el("thead", { role: "rowgroup" }, headRow);
		this.table = el("table", { role: "table", "aria-label": label, class: "prices" }, head);
		parent.replaceChildren(this.table);
	}

	setSymbols(symbols) {
		const groupOf = (symbol) => this.groups.get(symbol) ?? new SymbolGroup(symbol, this);
		this.groups = new Map(symbols.map((symbol) => [symbol, groupOf(symbol)]));
		const bodies = [...this.groups.values()].map((group) => group.body);
		const shown = [...this.table.tBodies];
		const isSame = (body, index) => body === shown[index];
		if (bodies.length === shown.length && bodies.every(isSame)) return;
		const focused = document.activeElement;
		for (const body of shown) {
			if (!bodies.includes(body)) body.remove();
		}
		this.table.append(...bodies);
		// A moved element loses the focus.
		if (this.table.contains(focused)) focused.focus({ preventScroll: true });
	}

	show(quotes, context) {
		for (const group of this.groups.values()) {
			const isVisible = group.isVisible !== false;
			if (isVisible || context.tick % HIDDEN_EVERY === 0) group.show(quotes, context);
		}
	}

	showOrder({ name, isDescending }) {
		const direction = isDescending ? "descending" : "ascending";
		for (const [column, head] of this.heads) {
			setAttr(head, "aria-sort", column === name ? direction : null);
		}
	}
}
