"""Tests of the Grafana dashboards: generated files, panels and queries.

The `full` tests run every query in a real Prometheus that evaluates the project's rules and scrapes
two real replicas. The load produces every event that the panels show.
"""

import asyncio
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import combinations, cycle, product
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
PANELS = [
    (name, panel)
    for name, board in BOARDS.items()
    for panel in board["panels"]
    if panel["type"] != "row"
]
GRAPHS = [(name, panel) for name, panel in PANELS if panel["type"] != "text"]
INSTANT = ("stat", "bargauge")  # panel types that query the current value, not a time range
DEADLINE = (
    120.0  # seconds after the start of the load; the tests end as soon as the data is complete
)
BOT = "fedcba9876543210"  # key of a client that uses its limit of a minute at once, then continues
DESKS = [f"0123456789abcde{number}" for number in range(8)]  # keys used in turn, below the limit
LIMIT = 600  # requests per minute and client
SETTINGS = {
    "API_KEYS": ",".join(
        [f"bot:{BOT}", *(f"desk{number}:{key}" for number, key in enumerate(DESKS))]
    ),
    "CLIENT_RATE_LIMIT": str(LIMIT),
    "ADMIN_TOKEN": "0123456789",
    "KRAKEN_BUDGET": "1000/5",
    "CB_RESET_SECONDS": "3",
    "STALE_SECONDS": "300",  # kraken's values from before its failure are served to the end
    "REVALIDATE_SECONDS": "1",
    "TICKER_TTL_SECONDS": "1",
    "ORDERBOOK_TTL_SECONDS": "1",
    "TRADES_TTL_SECONDS": "1",
    "OHLCV_TTL_SECONDS": "1",
}
DATA_PATHS = (
    "/ticker/BTC-USDT",
    "/ticker/BTC-USDT?exchange=binance",
    "/ticker/BTC-USDT?exchange=kraken",  # stale
    "/ticker/ETH-USDT?exchange=kraken",  # 503
    "/tickers?symbols=BTC-USDT,ETH-USDT",
    "/raw/bybit/v5/market/tickers?category=spot&symbol=BTCUSDT",
    "/orderbook/BTC-USDT",
    "/orderbook/ETH-USDT?exchange=binance",  # refused; the refusal is cached
    "/ohlcv/BTC-USDT",
    "/trades/BTC-USDT",
)
STREAM_PATHS = ("/stream/ETH-USDT", "/stream/BTC-USDT?channel=trades&exchange=bybit")
CHANNELS = ("ticker", "book", "trades")
OWN_PATHS = ("/markets", "/exchanges", "/health", "/health/live", "/health/ready", "/nope")
EXPECTED = {  # legends with values above zero in the first query of each panel
    "cache/Cache results": set(metrics.CACHE_RESULTS),
    "cache/Refresh-ahead": {"success"},
    "exchanges/Calls": set(EXCHANGES),
    "exchanges/Circuit breakers": {"kraken"},
    "exchanges/Calls blocked by a breaker": {"kraken"},
    "exchanges/Breaker state changes": {"kraken open", "kraken half_open"},
    "exchanges/Outcomes: $exchange": {"success", "rejected", "unavailable"},
    "exchanges/Sockets": {"binance", "bybit"},
    "exchanges/Messages": {"binance ticker", *(f"bybit {channel}" for channel in CHANNELS)},
    "exchanges/Reconnects": {"kraken refused"},
    "exchanges/Watched streams": {
        f"{exchange} {channel}" for exchange in EXCHANGES for channel in CHANNELS
    },
    "exchanges/Stale streams": {"kraken"},
    "service/Streaming clients": {"ws", "sse"},
    "service/Updates sent to clients": set(CHANNELS),
    "service/Latency from exchange message to clients": {"p50"},
    "service/Lease changes": {"taken"},
    "service/Alerts firing": {"firing"},
    "service/Alerts": {"VirtuosoErrorBudgetFastBurn"},
    "service/Errors by status": {"401", "404", "429", "503"},
    "service/Requests by client": {"bot", *(f"desk{number}" for number in range(len(DESKS)))},
    "service/Rejected client requests": {"bot, limited", "unknown, unauthorized"},
}


def names(expression: str) -> set[str]:
    """Return the metric names in a query, without strings, labels, functions and operators."""
    bare = re.sub(r'"[^"]*"|\[[^]]*\]', "", expression)
    bare = re.sub(r"\{[^}]*\}|\b(by|ignoring|group_left|on|without) *\([^)]*\)", "", bare)
    words = re.findall(r"(?<![\w.$])[a-zA-Z_][\w:]*(?! *\()\b(?! *\()", bare)
    return set(words) - {"or", "and", "by", "group_left", "ignoring"}


