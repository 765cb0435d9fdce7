"""Tests of the benchmarks: wrk reports, statistics, verdicts, charts and real runs."""

import argparse
import asyncio
import json
import re
import shutil
import socket
from collections import Counter
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
import uvloop

from benchmarks import bench, page, scale, soak, stalls, stream, stream_clients
from benchmarks.figures import (
    COLUMNS,
    Figure,
    chart,
    interleave,
    number,
    percentile,
    ratios,
    slope,
    table,
)
from benchmarks.load import (
    Connection,
    Report,
    Response,
    at_rate,
    drive,
    expect,
    one_by_one,
    parse_wrk,
    zipf,
)
from benchmarks.servers import LONG_TTL_SETTINGS, NGINX, PATH, Servers, nginx_response, warm
from tests.page.browser import find_chromium, missing

SVG = "{http://www.w3.org/2000/svg}"
WRK_REPORT = """Running 2s test @ http://127.0.0.1:8000/ticker/BTC/USDT
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.02ms  101.00us   9.33ms   95.63%
    Req/Sec    31.52k     1.05k   33.06k    75.00%
  Latency Distribution
     50%  987.00us
     75%    1.03ms
     90%    1.10ms
     99%    1.45s
  62731 requests in 2.00s, 43.55MB read
Requests/sec:  31343.42
Transfer/sec:     21.76MB
"""


def test_wrk_report_is_parsed() -> None:
    """The rate is in requests per second, percentiles are in milliseconds, for any unit of wrk."""
    assert parse_wrk(WRK_REPORT) == Report(31343.42, 0.987, 1450.0)


@pytest.mark.parametrize(
    "line",
    ["  Non-2xx or 3xx responses: 1", "  Socket errors: connect 0, read 1, write 0, timeout 0"],
)
def test_wrk_report_with_errors_is_rejected(line: str) -> None:
    """Fast errors are not a valid measurement."""
    with pytest.raises(RuntimeError, match="other than 200"):
        parse_wrk(f"{WRK_REPORT}{line}\n")


def test_incomplete_wrk_report_is_rejected() -> None:
    """An incomplete report is an error, not a zero."""
    with pytest.raises(RuntimeError):
        parse_wrk(WRK_REPORT.split("Latency Distribution")[0])


def test_sides_are_measured_in_alternating_order() -> None:
    """Each round measures every side once, and the next round in reverse order."""
    order: list[str] = []
    found = interleave({name: partial(order.append, name) for name in "ab"}, 3)
    assert "".join(order) == "abbaab"
    assert {name: len(values) for name, values in found.items()} == {"a": 3, "b": 3}


def test_ratios_percentiles_and_slope() -> None:
    """Ratios per pair, percentiles by nearest rank, slope by least squares."""
    assert ratios([1, 4], [2, 2]) == [0.5, 2.0]
    assert [percentile(range(1, 101), share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert percentile([7.0], 0.99) == 7.0
    assert slope([0, 1, 2], [5, 7, 9]) == pytest.approx(2.0)
    assert slope([1], [5]) == 0.0


@pytest.mark.parametrize(
    ("value", "lower", "verdict"),
    [
        (0.69, False, "missed"),
        (0.7, False, "met, goal missed"),
        (0.85, False, "goal met"),
        (0.86, True, "missed"),
        (0.7, True, "goal met"),
    ],
)
def test_verdict_names_missed_targets(value: float, *, lower: bool, verdict: str) -> None:
    """Lower values may be better or worse."""
    required, goal = (0.85, 0.7) if lower else (0.7, 0.85)
    figure = Figure("x", [value], "x", required, goal, lower_is_better=lower)
    assert figure.verdict == verdict


def test_verdict_uses_the_median() -> None:
    """A figure without a goal is met or missed. A figure without targets has no verdict."""
    assert Figure("latency", [1, 1, 9], "x", 2, 3).verdict == "missed"
    assert Figure("latency", [2], "x", 2).verdict == "met"
    assert Figure("latency", [1]).verdict == "no target"


def test_figure_row_matches_the_table_header() -> None:
    """The cells have the order of the header."""
    row = Figure("latency", [3, 1, 2], "ms", 3, 1, lower_is_better=True).row()
    assert dict(zip(COLUMNS, row, strict=True)) == {
        "figure": "latency",
        "unit": "ms",
        "median": "2",
        "min": "1",
        "max": "3",
        "required": "≤ 3",
        "goal": "≤ 1",
        "verdict": "met, goal missed",
    }
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.012345, "0.0123"),
        (0.7, "0.7"),
        (99.96, "100"),
        (12345.6, "12,346"),
        (0, "0"),
        (-5.5, "-5.5"),
    ],
)
def test_numbers_have_three_significant_digits(value: float, text: str) -> None:
    """Numbers from one hundred are whole numbers."""
    assert number(value) == text


