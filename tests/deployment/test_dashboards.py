"""The dashboards: what the generator makes is what is committed, and every query finds data in a real Prometheus.

That Prometheus reads our own rules and scrapes two real replicas, under a load in which all that the panels show
happens.
"""

import asyncio
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import combinations, cycle
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple
from urllib.parse import urlencode

import httpx
import pytest
import yaml
from prometheus_client import REGISTRY
from websockets.asyncio.client import connect

from benchmarks.servers import Server, Servers, fetch
from config import EXCHANGES
from deploy.grafana import dashboards
from src.core import metrics
from tests.conftest import free_port, tool

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
BOARDS: dict[str, dict[str, Any]] = {file.stem: json.loads(file.read_text()) for file in FILES}
PANELS = [(name, panel) for name, board in BOARDS.items() for panel in board["panels"] if panel["type"] != "row"]
GRAPHS = [(name, panel) for name, panel in PANELS if panel["type"] != "text"]
MOMENT = ("stat", "bargauge")  # kinds of panels that show one moment; the others show a time range
DEADLINE = 120.0  # seconds from the start of the load; left as soon as all is there
BOT = "fedcba9876543210"  # it begins with as many requests as it may make in a minute, and does not stop
DESKS = [f"0123456789abcde{number}" for number in range(8)]  # take turns, and so stay below the limit
LIMIT = 600
SETTINGS = {
    "API_KEYS": ",".join([f"bot:{BOT}", *(f"desk{number}:{key}" for number, key in enumerate(DESKS))]),
    "CLIENT_RATE_LIMIT": str(LIMIT),
    "ADMIN_TOKEN": "0123456789",
    "KRAKEN_BUDGET": "1000/5",
    "CB_RESET_SECONDS": "3",
    "STALE_SECONDS": "300",  # what kraken answered before it failed stands in to the end
    "REVALIDATE_SECONDS": "1",
    **dict.fromkeys(("TICKER_TTL_SECONDS", "ORDERBOOK_TTL_SECONDS", "TRADES_TTL_SECONDS", "OHLCV_TTL_SECONDS"), "1"),
}
DATA_PATHS = (
    "/ticker/BTC-USDT",
    "/ticker/BTC-USDT?exchange=binance",
    "/ticker/BTC-USDT?exchange=kraken",  # stale
    "/ticker/ETH-USDT?exchange=kraken",  # 503
    "/tickers?symbols=BTC-USDT,ETH-USDT",
    "/orderbook/BTC-USDT",
    "/orderbook/ETH-USDT?exchange=binance",  # refused, and remembered
    "/ohlcv/BTC-USDT",
    "/trades/BTC-USDT",
)
STREAM_PATHS = ("/stream/ETH-USDT", "/stream/BTC-USDT?channel=trades&exchange=bybit")
CHANNELS = ("ticker", "book", "trades")
OWN_PATHS = ("/markets", "/exchanges", "/health", "/health/live", "/health/ready", "/nope")
HAPPENS = {  # what is above zero in the first query of a panel, by legend
    "cache/How values were found": set(metrics.CACHE_RESULTS),
    "cache/Refreshes ahead": {"success"},
    "exchanges/Calls": set(EXCHANGES),
    "exchanges/Circuit breakers": {"kraken"},
    "exchanges/Calls a breaker stopped": {"kraken"},
    "exchanges/Changes of breakers": {"kraken open", "kraken half_open"},
    "exchanges/Outcomes: $exchange": {"success", "rejected", "unavailable"},
    "exchanges/CcxtSockets": {"binance", "bybit"},
    "exchanges/Messages": {"binance ticker", *(f"bybit {channel}" for channel in CHANNELS)},
    "exchanges/Reconnects": {"kraken refused"},
    "exchanges/TopicState": {f"{exchange} {channel}" for exchange in EXCHANGES for channel in CHANNELS},
    "exchanges/Stale": {"kraken"},
    "service/Clients of streams": {"ws", "sse"},
    "service/Updates for clients": set(CHANNELS),
    "service/Time from exchange's message to clients": {"p50"},
    "service/Leases that changed hands": {"taken"},
    "service/Alerts firing": {"firing"},
    "service/Alerts": {"VirtuosoErrorBudgetFastBurn"},
    "service/Errors by status": {"401", "404", "429", "503"},
    "service/Requests by client": {"bot", *(f"desk{number}" for number in range(len(DESKS)))},
    "service/Clients sent away": {"bot, limited", "unknown, unauthorized"},
}


