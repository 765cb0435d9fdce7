// The view of one symbol: candles, order book, trades, comparison.

import { addressOf } from "./address.js";
import {
	candleAt,
	candleCapacity,
	drawCandles,
	drawDepth,
	withPrice,
	withTotals,
} from "./chart.js";
import { button, el, figuresTable, panel, setAttr, setText } from "./dom.js";
import { compact, decimalsOf, duration, percent, price, time } from "./format.js";
import { PriceTable } from "./price_table.js";
import { pathOf } from "./transports.js";

const TIMEFRAMES = { "1m": 60_000, "5m": 300_000, "30m": 1_800_000, "4h": 14_400_000 }; // ms
const CANDLES = 120;
const CANDLES_LIFETIME_MS = 30_000; // until a new request
const BOOK_LEVELS = 25; // in the depth chart
const LISTED_LEVELS = 10; // in the tables
const TRADES = 30;
const REDRAW_EVERY = 4; // drawings, for a new size or colour scheme
const STEPS = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
const SIDES = { buy: "▲ buy", sell: "▼ sell" };

export class SymbolView {
	decimals = 0;
	book = null;
	trades = [];
	tradesMessage = null;
	isSilent = {}; // by channel

	constructor(page, section, { symbol, exchange, timeframe }) {
		Object.assign(this, { page, symbol, exchange }); // exchange "" means any
		this.#build(section);
		this.setTimeframe(timeframe);
	}

	setTimeframe(timeframe) {
		this.timeframe = Object.hasOwn(TIMEFRAMES, timeframe) ? timeframe : "1m";
		this.candles = [];
		this.cursor = null;
		this.requestedAt = 0;
		setText(this.reading, "");
		for (const element of this.timeframes.children) {
			setAttr(element, "aria-pressed", element.textContent === this.timeframe);
		}
	}

	get subscriptions() {
		const { symbol, exchange } = this;
		const book = { channel: "book", symbol, exchange, levels: BOOK_LEVELS };
		return [book, { channel: "trades", symbol, exchange }];
	}

	#build(section) {
		this.current = el("p.current", {}, el("b"), el("span"));
		this.watchButton = button("", () => this.#toggleWatched());
		const heading = el("h1", {}, this.symbol);
		const back = el("a", { href: "#" }, "← Market");
		const side = el("div.side", {}, this.#bookPanel(), this.#tradesPanel());
		const comparison = el("div");
		section.replaceChildren(
			el("div.bar", {}, back, heading, this.current, this.watchButton),
			el("div.halves", {}, this.#chartPanel(), side),
			panel("wide", ["Exchanges compared"], comparison),
		);
		this.table = new PriceTable(comparison, `${this.symbol} by exchange`);
		this.table.setSymbols([this.symbol]);
	}

	#chartPanel() {
		const choose = { change: ({ target }) => this.#navigate({ exchange: target.value }) };
		this.choice = el("select", { id: "exchange-choice", on: choose });
		const label = el("label", { for: "exchange-choice" }, "Exchange ", this.choice);
		this.timeframes = el("div.timeframes", { role: "group", "aria-label": "Timeframe" });
		for (const timeframe of Object.keys(TIMEFRAMES)) {
			this.timeframes.append(button(timeframe, () => this.#navigate({ timeframe })));
		}
		const hide = () => this.#setCursor(null);
		const follow = ({ clientX }) =>
			this.#setCursor(candleAt(this.canvas, clientX, this.#visibleCandles.length));
		const keydown = (event) => this.#moveCursor(event);
		const pointer = { pointermove: follow, pointerdown: follow, pointerleave: hide };
		const on = { ...pointer, blur: hide, keydown };
		const role = { role: "application", "aria-label": "Candles" };
		this.canvas = el("canvas", { id: "candles", tabindex: "0", ...role, on });
		this.reading = el("p.reading", { id: "reading" });
		this.chartError = el("p.error");
		const bar = el("div.bar", {}, el("h2", {}, "Candles"), this.timeframes, label);
		return el("div.panel.chart", {}, bar, this.reading, this.canvas, this.chartError);
	}

	#bookPanel() {
		const label = "Depth of the order book";
		this.depth = el("canvas", { id: "depth", role: "img", "aria-label": label });
		const asks = figuresTable("Asks, the best last", ["Ask", "Amount", "Total"]);
		const bids = figuresTable("Bids, the best first", ["Bid", "Amount", "Total"]);
		this.sides = { asks: asks.rows, bids: bids.rows };
		this.bookAge = el("small");
		this.gap = el("p.gap");
		const heading = ["Order book ", this.bookAge];
		return panel("book", heading, this.depth, asks.table, this.gap, bids.table);
	}

	#tradesPanel() {
		const columns = ["Time", "Side", "Price", "Amount"];
		const { table, rows } = figuresTable("Newest trades first", columns);
		this.tradeRows = rows;
		this.tradesAge = el("small");
		const role = { role: "region", "aria-label": "Trades" };
		const scroll = el("div.scroll", { tabindex: "0", ...role }, table);
		return panel("trades", ["Trades ", this.tradesAge], scroll);
	}

	#navigate({ exchange = this.exchange, timeframe = this.timeframe }) {
		location.hash = `${addressOf(this.symbol)}/${exchange || "any"}/${timeframe}`;
	}

	get #isWatched() {
		return this.page.watched.includes(this.symbol);
	}

