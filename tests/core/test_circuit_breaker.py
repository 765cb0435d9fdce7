"""The circuit breaker, with a clock that the tests advance."""

import asyncio
import logging
import math
from dataclasses import replace
from typing import Any

import pytest

from src.core.circuit_breaker import CLOSED, HALF_OPEN, OPEN, CircuitBreaker, OnChange, Policy, hold
from src.core.errors import (
    BadUpstreamData,
    CallerError,
    CircuitOpen,
    ExchangeTimeout,
    ExchangeUnavailable,
    UnknownSymbol,
)
from tests.conftest import FakeClock

THRESHOLD = 5
RESET = 60.0
WINDOW = 60.0
LONGEST = 600.0
MOMENT = 0.001
CLIENT_LEFT = asyncio.CancelledError()
NEUTRAL = [CLIENT_LEFT, CallerError("malformed"), UnknownSymbol("not listed")]
NEUTRAL.append(BadUpstreamData("a crossed book of one market"))
WIDESPREAD = BadUpstreamData("crossed books of several markets")
WIDESPREAD.scope = "exchange"


class Bench:
    """A breaker, its clock and the changes of state that it reported."""

    def __init__(
        self, clock: FakeClock, on_change: OnChange | None = None, **overrides: Any
    ) -> None:
        self.clock = clock
        self.events: list[tuple[str, str, str | None]] = []
        settings: dict[str, Any] = {
            "threshold": THRESHOLD,
            "reset_seconds": RESET,
            "window_seconds": WINDOW,
            "max_open_seconds": LONGEST,
            "neutral": (CallerError,),
        }
        policy = Policy(**(settings | overrides))
        self.breaker = CircuitBreaker("bybit", clock, policy, on_change or self._add_event)

    def _add_event(self, old: str, new: str, cause: str | None) -> None:
        self.events.append((old, new, cause))

    async def succeed(self) -> None:
        assert await self.breaker.call(give, 42) == 42

    async def fail(self, error: Exception | None = None, times: int = 1) -> None:
        """Make failing calls. Each raises its own error."""
        for _ in range(times):
            expected = error or ExchangeUnavailable("it is down")
            with pytest.raises(type(expected)) as raised:
                await self.breaker.call(give, expected)
            assert raised.value is expected

    async def bring_to(self, state: str) -> None:
        """Bring a closed breaker to another state by failures and time."""
        if state != CLOSED:
            await self.fail(times=THRESHOLD)
        if state == HALF_OPEN:
            self.clock.advance(RESET)
        assert self.breaker.state == state

    async def reject(self) -> CircuitOpen:
        """Make a call. Check that it is rejected without running."""
        with pytest.raises(CircuitOpen) as raised:
            await self.breaker.call(never)
        return raised.value

    async def begin(self) -> "RunningCall":
        running = RunningCall(self.breaker)
        await asyncio.sleep(0)
        assert running.has_started
        return running


class RunningCall:
    """A running call, which the test ends with a result or an error."""

    def __init__(self, breaker: CircuitBreaker, subject: str = "") -> None:
        self.has_started = False
        self._outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(breaker.call(self._run, subject=subject))

    async def _run(self) -> None:
        self.has_started = True
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


async def test_closed_breaker_passes_arguments_and_result(bench: Bench) -> None:
    """A closed breaker calls the function with the arguments and returns its result."""

    async def join(*parts: str) -> str:
        return "".join(parts)

    assert await bench.breaker.call(join, "a", "b") == "ab"
    assert (bench.breaker.state, bench.breaker.admits(), bench.breaker.retry_after) == (
        CLOSED,
        True,
        0.0,
    )


@pytest.mark.parametrize("threshold", [1, 2, 5])
async def test_threshold_of_failures_in_a_row_opens(clock: FakeClock, threshold: int) -> None:
    """The last of `threshold` failures opens the breaker. Every call raises its own error."""
    bench = Bench(clock, threshold=threshold)
    await bench.fail(times=threshold - 1)
    assert (bench.breaker.state, bench.breaker.cause, bench.breaker.opened_at) == (
        CLOSED,
        None,
        None,
    )
    await bench.fail()
    assert (bench.breaker.state, bench.breaker.cause) == (OPEN, "unavailable")
    assert bench.breaker.opened_at == clock.time()


