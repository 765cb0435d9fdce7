"""Real, unmodified clients from PyPI and npm, each in an environment of its own."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from src.sandbox.server import Sandbox
from tests.conftest import StartGateway, tool
from tests.page.browser import ROOT, missing
from tests.raw.clients import environments, freqtrade_bot

pytestmark = [pytest.mark.full, pytest.mark.xdist_group("clients")]
Outcomes = dict[str, dict[str, Any]]
SECONDS = 240  # timeout of one client, on a busy machine
CLIENTS = ["ccxt async", "ccxt sync", "ccxt js", "python-binance sync", "python-binance async"]
CLIENTS += ["pybit", "python-kraken-sdk"]
EXCHANGES = {"python-binance": "binance", "pybit": "bybit", "python-kraken-sdk": "kraken"}
# Knobs of the sandbox.
FAULTS: dict[str, dict[str, Any]] = {
    "unknown symbol": {"error": "no_symbol"},
    "rate limit": {"error": "rate_limit"},
    "ban": {"error": "banned"},
    "firewall": {"error": "firewall"},
    "busy": {"error": "busy"},
    "unavailable": {"error": "unavailable"},
    "timeout": {"error": "timeout"},
    "geo block": {"geo_block": True},
    "no JSON": {"body": "<html>"},
    "status 500": {"status": 500},
}
SILENT = {("ccxt async", "no JSON")}  # ccxt returns a ticker without values
PYTHON_FAULTS = [("ccxt async", fault) for fault in FAULTS]
JS_FAULTS = [("ccxt js", fault) for fault in ("unknown symbol", "rate limit", "busy")]
# Section of docs/drop-in.md -> client, and a line that follows the example.
EXAMPLES = {
    "ccxt": ("ccxt sync", "print([e.fetch_ticker('BTC/USDT') for e in (binance, bybit, kraken)])"),
    "python-binance": ("python-binance", "print(reader.get_ticker(symbol='BTCUSDT'))"),
    "pybit": ("pybit", "print(session.get_tickers(category='spot', symbol='BTCUSDT'))"),
    "python-kraken-sdk": ("python-kraken-sdk", "print(market.get_ticker(pair='XBTUSDT'))"),
}
GUIDE = ROOT / "docs" / "drop-in.md"
GATEWAY = "http://127.0.0.1:8000"


def example(section: str, language: str) -> str:
    """Return the first example of a section in a language."""
    text = GUIDE.read_text().partition(f"\n## {section}\n")[2]
    return text.partition(f"```{language}\n")[2].partition("```")[0]


def install(client: str) -> list[str]:
    """Return the command that runs a client's script. Install the client before its first use."""
    try:
        if client == "ccxt js":
            script = Path(__file__).parent / "clients" / "ccxt_client.mjs"
            return [tool("node", "nodejs"), str(script), str(environments.npm_folder())]
        name = client.partition(" ")[0]
        module = f"tests.raw.clients.{name.replace('-', '_')}_client"
        return [str(environments.python_of(name)), "-m", module]
    except environments.InstallError as error:
        missing(f"{client} could not be installed: {error}")