def names(expression: str) -> set[str]:
    """Return the metrics a query names: what is left without texts, labels, ranges, functions and operators."""
    bare = re.sub(r'"[^"]*"|\[[^]]*\]', "", expression)
    bare = re.sub(r"\{[^}]*\}|\b(by|ignoring|group_left|on|without) *\([^)]*\)", "", bare)
    words = re.findall(r"(?<![\w.$])[a-zA-Z_][\w:]*(?! *\()\b(?! *\()", bare)
    return set(words) - {"or", "and", "by", "group_left", "ignoring"}


def queries(panel: dict[str, Any]) -> list[str]:
    """Return what the panel asks."""
    return [target["expr"] for target in panel["targets"]]


def is_about_redis(panel: dict[str, Any]) -> bool:
    """Whether its numbers come from redis-exporter."""
    return any(name.startswith("redis_") for query in queries(panel) for name in names(query))


def test_the_files_are_what_the_generator_makes() -> None:
    """Neither edited by hand nor forgotten after a change: `python deploy/grafana/dashboards.py` mends it."""
    made = dashboards.render()
    assert {file.name: file.read_text() for file in FILES} == made
    assert dashboards.render() == made


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_says_what_it_shows(name: str) -> None:
    """Each has a title of its own, a description, a unit, a query with a legend, and our data source by its uid."""
    source = {"type": "prometheus", "uid": "prometheus"}
    panels = [panel for board, panel in GRAPHS if board == name]
    assert len({panel["title"] for panel in panels}) == len(panels) > 10
    for panel in panels:
        title, defaults = panel["title"], panel["fieldConfig"]["defaults"]
        assert panel["description"].endswith("."), title
        assert defaults["unit"], title
        assert panel["datasource"] == source, title
        assert panel["targets"], title
        for target in panel["targets"]:
            assert target["datasource"] == source, title
            assert target["legendFormat"], title
            assert target["instant"] is not target["range"] is (panel["type"] not in MOMENT), title
        values = [step["value"] for step in defaults["thresholds"]["steps"]]
        assert values[0] is None, title
        assert values[1:] == sorted(values[1:]), title


@pytest.mark.parametrize("name", BOARDS)
def test_no_panel_lies_on_another(name: str) -> None:
    """Every panel and row has its own place within the 24 columns, and its own id."""
    board = BOARDS[name]
    cells = []
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["w"] > 0
        assert place["x"] + place["w"] <= 24
        cells.append({(x + place["x"], y + place["y"]) for x in range(place["w"]) for y in range(place["h"])})
    for one, other in combinations(cells, 2):
        assert not one & other
    assert [panel["id"] for panel in board["panels"]] == list(range(1, len(cells) + 1))


def test_the_dashboards_know_each_other() -> None:
    """Fixed uids, one tag by which each links to all, the last hour, and the way to the runbook."""
    assert {name: board["uid"] for name, board in BOARDS.items()} == {
        "cache": "virtuoso-cache",
        "exchanges": "virtuoso-exchanges",
        "service": "virtuoso-service",
    }
    for board in BOARDS.values():
        assert "id" not in board
        assert (board["refresh"], board["time"]) == ("10s", {"from": "now-1h", "to": "now"})
        assert board["tags"] == board["links"][0]["tags"] == ["virtuoso"]
        assert "docs/runbook.md" in board["panels"][-1]["options"]["content"]


