"""The alerts: valid, tested by scenarios, explained in the runbook; and delivered, by the real Alertmanager."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from src.core import metrics
from src.core.circuit_breaker import STATES
from tests.conftest import eventually, free_port, tool
from tests.test_docs import own_metrics, routes

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus"
SCENARIOS = sorted((ROOT / "tests" / "rules").glob("*.yml"))
START = ROOT / "deploy" / "alertmanager" / "start.sh"
RUNBOOK = ROOT / "docs" / "runbook.md"
CHANNELS = ("ALERT_WEBHOOK_URL", "ALERT_SLACK_URL", "ALERT_DISCORD_URL")

FOREIGN = {
    "up",
    "scrape_samples_scraped",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
}  # of Prometheus and its client
WORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "bool", "offset", "group_left", "group_right"}
CALL_OUTCOMES = {
    *("success", "error", "timeout", "bad_data", "unavailable"),
    *("rate_limited", "banned", "geo_blocked", "rejected"),
}
VALUES = {  # of the labels that have a fixed set of them
    "result": set(metrics.CACHE_RESULTS),
    "outcome": CALL_OUTCOMES,
    "state": set(STATES),
    "tier": {"memory", "redis"},
    "cause": set(metrics.STREAM_CAUSES),
    "task": set(metrics.TASKS),
    "job": {"virtuoso", "edge"},
}


def rules(file: str) -> list[dict[str, Any]]:
    """Return the rules of a file, in order."""
    return [rule for group in yaml.safe_load((RULES / file).read_text())["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules("alerts.yml")}
RECORDED = {rule["record"]: rule for rule in rules("recording.yml")}


def expressions() -> Iterator[str]:
    """Give the expression of every rule."""
    for rule in [*ALERTS.values(), *RECORDED.values()]:
        yield str(rule["expr"])


def series_in(expression: str) -> set[str]:
    """Name the series an expression reads."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|\b(by|on|ignoring|without) *\([^)]*\)', " ", expression)
    names = re.findall(r"(?<![\w.])([a-zA-Z_:][\w:]*)\b(?! *\()", bare)
    return set(names) - WORDS


def exported() -> dict[str, set[str]]:
    """Map each series of the gateway, as a scrape shows it, to its labels."""
    found: dict[str, set[str]] = {}
    for name, labels in own_metrics().items():
        found[name] = set(labels)
        for end in ("_bucket", "_count", "_sum"):
            found[name + end] = {*labels, "le"}
    return found


def selectors() -> Iterator[tuple[str, str, str, str]]:
    """Give every matcher in the rules: series, label, operator, value."""
    for expression in expressions():
        for name, matchers in re.findall(r"([\w:]+)\{([^}]*(?:\{[^}]*\})?[^}]*)\}", expression):
            for label, operator, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', matchers):
                yield name, label, operator, value


def anchors(document: Path) -> set[str]:
    """Return what links into a document can point at: its headings, as their sites write them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.fixture
def container(tmp_path: Path) -> Path:
    """Lay the files of Prometheus out as its container has them; returns the main one."""
    shutil.copy(ROOT / "prometheus.yml", tmp_path)
    shutil.copytree(RULES, tmp_path / "rules")
    return tmp_path / "prometheus.yml"


def run(*command: object, **arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run a command, with a bound; returns what it said."""
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=240, **arguments)


def test_prometheus_accepts_configuration_and_rules(container: Path) -> None:
    """`promtool check` has nothing to say, and finds both files of rules."""
    promtool = tool("promtool", "prometheus")
    checked = run(promtool, "check", "config", container)
    assert checked.returncode == 0, checked.stderr
    assert "2 rule files found" in checked.stdout
    checked = run(promtool, "check", "rules", *sorted((container.parent / "rules").glob("*.yml")))
    assert checked.returncode == 0, checked.stderr


