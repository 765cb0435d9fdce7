// The view of one symbol.

import { candleAt, drawCandles, drawDepth, grown, roomFor, totals } from "./chart.js";
import { el, listing, mark, panel, write } from "./dom.js";
import { pathOf } from "./links.js";
import { compact, decimalsOf, duration, percent, price, time } from "./format.js";
import { Table, linkOf } from "./table.js";

const FRAMES = { "1m": 60_000, "5m": 300_000, "30m": 1_800_000, "4h": 14_400_000 }; // milliseconds
const CANDLES = 120;
const CANDLES_KEPT = 30_000; // milliseconds until they are asked for again; the newest grows with the price meanwhile
const LEVELS = 25; // of the book, drawn as depth
const LISTED = 10; // of these, in figures
const TRADES = 30;

/** The view; made anew for each symbol. `page` is who knows of prices and can ask. */
export class SymbolView {
	constructor(page, place, { symbol, exchange, frame }) {
		Object.assign(this, { page, symbol, exchange, trades: [], book: null, decimals: 0, silent: {} });
		this.#build(place);
		this.turn(frame);
	}

	/** Show candles of another length. */
	turn(frame) {
		Object.assign(this, { frame: Object.hasOwn(FRAMES, frame) ? frame : "1m", candles: [], cursor: null, asked: 0 });
		write(this.reading, "");
		for (const button of this.frames.children) mark(button, "aria-pressed", button.textContent === this.frame);
	}

	/** What the feed has to bring for it. */
	get wants() {
		const { symbol, exchange } = this;
		return [{ channel: "book", symbol, exchange, levels: LEVELS }, { channel: "trades", symbol, exchange }];
	}

	#build(place) {
		this.now = el("p", { class: "now" }, el("b"), el("span"));
		const back = el("a", { href: "#" }, "← Market");
		this.star = el("button", { type: "button", on: { click: () => this.#star() } });
		this.chooser = el("select", { id: "from", on: { change: ({ target }) => this.#go({ exchange: target.value }) } });
		this.frames = el("div", { class: "frames", role: "group", "aria-label": "Length of a candle" });
		for (const frame of Object.keys(FRAMES)) {
			this.frames.append(el("button", { type: "button", on: { click: () => this.#go({ frame }) } }, frame));
		}
		const bar = el("div", { class: "bar" }, back, el("h1", {}, this.symbol), this.now, this.star);
		const from = el("label", { for: "from" }, "From ", this.chooser);
		this.compared = el("div");
		place.replaceChildren(
			bar,
			el("div", { class: "halves" }, this.#chartPanel(from), el("div", { class: "side" }, this.#bookPanel(), this.#tradesPanel())),
			panel("wide", ["Exchanges compared"], this.compared),
		);
		this.table = new Table(this.compared, `${this.symbol} by exchange`);
		this.table.list([this.symbol]);
	}

	#chartPanel(from) {
		const hide = () => this.#point(null);
		const follow = ({ clientX }) => this.#point(candleAt(this.canvas, clientX, this.#shown.length));
		const keydown = (event) => this.#step(event);
		const on = { pointermove: follow, pointerdown: follow, pointerleave: hide, blur: hide, keydown };
		this.canvas = el("canvas", { id: "candles", tabindex: "0", role: "application", "aria-label": "Candles", on });
		this.reading = el("p", { class: "reading", id: "reading" });
		this.chartTrouble = el("p", { class: "wrong" });
		const bar = el("div", { class: "bar" }, el("h2", {}, "Candles"), this.frames, from);
		return el("div", { class: "panel chart" }, bar, this.reading, this.canvas, this.chartTrouble);
	}

	#bookPanel() {
		this.depth = el("canvas", { id: "depth", role: "img", "aria-label": "Depth of the order book" });
		const asks = listing("Asks, the best last", ["Ask", "Amount", "Total"]);
		const bids = listing("Bids, the best first", ["Bid", "Amount", "Total"]);
		this.sides = { asks: asks.rows, bids: bids.rows };
		this.bookAge = el("small");
		this.gap = el("p", { class: "gap" });
		return panel("book", ["Order book ", this.bookAge], this.depth, asks.table, this.gap, bids.table);
	}

	#tradesPanel() {
		const { table, rows } = listing("Newest trades first", ["Time", "Side", "Price", "Amount"]);
		this.tradeRows = rows;
		this.tradesAge = el("small");
		const scroll = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Trades" }, table);
		return panel("trades", ["Trades ", this.tradesAge], scroll);
	}

	#go(changed) {
		const { exchange, frame } = { exchange: this.exchange, frame: this.frame, ...changed };
		location.hash = `${linkOf(this.symbol)}/${exchange || "any"}/${frame}`;
	}

	#star() {
		const { page, symbol } = this;
		if (page.watched.includes(symbol)) page.unwatch(symbol);
		else page.watch(symbol);
	}

	#showStar() {
		write(this.star, this.page.watched.includes(this.symbol) ? "Remove from the watch list" : "Add to the watch list");
	}

	/** The newest candles there is room for. */
	get #shown() {
		return this.candles.slice(-roomFor(this.canvas));
	}

	#step(event) {
		const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
		if (!(event.key in moves) || !this.candles.length) return;
		event.preventDefault();
		const last = this.#shown.length - 1;
		this.#point(Math.min(Math.max((this.cursor ?? last + 1) + moves[event.key], 0), last));
		this.page.say(this.reading.textContent);
	}

	#point(index) {
		if (index === this.cursor) return;
		this.cursor = index;
		this.#drawChart();
	}

	take(message) {
		if (this.exchange && message.exchange !== this.exchange) return; // of the exchange that was seen before
		if (message.type === "status") this.silent[message.channel] = message.state === "stale";
		if (message.channel === "book" && message.data) this.book = message;
		if (message.channel !== "trades" || !message.data) return;
		const isNew = this.tradesFrom?.exchange !== message.exchange;
		this.tradesFrom = message;
		if (isNew) this.#recall(message.exchange);
		this.#merge(isNew ? [] : this.trades, message.data.trades);
	}

	/** Get the trades before those that begin a stream. */
	async #recall(exchange) {
		const answer = await this.page.ask(`/trades/${pathOf(this.symbol)}?limit=${TRADES}&exchange=${exchange}`).catch(() => null);
		if (answer && this.tradesFrom.exchange === exchange) this.#merge(answer.trades, this.trades);
	}

