// The market view: the table of the watch list, search and sort.

import { el, mark, write } from "./dom.js";
import { pathOf } from "./links.js";
import { percent } from "./format.js";
import { SORTS, Table, linkOf } from "./table.js";

const PAUSE = 5_000; // milliseconds after what could not be had
const MANY = 8; // markets offered by the search
const DRAWN_AGAIN = 900_000; // milliseconds until the last day is asked for again

/** The view. `page` knows of prices and the watch list, and can ask. */
export class Market {
	#page;
	#table;
	#order = { name: "own", descending: false };
	#search = document.querySelector("#search");
	#found = document.querySelector("#found");
	#sort = document.querySelector("#sort");
	#reverse = document.querySelector("#reverse");
	#reset = document.querySelector("#reset");
	#markets = null;
	#sights;
	#asked = new Map(); // symbol -> when its last day was asked for, and its curve once that is here
	#drawing = false;
	#quiet = 0; // until when no curve is asked for

	constructor(page) {
		this.#page = page;
		const hooks = { onRemove: (symbol) => this.#remove(symbol), onSort: (name) => this.#sortBy(name) };
		this.#table = new Table(document.querySelector("#table"), "Prices by symbol and exchange", hooks);
		for (const [name, text] of Object.entries(SORTS)) this.#sort.append(el("option", { value: name }, text));
		this.#sort.addEventListener("change", () => this.#sortBy(this.#sort.value));
		this.#reverse.addEventListener("click", () => this.#setOrder({ ...this.#order, descending: !this.#order.descending }));
		this.#search.addEventListener("input", () => this.#find());
		this.#search.addEventListener("focus", () => this.#load());
		document.querySelector("#finder").addEventListener("submit", (event) => this.#take(event));
		this.#reset.addEventListener("click", () => page.watchDefault());
		this.#sights = new IntersectionObserver((entries) => this.#seen(entries), { rootMargin: "200px" });
	}

	/** Show the symbols of the watch list that the search leaves. */
	list() {
		const wanted = this.#search.value.trim().toUpperCase().replace("-", "/");
		const symbols = this.#page.watched.filter((symbol) => symbol.toUpperCase().includes(wanted));
		this.#table.list(this.#sorted(symbols));
		for (const group of this.#table.groups.values()) {
			if (group.isSeen !== undefined) continue;
			group.isSeen = true; // until it is known better
			group.body.group = group;
			group.draw(this.#asked.get(group.symbol)?.curve ?? []);
			this.#sights.observe(group.body);
		}
		const { settings, watched, isDefault } = this.#page;
		this.#reset.hidden = isDefault;
		document.querySelector("#empty").hidden = watched.length > 0;
		document.querySelector("#table").hidden = !watched.length;
		const percentage = percent(settings.outlier_ratio * 100).replace("+", "");
		const about = symbols.length || !watched.length ? "" : "No watched symbol matches the search. ";
		write(document.querySelector("#legend"), `${about}Underlined: best bid and ask. “off”: differs by more than ${percentage}.`);
	}

	show(context) {
		if (this.#order.name !== "own" && context.tick % 20 === 0) this.list(); // rows that move all the time cannot be read
		this.#table.show(this.#page.quotes, context);
		this.#draw();
	}

	/** Remove a symbol, and focus the next button: the focus would be lost with the row. */
	#remove(symbol) {
		const at = [...this.#table.groups.keys()].indexOf(symbol);
		this.#page.unwatch(symbol);
		const left = [...this.#table.groups.values()];
		((left[at] ?? left.at(-1))?.body.querySelector(".remove") ?? this.#reset).focus();
	}

	#seen(entries) {
		for (const { target, isIntersecting } of entries) target.group.isSeen = isIntersecting;
	}

	/** Draw the last day of symbols in sight, one after the other: each costs the gateway a call. */
	async #draw() {
		if (this.#drawing || Date.now() < this.#quiet) return;
		const isDue = ({ symbol, isSeen }) => isSeen && !(Date.now() < this.#asked.get(symbol)?.until);
		const symbol = [...this.#table.groups.values()].find(isDue)?.symbol;
		if (!symbol) return;
		this.#drawing = true;
		const asked = { until: Date.now() + DRAWN_AGAIN, curve: [] };
		this.#asked.set(symbol, asked);
		try {
			const { candles } = await this.#page.ask(`/ohlcv/${pathOf(symbol)}?timeframe=1h&limit=24`);
			asked.curve = [candles[0][1], ...candles.map((candle) => candle[4])];
			this.#table.groups.get(symbol)?.draw(asked.curve);
		} catch (problem) {
			asked.until = Date.now() + (problem.retry_after ?? 60) * 1000;
			this.#quiet = Date.now() + PAUSE;
		}
		this.#drawing = false;
	}

	#sortBy(name) {
		const first = ["change", "volume"].includes(name);
		const isSame = this.#order.name === name;
		if (isSame && this.#order.descending !== first) this.#setOrder({ name: "own", descending: false });
		else this.#setOrder({ name, descending: first !== isSame });
	}

	#setOrder(order) {
		this.#order = order;
		const { name, descending } = order;
		const direction = descending ? "Descending" : "Ascending";
		this.#sort.value = name;
		this.#reverse.hidden = name === "own";
		write(this.#reverse, direction);
		mark(this.#reverse, "aria-label", `${direction}, reverse the order`);
		mark(this.#reverse, "data-order", direction.toLowerCase());
		this.#table.showOrder(order);
		this.list();
		this.#page.say(name === "own" ? "Sorted as listed" : `Sorted by ${SORTS[name]}, ${direction.toLowerCase()}`);
	}

	#sorted(symbols) {
		const { name, descending } = this.#order;
		if (name === "own") return symbols;
		const sign = descending ? -1 : 1;
		if (name === "symbol") return [...symbols].sort((one, other) => sign * one.localeCompare(other));
		const { quotes } = this.#page;
		const value = (symbol) => this.#table.groups.get(symbol)?.value(name, quotes.of(symbol), this.#page.now()) ?? 0;
		const values = new Map(symbols.map((symbol) => [symbol, value(symbol)]));
		return [...symbols].sort((one, other) => sign * (values.get(one) - values.get(other)));
	}

	async #load() {
		if (this.#markets) return;
		try {
			this.#markets = (await this.#page.ask("/markets")).markets.map(({ symbol, exchanges }) => ({ symbol, exchanges }));
			this.#find();
		} catch {
			this.#markets = null; // the next focus tries again
		}
	}

	#find() {
		this.list();
		const wanted = this.#search.value.trim().toUpperCase().replace("-", "/");
		const offered = wanted && this.#markets ? this.#markets.filter(({ symbol }) => symbol.startsWith(wanted)) : [];
		const fresh = offered.filter(({ symbol }) => !this.#page.watched.includes(symbol)).slice(0, MANY);
		this.#found.hidden = !fresh.length;
		this.#found.replaceChildren(...fresh.map((market) => el("li", {}, this.#offer(market))));
		if (wanted) this.#page.say(`${this.#table.groups.size} listed, ${fresh.length} can be added`);
	}

	#offer({ symbol, exchanges }) {
		const names = el("small", {}, exchanges.join(", "));
		const add = () => {
			this.#search.value = "";
			this.#page.watch(symbol);
			this.#find();
			this.#search.focus();
		};
		return el("button", { type: "button", on: { click: add } }, `Add ${symbol} `, names);
	}

	/** Enter in the search opens what is listed, or adds what is offered. */
	#take(event) {
		event.preventDefault();
		const [first] = this.#table.groups.keys();
		if (first && this.#search.value.trim()) location.hash = linkOf(first);
		else this.#found.querySelector("button")?.click();
	}
}
