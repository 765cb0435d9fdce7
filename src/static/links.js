// The three ways news come: over /ws, as server-sent events, by asking. What belongs to the browser is handed in.

const PING = 25_000; // milliseconds between asking for the gateway's clock; it keeps an empty watch list connected, too
const POLL = 2_000; // between two questions where nothing can be pushed
const AGAIN = 15_000; // between two tries to subscribe to what there was no room for
const AT_ONCE = 100; // symbols in one event stream
const IN_COMMAND = 30; // symbols in one command: each that fails counts as a message, and 50 at once are allowed

/** Names a want: {channel, symbol, exchange, levels}, as /ws takes them. */
export const nameOf = ({ channel, symbol, exchange = "", levels = 0 }) => [channel, symbol, exchange, levels].join("|");

export const pathOf = (symbol) => encodeURIComponent(symbol.replace("/", "-"));

function chunks(list, size) {
	return Array.from({ length: Math.ceil(list.length / size) }, (_, at) => list.slice(at * size, (at + 1) * size));
}

/** Groups wants that differ only in their symbol, up to `size` of them. */
function grouped(wants, size) {
	const groups = new Map();
	for (const want of wants) {
		const name = nameOf({ ...want, symbol: "" });
		groups.set(name, [...(groups.get(name) ?? []), want]);
	}
	return [...groups.values()].flatMap((group) => chunks(group, size));
}

function command(op, id, wants) {
	const { channel, exchange, levels } = wants[0];
	const symbols = wants.map(({ symbol }) => symbol);
	return { op, id, channel, symbols, ...(exchange && { exchange }), ...(levels && { levels }) };
}

/** The wants after some were added and others have gone. */
function changed(wants, added, gone) {
	const names = new Set([...gone, ...added].map(nameOf));
	return [...wants.filter((want) => !names.has(nameOf(want))), ...added];
}

// A link is one way in use. It calls `opened` with its first news, `message` with each, and at its end `lost`, with the code of
// the error that was told and the milliseconds to wait; of wants `asked` with those it subscribes to, `served` with those that
// come, `unserved` with those without room, `refused` with one that cannot be. After `close` it calls nothing.

class SocketLink {
	#socket;
	#browser;
	#hooks;
	#wants;
	#queue = []; // groups of wants to subscribe to, one command after the other
	#asking = null; // the group whose answer is awaited
	#served = new Set(); // names of wants
	#left = []; // wants without room
	#id = 0;
	#timers = [];
	#code = null;
	#wait = 0;
	#isOpen = false;

	constructor(browser, hooks, wants) {
		this.#browser = browser;
		this.#hooks = hooks;
		this.#wants = wants;
		const key = hooks.key();
		const base = browser.location.origin.replace(/^http/, "ws");
		this.#socket = new browser.WebSocket(`${base}/ws${key ? `?token=${encodeURIComponent(key)}` : ""}`);
		this.#socket.onopen = () => {
			this.#send({ op: "ping" });
			this.#timers.push(browser.setInterval(() => this.#send({ op: "ping" }), PING));
			this.#timers.push(browser.setInterval(() => this.change(this.#left.slice(0, IN_COMMAND), []), AGAIN));
			this.change(this.#wants, []);
		};
		this.#socket.onmessage = ({ data }) => this.#hear(JSON.parse(data));
		this.#socket.onclose = () => {
			this.close();
			hooks.lost(this.#code, this.#wait);
		};
	}

	change(added, gone) {
		this.#wants = changed(this.#wants, added, gone);
		this.#left = changed(this.#left, [], [...added, ...gone]);
		if (this.#socket.readyState !== 1) return; // all that is wanted then is asked for when it opens
		this.#end(gone.filter((want) => this.#served.delete(nameOf(want))));
		this.#queue = this.#queue.map((group) => changed(group, [], gone)).filter((group) => group.length);
		this.#queue.push(...grouped(added, IN_COMMAND));
		this.#next();
	}

	#end(wants) {
		for (const group of grouped(wants, IN_COMMAND)) this.#send(command("unsubscribe", null, group));
	}

	/** Subscribe to the next group when the one before is settled. */
	#next() {
		if (this.#asking || !this.#queue.length) return;
		this.#asking = this.#queue.shift();
		this.#hooks.asked?.(this.#asking);
		this.#send(command("subscribe", ++this.#id, this.#asking));
	}