async def test_success_resets_the_failure_count(bench: Bench) -> None:
    """Failures count only in a row."""
    await bench.fail(times=THRESHOLD - 1)
    await bench.succeed()
    await bench.fail(times=THRESHOLD - 1)
    assert bench.breaker.state == CLOSED


async def test_open_breaker_rejects_without_a_call(bench: Bench) -> None:
    """An open breaker raises an error of its own kind and does not call the function."""
    await bench.bring_to(OPEN)
    rejection = await bench.reject()
    assert (rejection.exchange, rejection.code) == ("bybit", "circuit_open")
    assert not bench.breaker.admits()


@pytest.mark.parametrize("passed", [0.0, 20.0, RESET - MOMENT])
async def test_rejection_contains_the_remaining_seconds(bench: Bench, passed: float) -> None:
    """A rejection and the breaker state the remaining open time."""
    await bench.bring_to(OPEN)
    bench.clock.advance(passed)
    assert (
        (await bench.reject()).retry_after
        == bench.breaker.retry_after
        == pytest.approx(RESET - passed)
    )


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


async def test_breaker_is_half_open_at_exactly_the_reset_time(bench: Bench) -> None:
    """The breaker is open until just before the reset time, and half-open from then on."""
    await bench.bring_to(OPEN)
    bench.clock.advance(RESET - MOMENT)
    assert bench.breaker.state == OPEN
    bench.clock.elapsed = RESET
    assert (bench.breaker.state, bench.breaker.retry_after, bench.breaker.cause) == (
        HALF_OPEN,
        0.0,
        "unavailable",
    )


async def test_reading_the_state_does_not_use_the_probe(bench: Bench) -> None:
    """The state is current without traffic, and reading it does not use the probe."""
    await bench.bring_to(HALF_OPEN)
    for _ in range(10):
        assert (bench.breaker.state, bench.breaker.admits(), bench.breaker.retry_after) == (
            HALF_OPEN,
            True,
            0.0,
        )
    assert len(bench.events) == 2
    probe = await bench.begin()
    assert (bench.breaker.state, bench.breaker.admits()) == (HALF_OPEN, False)
    await probe.end()


async def test_half_open_admits_one_call(bench: Bench) -> None:
    """Of a hundred concurrent calls one runs. The others are rejected for a second."""
    await bench.bring_to(HALF_OPEN)
    ran = 0

    async def count() -> None:
        nonlocal ran
        ran += 1
        await asyncio.sleep(0)

    outcomes = await asyncio.gather(
        *(bench.breaker.call(count) for _ in range(100)), return_exceptions=True
    )
    waits = [outcome.retry_after for outcome in outcomes if isinstance(outcome, CircuitOpen)]
    assert (ran, waits) == (1, [1.0] * 99)


async def test_successful_probe_closes(bench: Bench) -> None:
    """A successful probe closes the breaker and forgets the failures and the cause."""
    await bench.bring_to(HALF_OPEN)
    await bench.succeed()
    assert (bench.breaker.state, bench.breaker.cause, bench.breaker.opened_at) == (
        CLOSED,
        None,
        None,
    )
    await bench.fail(times=THRESHOLD - 1)
    assert bench.breaker.state == CLOSED


async def test_failed_probe_opens_again(clock: FakeClock) -> None:
    """A failed probe opens the breaker for a full open time, after which a call is admitted."""
    bench = Bench(clock, max_open_seconds=RESET)
    await bench.bring_to(HALF_OPEN)
    clock.advance(7)
    await bench.fail(WIDESPREAD)
    assert (bench.breaker.state, bench.breaker.retry_after, bench.breaker.cause) == (
        OPEN,
        RESET,
        "bad_data",
    )
    assert bench.breaker.opened_at == clock.time()
    clock.advance(RESET)
    await bench.succeed()
    assert bench.breaker.state == CLOSED


@pytest.mark.parametrize("error", NEUTRAL, ids=repr)
async def test_probe_without_a_verdict_admits_the_next_call(
    bench: Bench, error: BaseException
) -> None:
    """After a cancelled probe or a neutral error, the next call is the probe."""
    await bench.bring_to(HALF_OPEN)
    for _ in range(3):
        await (await bench.begin()).end(error)
        assert (bench.breaker.state, bench.breaker.admits()) == (HALF_OPEN, True)
    await bench.succeed()
    assert bench.breaker.state == CLOSED


