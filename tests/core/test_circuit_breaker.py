"""The circuit breaker by itself: every promise it makes, on a clock that moves only when told."""

import asyncio
import logging
import math
from typing import Any

import pytest

from src.core.circuit_breaker import CLOSED, HALF_OPEN, OPEN, CircuitBreaker
from src.core.errors import (
    BadUpstreamData,
    CallerError,
    CircuitOpen,
    ExchangeTimeout,
    ExchangeUnavailable,
    UnknownSymbol,
)
from tests.conftest import FakeClock

THRESHOLD, RESET, WINDOW, LONGEST = 5, 60.0, 60.0, 600.0
MOMENT = 0.001


CLIENT_LEFT = asyncio.CancelledError()
NEUTRAL = [CLIENT_LEFT, CallerError("malformed"), UnknownSymbol("not listed")]


class Bench:
    """A breaker, its clock and what it told its listener."""

    def __init__(self, clock: FakeClock, **overrides: Any) -> None:
        self.clock = clock
        self.events: list[tuple[str, str, str | None]] = []
        arguments: dict[str, Any] = {"threshold": THRESHOLD, "reset_seconds": RESET, "window_seconds": WINDOW}
        arguments |= {"max_open_seconds": LONGEST, "neutral": (CallerError,)}
        arguments |= {"on_change": lambda *event: self.events.append(event)}
        self.breaker = CircuitBreaker("bybit", clock=clock, **(arguments | overrides))

    async def succeed(self) -> None:
        assert await self.breaker.call(give, 42) == 42

    async def fail(self, error: Exception | None = None, times: int = 1) -> None:
        """Make failing calls; each of them has to surface its own error."""
        for _ in range(times):
            own = error or ExchangeUnavailable("it is down")
            with pytest.raises(type(own)) as raised:
                await self.breaker.call(give, own)
            assert raised.value is own

    async def bring_to(self, state: str) -> None:
        """Bring a closed breaker to another state by what happens to it."""
        if state != CLOSED:
            await self.fail(times=THRESHOLD)
        if state == HALF_OPEN:
            self.clock.advance(RESET)
        assert self.breaker.state == state

    async def reject(self) -> CircuitOpen:
        """Make a call that has to be rejected without running."""
        with pytest.raises(CircuitOpen) as raised:
            await self.breaker.call(never)
        return raised.value

    async def begin(self) -> "Begun":
        begun = Begun(self.breaker)
        await asyncio.sleep(0)
        assert begun.running
        return begun


class Begun:
    """A call under way, which ends when and how the test says."""

    def __init__(self, breaker: CircuitBreaker) -> None:
        self.running = False
        self._outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(breaker.call(self._run))

    async def _run(self) -> None:
        self.running = True
        await self._outcome

    async def end(self, error: BaseException | None = None) -> None:
        if error is CLIENT_LEFT:
            self._task.cancel()
        elif error is None:
            self._outcome.set_result(None)
        else:
            self._outcome.set_exception(error)
        await asyncio.wait([self._task])
        assert self._task.cancelled() if error is CLIENT_LEFT else self._task.exception() is error


async def give(outcome: object) -> object:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


async def never() -> None:
    pytest.fail("a rejected call ran")


@pytest.fixture
def bench(clock: FakeClock) -> Bench:
    return Bench(clock)


async def test_closed_it_passes_arguments_and_value(bench: Bench) -> None:
    """A closed breaker hands over the arguments and gives back the value."""

    async def join(*parts: str, end: str) -> str:
        return "".join(parts) + end

    assert await bench.breaker.call(join, "a", "b", end="!") == "ab!"
    assert (bench.breaker.state, bench.breaker.admits, bench.breaker.retry_after) == (CLOSED, True, 0.0)


@pytest.mark.parametrize("threshold", [1, 2, 5])
async def test_the_last_of_the_failures_in_a_row_opens(clock: FakeClock, threshold: int) -> None:
    """The n-th failure in a row opens, the one before does not, and every call surfaces its own error."""
    bench = Bench(clock, threshold=threshold)
    await bench.fail(times=threshold - 1)
    assert (bench.breaker.state, bench.breaker.cause, bench.breaker.opened_at) == (CLOSED, None, None)
    await bench.fail()
    assert (bench.breaker.state, bench.breaker.cause) == (OPEN, "unavailable")
    assert bench.breaker.opened_at == clock.time()


