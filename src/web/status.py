"""The gateway's own state: `/exchanges`, `/health` and the gauges. Nothing here does any I/O."""

import math
import platform
from collections.abc import Sequence
from typing import Any

from config import EXCHANGES
from src.core import metrics
from src.core.circuit_breaker import STATES
from src.core.errors import Maintenance
from src.gateway import Gateway
from src.streams.feed import TRANSPORTS
from src.streams.hub import StreamHub
from src.streams.topics import CHANNELS

STATUSES = ("healthy", "degraded", "unhealthy")  # the worst last


def exchanges(gateway: Gateway, streams: StreamHub | None) -> dict[str, Any]:
    """Return the state of every known exchange (`documents.Exchanges`)."""
    return {name: _exchange(gateway, streams, name) for name in EXCHANGES}


def _exchange(gateway: Gateway, streams: StreamHub | None, name: str) -> dict[str, Any]:
    if name not in gateway.manager.names:
        return {"enabled": False}
    exchange = gateway.manager[name]
    breaker = exchange.breaker
    wait = breaker.retry_after
    retry_at = gateway.clock.time() + wait if 0 < wait < math.inf else None
    ratios = gateway.manager.limiter.used_ratios(name)
    document = {
        "enabled": True,
        "breaker": {
            "state": breaker.state,
            "cause": breaker.cause,
            "opened_at": _milliseconds(breaker.opened_at),
            "retry_at": _milliseconds(retry_at),
        },
        "last_success": _milliseconds(exchange.last_success),
        "budget_used_ratio": round(ratios["main"], 4),
        "in_flight": exchange.in_flight,
        "markets": {
            "count": gateway.markets.count(name),
            "loaded_at": _milliseconds(gateway.markets.loaded_at.get(name)),
            "error": gateway.loader.errors.get(name),
        },
    }
    if "futures" in ratios:
        document["futures_budget_used_ratio"] = round(ratios["futures"], 4)
    return document if streams is None else document | {"streams": _streams(streams, name)}


def _streams(streams: StreamHub, name: str) -> dict[str, Any]:
    sockets = streams.sockets_of(name)
    states = [state for state in streams.topics.values() if state.topic.exchange == name]
    return {
        "sockets": sum(socket.open_count for socket in sockets),
        "watched": sum(len(socket.watched) for socket in sockets),
        "stale": sum(state.live is False for state in states),
        "reconnects": sum(socket.reconnects for socket in sockets),
        "cause": next((socket.outage_cause for socket in sockets if socket.outage_cause), None),
    }


def health(gateway: Gateway, streams: StreamHub | None) -> dict[str, Any]:
    """Return the state of the gateway: `healthy`, `degraded` or `unhealthy`, and its parts.

    The gateway is unhealthy only if it cannot answer at all: without any market list, or with all
    breakers open and an empty cache.
    """
    names = gateway.manager.names
    parts = {
        "exchanges": _exchanges_part(gateway),
        "markets": _markets_part(gateway),
        "redis": _redis_part(gateway),
        "cache": _part("", "degraded", f"{len(gateway.cache.memory)} entries in memory"),
        "streams": _streams_part(streams, names),
    }
    now = gateway.clock.time()
    return {
        "status": max((part["status"] for part in parts.values()), key=STATUSES.index),
        "parts": parts,
        "exchanges": {name: gateway.manager[name].breaker.state for name in names},
        "timestamp": _milliseconds(now),
        "version": metrics.VERSION,
        "python": platform.python_version(),
        "uptime_seconds": round(now - gateway.started_at, 3),
    }


def _exchanges_part(gateway: Gateway) -> dict[str, str]:
    breakers = {name: gateway.manager[name].breaker for name in gateway.manager.names}
    faults = [
        f"{name} is {breaker.state} ({breaker.cause})"
        for name, breaker in breakers.items()
        if breaker.state != "closed"
    ]
    is_down = all(breaker.state == "open" for breaker in breakers.values())
    has_values = gateway.cache.memory.has_usable()
    return _part("; ".join(faults), "unhealthy" if is_down and not has_values else "degraded")


