// The three transports of market data: /ws, server-sent events, polling.
//
// A subscription is {channel, symbol, exchange, levels}, as in the commands of /ws. Hooks:
// opened() at the first data, message(message), lost(code, milliseconds to wait) at the end,
// subscribing(list) before a command, accepted(list) after it, overflow(list) if the gateway has
// no room now, rejected(item, problem) if it never will. After close() no hook is called.

const PING_INTERVAL_MS = 25_000; // also keeps an empty watch list connected
const POLL_INTERVAL_MS = 2_000;
const RESUBSCRIBE_INTERVAL_MS = 15_000; // of what had no room
const SYMBOLS_PER_STREAM = 100; // limit of /stream
// Each failed symbol counts as a message. The gateway allows bursts of 50.
const SYMBOLS_PER_COMMAND = 30;
const OPEN = 1; // WebSocket.OPEN

export const keyOf = ({ channel, symbol, exchange = "", levels = 0 }) =>
	[channel, symbol, exchange, levels].join("|");

export const pathOf = (symbol) => encodeURIComponent(symbol.replace("/", "-"));

function chunks(list, size) {
	const chunk = (_, index) => list.slice(index * size, (index + 1) * size);
	return Array.from({ length: Math.ceil(list.length / size) }, chunk);
}

/** Group what differs only in the symbol, at most `size` per group. */
function groupSymbols(list, size) {
	const groups = new Map();
	for (const item of list) {
		const name = keyOf({ ...item, symbol: "" });
		groups.set(name, [...(groups.get(name) ?? []), item]);
	}
	return [...groups.values()].flatMap((group) => chunks(group, size));
}

function optionsOf([{ channel, exchange, levels }]) {
	return { channel, ...(exchange && { exchange }), ...(levels && { levels }) };
}

function command(op, id, group) {
	return { op, id, symbols: group.map(({ symbol }) => symbol), ...optionsOf(group) };
}

function updated(list, added, removed) {
	const names = new Set([...removed, ...added].map(keyOf));
	return [...list.filter((item) => !names.has(keyOf(item))), ...added];
}

class Transport {
	isOpen = false;

	constructor(browser, hooks, list) {
		this.browser = browser;
		this.hooks = hooks;
		this.list = list;
	}

	opened() {
		if (this.isOpen) return;
		this.isOpen = true;
		this.hooks.opened();
	}
}

class SocketTransport extends Transport {
	#socket;
	#queue = []; // groups, for one command at a time
	#pending = null; // the group that was sent
	#active = new Set(); // keys
	#waiting = []; // without room
	#id = 0;
	#timers = [];
	#code = null;
	#wait = 0; // milliseconds

	constructor(browser, hooks, list) {
		super(browser, hooks, list);
		const base = browser.location.origin.replace(/^http/, "ws");
		const key = hooks.key();
		const query = key ? `?token=${encodeURIComponent(key)}` : "";
		this.#socket = new browser.WebSocket(`${base}/ws${query}`);
		this.#socket.onopen = () => this.#start();
		this.#socket.onmessage = ({ data }) => this.#receive(JSON.parse(data));
		this.#socket.onclose = () => {
			this.close();
			hooks.lost(this.#code, this.#wait);
		};
	}

	#start() {
		const ping = () => this.#send({ op: "ping" });
		const resubscribe = () => this.update(this.#waiting.slice(0, SYMBOLS_PER_COMMAND), []);
		ping();
		this.#timers.push(this.browser.setInterval(ping, PING_INTERVAL_MS));
		this.#timers.push(this.browser.setInterval(resubscribe, RESUBSCRIBE_INTERVAL_MS));
		this.update(this.list, []);
	}

	update(added, removed) {
		this.list = updated(this.list, added, removed);
		this.#waiting = updated(this.#waiting, [], [...added, ...removed]);
		if (this.#socket.readyState !== OPEN) return; // #start subscribes
		this.#unsubscribe(removed.filter((item) => this.#active.delete(keyOf(item))));
		const queue = this.#queue.map((group) => updated(group, [], removed));
		this.#queue = queue.filter((group) => group.length);
		this.#queue.push(...groupSymbols(added, SYMBOLS_PER_COMMAND));
		this.#subscribeNext();
	}

	#unsubscribe(list) {
		for (const group of groupSymbols(list, SYMBOLS_PER_COMMAND)) {
			this.#send(command("unsubscribe", null, group));
		}
	}

