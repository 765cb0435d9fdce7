"""Work that runs beside requests: endless loops, and errors that no request reports."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable

from src.core import metrics

log = logging.getLogger(__name__)

ERROR_SECONDS = 1.0  # pause of a loop after an unexpected exception
LOG_SECONDS = 10.0  # between two log lines for one kind of error: some come with every pushed message

_logged_at: dict[tuple[str, type[BaseException]], float] = {}


def report_error(component: str, error: BaseException) -> None:
    """Count an unexpected exception of our own code, and log it with its traceback.

    `component` is one of `metrics.COMPONENTS`. Every error is counted; the same class of error in the same component is
    logged once in `LOG_SECONDS`.
    """
    metrics.internal_errors_total.labels(component).inc()
    kind, now = (component, type(error)), time.monotonic()
    if now - _logged_at.get(kind, -math.inf) >= LOG_SECONDS:
        _logged_at[kind] = now
        log.error("unexpected error", extra={"component": component}, exc_info=error)


async def repeat(component: str, step: Callable[[], Awaitable[object]], pause: float = 0) -> None:
    """Run `step` for ever, with `pause` seconds before each run.

    An unexpected exception is reported as an error of `component`, and does not end the loop.
    """
    while True:
        await asyncio.sleep(pause)
        try:
            await step()
        except Exception as error:  # noqa: BLE001 - reported
            report_error(component, error)
            await asyncio.sleep(ERROR_SECONDS)
