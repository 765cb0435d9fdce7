// The page: which view is shown, what is watched, what the gateway says, and how that reaches the views.

import { mark, write } from "./dom.js";
import { Feed } from "./feed.js";
import { countdown, price } from "./format.js";
import { GatewayView, summary } from "./gateway.js";
import { pathOf } from "./links.js";
import { Market } from "./market.js";
import { GatewayClock, Quotes } from "./quotes.js";
import { SymbolView } from "./symbol.js";

const DRAWN_EVERY = 250; // milliseconds: nobody reads faster, however fast prices come
const FIGURES_EVERY = { gateway: 2_000, other: 5_000 };
const PATIENCE = 10_000; // for one answer
const RETRY = [1_000, 10_000]; // pauses before the first picture is asked for again
const MOST_WATCHED = 100; // what one question to the gateway may name
const LONGEST_SYMBOL = 40;
const [WATCH, KEY] = ["virtuoso.watch", "virtuoso.key"]; // what the browser keeps
const VIEWS = ["market", "symbol", "gateway"];

const place = (name) => document.querySelector(`#${name}`);
const symbolOf = (text) => text.toUpperCase().replace("-", "/");

/** What the address names: a view; a symbol, an exchange and the length of a candle. */
function readAddress() {
	let text = location.hash.slice(1);
	try {
		text = decodeURIComponent(text);
	} catch {
		// shown as it is
	}
	if (text === "" || text === "market" || text === "main") return { view: "market" };
	if (text === "gateway") return { view: "gateway" };
	const [symbol, exchange = "", frame = "1m"] = text.split("/");
	if (!symbol.trim()) return { view: "market" };
	return { view: "symbol", symbol: symbolOf(symbol.slice(0, LONGEST_SYMBOL)), exchange: exchange === "any" ? "" : exchange, frame };
}

/** Read what the browser keeps, after writing it where a value is given; it may forbid both. */
function kept(store, name, value) {
	try {
		if (value === null) window[store].removeItem(name);
		else if (value !== undefined) window[store].setItem(name, value);
		return window[store].getItem(name) ?? "";
	} catch {
		return "";
	}
}

/** The watch list of this browser; null where none was made. */
function readWatched() {
	const symbols = kept("localStorage", WATCH).split(" ").filter((text) => text && text.length <= LONGEST_SYMBOL);
	return symbols.length ? [...new Set(symbols)].slice(0, MOST_WATCHED) : null;
}

