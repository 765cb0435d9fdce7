// The tests of src/static/feed.js and links.js, in a world whose network does what a test says and whose time passes only when told.

import assert from "node:assert/strict";
import test from "node:test";
import { setImmediate as turn } from "node:timers/promises";

import { Feed } from "../../src/static/feed.js";
import { pathOf } from "../../src/static/links.js";

const START = Date.UTC(2026, 10, 21);
const [SECOND, MINUTE] = [1_000, 60_000];
const PONG = { type: "pong", id: null, sent_at: START };

/** What has two ends: the page's, as a browser has it, and the gateway's: `works`, `says`, `ends`. */
class FakeSocket {
	readyState = 0;
	onopen = null;
	onmessage = null;
	onclose = null;
	sent = [];
	answer = null; // called with what is sent

	constructor(url) {
		this.url = url;
	}

	get isClosed() {
		return this.readyState > 1;
	}

	send(text) {
		assert.equal(this.readyState, 1, "only an open socket can send");
		this.sent.push(JSON.parse(text));
		this.answer?.(this.sent.at(-1));
	}

	close() {
		if (this.isClosed) return;
		this.readyState = 2;
		queueMicrotask(() => this.ends());
	}

	opens() {
		if (this.isClosed) return;
		this.readyState = 1;
		this.onopen?.({});
	}

	says(message) {
		if (this.readyState === 1) this.onmessage?.({ data: JSON.stringify(message) });
	}

	works() {
		this.opens();
		this.says(PONG);
	}

	ends() {
		if (this.readyState === 3) return;
		this.readyState = 3;
		this.onclose?.({});
	}

	/** From now on every subscription is answered, and none fails. */
	agrees() {
		this.answer = ({ op, id, channel, symbols }) => {
			if (op === "subscribe") queueMicrotask(() => this.says({ type: "subscribed", id, channel, symbols, errors: {} }));
		};
	}

	/** The commands of a kind that were sent. */
	commands(op) {
		return this.sent.filter((command) => command.op === op);
	}

	/** The symbols that were asked for. */
	get asked() {
		return this.commands("subscribe").flatMap(({ symbols }) => symbols);
	}
}

class FakeSource {
	isClosed = false;
	onopen = null;
	onerror = null;
	#listeners = [];

	constructor(url) {
		this.url = url;
	}

	addEventListener(kind, listener) {
		this.#listeners.push([kind, listener]);
	}

	close() {
		this.isClosed = true;
	}

	works() {
		if (!this.isClosed) this.onopen?.({});
	}

	says(message) {
		if (this.isClosed) return;
		for (const [kind, listener] of this.#listeners) if (kind === message.type) listener({ data: JSON.stringify(message) });
	}

	ends() {
		if (!this.isClosed) this.onerror?.({});
	}

	/** The symbols of the path, and the query. */
	get wanted() {
		const [path, query] = this.url.split("?");
		return { symbols: path.replace("/stream/", "").split(",").map(decodeURIComponent), ...Object.fromEntries(new URLSearchParams(query)) };
	}
}

// What the network does with a new connection.
const works = (connection) => connection.works();
const refuses = (connection) => connection.ends();
const hangs = () => {};

/** A promise, and what keeps it. */
function later() {
	let keep = null;
	const promise = new Promise((resolve) => {
		keep = resolve;
	});
	return [promise, keep];
}

/** A browser with its network and its time, and a feed in it. */
class World {
	time = START;
	chance = 1; // what random() tells: 1 is the longest pause
	key = "";
	ws = hangs;
	events = hangs;
	poll = async () => {};
	reachable = async () => true;
	sockets = [];
	sources = [];
	polls = [];
	states = [];
	messages = [];
	refused = [];
	#timers = new Map();
	#count = 0;

	constructor({ origin = "http://gateway:8000", ...more } = {}) {
		Object.assign(this, more);
		[this.answered, this.answer] = later();
		this.feed = new Feed(
			{
				WebSocket: this.#connecting(FakeSocket, this.sockets, "ws"),
				EventSource: this.#connecting(FakeSource, this.sources, "events"),
				location: { origin },
				setTimeout: (work, milliseconds) => this.#set(work, milliseconds, 0),
				setInterval: (work, milliseconds) => this.#set(work, milliseconds, milliseconds),
				clearTimeout: (id) => this.#timers.delete(id),
				clearInterval: (id) => this.#timers.delete(id),
				Date: { now: () => this.time },
				Math: { random: () => this.chance },
			},
			{
				key: () => this.key,
				state: (state) => this.states.push({ ...state, at: this.time }),
				message: (message) => this.messages.push(message),
				refused: (want, problem) => this.refused.push([want.symbol, problem.code]),
				poll: (wants) => {
					this.polls.push({ at: this.time, symbols: wants.map(({ symbol }) => symbol) });
					return this.poll(wants);
				},
				reachable: () => this.reachable(),
			},
		);
	}

	#connecting(Kind, list, network) {
		const world = this;
		return class extends Kind {
			constructor(url) {
				super(url);
				this.at = world.time;
				list.push(this);
				queueMicrotask(() => world[network](this));
			}
		};
	}

