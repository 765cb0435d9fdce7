"""The benchmarks' own parts: reading wrk, statistics, verdicts, the Zipf mix, the plots; and one pair for real."""

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

from benchmarks import bench, page, scale, soak, stalls, stream, watchers
from benchmarks.figures import COLUMNS, Figure, chart, interleave, number, percentile, ratios, slope, table
from benchmarks.load import Answer, Connection, Report, at_rate, drive, expect, one_by_one, parse_wrk, zipf
from benchmarks.servers import LONG, NGINX, PATH, Servers, nginx_same, warm
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


def test_reads_what_wrk_prints() -> None:
    """Rate and percentiles come out in requests per second and milliseconds, whatever unit wrk chose."""
    assert parse_wrk(WRK_REPORT) == Report(31343.42, 0.987, 1450.0)


@pytest.mark.parametrize(
    "line", ["  Non-2xx or 3xx responses: 1", "  Socket errors: connect 0, read 1, write 0, timeout 0"]
)
def test_a_load_with_errors_is_no_measurement(line: str) -> None:
    """A server that is fast at failing gets no figure."""
    with pytest.raises(RuntimeError, match="not every answer was a 200"):
        parse_wrk(f"{WRK_REPORT}{line}\n")


def test_half_a_report_of_wrk_is_no_measurement() -> None:
    """A report that is cut off is an error, not a zero."""
    with pytest.raises(RuntimeError):
        parse_wrk(WRK_REPORT.split("Latency Distribution")[0])


def test_sides_are_measured_in_alternating_order() -> None:
    """Each round measures every side once, and the next one in reverse."""
    order: list[str] = []
    found = interleave({name: partial(order.append, name) for name in "ab"}, 3)
    assert "".join(order) == "abbaab"
    assert {name: len(values) for name, values in found.items()} == {"a": 3, "b": 3}


def test_statistics() -> None:
    """Ratios go pair by pair, percentiles by nearest rank, the slope by least squares."""
    assert ratios([1, 4], [2, 2]) == [0.5, 2.0]
    assert [percentile(range(1, 101), share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert percentile([7.0], 0.99) == 7.0
    assert slope([0, 1, 2], [5, 7, 9]) == pytest.approx(2.0)
    assert slope([1], [5]) == 0.0


@pytest.mark.parametrize(
    ("value", "lower", "verdict"),
    [
        (0.69, False, "missed"),
        (0.7, False, "must met, aim missed"),
        (0.85, False, "aim met"),
        (0.86, True, "missed"),
        (0.7, True, "aim met"),
    ],
)
def test_verdict(value: float, *, lower: bool, verdict: str) -> None:
    """What misses its target is called missed, in both directions."""
    must, aim = (0.85, 0.7) if lower else (0.7, 0.85)
    assert Figure("it", [value], "x", must, aim, lower=lower).verdict == verdict


def test_verdict_is_that_of_the_median() -> None:
    """One good pair does not save a figure; without an aim there is none to miss, without targets no verdict."""
    assert Figure("it", [1, 1, 9], "x", 2, 3).verdict == "missed"
    assert Figure("it", [2], "x", 2).verdict == "must met"
    assert Figure("it", [1]).verdict == "reported"


def test_row_of_a_figure() -> None:
    """The cells are those the head of the table names."""
    row = Figure("it", [3, 1, 2], "ms", 3, 1, lower=True).row()
    assert dict(zip(COLUMNS, row, strict=True)) == {
        "figure": "it", "unit": "ms", "median": "2", "min": "1", "max": "3", "must": "≤ 3", "aim": "≤ 1",
        "verdict": "must met, aim missed",
    }  # fmt: skip
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.012345, "0.0123"), (0.7, "0.7"), (99.96, "100"), (12345.6, "12,346"), (0, "0"), (-5.5, "-5.5")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    """Three significant digits, and whole numbers from a hundred on."""
    assert number(value) == text


def test_zipf_mix() -> None:
    """The first item is asked for twice as often as the second, and the same seed gives the same mix."""
    items = [str(rank) for rank in range(1, 301)]
    drawn = Counter(zipf(items, 100_000))
    assert drawn["1"] / drawn["2"] == pytest.approx(2, rel=0.1)
    assert drawn["1"] / 100_000 == pytest.approx(1 / sum(1 / rank for rank in range(1, 301)), rel=0.05)
    assert zipf(items, 50) == zipf(items, 50)


@pytest.mark.parametrize("log", [True, False])
def test_plot_is_xml_with_every_point_in_it(*, log: bool) -> None:
    """Each value has its point, within the picture, higher ones further up; texts are escaped."""
    xs, series = [1, 2, 4, 8], {"gateway": [1.0, 2.0, 3.0, 4.0], "bare <&>": [4.0, 3.0, 2.0, 0.0]}
    root = ElementTree.fromstring(chart("a < b", "connections", "p99 (ms)", xs, series, log=log))  # noqa: S314 - our own
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    for kind in "ab":
        points = [
            (float(one.attrib["cx"]), float(one.attrib["cy"]))
            for one in root.iter(f"{SVG}circle")
            if one.attrib["class"] == kind
        ]
        assert len(points) == len(xs)
        assert all(0 < x < width and 0 < y < height for x, y in points)
        assert points == sorted(points)
        assert [y for _, y in points] == sorted((y for _, y in points), reverse=kind == "a")
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"a < b", "connections", "p99 (ms)", "gateway", "bare <&>", "0", "4"} <= set(texts)