async def test_a_success_resets_the_count(bench: Bench) -> None:
    """Failures count only in a row."""
    await bench.fail(times=THRESHOLD - 1)
    await bench.succeed()
    await bench.fail(times=THRESHOLD - 1)
    assert bench.breaker.state == CLOSED


async def test_open_it_never_calls(bench: Bench) -> None:
    """An open breaker raises an error of its own kind and does not call the function."""
    await bench.bring_to(OPEN)
    rejection = await bench.reject()
    assert (rejection.exchange, rejection.code) == ("bybit", "circuit_open")
    assert not bench.breaker.admits


@pytest.mark.parametrize("passed", [0.0, 20.0, RESET - MOMENT])
async def test_a_rejection_counts_down(bench: Bench, passed: float) -> None:
    """A rejection says how many seconds are left."""
    await bench.bring_to(OPEN)
    bench.clock.advance(passed)
    assert (await bench.reject()).retry_after == bench.breaker.retry_after == pytest.approx(RESET - passed)


async def test_rejections_change_nothing(bench: Bench) -> None:
    """Rejections neither extend the open time nor count as failures."""
    await bench.bring_to(OPEN)
    bench.clock.advance(RESET - 1)
    for _ in range(100):
        await bench.reject()
    assert bench.breaker.retry_after == 1
    bench.clock.advance(1)
    await bench.succeed()
    await bench.fail(times=THRESHOLD - 1)
    assert bench.breaker.state == CLOSED


async def test_it_is_half_open_at_exactly_the_reset_time(bench: Bench) -> None:
    """A moment before the reset time is over it is open, at it half-open."""
    await bench.bring_to(OPEN)
    bench.clock.advance(RESET - MOMENT)
    assert bench.breaker.state == OPEN
    bench.clock.elapsed = RESET
    assert (bench.breaker.state, bench.breaker.retry_after, bench.breaker.cause) == (HALF_OPEN, 0.0, "unavailable")


async def test_looking_takes_no_permit(bench: Bench) -> None:
    """Reading the state needs no traffic to be true, and leaves the one call of half-open to a caller."""
    await bench.bring_to(HALF_OPEN)
    for _ in range(10):
        assert (bench.breaker.state, bench.breaker.admits, bench.breaker.retry_after) == (HALF_OPEN, True, 0.0)
    assert len(bench.events) == 2
    probe = await bench.begin()
    assert (bench.breaker.state, bench.breaker.admits) == (HALF_OPEN, False)
    await probe.end()


async def test_half_open_lets_one_call_through(bench: Bench) -> None:
    """Of a hundred callers at once exactly one runs in half-open, the others are told to wait a second."""
    await bench.bring_to(HALF_OPEN)
    ran = 0

    async def count() -> None:
        nonlocal ran
        ran += 1
        await asyncio.sleep(0)

    outcomes = await asyncio.gather(*(bench.breaker.call(count) for _ in range(100)), return_exceptions=True)
    waits = [outcome.retry_after for outcome in outcomes if isinstance(outcome, CircuitOpen)]
    assert (ran, waits) == (1, [1.0] * 99)


async def test_a_probes_success_closes(bench: Bench) -> None:
    """A success in half-open closes with a full failure budget and forgets the cause."""
    await bench.bring_to(HALF_OPEN)
    await bench.succeed()
    assert (bench.breaker.state, bench.breaker.cause, bench.breaker.opened_at) == (CLOSED, None, None)
    await bench.fail(times=THRESHOLD - 1)
    assert bench.breaker.state == CLOSED


async def test_a_probes_failure_opens_again(clock: FakeClock) -> None:
    """A failure in half-open opens for a whole time from then on, after which another call may try."""
    bench = Bench(clock, max_open_seconds=RESET)
    await bench.bring_to(HALF_OPEN)
    clock.advance(7)
    await bench.fail(BadUpstreamData("a crossed book"))
    assert (bench.breaker.state, bench.breaker.retry_after, bench.breaker.cause) == (OPEN, RESET, "bad_data")
    assert bench.breaker.opened_at == clock.time()
    clock.advance(RESET)
    await bench.succeed()
    assert bench.breaker.state == CLOSED