def test_zipf_mix_is_skewed_and_reproducible() -> None:
    """The first item is twice as frequent as the second. The same seed gives the same mix."""
    items = [str(rank) for rank in range(1, 301)]
    drawn = Counter(zipf(items, 100_000))
    assert drawn["1"] / drawn["2"] == pytest.approx(2, rel=0.1)
    assert drawn["1"] / 100_000 == pytest.approx(
        1 / sum(1 / rank for rank in range(1, 301)), rel=0.05
    )
    assert zipf(items, 50) == zipf(items, 50)


@pytest.mark.parametrize("log", [True, False])
def test_chart_contains_every_point(*, log: bool) -> None:
    """Points are inside the chart, higher values are further up, texts are escaped."""
    xs = [1, 2, 4, 8]
    series = {"gateway": [1.0, 2.0, 3.0, 4.0], "bare <&>": [4.0, 3.0, 2.0, 0.0]}
    root = ElementTree.fromstring(chart("a < b", "connections", "p99 (ms)", xs, series, log=log))  # noqa: S314 - generated here
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    for kind in "ab":
        points = [
            (float(circle.attrib["cx"]), float(circle.attrib["cy"]))
            for circle in root.iter(f"{SVG}circle")
            if circle.attrib["class"] == kind
        ]
        assert len(points) == len(xs)
        assert all(0 < x < width and 0 < y < height for x, y in points)
        assert points == sorted(points)
        assert [y for _, y in points] == sorted((y for _, y in points), reverse=kind == "a")
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"a < b", "connections", "p99 (ms)", "gateway", "bare <&>", "0", "4"} <= set(texts)


@pytest.mark.parametrize("ys", [[0.0, 0.0], [0.0004, 0.0013], [97_000.0, 143_210.5]])
def test_chart_fits_values_of_any_size(ys: list[float]) -> None:
    """All points are inside the chart."""
    root = ElementTree.fromstring(chart("title", "x", "y", [1, 2], {"a": ys}, log=False))  # noqa: S314 - generated here
    assert all(66 <= float(circle.attrib["cy"]) <= 308 for circle in root.iter(f"{SVG}circle"))


def test_report_lists_missed_figures() -> None:
    """A missed figure has its own sentence, and the charts are shown."""
    results = bench.Results(
        [Figure("latency", [0.5], "x", 0.7, 0.85)],
        [Figure("other", [1])],
        ["a note"],
        {"chart.svg": "<svg/>"},
    )
    text = bench.report(results, 60)
    assert "- missed: latency is 0.5 x, must be at least 0.7 x." in text
    assert "| latency | x | 0.5 | 0.5 | 0.5 | ≥ 0.7 | ≥ 0.85 | missed |" in text
    assert "![chart](chart.svg)" in text
    assert "All targets are met." in bench.report(bench.Results(), 60)


def test_soak_report_counts_errors_and_growth() -> None:
    """The slope is that of the second half. Expected 404s are not errors."""
    samples = [(float(minute), 100.0 + 50 * (minute < 5) + minute) for minute in range(11)]
    responses = [
        Response(0, 0, status, "virtuoso; hit; detail=memory") for status in (200, 200, 404, 503, 0)
    ]
    text = soak.report(responses, samples)
    assert "60 MB/hour" in text
    assert "| errors (5xx or no response) | 2 |" in text


def test_only_fresh_cached_values_are_hits() -> None:
    """Stale values after errors, and values of other requests, are not hits."""
    statuses = [
        "hit; detail=memory",
        "hit; detail=redis",
        "hit; detail=stale_revalidate",
        "hit; detail=stale_error",
    ]
    statuses += ["fwd=miss; stored", "fwd=miss; collapsed"]
    hits = [Response(0, 0, 200, f"virtuoso; {status}; ttl=1").is_hit for status in statuses]
    assert hits == [True, True, True, False, False, False]