	#set(work, milliseconds, every) {
		const id = ++this.#count;
		this.#timers.set(id, { id, at: this.time + milliseconds, work, every });
		return id;
	}

	after(milliseconds, work) {
		this.#set(work, milliseconds, 0);
	}

	/** Let time pass; what is due meanwhile happens in order. */
	async pass(milliseconds) {
		const end = this.time + milliseconds;
		for (;;) {
			await turn();
			const [next] = [...this.#timers.values()].filter(({ at }) => at <= end).sort((one, other) => one.at - other.at || one.id - other.id);
			if (!next) break;
			this.time = next.at;
			if (next.every) next.at += next.every;
			else this.#timers.delete(next.id);
			next.work();
		}
		this.time = end;
	}

	/** Begin with these wants. */
	async start(...wants) {
		this.feed.watch(wants);
		this.feed.start();
		await turn();
	}

	get socket() {
		return this.sockets.at(-1);
	}

	get source() {
		return this.sources.at(-1);
	}

	get state() {
		const { name, way } = this.states.at(-1);
		return way ? `${name} ${way}` : name;
	}

	/** How many connections and timers are left. */
	get left() {
		return [...this.sockets, ...this.sources].filter((one) => !one.isClosed).length + this.#timers.size;
	}

	/** How long each pause before a new try was said to last. */
	get pauses() {
		return this.states.filter(({ name }) => name === "reconnecting").map(({ at, retryAt }) => retryAt - at);
	}
}

const ticker = (symbol, exchange = "bybit") => ({ channel: "ticker", symbol, exchange });
const tickers = (count, exchange) => Array.from({ length: count }, (_, at) => ticker(`S${at}/USDT`, exchange));
const [BTC, ETH, FOO] = [ticker("BTC/USDT"), ticker("ETH/USDT"), ticker("FOO/BAR")];
const update = (symbol) => ({ type: "update", channel: "ticker", symbol, exchange: "bybit", data: {} });
const problem = (more) => Object.assign(new Error("a problem"), more);

/** The answer to the newest subscription: which symbols fail, and how. */
function subscribed(socket, errors = {}) {
	const { id, channel, symbols } = socket.commands("subscribe").at(-1);
	return { type: "subscribed", id, channel, symbols: symbols.filter((symbol) => !errors[symbol]), errors };
}

/** The answer to the newest subscription, of a single symbol, when it fails. */
const problemOf = (socket) => ({ type: "error", id: socket.commands("subscribe").at(-1).id, title: "", detail: "" });

/** A world whose feed is live over /ws. */
async function live(...wants) {
	const world = new World({ ws: works });
	await world.start(...wants);
	assert.equal(world.state, "live ws");
	return world;
}

/** A world where /ws is blocked and events stand in. */
async function byEvents(...wants) {
	const world = new World({ ws: refuses, events: works });
	await world.start(...wants);
	await world.pass(SECOND);
	assert.equal(world.state, "live sse");
	return world;
}

/** A world where nothing can be pushed. */
async function byPolls(...wants) {
	const world = new World({ ws: refuses, events: refuses });
	await world.start(...wants);
	await world.pass(2 * SECOND);
	assert.equal(world.state, "live poll");
	return world;
}

test("a symbol stands in a path with a dash, and escaped", () => {
	assert.equal(pathOf("BTC/USDT"), "BTC-USDT");
	assert.equal(pathOf("BTC/USDT:USDT"), "BTC-USDT%3AUSDT");
	assert.equal(pathOf("../X?Y#Z"), "..-X%3FY%23Z");
});

test("it connects to where the page comes from", async () => {
	for (const [origin, url] of [["http://gateway:8000", "ws://gateway:8000/ws"], ["https://gateway", "wss://gateway/ws"]]) {
		const world = new World({ origin });
		await world.start(BTC);
		assert.equal(world.socket.url, url);
		assert.equal(world.state, "connecting ws");
	}
});

test("a key is in the query, escaped; without one there is no query", async () => {
	const world = new World({ key: "a&b c", ws: refuses });
	await world.start(BTC);
	assert.equal(world.socket.url, "ws://gateway:8000/ws?token=a%26b%20c");
	await world.pass(SECOND);
	assert.equal(world.source.wanted.token, "a&b c");
	const open = await byEvents(BTC);
	assert.equal(open.sockets[0].url, "ws://gateway:8000/ws");
	assert.equal(open.source.wanted.token, undefined);
});

test("what was wanted before the socket opened is asked for as soon as it opens", async () => {
	const world = new World();
	await world.start(BTC, FOO);
	world.feed.watch([BTC, ETH]);
	assert.deepEqual(world.socket.sent, []);
	world.socket.opens();
	const [{ id, ...command }, ...more] = world.socket.commands("subscribe");
	assert.deepEqual(command, { op: "subscribe", channel: "ticker", symbols: ["BTC/USDT", "ETH/USDT"], exchange: "bybit" });
	assert.equal(typeof id, "number");
	assert.deepEqual(more, []);
	assert.deepEqual(world.socket.commands("unsubscribe"), []);
});

