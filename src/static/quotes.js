// What is known of prices: the newest of each symbol on each exchange, how old it is, and how they compare.

import { basisPoints } from "./format.js";

const CLOCK_KEPT = 60_000; // milliseconds until a measurement gives way to the next

/** The gateway's clock: ages must be right where the viewer's own clock is wrong. */
export class GatewayClock {
	#now;
	#offset = 0;
	#until = -Infinity;

	constructor(now = Date.now) {
		this.#now = now;
	}

	/** Learn from a message the gateway says it sent then; of several the one that travelled fastest counts. */
	heard(sentAt) {
		const [now, offset] = [this.#now(), this.#now() - sentAt];
		if (now > this.#until || offset < this.#offset) {
			this.#offset = offset;
			this.#until = now + CLOCK_KEPT;
		}
	}

	/** UTC milliseconds. */
	now() {
		return this.#now() - this.#offset;
	}
}

/** The newest of one symbol on one exchange. */
class Quote {
	data = null; // as GET /ticker answers
	fetchedAt = 0; // UTC milliseconds
	silent = false; // its stream is stale: the exchange pushes nothing
	old = false; // the gateway served it past its time
	problem = null; // why there is no price, or no newer one
	direction = 0; // of the last move: 1 up, -1 down

	take(data, fetchedAt) {
		const moved = this.data === null ? 0 : Math.sign(data.last - this.data.last);
		const old = data.stale;
		Object.assign(this, { data, fetchedAt, old, problem: null, direction: moved || this.direction });
	}

	age(now) {
		return Math.max(0, now - this.fetchedAt);
	}

	/** Whether the price is stale. While a stream is silent the gateway asks by REST: what comes so is good for its time. */
	isStale(now, lifetime) {
		if (this.data === null || this.old) return this.old;
		return (this.silent || this.problem !== null || this.data.source === "rest") && this.age(now) > lifetime;
	}
}

/** All prices. */
export class Quotes {
	#symbols = new Map();
	#unlisted = new Set();

	/** The quotes of a symbol by exchange; empty while none is known. */
	of(symbol) {
		return this.#symbols.get(symbol) ?? new Map();
	}

	/** Take a message of /ws about a ticker: a value, or the state of its stream. */
	take(message) {
		const quote = this.#quote(message.symbol, message.exchange);
		if (message.type === "status") {
			quote.silent = message.state === "stale";
			if (quote.data === null && message.code) quote.problem = { code: message.code, title: "" };
		} else {
			quote.take(message.data, message.fetched_at);
		}
	}

	/** Forget what was said of these streams: who subscribes is told anew which are stale. */
	asked(wants) {
		for (const { symbol, exchange } of wants) {
			const quote = this.of(symbol).get(exchange);
			if (quote) quote.silent = false;
		}
	}

	/** Take what /tickers says: prices, and the problems of those that are not there. */
	takeAll({ tickers, errors }) {
		for (const [symbol, exchanges] of Object.entries(tickers)) {
			for (const [exchange, data] of Object.entries(exchanges)) {
				const quote = this.#quote(symbol, exchange);
				if (data.fetched_at >= quote.fetchedAt) quote.take(data, data.fetched_at); // a stream may be ahead
				this.#unlisted.delete(`${symbol}|${exchange}`);
			}
		}
		for (const [symbol, exchanges] of Object.entries(errors)) {
			for (const [exchange, problem] of Object.entries(exchanges)) this.fail(symbol, exchange, problem);
		}
	}

	/** Forget all exchanges but these: the others were switched off. */
	keep(exchanges) {
		for (const quotes of this.#symbols.values()) {
			for (const exchange of quotes.keys()) if (!exchanges.includes(exchange)) quotes.delete(exchange);
		}
	}

	/** Whether the exchange may have the symbol: it did not say the contrary. */
	isListed(symbol, exchange) {
		return !this.#unlisted.has(`${symbol}|${exchange}`);
	}

	/** Take why there is no price, or no newer one. */
	fail(symbol, exchange, problem) {
		if (["unknown_symbol", "malformed_request"].includes(problem.code)) {
			this.#unlisted.add(`${symbol}|${exchange}`);
			if (!this.of(symbol).get(exchange)?.data) return;
		}
		const quote = this.#quote(symbol, exchange);
		quote.problem = problem;
	}

	#quote(symbol, exchange) {
		if (!this.#symbols.has(symbol)) this.#symbols.set(symbol, new Map());
		const exchanges = this.#symbols.get(symbol);
		if (!exchanges.has(exchange)) exchanges.set(exchange, new Quote());
		return exchanges.get(exchange);
	}
}

function median(values) {
	const sorted = [...values].sort((one, other) => one - other);
	const middle = sorted.length >> 1;
	return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** Compare the prices of one symbol that are not stale.
 *
 * `apart` is the distance of the lowest and the highest last price, `crossed` by how much the best bid is above the best
 * ask, in basis points. `outliers` has the share by which a price differs from the median, or of two from the other, where
 * that is more than `ratio`; those are never best.
 */
export function compare(quotes, { now, lifetime, ratio }) {
	const fresh = [...quotes].filter(([, quote]) => quote.data && !quote.isStale(now, lifetime));
	const outliers = new Map();
	for (const [name, quote] of fresh.length > 1 ? fresh : []) {
		const measure = fresh.filter(([other]) => fresh.length > 2 || other !== name).map(([, other]) => other.data.last);
		const off = quote.data.last / median(measure) - 1;
		if (Math.abs(off) > ratio) outliers.set(name, off);
	}
	const isOff = (name) => outliers.has(name) && outliers.size < fresh.length; // of two it cannot be said which
	const best = (member, sign) => {
		const having = fresh.filter(([name, quote]) => quote.data[member] > 0 && (member === "last" || !isOff(name)));
		having.sort(([, one], [, other]) => sign * (one.data[member] - other.data[member]));
		return having.length ? { exchange: having[0][0], price: having[0][1].data[member] } : null;
	};
	const [bid, ask, low, high] = [best("bid", -1), best("ask", 1), best("last", 1), best("last", -1)];
	return {
		bid,
		ask,
		apart: fresh.length > 1 ? basisPoints(low.price, high.price) : null,
		crossed: fresh.length > 1 && bid && ask && bid.price > ask.price ? basisPoints(ask.price, bid.price) : null,
		outliers,
	};
}
