// Entry point: connects data, address and views.

import { readAddress } from "./address.js";
import { Connection } from "./connection.js";
import { byId, setAttr, setText } from "./dom.js";
import { countdown, price } from "./format.js";
import { GatewayView, summary } from "./gateway_view.js";
import { MarketView } from "./market_view.js";
import { GatewayClock, Quotes } from "./quotes.js";
import { MAX_WATCHED, readKey, readWatchList, writeKey, writeWatchList } from "./storage.js";
import { SymbolView } from "./symbol_view.js";
import { pathOf } from "./transports.js";

const DRAW_INTERVAL_MS = 250; // faster updates cannot be read
const REFRESH_INTERVAL_MS = 5_000;
const GATEWAY_REFRESH_INTERVAL_MS = 2_000;
const REQUEST_TIMEOUT_MS = 10_000;
const ANNOUNCE_DELAY_MS = 8_000; // screen readers skip shorter states
const RETRY_INITIAL_MS = 1_000;
const RETRY_MAX_MS = 10_000;
const VIEWS = ["market", "symbol", "gateway"];
const ENDPOINTS = { book: "orderbook", trades: "trades" };

const quotes = new Quotes();
const clock = new GatewayClock();
const timers = {};
let key = readKey();
let state = { name: "connecting" };
let address = { view: "market" };
let tick = 0; // drawings
let failures = 0;
let runs = 0; // starts and pauses, to detect late responses

const page = {
	quotes,
	status: null, // the gateway's newest document, without prices
	settings: { order: [], outlier_ratio: 1, ticker_ttl_seconds: 15 },
	watchList: readWatchList(), // null means the gateway's default list
	get watched() {
		return this.watchList ?? this.settings.symbols ?? [];
	},
	now: () => clock.now(),
	watch,
	unwatch,
	watchDefault,
	announce,
	request,
};

const connection = new Connection(window, {
	key: () => key,
	message: receive,
	state: setState,
	rejected: ({ channel, symbol, exchange }, problem) => {
		if (channel === "ticker") quotes.setProblem(symbol, exchange, problem);
	},
	subscribing: (list) => quotes.resetSilence(list.filter(({ channel }) => channel === "ticker")),
	poll,
	isReachable: () =>
		request("/health/live").then(
			() => true,
			() => false,
		),
});
const views = {
	market: new MarketView(page),
	gateway: new GatewayView(page, byId("gateway")),
	symbol: null,
};

function watch(symbol) {
	if (page.watched.length >= MAX_WATCHED) {
		setText(byId("legend"), `The watch list is full: ${MAX_WATCHED} symbols`);
	} else {
		setWatchList([...page.watched.filter((other) => other !== symbol), symbol]);
	}
	refresh([symbol]).catch(() => {});
}

function unwatch(symbol) {
	setWatchList(page.watched.filter((other) => other !== symbol));
	announce(`${symbol} removed from the watch list`);
}

function watchDefault() {
	setWatchList(null);
	refresh(page.watched).catch(() => {});
}

function setWatchList(symbols) {
	page.watchList = symbols;
	writeWatchList(symbols);
	views.market.list();
	subscribe();
}

function announce(text) {
	setText(byId("announcement"), text);
}

/** Send a GET request. Return JSON, or throw a problem document. */
async function request(path) {
	let response;
	try {
		const headers = key ? { "X-API-Key": key } : {};
		response = await fetch(path, { headers, signal: AbortSignal.timeout(REQUEST_TIMEOUT_MS) });
	} catch {
		const problem = { code: "unreachable", detail: "The gateway does not respond" };
		throw problem;
	}
	const body = await response.json().catch(() => null);
	if (response.status === 401) askForKey();
	if (response.ok && body) return body;
	throw body ?? { code: "unreadable", detail: `Not JSON (status ${response.status})` };
}

async function start() {
	runs += 1;
	const run = runs;
	startDrawing();
	try {
		await refresh(visibleSymbols());
	} catch (problem) {
		if (run === runs) retryStart(problem);
		return;
	}
	failures = 0;
	if (run !== runs) return;
	draw();
	connection.start();
	scheduleRefresh();
}