class Page {
	quotes = new Quotes();
	told = null; // what the gateway said last of itself
	settings = { order: [], outlier_ratio: 1, ticker_ttl_seconds: 15 };
	#own = readWatched();
	#key = kept("sessionStorage", KEY);
	#clock = new GatewayClock();
	#state = { name: "connecting" };
	#tick = 0;
	#views = {};
	#address = { view: "market" };
	#timers = {};
	#failures = 0;
	#feed = new Feed(window, {
		key: () => this.#key,
		message: (message) => this.#take(message),
		state: (state) => this.#enter(state),
		refused: ({ channel, symbol, exchange }, problem) => channel === "ticker" && this.quotes.fail(symbol, exchange, problem),
		asked: (wants) => this.quotes.asked(wants.filter(({ channel }) => channel === "ticker")),
		poll: (wants) => this.#poll(wants),
		reachable: () => this.#isReachable(),
	});

	constructor() {
		this.#views = { market: new Market(this), gateway: new GatewayView(this, place("gateway")), symbol: null };
		addEventListener("hashchange", () => this.#go(true));
		addEventListener("resize", () => this.#views.symbol?.redraw());
		matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#views.symbol?.redraw());
		document.addEventListener("visibilitychange", () => (document.hidden ? this.#pause() : this.#begin()));
		place("skip").addEventListener("click", (event) => {
			event.preventDefault();
			place("main").focus();
		});
		place("key").addEventListener("close", () => this.#useKey());
		place("key").addEventListener("cancel", (event) => event.preventDefault());
		this.#go(false);
		if (!document.hidden) this.#begin();
	}

	/** The symbols that are watched, in order. */
	get watched() {
		return this.#own ?? this.settings.symbols ?? [];
	}

	get isDefault() {
		return this.#own === null;
	}

	/** The gateway's time in UTC milliseconds. */
	now() {
		return this.#clock.now();
	}

	watch(symbol) {
		if (this.watched.length >= MOST_WATCHED) this.say(`The watch list is full: ${MOST_WATCHED} symbols`);
		else this.#keep([...this.watched.filter((one) => one !== symbol), symbol]);
		this.#refresh([symbol]).catch(() => {}); // the feed brings it, too
	}

	unwatch(symbol) {
		this.#keep(this.watched.filter((one) => one !== symbol));
		this.say(`${symbol} is not watched any more`);
	}

	watchDefault() {
		this.#keep(null);
		this.#refresh(this.watched).catch(() => {});
	}

	/** Tell those who cannot see it. */
	say(text) {
		write(place("said"), text);
	}

	/** Ask the gateway; throws its problem document, or one like it where there is no answer. */
	async ask(path) {
		let answer;
		try {
			const headers = this.#key ? { "X-API-Key": this.#key } : {};
			answer = await fetch(path, { headers, signal: AbortSignal.timeout(PATIENCE) });
		} catch {
			throw Object.assign(new Error("unreachable"), { code: "unreachable", detail: "the gateway does not answer" });
		}
		const document = await answer.json().catch(() => ({ code: "unreadable", detail: `the answer is no JSON (${answer.status})` }));
		if (answer.status === 401) this.#askKey();
		if (!answer.ok) throw document;
		return document;
	}

	/** Get the first picture, then let the feed go on from there. */
	async #begin() {
		clearInterval(this.#timers.draw);
		this.#timers.draw = setInterval(() => this.#draw(), DRAWN_EVERY);
		try {
			await this.#refresh(this.#symbols());
			this.#failures = 0;
		} catch (problem) {
			if (problem.code === "unauthorized" || document.hidden) return;
			const [shortest, longest] = RETRY;
			const pause = Math.min(shortest * 2 ** this.#failures++, longest);
			this.#enter({ name: "reconnecting", retryAt: Date.now() + pause });
			this.#later("begin", pause, () => this.#begin());
			return;
		}
		if (document.hidden) return;
		this.#draw();
		this.#want();
		this.#feed.start();
		this.#figures();
	}

	#pause(name) {
		for (const timer of Object.values(this.#timers)) clearTimeout(timer);
		this.#feed.stop(name);
	}

	#later(name, milliseconds, work) {
		clearTimeout(this.#timers[name]);
		this.#timers[name] = setTimeout(work, milliseconds);
	}

	#figures() {
		const pause = this.#address.view === "gateway" ? FIGURES_EVERY.gateway : FIGURES_EVERY.other;
		this.#later("figures", pause, async () => {
			await this.#refresh([]).catch(() => {}); // the feed tells when the gateway is away
			if (!document.hidden) this.#figures();
		});
	}

	/** All symbols somebody looks at. */
	#symbols() {
		const { symbol } = this.#address;
		const list = this.#own ?? this.settings.symbols; // the gateway's own list is not known at first
		return symbol && list ? [...new Set([symbol, ...list])].slice(0, MOST_WATCHED) : list;
	}

	/** Fetch prices of these symbols, of the gateway's own list for null, and how the gateway is. */
	async #refresh(symbols) {
		const query = symbols ? `?symbols=${encodeURIComponent(symbols.join(","))}` : "";
		const { market, ...told } = await this.ask(`/api/dashboard/data${query}`);
		const order = Object.keys(told.exchanges).filter((name) => told.exchanges[name].enabled);
		const isFirst = this.told === null;
		this.#clock.heard(told.generated_at);
		Object.assign(this, { told, settings: { ...told, order } });
		this.#feed.streaming = told.streaming;
		this.quotes.takeAll(market);
		const [state, words] = summary(told);
		mark(place("health"), "data-state", state);
		if (write(place("health").querySelector("b"), words) && !isFirst) this.say(words);
		if (isFirst) this.#views.market.list();
	}

	#take(message) {
		if (message.sent_at && message.type !== "snapshot") this.#clock.heard(message.sent_at);
		if (message.channel === "ticker" && (message.data || message.type === "status")) this.quotes.take(message);
		else if (message.symbol === this.#address.symbol) this.#views.symbol?.take(message);
	}

	/** Tell the feed what is wanted now. */
	#want() {
		const { order } = this.settings;
		const wants = [];
		for (const symbol of this.#symbols() ?? []) {
			for (const exchange of order.filter((name) => this.quotes.isListed(symbol, name))) {
				wants.push({ channel: "ticker", symbol, exchange });
			}
		}
		this.#feed.watch([...wants, ...(this.#views.symbol?.wants ?? [])]);
	}

	/** Get by asking what the feed cannot have pushed. */
	async #poll(wants) {
		const symbols = [...new Set(wants.filter(({ channel }) => channel === "ticker").map(({ symbol }) => symbol))];
		await this.#refresh(symbols);
		const others = wants.filter(({ channel }) => channel !== "ticker");
		await Promise.allSettled(others.map((want) => this.#pollOne(want))); // one that fails shows by its age
	}

	async #pollOne({ channel, symbol, exchange, levels = 30 }) {
		const path = { book: "orderbook", trades: "trades" }[channel];
		const data = await this.ask(`/${path}/${pathOf(symbol)}?limit=${levels}${exchange ? `&exchange=${exchange}` : ""}`);
		this.#take({ type: "snapshot", channel, symbol, exchange: data.exchange, fetched_at: data.fetched_at, data });
	}

	async #isReachable() {
		return fetch("/health/live", { signal: AbortSignal.timeout(PATIENCE) }).then((answer) => answer.ok, () => false);
	}

	#keep(list) {
		this.#own = list;
		kept("localStorage", WATCH, list && list.join(" "));
		this.#views.market.list();
		this.#want();
	}

	#go(isMove) {
		const address = (this.#address = readAddress());
		for (const view of VIEWS) place(view).hidden = view !== address.view;
		for (const link of document.querySelectorAll("nav a")) {
			const isHere = link.dataset.view === (address.view === "gateway" ? "gateway" : "market");
			mark(link, "aria-current", isHere ? (address.view === "symbol" ? "true" : "page") : null);
		}
		const { symbol: shown } = this.#views;
		if (shown && shown.symbol === address.symbol && shown.exchange === address.exchange) {
			shown.turn(address.frame);
			return;
		}
		this.#views.symbol = address.view === "symbol" ? new SymbolView(this, place("symbol"), address) : null;
		if (isMove) this.#arrive(address.symbol);
	}

	/** Begin with a view that was gone to. */
	#arrive(symbol) {
		place("main").focus({ preventScroll: true });
		scrollTo(0, 0);
		if (this.told === null) return;
		if (symbol && !this.watched.includes(symbol)) this.#refresh([symbol]).then(() => this.#want(), () => {});
		this.#want();
		this.#figures();
		this.#draw();
	}

	#enter(state) {
		const before = this.#state;
		this.#state = state;
		mark(document.body, "data-state", state.name);
		if (state.name === "live" && before.name !== "live") this.say("Live");
		if (state.name === "reconnecting" && before.name !== "reconnecting") this.say("Reconnecting: prices are not live");
		if (state.name === "refused") this.#askKey();
		this.#showState();
	}

	#showState() {
		const { name, way, retryAt } = this.#state;
		const wait = retryAt > Date.now() ? ` in ${countdown((retryAt - Date.now()) / 1000)}` : "";
		const live = { ws: "Live", sse: "Live, by events", poll: "Asking every 2 s" }[way];
		const words = { live, connecting: "Connecting", reconnecting: `Reconnecting${wait}`, paused: "Paused", refused: "Key needed" };
		write(place("link").querySelector("b"), words[name]);
		const trouble = place("trouble");
		trouble.hidden = name !== "reconnecting";
		const known = this.told ? "What is shown is from before, and is not live." : "Nothing could be had yet.";
		if (!trouble.hidden) write(trouble, `No connection to the gateway. ${known}`);
	}

	#draw() {
		this.#showState();
		if (this.told === null) return;
		const { outlier_ratio: ratio, ticker_ttl_seconds: lifetime, order } = this.settings;
		const isListed = (symbol, exchange) => this.quotes.isListed(symbol, exchange);
		const live = this.#state.name === "live";
		const context = { now: this.now(), lifetime: lifetime * 1000, live, ratio, order, isListed, tick: this.#tick++ };
		this.#views[this.#address.view]?.show(context);
		this.#title();
	}

	#title() {
		const { view, symbol } = this.#address;
		const quote = symbol && [...this.quotes.of(symbol).values()].find(({ data }) => data);
		const name = { market: "Market", gateway: "Gateway", symbol: `${symbol} ${quote ? price(quote.data.last) : ""}` }[view];
		write(document.querySelector("title"), `${name} · Virtuoso`);
	}

	#askKey() {
		const dialog = place("key");
		if (dialog.open) return;
		write(place("key-wrong"), this.#key ? "The gateway does not know that key." : "");
		dialog.showModal();
		this.#pause("refused");
	}

	#useKey() {
		this.#key = place("key-text").value;
		kept("sessionStorage", KEY, this.#key);
		place("key-text").value = "";
		if (/[^!-~]/.test(this.#key)) this.#askKey(); // no header can carry it
		else this.#begin();
	}
}

new Page();