def _markets_part(gateway: Gateway) -> dict[str, str]:
    names = gateway.manager.names
    if not names:
        return _part("not loaded: no exchange is enabled", "unhealthy")
    loaded = gateway.markets.loaded_at
    missing = [name for name in names if name not in loaded]
    faults = [f"not loaded: {', '.join(missing)}"] if missing else []
    faults += [
        f"{name} is in maintenance" if code == Maintenance.code else f"old list of {name} ({code})"
        for name, code in gateway.loader.errors.items()
        if name in loaded
    ]
    return _part("; ".join(faults), "unhealthy" if len(missing) == len(names) else "degraded")


def _redis_part(gateway: Gateway) -> dict[str, str]:
    if not gateway.store.configured:
        return _part("", "degraded", "not configured: memory only")
    return _part("" if gateway.store.up else "does not answer", "degraded")


def _streams_part(streams: StreamHub | None, names: Sequence[str]) -> dict[str, str]:
    if streams is None:
        return _part("", "degraded", "off")
    faults = {  # several sockets may have the same fault
        f"{name} pushes no {socket.channel.name} ({socket.outage_cause})": None
        for name in names
        for socket in streams.sockets_of(name)
        if socket.outage_cause
    }
    counts = f"{len(streams.topics)} watched, {len(streams.connections)} clients"
    return _part("; ".join(faults), "degraded", counts)


def _part(fault: str, status: str, reason: str = "ok") -> dict[str, str]:
    """Return the state of a part: `status` because of `fault`, or healthy if that is empty."""
    return {"status": status if fault else "healthy", "reason": fault or reason}


def update_gauges(gateway: Gateway, streams: StreamHub | None) -> None:
    """Set the gauges that mirror a state, and add what is counted in plain numbers.

    Call it for each scrape.
    """
    metrics.flush()
    if streams is not None:
        _update_stream_gauges(streams, gateway.manager.names)
    metrics.cache_entries.set(len(gateway.cache.memory))
    metrics.cache_bytes.set(gateway.cache.memory.bytes)
    if gateway.store.configured:
        metrics.cache_tier_up.labels("redis").set(gateway.store.up)
    for task, succeeded_at in gateway.maintenance.items():
        metrics.maintenance_last_success_timestamp_seconds.labels(task).set(succeeded_at)
    for name in gateway.manager.names:
        exchange = gateway.manager[name]
        metrics.exchange_in_flight.labels(name).set(exchange.in_flight)
        for pool, ratio in gateway.manager.limiter.used_ratios(name).items():
            metrics.exchange_budget_used_ratio.labels(name, pool).set(ratio)
        metrics.exchange_markets.labels(name).set(gateway.markets.count(name))
        for state in STATES:
            metrics.circuit_state.labels(name, state).set(state == exchange.breaker.state)
        if exchange.last_success is not None:
            metrics.exchange_last_success_timestamp_seconds.labels(name).set(exchange.last_success)


def _update_stream_gauges(streams: StreamHub, names: Sequence[str]) -> None:
    for name in names:
        sockets = streams.sockets_of(name)
        states = [state for state in streams.topics.values() if state.topic.exchange == name]
        metrics.stream_stale.labels(name).set(_streams(streams, name)["stale"])
        for channel in CHANNELS.values():
            open_counts = (socket.open_count for socket in sockets if socket.channel is channel)
            watched = sum(state.topic.kind == channel.kind for state in states)
            metrics.stream_sockets.labels(name, channel.name).set(sum(open_counts))
            metrics.stream_watched.labels(name, channel.name).set(watched)
    for transport, count in subscribers(streams).items():
        metrics.stream_subscribers.labels(transport).set(count)


def subscribers(streams: StreamHub | None) -> dict[str, int]:
    """Return the number of connected streaming clients by transport."""
    transports = [connection.transport for connection in streams.connections] if streams else []
    return {name: transports.count(name) for name in TRANSPORTS}


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1000)
