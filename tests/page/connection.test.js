// Tests of connection.js and transports.js with a simulated network and clock.

import assert from "node:assert/strict";
import test from "node:test";
import { setImmediate as turn } from "node:timers/promises";

import { Connection } from "../../src/static/connection.js";
import { pathOf } from "../../src/static/transports.js";

const START = Date.UTC(2026, 10, 21);
const [SECOND, MINUTE] = [1_000, 60_000];
const PONG = { type: "pong", id: null, sent_at: START };

/** A WebSocket. Tests play the gateway: `accepts`, `sends`, `closes`. */
class FakeSocket {
	readyState = 0;
	onopen = null;
	onmessage = null;
	onclose = null;
	sent = [];
	answer = null; // called with each sent message

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
		queueMicrotask(() => this.closes());
	}

	opens() {
		if (this.isClosed) return;
		this.readyState = 1;
		this.onopen?.({});
	}

	sends(message) {
		if (this.readyState === 1) this.onmessage?.({ data: JSON.stringify(message) });
	}

	accepts() {
		this.opens();
		this.sends(PONG);
	}

	closes() {
		if (this.readyState === 3) return;
		this.readyState = 3;
		this.onclose?.({});
	}

	/** Accept all further subscriptions. */
	acceptsAll() {
		this.answer = ({ op, id, channel, symbols }) => {
			if (op === "subscribe") {
				queueMicrotask(() =>
					this.sends({ type: "subscribed", id, channel, symbols, errors: {} }),
				);
			}
		};
	}

	commands(op) {
		return this.sent.filter((command) => command.op === op);
	}

	/** The symbols of all subscribe commands. */
	get requested() {
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

	accepts() {
		if (!this.isClosed) this.onopen?.({});
	}

	sends(message) {
		if (this.isClosed) return;
		for (const [kind, listener] of this.#listeners) {
			if (kind === message.type) listener({ data: JSON.stringify(message) });
		}
	}

	closes() {
		if (!this.isClosed) this.onerror?.({});
	}

	/** The symbols in the path and the query parameters. */
	get parameters() {
		const [path, query] = this.url.split("?");
		return {
			symbols: path.replace("/stream/", "").split(",").map(decodeURIComponent),
			...Object.fromEntries(new URLSearchParams(query)),
		};
	}
}

// Behaviour of the network on a new connection.
const accepts = (connection) => connection.accepts();
const rejects = (connection) => connection.closes();
const hangs = () => {};

/** Return a promise and the function that resolves it. */
function later() {
	let resolvePromise = null;
	const promise = new Promise((resolve) => {
		resolvePromise = resolve;
	});
	return [promise, resolvePromise];
}

/** A simulated browser with a connection. */
class World {
	time = START;
	chance = 1; // the result of random(); 1 gives the longest delay
	key = "";
	ws = hangs;
	events = hangs;
	poll = async () => {};
	isReachable = async () => true;
	sockets = [];
	sources = [];
	polls = [];
	states = [];
	messages = [];
	rejected = [];
	#timers = new Map();
	#count = 0;

