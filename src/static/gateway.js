// The gateway view: exchanges, cache, errors, and what an operator has to do.

import { el, listing, mark, panel, write } from "./dom.js";
import { countdown, duration, rate, share, time } from "./format.js";

const BUDGET_TIGHT = 0.8; // share of a budget from which it is said, as the alert does
const RUNBOOK = "docs/runbook.md";

const STATES = {
	closed: "closed: calls go through",
	half_open: "half-open: one call tries",
	open: "open: it is not asked",
};
const CAUSES = {
	timeout: "it did not answer in time",
	unavailable: "it cannot be reached",
	error: "it answers with errors",
	bad_data: "its answers are implausible",
	rate_limited: "it told this address to slow down",
	banned: "it banned this address",
	geo_blocked: "it refuses this location",
	forced: "it was opened by hand",
};
const HEALTH = { healthy: "All well", degraded: "Degraded", unhealthy: "Unhealthy" };

const causeOf = (cause) => CAUSES[cause] ?? cause ?? "unknown";

function adviceOnBreaker(name, { state, cause }) {
	if (state === "closed") return null;
	const setting = name.toUpperCase();
	const words = {
		geo_blocked: `${name} refuses the gateway's location: set HTTPS_PROXY, or ${setting}_ENABLED=false.`,
		banned: `${name} banned this address: wait, then lower ${setting}_BUDGET, and look who else asks from here.`,
		rate_limited: `${name} told us to slow down, and is left alone. If that comes again, lower ${setting}_BUDGET.`,
		forced: `The breaker of ${name} was opened by hand, and stays so until POST /admin/breakers/reset.`,
	};
	const text = `${name} fails: ${causeOf(cause)}. It is tried again by itself.`;
	const next = `${name} failed: ${causeOf(cause)}. A request, or the gateway itself, is about to try it again.`;
	return [state === "half_open" ? next : (words[cause] ?? text), "virtuosocircuitopen"];
}

function adviceOn(name, { breaker, markets, streams, budget_used_ratio: used }) {
	const list = [];
	const onBreaker = adviceOnBreaker(name, breaker);
	if (onBreaker) list.push(onBreaker);
	if (markets.error || !markets.count) {
		list.push([`The market list of ${name} is not loaded (${markets.error ?? "not yet"}). It is tried again by itself.`, "exchange-errors"]);
	}
	if (streams && (streams.cause || streams.stale > streams.watched / 2) && !onBreaker) {
		const cause = streams.cause ?? `${streams.stale} of ${streams.watched} streams stale`;
		list.push([`${name} pushes nothing (${cause}): prices come by REST, every 2 s at best.`, "virtuosostreamstale"]);
	}
	if (used >= BUDGET_TIGHT) {
		list.push([`${share(used)} of ${name}'s budget is used: when it is spent, ${name} is not asked.`, "virtuosobudgetnearlyspent"]);
	}
	return list;
}

/** What an operator has to do now, as [words, anchor in the runbook], the worst first. */
export function advice({ exchanges, health }) {
	const enabled = Object.entries(exchanges).filter(([, exchange]) => exchange.enabled);
	const list = [];
	if (enabled.length && enabled.every(([, { breaker }]) => breaker.state === "open")) {
		list.push(["No exchange is asked: look at this machine's network first.", "virtuosoallcircuitsopen"]);
	}
	list.push(...enabled.flatMap(([name, exchange]) => adviceOn(name, exchange)));
	if (health.parts.redis.status !== "healthy") {
		list.push(["Redis does not answer: replicas share nothing, and a restart begins cold.", "virtuosoredisdown"]);
	}
	return list;
}

/** The pill of the page's head: [state, words]. */
export function summary({ exchanges, health }) {
	const reasons = Object.entries(exchanges).flatMap(([name, { enabled, breaker, streams }]) => {
		if (enabled && breaker.state !== "closed") return [`${name} circuit ${breaker.state.replace("_", "-")}`];
		return streams?.cause ? [`${name} stream stale`] : [];
	});
	for (const name of ["markets", "redis"]) {
		if (health.parts[name].status !== "healthy") reasons.push(`${name} ${health.parts[name].reason}`);
	}
	return [health.status, [HEALTH[health.status] ?? health.status, reasons.join(", ")].filter(Boolean).join(": ")];
}

function streamOf({ streams }) {
	if (!streams) return "REST only: streaming is off";
	if (streams.cause) return `REST: nothing is pushed (${streams.cause})`;
	if (!streams.watched) return "REST: this replica holds no stream";
	const stale = streams.stale ? `, ${streams.stale} of them stale` : "";
	return `stream, ${streams.watched} watched${stale}`;
}

class Facts {
	list = el("dl");
	#places = new Map();

