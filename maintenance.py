"""Maintenance from cron, through the running gateway's HTTP API.

    python maintenance.py daily          forget our cache keys, close breakers (needs ADMIN_TOKEN)
    python maintenance.py status         say how the gateway is
    python maintenance.py check          settings valid, exchanges reachable, clocks in step
    python maintenance.py warm BTC-USDT  have these symbols cached

Exit codes: 0 all is well, 1 it failed or the gateway is unhealthy, 2 wrong usage or settings, 3 degraded (`status`).
`GATEWAY_URL` says where the gateway is. A success is noted as `virtuoso_maintenance_last_success_timestamp_seconds`.
"""

import argparse
import asyncio
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from config import ConfigError, Settings, load_settings
from src.core.clock import SystemClock
from src.core.errors import GatewayError
from src.exchanges.manager import ExchangeManager
from src.store.redis import RedisStore

OK, FAILED, USAGE, DEGRADED = 0, 1, 2, 3
TIMEOUT_SECONDS = 30
MAX_SKEW_SECONDS = 2.0  # more, and ages and candles of this machine are not to be trusted
BATCH = 100  # as many symbols as one request to the gateway may name


class GatewayAway(Exception):
    """The gateway did not answer, or refused; the text says what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one task; returns the exit code."""
    parser = argparse.ArgumentParser(description="Maintenance of a running gateway.")
    tasks = parser.add_subparsers(dest="task", required=True)
    for name in ("daily", "status", "check"):
        tasks.add_parser(name)
    tasks.add_parser("warm").add_argument("symbols", nargs="+", metavar="SYMBOL")
    options = parser.parse_args(arguments)
    try:
        settings = load_settings()
    except ConfigError as error:
        print(f"settings: {error}", file=sys.stderr)
        return USAGE
    try:
        if options.task == "daily":
            return daily(settings)
        if options.task == "status":
            return status(settings)
        return check(settings) if options.task == "check" else warm(settings, options.symbols)
    except GatewayAway as error:
        print(error, file=sys.stderr)
        return FAILED


def daily(settings: Settings) -> int:
    """Clear our cache keys and close the breakers but those of a ban, and note that it was done."""
    if not settings.admin_token.get_secret_value():
        print("daily needs ADMIN_TOKEN, the same as the gateway's", file=sys.stderr)
        return USAGE
    _, cleared = ask(settings, "/admin/cache/clear", "POST")
    _, reset = ask(settings, "/admin/breakers/reset?bans=keep", "POST")
    if cleared["cleared"] is None:
        print(f"cache: redis {cleared['redis']}", file=sys.stderr)
        return FAILED
    ask(settings, "/admin/maintenance/daily", "POST")
    print(f"cache: {cleared['cleared']} cleared, redis {cleared['redis']}")
    print(f"breakers closed: {', '.join(reset['reset']) or 'none was open'}")
    return OK


def status(settings: Settings) -> int:
    """Say how the gateway is, part by part."""
    _, health = ask(settings, "/health", accept=(200, 503))
    print(f"{health['status']}, version {health['version']}, up {health['uptime_seconds']:.0f} s")
    for name, part in health["parts"].items():
        print(f"  {name}: {part['status']} ({part['reason']})")
    return {"healthy": OK, "degraded": DEGRADED}.get(health["status"], FAILED)


def check(settings: Settings) -> int:
    """Ask each exchange for its time: that it is reachable from here, and that the clocks agree."""
    failures = asyncio.run(_check_exchanges(settings))
    if not failures:
        note(settings, "check")
    return FAILED if failures else OK


async def _check_exchanges(settings: Settings) -> int:
    clock, failures = SystemClock(), 0
    # A budget or a ban the gateway knows of holds here too.
    store = RedisStore(settings.redis_address, clock, settings.redis_timeout_seconds)
    manager = ExchangeManager(settings, store, clock)
    await manager.start()
    try:
        for name in manager.names:
            try:
                skew = await manager.clock_skew(name)
            except GatewayError as error:
                failures += 1
                print(error.detail, file=sys.stderr)
            else:
                wrong = abs(skew) > MAX_SKEW_SECONDS
                failures += wrong
                print(f"{name}: reachable, its clock is {skew:+.3f} s from ours{': set the clock' if wrong else ''}")
    finally:
        await manager.close()
        await store.close()
    return failures


def warm(settings: Settings, symbols: Sequence[str]) -> int:
    """Have the tickers of these symbols cached."""
    errors: dict[str, Any] = {}
    for start in range(0, len(symbols), BATCH):
        wanted = quote(",".join(symbols[start : start + BATCH]))
        _, answer = ask(settings, f"/tickers?symbols={wanted}")
        errors |= answer["errors"]
    for problem in errors.values():
        print(problem["detail"], file=sys.stderr)
    print(f"{len(symbols) - len(errors)} of {len(symbols)} symbols are cached")
    if not errors:
        note(settings, "warm")
    return FAILED if errors else OK


def note(settings: Settings, task: str) -> None:
    """Tell the gateway that a task succeeded, where its admin API is on."""
    if settings.admin_token.get_secret_value():
        ask(settings, f"/admin/maintenance/{task}", "POST")


def ask(settings: Settings, path: str, method: str = "GET", accept: Sequence[int] = (200,)) -> tuple[int, Any]:
    """Send one request to the gateway; returns status and document. Raises `GatewayAway`."""
    headers = {"Authorization": f"Bearer {settings.admin_token.get_secret_value()}"} if method == "POST" else {}
    if settings.api_keys:
        headers["X-API-Key"] = next(iter(settings.api_keys.values())).get_secret_value()
    request = urllib.request.Request(settings.gateway_url + path, method=method, headers=headers)  # noqa: S310 - checked
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:  # noqa: S310
            code, body = response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            code, body = error.code, error.read()
    except (urllib.error.URLError, OSError) as error:
        raise GatewayAway(f"the gateway does not answer at {settings.gateway_url}: {error}") from None
    try:
        document = json.loads(body)
    except ValueError:
        raise GatewayAway(f"what answers at {settings.gateway_url} is no gateway (status {code})") from None
    if code not in accept:
        raise GatewayAway(f"{path}: {document.get('detail', code)}")
    return code, document


if __name__ == "__main__":
    sys.exit(main())