@pytest.mark.parametrize("ys", [[0.0, 0.0], [0.0004, 0.0013], [97_000.0, 143_210.5]])
def test_plot_holds_any_size(ys: list[float]) -> None:
    """No value leaves the picture, however small or large."""
    root = ElementTree.fromstring(chart("it", "x", "y", [1, 2], {"a": ys}, log=False))  # noqa: S314 - our own
    assert all(66 <= float(one.attrib["cy"]) <= 308 for one in root.iter(f"{SVG}circle"))


def test_report_says_missed() -> None:
    """A missed figure is named in a sentence of its own, and its plots are shown."""
    results = bench.Results([Figure("it", [0.5], "x", 0.7, 0.85)], [Figure("other", [1])], ["so"], {"it.svg": "<svg/>"})
    text = bench.report(results, 60)
    assert "- missed: it is 0.5 x, and must be at least 0.7 x." in text
    assert "| it | x | 0.5 | 0.5 | 0.5 | ≥ 0.7 | ≥ 0.85 | missed |" in text
    assert "![it](it.svg)" in text
    assert "Nothing that has a target was missed." in bench.report(bench.Results(), 60)


def test_report_of_a_soak() -> None:
    """The slope is that of the second half; 5xx and silence are errors, a 404 that was asked for is none."""
    samples = [(float(minute), 100.0 + 50 * (minute < 5) + minute) for minute in range(11)]
    answers = [Answer(0, 0, status, "virtuoso; hit; detail=memory") for status in (200, 200, 404, 503, 0)]
    text = soak.report(answers, samples)
    assert "60 MB/hour" in text
    assert "| errors (5xx, or no answer) | 2 |" in text


def test_what_a_hit_is() -> None:
    """A value that stands in for a failed load is none; nor is one that another request loaded."""
    told = ["hit; detail=memory", "hit; detail=redis", "hit; detail=stale_revalidate", "hit; detail=stale_error"]
    told += ["fwd=miss; stored", "fwd=miss; collapsed"]
    hits = [Answer(0, 0, 200, f"virtuoso; {one}; ttl=1").is_hit for one in told]
    assert hits == [True, True, True, False, False, False]


def test_answers_that_do_not_fit_are_no_measurement() -> None:
    """An error, or an answer found elsewhere, stops the benchmark."""
    good = Answer(0, 0, 200, "virtuoso; hit; detail=redis; ttl=1")
    assert expect([good], "detail=redis") == [good]
    for odd in (good._replace(status=503), good._replace(cache="")):
        with pytest.raises(RuntimeError):
            expect([good, odd], "detail=redis")


async def test_a_silent_server_is_an_answer_with_status_0() -> None:
    """The client goes on when nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    connection = Connection(f"http://127.0.0.1:{port}")
    assert (await connection.ask("/", 0.0)).status == 0


def test_scale_without_nginx_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends with 1 and one line, not with a traceback."""
    monkeypatch.setattr(scale, "NGINX", None)
    monkeypatch.setattr("sys.argv", ["scale"])
    assert scale.main() == 1
    assert "make ci-deps" in capsys.readouterr().err


def test_when_the_machine_stood_still_nothing_is_measured() -> None:
    """What was under way during a stall is left out, and how much of the time that was is told."""
    found = stalls.Stalls([(100, 200), (300, 400)])
    spans = [(0, 99), (150, 160), (190, 210), (210, 290), (290, 310), (90, 500), (401, 402)]
    assert [found.touch(*span) for span in spans] == [False, True, True, False, True, True, False]
    assert (found.share(0, 400), found.share(150, 250), found.share(500, 600)) == (0.5, 0.5, 0)
    assert stalls.Stalls([(100, 300), (200, 400)]).share(0, 400) == 0.75
    seen = watchers.Seen(came=[(50, 60), (90, 350), (210, 215)])
    assert seen.latencies(found) == [10, 5]


@pytest.mark.full
def test_streams_are_measured_for_real() -> None:
    """Clients of a gateway see what the exchange pushes, and nobody is lost; who only writes, writes more."""
    with Servers() as servers, stalls.noted() as noted:
        sandbox = servers.sandbox()
        sandbox.set("binance", push_ms=20)
        gateway = servers.gateway(sandbox, {})
        side = stream.Side(gateway.url.replace("http", "ws") + "/ws", stream.WANTS, gateway)
        found = stream.run(side, noted, 3, 3)
        assert 3 < found.rate <= 3 * (50 + 1 / 3)  # so many pushes begin in three seconds, both ends counted
        assert 0 < found.p50 <= found.p99
        assert found.cpu_us > 0
        assert found.lost == 0
        written = stream.run(stream.bare(servers, "writes", 101), noted, 3, 3)
        assert written.rate > found.rate
        assert written.lost == 0


