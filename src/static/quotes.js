// The newest prices by symbol and exchange, their age and comparison.

import { basisPoints } from "./format.js";

const OFFSET_LIFETIME_MS = 60_000; // of a measured clock offset
const NOT_LISTED_CODES = ["unknown_symbol", "malformed_request"];

/** The gateway's clock in UTC milliseconds. The viewer's clock may be wrong. */
export class GatewayClock {
	#localNow;
	#offset = 0;
	#expiresAt = -Infinity;

	constructor(localNow = Date.now) {
		this.#localNow = localNow;
	}

	/** Measure the offset by a message. The message with the least delay wins. */
	synchronize(sentAt) {
		const now = this.#localNow();
		const offset = now - sentAt;
		if (now > this.#expiresAt || offset < this.#offset) {
			this.#offset = offset;
			this.#expiresAt = now + OFFSET_LIFETIME_MS;
		}
	}

	now() {
		return this.#localNow() - this.#offset;
	}
}

class Quote {
	data = null;
	fetchedAt = 0; // UTC milliseconds
	isSilent = false; // the exchange pushes no updates
	isServedStale = false; // marked by the gateway
	problem = null; // why there is no newer price
	direction = 0; // of the last price change: 1 up, -1 down

	update(data, fetchedAt) {
		const change = this.data === null ? 0 : Math.sign(data.last - this.data.last);
		if (change) this.direction = change;
		this.data = data;
		this.fetchedAt = fetchedAt;
		this.isServedStale = data.stale;
		this.problem = null;
	}

	age(now) {
		return Math.max(0, now - this.fetchedAt);
	}

	/** Return true if the price is stale. Only prices without a live stream expire. */
	isStale(now, lifetime) {
		if (this.data === null || this.isServedStale) return this.isServedStale;
		const canExpire = this.isSilent || this.problem !== null || this.data.source === "rest";
		return canExpire && this.age(now) > lifetime;
	}
}

export class Quotes {
	#symbols = new Map();
	#unlisted = new Set();

	of(symbol) {
		return this.#symbols.get(symbol) ?? new Map();
	}

	update(message) {
		const quote = this.#quote(message.symbol, message.exchange);
		if (message.type === "status") {
			quote.isSilent = message.state === "stale";
			const isUnexplained = quote.data === null && message.code;
			if (isUnexplained) quote.problem = { code: message.code, title: "" };
		} else {
			quote.update(message.data, message.fetched_at);
		}
	}

	/** Reset before a subscription: the gateway reports stale feeds again. */
	resetSilence(subscriptions) {
		for (const { symbol, exchange } of subscriptions) {
			const quote = this.of(symbol).get(exchange);
			if (quote) quote.isSilent = false;
		}
	}

	/** Apply a response of /tickers. Streamed data may be newer. */
	updateAll({ tickers, errors }) {
		for (const [symbol, exchanges] of Object.entries(tickers)) {
			for (const [exchange, data] of Object.entries(exchanges)) {
				const quote = this.#quote(symbol, exchange);
				if (data.fetched_at >= quote.fetchedAt) quote.update(data, data.fetched_at);
				this.#unlisted.delete(`${symbol}|${exchange}`);
			}
		}
		for (const [symbol, exchanges] of Object.entries(errors)) {
			for (const [exchange, problem] of Object.entries(exchanges)) {
				this.setProblem(symbol, exchange, problem);
			}
		}
	}

	retainExchanges(exchanges) {
		for (const quotes of this.#symbols.values()) {
			for (const exchange of quotes.keys()) {
				if (!exchanges.includes(exchange)) quotes.delete(exchange);
			}
		}
	}

	isListed(symbol, exchange) {
		return !this.#unlisted.has(`${symbol}|${exchange}`);
	}

	setProblem(symbol, exchange, problem) {
		if (NOT_LISTED_CODES.includes(problem.code)) {
			this.#unlisted.add(`${symbol}|${exchange}`);
			if (!this.of(symbol).get(exchange)?.data) return;
		}
		this.#quote(symbol, exchange).problem = problem;
	}

	#quote(symbol, exchange) {
		if (!this.#symbols.has(symbol)) this.#symbols.set(symbol, new Map());
		const quotes = this.#symbols.get(symbol);
		if (!quotes.has(exchange)) quotes.set(exchange, new Quote());
		return quotes.get(exchange);
	}
}

function median(values) {
	const sorted = [...values].sort((left, right) => left - right);
	const middle = sorted.length >> 1;
	return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** Find prices that differ by more than `ratio` from the median, or from the other of two. */
function findOutliers(fresh, ratio) {
	const outliers = new Map();
	if (fresh.length < 2) return outliers;
	for (const [name, quote] of fresh) {
		const others = fresh.filter(([other]) => fresh.length > 2 || other !== name);
		const deviation = quote.data.last / median(others.map(([, other]) => other.data.last)) - 1;
		if (Math.abs(deviation) > ratio) outliers.set(name, deviation);
	}
	return outliers;
}

/** Compare the prices of one symbol that are not stale.
 *
 * `rangeBp`: distance of the lowest and highest last price. `crossedBp`: how far the best bid is
 * above the best ask. `outliers`: deviations by exchange. An outlier is never best, unless all are:
 * of two, either may be wrong.
 */
export function compare(quotes, { now, lifetime, ratio }) {
	const valid = [...quotes].filter(([, quote]) => quote.data && !quote.isStale(now, lifetime));
	const outliers = findOutliers(valid, ratio);
	const trusted = valid.filter(([name]) => !outliers.has(name));
	const candidates = trusted.length ? trusted : valid;
	const best = (member, sign) => {
		const priced = candidates.filter(([, { data }]) => data[member] > 0);
		priced.sort(([, left], [, right]) => sign * (left.data[member] - right.data[member]));
		return priced.length ? { exchange: priced[0][0], price: priced[0][1].data[member] } : null;
	};
	const bid = best("bid", -1);
	const ask = best("ask", 1);
	const lasts = valid.map(([, { data }]) => data.last).filter((last) => last > 0);
	const isCrossed = valid.length > 1 && bid && ask && bid.price > ask.price;
	return {
		bid,
		ask,
		rangeBp: valid.length > 1 ? basisPoints(Math.min(...lasts), Math.max(...lasts)) : null,
		crossedBp: isCrossed ? basisPoints(ask.price, bid.price) : null,
		outliers,
	};
}