	#toggleWatched() {
		if (this.#isWatched) this.page.unwatch(this.symbol);
		else this.page.watch(this.symbol);
	}

	get #visibleCandles() {
		return this.candles.slice(-candleCapacity(this.canvas));
	}

	#moveCursor(event) {
		if (!(event.key in STEPS) || !this.candles.length) return;
		event.preventDefault();
		const last = this.#visibleCandles.length - 1;
		const index = (this.cursor ?? last + 1) + STEPS[event.key];
		this.#setCursor(Math.min(Math.max(index, 0), last));
		this.page.announce(this.reading.textContent);
	}

	#setCursor(index) {
		if (index === this.cursor) return;
		this.cursor = index;
		this.#drawChart();
	}

	receive(message) {
		const { channel, exchange, data } = message;
		if (this.exchange && exchange !== this.exchange) return; // a late message
		if (message.type === "status") this.isSilent[channel] = message.state === "stale";
		if (channel === "book" && data) this.book = message;
		if (channel !== "trades" || !data) return;
		const isNewSource = this.tradesMessage?.exchange !== exchange;
		this.tradesMessage = message;
		if (isNewSource) this.#loadEarlierTrades(exchange);
		this.#mergeTrades(isNewSource ? [] : this.trades, data.trades);
	}

	async #loadEarlierTrades(exchange) {
		const path = `/trades/${pathOf(this.symbol)}?limit=${TRADES}&exchange=${exchange}`;
		const response = await this.page.request(path).catch(() => null);
		if (!response || this.tradesMessage.exchange !== exchange) return;
		this.#mergeTrades(response.trades, this.trades);
	}

	#mergeTrades(...lists) {
		const idOf = (trade) => trade.id ?? `${trade.timestamp} ${trade.price} ${trade.amount}`;
		const trades = new Map(lists.flat().map((trade) => [idOf(trade), trade]));
		const sorted = [...trades.values()].sort((left, right) => left.timestamp - right.timestamp);
		this.trades = sorted.slice(-TRADES);
	}

	show(context) {
		const quotes = this.page.quotes.of(this.symbol);
		const first = [...quotes.values()].find(({ data }) => data);
		const ofCandles = quotes.get(this.source) ?? first;
		const quote = this.exchange ? quotes.get(this.exchange) : ofCandles;
		this.table.show(this.page.quotes, context);
		this.#showChoice([...quotes.keys()]);
		setText(this.watchButton, `${this.#isWatched ? "Remove from" : "Add to"} the watch list`);
		if (quote?.data) this.#showPrice(quote, context);
		if (context.tick % REDRAW_EVERY === 0) this.#drawChart();
		this.#showBook(context);
		this.#showTrades(context);
		if (context.now - this.requestedAt > CANDLES_LIFETIME_MS) this.#loadCandles(context.now);
	}

	#showPrice(quote, { now, lifetime, isLive }) {
		const { last, bid, percentage, exchange } = quote.data;
		const [value, details] = this.current.children;
		const age = duration(quote.age(now) / 1000);
		const isValid = isLive && !quote.isStale(now, lifetime);
		this.decimals = Math.max(this.decimals, decimalsOf(last), decimalsOf(bid));
		setText(value, price(last, this.decimals));
		setText(details, `${percent(percentage)} in 24 h, ${exchange}, ${age}`);
		setAttr(this.current, "data-sign", Math.sign(percentage));
		setAttr(this.current, "data-stale", isValid ? null : "");
		if (isValid) this.#extendCandles(last, now);
	}

	#showChoice(exchanges) {
		const isChoice = (name) => exchanges.includes(name) || name === this.exchange;
		const names = ["", ...this.page.settings.order.filter(isChoice)];
		if (this.choice.children.length === names.length) return;
		const option = (name) => el("option", { value: name }, name || "any exchange");
		this.choice.replaceChildren(...names.map(option));
		this.choice.value = this.exchange;
	}

	async #loadCandles(now) {
		const { timeframe, exchange } = this;
		const options = { timeframe, limit: CANDLES, ...(exchange && { exchange }) };
		const path = `/ohlcv/${pathOf(this.symbol)}?${new URLSearchParams(options)}`;
		this.requestedAt = now;
		try {
			const response = await this.page.request(path);
			if (timeframe !== this.timeframe) return; // a late response
			this.candles = response.candles;
			this.source = response.exchange;
			setText(this.chartError, "");
		} catch (problem) {
			const text = `Cannot load candles: ${problem.detail ?? "no response"}`;
			if (timeframe === this.timeframe) setText(this.chartError, text);
		}
		this.#drawChart();
	}

	#extendCandles(last, now) {
		if (last === this.extendedTo || !this.candles.length) return;
		this.extendedTo = last;
		this.candles = withPrice(this.candles, last, now, TIMEFRAMES[this.timeframe]);
		this.#drawChart();
	}

	#drawChart() {
		const { decimals } = this;
		const candles = this.#visibleCandles;
		const cursor = this.cursor < candles.length ? this.cursor : null;
		const timeStyle = this.timeframe === "4h" ? "day" : "minute";
		drawCandles(this.canvas, candles, { decimals, cursor, timeStyle });
		if (candles.length) {
			this.#showReading(candles[cursor ?? candles.length - 1], cursor === null);
		}
	}

	#showReading([start, ...values], isNewest) {
		const prices = values.slice(0, 4).map((value) => price(value, this.decimals));
		const [open, high, low, close] = prices;
		const volume = compact(values[4]);
		const range = `open ${open} high ${high} low ${low} close ${close}`;
		const text = `${time(start, "full")} ${range} volume ${volume}`;
		const source = this.source ? ` from ${this.source}` : "";
		const hint = `Candles of ${this.timeframe}${source}; arrow keys read the values.`;
		setText(this.reading, text);
		setAttr(this.canvas, "aria-label", `${hint} ${isNewest ? "Newest: " : ""}${text}`);
	}

	#ageText(message, { now, isLive }) {
		if (!message) return "waiting";
		const text = `${message.exchange}, ${duration((now - message.fetched_at) / 1000)}`;
		if (!isLive) return `not live, ${text}`;
		return this.isSilent[message.channel] ? `stale feed, ${text}` : text;
	}

	#showBook(context) {
		setText(this.bookAge, this.#ageText(this.book, context));
		const isDrawn = this.book === this.drawnBook && context.tick % REDRAW_EVERY !== 0;
		if (!this.book || isDrawn) return;
		this.drawnBook = this.book;
		const { bids, asks } = this.book.data;
		const decimals = Math.max(...[...bids, ...asks].map(([value]) => decimalsOf(value)));
		this.#showLevels(bids, asks, decimals);
		if (bids.length && asks.length) {
			const bid = price(bids[0][0], decimals);
			const ask = price(asks[0][0], decimals);
			const gap = price(asks[0][0] - bids[0][0], decimals);
			const text = `${gap} between ${bid} and ${ask}`;
			const counts = `${bids.length} bids and ${asks.length} asks`;
			setText(this.gap, text);
			setAttr(this.depth, "aria-label", `Depth of the order book: ${text}; ${counts}`);
		}
		drawDepth(this.depth, bids, asks);
	}

	#showLevels(bids, asks, decimals) {
		const sides = {
			bids: withTotals(bids.slice(0, LISTED_LEVELS)),
			asks: withTotals(asks.slice(0, LISTED_LEVELS)).reverse(),
		};
		const totals = Object.values(sides).flatMap((levels) => levels.map(([, , total]) => total));
		const max = Math.max(0, ...totals) || 1;
		for (const [name, levels] of Object.entries(sides)) {
			const texts = levels.map(([value, ...amounts]) => [
				price(value, decimals),
				...amounts.map(compact),
			]);
			const share = (index) => `${((levels[index][2] / max) * 100).toFixed(1)}%`;
			this.sides[name].show(texts, (index) => ({ "--share": share(index) }));
		}
	}

	#showTrades(context) {
		setText(this.tradesAge, this.#ageText(this.tradesMessage, context));
		if (this.trades === this.shownTrades) return;
		this.shownTrades = this.trades;
		const newest = [...this.trades].reverse();
		const decimals = Math.max(...newest.map((trade) => decimalsOf(trade.price)));
		const texts = newest.map((trade) => [
			time(trade.timestamp),
			SIDES[trade.side] ?? "–",
			price(trade.price, decimals),
			compact(trade.amount),
		]);
		this.tradeRows.show(texts, (index) => ({ "data-side": newest[index].side ?? "" }));
	}
}