def test_every_metric_exists() -> None:
    """A query names only what the gateway exports, what a recording rule makes, or what Prometheus brings along."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",), "info": ("_info",)}
    known = {family.name + suffix for family in REGISTRY.collect() for suffix in suffixes.get(family.type, ("",))}
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "recording.yml").read_text())
    known |= {rule["record"] for group in rules["groups"] for rule in group["rules"]}
    known |= {"ALERTS", "up", "scrape_samples_scraped"}
    for _, panel in GRAPHS:
        for expression in queries(panel):
            unknown = {name for name in names(expression) if not name.startswith("redis_")} - known
            assert names(expression), expression
            assert not unknown, panel["title"]


def test_what_is_exported_is_shown() -> None:
    """Every metric of the gateway is in a panel, raw or through a recording rule; but for the version."""
    rules = (ROOT / "deploy" / "prometheus" / "recording.yml").read_text()
    shown = rules + "".join(expression for _, panel in GRAPHS for expression in queries(panel))
    exported = {family.name for family in REGISTRY.collect() if family.name.startswith("virtuoso_")}
    assert {name for name in exported if name not in shown} == {"virtuoso_build_info"}


def test_grafana_is_told_where_all_of_it_is() -> None:
    """The data source has the uid the dashboards name, and the provider reads the folder compose mounts."""
    folder = ROOT / "deploy" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert (source["uid"], source["type"], source["url"]) == ("prometheus", "prometheus", "http://prometheus:9090")
    assert (source["isDefault"], source["editable"], source["jsonData"]["timeInterval"]) == (True, False, "15s")
    (provider,) = yaml.safe_load((folder / "dashboards" / "virtuoso.yml").read_text())["providers"]
    assert (provider["folder"], provider["allowUiUpdates"]) == ("Virtuoso", False)
    assert provider["options"]["path"] == "/etc/grafana/dashboards"


class Scene(NamedTuple):
    """A Prometheus that watches two replicas under load."""

    prometheus: str
    started: float
    loading: Future[None]

    def ask(self, path: str, **parameters: object) -> Any:
        """Ask its API; what it refuses is a `ValueError`."""
        answer = json.loads(fetch(f"{self.prometheus}/api/v1/{path}?{urlencode(parameters)}")[1])
        if answer["status"] != "success":
            raise ValueError(answer["error"])
        return answer["data"]

    def series(self, panel: dict[str, Any], target: dict[str, Any]) -> dict[str, list[float]]:
        """Return what Grafana would draw: by legend the values. Raises `ValueError` where the legends do not hold."""
        expression = target["expr"]
        for variable, value in (("$__rate_interval", "5s"), ("$__range", "60s"), ("$exchange", ".*")):
            expression = expression.replace(variable, value)
        if panel["type"] in MOMENT:
            result = self.ask("query", query=expression)["result"]
        else:
            result = self.ask("query_range", query=expression, start=self.started, end=time.time(), step=1)["result"]
        found: dict[str, list[float]] = {}
        for series in result:
            try:
                legend = re.sub(r"\{\{(\w+)\}\}", lambda label: series["metric"][label[1]], target["legendFormat"])  # noqa: B023
            except KeyError as label:
                raise ValueError(f"the legend has a label that the series has not: {label}") from None
            if legend in found:
                raise ValueError(f"two series have the legend {legend}")
            found[legend] = [float(value) for _, value in series.get("values") or [series["value"]]]
        return found

    def fault(self, panel: dict[str, Any]) -> str:
        """Tell what is wrong with the data of a panel, if anything is."""
        try:
            found = [self.series(panel, target) for target in panel["targets"]]
        except ValueError as error:
            return str(error)
        if not all(found):
            return "a query finds nothing"
        empty = [legend for part in found for legend, values in part.items() if not any(map(math.isfinite, values))]
        return f"only NaN: {empty}" if empty else ""

    def wait(self, done: Callable[[], bool]) -> None:
        """Wait for what the load brings about, until the deadline. Raises what ended the load, if it has ended."""
        while not done() and time.time() < self.started + DEADLINE:
            if self.loading.done():
                self.loading.result()
            time.sleep(0.5)

    def faults(self, panels: list[dict[str, Any]]) -> dict[str, str]:
        """Ask for the data of each panel until it has some; returns what is still wrong at the deadline."""
        for panel in panels:
            self.wait(lambda panel=panel: not self.fault(panel))  # type: ignore[misc]
        return {panel["title"]: fault for panel in panels if (fault := self.fault(panel))}


async def load(replicas: list[Server], end: Event) -> None:
    """Ask as clients do, until told to end: often, at once, too often, without a key."""
    once = httpx.Limits(max_keepalive_connections=0)  # a connection kept may just be closing when it is used again
    async with httpx.AsyncClient(timeout=15, limits=once) as client:
        desks = cycle(DESKS)

        async def ask(replica: Server, path: str, key: str = "") -> None:
            headers = {"X-API-Key": key or next(desks)}
            await client.get(replica.url + path, headers=headers)

        watching = [asyncio.create_task(watch(replica)) for replica in replicas]
        watching += [asyncio.create_task(follow(client, replicas[0].url + path)) for path in STREAM_PATHS]
        for _ in range(LIMIT // 20):
            await asyncio.gather(*(ask(replicas[0], DATA_PATHS[0], BOT) for _ in range(20)))
        while not end.is_set():
            for path in DATA_PATHS:
                await asyncio.gather(*(ask(replicas[0], path) for _ in range(2)))
                await ask(replicas[1], path)
                if end.is_set():
                    break
            await asyncio.gather(*(ask(replicas[0], path) for path in OWN_PATHS))
            await ask(replicas[0], DATA_PATHS[0], BOT)
            await ask(replicas[0], DATA_PATHS[0], "wrong")
            for task in (task for task in watching if task.done()):
                task.result()
            await asyncio.sleep(0.5)
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)


async def watch(replica: Server) -> None:
    """Subscribe to all that is watched in this scene, by a socket, for ever."""
    headers = {"X-API-Key": DESKS[0]}
    async with connect(replica.url.replace("http", "ws") + "/ws", additional_headers=headers) as client:
        for channel in CHANNELS:
            wanted = {"op": "subscribe", "channel": channel, "exchange": "all", "symbols": ["BTC/USDT", "ETH/USDT"]}
            await client.send(json.dumps(wanted))
        async for _ in client:
            pass


async def follow(client: httpx.AsyncClient, url: str) -> None:
    """Take server-sent events, for ever."""
    async with client.stream("GET", url, headers={"X-API-Key": DESKS[1]}, timeout=60) as answer:
        answer.raise_for_status()
        async for _ in answer.aiter_lines():
            pass


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Two replicas, their Redis and its exporter, sandbox exchanges of which one fails, and Prometheus; all real."""
    prometheus, exporter = tool("prometheus", "prometheus"), shutil.which("prometheus-redis-exporter")
    folder, ports, end = tmp_path_factory.mktemp("prometheus"), (free_port(), free_port()), Event()
    with Servers() as servers, ThreadPoolExecutor(1) as thread:
        sandbox, redis = servers.sandbox(), servers.redis()
        for name in EXCHANGES:
            sandbox.set(name, rate_limit=-1)
        if exporter:
            address = f"127.0.0.1:{ports[1]}"
            servers.start([exporter, "-redis.addr", redis, "-web.listen-address", address])
        settings = {"REDIS_URL": redis, **SETTINGS}
        replicas = []
        for _ in range(2):  # one after the other: the second finds the market lists in Redis
            replica = servers.gateway(sandbox, settings, wait=False)
            servers.wait(f"{replica.url}/health", lambda status, body: status == 200 and b"not loaded" not in body)
            fetch(replica.url + DATA_PATHS[2], headers={"X-API-Key": DESKS[0]})
            replicas.append(replica)
        targets = {
            "virtuoso": [replica.url.removeprefix("http://") for replica in replicas],
            "redis": [f"127.0.0.1:{ports[1]}"],
        }
        configuration = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(ROOT / "deploy" / "prometheus" / f"{kind}.yml") for kind in ("recording", "alerts")],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": addresses}]} for job, addresses in targets.items()
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        servers.start([prometheus, *options, f"--web.listen-address=127.0.0.1:{ports[0]}", "--log.level=warn"])
        # What happens before it has looked once did not happen: it sees no increase.
        seen = f"http://127.0.0.1:{ports[0]}/api/v1/query?query=count(virtuoso_build_info)==2"
        servers.wait(seen, lambda status, body: status == 200 and b'"value"' in body)
        sandbox.set("bybit", latency_ms=50, rate_limit=-1)
        sandbox.set("binance", status=400, body='{"code":-1121,"msg":"Invalid symbol."}', only="depth", rate_limit=-1)
        sandbox.set("kraken", status=500, rate_limit=-1)
        fetch(f"{replicas[0].url}/admin/maintenance/daily", b"", {"Authorization": f"Bearer {SETTINGS['ADMIN_TOKEN']}"})
        loading = thread.submit(asyncio.run, load(replicas, end))
        try:
            yield Scene(f"http://127.0.0.1:{ports[0]}", time.time(), loading)
        finally:
            end.set()


