"""Background work: endless loops, and errors that no request reports."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable

from src.core import metrics

log = logging.getLogger(__name__)

ERROR_SECONDS = 1.0  # pause of a loop after an unexpected error
LOG_SECONDS = 10.0  # shortest time between two log lines for the same kind of error

_logged_at: dict[tuple[str, type[BaseException]], float] = {}


def report_error(component: str, error: BaseException) -> None:
    """Count an unexpected error of `component` and log its traceback.

    `component` is one of `metrics.COMPONENTS`. All errors are counted. Errors of the same class in
    the same component are logged once per `LOG_SECONDS`, because some occur with every message.
    """
    metrics.internal_errors_total.labels(component).inc()
    kind = (component, type(error))
    now = time.monotonic()
    if now - _logged_at.get(kind, -math.inf) >= LOG_SECONDS:
        _logged_at[kind] = now
        log.error("unexpected error", extra={"component": component}, exc_info=error)


async def repeat(component: str, step: Callable[[], Awaitable[object]], pause: float = 0) -> None:
    """Run `step` forever, with `pause` seconds before each run.

    An unexpected error is reported for `component` and does not end the loop.
    """
    while True:
        await asyncio.sleep(pause)
        try:
            await step()
        except Exception as error:  # noqa: BLE001 - reported
            report_error(component, error)
            await asyncio.sleep(ERROR_SECONDS)
