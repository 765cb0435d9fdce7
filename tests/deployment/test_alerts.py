"""Tests of the alerts: rules, scenarios, runbook, and delivery by a real Alertmanager."""

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
}  # metrics of Prometheus and its client library
WORDS = {
    "and",
    "or",
    "unless",
    "by",
    "without",
    "on",
    "ignoring",
    "bool",
    "offset",
    "group_left",
    "group_right",
}
CALL_OUTCOMES = {
    *("success", "error", "timeout", "bad_data", "unavailable"),
    *("rate_limited", "banned", "geo_blocked", "rejected"),
}
VALUES = {  # labels with a fixed set of values
    "result": set(metrics.CACHE_RESULTS),
    "outcome": CALL_OUTCOMES,
    "state": set(STATES),
    "tier": {"memory", "redis"},
    "cause": set(metrics.STREAM_CAUSES),
    "task": set(metrics.TASKS),
    "job": {"virtuoso", "edge"},
}


def rules(file: str) -> list[dict[str, Any]]:
    """Return the rules of a file in order."""
    return [
        rule
        for group in yaml.safe_load((RULES / file).read_text())["groups"]
        for rule in group["rules"]
    ]


ALERTS = {rule["alert"]: rule for rule in rules("alerts.yml")}
RECORDED = {rule["record"]: rule for rule in rules("recording.yml")}


def expressions() -> Iterator[str]:
    """Yield the expression of every rule."""
    for rule in [*ALERTS.values(), *RECORDED.values()]:
        yield str(rule["expr"])


def series_in(expression: str) -> set[str]:
    """Return the names of the series in an expression."""
    bare = re.sub(
        r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|\b(by|on|ignoring|without) *\([^)]*\)', " ", expression
    )
    names = re.findall(r"(?<![\w.])([a-zA-Z_:][\w:]*)\b(?! *\()", bare)
    return set(names) - WORDS


def exported() -> dict[str, set[str]]:
    """Map each exported series of the gateway to its labels."""
    found: dict[str, set[str]] = {}
    for name, labels in own_metrics().items():
        found[name] = set(labels)
        for end in ("_bucket", "_count", "_sum"):
            found[name + end] = {*labels, "le"}
    return found


def selectors() -> Iterator[tuple[str, str, str, str]]:
    """Yield every label matcher in the rules: series, label, operator, value."""
    for expression in expressions():
        for name, matchers in re.findall(r"([\w:]+)\{([^}]*(?:\{[^}]*\})?[^}]*)\}", expression):
            for label, operator, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', matchers):
                yield name, label, operator, value


def anchors(document: Path) -> set[str]:
    """Return the link anchors of the headings in a document."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """Copy the files of Prometheus as in its container. Returns the main file."""
    shutil.copy(ROOT / "prometheus.yml", tmp_path)
    shutil.copytree(RULES, tmp_path / "rules")
    return tmp_path / "prometheus.yml"


def run(*command: object, **arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run a command with a timeout and return its result."""
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=240, **arguments
    )


def test_prometheus_accepts_configuration_and_rules(config_file: Path) -> None:
    """`promtool check` accepts the configuration and both rule files."""
    promtool = tool("promtool", "prometheus")
    checked = run(promtool, "check", "config", config_file)
    assert checked.returncode == 0, checked.stderr
    assert "2 rule files found" in checked.stdout
    checked = run(promtool, "check", "rules", *sorted((config_file.parent / "rules").glob("*.yml")))
    assert checked.returncode == 0, checked.stderr


