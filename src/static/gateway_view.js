// The gateway view: exchanges, cache, errors, advice.

import { el, figuresTable, panel, setAttr, setText } from "./dom.js";
import { countdown, duration, rate, share, time } from "./format.js";

const HOUR_SECONDS = 3600;
const BUDGET_WARNING = 0.8; // as in the alert VirtuosoBudgetNearlySpent
const STATUS_LIFETIME_SECONDS = 15;
const RUNBOOK = "docs/runbook.md";
const DISCONNECTED = [
	"No connection to the gateway: check its process, log and network.",
	"virtuosotargetdown",
];

const BREAKER_STATES = {
	closed: "closed: requests pass",
	half_open: "half-open: one trial request",
	open: "open: no requests",
};
const CAUSES = {
	timeout: "no response in time",
	unavailable: "no connection",
	error: "error responses",
	bad_data: "implausible data",
	rate_limited: "rate limit exceeded",
	banned: "this IP address is banned",
	geo_blocked: "this location is blocked",
	forced: "opened manually",
};
const HEALTH = { healthy: "Healthy", degraded: "Degraded", unhealthy: "Unhealthy" };

const causeText = (cause) => CAUSES[cause] ?? cause ?? "unknown";

function breakerAdvice(name, { state, cause }) {
	const setting = name.toUpperCase();
	const limit = `lower ${setting}_BUDGET`;
	const texts = {
		geo_blocked: `${name} blocks this location: set HTTPS_PROXY, or ${setting}_ENABLED=false.`,
		banned: `${name} banned this IP address: wait, ${limit}, and check who else uses it.`,
		rate_limited: `${name} limits our request rate. If this happens again, ${limit}.`,
		forced: `The breaker of ${name} was opened manually. POST /admin/breakers/reset closes it.`,
	};
	if (state === "half_open") return `${name} failed: ${causeText(cause)}. It is tried again.`;
	return texts[cause] ?? `${name} fails: ${causeText(cause)}. The gateway retries automatically.`;
}

function exchangeAdvice(name, { breaker, markets, streams, budget_used_ratio: used }) {
	const list = [];
	const isClosed = breaker.state === "closed";
	if (!isClosed) list.push([breakerAdvice(name, breaker), "virtuosocircuitopen"]);
	if (markets.error || !markets.count) {
		const reason = markets.error ?? "not yet";
		const text = `The market list of ${name} is not loaded (${reason}). The gateway retries.`;
		list.push([text, "exchange-errors"]);
	}
	if (streams && isClosed && (streams.cause || streams.stale > streams.watched / 2)) {
		const cause = streams.cause ?? `${streams.stale} of ${streams.watched} streams stale`;
		const text = `${name} pushes no updates (${cause}). REST replaces them, every 2 s at best.`;
		list.push([text, "virtuosostreamstale"]);
	}
	if (used >= BUDGET_WARNING) {
		const text = `${share(used)} of ${name}'s budget is used. Requests stop at 100 %.`;
		list.push([text, "virtuosobudgetnearlyspent"]);
	}
	return list;
}

/** Return advice to operators as [text, anchor in the runbook], worst first. */
export function advice({ exchanges, health }) {
	const enabled = Object.entries(exchanges).filter(([, exchange]) => exchange.enabled);
	const list = [];
	if (enabled.length && enabled.every(([, { breaker }]) => breaker.state === "open")) {
		list.push(["No exchange is used: check the network first.", "virtuosoallcircuitsopen"]);
	}
	list.push(...enabled.flatMap(([name, exchange]) => exchangeAdvice(name, exchange)));
	if (health.parts.redis.status !== "healthy") {
		const text = "Redis is down: replicas share nothing, and a restart empties the cache.";
		list.push([text, "virtuosoredisdown"]);
	}
	return list;
}