test("wants that differ only in their symbol are asked for together, thirty at a time, each after the answer to the last", async () => {
	const world = new World();
	const others = [
		ticker("S0/USDT", "kraken"),
		{ channel: "book", symbol: "S0/USDT", exchange: "bybit", levels: 25 },
		{ channel: "book", symbol: "S0/USDT", exchange: "bybit", levels: 10 },
		{ channel: "trades", symbol: "S0/USDT", exchange: "" },
	];
	await world.start(...tickers(70, "bybit"), ...others);
	world.socket.opens();
	assert.equal(world.socket.commands("subscribe").length, 1);
	world.socket.agrees();
	world.socket.says(subscribed(world.socket));
	await turn();
	const commands = world.socket.commands("subscribe");
	const told = commands.map(({ channel, exchange, levels, symbols }) => [channel, exchange, levels, symbols.length]);
	assert.deepEqual(told, [
		["ticker", "bybit", undefined, 30],
		["ticker", "bybit", undefined, 30],
		["ticker", "bybit", undefined, 10],
		["ticker", "kraken", undefined, 1],
		["book", "bybit", 25, 1],
		["book", "bybit", 10, 1],
		["trades", undefined, undefined, 1],
	]);
	assert.equal(new Set(commands.slice(0, 3).flatMap(({ symbols }) => symbols)).size, 70);
	assert.equal(new Set(commands.map(({ id }) => id)).size, commands.length);
});

test("of a new list only the difference is told", async () => {
	const world = await live(BTC, ETH);
	world.socket.says(subscribed(world.socket));
	const before = world.socket.sent.length;
	world.feed.watch([ETH, FOO]);
	const told = world.socket.sent.slice(before).map(({ op, symbols, exchange, channel }) => [op, channel, exchange, symbols]);
	assert.deepEqual(told, [["unsubscribe", "ticker", "bybit", ["BTC/USDT"]], ["subscribe", "ticker", "bybit", ["FOO/BAR"]]]);
	world.feed.watch([{ ...FOO }, { ...ETH }]);
	assert.equal(world.socket.sent.length, before + 2);
});

test("the same symbol of another exchange, channel or depth is another want", async () => {
	const world = await live(BTC);
	const book = { channel: "book", symbol: "BTC/USDT", exchange: "bybit", levels: 10 };
	world.socket.agrees();
	world.socket.says(subscribed(world.socket));
	world.feed.watch([BTC, ticker("BTC/USDT", "kraken"), book]);
	await turn();
	world.feed.watch([BTC, ticker("BTC/USDT", "kraken"), { ...book, levels: 25 }, { ...BTC, channel: "trades" }]);
	await turn();
	assert.equal(world.socket.commands("subscribe").length, 5);
	assert.deepEqual(world.socket.commands("unsubscribe").map(({ channel, levels }) => [channel, levels]), [["book", 10]]);
});

test("it is live only after a first message that is no error", async () => {
	const world = new World();
	await world.start(BTC);
	world.socket.opens();
	assert.equal(world.state, "connecting ws");
	world.socket.says({ type: "error", id: null, code: "malformed_request", detail: "it is none" });
	assert.equal(world.state, "connecting ws");
	world.socket.says(update("BTC/USDT"));
	assert.equal(world.state, "live ws");
	assert.deepEqual(world.messages.map(({ type }) => type), ["error", "update"]);
});

test("all messages are passed on, and live is said once", async () => {
	const world = await live(BTC);
	for (const type of ["snapshot", "update", "status", "heartbeat"]) world.socket.says({ ...update("BTC/USDT"), type });
	assert.deepEqual(world.messages.map(({ type }) => type), ["pong", "snapshot", "update", "status", "heartbeat"]);
	assert.deepEqual(world.states.map(({ name }) => name), ["connecting", "live"]);
});

test("a lost connection is made again, and all that is wanted by then is asked for anew", async () => {
	const world = await live(BTC);
	world.ws = hangs;
	world.socket.ends();
	await turn();
	assert.equal(world.state, "reconnecting");
	assert.deepEqual(world.pauses, [500]);
	world.feed.watch([BTC, ETH]);
	await world.pass(499);
	assert.equal(world.sockets.length, 1);
	await world.pass(1);
	assert.equal(world.sockets.length, 2);
	assert.equal(world.state, "reconnecting");
	world.socket.works();
	assert.equal(world.state, "live ws");
	assert.deepEqual(world.socket.asked, ["BTC/USDT", "ETH/USDT"]);
});

test("pauses grow, are bounded, and differ from page to page", async () => {
	for (const [chance, expected] of [
		[1, [500, 1_000, 2_000, 4_000, 8_000, 10_000, 10_000]],
		[0.5, [375, 750, 1_500, 3_000, 6_000, 7_500, 7_500]],
		[0, [250, 500, 1_000, 2_000, 4_000, 5_000, 5_000]],
	]) {
		const world = new World({ chance, ws: refuses, reachable: async () => false });
		await world.start(BTC);
		await world.pass(MINUTE);
		assert.deepEqual(world.pauses.slice(0, 7), expected);
		const tries = world.sockets.map(({ at }) => at);
		assert.deepEqual(tries.slice(1, 8).map((at, index) => at - tries[index]), expected);
		assert.deepEqual(world.states.map(({ name }) => name).slice(0, 4), ["connecting", "reconnecting", "reconnecting", "reconnecting"]);
	}
});

test("connections that do not last let the pauses grow", async () => {
	const world = await live(BTC);
	for (let round = 0; round < 3; round++) {
		world.socket.ends();
		await world.pass(5 * SECOND);
		assert.equal(world.state, "live ws");
	}
	assert.deepEqual(world.pauses, [500, 1_000, 2_000]);
});

