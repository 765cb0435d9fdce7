"""A simple gateway for comparison: FastAPI, a dict with a TTL, Redis behind it, ccxt for misses.

It has no request coalescing, budget, breaker or freshness headers. FastAPI encodes each response
again.
"""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import ccxt.async_support as ccxt
from cachetools import TTLCache
from fastapi import FastAPI, HTTPException, Query
from redis.asyncio import Redis

TTL_SECONDS = 3600
MAX_ENTRIES = 1000
FIELDS = (
    "symbol", "timestamp", "datetime", "last", "close", "bid", "bidVolume", "ask", "askVolume",
    "open", "high", "low", "vwap", "previousClose", "change", "percentage", "average",
    "baseVolume", "quoteVolume", "markPrice", "indexPrice",
)  # fmt: skip

cache: TTLCache[str, dict[str, Any]] = TTLCache(MAX_ENTRIES, TTL_SECONDS)
redis = Redis.from_url(os.environ.get("BENCH_REDIS", "redis://localhost"))
exchanges: dict[str, Any] = {}


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Create the client of the exchange, and close it and Redis at the end."""
    bybit = ccxt.bybit({"options": {"fetchMarkets": {"types": ["spot"]}}})
    bybit.urls["api"] = dict.fromkeys(bybit.urls["api"], os.environ["BYBIT_REST_URL"])
    exchanges["bybit"] = bybit
    yield
    await bybit.close()
    await redis.aclose()


app = FastAPI(lifespan=lifespan)


@app.get("/ticker/{symbol:path}")
async def get_ticker(
    symbol: str,
    exchange: Annotated[str, Query(max_length=32)] = "bybit",
    max_age: Annotated[float | None, Query(ge=0, le=86400, allow_inf_nan=False)] = None,
) -> dict[str, Any]:
    """Return the ticker from the dict, from Redis or from the exchange."""
    symbol = symbol.upper().replace("-", "/")
    key = f"ticker:{exchange}:{symbol}"
    if max_age != 0:
        if key in cache:
            return cache[key]
        if stored := await redis.get(key):
            cache[key] = json.loads(stored)
            return cache[key]
    if exchange not in exchanges:
        raise HTTPException(404, "unknown exchange")
    try:
        raw = await exchanges[exchange].fetch_ticker(symbol)
    except ccxt.BadSymbol:
        raise HTTPException(404, "unknown symbol") from None
    except ccxt.BaseError as error:
        raise HTTPException(502, str(error)) from error
    ticker = {"exchange": exchange, **{field: raw[field] for field in FIELDS}}
    cache[key] = ticker
    await redis.set(key, json.dumps(ticker), ex=TTL_SECONDS)
    return ticker
