// Fetches a ticker, an order book and an error with the types from openapi-typescript (schema.ts).
import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

declare const process: { argv: string[] };
const client = createClient<paths>({ baseUrl: process.argv[2] ?? "" });

const ticker = await client.GET("/ticker/{symbol}", { params: { path: { symbol: "BTC-USDT" } } });
const book = await client.GET("/orderbook/{symbol}", {
  params: { path: { symbol: "BTC/USDT" }, query: { limit: 5 } },
});
const unlisted = await client.GET("/ticker/{symbol}", { params: { path: { symbol: "BTC-USTD" } } });
if (!ticker.data || !book.data || !unlisted.error) {
  throw new Error("expected a ticker, an order book and an error");
}
const price: number = ticker.data.price;
const bids: number[][] = book.data.bids;
const problem: components["schemas"]["Problem"] = unlisted.error;
const code: "unknown_symbol" | null = problem.code === "unknown_symbol" ? problem.code : null;
console.log(JSON.stringify({ price, bids, code, suggestions: problem.suggestions ?? [] }));
