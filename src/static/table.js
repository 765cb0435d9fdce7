// A table of symbols by exchange.

import { el, mark, shape, write } from "./dom.js";
import { compact, decimalsOf, duration, isNumber, percent, basisPoints, points, price, time } from "./format.js";
import { compare } from "./quotes.js";

const UNSEEN_EVERY = 8; // drawings: what is scrolled out of sight is shown that much more rarely
const SHORT = 8; // characters of a price: longer ones need a third line on a phone
const FADES = [5_000, 15_000, 60_000]; // milliseconds past which a price looks one step older
const COLUMNS = [
	["symbol", "Symbol"],
	["exchange", "Exchange"],
	["last", "Last"],
	["bid", "Bid"],
	["ask", "Ask"],
	["spread", "Spread, bp"],
	["change", "24 h"],
	["volume", "24 h volume"],
	["age", "Age"],
];
export const SORTS = { own: "As listed", symbol: "Symbol", change: "24 h change", volume: "24 h volume", spread: "Spread", age: "Age" };
const SPARKS = { width: 120, height: 28 };

/** Where a symbol has its own view. */
export const linkOf = (symbol) => `#${symbol.replace("/", "-")}`;

const spreadOf = ({ bid, ask }) => basisPoints(bid, ask);
const volumeOf = ({ quoteVolume, baseVolume, last }) => quoteVolume ?? (isNumber(baseVolume) ? baseVolume * last : null);

/** How old a price is, in words that say whether it can be relied on. */
function ageOf(quote, { now, lifetime, live }) {
	if (!quote.data) return quote.problem?.code.replaceAll("_", " ") ?? "waiting";
	const text = duration(quote.age(now) / 1000);
	if (!live) return `not live, ${text}`;
	if (quote.isStale(now, lifetime)) return `stale, ${text}`;
	if (!quote.silent) return text;
	return `stale feed, ${quote.data.source === "rest" ? "REST " : ""}${text}`;
}

/** The line of one exchange. */
class Line {
	constructor(exchange, decimals) {
		this.decimals = decimals;
		this.cells = {};
		this.row = el("tr", { role: "row", "data-exchange": exchange });
		const heads = { symbol: null, exchange: { role: "rowheader", scope: "row" } };
		for (const [name] of COLUMNS.slice(1)) {
			const attributes = { "data-cell": name, ...(heads[name] ?? { role: "cell" }) };
			this.cells[name] = el(heads[name] ? "th" : "td", attributes);
			this.row.append(this.cells[name]);
		}
		write(this.cells.exchange, exchange);
		this.flag = el("span", { class: "flag" });
		this.figures = {};
		for (const name of ["last", "bid", "ask"]) {
			this.figures[name] = el("span");
			this.cells[name].append(this.figures[name], name === "last" ? this.flag : el("span", { class: "unseen" }));
		}
		this.move = el("i", { "aria-hidden": "true" });
		this.cells.last.prepend(this.move);
	}

	show(quote) {
		const { data } = quote;
		Object.assign(this, { shown: data, digits: this.decimals.most });
		if (!data) return;
		const change = percent(data.percentage);
		for (const [name, place] of Object.entries(this.figures)) {
			const text = price(data[name], this.decimals.of(data[name]));
			write(place, text);
			this.decimals.longest = Math.max(this.decimals.longest, text.length, change.length + 1);
		}
		write(this.move, ["▼", "", "▲"][quote.direction + 1]);
		mark(this.row, "data-move", quote.direction);
		write(this.cells.spread, points(spreadOf(data)));
		write(this.cells.change, change);
		mark(this.cells.change, "data-sign", Math.sign(data.percentage));
		write(this.cells.volume, compact(volumeOf(data)));
	}

	/** Show how old it is: in words and by fading. */
	grow(quote, { now, lifetime, live }) {
		const good = quote.data !== null && live && !quote.isStale(now, lifetime);
		const steps = good ? FADES.filter((limit) => quote.age(now) >= limit).length : FADES.length;
		const isNew = write(this.cells.age, ageOf(quote, { now, lifetime, live }));
		if (isNew && quote.data) mark(this.cells.age, "title", `Received ${time(quote.fetchedAt, "full")}`);
		mark(this.row, "data-fade", steps);
		mark(this.row, "data-stale", good ? null : "");
	}

	/** Mark what comparison with other exchanges has found. */
	weigh(exchange, { bid, ask, outliers }) {
		for (const [name, best] of [["bid", bid], ["ask", ask]]) {
			const isBest = best?.exchange === exchange;
			mark(this.cells[name], "data-best", isBest ? "" : null);
			write(this.cells[name].lastChild, isBest ? ", best" : "");
		}
		const off = outliers.get(exchange);
		write(this.flag, off === undefined ? "" : `${percent(off * 100)} off`);
	}
}

/** Decimals that all prices of a symbol share, so that they stand one under the other. */
class Decimals {
	most = 0;
	longest = 0; // characters in the longest price, or change and one

	of(value) {
		this.most = Math.max(this.most, decimalsOf(value));
		return this.most;
	}
}

