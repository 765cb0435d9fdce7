"""What the scripts of the clients have in common: arguments, and the outcomes of calls as JSON.

The scripts run in environments without the packages of the project.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

Call = Callable[[], Any]
Outcome = dict[str, Any]
"""`result`, or the name of the exception's class as `error` and its text as `message`."""


def argument() -> Any:
    """Return the only argument of the script, which is JSON."""
    return json.loads(sys.argv[1])


def selected(calls: Mapping[str, Call], names: list[str]) -> dict[str, Call]:
    """Return the calls with these names, or all."""
    return {name: calls[name] for name in names or calls}


def outcome_of(call: Call) -> Outcome:
    """Make a call. Return its result or error."""
    try:
        return {"result": call()}
    except Exception as error:  # noqa: BLE001 - the outcome shows every error
        return failure(error)


async def outcome_of_async(call: Callable[[], Awaitable[Any]]) -> Outcome:
    """Make a call and wait for it. Return its result or error."""
    try:
        return {"result": await call()}
    except asyncio.CancelledError:
        raise
    except Exception as error:  # noqa: BLE001 - the outcome shows every error
        return failure(error)


def failure(error: Exception) -> Outcome:
    """Return an error as an outcome."""
    return {"error": type(error).__name__, "message": str(error)}


def show(outcomes: object) -> None:
    """Write the outcomes as JSON to stdout."""
    json.dump(outcomes, sys.stdout, default=str)