	close() {
		for (const timer of this.#timers) this.#browser.clearInterval(timer);
		Object.assign(this.#socket, { onopen: null, onmessage: null, onclose: null });
		this.#socket.close();
	}

	#send(message) {
		if (this.#socket.readyState === 1) this.#socket.send(JSON.stringify(message));
	}

	#hear(message) {
		if (message.type === "error" || message.type === "subscribed") this.#settle(message);
		if (message.type !== "error" && !this.#isOpen) {
			this.#isOpen = true;
			this.#hooks.opened();
		}
		this.#hooks.message(message);
	}

	/** Look whether something could not be subscribed to. Where there is no room for one, none is left for the next. */
	#settle(message) {
		if (message.id !== this.#id || !this.#asking) {
			this.#code = message.code;
			this.#wait = (message.retry_after ?? 0) * 1000;
			return;
		}
		const [names, asked] = [new Set(this.#wants.map(nameOf)), this.#asking];
		const wants = asked.filter((want) => names.has(nameOf(want)));
		this.#asking = null;
		const problemOf = ({ symbol }) => (message.type === "error" ? message : message.errors[symbol]);
		const isFull = (problem) => problem.retry_after !== undefined || problem.code.startsWith("too_many_");
		const refused = wants.filter(problemOf);
		const full = refused.filter((want) => isFull(problemOf(want)));
		for (const want of refused) if (!full.includes(want)) this.#hooks.refused(want, problemOf(want));
		const isNoRoom = full.some((want) => problemOf(want).code.startsWith("too_many_"));
		const left = isNoRoom ? [...full, ...this.#queue.splice(0).flat()] : full;
		this.#left = changed(this.#left, left, []);
		if (left.length) this.#hooks.unserved(left);
		const served = wants.filter((want) => !refused.includes(want));
		for (const want of served) this.#served.add(nameOf(want));
		this.#hooks.served(served);
		this.#end(asked.filter((want) => !wants.includes(want) && !problemOf(want)));
		this.#next();
	}
}

class EventLink {
	#browser;
	#hooks;
	#sources = [];
	#wants;

	constructor(browser, hooks, wants) {
		this.#browser = browser;
		this.#hooks = hooks;
		this.#wants = wants;
		this.#open();
	}

	change(added, gone) {
		this.#wants = changed(this.#wants, added, gone);
		this.close();
		this.#open();
	}

	close() {
		for (const source of this.#sources) source.close();
		this.#sources = [];
	}

	#open() {
		for (const group of grouped(this.#wants, AT_ONCE)) this.#listen(group);
	}

	#listen(wants) {
		const { channel, exchange, levels } = wants[0];
		const query = new URLSearchParams({ channel, ...(exchange && { exchange }), ...(levels && { levels }) });
		if (this.#hooks.key()) query.set("token", this.#hooks.key());
		const path = wants.map(({ symbol }) => pathOf(symbol)).join(",");
		const source = new this.#browser.EventSource(`/stream/${path}?${query}`);
		this.#sources.push(source);
		let isOpen = false;
		this.#hooks.asked?.(wants);
		source.onopen = () => {
			isOpen = true;
			this.#hooks.opened();
		};
		for (const kind of ["snapshot", "update", "status", "heartbeat"]) {
			source.addEventListener(kind, ({ data }) => this.#hooks.message(JSON.parse(data)));
		}
		source.onerror = () => {
			source.close(); // it would go on by itself; the pauses are ours, and so is what stands in
			this.#sources = this.#sources.filter((one) => one !== source);
			if (!isOpen && this.#sources.length) {
				this.#hooks.unserved(wants); // a group that was refused takes no other with it
			} else {
				this.close();
				this.#hooks.lost(null, 0);
			}
		};
	}
}

class PollLink {
	#browser;
	#hooks;
	#wants;
	#timer;
	#closed = false;
	#isOpen = false;

	constructor(browser, hooks, wants) {
		this.#browser = browser;
		this.#hooks = hooks;
		this.#wants = wants;
		this.#run();
	}

	get isIdle() {
		return !this.#wants.length;
	}

	change(added, gone) {
		this.#wants = changed(this.#wants, added, gone);
	}

	close() {
		this.#closed = true;
		this.#browser.clearTimeout(this.#timer);
	}

	async #run() {
		try {
			await this.#hooks.poll(this.#wants);
		} catch (error) {
			if (!this.#closed) {
				this.close();
				this.#hooks.lost(error.code ?? null, (error.retry_after ?? 0) * 1000);
			}
			return;
		}
		if (this.#closed) return;
		if (!this.#isOpen) {
			this.#isOpen = true;
			this.#hooks.opened();
		}
		this.#timer = this.#browser.setTimeout(() => this.#run(), POLL);
	}
}

export const LINKS = { ws: SocketLink, sse: EventLink, poll: PollLink };