test("after a connection that lasted the first pause is short again", async () => {
	const world = new World({ ws: refuses, reachable: async () => false });
	await world.start(BTC);
	await world.pass(20 * SECOND);
	world.ws = works;
	await world.pass(25 * SECOND);
	assert.equal(world.state, "live ws");
	world.ws = refuses;
	world.socket.ends();
	await world.pass(2 * SECOND);
	assert.deepEqual(world.pauses.slice(-3), [500, 1_000, 2_000]);
});

test("35 seconds of silence count as lost", async () => {
	const world = await live(BTC);
	await world.pass(30 * SECOND);
	world.socket.says({ type: "heartbeat", sent_at: world.time });
	await world.pass(35 * SECOND - 1);
	assert.equal(world.state, "live ws");
	assert.equal(world.sockets.length, 1);
	await world.pass(1);
	assert.equal(world.state, "reconnecting");
	assert.equal(world.sockets[0].isClosed, true);
	await world.pass(SECOND);
	assert.equal(world.state, "live ws");
	assert.equal(world.sockets.length, 2);
});

test("a connection that never comes about counts as lost after 35 seconds", async () => {
	const world = new World({ reachable: async () => false });
	await world.start(BTC);
	await world.pass(35 * SECOND - 1);
	assert.equal(world.state, "connecting ws");
	await world.pass(1);
	assert.equal(world.state, "reconnecting");
	assert.equal(world.sockets[0].isClosed, true);
});

test("the gateway's clock is asked for at once, and every 25 seconds", async () => {
	const world = await live();
	world.socket.answer = () => world.socket.says(PONG);
	assert.equal(world.socket.commands("ping").length, 1);
	await world.pass(10 * MINUTE);
	assert.equal(world.socket.commands("ping").length, 1 + 24);
	assert.equal(world.sockets.length, 1);
});

test("where /ws never works while the gateway answers, events stand in, and where these do not, questions", async () => {
	const world = new World({ ws: refuses, events: refuses });
	await world.start(BTC);
	await world.pass(2 * SECOND);
	assert.equal(world.sockets.length, 1);
	assert.equal(world.sources.length, 1);
	assert.equal(world.state, "live poll");
	assert.deepEqual(world.polls[0].symbols, ["BTC/USDT"]);
	await world.pass(20 * SECOND);
	assert.deepEqual(new Set(world.polls.slice(1).map(({ at }, index) => at - world.polls[index].at)), new Set([2 * SECOND]));
});

test("where a try takes long, the next way is taken all the same", async () => {
	const world = new World({ ws: hangs, events: works });
	await world.start(BTC);
	await world.pass(36 * SECOND);
	assert.equal(world.state, "live sse");
	assert.equal(world.sockets[0].isClosed, true);
});

test("while the gateway does not answer at all, it stays with /ws", async () => {
	const world = new World({ ws: refuses, events: works, reachable: async () => false });
	await world.start(BTC);
	await world.pass(5 * MINUTE);
	assert.equal(world.sources.length, 0);
	assert.equal(world.polls.length, 0);
	world.ws = works;
	await world.pass(10 * SECOND);
	assert.equal(world.state, "live ws");
});

test("a way that did work is not blocked: /ws is tried first again", async () => {
	const world = await live(BTC);
	world.events = works;
	for (let round = 0; round < 5; round++) {
		world.socket.ends();
		await world.pass(15 * SECOND);
	}
	assert.equal(world.sockets.length, 6);
	assert.equal(world.sources.length, 0);
});

test("events are asked for in the same groups, by path and query", async () => {
	const book = { channel: "book", symbol: "BTC/USDT:USDT", exchange: "", levels: 25 };
	const world = await byEvents(...tickers(150, "kraken"), book);
	const wanted = world.sources.map((source) => source.wanted);
	assert.deepEqual(wanted.map(({ symbols }) => symbols.length), [100, 50, 1]);
	const [{ symbols, ...ofTickers }, , ofBook] = wanted;
	assert.equal(symbols[0], "S0-USDT");
	assert.deepEqual(ofTickers, { channel: "ticker", exchange: "kraken" });
	assert.deepEqual(ofBook, { symbols: ["BTC-USDT:USDT"], channel: "book", levels: "25" });
});

test("what comes as an event is passed on", async () => {
	const world = await byEvents(BTC);
	for (const type of ["snapshot", "update", "status"]) world.source.says({ ...update("BTC/USDT"), type });
	assert.deepEqual(world.messages.map(({ type, symbol }) => [type, symbol]), [["snapshot", "BTC/USDT"], ["update", "BTC/USDT"], ["status", "BTC/USDT"]]);
});

test("a new list is listened to in new events, and the old ones end", async () => {
	const world = await byEvents(BTC);
	world.feed.watch([BTC, ETH]);
	await turn();
	const [before, after] = world.sources;
	assert.equal(before.isClosed, true);
	assert.deepEqual(after.wanted.symbols, ["BTC-USDT", "ETH-USDT"]);
	assert.equal(world.state, "live sse");
	world.feed.watch([ETH, BTC]);
	assert.equal(world.sources.length, 2);
});

test("events that are lost are not left to the browser, and /ws is tried first", async () => {
	const world = await byEvents(BTC, ticker("BTC/USDT", "kraken"));
	await world.pass(10 * SECOND);
	world.ws = hangs;
	world.source.ends();
	await turn();
	assert.equal(world.state, "reconnecting");
	assert.deepEqual(world.sources.map(({ isClosed }) => isClosed), [true, true]);
	await world.pass(500);
	assert.equal(world.sockets.length, 2);
	assert.equal(world.sources.length, 2);
});