/** Return the health as [state, text]. */
export function summary({ exchanges, health }) {
	const reasons = [];
	for (const [name, { enabled, breaker, streams }] of Object.entries(exchanges)) {
		if (enabled && breaker.state !== "closed") {
			reasons.push(`${name} circuit ${breaker.state.replace("_", "-")}`);
		} else if (streams?.cause) {
			reasons.push(`${name} stream stale`);
		}
	}
	for (const name of ["markets", "redis"]) {
		const { status, reason } = health.parts[name];
		if (status !== "healthy") reasons.push(`${name} ${reason}`);
	}
	const text = HEALTH[health.status] ?? health.status;
	return [health.status, reasons.length ? `${text}: ${reasons.join(", ")}` : text];
}

function priceSource({ streams }) {
	if (!streams) return "REST only: streaming is off";
	if (streams.cause) return `REST: no updates are pushed (${streams.cause})`;
	if (!streams.watched) return "REST: this replica has no stream";
	return `stream, ${streams.watched} watched${streams.stale ? `, ${streams.stale} stale` : ""}`;
}

function savings({ saved, requests, window_seconds: seconds }) {
	const period = seconds < HOUR_SECONDS ? duration(Math.max(1, seconds)) : "hour";
	return `${saved} of ${requests} in the last ${period}`;
}

class Facts {
	list = el("dl");
	#values = new Map();

	show(values) {
		for (const [term, text] of Object.entries(values)) {
			if (!this.#values.has(term)) this.#add(term);
			setText(this.#values.get(term), String(text));
		}
	}

	#add(term) {
		const value = el("dd", { "data-fact": term });
		this.#values.set(term, value);
		this.list.append(el("div", {}, el("dt", {}, term), value));
	}
}

class Card {
	constructor(name) {
		const label = `Budget of ${name} used`;
		const levels = {
			min: "0",
			max: "1",
			low: "0.6",
			high: String(BUDGET_WARNING),
			optimum: "0",
		};
		this.state = el("b.state");
		this.cause = el("p.cause");
		this.meter = el("meter", { ...levels, "aria-label": label });
		this.facts = new Facts();
		this.element = el(
			"article.panel.card",
			{ "data-exchange": name, "aria-label": name },
			el("h2", {}, name),
			el("p", {}, "Breaker ", this.state),
			this.cause,
			this.meter,
			this.facts.list,
		);
	}

	show(exchange, now) {
		const { breaker, markets, last_success: success } = exchange;
		setAttr(this.element, "data-state", exchange.enabled ? breaker.state : "off");
		if (!exchange.enabled) {
			setText(this.state, "off: not enabled");
			return;
		}
		const { retry_at: retryAt } = breaker;
		const retry = retryAt ? `; next try in ${countdown((retryAt - now) / 1000)}` : "";
		const age = duration((now - success) / 1000);
		setText(this.state, BREAKER_STATES[breaker.state] ?? breaker.state);
		setText(
			this.cause,
			breaker.state === "closed" ? "" : `${causeText(breaker.cause)}${retry}`,
		);
		this.meter.value = exchange.budget_used_ratio;
		this.facts.show({
			"budget used": share(exchange.budget_used_ratio),
			"price source": priceSource(exchange),
			"last success": success ? `${age} ago`.replace("now ago", "now") : "none yet",
			markets: markets.error ? `${markets.count}, ${markets.error}` : markets.count,
			"calls in flight": exchange.in_flight,
		});
	}
}

export class GatewayView {
	constructor(page, section) {
		this.page = page;
		this.cards = new Map();
		this.actions = el("ul.actions");
		this.grid = el("div.cards");
		this.tiers = new Facts();
		this.service = new Facts();
		this.parts = new Facts();
		const columns = ["Source", "Error", "Count"];
		this.errors = figuresTable("Errors of the last ten minutes", columns);
		this.links = el("p.links");
		this.window = el("small");
		const errorsHeading = ["Errors ", el("small", {}, "in the last ten minutes")];
		section.replaceChildren(
			el("div.bar", {}, el("h1", {}, "Gateway"), this.links),
			panel("wide", ["What to do"], this.actions),
			this.grid,
			el(
				"div.cards",
				{},
				panel("", ["Served from ", this.window], this.tiers.list),
				panel("", ["Service"], this.service.list),
				panel("", errorsHeading, this.errors.table),
				panel("", ["Parts"], this.parts.list),
			),
		);
	}

