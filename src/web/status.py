"""What the gateway says of itself: `/exchanges`, `/health` and the gauges. Nothing here asks anybody."""

import math
import platform
from collections.abc import Sequence
from typing import Any

from config import EXCHANGES
from src.core import metrics
from src.core.circuit_breaker import STATES
from src.gateway import Gateway
from src.streams.feed import NAMES, TRANSPORTS
from src.streams.hub import StreamHub


def exchanges(gateway: Gateway, streams: StreamHub | None) -> dict[str, Any]:
    """Describe every known exchange as it is now."""
    names, described = gateway.manager.names, dict[str, Any]()
    for name in EXCHANGES:
        described[name] = {"enabled": name in names} | (_exchange(gateway, name) if name in names else {})
        if streams is not None and name in names:
            described[name]["streams"] = _streams(streams, name)
    return described


def _streams(streams: StreamHub, name: str) -> dict[str, Any]:
    """Tell what of an exchange is watched, and how that goes; `cause` is why nothing is pushed, until something is."""
    upstreams = streams.of(name)
    return {
        "sockets": sum(upstream.sockets for upstream in upstreams),
        "watched": sum(len(upstream.watched) for upstream in upstreams),
        "stale": sum(watched.live is False for watched in streams.topics.values() if watched.topic.exchange == name),
        "reconnects": sum(upstream.reconnects for upstream in upstreams),
        "cause": next((upstream.trouble for upstream in upstreams if upstream.trouble), None),
    }


def _exchange(gateway: Gateway, name: str) -> dict[str, Any]:
    exchange, markets = gateway.manager[name], gateway.markets
    breaker, wait = exchange.breaker, exchange.breaker.retry_after
    return {
        "breaker": {
            "state": breaker.state,
            "cause": breaker.cause,
            "opened_at": _ms(breaker.opened_at),
            "retry_at": _ms(gateway.clock.time() + wait) if 0 < wait < math.inf else None,
        },
        "last_success": _ms(exchange.last_success),
        "budget_used_ratio": round(gateway.manager.limiter.used_ratio(name), 4),
        "in_flight": exchange.in_flight,
        "markets": {
            "count": markets.count(name),
            "loaded_at": _ms(markets.loaded_at.get(name)),
            "error": gateway.loader.errors.get(name),
        },
    }


def health(gateway: Gateway, streams: StreamHub | None) -> dict[str, Any]:
    """Tell how the gateway is: `healthy`, `degraded` or `unhealthy`, with a reason for each part.

    Unhealthy is only what cannot answer at all: no list to know symbols by, or every exchange off and no value kept.
    """
    names = gateway.manager.names
    breakers = {name: gateway.manager[name].breaker for name in names}
    states = {name: breaker.state for name, breaker in breakers.items()}
    tripped = [f"{name} is {state} ({breakers[name].cause})" for name, state in states.items() if state != "closed"]
    unloaded = [name for name in names if name not in gateway.markets.loaded_at]
    all_open, kept = all(state == "open" for state in states.values()), len(gateway.cache)
    redis = "" if gateway.store.up or not gateway.store.configured else "does not answer"
    lost = [] if streams is None else [one for name in names for one in streams.of(name) if one.trouble]
    silent = dict.fromkeys(f"{one.exchange} pushes no {NAMES[one.kind]} ({one.trouble})" for one in lost)
    parts = {
        "exchanges": _part(
            "; ".join(tripped), "unhealthy" if all_open and not gateway.cache.memory.has_any() else "degraded"
        ),
        "markets": _part(
            f"not loaded: {', '.join(unloaded) or 'no exchange is enabled'}" if unloaded or not names else "",
            "unhealthy" if len(unloaded) == len(names) else "degraded",
        ),
        "redis": _part(redis, "degraded", "ok" if gateway.store.configured else "not configured: memory only"),
        "cache": _part("", "degraded", f"{kept} entries in memory"),
        "streams": _part(
            "; ".join(silent),
            "degraded",
            "off" if streams is None else f"{len(streams.topics)} watched, {len(streams.subscribers)} clients",
        ),
    }
    statuses = {part["status"] for part in parts.values()}
    return {
        "status": next(status for status in ("unhealthy", "degraded", "healthy") if status in statuses),
        "parts": parts,
        "exchanges": states,
        "timestamp": _ms(gateway.clock.time()),
        "version": metrics.VERSION,
        "python": platform.python_version(),
        "uptime_seconds": round(gateway.clock.time() - gateway.started_at, 3),
    }


def update_gauges(gateway: Gateway, streams: StreamHub | None) -> None:
    """Set the gauges that mirror a state, for a scrape."""
    if streams is not None:
        _update_stream_gauges(streams, gateway.manager.names)
    metrics.cache_entries.set(len(gateway.cache))
    if gateway.store.configured:
        metrics.cache_tier_up.labels("redis").set(gateway.store.up)
    for task in metrics.TASKS:
        if task in gateway.maintenance:
            metrics.maintenance_last_success_timestamp_seconds.labels(task).set(gateway.maintenance[task])
    for name in gateway.manager.names:
        exchange = gateway.manager[name]
        metrics.exchange_in_flight.labels(name).set(exchange.in_flight)
        metrics.exchange_budget_used_ratio.labels(name).set(gateway.manager.limiter.used_ratio(name))
        metrics.exchange_markets.labels(name).set(gateway.markets.count(name))
        state = exchange.breaker.state
        for known in STATES:
            metrics.circuit_state.labels(name, known).set(known == state)
        if exchange.last_success is not None:
            metrics.exchange_last_success_timestamp_seconds.labels(name).set(exchange.last_success)


def _update_stream_gauges(streams: StreamHub, names: Sequence[str]) -> None:
    for name in names:
        watched = [one for one in streams.topics.values() if one.topic.exchange == name]
        metrics.stream_stale.labels(name).set(sum(one.live is False for one in watched))
        for kind, channel in NAMES.items():
            sockets = sum(upstream.sockets for upstream in streams.of(name) if upstream.kind == kind)
            metrics.stream_sockets.labels(name, channel).set(sockets)
            metrics.stream_watched.labels(name, channel).set(sum(one.topic.kind == kind for one in watched))
    for transport in TRANSPORTS:
        count = sum(subscriber.transport == transport for subscriber in streams.subscribers)
        metrics.stream_subscribers.labels(transport).set(count)


def _part(fault: str, status: str, fine: str = "ok") -> dict[str, str]:
    return {"status": status if fault else "healthy", "reason": fault or fine}


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1000)