def test_unexpected_responses_stop_the_benchmark() -> None:
    """Errors and other cache results are not valid measurements."""
    good = Response(0, 0, 200, "virtuoso; hit; detail=redis; ttl=1")
    assert expect([good], "detail=redis") == [good]
    for unexpected in (good._replace(status=503), good._replace(cache_status="")):
        with pytest.raises(RuntimeError):
            expect([good, unexpected], "detail=redis")


async def test_unreachable_server_counts_as_status_0() -> None:
    """The client continues without a server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    connection = Connection(f"http://127.0.0.1:{port}")
    assert (await connection.request("/", 0.0)).status == 0


def test_scale_without_nginx_names_the_missing_tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 1, with one line instead of a traceback."""
    monkeypatch.setattr(scale, "NGINX", None)
    monkeypatch.setattr("sys.argv", ["scale"])
    assert scale.main() == 1
    assert "make ci-deps" in capsys.readouterr().err


def test_measurements_during_stalls_are_left_out() -> None:
    """The report contains the share of time that was left out."""
    found = stalls.Stalls([(100, 200), (300, 400)])
    spans = [(0, 99), (150, 160), (190, 210), (210, 290), (290, 310), (90, 500), (401, 402)]
    assert [found.overlap(*span) for span in spans] == [False, True, True, False, True, True, False]
    assert (found.share(0, 400), found.share(150, 250), found.share(500, 600)) == (0.5, 0.5, 0)
    assert stalls.Stalls([(100, 300), (200, 400)]).share(0, 400) == 0.75
    received = stream_clients.Received(times=[(50, 60), (90, 350), (210, 215)])
    assert received.latencies(found) == [10, 5]


def test_stream_report_compares_the_gateway_with_its_partners() -> None:
    """One client is compared by difference, many clients by ratio and per client."""
    relay = stream.Round(
        rate=200, p50=1, p99=2, cpu_us=4, memory_kb=8, left_out=0, lost_connections=0
    )
    gateway = relay._replace(p50=1.5, cpu_us=6)
    measured = stream.Measured(
        one={"bare relay": [relay], "gateway": [gateway]},
        many={"bare relay": [relay], "gateway": [gateway], "bare writer": [relay]},
        paused=[gateway._replace(rate=150)],
        max_rate=[gateway._replace(rate=900)],
        conflated=3,
    )
    plan = stream.Plan(rounds=1, clients=10, paused_clients=5)
    found = {figure.name: figure.median for figure in stream.figures(plan, measured)}
    assert found["one client: p50 above a bare relay"] == 0.5
    assert found["10 clients: updates per second and client"] == 20
    assert found["10 clients: highest message rate"] == 900
    assert found["10 clients: conflated updates"] == 3
    assert found["10 clients: processor time per message against a bare relay"] == 1.5
    title = "5 of them paused: message rate of each other client, against no paused clients"
    assert found[title] == 1.5
    text = stream.report(plan, measured)
    assert "| 10 clients, gateway: processor time per message | µs | 6 | 6 | 6 |" in text
    assert "| one client, bare relay: p99 | ms | 2 | 2 | 2 |" in text


@pytest.mark.full
def test_stream_benchmark_runs() -> None:
    """Clients of a gateway get the updates of an exchange. The bare writer writes more."""
    with Servers() as servers, stalls.record_stalls() as stall_log:
        sandbox = servers.sandbox()
        sandbox.set("binance", push_ms=20)
        gateway = servers.gateway(sandbox, {})
        side = stream.Side(
            gateway.url.replace("http", "ws") + "/ws", stream.SUBSCRIBE_COMMAND, gateway
        )
        found = stream.run(side, stall_log, 3, 3)
        assert 3 < found.rate <= 3 * (50 + 1 / 3)  # updates in three seconds, including both ends
        assert 0 < found.p50 <= found.p99
        assert found.cpu_us > 0
        assert found.lost_connections == 0
        written = stream.run(stream.start_partner(servers, "writes", 101), stall_log, 3, 3)
        assert written.rate > found.rate
        assert written.lost_connections == 0


