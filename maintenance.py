"""Maintenance tasks for cron, which use the HTTP API of the running gateway.

    python maintenance.py daily          clear the cache and reset the breakers (needs ADMIN_TOKEN)
    python maintenance.py status         print the health of the gateway
    python maintenance.py check          check settings, exchanges and clocks
    python maintenance.py check --deep   also compare an answer of every kind with known shapes
    python maintenance.py warm BTC-USDT  load the tickers of these symbols into the cache

Exit codes: 0 success, 1 failure or unhealthy gateway, 2 wrong usage or settings, 3 degraded
(`status` only). GATEWAY_URL is the address of the gateway. The time of the last success is the
metric `virtuoso_maintenance_last_success_timestamp_seconds`.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from operator import methodcaller
from typing import Any
from urllib.parse import quote

import aiohttp

from config import ConfigError, Settings, load_settings
from src.core.clock import SystemClock
from src.core.errors import BudgetSpent, GatewayError
from src.core.metrics import TASKS
from src.exchanges.ccxt_client import record_answers
from src.exchanges.drift import Difference, compare
from src.exchanges.http_client import MAX_MARKETS_BYTES, Answer
from src.exchanges.manager import ExchangeCall, ExchangeManager, keep
from src.kinds import fetch, shared_key
from src.store.redis import RedisStore

OK, FAILED, USAGE, DEGRADED = 0, 1, 2, 3  # exit codes
MAX_SKEW_SECONDS = 2.0  # with a larger difference, ages and candles are wrong
MAX_SYMBOLS = 100  # per request
# Kinds of data that `check --deep` requests, with their parameters.
DEEP_KINDS: dict[str, tuple[Any, ...]] = {
    "ticker": (),
    "orderbook": (50,),
    "ohlcv": ("1h", 10, None),
    "trades": (50,),
}
DEEP_SYMBOLS = {"BTC/USDT", "BTC/USDT:USDT"}  # if the exchange lists them
MAX_ATTEMPTS = 10  # of one request; each waits until the budget admits the request

Request = Callable[[], Awaitable[Any]]


class GatewayRequestError(Exception):
    """The gateway did not answer or refused the request. The text says what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one task and return the exit code."""
    tasks: Any = {"daily": daily, "status": status, "check": check, "warm": warm}
    parser = argparse.ArgumentParser(description="Maintenance of a running gateway.")
    parsers = parser.add_subparsers(dest="task", required=True)
    task_parsers = {name: parsers.add_parser(name) for name in tasks}
    task_parsers["warm"].add_argument("symbols", nargs="+", metavar="SYMBOL")
    task_parsers["check"].add_argument("--deep", action="store_true")
    options = vars(parser.parse_args(arguments))
    task = options.pop("task")
    name = "deep_check" if options.get("deep") else task
    try:
        return asyncio.run(_run(name, partial(tasks[task], **options)))
    except (ConfigError, GatewayRequestError) as error:
        print(error, file=sys.stderr)
        return USAGE if isinstance(error, ConfigError) else FAILED


async def _run(name: str, task: Callable[[Settings], Awaitable[int]]) -> int:
    """Run a task, and record its success in the gateway, if the admin API is enabled."""
    settings = load_settings()
    exit_code = await task(settings)
    if exit_code == OK and name in TASKS and settings.admin_token.get_secret_value():
        await request(settings, f"/admin/maintenance/{name}", "POST")
    return exit_code


async def daily(settings: Settings) -> int:
    """Clear the cache, and reset all breakers except those of banned exchanges."""
    if not settings.admin_token.get_secret_value():
        raise ConfigError("ADMIN_TOKEN is not set: set it to the gateway's ADMIN_TOKEN")
    cache = await request(settings, "/admin/cache/clear", "POST")
    breakers = await request(settings, "/admin/breakers/reset?bans=keep", "POST")
    if cache["cleared"] is None:
        raise GatewayRequestError(f"cache: redis {cache['redis']}")
    print(f"cache: {cache['cleared']} cleared, redis {cache['redis']}")
    print(f"breakers closed: {', '.join(breakers['reset']) or 'none was open'}")
    return OK


async def status(settings: Settings) -> int:
    """Print the health of the gateway and its parts."""
    health = await request(settings, "/health", accept=(200, 503))
    print(f"{health['status']}, version {health['version']}, up {health['uptime_seconds']:.0f} s")
    for name, part in health["parts"].items():
        print(f"  {name}: {part['status']} ({part['reason']})")
    return {"healthy": OK, "degraded": DEGRADED}.get(health["status"], FAILED)


async def check(settings: Settings, *, deep: bool) -> int:
    """Check that each exchange is reachable and that its clock agrees with this machine's.

    With `deep`, also check an answer of every kind.
    """
    clock = SystemClock()
    # Redis has the budgets and bans that the gateway knows. They apply to this process, too.
    store = RedisStore(settings.redis_address, clock, settings.redis_timeout_seconds)
    manager = ExchangeManager(settings, store, clock)
    await manager.start()
    try:
        results = [await _check_exchange(manager, name) for name in manager.names]
        if deep:
            results += [await _check_answers(manager, name) for name in manager.names]
    finally:
        await manager.close()
        await store.close()
    return max(results)


async def _check_exchange(manager: ExchangeManager, name: str) -> int:
    """Print the result for one exchange."""
    try:
        skew = await manager.clock_skew(name)
    except GatewayError as error:
        print(error.detail, file=sys.stderr)
        return FAILED
    is_wrong = abs(skew) > MAX_SKEW_SECONDS
    advice = ": set the clock" if is_wrong else ""
    print(f"{name}: reachable, its clock differs by {skew:+.3f} s{advice}")
    return FAILED if is_wrong else OK


async def _check_answers(manager: ExchangeManager, name: str) -> int:
    """Request one of everything by REST. Print how the answers differ from `shapes.json`."""
    client = manager[name].client
    answers = record_answers(client)
    response = Answer(max_bytes=MAX_MARKETS_BYTES)
    load = ExchangeCall(name, "markets", methodcaller("load_markets"), keep, answer=response)
    problems = [await _attempt(partial(manager.call, load))]
    for symbol in DEEP_SYMBOLS & (client.markets or {}).keys():
        keys = [shared_key(name, kind, symbol, params) for kind, params in DEEP_KINDS.items()]
        requests: list[Request] = [partial(fetch, manager, key) for key in keys]
        requests.append(partial(manager.tickers, name, [symbol]))
        problems += [await _attempt(request) for request in requests]
    differences: dict[Difference, None] = {}
    for url, body in answers:
        with suppress(ValueError):  # a body that is not JSON is a problem already
            differences |= dict.fromkeys(compare(name, url, json.loads(body)))
    problems += [difference.text for difference in differences if difference.is_breaking]
    problems = [problem for problem in problems if problem]
    unused = [difference.text for difference in differences if not difference.is_breaking]
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    print(*(f"{text} (not used)" for text in unused), sep="\n", end="\n" if unused else "")
    print(f"{name}: {len(answers)} answers, {len(problems)} problems")
    return FAILED if problems else OK


async def _attempt(request: Request) -> str:
    """Make a request, and wait for the budget if needed. Return the problem, if there is one."""
    for _ in range(MAX_ATTEMPTS):
        try:
            await request()
        except BudgetSpent as error:
            await asyncio.sleep(error.retry_after or 1)
        except GatewayError as error:
            return error.detail
        else:
            return ""
    return "the budget is spent"


async def warm(settings: Settings, symbols: Sequence[str]) -> int:
    """Load the tickers of the symbols into the cache."""
    errors: dict[str, Any] = {}
    for start in range(0, len(symbols), MAX_SYMBOLS):
        batch = quote(",".join(symbols[start : start + MAX_SYMBOLS]))
        errors |= (await request(settings, f"/tickers?symbols={batch}"))["errors"]
    for problem in errors.values():
        print(problem["detail"], file=sys.stderr)
    print(f"{len(symbols) - len(errors)} of {len(symbols)} symbols are cached")
    return FAILED if errors else OK


async def request(
    settings: Settings, path: str, method: str = "GET", accept: Sequence[int] = (200,)
) -> Any:
    """Send one request to the gateway and return the JSON document of its answer.

    Raises `GatewayRequestError` without an answer, and for a status that is not in `accept`.
    """
    url = settings.gateway_url
    headers = {}
    if method == "POST":
        headers["Authorization"] = f"Bearer {settings.admin_token.get_secret_value()}"
    if settings.api_keys:
        headers["X-API-Key"] = next(iter(settings.api_keys.values())).get_secret_value()
    timeout = aiohttp.ClientTimeout(total=30)
    try:
        async with aiohttp.request(method, url + path, headers=headers, timeout=timeout) as answer:
            document = await answer.json(content_type=None)
    except (OSError, aiohttp.ClientError) as error:
        raise GatewayRequestError(f"the gateway does not answer at {url}: {error!r}") from None
    except ValueError:
        message = f"the server at {url} is not a gateway (status {answer.status})"
        raise GatewayRequestError(message) from None
    if answer.status not in accept:
        raise GatewayRequestError(f"{path}: {document.get('detail', answer.status)}")
    return document


if __name__ == "__main__":
    sys.exit(main())