def queries(panel: dict[str, Any]) -> list[str]:
    """Return the PromQL expressions of a panel."""
    return [target["expr"] for target in panel["targets"]]


def is_about_redis(panel: dict[str, Any]) -> bool:
    """True if the data of the panel comes from redis-exporter."""
    return any(name.startswith("redis_") for query in queries(panel) for name in names(query))


def test_committed_dashboards_match_the_generator() -> None:
    """After a change, `python deploy/grafana/dashboards.py` updates the files."""
    rendered = dashboards.render()
    assert {file.name: file.read_text() for file in FILES} == rendered
    assert dashboards.render() == rendered


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_has_title_description_unit_and_queries(name: str) -> None:
    """Titles are unique per dashboard, and queries use the provisioned data source."""
    source = {"type": "prometheus", "uid": "prometheus"}
    panels = [panel for board, panel in GRAPHS if board == name]
    assert len({panel["title"] for panel in panels}) == len(panels) > 10
    for panel in panels:
        title = panel["title"]
        defaults = panel["fieldConfig"]["defaults"]
        assert panel["description"].endswith("."), title
        assert defaults["unit"], title
        assert panel["datasource"] == source, title
        assert panel["targets"], title
        for target in panel["targets"]:
            assert target["datasource"] == source, title
            assert target["legendFormat"], title
            assert target["instant"] is not target["range"] is (panel["type"] not in INSTANT), title
        values = [step["value"] for step in defaults["thresholds"]["steps"]]
        assert values[0] is None, title
        assert values[1:] == sorted(values[1:]), title


@pytest.mark.parametrize("name", BOARDS)
def test_panels_do_not_overlap(name: str) -> None:
    """Every panel and row has its own area within the 24 columns, and its own id."""
    board = BOARDS[name]
    cells = []
    for panel in board["panels"]:
        area = panel["gridPos"]
        assert area["w"] > 0
        assert area["x"] + area["w"] <= 24
        columns = range(area["x"], area["x"] + area["w"])
        lines = range(area["y"], area["y"] + area["h"])
        cells.append(set(product(columns, lines)))
    for first, second in combinations(cells, 2):
        assert not first & second
    assert [panel["id"] for panel in board["panels"]] == list(range(1, len(cells) + 1))


def test_dashboards_have_fixed_uids_and_link_to_each_other() -> None:
    """Each dashboard links to the others by tag, shows the last hour, and names the runbook."""
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


def test_every_queried_metric_exists() -> None:
    """Queries use metrics of the gateway, recorded series and built-in metrics of Prometheus."""
    suffixes = {
        "counter": ("_total",),
        "histogram": ("_bucket", "_sum", "_count"),
        "gauge": ("",),
        "info": ("_info",),
    }
    known = {
        family.name + suffix
        for family in REGISTRY.collect()
        for suffix in suffixes.get(family.type, ("",))
    }
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "recording.yml").read_text())
    known |= {rule["record"] for group in rules["groups"] for rule in group["rules"]}
    known |= {"ALERTS", "up", "scrape_samples_scraped"}
    for _, panel in GRAPHS:
        for expression in queries(panel):
            unknown = {name for name in names(expression) if not name.startswith("redis_")} - known
            assert names(expression), expression
            assert not unknown, panel["title"]


def test_every_exported_metric_is_on_a_dashboard() -> None:
    """A metric may also be shown through a recording rule. The version info is the exception."""
    rules = (ROOT / "deploy" / "prometheus" / "recording.yml").read_text()
    shown = rules + "".join(expression for _, panel in GRAPHS for expression in queries(panel))
    exported = {family.name for family in REGISTRY.collect() if family.name.startswith("virtuoso_")}
    assert {name for name in exported if name not in shown} == {"virtuoso_build_info"}


def test_grafana_provisioning_matches_the_dashboards() -> None:
    """The data source has the uid of the dashboards. The provider reads the mounted folder."""
    folder = ROOT / "deploy" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    assert (source["uid"], source["type"], source["url"]) == (
        "prometheus",
        "prometheus",
        "http://prometheus:9090",
    )
    assert (source["isDefault"], source["editable"], source["jsonData"]["timeInterval"]) == (
        True,
        False,
        "15s",
    )
    (provider,) = yaml.safe_load((folder / "dashboards" / "virtuoso.yml").read_text())["providers"]
    assert (provider["folder"], provider["allowUiUpdates"]) == ("Virtuoso", False)
    assert provider["options"]["path"] == "/etc/grafana/dashboards"