	#subscribeNext() {
		if (this.#pending || !this.#queue.length) return;
		this.#pending = this.#queue.shift();
		this.hooks.subscribing?.(this.#pending);
		this.#id += 1;
		this.#send(command("subscribe", this.#id, this.#pending));
	}

	close() {
		for (const timer of this.#timers) this.browser.clearInterval(timer);
		Object.assign(this.#socket, { onopen: null, onmessage: null, onclose: null });
		this.#socket.close();
	}

	#send(message) {
		if (this.#socket.readyState === OPEN) this.#socket.send(JSON.stringify(message));
	}

	#receive(message) {
		const isError = message.type === "error";
		const isResponse = message.id === this.#id && this.#pending;
		if (isResponse) {
			this.#settle(message);
		} else if (isError) {
			this.#code = message.code; // the gateway closes the connection next
			this.#wait = (message.retry_after ?? 0) * 1000;
		}
		if (!isError) this.opened();
		this.hooks.message(message);
	}

	#settle(message) {
		const problemOf = ({ symbol }) =>
			message.type === "error" ? message : message.errors[symbol];
		const isFull = (item) => problemOf(item).code.startsWith("too_many_");
		const names = new Set(this.list.map(keyOf));
		const isWanted = (item) => names.has(keyOf(item));
		const wanted = this.#pending.filter(isWanted);
		const subscribed = this.#pending.filter((item) => !problemOf(item));
		const failed = wanted.filter(problemOf);
		const accepted = subscribed.filter(isWanted);
		this.#pending = null;
		this.#unsubscribe(subscribed.filter((item) => !isWanted(item)));
		const canRetry = (item) => problemOf(item).retry_after !== undefined || isFull(item);
		for (const item of failed) {
			if (!canRetry(item)) this.hooks.rejected(item, problemOf(item));
		}
		const waiting = failed.filter(canRetry);
		// Without room for one there is no room for the next.
		if (waiting.some(isFull)) waiting.push(...this.#queue.splice(0).flat());
		this.#waiting = updated(this.#waiting, waiting, []);
		if (waiting.length) this.hooks.overflow(waiting);
		for (const item of accepted) this.#active.add(keyOf(item));
		this.hooks.accepted(accepted);
		this.#subscribeNext();
	}
}

class EventTransport extends Transport {
	#sources = [];

	constructor(browser, hooks, list) {
		super(browser, hooks, list);
		this.#open();
	}

	update(added, removed) {
		this.list = updated(this.list, added, removed);
		this.close();
		this.#open();
	}

	close() {
		for (const source of this.#sources) source.close();
		this.#sources = [];
	}

	#open() {
		for (const group of groupSymbols(this.list, SYMBOLS_PER_STREAM)) this.#openSource(group);
	}

	#openSource(group) {
		const source = new this.browser.EventSource(this.#urlOf(group));
		this.#sources.push(source);
		let isOpen = false;
		this.hooks.subscribing?.(group);
		source.onopen = () => {
			isOpen = true;
			this.hooks.opened();
		};
		for (const type of ["snapshot", "update", "status", "heartbeat"]) {
			const receive = ({ data }) => this.hooks.message(JSON.parse(data));
			source.addEventListener(type, receive);
		}
		source.onerror = () => {
			source.close(); // the browser must not reconnect by itself
			this.#sources = this.#sources.filter((other) => other !== source);
			if (!isOpen && this.#sources.length) {
				this.hooks.overflow(group); // keep the other sources
			} else {
				this.close();
				this.hooks.lost(null, 0);
			}
		};
	}

	#urlOf(group) {
		const query = new URLSearchParams(optionsOf(group));
		const key = this.hooks.key();
		if (key) query.set("token", key);
		return `/stream/${group.map(({ symbol }) => pathOf(symbol)).join(",")}?${query}`;
	}
}

export class PollTransport extends Transport {
	#timer;
	#isClosed = false;

	constructor(browser, hooks, list) {
		super(browser, hooks, list);
		this.#poll();
	}

	get isIdle() {
		return !this.list.length;
	}

	update(added, removed) {
		this.list = updated(this.list, added, removed);
	}

	close() {
		this.#isClosed = true;
		this.browser.clearTimeout(this.#timer);
	}

	async #poll() {
		try {
			await this.hooks.poll(this.list);
		} catch (error) {
			if (this.#isClosed) return;
			this.close();
			this.hooks.lost(error.code ?? null, (error.retry_after ?? 0) * 1000);
			return;
		}
		if (this.#isClosed) return;
		this.opened();
		this.#timer = this.browser.setTimeout(() => this.#poll(), POLL_INTERVAL_MS);
	}
}

export const TRANSPORTS = { ws: SocketTransport, sse: EventTransport, poll: PollTransport };