function retryStart({ detail, retry_after: seconds = 0 }) {
	const backoff = Math.min(RETRY_INITIAL_MS * 2 ** failures, RETRY_MAX_MS);
	const delay = Math.max(backoff, seconds * 1000);
	failures += 1;
	setState({ name: "reconnecting", retryAt: Date.now() + delay, reason: detail });
	setTimer("start", delay, start);
}

function pause(name) {
	runs += 1;
	for (const timer of Object.values(timers)) clearTimeout(timer);
	connection.stop(name);
}

function startDrawing() {
	clearInterval(timers.draw);
	timers.draw = setInterval(draw, DRAW_INTERVAL_MS);
}

function setTimer(name, milliseconds, action) {
	clearTimeout(timers[name]);
	timers[name] = setTimeout(action, milliseconds);
}

function scheduleRefresh() {
	const interval = address.view === "gateway" ? GATEWAY_REFRESH_INTERVAL_MS : REFRESH_INTERVAL_MS;
	setTimer("refresh", interval, async () => {
		await refresh([]).catch(() => {});
		if (!document.hidden && !byId("key").open) scheduleRefresh();
	});
}

/** Return the symbols in view, undefined while the default list is unknown. */
function visibleSymbols() {
	const list = page.watchList ?? page.settings.symbols;
	if (!address.symbol || !list) return list;
	return [...new Set([address.symbol, ...list])].slice(0, MAX_WATCHED);
}

/** Fetch the gateway's status and these prices, by default of the gateway's own list. */
async function refresh(symbols) {
	const query = symbols ? `?symbols=${encodeURIComponent(symbols.join(","))}` : "";
	const { market, ...status } = await request(`/api/dashboard/data${query}`);
	const names = Object.keys(status.exchanges);
	const order = names.filter((name) => status.exchanges[name].enabled);
	const isFirst = page.status === null;
	clock.synchronize(status.generated_at);
	page.status = status;
	page.settings = { ...status, order };
	connection.streaming = status.streaming;
	quotes.updateAll(market);
	quotes.retainExchanges(order);
	if (isFirst) views.market.list();
	subscribe();
}

function receive(message) {
	const { channel, type } = message;
	if (message.sent_at && type !== "snapshot") clock.synchronize(message.sent_at);
	if (channel === "ticker" && (message.data || type === "status")) quotes.update(message);
	else if (message.symbol === address.symbol) views.symbol?.receive(message);
}

function subscribe() {
	const listedOn = (symbol) =>
		page.settings.order.filter((name) => quotes.isListed(symbol, name));
	const tickers = (visibleSymbols() ?? []).flatMap((symbol) =>
		listedOn(symbol).map((exchange) => ({ channel: "ticker", symbol, exchange })),
	);
	const isListed = listedOn(address.symbol).length > 0;
	const details = (isListed && views.symbol?.subscriptions) || [];
	connection.subscribe([...tickers, ...details]);
}

/** Fetch the data. Books and trades that fail keep their age. */
async function poll(list) {
	const tickers = list.filter(({ channel }) => channel === "ticker");
	await refresh([...new Set(tickers.map(({ symbol }) => symbol))]);
	const others = list.filter(({ channel }) => channel !== "ticker");
	await Promise.allSettled(others.map(pollDetails));
}

async function pollDetails({ channel, symbol, exchange, levels = 30 }) {
	const query = `?limit=${levels}${exchange ? `&exchange=${exchange}` : ""}`;
	const data = await request(`/${ENDPOINTS[channel]}/${pathOf(symbol)}${query}`);
	const { exchange: source, fetched_at } = data;
	receive({ type: "snapshot", channel, symbol, exchange: source, fetched_at, data });
}

function showAddress(isNavigation) {
	address = readAddress();
	for (const view of VIEWS) byId(view).hidden = view !== address.view;
	const section = address.view === "gateway" ? "gateway" : "market";
	for (const link of document.querySelectorAll("nav a")) {
		setAttr(link, "aria-current", link.dataset.view === section ? "page" : null);
	}
	const { symbol, exchange, timeframe } = address;
	const isSymbol = address.view === "symbol";
	const isSameSymbol = isSymbol && views.symbol?.symbol === symbol;
	if (isSameSymbol && views.symbol.exchange === exchange) {
		views.symbol.setTimeframe(timeframe);
		return;
	}
	views.symbol = isSymbol ? new SymbolView(page, byId("symbol"), address) : null;
	if (isNavigation) enterView(symbol, isSameSymbol);
}