	show({ now, isLive }) {
		const { status } = this.page;
		if (!status) return;
		this.#showExchanges(status.exchanges, now);
		this.#showAge(status.generated_at, now, isLive);
		if (status === this.shown && isLive === this.wasLive) return;
		this.shown = status;
		this.wasLive = isLive;
		this.#showTiers(status.cache);
		this.#showService(status);
		this.#showErrors(status.recent_errors);
		this.#showActions(isLive ? advice(status) : [DISCONNECTED]);
		this.#showLinks(status.grafana_url);
		const parts = Object.entries(status.health.parts);
		this.parts.show(Object.fromEntries(parts.map(([name, { reason }]) => [name, reason])));
	}

	#showExchanges(exchanges, now) {
		for (const [name, exchange] of Object.entries(exchanges)) {
			if (!this.cards.has(name)) {
				const card = new Card(name);
				this.cards.set(name, card);
				this.grid.append(card.element);
			}
			this.cards.get(name).show(exchange, now);
		}
	}

	#showAge(generatedAt, now, isLive) {
		const isNew = isLive && (now - generatedAt) / 1000 < STATUS_LIFETIME_SECONDS;
		setText(this.window, isNew ? "in the last minute" : `as of ${time(generatedAt)}: not live`);
	}

	#showTiers({ memory_hit_ratio: memory, redis_hit_ratio: redis, stale_ratio: stale }) {
		const rest = memory === null ? null : Math.max(0, 1 - memory - redis);
		this.tiers.show({
			memory: share(memory),
			redis: share(redis),
			"exchanges or errors": share(rest),
			"served stale": share(stale),
		});
	}

	#showService({ cache, service, saved, health, version }) {
		const { ws, sse } = service.subscribers;
		const age = service.served_age_seconds;
		this.service.show({
			"requests per second": rate(service.requests_per_second),
			"updates per second": rate(service.updates_per_second),
			"calls saved": savings(saved),
			"mean age served": age === null ? "none served" : `${rate(age)} s`,
			"requests in flight": service.in_flight,
			subscribers: `${ws} WebSocket, ${sse} SSE`,
			"entries in memory": cache.entries,
			uptime: duration(health.uptime_seconds),
			version,
		});
	}

	#showErrors({ answers, exchanges }) {
		const rows = [];
		for (const [name, errors] of Object.entries(exchanges)) {
			for (const [error, count] of Object.entries(errors)) {
				rows.push([`calls to ${name}`, error.replaceAll("_", " "), String(count)]);
			}
		}
		for (const [status, count] of Object.entries(answers)) {
			rows.push(["responses", `status ${status}`, String(count)]);
		}
		if (!rows.length) rows.push(["none", "", ""]);
		this.errors.rows.show(rows);
	}

	#showActions(list) {
		const items = list.map(([text, anchor]) =>
			el("li", {}, `${text} `, el("code", {}, `${RUNBOOK}#${anchor}`)),
		);
		if (!items.length) items.push(el("li", {}, "Nothing: all exchanges respond."));
		const text = items.map((item) => item.textContent).join("\n");
		if (setText(this.actions, text)) this.actions.replaceChildren(...items);
	}

	#showLinks(url) {
		if (this.links.childElementCount || !/^https?:\/\//.test(url)) return;
		for (const name of ["service", "cache", "exchanges"]) {
			const target = { rel: "noreferrer", target: "_blank" };
			const href = `${url}/d/virtuoso-${name}`;
			this.links.append(el("a", { href, ...target }, `Grafana: ${name} ↗`));
		}
	}
}