	#merge(...lists) {
		const nameOf = ({ id, timestamp, price: at, amount }) => id ?? `${timestamp} ${at} ${amount}`;
		const all = new Map(lists.flat().map((trade) => [nameOf(trade), trade]));
		this.trades = [...all.values()].sort((one, other) => one.timestamp - other.timestamp).slice(-TRADES);
	}

	show(context) {
		const quotes = this.page.quotes.of(this.symbol);
		this.table.show(this.page.quotes, context);
		this.#showChoice([...quotes.keys()]);
		this.#showStar();
		const first = [...quotes.values()].find(({ data }) => data);
		const quote = this.exchange ? quotes.get(this.exchange) : (quotes.get(this.from) ?? first);
		if (quote?.data) this.#showPrice(quote, context);
		if (context.tick % 4 === 0) this.#drawChart(); // its size or the colours may be others
		this.#showBook(context);
		this.#showTrades(context);
		if (context.now - this.asked > CANDLES_KEPT) this.#load(context.now);
	}

	#showPrice(quote, { now, lifetime, live }) {
		const { last, bid, percentage, exchange } = quote.data;
		this.decimals = Math.max(this.decimals, decimalsOf(last), decimalsOf(bid));
		write(this.now.firstChild, price(last, this.decimals));
		write(this.now.lastChild, `${percent(percentage)} in 24 h, ${exchange}, ${duration(quote.age(now) / 1000)}`);
		mark(this.now, "data-sign", Math.sign(percentage));
		const isGood = live && !quote.isStale(now, lifetime);
		mark(this.now, "data-stale", isGood ? null : "");
		if (isGood) this.#grow(last, now);
	}

	#showChoice(exchanges) {
		const wanted = ["", ...this.page.settings.order.filter((name) => exchanges.includes(name) || name === this.exchange)];
		if (this.chooser.children.length === wanted.length) return;
		this.chooser.replaceChildren(...wanted.map((name) => el("option", { value: name }, name || "any exchange")));
		this.chooser.value = this.exchange;
	}

	async #load(now) {
		this.asked = now;
		const { frame } = this;
		const query = new URLSearchParams({ timeframe: frame, limit: CANDLES, ...(this.exchange && { exchange: this.exchange }) });
		try {
			const { candles, exchange } = await this.page.ask(`/ohlcv/${pathOf(this.symbol)}?${query}`);
			if (frame !== this.frame) return; // another length was chosen meanwhile
			Object.assign(this, { candles, from: exchange });
			write(this.chartTrouble, "");
		} catch (problem) {
			if (frame === this.frame) write(this.chartTrouble, `Candles cannot be had: ${problem.detail ?? "the gateway does not answer"}`);
		}
		this.#drawChart();
	}

	#grow(last, now) {
		if (last === this.grownTo || !this.candles.length) return;
		this.grownTo = last;
		this.candles = grown(this.candles, last, now, FRAMES[this.frame]);
		this.#drawChart();
	}

	#drawChart() {
		const candles = this.#shown;
		const cursor = this.cursor !== null && this.cursor < candles.length ? this.cursor : null;
		drawCandles(this.canvas, candles, { decimals: this.decimals, cursor, shape: this.frame === "4h" ? "day" : "minute" });
		const read = candles[cursor ?? candles.length - 1];
		if (!read) return;
		const [begun, ...values] = read;
		const [open, high, low, close] = values.map((value) => price(value, this.decimals));
		const text = `${time(begun, "full")} open ${open} high ${high} low ${low} close ${close} volume ${compact(values[4])}`;
		write(this.reading, text);
		const from = this.from ? ` from ${this.from}` : "";
		mark(this.canvas, "aria-label", `Candles of ${this.frame}${from}; arrow keys read them. ${cursor === null ? "Newest: " : ""}${text}`);
	}

	#ageOf(message, context) {
		if (!message) return "waiting";
		const text = `${message.exchange}, ${duration((context.now - message.fetched_at) / 1000)}`;
		if (!context.live) return `not live, ${text}`;
		return this.silent[message.channel] ? `stale feed, ${text}` : text;
	}

	#showBook(context) {
		write(this.bookAge, this.#ageOf(this.book, context));
		if (!this.book || (this.book === this.drawn && context.tick % 4)) return;
		this.drawn = this.book;
		const { bids, asks } = this.book.data;
		const decimals = Math.max(...[...bids, ...asks].map(([at]) => decimalsOf(at)));
		const [buys, sells] = [totals(bids), totals(asks)];
		const most = Math.max(buys.slice(0, LISTED).at(-1)?.[2] ?? 0, sells.slice(0, LISTED).at(-1)?.[2] ?? 0) || 1;
		for (const [name, levels] of [["bids", buys.slice(0, LISTED)], ["asks", sells.slice(0, LISTED).reverse()]]) {
			const texts = levels.map(([at, amount, total]) => [price(at, decimals), compact(amount), compact(total)]);
			this.sides[name].show(texts, (at) => ({ "--share": `${((levels[at][2] / most) * 100).toFixed(1)}%` }));
		}
		if (bids.length && asks.length) {
			const [bid, ask] = [bids[0][0], asks[0][0]];
			const text = `${price(ask - bid, decimals)} between ${price(bid, decimals)} and ${price(ask, decimals)}`;
			write(this.gap, text);
			mark(this.depth, "aria-label", `Depth of the order book: ${text}; ${bids.length} bids and ${asks.length} asks`);
		}
		drawDepth(this.depth, bids, asks);
	}

	#showTrades(context) {
		write(this.tradesAge, this.#ageOf(this.tradesFrom, context));
		if (this.trades === this.listed) return;
		this.listed = this.trades;
		const newest = [...this.trades].reverse();
		const sides = { buy: "▲ buy", sell: "▼ sell" };
		const decimals = Math.max(...newest.map((trade) => decimalsOf(trade.price)));
		const texts = newest.map(({ timestamp, side, price: at, amount }) => [time(timestamp), sides[side] ?? "–", price(at, decimals), compact(amount)]);
		this.tradeRows.show(texts, (at) => ({ "data-side": newest[at].side ?? "" }));
	}
}