/** The lines of one symbol, with what they come to together. */
class Group {
	constructor(symbol, { onRemove }) {
		this.symbol = symbol;
		this.decimals = new Decimals();
		this.lines = new Map();
		this.body = el("tbody", { role: "rowgroup" });
		const [base, rest = ""] = [symbol.split("/")[0], symbol.slice(symbol.indexOf("/"))];
		this.summary = el("span", { class: "summary" });
		this.spark = shape("polyline", { points: "" });
		const canvas = shape("svg", { viewBox: `0 0 ${SPARKS.width} ${SPARKS.height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
		canvas.append(this.spark);
		this.head = el("th", { role: "rowheader", scope: "rowgroup", "data-cell": "symbol" });
		this.head.append(el("a", { href: linkOf(symbol) }, el("b", {}, base), symbol.includes("/") ? rest : ""), canvas, this.summary);
		if (onRemove) {
			const label = `Remove ${symbol} from the watch list`;
			const remove = el("button", { type: "button", class: "remove", "aria-label": label }, "×");
			remove.addEventListener("click", () => onRemove(symbol));
			this.head.append(remove);
		}
		this.empty = el("td", { role: "cell", colspan: COLUMNS.length - 1, class: "none" }, "waiting for prices");
		this.emptyRow = el("tr", { role: "row" }, this.empty);
		this.#arrange();
	}

	/** Put the rows into the table, and the symbol in front of the first. */
	#arrange() {
		const rows = this.lines.size ? [...this.lines.values()].map(({ row }) => row) : [this.emptyRow];
		rows[0].prepend(this.head);
		this.head.setAttribute("rowspan", rows.length);
		this.body.replaceChildren(...rows);
	}

	/** Add the lines of new exchanges, and remove those of exchanges without quotes: they were switched off. */
	#update(quotes, order) {
		const exchanges = order.filter((exchange) => quotes.has(exchange));
		if (exchanges.length === this.lines.size && exchanges.every((exchange) => this.lines.has(exchange))) return;
		this.lines = new Map(exchanges.map((exchange) => [exchange, this.lines.get(exchange) ?? new Line(exchange, this.decimals)]));
		this.#arrange();
	}

	/** Show it as it is now; what did not change costs next to nothing. */
	show(all, context) {
		const quotes = all.of(this.symbol);
		this.found = compare(context.live ? quotes : [], context);
		this.#update(quotes, context.order);
		if (!this.lines.size && context.order.every((exchange) => !all.isListed(this.symbol, exchange))) {
			write(this.empty, "no exchange lists it");
		}
		for (const [exchange, line] of this.lines) {
			const quote = quotes.get(exchange);
			if (quote.data !== line.shown || this.decimals.most !== line.digits) line.show(quote);
			line.grow(quote, context);
			line.weigh(exchange, this.found);
		}
		mark(this.body, "data-long", this.decimals.longest > SHORT ? "" : null);
		const { apart, crossed } = this.found;
		const told = apart === null ? "" : `exchanges ${points(apart)} bp apart`;
		write(this.summary, crossed === null ? told : `${told}, crossed by ${points(crossed)} bp`);
	}

	/** Draw the last day: closing prices of its hours. */
	draw(closes) {
		if (closes.length < 2) return;
		const [low, high] = [Math.min(...closes), Math.max(...closes)];
		const [width, height, span] = [SPARKS.width, SPARKS.height - 4, high - low || 1];
		const at = (close, index) => `${((index / (closes.length - 1)) * width).toFixed(1)},${(2 + height - ((close - low) / span) * height).toFixed(1)}`;
		mark(this.spark, "points", closes.map(at).join(" "));
		mark(this.spark, "data-sign", Math.sign(closes.at(-1) - closes[0]));
	}

	/** What the table is sorted by: of the exchanges the first that has it. */
	value(name, quotes, now) {
		const found = [...quotes.values()].filter((quote) => quote.data);
		if (name === "age") return found.length ? Math.max(...found.map((quote) => quote.age(now))) : Infinity;
		const read = { change: (data) => data.percentage, volume: volumeOf, spread: spreadOf }[name];
		const values = found.map((quote) => read(quote.data)).filter(isNumber);
		return values.length ? (name === "spread" ? Math.min(...values) : values[0]) : -Infinity;
	}
}

/** A table of symbols by exchange. */
export class Table {
	groups = new Map();

	constructor(place, label, { onRemove = null, onSort = null } = {}) {
		this.onRemove = onRemove;
		const heads = COLUMNS.map(([name, text]) => {
			const attributes = { role: "columnheader", scope: "col", "data-cell": name };
			if (!onSort || !(name in SORTS)) return el("th", attributes, text);
			return el("th", attributes, el("button", { type: "button", on: { click: () => onSort(name) } }, text));
		});
		this.heads = new Map(COLUMNS.map(([name], at) => [name, heads[at]]));
		this.table = el("table", { role: "table", "aria-label": label, class: "prices" });
		this.table.append(el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...heads)));
		place.replaceChildren(this.table);
	}

	list(symbols) {
		const known = this.groups;
		this.groups = new Map(symbols.map((symbol) => [symbol, known.get(symbol) ?? new Group(symbol, this)]));
		const bodies = [...this.groups.values()].map((group) => group.body);
		const shown = [...this.table.tBodies];
		if (bodies.length === shown.length && bodies.every((body, at) => body === shown[at])) return;
		const focused = document.activeElement;
		for (const body of shown) if (!bodies.includes(body)) body.remove();
		this.table.append(...bodies);
		if (this.table.contains(focused)) focused.focus({ preventScroll: true }); // moving takes the focus away
	}

	show(quotes, context) {
		for (const group of this.groups.values()) {
			if (group.isSeen !== false || context.tick % UNSEEN_EVERY === 0) group.show(quotes, context);
		}
	}

	showOrder({ name, descending }) {
		for (const [column, head] of this.heads) {
			mark(head, "aria-sort", column === name ? (descending ? "descending" : "ascending") : null);
		}
	}
}