@pytest.mark.full
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda path: str(path.stem))
def test_scenarios_come_out_as_written(scenario: Path) -> None:
    """`promtool test rules` finds each alert firing, with this text, when the scenario says so, and else silent."""
    promtool = tool("promtool", "prometheus")
    # Its garbage collector would take half of its time.
    tested = run(promtool, "test", "rules", scenario, env={**os.environ, "GOGC": "400"})
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_prometheus_is_bounded_and_finds_every_replica() -> None:
    """The job of the gateway goes by DNS, soon, and a scrape that grows without end costs the scrape only."""
    config = yaml.safe_load((ROOT / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert set(jobs) == {"virtuoso", "edge", "redis", "prometheus", "alertmanager"}
    assert jobs["virtuoso"]["dns_sd_configs"] == [
        {"names": ["app"], "type": "A", "port": 8000, "refresh_interval": "5s"}
    ]
    told = re.search(r"scrape_samples_scraped\S+ > (\d+)", ALERTS["VirtuosoTooManySamples"]["expr"])
    assert told is not None
    assert jobs["virtuoso"]["sample_limit"] >= 2 * int(told[1])
    assert jobs["virtuoso"]["body_size_limit"]
    assert config["global"]["external_labels"]
    assert str(config["alerting"]).count("alertmanager:9093") == 1


@pytest.mark.parametrize("name", list(ALERTS))
def test_an_alert_says_what_to_do(name: str) -> None:
    """It has a severity, a summary, a description with a first step, and a section of the runbook."""
    alert = ALERTS[name]
    assert re.fullmatch(r"Virtuoso([A-Z][a-z]+)+", name)
    assert alert["labels"]["severity"] in ("page", "ticket")
    notes = alert["annotations"]
    assert set(notes) == {"summary", "description", "runbook_url"}
    assert len(notes["summary"]) < 120
    assert "\n" not in notes["description"]
    assert re.search(r"\bFirst\b|\bfirst\b", notes["description"])
    document, _, anchor = notes["runbook_url"].partition("#")
    assert document == "docs/runbook.md"
    assert anchor == name.lower()
    assert anchor in anchors(RUNBOOK)


@pytest.mark.parametrize("name", list(ALERTS))
def test_an_alert_has_scenarios(name: str) -> None:
    """In some scenario it fires and then resolves, and in another it never fires."""
    resolves = quiet = False
    for path in SCENARIOS:
        for group in yaml.safe_load(path.read_text())["tests"]:
            checks = [check for check in group.get("alert_rule_test", []) if check["alertname"] == name]
            firing = [bool(check["exp_alerts"]) for check in checks]  # in the order of time, as they are written
            resolves |= any(one and not after for one, after in pairwise(firing))
            quiet |= bool(firing) and not any(firing)
    assert (resolves, quiet) == (True, True)


def test_rules_read_what_is_exported() -> None:
    """Every series in an expression is the gateway's, recorded, or Prometheus' own; its labels and values exist."""
    known = exported()
    for expression in expressions():
        assert series_in(expression)
        assert series_in(expression) <= set(known) | set(RECORDED) | FOREIGN
    found = list(selectors())
    assert len(found) > 40
    for name, label, operator, value in found:
        if name in known:
            assert label in known[name] | {"job", "instance"}, (name, label)
        if label in VALUES:
            assert set(value.split("|") if "~" in operator else [value]) <= VALUES[label], (name, label, value)
        if label == "le":
            assert value in {f"{bound}" for bound in metrics.FAST}


def test_objectives_are_about_market_data() -> None:
    """Whatever rule selects by route, it selects the five routes of market data and no other."""
    chosen = {value for _, label, _, value in selectors() if label == "route"}
    (pattern,) = chosen
    data = {path for path in routes() if re.fullmatch(pattern, path)}
    assert data == {
        "/ticker/{symbol}", "/tickers", "/orderbook/{symbol}", "/ohlcv/{symbol}", "/trades/{symbol}"
    }  # fmt: skip


@pytest.mark.parametrize("name", list(RECORDED))
def test_a_recorded_series_is_used(name: str) -> None:
    """An alert, a dashboard or the runbook reads it."""
    readers = [*(str(rule["expr"]) for rule in ALERTS.values()), RUNBOOK.read_text()]
    readers += [path.read_text() for path in (ROOT / "deploy" / "grafana").glob("dashboards/*.json")]
    assert any(re.search(rf"{re.escape(name)}(?![\w:])", text) for text in readers)


def test_runbook_names_series_and_files_that_exist() -> None:
    """Every metric the runbook tells to look at is exported or recorded."""
    named = set(re.findall(r"\bvirtuoso[_:][\w:]+", RUNBOOK.read_text()))
    assert named
    assert named <= set(exported()) | set(RECORDED)
    assert not [
        path for path in re.findall(r"\]\(\.\./([\w./-]+)\)", RUNBOOK.read_text()) if not (ROOT / path).exists()
    ]


def test_runbook_queries_can_be_asked(tmp_path: Path) -> None:
    """Prometheus can read every query in the runbook, and each reads series that exist."""
    text = RUNBOOK.read_text()
    queries = re.findall(r"promtool query instant http://localhost:9090 (?:\\\n +)?'([^']+)'", text)
    assert len(queries) == text.count("promtool query")
    queries += re.findall(r"`((?:sum|histogram_quantile|rate)[ (][^`]+)`", text)
    assert len(queries) > 15
    for query in queries:
        assert series_in(query) <= set(exported()) | set(RECORDED) | FOREIGN | {
            "ALERTS",
            "__name__",
            "process_cpu_seconds_total",
        }
    file = tmp_path / "queries.yml"
    recorded = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    file.write_text(yaml.safe_dump({"groups": [{"name": "runbook", "rules": recorded}]}))
    checked = run(tool("promtool", "prometheus"), "check", "rules", file)
    assert checked.returncode == 0, checked.stderr


def test_runbook_begins_each_section_with_what_to_do() -> None:
    """Each alert's section opens with the first step, and tells how to see it, why, what to do and when it is over."""
    text = RUNBOOK.read_text()
    for name in ALERTS:
        section = text.split(f"\n### {name}\n", 1)[1].split("\n##", 1)[0].strip()
        assert section.startswith("**First:**"), name
        for part in ("**See it.**", "**Why.**", "**Do.**", "**Over when**"):
            assert part in section, (name, part)


def render(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run start.sh up to where it would become Alertmanager."""
    places = {"CONFIG": str(folder / "alertmanager.yml"), "ALERTMANAGER": "true", "AMTOOL": str(folder / "none")}
    return run("sh", START, env={"PATH": os.environ["PATH"], **places, **environment})


@pytest.mark.parametrize("chosen", list(product((False, True), repeat=3)))
def test_alertmanager_accepts_every_choice_of_channels(chosen: tuple[bool, ...], tmp_path: Path) -> None:
    """`amtool check-config` accepts what is written for any set of channels; with none a line says so."""
    urls = {name: f"http://host/{name}" for name, wanted in zip(CHANNELS, chosen, strict=True) if wanted}
    started = render(tmp_path, **urls)
    assert started.returncode == 0, started.stderr
    assert ("alerts go nowhere" in started.stderr) is not any(chosen)
    written = tmp_path / "alertmanager.yml"
    assert written.stat().st_mode & 0o777 == 0o600
    (receiver,) = yaml.safe_load(written.read_text())["receivers"]
    configs = {name: value for name, value in receiver.items() if name != "name"}
    assert len(configs) == sum(chosen)
    assert all(config["send_resolved"] for (config,) in configs.values())
    assert {url for (config,) in configs.values() for key, url in config.items() if key.endswith("url")} == {
        *urls.values()
    }
    checked = run(tool("amtool", "prometheus-alertmanager"), "check-config", written)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    "url",
    [
        "https://host/it's-'quoted'",
        "https://host/$(touch made)`touch made`\\n${HOME}",
        'https://host/"}]#: {{ .X }}',
    ],
)
def test_an_address_stays_one_value(url: str, tmp_path: Path) -> None:
    """Whatever is in an address, it neither runs nor ends the YAML string that holds it."""
    url = url.replace(" ", "%20")
    assert render(tmp_path, ALERT_WEBHOOK_URL=url).returncode == 0
    config = yaml.safe_load((tmp_path / "alertmanager.yml").read_text())
    assert config["receivers"] == [{"name": "operator", "webhook_configs": [{"url": url, "send_resolved": True}]}]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/s3cret",
        "s3cret",
        "http://",
        "http://host/s3cret\nreceivers: []",
        "http://host/s3cret x",
        "http://host/s3cret\x07",
        "http://[s3cret",
        "http://host:s3cret",
    ],
)
@pytest.mark.parametrize("name", CHANNELS)
def test_an_address_that_is_none_stops_the_start_unseen(name: str, url: str, tmp_path: Path) -> None:
    """The message names the variable, or all three, and never shows the value."""
    refused = render(tmp_path, **{name: url}, AMTOOL=tool("amtool", "prometheus-alertmanager"))
    assert refused.returncode == 1
    assert name in refused.stderr or "ALERT_*_URL" in refused.stderr
    assert "s3cret" not in refused.stderr + refused.stdout


@pytest.mark.parametrize("wait", ["soon", "5", "1s\nroute: {}", "s", "1s'"])
def test_a_wait_that_is_none_stops_the_start(wait: str, tmp_path: Path) -> None:
    """A duration is digits and a unit; nothing else gets into the file."""
    assert render(tmp_path, ALERT_GROUP_WAIT=wait).returncode == 1
    assert render(tmp_path, ALERT_GROUP_INTERVAL=wait).returncode == 1


def test_shellcheck_finds_nothing_to_say() -> None:
    """The script is portable and plain."""
    checked = run(tool("shellcheck", "shellcheck"), "--shell=sh", START)
    assert checked.returncode == 0, checked.stdout


@contextlib.asynccontextmanager
async def webhook() -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """Listen as a channel does; yields its address and what arrives there."""
    arrived: list[dict[str, Any]] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        assert length is not None
        arrived.append(json.loads(await reader.readexactly(int(length[1]))))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook", arrived


@contextlib.asynccontextmanager
async def alertmanager(folder: Path, **environment: str) -> AsyncIterator[httpx.AsyncClient]:
    """Run the real Alertmanager through start.sh, quick to tell; yields a client of its API."""
    port = free_port()
    places = {
        "PATH": os.environ["PATH"],
        "CONFIG": str(folder / "alertmanager.yml"),
        "STORAGE": str(folder / "data"),
        "LISTEN": f"127.0.0.1:{port}",
        "ALERTMANAGER": tool("prometheus-alertmanager", "prometheus-alertmanager"),
        "AMTOOL": tool("amtool", "prometheus-alertmanager"),
        "ALERT_GROUP_WAIT": "1s",
        "ALERT_GROUP_INTERVAL": "1s",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["sh", START], env=places | environment, stdout=log, stderr=log)  # noqa: ASYNC220
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/api/v2") as client:
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get("/status")).is_success:
                        break
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
            yield client
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 30)


def firing(name: str, *, ended: bool = False, **labels: str) -> dict[str, Any]:
    """Return an alert as Prometheus posts it; one that has `ended` is resolved."""
    rule, now = ALERTS[name], datetime.now(UTC)
    return {
        "labels": {"alertname": name, "severity": rule["labels"]["severity"], **labels},
        "annotations": rule["annotations"],
        "startsAt": (now - timedelta(minutes=1)).isoformat(),
        "endsAt": (now if ended else now + timedelta(minutes=5)).isoformat(),
    }


@pytest.mark.full
async def test_an_alert_arrives_and_so_does_its_end(tmp_path: Path) -> None:
    """The channel gets description and runbook; what follows from another alert is not told; the end is told too."""
    async with webhook() as (url, arrived), alertmanager(tmp_path, ALERT_WEBHOOK_URL=url) as client:
        assert (await client.post("/alerts", json=[firing("VirtuosoAllCircuitsOpen")])).is_success
        await eventually(lambda: arrived)  # so that what follows from it is sure to come later
        assert (await client.post("/alerts", json=[firing("VirtuosoCircuitOpen", exchange="bybit")])).is_success
        # Posted later, and told when the other ticket would long have been.
        assert (await client.post("/alerts", json=[firing("VirtuosoRedisDown")])).is_success
        await eventually(lambda: ("VirtuosoRedisDown", "firing") in told(arrived))
        assert told(arrived) == {("VirtuosoAllCircuitsOpen", "firing"), ("VirtuosoRedisDown", "firing")}
        for message in arrived:
            (alert,) = message["alerts"]
            expected = ALERTS[alert["labels"]["alertname"]]["annotations"]
            assert alert["annotations"] == expected
            assert alert["annotations"]["runbook_url"].startswith("docs/runbook.md#")
        # Its cause is over: now the ticket is told. Resolved are both ends.
        posted = [firing("VirtuosoAllCircuitsOpen", ended=True), firing("VirtuosoRedisDown", ended=True)]
        assert (await client.post("/alerts", json=posted)).is_success
        await eventually(lambda: len(told(arrived)) >= 5)
        assert told(arrived) == {
            ("VirtuosoAllCircuitsOpen", "firing"),
            ("VirtuosoAllCircuitsOpen", "resolved"),
            ("VirtuosoRedisDown", "firing"),
            ("VirtuosoRedisDown", "resolved"),
            ("VirtuosoCircuitOpen", "firing"),
        }
    assert url not in (tmp_path / "log").read_text()


def told(messages: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Return which alerts messages told of, and how each stood."""
    return {(alert["labels"]["alertname"], alert["status"]) for message in messages for alert in message["alerts"]}