async def run(client: str, urls: dict[str, str], direct: dict[str, str], *calls: str) -> Outcomes:
    """Return the outcomes of a client's calls, or of all its calls, by `exchange method`.

    `direct` are the URLs of the exchanges for data that the gateway does not serve.
    """
    command = await asyncio.to_thread(install, client)
    name, _, mode = client.partition(" ")
    options: dict[str, Any] = {"mode": mode, "calls": calls}
    if name == "ccxt":
        pairs = {key: {"public": url, "other": direct[key]} for key, url in urls.items()}
        options["exchanges"] = pairs
    else:
        options["url"] = urls[EXCHANGES[name]]
    process = await asyncio.create_subprocess_exec(
        *command,
        json.dumps(options),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, error = await asyncio.wait_for(process.communicate(), SECONDS)
    assert process.returncode == 0, error.decode()[-2_000:]
    found = json.loads(output)
    by_exchange = found if name == "ccxt" else {EXCHANGES[name]: found}
    return {
        f"{exchange} {method}": outcome
        for exchange, outcomes in by_exchange.items()
        for method, outcome in outcomes.items()
    }


@pytest.mark.parametrize("client", CLIENTS)
async def test_clients_read_all_public_data_of_the_sandbox(client: str, sandbox: Sandbox) -> None:
    """No call of a client fails without the gateway."""
    outcomes = await run(client, sandbox.urls, sandbox.urls)
    assert len(outcomes) >= 9
    failed = {name: outcome for name, outcome in outcomes.items() if "error" in outcome}
    assert not failed


@pytest.mark.parametrize("client", CLIENTS)
async def test_clients_read_the_same_through_the_gateway(
    client: str, sandbox: Sandbox, start: StartGateway
) -> None:
    """Each call has the same result directly and through the gateway."""
    live = await start()
    urls = {name: f"{live.url}/raw/{name}" for name in sandbox.urls}
    direct = await run(client, sandbox.urls, sandbox.urls)
    through = await run(client, urls, sandbox.urls)
    assert through.keys() == direct.keys()
    different = {name for name in direct if through[name] != direct[name]}
    assert not different


@pytest.mark.parametrize(("client", "fault"), [*PYTHON_FAULTS, *JS_FAULTS])
async def test_ccxt_raises_the_same_exception_through_the_gateway(
    client: str, fault: str, sandbox: Sandbox, start: StartGateway
) -> None:
    """Each fault of an exchange raises the same class of exception as without the gateway."""
    live = await start()
    urls = {name: f"{live.url}/raw/{name}" for name in sandbox.urls}
    # Market lists are read without the fault.
    only = {"binance": "ticker", "bybit": "tickers", "kraken": "Ticker"}
    raised = []
    for addresses in (sandbox.urls, urls):
        for name in sandbox.urls:
            await sandbox.set(name, rate_limit=-1, only=only[name], **FAULTS[fault])
        outcomes = await run(client, addresses, sandbox.urls, "fetch_ticker")
        raised.append({name: outcome.get("error") for name, outcome in outcomes.items()})
    assert raised[0] == raised[1]
    assert any(raised[0].values()) is ((client, fault) not in SILENT)


@pytest.mark.parametrize("section", EXAMPLES)
async def test_examples_of_the_guide_use_the_gateway(
    section: str, sandbox: Sandbox, start: StartGateway
) -> None:
    """Each example of docs/drop-in.md reads a ticker through the gateway."""
    live = await start()
    client, last_line = EXAMPLES[section]
    command = await asyncio.to_thread(install, client)
    code = example(section, "python").replace(GATEWAY, live.url) + last_line
    process = await asyncio.create_subprocess_exec(
        command[0], "-c", code, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, error = await asyncio.wait_for(process.communicate(), SECONDS)
    assert process.returncode == 0, error.decode()[-2_000:]
    assert len(output) > 100
    names = sandbox.urls if section == "ccxt" else [EXCHANGES[client]]
    for name in names:
        assert sandbox.count(name) > 0


def test_freqtrade_example_of_the_guide_is_tested() -> None:
    """The example of docs/drop-in.md has the settings that the tests of freqtrade use."""
    shown = json.loads("{" + example("freqtrade", "json") + "}")
    used = freqtrade_bot.configuration("binance", f"{GATEWAY}/raw/binance")["exchange"]
    shown_urls = shown["ccxt_config"]["urls"]["api"]
    assert shown_urls.items() <= used["ccxt_config"]["urls"]["api"].items()
    assert shown["ccxt_config"]["options"] == used["ccxt_config"]["options"]
    assert {name: used[name] for name in shown if name != "ccxt_config"} == {
        name: value for name, value in shown.items() if name != "ccxt_config"
    }


def test_clients_are_installed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash of the pins finds the folder of an earlier installation; other pins do not."""
    monkeypatch.setattr(environments, "CACHE", tmp_path)
    pins = tmp_path / "pins.txt"
    created: list[Path] = []

    def create(folder: Path) -> None:
        folder.mkdir()
        created.append(folder)

    for text in ("a==1", "a==1", "a==2"):
        pins.write_text(text)
        assert environments.installed("test", pins, create) == created[-1]
    assert len(set(created)) == len(created) == 2