	constructor({ origin = "http://gateway:8000", ...more } = {}) {
		Object.assign(this, more);
		[this.answered, this.answer] = later();
		this.connection = new Connection(
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
				rejected: (item, problem) => this.rejected.push([item.symbol, problem.code]),
				poll: (list) => {
					this.polls.push({ at: this.time, symbols: list.map(({ symbol }) => symbol) });
					return this.poll(list);
				},
				isReachable: () => this.isReachable(),
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

	/** Advance the clock and run the timers in order. */
	async pass(milliseconds) {
		const end = this.time + milliseconds;
		for (;;) {
			await turn();
			const [next] = [...this.#timers.values()]
				.filter(({ at }) => at <= end)
				.sort((left, right) => left.at - right.at || left.id - right.id);
			if (!next) break;
			this.time = next.at;
			if (next.every) next.at += next.every;
			else this.#timers.delete(next.id);
			next.work();
		}
		this.time = end;
	}

	/** Start with these subscriptions. */
	async start(...list) {
		this.connection.subscribe(list);
		this.connection.start();
		await turn();
	}

	get socket() {
		return this.sockets.at(-1);
	}

	get source() {
		return this.sources.at(-1);
	}

	get state() {
		const { name, transport } = this.states.at(-1);
		return transport ? `${name} ${transport}` : name;
	}

	/** The number of open connections and timers. */
	get left() {
		return (
			[...this.sockets, ...this.sources].filter((item) => !item.isClosed).length +
			this.#timers.size
		);
	}

	/** The reported retry delays. */
	get pauses() {
		return this.states
			.filter(({ name }) => name === "reconnecting")
			.map(({ at, retryAt }) => retryAt - at);
	}
}

const ticker = (symbol, exchange = "bybit") => ({ channel: "ticker", symbol, exchange });
const tickers = (count, exchange) =>
	Array.from({ length: count }, (_, at) => ticker(`S${at}/USDT`, exchange));
const [BTC, ETH, FOO] = [ticker("BTC/USDT"), ticker("ETH/USDT"), ticker("FOO/BAR")];
const update = (symbol) => ({
	type: "update",
	channel: "ticker",
	symbol,
	exchange: "bybit",
	data: {},
});
const problem = (more) => Object.assign(new Error("a problem"), more);

/** The response to the last subscribe command, with errors by symbol. */
function subscribed(socket, errors = {}) {
	const { id, channel, symbols } = socket.commands("subscribe").at(-1);
	return {
		type: "subscribed",
		id,
		channel,
		symbols: symbols.filter((symbol) => !errors[symbol]),
		errors,
	};
}

/** The error response to the last subscribe command. */
const problemOf = (socket) => ({
	type: "error",
	id: socket.commands("subscribe").at(-1).id,
	title: "",
	detail: "",
});

/** A world with a live /ws. */
async function live(...list) {
	const world = new World({ ws: accepts });
	await world.start(...list);
	assert.equal(world.state, "live ws");
	return world;
}

/** A world with live events and a blocked /ws. */
async function byEvents(...list) {
	const world = new World({ ws: rejects, events: accepts });
	await world.start(...list);
	await world.pass(SECOND);
	assert.equal(world.state, "live sse");
	return world;
}

/** A world with live polling. */
async function byPolls(...list) {
	const world = new World({ ws: rejects, events: rejects });
	await world.start(...list);
	await world.pass(2 * SECOND);
	assert.equal(world.state, "live poll");
	return world;
}

test("a symbol in a path has a dash and is escaped", () => {
	assert.equal(pathOf("BTC/USDT"), "BTC-USDT");
	assert.equal(pathOf("BTC/USDT:USDT"), "BTC-USDT%3AUSDT");
	assert.equal(pathOf("../X?Y#Z"), "..-X%3FY%23Z");
});

test("the socket connects to the page's origin", async () => {
	for (const [origin, url] of [
		["http://gateway:8000", "ws://gateway:8000/ws"],
		["https://gateway", "wss://gateway/ws"],
	]) {
		const world = new World({ origin });
		await world.start(BTC);
		assert.equal(world.socket.url, url);
		assert.equal(world.state, "connecting ws");
	}
});

test("the key is escaped in the query, and absent without a key", async () => {
	const world = new World({ key: "a&b c", ws: rejects });
	await world.start(BTC);
	assert.equal(world.socket.url, "ws://gateway:8000/ws?token=a%26b%20c");
	await world.pass(SECOND);
	assert.equal(world.source.parameters.token, "a&b c");
	const open = await byEvents(BTC);
	assert.equal(open.sockets[0].url, "ws://gateway:8000/ws");
	assert.equal(open.source.parameters.token, undefined);
});

test("subscriptions are sent as soon as the socket opens", async () => {
	const world = new World();
	await world.start(BTC, FOO);
	world.connection.subscribe([BTC, ETH]);
	assert.deepEqual(world.socket.sent, []);
	world.socket.opens();
	const [{ id, ...command }, ...more] = world.socket.commands("subscribe");
	assert.deepEqual(command, {
		op: "subscribe",
		channel: "ticker",
		symbols: ["BTC/USDT", "ETH/USDT"],
		exchange: "bybit",
	});
	assert.equal(typeof id, "number");
	assert.deepEqual(more, []);
	assert.deepEqual(world.socket.commands("unsubscribe"), []);
});

test("commands group symbols, at most thirty at a time, after the previous response", async () => {
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
	world.socket.acceptsAll();
	world.socket.sends(subscribed(world.socket));
	await turn();
	const commands = world.socket.commands("subscribe");
	const sent = commands.map(({ channel, exchange, levels, symbols }) => [
		channel,
		exchange,
		levels,
		symbols.length,
	]);
	assert.deepEqual(sent, [
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

test("a new list sends only the difference", async () => {
	const world = await live(BTC, ETH);
	world.socket.sends(subscribed(world.socket));
	const before = world.socket.sent.length;
	world.connection.subscribe([ETH, FOO]);
	const sent = world.socket.sent
		.slice(before)
		.map(({ op, symbols, exchange, channel }) => [op, channel, exchange, symbols]);
	assert.deepEqual(sent, [
		["unsubscribe", "ticker", "bybit", ["BTC/USDT"]],
		["subscribe", "ticker", "bybit", ["FOO/BAR"]],
	]);
	world.connection.subscribe([{ ...FOO }, { ...ETH }]);
	assert.equal(world.socket.sent.length, before + 2);
});

test("exchange, channel and levels distinguish subscriptions", async () => {
	const world = await live(BTC);
	const book = { channel: "book", symbol: "BTC/USDT", exchange: "bybit", levels: 10 };
	world.socket.acceptsAll();
	world.socket.sends(subscribed(world.socket));
	world.connection.subscribe([BTC, ticker("BTC/USDT", "kraken"), book]);
	await turn();
	world.connection.subscribe([
		BTC,
		ticker("BTC/USDT", "kraken"),
		{ ...book, levels: 25 },
		{ ...BTC, channel: "trades" },
	]);
	await turn();
	assert.equal(world.socket.commands("subscribe").length, 5);
	assert.deepEqual(
		world.socket.commands("unsubscribe").map(({ channel, levels }) => [channel, levels]),
		[["book", 10]],
	);
});

test("the state is live after a first message that is not an error", async () => {
	const world = new World();
	await world.start(BTC);
	world.socket.opens();
	assert.equal(world.state, "connecting ws");
	world.socket.sends({
		type: "error",
		id: null,
		code: "malformed_request",
		detail: "not a command",
	});
	assert.equal(world.state, "connecting ws");
	world.socket.sends(update("BTC/USDT"));
	assert.equal(world.state, "live ws");
	assert.deepEqual(
		world.messages.map(({ type }) => type),
		["error", "update"],
	);
});

test("all messages are passed on, and the state becomes live once", async () => {
	const world = await live(BTC);
	for (const type of ["snapshot", "update", "status", "heartbeat"]) {
		world.socket.sends({ ...update("BTC/USDT"), type });
	}
	assert.deepEqual(
		world.messages.map(({ type }) => type),
		["pong", "snapshot", "update", "status", "heartbeat"],
	);
	assert.deepEqual(
		world.states.map(({ name }) => name),
		["connecting", "live"],
	);
});

test("a lost connection is restored with the current subscriptions", async () => {
	const world = await live(BTC);
	world.ws = hangs;
	world.socket.closes();
	await turn();
	assert.equal(world.state, "reconnecting");
	assert.deepEqual(world.pauses, [500]);
	world.connection.subscribe([BTC, ETH]);
	await world.pass(499);
	assert.equal(world.sockets.length, 1);
	await world.pass(1);
	assert.equal(world.sockets.length, 2);
	assert.equal(world.state, "reconnecting");
	world.socket.accepts();
	assert.equal(world.state, "live ws");
	assert.deepEqual(world.socket.requested, ["BTC/USDT", "ETH/USDT"]);
});

test("retry delays grow, are bounded and have jitter", async () => {
	for (const [chance, expected] of [
		[1, [500, 1_000, 2_000, 4_000, 8_000, 10_000, 10_000]],
		[0.5, [375, 750, 1_500, 3_000, 6_000, 7_500, 7_500]],
		[0, [250, 500, 1_000, 2_000, 4_000, 5_000, 5_000]],
	]) {
		const world = new World({ chance, ws: rejects, isReachable: async () => false });
		await world.start(BTC);
		await world.pass(MINUTE);
		assert.deepEqual(world.pauses.slice(0, 7), expected);
		const tries = world.sockets.map(({ at }) => at);
		assert.deepEqual(
			tries.slice(1, 8).map((at, index) => at - tries[index]),
			expected,
		);
		assert.deepEqual(world.states.map(({ name }) => name).slice(0, 4), [
			"connecting",
			"reconnecting",
			"reconnecting",
			"reconnecting",
		]);
	}
});

test("short connections do not reset the retry delay", async () => {
	const world = await live(BTC);
	for (let round = 0; round < 3; round++) {
		world.socket.closes();
		await world.pass(5 * SECOND);
		assert.equal(world.state, "live ws");
	}
	assert.deepEqual(world.pauses, [500, 1_000, 2_000]);
});

test("a stable connection resets the retry delay", async () => {
	const world = new World({ ws: rejects, isReachable: async () => false });
	await world.start(BTC);
	await world.pass(20 * SECOND);
	world.ws = accepts;
	await world.pass(25 * SECOND);
	assert.equal(world.state, "live ws");
	world.ws = rejects;
	world.socket.closes();
	await world.pass(2 * SECOND);
	assert.deepEqual(world.pauses.slice(-3), [500, 1_000, 2_000]);
});

test("a connection is lost after 35 seconds of silence", async () => {
	const world = await live(BTC);
	await world.pass(30 * SECOND);
	world.socket.sends({ type: "heartbeat", sent_at: world.time });
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

test("a connection attempt fails after 35 seconds", async () => {
	const world = new World({ isReachable: async () => false });
	await world.start(BTC);
	await world.pass(35 * SECOND - 1);
	assert.equal(world.state, "connecting ws");
	await world.pass(1);
	assert.equal(world.state, "reconnecting");
	assert.equal(world.sockets[0].isClosed, true);
});

test("the clock is requested at the start and every 25 seconds", async () => {
	const world = await live();
	world.socket.answer = () => world.socket.sends(PONG);
	assert.equal(world.socket.commands("ping").length, 1);
	await world.pass(10 * MINUTE);
	assert.equal(world.socket.commands("ping").length, 1 + 24);
	assert.equal(world.sockets.length, 1);
});

test("a blocked /ws falls back to events, then to polling", async () => {
	const world = new World({ ws: rejects, events: rejects });
	await world.start(BTC);
	await world.pass(2 * SECOND);
	assert.equal(world.sockets.length, 1);
	assert.equal(world.sources.length, 1);
	assert.equal(world.state, "live poll");
	assert.deepEqual(world.polls[0].symbols, ["BTC/USDT"]);
	await world.pass(20 * SECOND);
	assert.deepEqual(
		new Set(world.polls.slice(1).map(({ at }, index) => at - world.polls[index].at)),
		new Set([2 * SECOND]),
	);
});

test("a slow attempt also falls back to the next transport", async () => {
	const world = new World({ ws: hangs, events: accepts });
	await world.start(BTC);
	await world.pass(36 * SECOND);
	assert.equal(world.state, "live sse");
	assert.equal(world.sockets[0].isClosed, true);
});

test("/ws stays the first choice while the gateway is unreachable", async () => {
	const world = new World({ ws: rejects, events: accepts, isReachable: async () => false });
	await world.start(BTC);
	await world.pass(5 * MINUTE);
	assert.equal(world.sources.length, 0);
	assert.equal(world.polls.length, 0);
	world.ws = accepts;
	await world.pass(10 * SECOND);
	assert.equal(world.state, "live ws");
});

test("a transport that worked is not blocked, and /ws is tried first", async () => {
	const world = await live(BTC);
	world.events = accepts;
	for (let round = 0; round < 5; round++) {
		world.socket.closes();
		await world.pass(15 * SECOND);
	}
	assert.equal(world.sockets.length, 6);
	assert.equal(world.sources.length, 0);
});

test("event streams use the same groups, by path and query", async () => {
	const book = { channel: "book", symbol: "BTC/USDT:USDT", exchange: "", levels: 25 };
	const world = await byEvents(...tickers(150, "kraken"), book);
	const parameters = world.sources.map((source) => source.parameters);
	assert.deepEqual(
		parameters.map(({ symbols }) => symbols.length),
		[100, 50, 1],
	);
	const [{ symbols, ...ofTickers }, , ofBook] = parameters;
	assert.equal(symbols[0], "S0-USDT");
	assert.deepEqual(ofTickers, { channel: "ticker", exchange: "kraken" });
	assert.deepEqual(ofBook, { symbols: ["BTC-USDT:USDT"], channel: "book", levels: "25" });
});

test("events are passed on", async () => {
	const world = await byEvents(BTC);
	for (const type of ["snapshot", "update", "status"]) {
		world.source.sends({ ...update("BTC/USDT"), type });
	}
	assert.deepEqual(
		world.messages.map(({ type, symbol }) => [type, symbol]),
		[
			["snapshot", "BTC/USDT"],
			["update", "BTC/USDT"],
			["status", "BTC/USDT"],
		],
	);
});

test("a new list opens new event streams and closes the old ones", async () => {
	const world = await byEvents(BTC);
	world.connection.subscribe([BTC, ETH]);
	await turn();
	const [before, after] = world.sources;
	assert.equal(before.isClosed, true);
	assert.deepEqual(after.parameters.symbols, ["BTC-USDT", "ETH-USDT"]);
	assert.equal(world.state, "live sse");
	world.connection.subscribe([ETH, BTC]);
	assert.equal(world.sources.length, 2);
});

test("lost events are not retried by the browser, and /ws is tried first", async () => {
	const world = await byEvents(BTC, ticker("BTC/USDT", "kraken"));
	await world.pass(10 * SECOND);
	world.ws = hangs;
	world.source.closes();
	await turn();
	assert.equal(world.state, "reconnecting");
	assert.deepEqual(
		world.sources.map(({ isClosed }) => isClosed),
		[true, true],
	);
	await world.pass(500);
	assert.equal(world.sockets.length, 2);
	assert.equal(world.sources.length, 2);
});

test("/ws is tried every 30 seconds beside events, and replaces them without a gap", async () => {
	const world = await byEvents(BTC);
	const since = world.states.at(-1).at;
	world.events = hangs;
	for (let at = 0; at < 4; at++) {
		world.source.sends(update("BTC/USDT")); // prevents the silence timeout
		await world.pass(30 * SECOND);
	}
	const tries = world.sockets.slice(1).map(({ at }) => at - since);
	assert.deepEqual(
		tries,
		[30, 60, 90, 120].map((at) => at * SECOND),
	);
	assert.equal(world.state, "live sse");
	world.ws = hangs;
	world.source.sends(update("BTC/USDT"));
	await world.pass(30 * SECOND);
	const before = world.states.length;
	world.socket.opens();
	assert.equal(world.source.isClosed, false);
	assert.deepEqual(world.socket.requested, ["BTC/USDT"]);
	world.socket.sends(update("BTC/USDT"));
	assert.equal(world.source.isClosed, true);
	assert.deepEqual(
		world.states.slice(before).map(({ name, transport }) => [name, transport]),
		[["live", "ws"]],
	);
	await world.pass(34 * SECOND);
	assert.equal(world.socket.isClosed, false);
	assert.equal(world.sources.length, 1);
});

test("/ws is tried every 30 seconds beside polling, and ends it", async () => {
	const world = await byPolls(BTC);
	await world.pass(70 * SECOND);
	assert.equal(world.sockets.length, 3);
	assert.equal(world.state, "live poll");
	world.ws = accepts;
	await world.pass(30 * SECOND);
	assert.equal(world.state, "live ws");
	world.socket.answer = () => world.socket.sends(PONG);
	const before = world.polls.length;
	await world.pass(5 * MINUTE);
	assert.equal(world.polls.length, before);
	assert.equal(world.sockets.length, 4);
});

test("a connection that replaced events is restored after a loss and a stop", async () => {
	const world = await byEvents(BTC);
	world.ws = accepts;
	await world.pass(30 * SECOND);
	assert.equal(world.state, "live ws");
	world.socket.closes();
	await turn();
	assert.equal(world.state, "reconnecting");
	await world.pass(500);
	assert.equal(world.state, "live ws");
	assert.equal(world.sockets.length, 3);
	assert.equal(world.sources.length, 1);
	world.connection.stop();
	world.connection.start();
	assert.equal(world.state, "connecting ws");
});

test("events can be lost while /ws is tried", async () => {
	const world = await byEvents(BTC);
	world.ws = hangs;
	await world.pass(30 * SECOND);
	const tried = world.socket;
	world.source.closes();
	await turn();
	assert.equal(world.state, "reconnecting");
	assert.equal(tried.isClosed, true);
});

test("an invalid key stops everything", async () => {
	const world = new World({ key: "old" });
	await world.start(BTC);
	world.socket.opens();
	world.socket.sends({ type: "error", id: null, code: "unauthorized", detail: "no valid key" });
	world.socket.closes();
	await world.pass(10 * MINUTE);
	assert.equal(world.state, "refused");
	assert.equal(world.sockets.length, 1);
	assert.equal(world.left, 0);
	world.key = "new";
	world.connection.start();
	assert.equal(world.socket.url, "ws://gateway:8000/ws?token=new");
});

test("a poll with an invalid key stops everything", async () => {
	const world = new World({
		ws: rejects,
		events: rejects,
		poll: async () => Promise.reject(problem({ code: "unauthorized" })),
	});
	await world.start(BTC);
	await world.pass(10 * MINUTE);
	assert.equal(world.state, "refused");
	assert.equal(world.polls.length, 1);
	assert.equal(world.left, 0);
});

test("a handshake with retry_after is repeated over /ws", async () => {
	const world = new World();
	await world.start(BTC);
	world.socket.opens();
	world.socket.sends({ type: "error", id: null, code: "too_many_requests", retry_after: 7 });
	world.socket.closes();
	await turn();
	assert.deepEqual(world.pauses, [7 * SECOND]);
	await world.pass(7 * SECOND);
	assert.equal(world.sockets.length, 2);
	assert.equal(world.sources.length, 0);
});

test("subscriptions without room are polled, and retried every 15 seconds", async () => {
	for (const error of [
		{ code: "too_many_subscriptions" },
		{ code: "too_many_streams", retry_after: 1 },
		{ code: "markets_loading", retry_after: 5 },
	]) {
		const world = await live(BTC, ETH, FOO);
		world.socket.sends(subscribed(world.socket, { "ETH/USDT": error, "FOO/BAR": error }));
		await world.pass(14 * SECOND);
		assert.deepEqual(
			world.polls.map(({ at }) => at - START),
			[0, 2, 4, 6, 8, 10, 12, 14].map((at) => at * SECOND),
			error.code,
		);
		for (const { symbols } of world.polls) assert.deepEqual(symbols, ["ETH/USDT", "FOO/BAR"]);
		assert.equal(world.socket.commands("subscribe").length, 1);
		await world.pass(SECOND);
		assert.deepEqual(world.socket.commands("subscribe").at(-1).symbols, [
			"ETH/USDT",
			"FOO/BAR",
		]);
		world.socket.sends(subscribed(world.socket, { "FOO/BAR": error }));
		await world.pass(3 * SECOND);
		assert.deepEqual(world.polls.at(-1).symbols, ["FOO/BAR"]);
		await world.pass(12 * SECOND);
		assert.deepEqual(world.socket.commands("subscribe").at(-1).symbols, ["FOO/BAR"]);
		assert.equal(world.state, "live ws");
		assert.deepEqual(world.rejected, []);
	}
});

test("an error response to one symbol without room is handled like a list", async () => {
	const world = await live(BTC);
	world.socket.sends({
		...subscribed(world.socket),
		type: "error",
		code: "too_many_streams",
		retry_after: 1,
	});
	await world.pass(SECOND);
	assert.deepEqual(
		world.polls.map(({ symbols }) => symbols),
		[["BTC/USDT"]],
	);
	assert.equal(world.state, "live ws");
});

test("removed subscriptions are neither polled nor retried", async () => {
	const world = await live(BTC, ETH, FOO);
	world.socket.sends(
		subscribed(world.socket, {
			"ETH/USDT": { code: "too_many_subscriptions" },
			"FOO/BAR": { code: "too_many_subscriptions" },
		}),
	);
	world.connection.subscribe([BTC, FOO]);
	await world.pass(16 * SECOND);
	assert.deepEqual(world.polls.at(-1).symbols, ["FOO/BAR"]);
	assert.deepEqual(world.socket.commands("subscribe").at(-1).symbols, ["FOO/BAR"]);
});

test("an impossible subscription is reported and not repeated", async () => {
	const world = await live(BTC, FOO);
	world.socket.sends(subscribed(world.socket, { "FOO/BAR": { code: "unknown_symbol" } }));
	assert.deepEqual(world.rejected, [["FOO/BAR", "unknown_symbol"]]);
	world.connection.subscribe([BTC, FOO, ETH]);
	world.socket.sends({ ...subscribed(world.socket), type: "error", code: "unknown_symbol" });
	assert.deepEqual(world.rejected, [
		["FOO/BAR", "unknown_symbol"],
		["ETH/USDT", "unknown_symbol"],
	]);
	await world.pass(34 * SECOND);
	assert.equal(world.socket.commands("subscribe").length, 2);
	assert.deepEqual(world.polls, []);
	assert.equal(world.state, "live ws");
});

test("failing polls beside a connection do not close it, and start again", async () => {
	const world = await live(BTC, ETH);
	const full = { "ETH/USDT": { code: "too_many_subscriptions" } };
	world.poll = async () => Promise.reject(problem({ code: "overloaded", retry_after: 1 }));
	world.socket.sends(subscribed(world.socket, full));
	await world.pass(14 * SECOND);
	assert.equal(world.polls.length, 1);
	assert.equal(world.state, "live ws");
	world.poll = async () => {};
	await world.pass(SECOND);
	world.socket.sends(
		subscribed(world.socket, { "ETH/USDT": { code: "too_many_subscriptions" } }),
	);
	await world.pass(3 * SECOND);
	assert.deepEqual(
		world.polls.slice(1).map(({ symbols }) => symbols),
		[["ETH/USDT"], ["ETH/USDT"]],
	);
});

test("a lost connection ends the polls beside it", async () => {
	const world = await live(BTC, ETH);
	world.socket.sends(
		subscribed(world.socket, { "ETH/USDT": { code: "too_many_subscriptions" } }),
	);
	world.ws = hangs;
	world.socket.closes();
	await world.pass(20 * SECOND);
	assert.equal(world.polls.length, 1);
});

/** Worlds in all states of a connection. `world.answer` resolves what is pending. */
const SITUATIONS = {
	connecting: async () => {
		const world = new World();
		await world.start(BTC);
		return world;
	},
	"opened without data": async () => {
		const world = new World({ ws: (socket) => socket.opens() });
		await world.start(BTC);
		return world;
	},
	live: () => live(BTC),
	"live with polling beside it": async () => {
		const world = await live(BTC, ETH);
		world.socket.sends(
			subscribed(world.socket, { "ETH/USDT": { code: "too_many_subscriptions" } }),
		);
		await world.pass(SECOND);
		return world;
	},
	"live with a pending poll beside it": async () => {
		const world = await live(BTC, ETH);
		world.poll = () => world.answered;
		world.socket.sends(
			subscribed(world.socket, { "ETH/USDT": { code: "too_many_subscriptions" } }),
		);
		return world;
	},
	reconnecting: async () => {
		const world = await live(BTC);
		world.socket.closes();
		return world;
	},
	"checking whether the gateway is reachable": async () => {
		const world = new World({ ws: rejects });
		world.isReachable = () => world.answered;
		await world.start(BTC);
		return world;
	},
	"connecting to events": async () => {
		const world = new World({ ws: rejects });
		await world.start(BTC);
		await world.pass(SECOND);
		return world;
	},
	"live by events": () => byEvents(BTC, ticker("BTC/USDT", "kraken")),
	"live by events, /ws is tried": async () => {
		const world = await byEvents(BTC);
		world.ws = hangs;
		await world.pass(30 * SECOND);
		assert.equal(world.socket.isClosed, false);
		return world;
	},
	"live by events, after a failed attempt of /ws": async () => {
		const world = await byEvents(BTC);
		world.ws = (socket) => {
			socket.opens();
			socket.closes();
		};
		await world.pass(30 * SECOND);
		return world;
	},
	"live by polling": () => byPolls(BTC),
	"live by polling, with a pending poll": async () => {
		const world = await byPolls(BTC);
		world.poll = () => world.answered;
		await world.pass(2 * SECOND);
		return world;
	},
	"live by polling, with a pending poll that fails": async () => {
		const world = await byPolls(BTC);
		world.poll = () =>
			world.answered.then(() =>
				Promise.reject(problem({ code: "overloaded", retry_after: 1 })),
			);
		await world.pass(2 * SECOND);
		return world;
	},
};

for (const [name, situation] of Object.entries(SITUATIONS)) {
	test(`a stop leaves no timer and no connection: ${name}`, async () => {
		const world = await situation();
		world.connection.stop();
		assert.equal(world.state, "paused");
		assert.equal(world.left, 0);
		const seen = () =>
			[world.states, world.messages, world.polls, world.sockets, world.sources].map(
				({ length }) => length,
			);
		const before = seen();
		world.answer(true);
		for (const connection of [...world.sockets, ...world.sources]) {
			connection.accepts();
			connection.sends(update("BTC/USDT"));
			connection.closes();
		}
		world.connection.subscribe([BTC, FOO]);
		await world.pass(10 * MINUTE);
		assert.deepEqual(seen(), before);
		assert.equal(world.left, 0);
	});
}

test("a start after a stop subscribes to the current list", async () => {
	const world = await live(BTC);
	world.connection.stop();
	world.connection.subscribe([BTC, ETH]);
	world.connection.start();
	await turn();
	assert.equal(world.sockets.length, 2);
	assert.deepEqual(world.socket.requested, ["BTC/USDT", "ETH/USDT"]);
	assert.deepEqual(
		world.states.map(({ name }) => name),
		["connecting", "live", "paused", "connecting", "live"],
	);
});

test("a start after a stop resets the retry delay", async () => {
	const world = new World({ ws: rejects, isReachable: async () => false });
	await world.start(BTC);
	await world.pass(10 * SECOND);
	world.connection.stop();
	const before = world.states.length;
	world.connection.start();
	await turn();
	assert.deepEqual(
		world.states.slice(before).map(({ name }) => name),
		["connecting", "reconnecting"],
	);
	assert.equal(world.pauses.at(-1), 500);
});

test("a late reachability result does not affect a transport that works", async () => {
	const world = new World({ ws: rejects });
	world.isReachable = () => world.answered;
	await world.start(BTC);
	world.ws = accepts;
	await world.pass(SECOND);
	assert.equal(world.state, "live ws");
	world.answer(true);
	await turn();
	world.connection.stop();
	world.connection.start();
	assert.equal(world.state, "connecting ws");
});

test("a second start changes nothing", async () => {
	const world = await live(BTC);
	world.connection.start();
	assert.equal(world.sockets.length, 1);
	assert.equal(world.state, "live ws");
});

test("without streaming the page polls every two seconds", async () => {
	const world = new World({ ws: accepts, events: accepts });
	world.connection.streaming = false;
	await world.start(BTC);
	assert.equal(world.state, "live poll");
	await world.pass(5 * MINUTE);
	assert.deepEqual(
		world.polls.map(({ at }) => at - START),
		Array.from({ length: 151 }, (_, at) => at * 2 * SECOND),
	);
	assert.equal(world.sockets.length + world.sources.length, 0);
	world.connection.subscribe([ETH]);
	await world.pass(2 * SECOND);
	assert.deepEqual(world.polls.at(-1).symbols, ["ETH/USDT"]);
});

test("polling is live after the first response", async () => {
	const world = new World();
	world.poll = () => world.answered;
	world.connection.streaming = false;
	await world.start(BTC);
	await world.pass(SECOND);
	assert.equal(world.state, "connecting poll");
	world.answer();
	await turn();
	assert.equal(world.state, "live poll");
	assert.equal(world.polls.length, 1);
});

test("there is one poll at a time", async () => {
	const world = new World();
	world.connection.streaming = false;
	await world.start(BTC);
	world.poll = () => world.answered;
	await world.pass(30 * SECOND);
	assert.equal(world.polls.length, 2);
	world.poll = async () => {};
	world.answer();
	await world.pass(2 * SECOND);
	assert.equal(world.polls.length, 3);
});

test("a failed poll is repeated after retry_after", async () => {
	const world = new World();
	world.connection.streaming = false;
	await world.start(BTC);
	world.poll = async () =>
		Promise.reject(problem({ code: "too_many_requests", retry_after: 20 }));
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

test("a failed poll without retry_after is repeated with growing delays", async () => {
	const world = new World({
		poll: async () => Promise.reject(problem({ code: "unisReachable" })),
		isReachable: async () => false,
	});
	world.connection.streaming = false;
	await world.start(BTC);
	await world.pass(20 * SECOND);
	assert.deepEqual(world.pauses.slice(0, 5), [500, 1_000, 2_000, 4_000, 8_000]);
});

test("a list that changes while /ws is tried applies to the new connection", async () => {
	const world = await byEvents(BTC);
	world.ws = hangs;
	await world.pass(30 * SECOND);
	world.connection.subscribe([BTC, ETH]);
	world.socket.accepts();
	assert.equal(world.state, "live ws");
	assert.deepEqual(world.socket.requested, ["BTC/USDT", "ETH/USDT"]);
});

test("a list that changes while /ws is tried starts no second attempt", async () => {
	const world = await byEvents(BTC);
	world.ws = hangs;
	await world.pass(30 * SECOND);
	world.connection.subscribe([BTC, ETH]);
	await turn();
	world.source.sends(update("BTC/USDT"));
	await world.pass(30 * SECOND);
	assert.equal(world.sockets.filter(({ isClosed }) => !isClosed).length, 1);
	world.socket.answer = () => world.socket.sends(PONG);
	world.socket.accepts();
	await world.pass(5 * MINUTE);
	assert.equal(world.sockets.filter(({ isClosed }) => !isClosed).length, 1);
	assert.equal(world.sockets.length, 2);
});

test("frequent changes of the list do not delay the attempts for /ws", async () => {
	const world = await byEvents(BTC);
	world.ws = accepts;
	for (const list of [[BTC, ETH], [BTC], [BTC, ETH]]) {
		await world.pass(15 * SECOND);
		world.source.sends(update("BTC/USDT"));
		world.connection.subscribe(list);
	}
	assert.equal(world.state, "live ws");
});

test("events are tried before polling, even after a slow reachability check", async () => {
	const world = new World({ ws: rejects, events: accepts });
	world.isReachable = () =>
		new Promise((resolve) => {
			world.after(3 * SECOND, () => resolve(true));
		});
	await world.start(BTC);
	await world.pass(MINUTE);
	assert.equal(world.state, "live sse");
	assert.equal(world.polls.length, 0);
});

test("polls beside a connection end when there is room", async () => {
	const world = await live(BTC, ETH);
	world.socket.answer = () => world.socket.sends(PONG);
	world.socket.sends(
		subscribed(world.socket, { "ETH/USDT": { code: "too_many_subscriptions" } }),
	);
	await world.pass(15 * SECOND);
	world.socket.sends(subscribed(world.socket));
	const before = world.polls.length;
	await world.pass(5 * MINUTE);
	assert.equal(world.polls.length, before);
});

for (const refusal of [
	{ code: "too_many_streams", retry_after: 1 },
	{ code: "too_many_connections" },
]) {
	test(`a full gateway (${refusal.code}) is polled`, async () => {
		const world = new World({ events: rejects });
		world.ws = (socket) => {
			socket.opens();
			socket.sends({ type: "error", id: null, ...refusal });
			socket.closes();
		};
		await world.start(BTC);
		await world.pass(MINUTE);
		assert.equal(world.state, "live poll");
	});
}

test("rejected event streams do not cause endless reconnects", async () => {
	const world = new World({ ws: rejects });
	world.events = (source) =>
		source.parameters.symbols.includes("FOO-BAR") ? source.closes() : source.accepts();
	await world.start(BTC, ticker("FOO/BAR", ""));
	await world.pass(MINUTE);
	assert.ok(world.pauses.length < 10, `${world.pauses.length} times lost in a minute`);
});

/** Play a gateway with room for a hundred streams and a limit of messages per socket. Each failed
 * symbol counts as a message. */
function strict(world, socket) {
	let [room, tokens, at] = [100, 50, world.time];
	const answer = ({ op, id, channel, symbols = [] }) => {
		tokens = Math.min(50, tokens + (world.time - at) / 100) - 1;
		at = world.time;
		if (tokens < 0) {
			socket.sends({ type: "error", id: null, code: "too_many_requests" });
			socket.closes();
		} else if (op === "subscribe") {
			const [found, failed] = [symbols.slice(0, room), symbols.slice(room)];
			room -= found.length;
			tokens -= failed.length;
			const errors = Object.fromEntries(
				failed.map((symbol) => [symbol, { code: "too_many_subscriptions" }]),
			);
			socket.sends({ type: "subscribed", id, channel, symbols: found, errors });
		} else if (op === "ping") {
			socket.sends(PONG);
		}
	};
	socket.answer = (command) => queueMicrotask(() => answer(command));
	socket.opens();
}

test("loading markets of one exchange do not delay the others", async () => {
	const world = await live(ticker("BTC/USDT", "bybit"), ticker("BTC/USDT", "kraken"));
	world.socket.acceptsAll();
	world.socket.sends({ ...problemOf(world.socket), code: "markets_loading", retry_after: 1 });
	await turn();
	assert.deepEqual(
		world.socket.commands("subscribe").map(({ exchange }) => exchange),
		["bybit", "kraken"],
	);
	assert.deepEqual(world.polls.at(-1).symbols, ["BTC/USDT"]);
	await world.pass(15 * SECOND);
	assert.deepEqual(
		world.socket.commands("subscribe").map(({ exchange }) => exchange),
		["bybit", "kraken", "bybit"],
	);
});

test("a list far beyond the limit does not close the connection", async () => {
	const world = new World();
	world.ws = (socket) => strict(world, socket);
	await world.start(
		...tickers(100, "bybit"),
		...tickers(100, "binance"),
		...tickers(100, "kraken"),
	);
	await world.pass(5 * MINUTE);
	assert.equal(world.sockets.length, 1);
	assert.equal(world.state, "live ws");
	assert.equal(world.polls.at(-1).symbols.length, 200);
});