test("while events stand in, /ws is tried every 30 seconds, and taken without an interruption", async () => {
	const world = await byEvents(BTC);
	const since = world.states.at(-1).at;
	world.events = hangs;
	for (let at = 0; at < 4; at++) {
		world.source.says(update("BTC/USDT")); // or it would seem dead
		await world.pass(30 * SECOND);
	}
	const tries = world.sockets.slice(1).map(({ at }) => at - since);
	assert.deepEqual(tries, [30, 60, 90, 120].map((at) => at * SECOND));
	assert.equal(world.state, "live sse");
	world.ws = hangs;
	world.source.says(update("BTC/USDT"));
	await world.pass(30 * SECOND);
	const before = world.states.length;
	world.socket.opens();
	assert.equal(world.source.isClosed, false);
	assert.deepEqual(world.socket.asked, ["BTC/USDT"]);
	world.socket.says(update("BTC/USDT"));
	assert.equal(world.source.isClosed, true);
	assert.deepEqual(world.states.slice(before).map(({ name, way }) => [name, way]), [["live", "ws"]]);
	await world.pass(34 * SECOND);
	assert.equal(world.socket.isClosed, false);
	assert.equal(world.sources.length, 1);
});

test("while questions stand in, /ws is tried every 30 seconds, and the questions end when it works", async () => {
	const world = await byPolls(BTC);
	await world.pass(70 * SECOND);
	assert.equal(world.sockets.length, 3);
	assert.equal(world.state, "live poll");
	world.ws = works;
	await world.pass(30 * SECOND);
	assert.equal(world.state, "live ws");
	world.socket.answer = () => world.socket.says(PONG);
	const before = world.polls.length;
	await world.pass(5 * MINUTE);
	assert.equal(world.polls.length, before);
	assert.equal(world.sockets.length, 4);
});

test("a connection that took the place of events is made again where it is lost, and after a stop", async () => {
	const world = await byEvents(BTC);
	world.ws = works;
	await world.pass(30 * SECOND);
	assert.equal(world.state, "live ws");
	world.socket.ends();
	await turn();
	assert.equal(world.state, "reconnecting");
	await world.pass(500);
	assert.equal(world.state, "live ws");
	assert.equal(world.sockets.length, 3);
	assert.equal(world.sources.length, 1);
	world.feed.stop();
	world.feed.start();
	assert.equal(world.state, "connecting ws");
});

test("while /ws is tried beside events, these end as always", async () => {
	const world = await byEvents(BTC);
	world.ws = hangs;
	await world.pass(30 * SECOND);
	const tried = world.socket;
	world.source.ends();
	await turn();
	assert.equal(world.state, "reconnecting");
	assert.equal(tried.isClosed, true);
});

test("a key that is not valid stops everything", async () => {
	const world = new World({ key: "old" });
	await world.start(BTC);
	world.socket.opens();
	world.socket.says({ type: "error", id: null, code: "unauthorized", detail: "no valid key" });
	world.socket.ends();
	await world.pass(10 * MINUTE);
	assert.equal(world.state, "refused");
	assert.equal(world.sockets.length, 1);
	assert.equal(world.left, 0);
	world.key = "new";
	world.feed.start();
	assert.equal(world.socket.url, "ws://gateway:8000/ws?token=new");
});

test("a question that is refused for its key stops everything, too", async () => {
	const world = new World({ ws: refuses, events: refuses, poll: async () => Promise.reject(problem({ code: "unauthorized" })) });
	await world.start(BTC);
	await world.pass(10 * MINUTE);
	assert.equal(world.state, "refused");
	assert.equal(world.polls.length, 1);
	assert.equal(world.left, 0);
});

test("a handshake that is told to wait is tried again then, over /ws", async () => {
	const world = new World();
	await world.start(BTC);
	world.socket.opens();
	world.socket.says({ type: "error", id: null, code: "too_many_requests", retry_after: 7 });
	world.socket.ends();
	await turn();
	assert.deepEqual(world.pauses, [7 * SECOND]);
	await world.pass(7 * SECOND);
	assert.equal(world.sockets.length, 2);
	assert.equal(world.sources.length, 0);
});

test("what there is no room for is asked for by questions meanwhile, and wanted again every 15 seconds", async () => {
	for (const error of [{ code: "too_many_subscriptions" }, { code: "too_many_streams", retry_after: 1 }, { code: "markets_loading", retry_after: 5 }]) {
		const world = await live(BTC, ETH, FOO);
		world.socket.says(subscribed(world.socket, { "ETH/USDT": error, "FOO/BAR": error }));
		await world.pass(14 * SECOND);
		assert.deepEqual(world.polls.map(({ at }) => at - START), [0, 2, 4, 6, 8, 10, 12, 14].map((at) => at * SECOND), error.code);
		for (const { symbols } of world.polls) assert.deepEqual(symbols, ["ETH/USDT", "FOO/BAR"]);
		assert.equal(world.socket.commands("subscribe").length, 1);
		await world.pass(SECOND);
		assert.deepEqual(world.socket.commands("subscribe").at(-1).symbols, ["ETH/USDT", "FOO/BAR"]);
		world.socket.says(subscribed(world.socket, { "FOO/BAR": error }));
		await world.pass(3 * SECOND);
		assert.deepEqual(world.polls.at(-1).symbols, ["FOO/BAR"]);
		await world.pass(12 * SECOND);
		assert.deepEqual(world.socket.commands("subscribe").at(-1).symbols, ["FOO/BAR"]);
		assert.equal(world.state, "live ws");
		assert.deepEqual(world.refused, []);
	}
});

