// The market view: the watch list as a table, with search and sort.

import { addressOf, toSymbol } from "./address.js";
import { button, byId, el, setAttr, setText } from "./dom.js";
import { percent } from "./format.js";
import { PriceTable, SORTS } from "./price_table.js";
import { pathOf } from "./transports.js";

const MAX_SUGGESTIONS = 8;
const SORT_EVERY = 20; // drawings; rows must not move all the time
const CURVE_LIFETIME_MS = 900_000;
const CURVE_RETRY_SECONDS = 60; // after an error without retry_after
const CURVE_PAUSE_MS = 5_000; // after an error

export class MarketView {
	#page;
	#table;
	#order = { name: "listed", isDescending: false };
	#search = byId("search");
	#suggestions = byId("suggestions");
	#sort = byId("sort");
	#reverse = byId("reverse");
	#reset = byId("reset");
	#markets = null;
	#observer;
	#curves = new Map(); // by symbol: {closes, expiresAt}
	#isLoadingCurve = false;
	#curvesPausedUntil = 0;

	constructor(page) {
		this.#page = page;
		this.#table = new PriceTable(byId("table"), "Prices by symbol and exchange", {
			onRemove: (symbol) => this.#remove(symbol),
			onSort: (name) => this.#sortBy(name),
		});
		for (const [name, text] of Object.entries(SORTS)) {
			this.#sort.append(el("option", { value: name }, text));
		}
		const reverse = () => {
			this.#setOrder({ ...this.#order, isDescending: !this.#order.isDescending });
		};
		this.#sort.addEventListener("change", () => this.#sortBy(this.#sort.value));
		this.#reverse.addEventListener("click", reverse);
		this.#search.addEventListener("input", () => this.#filter());
		this.#search.addEventListener("focus", () => this.#loadMarkets());
		byId("search-form").addEventListener("submit", (event) => this.#submit(event));
		this.#reset.addEventListener("click", () => page.watchDefault());
		const observe = (entries) => {
			for (const { target, isIntersecting } of entries) {
				target.group.isVisible = isIntersecting;
			}
		};
		this.#observer = new IntersectionObserver(observe, { rootMargin: "200px" });
	}

	list() {
		const { settings, watched, watchList } = this.#page;
		const wanted = this.#query;
		const symbols = watched.filter((symbol) => symbol.toUpperCase().includes(wanted));
		this.#table.setSymbols(this.#sorted(symbols));
		for (const group of this.#table.groups.values()) {
			if (group.isVisible === undefined) this.#observe(group);
		}
		this.#reset.hidden = watchList === null;
		byId("empty").hidden = watched.length > 0;
		byId("table").hidden = !watched.length;
		const limit = percent(settings.outlier_ratio * 100).replace("+", "");
		const legend = `Underlined: best bid and ask. “off”: differs by more than ${limit}.`;
		const isUnmatched = watched.length && !symbols.length;
		setText(byId("legend"), isUnmatched ? `No watched symbol matches. ${legend}` : legend);
	}

	show(context) {
		if (this.#order.name !== "listed" && context.tick % SORT_EVERY === 0) this.list();
		this.#table.show(this.#page.quotes, context);
		this.#loadCurve();
	}

	get #query() {
		return toSymbol(this.#search.value.trim());
	}

	#observe(group) {
		group.isVisible = true;
		group.body.group = group;
		group.drawCurve(this.#curves.get(group.symbol)?.closes ?? []);
		this.#observer.observe(group.body);
	}

	/** Remove a symbol. Focus the next remove button, because the row's focus is lost. */
	#remove(symbol) {
		const index = [...this.#table.groups.keys()].indexOf(symbol);
		this.#page.unwatch(symbol);
		const groups = [...this.#table.groups.values()];
		const next = groups[index] ?? groups.at(-1);
		(next?.body.querySelector(".remove") ?? this.#reset).focus();
	}

	/** Load the next missing curve in view. Each costs the gateway a request. */
	async #loadCurve() {
		const now = Date.now();
		if (this.#isLoadingCurve || now < this.#curvesPausedUntil) return;
		const isDue = (group) =>
			group.isVisible && !(now < this.#curves.get(group.symbol)?.expiresAt);
		const symbol = [...this.#table.groups.values()].find(isDue)?.symbol;
		if (!symbol) return;
		this.#isLoadingCurve = true;
		const curve = { closes: [], expiresAt: now + CURVE_LIFETIME_MS };
		this.#curves.set(symbol, curve);
		try {
			const path = `/ohlcv/${pathOf(symbol)}?timeframe=1h&limit=24`;
			const { candles } = await this.#page.request(path);
			curve.closes = [candles[0][1], ...candles.map((candle) => candle[4])];
			this.#table.groups.get(symbol)?.drawCurve(curve.closes);
		} catch (problem) {
			const seconds = problem.retry_after ?? CURVE_RETRY_SECONDS;
			curve.expiresAt = Date.now() + seconds * 1000;
			this.#curvesPausedUntil = Date.now() + CURVE_PAUSE_MS;
		}
		this.#isLoadingCurve = false;
	}

	/** Sort by a column, then reverse the order, then restore the listed order. */
	#sortBy(name) {
		const isDescendingFirst = ["change", "volume"].includes(name);
		const { isDescending } = this.#order;
		if (this.#order.name !== name) this.#setOrder({ name, isDescending: isDescendingFirst });
		else if (isDescending === isDescendingFirst) {
			this.#setOrder({ name, isDescending: !isDescending });
		} else this.#setOrder({ name: "listed", isDescending: false });
	}

	#setOrder(order) {
		this.#order = order;
		const isListed = order.name === "listed";
		const direction = order.isDescending ? "Descending" : "Ascending";
		const lower = direction.toLowerCase();
		this.#sort.value = order.name;
		this.#reverse.hidden = isListed;
		setText(this.#reverse, direction);
		setAttr(this.#reverse, "aria-label", `${direction}, reverse the order`);
		setAttr(this.#reverse, "data-order", lower);
		this.#table.showOrder(order);
		this.list();
		const text = isListed ? "Sorted as listed" : `Sorted by ${SORTS[order.name]}, ${lower}`;
		this.#page.announce(text);
	}

	#sorted(symbols) {
		const { name, isDescending } = this.#order;
		if (name === "listed") return symbols;
		const sign = isDescending ? -1 : 1;
		if (name === "symbol") {
			return [...symbols].sort((left, right) => sign * left.localeCompare(right));
		}
		const now = this.#page.now();
		const value = (symbol) =>
			this.#table.groups.get(symbol)?.sortValue(name, this.#page.quotes.of(symbol), now) ?? 0;
		const values = new Map(symbols.map((symbol) => [symbol, value(symbol)]));
		return [...symbols].sort((left, right) => sign * (values.get(left) - values.get(right)));
	}

	/** Load all markets once. The next focus repeats a failed request. */
	async #loadMarkets() {
		if (this.#markets) return;
		const response = await this.#page.request("/markets").catch(() => null);
		if (!response) return;
		this.#markets = response.markets.map(({ symbol, exchanges }) => ({ symbol, exchanges }));
		this.#filter();
	}

	#filter() {
		this.list();
		const wanted = this.#query;
		const { watched } = this.#page;
		const isNew = ({ symbol }) => symbol.startsWith(wanted) && !watched.includes(symbol);
		const markets = wanted ? (this.#markets ?? []) : [];
		const found = markets.filter(isNew).slice(0, MAX_SUGGESTIONS);
		this.#suggestions.hidden = !found.length;
		this.#suggestions.replaceChildren(
			...found.map((market) => el("li", {}, this.#suggestion(market))),
		);
		if (!wanted) return;
		this.#page.announce(`${this.#table.groups.size} listed, ${found.length} can be added`);
	}

	#suggestion({ symbol, exchanges }) {
		const add = () => {
			this.#search.value = "";
			this.#page.watch(symbol);
			this.#filter();
			this.#search.focus();
		};
		const element = button(`Add ${symbol} `, add);
		element.append(el("small", {}, exchanges.join(", ")));
		return element;
	}

	/** Open the first listed symbol, or add the first suggestion. */
	#submit(event) {
		event.preventDefault();
		const [symbol] = this.#table.groups.keys();
		if (symbol && this.#query) location.hash = addressOf(symbol);
		else this.#suggestions.querySelector("button")?.click();
	}
}
