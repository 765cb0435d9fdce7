// The page's addresses: #, #gateway, #BTC-USDT, #BTC-USDT/kraken/30m.

export const MAX_SYMBOL_LENGTH = 40;

export const toSymbol = (text) => text.toUpperCase().replace("-", "/");

export const addressOf = (symbol) => `#${symbol.replace("/", "-")}`;

/** Parse the URL's fragment. An exchange of "" means any. */
export function readAddress() {
	let text = location.hash.slice(1);
	try {
		text = decodeURIComponent(text);
	} catch {
		// Use the text as it is.
	}
	if (text === "gateway") return { view: "gateway" };
	const [symbol, exchange = "any", timeframe = "1m"] = text.split("/");
	if (["", "market", "main"].includes(text) || !symbol.trim()) return { view: "market" };
	return {
		view: "symbol",
		symbol: toSymbol(symbol.slice(0, MAX_SYMBOL_LENGTH)),
		exchange: exchange === "any" ? "" : exchange,
		timeframe,
	};
}