test("what there is no room for is told of a single symbol by an error with the number of the command", async () => {
	const world = await live(BTC);
	world.socket.says({ ...subscribed(world.socket), type: "error", code: "too_many_streams", retry_after: 1 });
	await world.pass(SECOND);
	assert.deepEqual(world.polls.map(({ symbols }) => symbols), [["BTC/USDT"]]);
	assert.equal(world.state, "live ws");
});

test("what nobody wants any more is neither asked for by questions nor wanted again", async () => {
	const world = await live(BTC, ETH, FOO);
	world.socket.says(subscribed(world.socket, { "ETH/USDT": { code: "too_many_subscriptions" }, "FOO/BAR": { code: "too_many_subscriptions" } }));
	world.feed.watch([BTC, FOO]);
	await world.pass(16 * SECOND);
	assert.deepEqual(world.polls.at(-1).symbols, ["FOO/BAR"]);
	assert.deepEqual(world.socket.commands("subscribe").at(-1).symbols, ["FOO/BAR"]);
});

test("what cannot be is told with its problem, and not asked for again", async () => {
	const world = await live(BTC, FOO);
	world.socket.says(subscribed(world.socket, { "FOO/BAR": { code: "unknown_symbol" } }));
	assert.deepEqual(world.refused, [["FOO/BAR", "unknown_symbol"]]);
	world.feed.watch([BTC, FOO, ETH]);
	world.socket.says({ ...subscribed(world.socket), type: "error", code: "unknown_symbol" });
	assert.deepEqual(world.refused, [["FOO/BAR", "unknown_symbol"], ["ETH/USDT", "unknown_symbol"]]);
	await world.pass(34 * SECOND);
	assert.equal(world.socket.commands("subscribe").length, 2);
	assert.deepEqual(world.polls, []);
	assert.equal(world.state, "live ws");
});

test("questions beside a connection that fail do not end it, and begin again", async () => {
	const world = await live(BTC, ETH);
	const full = { "ETH/USDT": { code: "too_many_subscriptions" } };
	world.poll = async () => Promise.reject(problem({ code: "overloaded", retry_after: 1 }));
	world.socket.says(subscribed(world.socket, full));
	await world.pass(14 * SECOND);
	assert.equal(world.polls.length, 1);
	assert.equal(world.state, "live ws");
	world.poll = async () => {};
	await world.pass(SECOND);
	world.socket.says(subscribed(world.socket, { "ETH/USDT": { code: "too_many_subscriptions" } }));
	await world.pass(3 * SECOND);
	assert.deepEqual(world.polls.slice(1).map(({ symbols }) => symbols), [["ETH/USDT"], ["ETH/USDT"]]);
});

test("when a connection is lost, the questions beside it end as well", async () => {
	const world = await live(BTC, ETH);
	world.socket.says(subscribed(world.socket, { "ETH/USDT": { code: "too_many_subscriptions" } }));
	world.ws = hangs;
	world.socket.ends();
	await world.pass(20 * SECOND);
	assert.equal(world.polls.length, 1);
});

/** How to come to each situation a feed can be in; what is under way then is answered by `world.answer`. */
const SITUATIONS = {
	connecting: async () => {
		const world = new World();
		await world.start(BTC);
		return world;
	},
	"opened without news": async () => {
		const world = new World({ ws: (socket) => socket.opens() });
		await world.start(BTC);
		return world;
	},
	live: () => live(BTC),
	"live with questions beside it": async () => {
		const world = await live(BTC, ETH);
		world.socket.says(subscribed(world.socket, { "ETH/USDT": { code: "too_many_subscriptions" } }));
		await world.pass(SECOND);
		return world;
	},
	"live with a question under way beside it": async () => {
		const world = await live(BTC, ETH);
		world.poll = () => world.answered;
		world.socket.says(subscribed(world.socket, { "ETH/USDT": { code: "too_many_subscriptions" } }));
		return world;
	},
	reconnecting: async () => {
		const world = await live(BTC);
		world.socket.ends();
		return world;
	},
	"asking whether the gateway answers": async () => {
		const world = new World({ ws: refuses });
		world.reachable = () => world.answered;
		await world.start(BTC);
		return world;
	},
	"connecting to events": async () => {
		const world = new World({ ws: refuses });
		await world.start(BTC);
		await world.pass(SECOND);
		return world;
	},
	"live by events": () => byEvents(BTC, ticker("BTC/USDT", "kraken")),
	"live by events, trying /ws": async () => {
		const world = await byEvents(BTC);
		world.ws = hangs;
		await world.pass(30 * SECOND);
		assert.equal(world.socket.isClosed, false);
		return world;
	},
	"live by events, after /ws was opened and lost beside them": async () => {
		const world = await byEvents(BTC);
		world.ws = (socket) => {
			socket.opens();
			socket.ends();
		};
		await world.pass(30 * SECOND);
		return world;
	},
	"live by questions": () => byPolls(BTC),
	"live by questions, one under way": async () => {
		const world = await byPolls(BTC);
		world.poll = () => world.answered;
		await world.pass(2 * SECOND);
		return world;
	},
	"live by questions, one under way that fails": async () => {
		const world = await byPolls(BTC);
		world.poll = () => world.answered.then(() => Promise.reject(problem({ code: "overloaded", retry_after: 1 })));
		await world.pass(2 * SECOND);
		return world;
	},
};

