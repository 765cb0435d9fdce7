// The page: which view is shown, what is watched, and what the gateway says of itself.

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
const CALM = 8_000; // a state that lasts so long is told to those who cannot see it
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

/** Read a text that the browser stores, after writing `value` if it is given (null removes it). Return null without one. */
function kept(store, name, value) {
	try {
		if (value === null) window[store].removeItem(name);
		else if (value !== undefined) window[store].setItem(name, value);
		return window[store].getItem(name);
	} catch {
		return null; // the browser may forbid both
	}
}

/** Read the watch list of this browser: empty if its user emptied it, null if there is none. */
function readWatched() {
	const list = kept("localStorage", WATCH);
	if (!list) return list === null ? null : [];
	const symbols = list.split(" ").filter((text) => text && text.length <= LONGEST_SYMBOL);
	return symbols.length ? [...new Set(symbols)].slice(0, MOST_WATCHED) : null;
}

const quotes = new Quotes();
const clock = new GatewayClock();
const timers = {};
let told = null; // what the gateway said last of itself
let settings = { order: [], outlier_ratio: 1, ticker_ttl_seconds: 15 };
let own = readWatched();
let key = kept("sessionStorage", KEY) ?? "";
let state = { name: "connecting" };
let address = { view: "market" };
let [tick, failures] = [0, 0];
let runs = 0; // grows with each beginning and pause, so that what is late can tell

/** What views know of the page, and ask of it. */
const page = {
	quotes,
	get told() {
		return told;
	},
	get settings() {
		return settings;
	},
	/** The symbols that are watched, in order. */
	get watched() {
		return own ?? settings.symbols ?? [];
	},
	get isDefault() {
		return own === null;
	},
	/** The gateway's time in UTC milliseconds. */
	now: () => clock.now(),
	watch,
	unwatch,
	watchDefault,
	say,
	ask,
};

const feed = new Feed(window, {
	key: () => key,
	message: take,
	state: enter,
	refused: ({ channel, symbol, exchange }, problem) => channel === "ticker" && quotes.fail(symbol, exchange, problem),
	asked: (wants) => quotes.asked(wants.filter(({ channel }) => channel === "ticker")),
	poll,
	reachable: () => ask("/health/live").then(() => true, () => false),
});
const views = { market: new Market(page), gateway: new GatewayView(page, place("gateway")), symbol: null };

function watch(symbol) {
	if (page.watched.length >= MOST_WATCHED) write(place("legend"), `The watch list is full: ${MOST_WATCHED} symbols`);
	else keep([...page.watched.filter((one) => one !== symbol), symbol]);
	refresh([symbol]).catch(() => {}); // the feed brings it, too
}

function unwatch(symbol) {
	keep(page.watched.filter((one) => one !== symbol));
	say(`${symbol} is not watched any more`);
}

function watchDefault() {
	keep(null);
	refresh(page.watched).catch(() => {});
}

function say(text) {
	write(place("said"), text);
}

/** Ask the gateway; throws its problem document, or one like it where there is no answer. */
async function ask(path) {
	let answer;
	try {
		const headers = key ? { "X-API-Key": key } : {};
		answer = await fetch(path, { headers, signal: AbortSignal.timeout(PATIENCE) });
	} catch {
		throw Object.assign(new Error("unreachable"), { code: "unreachable", detail: "the gateway does not answer" });
	}
	const document = await answer.json().catch(() => ({ code: "unreadable", detail: `the answer is no JSON (${answer.status})` }));
	if (answer.status === 401) askKey();
	if (!answer.ok || document.code === "unreadable") throw document;
	return document;
}