def test_when_the_machine_stands_still_all_the_time_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is measured again some times, and then ends with an error, though what is read never ends."""
    monkeypatch.setattr(stream, "TRIES", 2)
    monkeypatch.setattr(stream, "SETTLE_SECONDS", 0)
    (tmp_path / "stalls").write_text("0 9e15\n")
    with Servers() as servers:
        writer = stream.bare(servers, "writes", 101)
        with pytest.raises(RuntimeError, match="stands still"):
            stream.run(writer, stalls.Noted(str(tmp_path / "stalls")), 3, 0.1)


@pytest.mark.full
def test_the_page_is_measured_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    """A browser shows what a gateway is pushed, and what it costs is found and told."""
    if find_chromium() is None:
        missing("chromium is not installed (Debian: chromium)")
    monkeypatch.setattr(page, "SYMBOLS", page.SYMBOLS[:3])
    monkeypatch.setattr(page, "OPENINGS", 1)
    monkeypatch.setattr(page, "SETTLE_SECONDS", 1)
    figures, behind = page.measure(page.LOADS["one"], 0.05)
    found = {figure.name: figure.median for figure in (*figures, *behind)}
    assert found["prices shown"] == 3
    assert 0 < found["sent to it"] <= 3 * (20 + 1)
    assert found["first picture, gateway at work"] > 0
    heaps = found["JavaScript heap of an empty page"], found["JavaScript heap, at the end"]
    assert 0 < heaps[0] < heaps[1] < found["memory of the page"]
    assert found["processor time of the page"] <= found["processor time of all of Chromium"]
    assert "| sent to it | updates/s |" in page.report({"one": (figures, behind)}, 0.05)


def test_the_page_is_not_measured_without_end() -> None:
    """Minutes are bounded."""
    assert page.bounded("10") == 10
    for text in ("0", "-1", "inf", "nan", "241"):
        with pytest.raises(argparse.ArgumentTypeError):
            page.bounded(text)


@pytest.mark.full
@pytest.mark.parametrize("client", ["wrk", "bundled"])
def test_one_pair_for_real(monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    """A gateway and a bare server are started, measured in turn, and gone afterwards."""
    if client == "wrk" and shutil.which("wrk") is None:
        pytest.skip("wrk is not installed; make ci-deps installs it")
    if client == "bundled":
        monkeypatch.setattr("benchmarks.load.WRK", None)
    with Servers() as servers:
        gateway = servers.gateway(servers.sandbox(filler=10), LONG)
        bare = servers.partner(bench.BARE, servers.record(gateway))
        sides = {name: partial(drive, server.url + PATH, 4, 1) for name, server in (("own", gateway), ("bare", bare))}
        found = interleave(sides, 1)
        assert 0 < ratios([found["own"][0].rate], [found["bare"][0].rate])[0] < 2
        assert 0 < found["own"][0].p50 <= found["own"][0].p99
        gateway.check_hits(misses=1)
        expect(one_by_one(gateway.url, [PATH] * 3), bench.HIT)
        names = [f"F{rank:04d}/USDT" for rank in range(1, 11)]
        warm(gateway, names)
        paths = servers.folder / "paths"
        paths.write_text("".join(f"/ticker/{name}\n" for name in names))
        assert drive(gateway.url, 2, 1, paths).rate > 0
        expect(uvloop.run(at_rate(gateway.url, paths.read_text().split(), 100)), bench.HIT)
        gateway.check_hits(misses=11)
        assert gateway.rss_mb() > 20
        processes = [gateway.process, bare.process]
    assert all(process.poll() is not None for process in processes)
    assert not servers.folder.exists()


@pytest.mark.full
def test_nginx_sends_the_same_bytes(tmp_path: Path) -> None:
    """Our own nginx repeats body and headers, quotes included."""
    if NGINX is None:
        pytest.skip("nginx is not installed; make ci-deps installs it")
    answer = tmp_path / "answer.json"
    body = '{"symbol":"BTC/USDT","odd":"it\'s \\\\ fine"}'
    headers = {"etag": '"abc"', "cache-status": "virtuoso; hit; ttl=9", "content-type": "application/json"}
    answer.write_text(json.dumps({"headers": headers, "body": body}))
    with Servers() as servers:
        nginx = servers.nginx(nginx_same({"BENCH_ANSWER": str(answer)}), PATH)

        async def ask() -> str:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(nginx.url.rpartition(":")[2]))
            writer.write(f"GET {PATH} HTTP/1.1\r\nHost: it\r\nConnection: close\r\n\r\n".encode())
            text = (await reader.read()).decode()
            writer.close()
            return text

        head, _, sent = asyncio.run(ask()).partition("\r\n\r\n")
    assert sent == body
    assert (
        headers.items() <= {name.lower(): value for name, value in re.findall(r"([\w-]+): (.*)\r", head + "\r")}.items()
    )
