// Keeps market data coming: over /ws, else server-sent events, else polling.

import { PollTransport, TRANSPORTS, keyOf } from "./transports.js";

const RETRY_INITIAL_MS = 500; // doubled after each failure
const RETRY_MAX_MS = 10_000;
const STABLE_MS = 10_000; // then the retry delay is reset
const SILENCE_MS = 35_000; // then it is dead: heartbeats come every 15 s
const UPGRADE_INTERVAL_MS = 30_000; // between attempts to use /ws
const ORDER = ["ws", "sse", "poll"];

/** Serves subscriptions and recovers from lost connections.
 *
 * Hooks besides those of transports.js: key() returns the API key or "". state({name, transport,
 * retryAt}) gets connecting, live, reconnecting, paused or refused. poll(list) fetches the data of
 * subscriptions or throws a problem. isReachable() resolves to true if the gateway responds.
 */
export class Connection {
	#browser;
	#hooks;
	#order = ORDER;
	#list = new Map();
	#position = 0; // in #order
	#transport = null;
	#overflow = null; // polls what has no room in the transport
	#probe = null; // tries /ws beside the transport
	#timers = {};
	#failures = 0;
	#wasOpen = false;
	#isRunning = false;

	constructor(browser, hooks) {
		this.#browser = browser;
		this.#hooks = hooks;
	}

	set streaming(isOn) {
		this.#order = isOn ? ORDER : ["poll"];
	}

	subscribe(list) {
		const next = new Map(list.map((item) => [keyOf(item), item]));
		const removed = [...this.#list.values()].filter((item) => !next.has(keyOf(item)));
		const added = [...next.values()].filter((item) => !this.#list.has(keyOf(item)));
		this.#list = next;
		if (!removed.length && !added.length) return;
		this.#stopPolling(removed);
		this.#probe?.update(added, removed);
		this.#transport?.update(added, removed);
	}

	start() {
		if (this.#isRunning) return;
		this.#isRunning = true;
		this.#failures = 0;
		this.#connect();
	}

	stop(name = "paused") {
		this.#isRunning = false;
		this.#reset();
		this.#hooks.state({ name });
	}

	#connect() {
		this.#reset();
		const name = this.#order[this.#position % this.#order.length];
		if (this.#failures === 0) this.#hooks.state({ name: "connecting", transport: name });
		this.#transport = this.#open(name, {
			opened: () => this.#opened(name),
			lost: (code, wait) => this.#lost(code, wait),
		});
		if (name !== "poll") this.#restartSilenceTimer();
		if (name === "sse" && !this.#list.size) this.#opened(name);
		if (name !== "ws" && this.#order.length > 1) this.#scheduleUpgrade();
	}

	#open(name, hooks) {
		const shared = {
			...this.#hooks,
			message: (message) => {
				this.#restartSilenceTimer();
				this.#hooks.message(message);
			},
			accepted: (list) => this.#stopPolling(list),
			overflow: (list) => this.#startPolling(list),
		};
		const list = [...this.#list.values()];
		return new TRANSPORTS[name](this.#browser, { ...shared, ...hooks }, list);
	}

	#startPolling(list) {
		if (this.#overflow) {
			this.#overflow.update(list, []);
			return;
		}
		const lost = () => {
			this.#overflow = null; // will be reported again
		};
		const hooks = { ...this.#hooks, opened: () => {}, lost };
		this.#overflow = new PollTransport(this.#browser, hooks, list);
	}

	#stopPolling(list) {
		this.#overflow?.update([], list);
		if (!this.#overflow?.isIdle) return;
		this.#overflow.close();
		this.#overflow = null;
	}

	#opened(name) {
		const forgive = () => {
			this.#failures = 0;
		};
		if (!this.#wasOpen) this.#setTimer("stable", STABLE_MS, forgive);
		this.#wasOpen = true;
		this.#hooks.state({ name: "live", transport: name });
	}

	#scheduleUpgrade() {
		this.#setTimer("upgrade", UPGRADE_INTERVAL_MS, () => this.#tryUpgrade());
	}

	/** Try /ws beside the current transport, and switch when /ws delivers data. */
	#tryUpgrade() {
		this.#probe = this.#open("ws", {
			opened: () => {
				this.#transport?.close();
				this.#transport = this.#probe;
				this.#probe = null;
				this.#position = 0;
				this.#opened("ws");
			},
			lost: (code, wait) => {
				if (this.#probe) {
					this.#probe = null;
					this.#scheduleUpgrade();
				} else {
					this.#lost(code, wait);
				}
			},
		});
	}

	async #lost(code, wait) {
		const wasOpen = this.#wasOpen;
		const position = this.#position;
		this.#reset();
		if (code === "unauthorized") {
			this.stop("refused");
			return;
		}
		this.#failures += 1;
		const longest = Math.min(RETRY_INITIAL_MS * 2 ** (this.#failures - 1), RETRY_MAX_MS);
		const jitter = 0.5 + this.#browser.Math.random() / 2; // spreads reconnects
		const delay = Math.max(wait, longest * jitter);
		this.#hooks.state({ name: "reconnecting", retryAt: this.#browser.Date.now() + delay });
		this.#setTimer("retry", delay, () => this.#connect());
		if (wasOpen) {
			this.#position = 0;
			return;
		}
		if (wait && code !== "too_many_streams") return; // retry this transport
		// A proxy may block a transport that never worked while the gateway responds.
		const isReachable = await this.#hooks.isReachable();
		if (isReachable && this.#position === position && !this.#wasOpen) {
			this.#position = (position + 1) % this.#order.length;
		}
	}

	#restartSilenceTimer() {
		this.#setTimer("silence", SILENCE_MS, () => {
			if (this.#list.size) this.#lost(null, 0);
			else this.#restartSilenceTimer();
		});
	}

	#setTimer(name, milliseconds, action) {
		this.#browser.clearTimeout(this.#timers[name]);
		this.#timers[name] = this.#browser.setTimeout(action, milliseconds);
	}

	#reset() {
		for (const timer of Object.values(this.#timers)) this.#browser.clearTimeout(timer);
		for (const open of [this.#transport, this.#overflow, this.#probe]) open?.close();
		this.#transport = null;
		this.#overflow = null;
		this.#probe = null;
		this.#wasOpen = false;
	}
}