/** Get the first picture, then let the feed go on from there. */
async function begin() {
	const run = ++runs;
	clearInterval(timers.draw);
	timers.draw = setInterval(draw, DRAWN_EVERY);
	try {
		await refresh(inSight());
		failures = 0;
	} catch (problem) {
		if (run !== runs) return;
		const [shortest, longest] = RETRY;
		const pause = Math.max(Math.min(shortest * 2 ** failures++, longest), (problem.retry_after ?? 0) * 1000);
		enter({ name: "reconnecting", retryAt: Date.now() + pause, why: problem.detail });
		later("begin", pause, begin);
		return;
	}
	if (run !== runs) return;
	draw();
	feed.start();
	figures();
}

function suspend(name) {
	runs += 1;
	for (const timer of Object.values(timers)) clearTimeout(timer);
	feed.stop(name);
}

function later(name, milliseconds, work) {
	clearTimeout(timers[name]);
	timers[name] = setTimeout(work, milliseconds);
}

function figures() {
	const pause = address.view === "gateway" ? FIGURES_EVERY.gateway : FIGURES_EVERY.other;
	later("figures", pause, async () => {
		await refresh([]).catch(() => {}); // the feed tells when the gateway is away
		if (!document.hidden && !place("key").open) figures();
	});
}

/** All symbols somebody looks at. */
function inSight() {
	const { symbol } = address;
	const list = own ?? settings.symbols; // the gateway's own list is not known at first
	return symbol && list ? [...new Set([symbol, ...list])].slice(0, MOST_WATCHED) : list;
}

/** Fetch prices of these symbols, of the gateway's own list for null, and how the gateway is. */
async function refresh(symbols) {
	const query = symbols ? `?symbols=${encodeURIComponent(symbols.join(","))}` : "";
	const { market, ...about } = await ask(`/api/dashboard/data${query}`);
	const order = Object.keys(about.exchanges).filter((name) => about.exchanges[name].enabled);
	const isFirst = told === null;
	clock.heard(about.generated_at);
	told = about;
	settings = { ...about, order };
	feed.streaming = about.streaming;
	quotes.takeAll(market);
	quotes.keep(order);
	if (isFirst) views.market.list();
	want();
}

function take(message) {
	if (message.sent_at && message.type !== "snapshot") clock.heard(message.sent_at);
	if (message.channel === "ticker" && (message.data || message.type === "status")) quotes.take(message);
	else if (message.symbol === address.symbol) views.symbol?.take(message);
}

/** Tell the feed what is wanted now. */
function want() {
	const { order } = settings;
	const wants = [];
	for (const symbol of inSight() ?? []) {
		for (const exchange of order.filter((name) => quotes.isListed(symbol, name))) {
			wants.push({ channel: "ticker", symbol, exchange });
		}
	}
	const isKnown = order.some((name) => quotes.isListed(address.symbol, name));
	feed.watch([...wants, ...((isKnown && views.symbol?.wants) || [])]);
}

/** Get by asking what the feed cannot have pushed. */
async function poll(wants) {
	const symbols = [...new Set(wants.filter(({ channel }) => channel === "ticker").map(({ symbol }) => symbol))];
	await refresh(symbols);
	const others = wants.filter(({ channel }) => channel !== "ticker");
	await Promise.allSettled(others.map(pollOne)); // one that fails shows by its age
}

async function pollOne({ channel, symbol, exchange, levels = 30 }) {
	const path = { book: "orderbook", trades: "trades" }[channel];
	const data = await ask(`/${path}/${pathOf(symbol)}?limit=${levels}${exchange ? `&exchange=${exchange}` : ""}`);
	take({ type: "snapshot", channel, symbol, exchange: data.exchange, fetched_at: data.fetched_at, data });
}

function keep(list) {
	own = list;
	kept("localStorage", WATCH, list && list.join(" "));
	views.market.list();
	want();
}