@pytest.mark.full
def test_every_query_returns_data(scene: Scene) -> None:
    """All panels but those about Redis itself have numbers under load, and replicas do not show as doubled series."""
    panels = [panel for _, panel in GRAPHS if not is_about_redis(panel)]
    assert len(panels) == len(GRAPHS) - 3
    assert scene.faults(panels) == {}


@pytest.mark.full
def test_redis_itself_is_seen_through_its_exporter(scene: Scene) -> None:
    """The panels about Redis have numbers."""
    tool("prometheus-redis-exporter", "prometheus-redis-exporter")
    panels = [panel for _, panel in GRAPHS if is_about_redis(panel)]
    assert len(panels) == 3
    assert scene.faults(panels) == {}


@pytest.mark.full
def test_all_of_it_happened(scene: Scene) -> None:
    """The numbers are not all zeros: what the load was made to bring about is seen above zero where it belongs."""
    panels = {f"{name}/{panel['title']}": panel for name, panel in GRAPHS}

    def missing(title: str) -> set[str]:
        panel = panels[title]
        found = scene.series(panel, panel["targets"][0])
        return HAPPENS[title] - {legend for legend, values in found.items() if any(value > 0 for value in values)}

    scene.wait(lambda: not any(map(missing, HAPPENS)))
    assert {title: absent for title in HAPPENS if (absent := missing(title))} == {}


@pytest.mark.full
def test_the_exchanges_to_choose_from_are_found(scene: Scene) -> None:
    """The variable of the dashboard Exchanges lists all of them."""
    (variable,) = BOARDS["exchanges"]["templating"]["list"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
    assert (variable["name"], variable["datasource"]["uid"]) == ("exchange", "prometheus")
    assert set(scene.ask(f"label/{label}/values", **{"match[]": metric})) == set(EXCHANGES)
