// The watch list and, until the tab is closed, the API key.

import { MAX_SYMBOL_LENGTH } from "./address.js";

export const MAX_WATCHED = 100; // symbols in one request
const WATCH_LIST = ["localStorage", "virtuoso.watch"];
const API_KEY = ["sessionStorage", "virtuoso.key"];

/** Return a stored text or null. Store `value` first, if given. Null removes the text. */
function stored([storage, name], value) {
	try {
		if (value === null) window[storage].removeItem(name);
		else if (value !== undefined) window[storage].setItem(name, value);
		return window[storage].getItem(name);
	} catch {
		return null; // the browser blocks its storage
	}
}

/** Return the stored symbols: [] if the user removed all, null if nothing is stored. */
export function readWatchList() {
	const text = stored(WATCH_LIST);
	if (!text) return text === null ? null : [];
	const symbols = text.split(" ").filter((item) => item && item.length <= MAX_SYMBOL_LENGTH);
	return symbols.length ? [...new Set(symbols)].slice(0, MAX_WATCHED) : null;
}

export const writeWatchList = (symbols) => stored(WATCH_LIST, symbols && symbols.join(" "));
export const readKey = () => stored(API_KEY) ?? "";
export const writeKey = (key) => stored(API_KEY, key);