	show(values) {
		for (const [term, text] of Object.entries(values)) {
			if (!this.#places.has(term)) {
				this.#places.set(term, el("dd", { "data-fact": term }));
				this.list.append(el("div", {}, el("dt", {}, term), this.#places.get(term)));
			}
			write(this.#places.get(term), String(text));
		}
	}
}

class Card {
	constructor(name) {
		this.state = el("b", { class: "state" });
		this.cause = el("p", { class: "cause" });
		this.meter = el("meter", { min: "0", max: "1", low: "0.6", high: String(BUDGET_TIGHT), optimum: "0", "aria-label": `Budget of ${name} used` });
		this.facts = new Facts();
		this.box = el("article", { class: "panel card", "data-exchange": name, "aria-label": name });
		this.box.append(el("h2", {}, name), el("p", {}, "Breaker ", this.state), this.cause, this.meter, this.facts.list);
	}

	show(exchange, now) {
		mark(this.box, "data-state", exchange.enabled ? exchange.breaker.state : "off");
		if (!exchange.enabled) {
			write(this.state, "off: not enabled");
			return;
		}
		const { breaker, markets } = exchange;
		write(this.state, STATES[breaker.state] ?? breaker.state);
		const next = breaker.retry_at ? `; next try in ${countdown((breaker.retry_at - now) / 1000)}` : "";
		write(this.cause, breaker.state === "closed" ? "" : `${causeOf(breaker.cause)}${next}`);
		this.meter.value = exchange.budget_used_ratio;
		const success = exchange.last_success;
		this.facts.show({
			"budget used": share(exchange.budget_used_ratio),
			"prices come by": streamOf(exchange),
			"last call that worked": success ? `${duration((now - success) / 1000)} ago`.replace("now ago", "now") : "none yet",
			markets: markets.error ? `${markets.count}, ${markets.error}` : markets.count,
			"calls under way": exchange.in_flight,
		});
	}
}

/** The view. `page` knows what the gateway said last. */
export class GatewayView {
	constructor(page, place) {
		this.page = page;
		this.cards = new Map();
		this.doing = el("ul", { class: "doing" });
		this.grid = el("div", { class: "cards" });
		[this.tiers, this.service, this.parts] = [new Facts(), new Facts(), new Facts()];
		this.errors = listing("Errors of the last ten minutes", ["Where", "What", "How often"]);
		this.links = el("p", { class: "links" });
		this.window = el("small");
		const figures = [
			panel("", ["Answers came from ", this.window], this.tiers.list),
			panel("", ["Service"], this.service.list),
			panel("", ["Errors ", el("small", {}, "of the last ten minutes")], this.errors.table),
			panel("", ["Parts"], this.parts.list),
		];
		place.replaceChildren(
			el("div", { class: "bar" }, el("h1", {}, "Gateway"), this.links),
			panel("wide", ["What to do"], this.doing),
			this.grid,
			el("div", { class: "cards" }, ...figures),
		);
	}

	show({ now, live }) {
		const { told } = this.page;
		if (!told) return;
		for (const [name, exchange] of Object.entries(told.exchanges)) {
			if (!this.cards.has(name)) {
				this.cards.set(name, new Card(name));
				this.grid.append(this.cards.get(name).box);
			}
			this.cards.get(name).show(exchange, now);
		}
		this.#showAge(now, live);
		if (told === this.shown && live === this.wasLive) return;
		Object.assign(this, { shown: told, wasLive: live });
		this.#showService(told);
		this.#showErrors(told.recent_errors);
		this.#showDoing(live ? advice(told) : [["No connection to the gateway: look at its process, its log, the network.", "virtuosotargetdown"]]);
		this.#showLinks(told.grafana_url);
		this.parts.show(Object.fromEntries(Object.entries(told.health.parts).map(([name, { reason }]) => [name, reason])));
	}

	#showAge(now, live) {
		const age = (now - this.page.told.generated_at) / 1000;
		write(this.window, live && age < 15 ? "in the last minute" : `as of ${time(this.page.told.generated_at)}: not live`);
	}

	#showService({ cache, service, health, version }) {
		const { memory_hit_ratio: memory, redis_hit_ratio: redis } = cache;
		const rest = memory === null ? null : Math.max(0, 1 - memory - redis);
		this.tiers.show({ memory: share(memory), redis: share(redis), "exchanges, or errors": share(rest), "served stale": share(cache.stale_ratio) });
		const { ws, sse } = service.subscribers;
		this.service.show({
			"requests a second": rate(service.requests_per_second),
			"updates a second": rate(service.updates_per_second),
			"mean age served": service.served_age_seconds === null ? "nothing was served" : `${rate(service.served_age_seconds)} s`,
			"requests under way": service.in_flight,
			subscribers: `${ws} WebSocket, ${sse} events`,
			"entries in memory": cache.entries,
			"up for": duration(health.uptime_seconds),
			version,
		});
	}

	#showErrors({ answers, exchanges }) {
		const rows = Object.entries(exchanges).flatMap(([name, kinds]) =>
			Object.entries(kinds).map(([kind, count]) => [`calls to ${name}`, kind.replaceAll("_", " "), String(count)]),
		);
		for (const [status, count] of Object.entries(answers)) rows.push(["answers", `status ${status}`, String(count)]);
		if (!rows.length) rows.push(["none", "", ""]);
		this.errors.rows.show(rows);
	}

	#showDoing(list) {
		const items = list.map(([words, anchor]) => el("li", {}, `${words} `, el("code", {}, `${RUNBOOK}#${anchor}`)));
		if (!items.length) items.push(el("li", {}, "Nothing: all exchanges answer."));
		if (write(this.doing, items.map((item) => item.textContent).join("\n"))) this.doing.replaceChildren(...items);
	}

	#showLinks(url) {
		if (this.links.childElementCount || !/^https?:\/\//.test(url)) return;
		for (const name of ["service", "cache", "exchanges"]) {
			this.links.append(el("a", { href: `${url}/d/virtuoso-${name}`, rel: "noreferrer", target: "_blank" }, `Grafana: ${name} ↗`));
		}
	}
}