def fill(legend: str, labels: dict[str, str]) -> str:
    """Replace the labels in a legend by their values. Raises `KeyError` for an unknown label."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels[match[1]], legend)


class Scene(NamedTuple):
    """A Prometheus that scrapes two replicas under load."""

    prometheus: str
    started: float
    loading: Future[None]

    def query(self, path: str, **parameters: object) -> Any:
        """Call the API of Prometheus. Raises `ValueError` for a rejected query."""
        answer = json.loads(fetch(f"{self.prometheus}/api/v1/{path}?{urlencode(parameters)}")[1])
        if answer["status"] != "success":
            raise ValueError(answer["error"])
        return answer["data"]

    def series(self, panel: dict[str, Any], target: dict[str, Any]) -> dict[str, list[float]]:
        """Return the values by legend, as Grafana draws them.

        Raises `ValueError` for duplicate legends and for legends with unknown labels.
        """
        expression = target["expr"]
        # The whole scene: on a busy machine, an event may be longer ago than a minute.
        seconds = math.ceil(time.time() - self.started) + 1
        for variable, value in (
            ("$__rate_interval", "5s"),
            ("$__range", f"{seconds}s"),
            ("$exchange", ".*"),
        ):
            expression = expression.replace(variable, value)
        if panel["type"] in INSTANT:
            result = self.query("query", query=expression)["result"]
        else:
            window = {"start": self.started, "end": time.time(), "step": 1}
            result = self.query("query_range", query=expression, **window)["result"]
        found: dict[str, list[float]] = {}
        for series in result:
            try:
                legend = fill(target["legendFormat"], series["metric"])
            except KeyError as label:
                raise ValueError(
                    f"the legend uses a label that the series lacks: {label}"
                ) from None
            if legend in found:
                raise ValueError(f"two series have the legend {legend}")
            found[legend] = [float(value) for _, value in series.get("values") or [series["value"]]]
        return found

    def fault(self, panel: dict[str, Any]) -> str:
        """Return what is wrong with the data of a panel, or an empty string."""
        try:
            found = [self.series(panel, target) for target in panel["targets"]]
        except ValueError as error:
            return str(error)
        if not all(found):
            return "a query returns no data"
        empty = [
            legend
            for series in found
            for legend, values in series.items()
            if not any(map(math.isfinite, values))
        ]
        return f"only NaN: {empty}" if empty else ""

    def wait(self, done: Callable[[], bool]) -> None:
        """Wait for a condition until the deadline. Raises the error of the load, if it failed."""
        while not done() and time.time() < self.started + DEADLINE:
            if self.loading.done():
                self.loading.result()
            time.sleep(0.5)

    def faults(self, panels: list[dict[str, Any]]) -> dict[str, str]:
        """Wait for data in each panel. Returns the faults that remain at the deadline."""
        for panel in panels:
            self.wait(lambda panel=panel: not self.fault(panel))  # type: ignore[misc]
        return {panel["title"]: fault for panel in panels if (fault := self.fault(panel))}


async def load(replicas: list[Server], end: Event) -> None:
    """Send requests until `end` is set: repeated, concurrent, over the limit and without a key."""
    # Kept connections are not reused, because the server may close one at the same moment.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=15, limits=limits) as client:
        desks = cycle(DESKS)

        async def ask(replica: Server, path: str, key: str = "") -> None:
            headers = {"X-API-Key": key or next(desks)}
            await client.get(replica.url + path, headers=headers)

        watching = [asyncio.create_task(watch(replica)) for replica in replicas]
        watching += [
            asyncio.create_task(follow(client, replicas[0].url + path)) for path in STREAM_PATHS
        ]
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
    """Subscribe to all channels over one WebSocket and read until cancelled."""
    headers = {"X-API-Key": DESKS[0]}
    async with connect(
        replica.url.replace("http", "ws") + "/ws", additional_headers=headers
    ) as client:
        for channel in CHANNELS:
            request = {
                "op": "subscribe",
                "channel": channel,
                "exchange": "all",
                "symbols": ["BTC/USDT", "ETH/USDT"],
            }
            await client.send(json.dumps(request))
        async for _ in client:
            pass


async def follow(client: httpx.AsyncClient, url: str) -> None:
    """Read server-sent events until cancelled."""
    headers = {"X-API-Key": DESKS[1]}
    async with client.stream("GET", url, headers=headers, timeout=60) as response:
        response.raise_for_status()
        async for _ in response.aiter_lines():
            pass


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Start two replicas, Redis, its exporter, sandbox exchanges (one fails) and Prometheus."""
    prometheus = tool("prometheus", "prometheus")
    exporter = shutil.which("prometheus-redis-exporter")
    folder = tmp_path_factory.mktemp("prometheus")
    ports = (free_port(), free_port())
    end = Event()
    with Servers() as servers, ThreadPoolExecutor(1) as thread:
        sandbox = servers.sandbox()
        redis = servers.redis()
        for name in EXCHANGES:
            sandbox.set(name, rate_limit=-1)
        if exporter:
            address = f"127.0.0.1:{ports[1]}"
            servers.start([exporter, "-redis.addr", redis, "-web.listen-address", address])
        settings = {"REDIS_URL": redis, **SETTINGS}
        replicas = []
        for _ in range(2):  # in turn, so that the second replica reads the market lists from Redis
            replica = servers.gateway(sandbox, settings, wait=False)
            servers.wait(
                f"{replica.url}/health",
                lambda status, body: status == 200 and b"not loaded" not in body,
            )
            fetch(replica.url + DATA_PATHS[2], headers={"X-API-Key": DESKS[0]})
            replicas.append(replica)
        targets = {
            "virtuoso": [replica.url.removeprefix("http://") for replica in replicas],
            "redis": [f"127.0.0.1:{ports[1]}"],
        }
        configuration = {
            "global": {
                "scrape_interval": "1s",
                "scrape_timeout": "1s",
                "evaluation_interval": "1s",
            },
            "rule_files": [
                str(ROOT / "deploy" / "prometheus" / f"{kind}.yml")
                for kind in ("recording", "alerts")
            ],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": addresses}]}
                for job, addresses in targets.items()
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        servers.start(
            [prometheus, *options, f"--web.listen-address=127.0.0.1:{ports[0]}", "--log.level=warn"]
        )
        # Prometheus sees no increase for events before its first scrape.
        scraped = f"http://127.0.0.1:{ports[0]}/api/v1/query?query=count(virtuoso_build_info)==2"
        servers.wait(scraped, lambda status, body: status == 200 and b'"value"' in body)
        sandbox.set("bybit", latency_ms=50, rate_limit=-1)
        sandbox.set(
            "binance",
            status=400,
            body='{"code":-1121,"msg":"Invalid symbol."}',
            only="depth",
            rate_limit=-1,
        )
        sandbox.set("kraken", status=500, rate_limit=-1)
        fetch(
            f"{replicas[0].url}/admin/maintenance/daily",
            b"",
            {"Authorization": f"Bearer {SETTINGS['ADMIN_TOKEN']}"},
        )
        loading = thread.submit(asyncio.run, load(replicas, end))
        try:
            yield Scene(f"http://127.0.0.1:{ports[0]}", time.time(), loading)
        finally:
            end.set()


@pytest.mark.full
def test_every_query_returns_data_under_load(scene: Scene) -> None:
    """All panels except those of the Redis server have data, without one series per replica."""
    panels = [panel for _, panel in GRAPHS if not is_about_redis(panel)]
    assert len(panels) == len(GRAPHS) - 3
    assert scene.faults(panels) == {}


@pytest.mark.full
def test_redis_panels_show_data_of_the_exporter(scene: Scene) -> None:
    """The three panels about the Redis server have data."""
    tool("prometheus-redis-exporter", "prometheus-redis-exporter")
    panels = [panel for _, panel in GRAPHS if is_about_redis(panel)]
    assert len(panels) == 3
    assert scene.faults(panels) == {}


@pytest.mark.full
def test_expected_events_are_visible(scene: Scene) -> None:
    """Each event that the load causes shows as a value above zero in its panel."""
    panels = {f"{name}/{panel['title']}": panel for name, panel in GRAPHS}

    def missing(title: str) -> set[str]:
        panel = panels[title]
        found = scene.series(panel, panel["targets"][0])
        positive = {
            legend for legend, values in found.items() if any(value > 0 for value in values)
        }
        return EXPECTED[title] - positive

    scene.wait(lambda: not any(map(missing, EXPECTED)))
    assert {title: absent for title in EXPECTED if (absent := missing(title))} == {}


@pytest.mark.full
def test_exchange_variable_lists_all_exchanges(scene: Scene) -> None:
    """The query of the variable in the dashboard Exchanges returns every exchange."""
    (variable,) = BOARDS["exchanges"]["templating"]["list"]
    metric, label = re.fullmatch(
        r"label_values\((\w+), (\w+)\)", variable["query"]["query"]
    ).groups()  # type: ignore[union-attr]
    assert (variable["name"], variable["datasource"]["uid"]) == ("exchange", "prometheus")
    assert set(scene.query(f"label/{label}/values", **{"match[]": metric})) == set(EXCHANGES)