@pytest.mark.full
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda path: str(path.stem))
def test_alert_scenarios_pass(scenario: Path) -> None:
    """`promtool test rules` finds the expected alerts with their texts, and no others."""
    promtool = tool("promtool", "prometheus")
    # With the default setting, garbage collection takes half of the time.
    tested = run(promtool, "test", "rules", scenario, env={**os.environ, "GOGC": "400"})
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_prometheus_finds_replicas_by_dns_and_limits_scrapes() -> None:
    """DNS is refreshed every 5 s, and a scrape with too many samples fails."""
    config = yaml.safe_load((ROOT / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert set(jobs) == {"virtuoso", "edge", "redis", "prometheus", "alertmanager"}
    assert jobs["virtuoso"]["dns_sd_configs"] == [
        {"names": ["app"], "type": "A", "port": 8000, "refresh_interval": "5s"}
    ]
    expression = ALERTS["VirtuosoTooManySamples"]["expr"]
    threshold = re.search(r"scrape_samples_scraped\S+ > (\d+)", expression)
    assert threshold is not None
    assert jobs["virtuoso"]["sample_limit"] >= 2 * int(threshold[1])
    assert jobs["virtuoso"]["body_size_limit"]
    assert config["global"]["external_labels"]
    assert str(config["alerting"]).count("alertmanager:9093") == 1


@pytest.mark.parametrize("name", list(ALERTS))
def test_every_alert_has_first_step_and_runbook_section(name: str) -> None:
    """It also has a severity, a summary and a description."""
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
def test_every_alert_fires_resolves_and_stays_silent_in_scenarios(name: str) -> None:
    """One scenario fires and resolves the alert, and another never fires it."""
    resolves = quiet = False
    for path in SCENARIOS:
        for group in yaml.safe_load(path.read_text())["tests"]:
            checks = [
                check for check in group.get("alert_rule_test", []) if check["alertname"] == name
            ]
            firing = [bool(check["exp_alerts"]) for check in checks]  # in order of time
            resolves |= any(now and not later for now, later in pairwise(firing))
            quiet |= bool(firing) and not any(firing)
    assert (resolves, quiet) == (True, True)


def test_rules_use_existing_series_labels_and_values() -> None:
    """Series are exported by the gateway, recorded, or built into Prometheus."""
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
            assert set(value.split("|") if "~" in operator else [value]) <= VALUES[label], (
                name,
                label,
                value,
            )
        if label == "le":
            assert value in {f"{bound}" for bound in metrics.FAST}


def test_objectives_select_the_market_data_routes() -> None:
    """All rules that select by route select the same five routes."""
    chosen = {value for _, label, _, value in selectors() if label == "route"}
    (pattern,) = chosen
    data = {path for path in routes() if re.fullmatch(pattern, path)}
    assert data == {
        "/ticker/{symbol}", "/tickers", "/orderbook/{symbol}", "/ohlcv/{symbol}", "/trades/{symbol}"
    }  # fmt: skip


@pytest.mark.parametrize("name", list(RECORDED))
def test_every_recorded_series_is_used(name: str) -> None:
    """An alert, a dashboard or the runbook uses the series."""
    readers = [*(str(rule["expr"]) for rule in ALERTS.values()), RUNBOOK.read_text()]
    readers += [
        path.read_text() for path in (ROOT / "deploy" / "grafana").glob("dashboards/*.json")
    ]
    assert any(re.search(rf"{re.escape(name)}(?![\w:])", text) for text in readers)


def test_runbook_names_existing_series_and_files() -> None:
    """Metrics are exported or recorded, and linked files exist."""
    named = set(re.findall(r"\bvirtuoso[_:][\w:]+", RUNBOOK.read_text()))
    assert named
    assert named <= set(exported()) | set(RECORDED)
    assert not [
        path
        for path in re.findall(r"\]\(\.\./([\w./-]+)\)", RUNBOOK.read_text())
        if not (ROOT / path).exists()
    ]


def test_runbook_queries_are_valid(tmp_path: Path) -> None:
    """Prometheus accepts every query, and each query reads existing series."""
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
    recorded = [
        {"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)
    ]
    file.write_text(yaml.safe_dump({"groups": [{"name": "runbook", "rules": recorded}]}))
    checked = run(tool("promtool", "prometheus"), "check", "rules", file)
    assert checked.returncode == 0, checked.stderr


def test_runbook_sections_start_with_the_first_step() -> None:
    """Each section also has checks, causes, fixes and the end of the alert."""
    text = RUNBOOK.read_text()
    for name in ALERTS:
        section = text.split(f"\n### {name}\n", 1)[1].split("\n##", 1)[0].strip()
        assert section.startswith("**First:**"), name
        for part in ("**Check.**", "**Cause.**", "**Fix.**", "**Resolved when**"):
            assert part in section, (name, part)


def render(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run start.sh up to the point where it starts Alertmanager."""
    places = {
        "CONFIG": str(folder / "alertmanager.yml"),
        "ALERTMANAGER": "true",
        "AMTOOL": str(folder / "none"),
    }
    return run("sh", START, env={"PATH": os.environ["PATH"], **places, **environment})


@pytest.mark.parametrize("chosen", list(product((False, True), repeat=3)))
def test_alertmanager_accepts_every_combination_of_receivers(
    chosen: tuple[bool, ...], tmp_path: Path
) -> None:
    """`amtool check-config` accepts the file. Without a receiver, a warning is logged."""
    urls = {
        name: f"http://host/{name}" for name, wanted in zip(CHANNELS, chosen, strict=True) if wanted
    }
    started = render(tmp_path, **urls)
    assert started.returncode == 0, started.stderr
    assert ("alerts are not sent" in started.stderr) is not any(chosen)
    written = tmp_path / "alertmanager.yml"
    assert written.stat().st_mode & 0o777 == 0o600
    (receiver,) = yaml.safe_load(written.read_text())["receivers"]
    configs = {name: value for name, value in receiver.items() if name != "name"}
    assert len(configs) == sum(chosen)
    assert all(config["send_resolved"] for (config,) in configs.values())
    assert {
        url for (config,) in configs.values() for key, url in config.items() if key.endswith("url")
    } == {*urls.values()}
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
def test_url_is_quoted_as_one_value(url: str, tmp_path: Path) -> None:
    """No URL runs a command or ends the YAML string that contains it."""
    url = url.replace(" ", "%20")
    assert render(tmp_path, ALERT_WEBHOOK_URL=url).returncode == 0
    config = yaml.safe_load((tmp_path / "alertmanager.yml").read_text())
    assert config["receivers"] == [
        {"name": "operator", "webhook_configs": [{"url": url, "send_resolved": True}]}
    ]


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
def test_invalid_url_stops_the_start_without_being_logged(
    name: str, url: str, tmp_path: Path
) -> None:
    """The message names the variable, but never contains the value."""
    refused = render(tmp_path, **{name: url}, AMTOOL=tool("amtool", "prometheus-alertmanager"))
    assert refused.returncode == 1
    assert name in refused.stderr or "ALERT_*_URL" in refused.stderr
    assert "s3cret" not in refused.stderr + refused.stdout


@pytest.mark.parametrize("wait", ["soon", "5", "1s\nroute: {}", "s", "1s'"])
def test_invalid_duration_stops_the_start(wait: str, tmp_path: Path) -> None:
    """A duration consists of digits and a unit."""
    assert render(tmp_path, ALERT_GROUP_WAIT=wait).returncode == 1
    assert render(tmp_path, ALERT_GROUP_INTERVAL=wait).returncode == 1


def test_start_script_passes_shellcheck() -> None:
    """The script is portable shell without warnings."""
    checked = run(tool("shellcheck", "shellcheck"), "--shell=sh", START)
    assert checked.returncode == 0, checked.stdout


@contextlib.asynccontextmanager
async def webhook() -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """Run a webhook receiver. Yields its URL and the list of received messages."""
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
    """Run the real Alertmanager with short delays. Yields a client of its API."""
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


def make_alert(name: str, *, ended: bool = False, **labels: str) -> dict[str, Any]:
    """Return an alert as Prometheus sends it; with `ended` it is resolved."""
    rule = ALERTS[name]
    now = datetime.now(UTC)
    return {
        "labels": {"alertname": name, "severity": rule["labels"]["severity"], **labels},
        "annotations": rule["annotations"],
        "startsAt": (now - timedelta(minutes=1)).isoformat(),
        "endsAt": (now if ended else now + timedelta(minutes=5)).isoformat(),
    }


@pytest.mark.full
async def test_alerts_and_their_end_reach_the_receiver(tmp_path: Path) -> None:
    """Messages have description and runbook link. Inhibited alerts are not sent."""
    async with webhook() as (url, arrived), alertmanager(tmp_path, ALERT_WEBHOOK_URL=url) as client:
        assert (
            await client.post("/alerts", json=[make_alert("VirtuosoAllCircuitsOpen")])
        ).is_success
        await eventually(lambda: arrived)  # the inhibiting alert must arrive first
        assert (
            await client.post("/alerts", json=[make_alert("VirtuosoCircuitOpen", exchange="bybit")])
        ).is_success
        # Posted later, so that the suppressed ticket would have arrived before it.
        assert (await client.post("/alerts", json=[make_alert("VirtuosoRedisDown")])).is_success
        await eventually(lambda: ("VirtuosoRedisDown", "firing") in received(arrived))
        assert received(arrived) == {
            ("VirtuosoAllCircuitsOpen", "firing"),
            ("VirtuosoRedisDown", "firing"),
        }
        for message in arrived:
            (alert,) = message["alerts"]
            expected = ALERTS[alert["labels"]["alertname"]]["annotations"]
            assert alert["annotations"] == expected
            assert alert["annotations"]["runbook_url"].startswith("docs/runbook.md#")
        # The inhibiting alert ends, so the suppressed ticket is sent.
        posted = [
            make_alert("VirtuosoAllCircuitsOpen", ended=True),
            make_alert("VirtuosoRedisDown", ended=True),
        ]
        assert (await client.post("/alerts", json=posted)).is_success
        await eventually(lambda: len(received(arrived)) >= 5)
        assert received(arrived) == {
            ("VirtuosoAllCircuitsOpen", "firing"),
            ("VirtuosoAllCircuitsOpen", "resolved"),
            ("VirtuosoRedisDown", "firing"),
            ("VirtuosoRedisDown", "resolved"),
            ("VirtuosoCircuitOpen", "firing"),
        }
    assert url not in (tmp_path / "log").read_text()


def received(messages: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Return name and status of every alert in the messages."""
    return {
        (alert["labels"]["alertname"], alert["status"])
        for message in messages
        for alert in message["alerts"]
    }