for (const [name, situation] of Object.entries(SITUATIONS)) {
	test(`a stop leaves no timer and no connection: ${name}`, async () => {
		const world = await situation();
		world.feed.stop();
		assert.equal(world.state, "paused");
		assert.equal(world.left, 0);
		const seen = () => [world.states, world.messages, world.polls, world.sockets, world.sources].map(({ length }) => length);
		const before = seen();
		world.answer(true);
		for (const connection of [...world.sockets, ...world.sources]) {
			connection.works();
			connection.says(update("BTC/USDT"));
			connection.ends();
		}
		world.feed.watch([BTC, FOO]);
		await world.pass(10 * MINUTE);
		assert.deepEqual(seen(), before);
		assert.equal(world.left, 0);
	});
}

test("a start after a stop asks for all that is wanted by then", async () => {
	const world = await live(BTC);
	world.feed.stop();
	world.feed.watch([BTC, ETH]);
	world.feed.start();
	await turn();
	assert.equal(world.sockets.length, 2);
	assert.deepEqual(world.socket.asked, ["BTC/USDT", "ETH/USDT"]);
	assert.deepEqual(world.states.map(({ name }) => name), ["connecting", "live", "paused", "connecting", "live"]);
});

test("a start after a stop does not go on with the pauses of before", async () => {
	const world = new World({ ws: refuses, reachable: async () => false });
	await world.start(BTC);
	await world.pass(10 * SECOND);
	world.feed.stop();
	const before = world.states.length;
	world.feed.start();
	await turn();
	assert.deepEqual(world.states.slice(before).map(({ name }) => name), ["connecting", "reconnecting"]);
	assert.equal(world.pauses.at(-1), 500);
});

test("a late answer to whether the gateway is there changes nothing about a way that works by then", async () => {
	const world = new World({ ws: refuses });
	world.reachable = () => world.answered;
	await world.start(BTC);
	world.ws = works;
	await world.pass(SECOND);
	assert.equal(world.state, "live ws");
	world.answer(true);
	await turn();
	world.feed.stop();
	world.feed.start();
	assert.equal(world.state, "connecting ws");
});

test("a start while it runs changes nothing", async () => {
	const world = await live(BTC);
	world.feed.start();
	assert.equal(world.sockets.length, 1);
	assert.equal(world.state, "live ws");
});

test("without streams of the gateway's it only asks, every two seconds", async () => {
	const world = new World({ ws: works, events: works });
	world.feed.streaming = false;
	await world.start(BTC);
	assert.equal(world.state, "live poll");
	await world.pass(5 * MINUTE);
	assert.deepEqual(world.polls.map(({ at }) => at - START), Array.from({ length: 151 }, (_, at) => at * 2 * SECOND));
	assert.equal(world.sockets.length + world.sources.length, 0);
	world.feed.watch([ETH]);
	await world.pass(2 * SECOND);
	assert.deepEqual(world.polls.at(-1).symbols, ["ETH/USDT"]);
});

test("it is live by questions only when one was answered", async () => {
	const world = new World();
	world.poll = () => world.answered;
	world.feed.streaming = false;
	await world.start(BTC);
	await world.pass(SECOND);
	assert.equal(world.state, "connecting poll");
	world.answer();
	await turn();
	assert.equal(world.state, "live poll");
	assert.equal(world.polls.length, 1);
});

test("there is one question at a time", async () => {
	const world = new World();
	world.feed.streaming = false;
	await world.start(BTC);
	world.poll = () => world.answered;
	await world.pass(30 * SECOND);
	assert.equal(world.polls.length, 2);
	world.poll = async () => {};
	world.answer();
	await world.pass(2 * SECOND);
	assert.equal(world.polls.length, 3);
});

test("a question that fails is asked again after as long as it was told to wait", async () => {
	const world = new World();
	world.feed.streaming = false;
	await world.start(BTC);
	world.poll = async () => Promise.reject(problem({ code: "too_many_requests", retry_after: 20 }));
	await world.pass(2 * SECOND);
	assert.equal(world.state, "reconnecting");
	assert.deepEqual(world.pauses, [20 * SECOND]);
	world.poll = async () => {};
	await world.pass(20 * SECOND - 1);
	assert.equal(world.polls.length, 2);
	await world.pass(1);
	assert.equal(world.polls.length, 3);
	assert.equal(world.state, "live poll");
});

test("a question that fails without being told to wait is asked again with growing pauses", async () => {
	const world = new World({ poll: async () => Promise.reject(problem({ code: "unreachable" })), reachable: async () => false });
	world.feed.streaming = false;
	await world.start(BTC);
	await world.pass(20 * SECOND);
	assert.deepEqual(world.pauses.slice(0, 5), [500, 1_000, 2_000, 4_000, 8_000]);
});