@pytest.mark.parametrize("error", NEUTRAL, ids=repr)
async def test_in_half_open_no_verdict_returns_the_permit(bench: Bench, error: BaseException) -> None:
    """A half-open call whose client left, or that ended in a neutral error, decides nothing: the next may try."""
    await bench.bring_to(HALF_OPEN)
    for _ in range(3):
        await (await bench.begin()).end(error)
        assert (bench.breaker.state, bench.breaker.admits) == (HALF_OPEN, True)
    await bench.succeed()
    assert bench.breaker.state == CLOSED


@pytest.mark.parametrize("error", NEUTRAL, ids=repr)
async def test_no_verdict_neither_trips_nor_resets_the_count(bench: Bench, error: BaseException) -> None:
    """Clients that leave and errors of a neutral class or its subclasses come through, and leave the count as it is."""
    await bench.fail(times=THRESHOLD - 1)
    for _ in range(10 * THRESHOLD):
        await (await bench.begin()).end(error)
    assert (bench.breaker.state, bench.events) == (CLOSED, [])
    await bench.fail()
    assert bench.breaker.state == OPEN


async def test_a_timeout_is_a_failure(bench: Bench) -> None:
    """A deadline inside the call that runs out counts against the other side."""

    async def hang() -> None:
        async with asyncio.timeout(0):
            await asyncio.Event().wait()

    for _ in range(THRESHOLD):
        with pytest.raises(TimeoutError):
            await bench.breaker.call(hang)
    assert (bench.breaker.state, bench.breaker.cause) == (OPEN, "error")


@pytest.mark.parametrize("error", [None, ExchangeTimeout("it did not answer")], ids=repr)
@pytest.mark.parametrize("state", [OPEN, HALF_OPEN, CLOSED])
async def test_a_late_outcome_changes_nothing(bench: Bench, state: str, error: Exception | None) -> None:
    """Calls that began before the trip and end later neither close, extend the open time, end half-open nor count."""
    late = [await bench.begin() for _ in range(THRESHOLD)]
    await bench.bring_to(OPEN if state == OPEN else HALF_OPEN)
    if state == CLOSED:
        await bench.succeed()
        await bench.fail(times=THRESHOLD - 1)
    before = (state, bench.breaker.retry_after, bench.events.copy())
    for begun in late:
        await begun.end(error)
    assert (bench.breaker.state, bench.breaker.retry_after, bench.events) == before
    if state == CLOSED:
        await bench.fail()
        assert bench.breaker.state == OPEN


@pytest.mark.parametrize("error", [None, ExchangeTimeout("it did not answer"), *NEUTRAL], ids=repr)
async def test_a_late_outcome_does_not_free_the_permit(bench: Bench, error: BaseException | None) -> None:
    """While a half-open call runs, the end of an older one lets nobody else through."""
    late = await bench.begin()
    await bench.bring_to(HALF_OPEN)
    probe = await bench.begin()
    await late.end(error)
    await bench.reject()
    await probe.end()
    assert bench.breaker.state == CLOSED


async def test_failures_at_once_trip_once(bench: Bench) -> None:
    """Fifty calls that fail together open it once, set its timer once and count as one trip."""
    calls = [await bench.begin() for _ in range(50)]
    for begun in calls:
        await begun.end(ExchangeTimeout("it did not answer"))
        bench.clock.advance(0.01)
    assert bench.events == [(CLOSED, OPEN, "timeout")]
    assert bench.breaker.retry_after == pytest.approx(RESET - (50 - THRESHOLD + 1) * 0.01)
    bench.clock.advance(RESET)
    await bench.fail()
    assert bench.breaker.retry_after == pytest.approx(2 * RESET)