function go(isMove) {
	address = readAddress();
	for (const view of VIEWS) place(view).hidden = view !== address.view;
	for (const link of document.querySelectorAll("nav a")) {
		const isHere = link.dataset.view === (address.view === "gateway" ? "gateway" : "market");
		mark(link, "aria-current", isHere ? "page" : null);
	}
	const shown = views.symbol ?? {};
	const isSame = address.view === "symbol" && shown.symbol === address.symbol;
	if (isSame && shown.exchange === address.exchange) {
		shown.turn(address.frame);
		return;
	}
	views.symbol = address.view === "symbol" ? new SymbolView(page, place("symbol"), address) : null;
	if (isMove) arrive(address.symbol, isSame);
}

/** Begin with a view that was gone to; of the same symbol the focus stays where another exchange was chosen. */
function arrive(symbol, isSame) {
	place(isSame ? "from" : "main").focus({ preventScroll: true });
	if (!isSame) scrollTo(0, 0);
	if (told === null) return;
	if (symbol && !page.watched.includes(symbol)) refresh([symbol]).catch(() => {});
	want();
	figures();
	draw();
}

function enter(next) {
	const before = state;
	state = next;
	mark(document.body, "data-state", state.name);
	if (state.name === "live" && before.name !== "live") say("Live");
	if (state.name === "reconnecting" && before.name !== "reconnecting") say("Reconnecting: prices are not live");
	if (state.name === "refused") askKey();
	showState();
	title();
}

function showState() {
	const { name, way, retryAt, why } = state;
	const wait = retryAt > Date.now() ? ` in ${countdown((retryAt - Date.now()) / 1000)}` : "";
	const live = { ws: "Live", sse: "Live, by events", poll: "Asking every 2 s" }[way];
	const words = { live, connecting: "Connecting", reconnecting: `Reconnecting${wait}`, paused: "Paused", refused: "Key needed" };
	write(place("link").querySelector("b"), words[name]);
	const [health, condition] = told && ["live", "connecting"].includes(name) ? summary(told) : ["", "Unknown"];
	mark(place("health"), "data-state", health);
	if (write(place("health").querySelector("b"), condition)) later("say", CALM, () => say(condition));
	const trouble = place("trouble");
	trouble.hidden = name !== "reconnecting";
	const known = told ? "What is shown is from before, and is not live." : "Nothing could be had yet.";
	if (!trouble.hidden) write(trouble, `${why ?? "No connection to the gateway"}. ${known}`);
}

function draw() {
	showState();
	if (told === null) return;
	const { outlier_ratio: ratio, ticker_ttl_seconds: lifetime, order } = settings;
	const live = state.name === "live";
	const context = { now: clock.now(), lifetime: lifetime * 1000, live, ratio, order, tick: tick++ };
	views[address.view]?.show(context);
	title();
}

function title() {
	const { view, symbol } = address;
	const isGood = (quote) => state.name === "live" && quote.data && !quote.isStale(clock.now(), settings.ticker_ttl_seconds * 1000);
	const quote = symbol && [...quotes.of(symbol).values()].find(isGood);
	const name = { market: "Market", gateway: "Gateway", symbol: `${symbol} ${quote ? price(quote.data.last) : ""}` }[view];
	write(document.querySelector("title"), `${name} · Virtuoso`);
}

function askKey() {
	const dialog = place("key");
	if (dialog.open) return;
	write(place("key-wrong"), key ? "The gateway does not know that key." : "");
	dialog.showModal();
	suspend("refused");
	timers.draw = setInterval(draw, DRAWN_EVERY); // ages go on
}

function useKey() {
	key = place("key-text").value;
	kept("sessionStorage", KEY, key);
	place("key-text").value = "";
	if (/[^!-~]/.test(key)) askKey(); // no header can carry it
	else begin();
}

addEventListener("hashchange", () => go(true));
document.addEventListener("visibilitychange", () => (document.hidden ? suspend() : place("key").open || begin()));
place("skip").addEventListener("click", (event) => {
	event.preventDefault();
	place("main").focus();
});
place("key").addEventListener("close", useKey);
place("key").addEventListener("cancel", (event) => event.preventDefault());
go(false);
if (!document.hidden) begin();