@pytest.mark.parametrize("error", NEUTRAL, ids=repr)
async def test_no_verdict_does_not_change_the_failure_count(
    bench: Bench, error: BaseException
) -> None:
    """Cancelled calls and neutral errors are raised and do not change the failure count."""
    await bench.fail(times=THRESHOLD - 1)
    for _ in range(10 * THRESHOLD):
        await (await bench.begin()).end(error)
    assert (bench.breaker.state, bench.events) == (CLOSED, [])
    await bench.fail()
    assert bench.breaker.state == OPEN


async def test_timeout_is_a_failure(bench: Bench) -> None:
    """A timeout inside the call counts as a failure."""

    async def hang() -> None:
        async with asyncio.timeout(0):
            await asyncio.Event().wait()

    for _ in range(THRESHOLD):
        with pytest.raises(TimeoutError):
            await bench.breaker.call(hang)
    assert (bench.breaker.state, bench.breaker.cause) == (OPEN, "error")


@pytest.mark.parametrize("error", [None, ExchangeTimeout("it did not answer")], ids=repr)
@pytest.mark.parametrize("state", [OPEN, HALF_OPEN, CLOSED])
async def test_outcome_of_an_older_generation_is_ignored(
    bench: Bench, state: str, error: Exception | None
) -> None:
    """The outcome of a call from an older generation is ignored in every state."""
    late = [await bench.begin() for _ in range(THRESHOLD)]
    await bench.bring_to(OPEN if state == OPEN else HALF_OPEN)
    if state == CLOSED:
        await bench.succeed()
        await bench.fail(times=THRESHOLD - 1)
    before = (state, bench.breaker.retry_after, bench.events.copy())
    for call in late:
        await call.end(error)
    assert (bench.breaker.state, bench.breaker.retry_after, bench.events) == before
    if state == CLOSED:
        await bench.fail()
        assert bench.breaker.state == OPEN


@pytest.mark.parametrize("error", [None, ExchangeTimeout("it did not answer"), *NEUTRAL], ids=repr)
async def test_older_outcome_does_not_end_the_probe(
    bench: Bench, error: BaseException | None
) -> None:
    """The end of an older call does not admit a second probe."""
    late = await bench.begin()
    await bench.bring_to(HALF_OPEN)
    probe = await bench.begin()
    await late.end(error)
    await bench.reject()
    await probe.end()
    assert bench.breaker.state == CLOSED


async def test_concurrent_failures_trip_once(bench: Bench) -> None:
    """Fifty calls that fail together open the breaker once and count as one trip."""
    calls = [await bench.begin() for _ in range(50)]
    for call in calls:
        await call.end(ExchangeTimeout("it did not answer"))
        bench.clock.advance(0.01)
    assert bench.events == [(CLOSED, OPEN, "timeout")]
    assert bench.breaker.retry_after == pytest.approx(RESET - (50 - THRESHOLD + 1) * 0.01)
    bench.clock.advance(RESET)
    await bench.fail()
    assert bench.breaker.retry_after == pytest.approx(2 * RESET)


async def test_callback_receives_changes_in_order(bench: Bench) -> None:
    """The callback receives each change once, in order, with the cause."""
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