def test_permanent_stalls_end_the_stream_benchmark(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The benchmark retries several times and then fails."""
    monkeypatch.setattr(stream, "TRIES", 2)
    monkeypatch.setattr(stream, "SETTLE_SECONDS", 0)
    (tmp_path / "stalls").write_text("0 9e15\n")
    with Servers() as servers:
        writer = stream.start_partner(servers, "writes", 101)
        with pytest.raises(RuntimeError, match="stood still"):
            stream.run(writer, stalls.StallLog(tmp_path / "stalls"), 3, 0.1)


@pytest.mark.full
def test_page_benchmark_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A browser shows the pushed values, and its costs are reported."""
    if find_chromium() is None:
        missing("chromium is not installed (Debian: chromium)")
    monkeypatch.setattr(page, "SYMBOLS", page.SYMBOLS[:3])
    monkeypatch.setattr(page, "OPENINGS", 1)
    monkeypatch.setattr(page, "SETTLE_SECONDS", 1)
    figures, behind = page.measure(page.LOADS["one"], 0.05)
    found = {figure.name: figure.median for figure in (*figures, *behind)}
    assert found["prices shown"] == 3
    assert 0 < found["sent to the page"] <= 3 * (20 + 1)
    assert found["first price, gateway with streams"] > 0
    heaps = found["JavaScript heap of an empty page"], found["JavaScript heap at the end"]
    assert 0 < heaps[0] < heaps[1] < found["memory of the page"]
    assert found["processor time of the page"] <= found["processor time of all of Chromium"]
    assert "| sent to the page | updates/s |" in page.report({"one": (figures, behind)}, 0.05)


def test_page_benchmark_duration_is_limited() -> None:
    """The number of minutes has a limit."""
    assert page.parse_minutes("10") == 10
    for text in ("0", "-1", "inf", "nan", "241"):
        with pytest.raises(argparse.ArgumentTypeError):
            page.parse_minutes(text)


@pytest.mark.full
@pytest.mark.parametrize("client", ["wrk", "bundled"])
def test_gateway_and_bare_server_are_measured(monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    """Both are started, measured in turn, and stopped."""
    if client == "wrk" and shutil.which("wrk") is None:
        pytest.skip("wrk is not installed; make ci-deps installs it")
    if client == "bundled":
        monkeypatch.setattr("benchmarks.load.WRK", None)
    with Servers() as servers:
        gateway = servers.gateway(servers.sandbox(filler=10), LONG_TTL_SETTINGS)
        bare = servers.partner(bench.BARE_APP, servers.record(gateway))
        sides = {
            name: partial(drive, server.url + PATH, 4, 1)
            for name, server in (("gateway", gateway), ("bare", bare))
        }
        found = interleave(sides, 1)
        assert 0 < ratios([found["gateway"][0].rate], [found["bare"][0].rate])[0] < 2
        assert 0 < found["gateway"][0].p50 <= found["gateway"][0].p99
        gateway.check_hits(misses=1)
        expect(one_by_one(gateway.url, [PATH] * 3), bench.MEMORY_HIT)
        names = [f"F{rank:04d}/USDT" for rank in range(1, 11)]
        warm(gateway, names)
        paths = servers.folder / "paths"
        paths.write_text("".join(f"/ticker/{name}\n" for name in names))
        assert drive(gateway.url, 2, 1, paths).rate > 0
        expect(uvloop.run(at_rate(gateway.url, paths.read_text().split(), 100)), bench.MEMORY_HIT)
        gateway.check_hits(misses=11)
        assert gateway.rss_mb() > 20
        processes = [gateway.process, bare.process]
    assert all(process.poll() is not None for process in processes)
    assert not servers.folder.exists()


@pytest.mark.full
def test_nginx_repeats_the_recorded_response(tmp_path: Path) -> None:
    """nginx sends the same body and headers, including quotes."""
    if NGINX is None:
        pytest.skip("nginx is not installed; make ci-deps installs it")
    recording = tmp_path / "response.json"
    body = '{"symbol":"BTC/USDT","odd":"it\'s \\\\ fine"}'
    headers = {
        "etag": '"abc"',
        "cache-status": "virtuoso; hit; ttl=9",
        "content-type": "application/json",
    }
    recording.write_text(json.dumps({"headers": headers, "body": body}))
    with Servers() as servers:
        nginx = servers.nginx(nginx_response({"BENCH_RESPONSE": str(recording)}), PATH)

        async def request() -> str:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", int(nginx.url.rpartition(":")[2])
            )
            writer.write(
                f"GET {PATH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
            )
            text = (await reader.read()).decode()
            writer.close()
            return text

        head, _, sent = asyncio.run(request()).partition("\r\n\r\n")
    assert sent == body
    assert (
        headers.items()
        <= {
            name.lower(): value for name, value in re.findall(r"([\w-]+): (.*)\r", head + "\r")
        }.items()
    )