function enterView(symbol, isSameSymbol) {
	byId(isSameSymbol ? "exchange-choice" : "main").focus({ preventScroll: true });
	if (!isSameSymbol) scrollTo(0, 0);
	if (page.status === null) return;
	if (symbol && !page.watched.includes(symbol)) refresh([symbol]).catch(() => {});
	subscribe();
	scheduleRefresh();
	draw();
}

function setState(next) {
	const { name } = next;
	const isNew = state.name !== name;
	state = next;
	setAttr(document.body, "data-state", name);
	if (isNew && name === "live") announce("Live");
	if (isNew && name === "reconnecting") announce("Reconnecting: prices are not live");
	if (name === "refused") askForKey();
	showState();
	showTitle();
}

function showState() {
	const { name, transport, retryAt, reason = "No connection to the gateway" } = state;
	const delay = retryAt > Date.now() ? ` in ${countdown((retryAt - Date.now()) / 1000)}` : "";
	const texts = {
		live: { ws: "Live", sse: "Live by SSE", poll: "Polling every 2 s" }[transport],
		connecting: "Connecting",
		reconnecting: `Reconnecting${delay}`,
		paused: "Paused",
		refused: "Key needed",
	};
	setText(byId("connection").querySelector("b"), texts[name]);
	showHealth(["live", "connecting"].includes(name));
	byId("notice").hidden = name !== "reconnecting";
	const data = page.status ? "The data shown is not live." : "There is no data yet.";
	if (name === "reconnecting") setText(byId("notice"), `${reason}. ${data}`);
}

function showHealth(isKnown) {
	const [health, text] = page.status && isKnown ? summary(page.status) : ["", "Unknown"];
	setAttr(byId("health"), "data-state", health);
	if (setText(byId("health").querySelector("b"), text)) {
		setTimer("announce", ANNOUNCE_DELAY_MS, () => announce(text));
	}
}

function draw() {
	showState();
	if (page.status === null) return;
	const { settings } = page;
	views[address.view]?.show({
		now: clock.now(),
		lifetime: settings.ticker_ttl_seconds * 1000,
		isLive: state.name === "live",
		ratio: settings.outlier_ratio,
		order: settings.order,
		tick,
	});
	tick += 1;
	showTitle();
}

function showTitle() {
	const { view, symbol } = address;
	const lifetime = page.settings.ticker_ttl_seconds * 1000;
	const isFresh = (quote) => quote.data && !quote.isStale(clock.now(), lifetime);
	const live = symbol && state.name === "live" ? [...quotes.of(symbol).values()] : [];
	const quote = live.find(isFresh);
	const titles = {
		market: "Market",
		gateway: "Gateway",
		symbol: `${symbol} ${quote ? price(quote.data.last) : ""}`,
	};
	setText(document.querySelector("title"), `${titles[view]} · Virtuoso`);
}

function askForKey() {
	const dialog = byId("key");
	if (dialog.open) return;
	setText(byId("key-error"), key ? "The gateway does not accept this key." : "");
	dialog.showModal();
	pause("refused");
	startDrawing();
}

function useKey() {
	key = byId("key-text").value;
	writeKey(key);
	byId("key-text").value = "";
	if (/[^!-~]/.test(key)) {
		askForKey();
	} // not valid in an HTTP header
	else start();
}

addEventListener("hashchange", () => showAddress(true));
document.addEventListener("visibilitychange", () => {
	if (document.hidden) pause();
	else if (!byId("key").open) start();
});
byId("skip").addEventListener("click", (event) => {
	event.preventDefault();
	byId("main").focus();
});
byId("key").addEventListener("close", useKey);
byId("key").addEventListener("cancel", (event) => event.preventDefault());
showAddress(false);
if (!document.hidden) start();
