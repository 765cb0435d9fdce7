// How news are kept coming: over /ws; where that does not work as events; where that does not either, by asking.

import { LINKS, nameOf } from "./links.js";

const FIRST_PAUSE = 500; // milliseconds before the first try to connect again; doubled after each failure
const LONGEST_PAUSE = 10_000;
const STEADY = 10_000; // a connection that lasts so long makes up for failures before it
const SILENCE = 35_000; // without a message the connection is dead: the gateway says something every 15 s
const UPGRADE = 30_000; // how often /ws is tried again while something else stands in
const WAYS = ["ws", "sse", "poll"];

/** Keeps the page fed with what it wants, whatever happens to connections.
 *
 * Of the hooks `state` is called with {name, way, retryAt}: `connecting`, `live`, `reconnecting` (until then), `paused`, or
 * `refused` when another key is wanted; `message` with what comes; `refused` with a want that cannot be and its problem.
 * `poll(wants)` gets values by asking, and throws the problem when it cannot; `reachable()` tells whether the gateway answers.
 */
export class Feed {
	#browser;
	#hooks;
	#ways = WAYS;
	#wants = new Map();
	#way = 0; // which of the ways is in use
	#link = null;
	#extra = null; // asks for what the link cannot serve
	#probe = null; // tries /ws while something else stands in
	#timers = {};
	#failures = 0;
	#wasOpen = false;
	#runs = false;

	constructor(browser, hooks) {
		this.#browser = browser;
		this.#hooks = hooks;
	}

	/** Without streams of the gateway's there is nothing but asking. */
	set streaming(on) {
		this.#ways = on ? WAYS : ["poll"];
	}

	/** Want exactly this from now on. */
	watch(wants) {
		const next = new Map(wants.map((want) => [nameOf(want), want]));
		const gone = [...this.#wants].filter(([name]) => !next.has(name)).map(([, want]) => want);
		const added = [...next].filter(([name]) => !this.#wants.has(name)).map(([, want]) => want);
		this.#wants = next;
		if (!gone.length && !added.length) return;
		this.#spare(gone);
		this.#probe?.change(added, gone);
		this.#link?.change(added, gone);
	}

	/** Begin, or go on after a pause. */
	start() {
		if (this.#runs) return;
		this.#runs = true;
		this.#failures = 0;
		this.#connect();
	}

	/** Let go of everything until `start`. */
	stop(name = "paused") {
		this.#runs = false;
		this.#drop();
		this.#hooks.state({ name });
	}

	#connect() {
		this.#drop();
		const way = this.#ways[this.#way % this.#ways.length];
		if (this.#failures === 0) this.#hooks.state({ name: "connecting", way });
		this.#link = this.#open(way, {
			opened: () => this.#opened(way),
			lost: (code, wait) => this.#lost(code, wait),
		});
		if (way !== "poll") this.#watch();
		if (way === "sse" && !this.#wants.size) this.#opened(way); // there is nothing to listen to
		if (way !== "ws" && this.#ways.length > 1) this.#later("upgrade", UPGRADE, () => this.#tryUpgrade());
	}

	#open(way, { opened, lost }) {
		return new LINKS[way](this.#browser, { ...this.#hooks, ...this.#duties(), opened, lost }, [...this.#wants.values()]);
	}

	#duties() {
		return {
			message: (message) => {
				this.#watch();
				this.#hooks.message(message);
			},
			served: (wants) => this.#spare(wants),
			unserved: (wants) => {
				if (this.#extra) this.#extra.change(wants, []);
				else this.#openExtra(wants);
			},
		};
	}

	/** Cease to ask for these beside the link. */
	#spare(wants) {
		this.#extra?.change([], wants);
		if (!this.#extra?.isIdle) return;
		this.#extra.close();
		this.#extra = null;
	}

	/** Ask for what the link has no room for. */
	#openExtra(wants) {
		const lost = () => (this.#extra = null); // the link tells again what it has no room for
		this.#extra = new LINKS.poll(this.#browser, { ...this.#hooks, opened: () => {}, lost }, wants);
	}

	#opened(way) {
		if (!this.#wasOpen) this.#later("steady", STEADY, () => (this.#failures = 0));
		this.#wasOpen = true;
		this.#hooks.state({ name: "live", way });
	}

	/** See whether /ws works by now, beside what is in use. */
	#tryUpgrade() {
		const again = () => {
			this.#probe = null;
			this.#later("upgrade", UPGRADE, () => this.#tryUpgrade());
		};
		this.#probe = this.#open("ws", {
			opened: () => {
				const [link, old] = [this.#probe, this.#link];
				this.#probe = null;
				this.#way = 0;
				this.#link = link;
				old?.close();
				this.#opened("ws");
			},
			lost: (code, wait) => (this.#probe ? again() : this.#lost(code, wait)),
		});
	}

	async #lost(code, wait) {
		const had = this.#wasOpen;
		this.#drop();
		if (code === "unauthorized") {
			this.stop("refused");
			return;
		}
		this.#failures += 1;
		const longest = Math.min(FIRST_PAUSE * 2 ** (this.#failures - 1), LONGEST_PAUSE);
		const pause = Math.max(wait, longest * (0.5 + this.#browser.Math.random() / 2)); // or all pages come back at once
		this.#hooks.state({ name: "reconnecting", retryAt: this.#browser.Date.now() + pause });
		this.#later("retry", pause, () => this.#connect());
		// A way that never worked while the gateway answers is blocked, such as by a proxy: the next one.
		const way = this.#way;
		if (had) this.#way = 0;
		else if (wait && code !== "too_many_streams") this.#way = way; // it works, later
		else if ((await this.#hooks.reachable()) && this.#way === way && !this.#wasOpen) this.#way = (way + 1) % this.#ways.length;
	}

	/** Notice when nothing comes any more. */
	#watch() {
		this.#later("silence", SILENCE, () => (this.#wants.size ? this.#lost(null, 0) : this.#watch()));
	}

	#later(name, milliseconds, work) {
		this.#browser.clearTimeout(this.#timers[name]);
		this.#timers[name] = this.#browser.setTimeout(work, milliseconds);
	}

	#drop() {
		for (const timer of Object.values(this.#timers)) this.#browser.clearTimeout(timer);
		for (const link of [this.#link, this.#extra, this.#probe]) link?.close();
		this.#link = this.#extra = this.#probe = null;
		this.#wasOpen = false;
	}
}