test("a list that changes while /ws is tried beside events is that of the new connection", async () => {
	const world = await byEvents(BTC);
	world.ws = hangs;
	await world.pass(30 * SECOND);
	world.feed.watch([BTC, ETH]);
	world.socket.works();
	assert.equal(world.state, "live ws");
	assert.deepEqual(world.socket.asked, ["BTC/USDT", "ETH/USDT"]);
});

test("a list that changes while /ws is tried beside events leads to no second try", async () => {
	const world = await byEvents(BTC);
	world.ws = hangs;
	await world.pass(30 * SECOND);
	world.feed.watch([BTC, ETH]);
	await turn();
	world.source.says(update("BTC/USDT"));
	await world.pass(30 * SECOND);
	assert.equal(world.sockets.filter(({ isClosed }) => !isClosed).length, 1);
	world.socket.answer = () => world.socket.says(PONG);
	world.socket.works();
	await world.pass(5 * MINUTE);
	assert.equal(world.sockets.filter(({ isClosed }) => !isClosed).length, 1);
	assert.equal(world.sockets.length, 2);
});

test("a list that changes again and again does not put off trying /ws", async () => {
	const world = await byEvents(BTC);
	world.ws = works;
	for (const wants of [[BTC, ETH], [BTC], [BTC, ETH]]) {
		await world.pass(15 * SECOND);
		world.source.says(update("BTC/USDT"));
		world.feed.watch(wants);
	}
	assert.equal(world.state, "live ws");
});

test("however long it takes to learn that the gateway answers, events are tried before questions", async () => {
	const world = new World({ ws: refuses, events: works });
	world.reachable = () => new Promise((resolve) => {
		world.after(3 * SECOND, () => resolve(true));
	});
	await world.start(BTC);
	await world.pass(MINUTE);
	assert.equal(world.state, "live sse");
	assert.equal(world.polls.length, 0);
});

test("questions beside a connection end when there is room for all", async () => {
	const world = await live(BTC, ETH);
	world.socket.answer = () => world.socket.says(PONG);
	world.socket.says(subscribed(world.socket, { "ETH/USDT": { code: "too_many_subscriptions" } }));
	await world.pass(15 * SECOND);
	world.socket.says(subscribed(world.socket));
	const before = world.polls.length;
	await world.pass(5 * MINUTE);
	assert.equal(world.polls.length, before);
});

for (const refusal of [{ code: "too_many_streams", retry_after: 1 }, { code: "too_many_connections" }]) {
	test(`where there is no room for another client (${refusal.code}), it asks`, async () => {
		const world = new World({ events: refuses });
		world.ws = (socket) => {
			socket.opens();
			socket.says({ type: "error", id: null, ...refusal });
			socket.ends();
		};
		await world.start(BTC);
		await world.pass(MINUTE);
		assert.equal(world.state, "live poll");
	});
}

test("events of which some are refused do not come and go for ever", async () => {
	const world = new World({ ws: refuses });
	world.events = (source) => (source.wanted.symbols.includes("FOO-BAR") ? source.ends() : source.works());
	await world.start(BTC, ticker("FOO/BAR", ""));
	await world.pass(MINUTE);
	assert.ok(world.pauses.length < 10, `${world.pauses.length} times lost in a minute`);
});

/** A gateway that has room for a hundred streams, and ends what says too much: a symbol that fails counts as a message. */
function strict(world, socket) {
	let [room, tokens, at] = [100, 50, world.time];
	const answer = ({ op, id, channel, symbols = [] }) => {
		tokens = Math.min(50, tokens + (world.time - at) / 100) - 1;
		at = world.time;
		if (tokens < 0) {
			socket.says({ type: "error", id: null, code: "too_many_requests" });
			socket.ends();
		} else if (op === "subscribe") {
			const [found, failed] = [symbols.slice(0, room), symbols.slice(room)];
			room -= found.length;
			tokens -= failed.length;
			const errors = Object.fromEntries(failed.map((symbol) => [symbol, { code: "too_many_subscriptions" }]));
			socket.says({ type: "subscribed", id, channel, symbols: found, errors });
		} else if (op === "ping") {
			socket.says(PONG);
		}
	};
	socket.answer = (command) => queueMicrotask(() => answer(command));
	socket.opens();
}

test("an exchange whose list is not there yet holds up no other", async () => {
	const world = await live(ticker("BTC/USDT", "bybit"), ticker("BTC/USDT", "kraken"));
	world.socket.agrees();
	world.socket.says({ ...problemOf(world.socket), code: "markets_loading", retry_after: 1 });
	await turn();
	assert.deepEqual(world.socket.commands("subscribe").map(({ exchange }) => exchange), ["bybit", "kraken"]);
	assert.deepEqual(world.polls.at(-1).symbols, ["BTC/USDT"]);
	await world.pass(15 * SECOND);
	assert.deepEqual(world.socket.commands("subscribe").map(({ exchange }) => exchange), ["bybit", "kraken", "bybit"]);
});

test("a list far longer than there is room for does not end the connection", async () => {
	const world = new World();
	world.ws = (socket) => strict(world, socket);
	await world.start(...tickers(100, "bybit"), ...tickers(100, "binance"), ...tickers(100, "kraken"));
	await world.pass(5 * MINUTE);
	assert.equal(world.sockets.length, 1);
	assert.equal(world.state, "live ws");
	assert.equal(world.polls.at(-1).symbols.length, 200);
});