async def test_failing_callback_does_not_affect_calls(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the callback is logged. Calls and states are not affected."""
    bench = Bench(clock, on_change=lambda *_: 1 / 0)
    await bench.bring_to(HALF_OPEN)
    await bench.succeed()
    assert bench.breaker.state == CLOSED
    failed = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [vars(record)["breaker"] for record in failed] == ["bybit"] * 3


@pytest.mark.parametrize("state", [CLOSED, HALF_OPEN])
async def test_implausible_result_is_a_failure(bench: Bench, state: str) -> None:
    """An implausible result is a failure, and in half-open opens the breaker again."""

    async def ask_and_check() -> float:
        bid, ask = 2.0, 1.0
        if bid > ask:
            raise WIDESPREAD
        return ask

    await bench.bring_to(state)
    for _ in range(1 if state == HALF_OPEN else THRESHOLD):
        assert bench.breaker.state == state
        with pytest.raises(BadUpstreamData):
            await bench.breaker.call(ask_and_check)
    assert (bench.breaker.state, bench.breaker.cause) == (OPEN, "bad_data")


@pytest.mark.parametrize("state", [CLOSED, OPEN, HALF_OPEN])
async def test_hold_keeps_the_breaker_open(bench: Bench, state: str) -> None:
    """A hold opens the breaker from any state. A shorter hold does not shorten it."""
    await bench.bring_to(state)
    for seconds, expected in ((90, 90), (120, 120), (5, 120)):
        hold(bench.breaker, bench.clock.monotonic() + seconds, "banned")
        assert (bench.breaker.state, bench.breaker.retry_after) == (OPEN, expected)
    assert (await bench.reject()).extra == {"cause": "banned"}
    assert len([new for _, new, _ in bench.events if new == OPEN]) == (
        2 if state == HALF_OPEN else 1
    )
    bench.clock.advance(120)
    hold(bench.breaker, bench.clock.monotonic() + 5, "rate_limited")
    assert (bench.breaker.retry_after, bench.breaker.cause) == (5, "rate_limited")
    assert bench.breaker.opened_at == bench.clock.time()


async def test_hold_without_end_lasts_until_reset(bench: Bench) -> None:
    """Without an end the breaker stays open until a reset. Rejections name a finite time."""
    hold(bench.breaker, math.inf, "forced")
    bench.clock.advance(1e9)
    assert (bench.breaker.state, bench.breaker.cause, bench.breaker.retry_after) == (
        OPEN,
        "forced",
        math.inf,
    )
    assert (await bench.reject()).retry_after == 1.0
    bench.breaker.reset()
    await bench.succeed()


async def test_reset_forgets_all_failures(bench: Bench) -> None:
    """A reset forgets failures and running calls. A second reset reports no change."""
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
    assert bench.breaker.state == CLOSED, "a call from before the reset counted"


async def test_open_time_doubles_up_to_the_maximum(bench: Bench) -> None:
    """Each trip doubles the open time up to a maximum. Closing restores the first one."""
    for expected in [RESET, 2 * RESET, 4 * RESET, 8 * RESET] + [LONGEST] * 1100:
        await bench.fail(times=THRESHOLD if bench.breaker.state == CLOSED else 1)
        assert bench.breaker.retry_after == expected
        bench.clock.advance(expected)
    await bench.succeed()
    for other in (bench, Bench(bench.clock, max_open_seconds=1)):
        await other.bring_to(OPEN)
        assert other.breaker.retry_after == RESET, "the maximum is at least the reset time"


async def fail_for(bench: Bench, *subjects: str) -> None:
    """Make a failing call about each of the subjects."""
    for subject in subjects:
        with pytest.raises(ExchangeUnavailable):
            await bench.breaker.call(give, ExchangeUnavailable("it is down"), subject=subject)


async def test_success_of_another_subject_closes_a_breaker_that_one_opened(bench: Bench) -> None:
    """If one market opened the breaker, one call about another one is admitted."""
    await fail_for(bench, *["DOT"] * THRESHOLD)
    assert (bench.breaker.state, bench.breaker.suspect) == (OPEN, "DOT")
    for subject in ("", "DOT"):
        assert not bench.breaker.admits(subject)
        with pytest.raises(CircuitOpen):
            await bench.breaker.call(never, subject=subject)
    assert await bench.breaker.call(give, 42, subject="BTC") == 42
    assert (bench.breaker.state, bench.breaker.suspect) == (CLOSED, "")


async def test_failure_of_another_subject_keeps_the_breaker_open(bench: Bench) -> None:
    """A second opinion is asked for once, and does not change the open time."""
    await fail_for(bench, *["DOT"] * THRESHOLD)
    bench.clock.advance(1)
    second = RunningCall(bench.breaker, subject="BTC")
    await asyncio.sleep(0)
    assert not bench.breaker.admits("ETH")
    await second.end(ExchangeTimeout("it did not answer"))
    assert not bench.breaker.admits("ETH")
    assert (bench.breaker.state, bench.breaker.retry_after) == (OPEN, RESET - 1)
    assert len(bench.events) == 1


@pytest.mark.parametrize("subjects", [["DOT"] * 4 + ["BTC"], ["BTC"] + ["DOT"] * 4, [""] * 5])
async def test_breaker_that_several_subjects_opened_admits_none(
    bench: Bench, subjects: list[str]
) -> None:
    """No second opinion is needed after failures of two markets, or of calls without a market."""
    await fail_for(bench, *subjects)
    assert bench.breaker.state == OPEN
    assert not bench.breaker.admits("ETH")


async def test_held_breaker_admits_no_second_opinion(bench: Bench) -> None:
    """A ban applies to all markets, even if it is shorter than the open time."""
    await fail_for(bench, *["DOT"] * THRESHOLD)
    hold(bench.breaker, bench.clock.monotonic() + 5, "banned")
    assert not bench.breaker.admits("BTC")


async def test_breakers_are_independent(clock: FakeClock) -> None:
    """A trip of one breaker does not affect another."""
    tripped, other = Bench(clock), Bench(clock)
    await tripped.bring_to(OPEN)
    await other.succeed()
    assert (tripped.breaker.state, other.breaker.state, other.events) == (OPEN, CLOSED, [])


@pytest.mark.parametrize(
    ("gap", "state"), [(WINDOW / (THRESHOLD - 1), CLOSED), (WINDOW / THRESHOLD, OPEN)]
)
async def test_old_failures_are_forgotten(bench: Bench, gap: float, state: str) -> None:
    """Failures in a row open the breaker only if all of them lie within the window."""
    for _ in range(THRESHOLD if state == OPEN else 100):
        assert bench.breaker.state == CLOSED
        await bench.fail()
        bench.clock.advance(gap)
    assert bench.breaker.state == state
    if state == CLOSED:
        bench.clock.advance(WINDOW)
        await bench.bring_to(OPEN)


@pytest.mark.parametrize("shift", [-86400.0, 86400.0])
async def test_open_time_uses_the_monotonic_clock(bench: Bench, shift: float) -> None:
    """Setting the wall clock neither shortens nor lengthens the open time."""
    await bench.bring_to(OPEN)
    bench.clock._utc += shift
    assert (bench.breaker.state, bench.breaker.retry_after) == (OPEN, RESET)
    bench.clock.advance(RESET)
    assert bench.breaker.state == HALF_OPEN


@pytest.mark.parametrize(
    "setting", ["threshold", "reset_seconds", "window_seconds", "max_open_seconds"]
)
@pytest.mark.parametrize("value", [0, -1])
def test_invalid_settings_are_refused(setting: str, value: Any) -> None:
    """A threshold below one and durations that are not positive raise."""
    with pytest.raises(ValueError, match="threshold of at least 1 and positive durations"):
        replace(Policy(), **{setting: value})


async def test_calls_do_not_wait_for_each_other(bench: Bench) -> None:
    """While fifty calls hang, others succeed, trip and reset the breaker."""
    hanging = [await bench.begin() for _ in range(50)]
    await bench.succeed()
    await bench.bring_to(OPEN)
    bench.breaker.reset()
    await bench.succeed()
    for call in hanging:
        await call.end(CLIENT_LEFT)


async def test_rejection_contains_no_secret(bench: Bench) -> None:
    """A rejection contains the cause, and neither text nor URL nor chain of the failure."""
    await bench.fail(RuntimeError("GET https://example.test/?apiKey=canary"), times=THRESHOLD)
    rejection = await bench.reject()
    assert (rejection.__cause__, rejection.__context__, rejection.extra) == (
        None,
        None,
        {"cause": "error"},
    )
    assert (
        str(rejection)
        == "the circuit breaker of bybit is open (error); try again later or use another exchange"
    )
    assert "canary" not in f"{rejection!r} {rejection.problem()}"


def test_longest_hold_keeps_its_cause(bench: Bench) -> None:
    """A shorter hold during a longer one changes neither its end nor its cause."""
    hold(bench.breaker, bench.clock.monotonic() + 300, "banned")
    hold(bench.breaker, bench.clock.monotonic() + 5, "rate_limited")
    assert (bench.breaker.cause, bench.breaker.retry_after) == ("banned", 300)
    hold(bench.breaker, bench.clock.monotonic() + 900, "geo_blocked")
    assert (bench.breaker.cause, bench.breaker.retry_after) == ("geo_blocked", 900)