async def test_changes_are_told_in_order(bench: Bench) -> None:
    """The listener is told every change once, in order, with the cause."""
    await bench.bring_to(HALF_OPEN)
    await bench.fail(ExchangeTimeout("it did not answer"))
    bench.clock.advance(2 * RESET)
    await bench.succeed()
    assert bench.events == [
        (CLOSED, OPEN, "unavailable"),
        (OPEN, HALF_OPEN, "unavailable"),
        (HALF_OPEN, OPEN, "timeout"),
        (OPEN, HALF_OPEN, "timeout"),
        (HALF_OPEN, CLOSED, None),
    ]


async def test_a_broken_listener_breaks_no_call(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    """A listener that raises is logged, and calls, errors and states stay what they are."""
    bench = Bench(clock, on_change=lambda *_: 1 / 0)
    await bench.bring_to(HALF_OPEN)
    await bench.succeed()
    assert bench.breaker.state == CLOSED
    failed = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [vars(record)["breaker"] for record in failed] == ["bybit"] * 3


@pytest.mark.parametrize("state", [CLOSED, HALF_OPEN])
async def test_a_bad_result_is_a_failure(bench: Bench, state: str) -> None:
    """An answer that fails the check of its plausibility counts as a failure, and in half-open opens again."""

    async def ask_and_check() -> float:
        bid, ask = 2.0, 1.0
        if bid > ask:
            raise BadUpstreamData("a crossed book")
        return ask

    await bench.bring_to(state)
    for _ in range(1 if state == HALF_OPEN else THRESHOLD):
        assert bench.breaker.state == state
        with pytest.raises(BadUpstreamData):
            await bench.breaker.call(ask_and_check)
    assert (bench.breaker.state, bench.breaker.cause) == (OPEN, "bad_data")


@pytest.mark.parametrize("state", [CLOSED, OPEN, HALF_OPEN])
async def test_it_stays_open_as_long_as_it_was_told(bench: Bench, state: str) -> None:
    """A ban opens it from any state for as long as it lasts, with its cause; a shorter demand does not shorten it."""
    await bench.bring_to(state)
    for seconds, expected in ((90, 90), (120, 120), (5, 120)):
        bench.breaker.open_until(bench.clock.monotonic() + seconds, "banned")
        assert (bench.breaker.state, bench.breaker.retry_after) == (OPEN, expected)
    assert (await bench.reject()).extra == {"cause": "banned"}
    assert len([new for _, new, _ in bench.events if new == OPEN]) == (2 if state == HALF_OPEN else 1)
    bench.clock.advance(120)
    bench.breaker.open_until(bench.clock.monotonic() + 5, "rate_limited")
    assert (bench.breaker.retry_after, bench.breaker.cause) == (5, "rate_limited"), "the time that is over is over"
    assert bench.breaker.opened_at == bench.clock.time()


async def test_forced_open_ignores_time(bench: Bench) -> None:
    """Opened without an end it stays open until it is reset; a rejection still names a finite time."""
    bench.breaker.open_until(math.inf, "forced")
    bench.clock.advance(1e9)
    assert (bench.breaker.state, bench.breaker.cause, bench.breaker.retry_after) == (OPEN, "forced", math.inf)
    assert (await bench.reject()).retry_after == 1.0
    bench.breaker.reset()
    await bench.succeed()


async def test_a_reset_restores_the_full_budget(bench: Bench) -> None:
    """A reset closes with a full failure budget, and a second one says nothing."""
    await bench.fail(times=THRESHOLD - 1)
    bench.breaker.reset()
    assert bench.events == []
    await bench.fail(times=THRESHOLD - 1)
    assert bench.breaker.state == CLOSED
    await bench.fail()
    for _ in range(2):
        bench.breaker.reset()
        assert bench.events == [(CLOSED, OPEN, "unavailable"), (OPEN, CLOSED, None)]
    await bench.bring_to(HALF_OPEN)
    probe = await bench.begin()
    bench.breaker.reset()
    await probe.end(ExchangeTimeout("it did not answer"))
    await bench.fail(times=THRESHOLD - 1)
    assert bench.breaker.state == CLOSED, "what began before the reset does not count"


async def test_the_open_time_grows_to_its_cap(bench: Bench) -> None:
    """Each trip in a row doubles the open time up to the cap, however many follow; a close takes it back."""
    for expected in [RESET, 2 * RESET, 4 * RESET, 8 * RESET] + [LONGEST] * 1100:
        await bench.fail(times=THRESHOLD if bench.breaker.state == CLOSED else 1)
        assert bench.breaker.retry_after == expected
        bench.clock.advance(expected)
    await bench.succeed()
    for low_cap in (bench, Bench(bench.clock, max_open_seconds=1)):
        await low_cap.bring_to(OPEN)
        assert low_cap.breaker.retry_after == RESET, "a cap below the reset time gives way to it"


async def test_breakers_are_independent(clock: FakeClock) -> None:
    """One breaker's trip leaves another closed."""
    one, other = Bench(clock), Bench(clock)
    await one.bring_to(OPEN)
    await other.succeed()
    assert (one.breaker.state, other.breaker.state, other.events) == (OPEN, CLOSED, [])


@pytest.mark.parametrize(("gap", "state"), [(WINDOW / (THRESHOLD - 1), CLOSED), (WINDOW / THRESHOLD, OPEN)])
async def test_old_failures_are_forgotten(bench: Bench, gap: float, state: str) -> None:
    """Failures in a row open only when all of them lie within the window: a slow trickle never does."""
    for _ in range(THRESHOLD if state == OPEN else 100):
        assert bench.breaker.state == CLOSED
        await bench.fail()
        bench.clock.advance(gap)
    assert bench.breaker.state == state
    if state == CLOSED:
        bench.clock.advance(WINDOW)
        await bench.bring_to(OPEN)


@pytest.mark.parametrize("shift", [-86400.0, 86400.0])
async def test_it_ages_by_the_monotonic_clock_it_was_given(bench: Bench, shift: float) -> None:
    """Setting the wall clock neither shortens nor lengthens the open time."""
    await bench.bring_to(OPEN)
    bench.clock._utc += shift
    assert (bench.breaker.state, bench.breaker.retry_after) == (OPEN, RESET)
    bench.clock.advance(RESET)
    assert bench.breaker.state == HALF_OPEN


@pytest.mark.parametrize("setting", ["threshold", "reset_seconds", "window_seconds", "max_open_seconds"])
@pytest.mark.parametrize("value", [0, -1])
def test_settings_that_cannot_work_are_refused(clock: FakeClock, setting: str, value: int) -> None:
    """A threshold below one and durations that are not positive raise."""
    with pytest.raises(ValueError, match="threshold of at least 1 and positive durations"):
        Bench(clock, **{setting: value})


async def test_calls_do_not_wait_for_each_other(bench: Bench) -> None:
    """While fifty calls hang, others come through, trip it and reset it: nothing is locked across a call."""
    hanging = [await bench.begin() for _ in range(50)]
    await bench.succeed()
    await bench.bring_to(OPEN)
    bench.breaker.reset()
    await bench.succeed()
    for begun in hanging:
        await begun.end(CLIENT_LEFT)


async def test_a_rejection_tells_no_secret(bench: Bench) -> None:
    """A rejection carries a word for the cause, and neither the text, the URL nor the chain of what failed."""
    await bench.fail(RuntimeError("GET https://example.test/?apiKey=canary"), times=THRESHOLD)
    rejection = await bench.reject()
    assert (rejection.__cause__, rejection.__context__, rejection.extra) == (None, None, {"cause": "error"})
    assert str(rejection) == "the circuit breaker of bybit is open (error); wait, or ask another exchange"
    assert "canary" not in f"{rejection!r} {rejection.problem()}"


def test_the_longer_demand_keeps_its_cause(bench: Bench) -> None:
    """While a ban lasts, a shorter wait asked for in between changes neither its end nor what is shown."""
    bench.breaker.open_until(bench.clock.monotonic() + 300, "banned")
    bench.breaker.open_until(bench.clock.monotonic() + 5, "rate_limited")
    assert (bench.breaker.cause, bench.breaker.retry_after) == ("banned", 300)
    bench.breaker.open_until(bench.clock.monotonic() + 900, "geo_blocked")
    assert (bench.breaker.cause, bench.breaker.retry_after) == ("geo_blocked", 900)
