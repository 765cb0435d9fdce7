"""The deployment keeps its promises: what is published, what may be written, what is bounded, what is in the image."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from config import setting_names
from src.sandbox.server import Sandbox
from tests.conftest import eventually, free_port

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
TEXT = COMPOSE.read_text()
DOCUMENT: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = DOCUMENT["services"]
README = (ROOT / "README.md").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PASSWORDS = {"REDIS_PASSWORD", "GRAFANA_PASSWORD"}
DEMO = {"sandbox", "traffic"}
every_service = pytest.mark.parametrize("name", SERVICES)


def variables() -> dict[str, str]:
    """Map every variable the compose file reads to what stands behind its name: a default, or why it must be set."""
    return dict(re.findall(r"(?<!\$)\$\{(\w+)([^{}]*(?:\{[^{}]*\}[^{}]*)?)\}", TEXT))


def megabytes(size: str) -> int:
    """Read a size as compose writes it."""
    return int(size[:-1]) * {"m": 1, "g": 1024}[size[-1]]


def test_the_file_is_valid_for_the_specification() -> None:
    """The Compose specification's own schema accepts it."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_compose_itself_accepts_it(tmp_path: Path) -> None:
    """Compose reads it, with and without the demo, and refuses it while a password is missing."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not installed (its plugin of version 2)")
    files = ["--project-directory", str(tmp_path), "-f", str(COMPOSE)]
    command = [docker, "compose", *files, "--profile", "demo", "config", "-q"]
    environment = {"PATH": str(Path(docker).parent)} | dict.fromkeys(PASSWORDS, "a-password")
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    for missing in PASSWORDS:
        without = {name: value for name, value in environment.items() if name != missing}
        refused = subprocess.run(command, env=without, capture_output=True, text=True, check=False)
        assert refused.returncode != 0
        assert missing in refused.stderr


def test_the_parts_are_there() -> None:
    """What an operator was promised, and nothing that nobody named."""
    promised = {"app", "edge", "redis", "redis-exporter", "prometheus", "alertmanager", "grafana"}
    assert set(SERVICES) == promised | DEMO
    assert {name for name, service in SERVICES.items() if service.get("profiles") == ["demo"]} == DEMO


@every_service
def test_no_container_can_do_more_than_it_has_to(name: str) -> None:
    """No writable root, no capability, no new privilege, nothing of the host, no root."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    forbidden = {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices", "userns_mode", "container_name"}
    assert not forbidden & set(service)
    assert service.get("user") not in ("root", "0")
    assert not any("docker.sock" in str(volume) for volume in service.get("volumes", []))


@every_service
def test_every_container_is_bounded(name: str) -> None:
    """Memory, processes, logs and temporary files have a size; it comes back after a crash."""
    service = SERVICES[name]
    assert 0 < megabytes(service["mem_limit"]) <= 1024
    assert 0 < service["pids_limit"] <= 128
    assert service["logging"] == {"driver": "json-file", "options": {"max-size": "10m", "max-file": "3"}}
    assert service["restart"] == "unless-stopped"
    assert all("size=" in mount for mount in service.get("tmpfs", []))


@every_service
def test_images_are_pinned(name: str) -> None:
    """By a full version; our own by the tag a deployment gives it."""
    image = SERVICES[name]["image"]
    if name == "app" or name in DEMO:
        assert image == "${REGISTRY:+${REGISTRY:-}/}virtuoso:${TAG:-latest}"
    else:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+(-alpine)?", image)


def test_the_number_of_gateways_is_a_setting() -> None:
    """Or the next `docker compose up -d` without `--scale` would leave one of three."""
    assert SERVICES["app"]["scale"] == "${APP_REPLICAS:-1}"


@every_service
def test_every_part_is_asked_for_its_health(name: str) -> None:
    """Each has a check, the app that of its image; traffic answers nobody. Who waits, waits for health."""
    check = SERVICES[name].get("healthcheck", {})
    if name == "app":
        assert check == {}
        assert re.search(r"^HEALTHCHECK .*\n.*/health/live", DOCKERFILE, re.MULTILINE)
    elif name == "traffic":
        assert check == {"disable": True}
    else:
        assert {"test", "interval", "timeout", "start_period"} <= set(check)
    assert all(wait == {"condition": "service_healthy"} for wait in SERVICES[name].get("depends_on", {}).values())


def test_only_the_edge_and_grafana_are_published() -> None:
    """And those on this machine alone, unless .env says otherwise."""
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"edge", "grafana"}
    for ports in published.values():
        for port in ports:
            assert re.match(r"\$\{(EDGE|GRAFANA)_BIND:-127\.0\.0\.1\}:", port)
    assert all("expose" not in service for service in SERVICES.values())


def test_what_is_inside_has_no_way_out() -> None:
    """All meet on a network that leads nowhere; only who needs it has another."""
    assert DOCUMENT["networks"]["inner"] == {"internal": True}
    ways = {name: set(service["networks"]) - {"inner"} for name, service in SERVICES.items()}
    assert {name: way for name, way in ways.items() if way} == {
        "app": {"out"}, "alertmanager": {"out"}, "edge": {"front"}, "grafana": {"front"},
    }  # fmt: skip


def test_passwords_have_no_default() -> None:
    """Nothing starts without them; Redis asks for its own, which no list of processes shows; nobody signs up."""
    assert {name for name, rest in variables().items() if rest.startswith(":?")} == PASSWORDS
    assert "requirepass" in " ".join(SERVICES["redis"]["command"])
    assert "REDIS_PASSWORD" not in " ".join(SERVICES["redis"]["command"])
    assert SERVICES["grafana"]["environment"]["GF_USERS_ALLOW_SIGN_UP"] == "false"
    assert SERVICES["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_PASSWORD:?")


def test_redis_is_a_cache() -> None:
    """It evicts what is least used, within its container's memory, and writes nothing down."""
    command = " ".join(SERVICES["redis"]["command"])
    assert "maxmemory-policy allkeys-lru" in command
    assert "appendonly no" in command
    assert 'save ""' in command
    (limit,) = re.findall(r"maxmemory (\d+)mb", command)
    assert int(limit) * 1.4 < megabytes(SERVICES["redis"]["mem_limit"])


def test_prometheus_keeps_thirty_days() -> None:
    """And no more than its disk is promised."""
    command = SERVICES["prometheus"]["command"]
    assert "--storage.tsdb.retention.time=30d" in command
    assert any(option.startswith("--storage.tsdb.retention.size=") for option in command)


def test_what_is_mounted_is_there_and_read_only() -> None:
    """Every file of ours that a container reads exists; it cannot write to it; all else are named volumes."""
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source, _, options = volume.replace("${TLS_DIR:-./deploy/edge/tls}", "./deploy/edge/tls").split(":") + (
                [] if volume.count(":") > 1 else [""]
            )
            if source.startswith("."):
                assert (ROOT / source).exists(), source
                assert options == "ro", volume
            else:
                assert source in DOCUMENT["volumes"]


def test_the_app_stops_before_it_is_killed() -> None:
    """The server's own patience ends before compose's, and it keeps idle connections longer than the edge does."""
    options = server_command()
    patience = int(options[options.index("--timeout-graceful-shutdown") + 1])
    assert patience < int(SERVICES["app"]["stop_grace_period"].rstrip("s"))
    pools = re.findall(r"upstream \w+ \{(.*?)\}", (ROOT / "deploy/edge/upstream.conf").read_text(), re.DOTALL)
    (kept,) = re.findall(r"keepalive_timeout (\d+)s", " ".join(pools))
    assert int(kept) < int(options[options.index("--timeout-keep-alive") + 1])
    assert "--no-proxy-headers" in options
    assert "STOPSIGNAL SIGTERM" in DOCKERFILE


def test_every_variable_is_explained() -> None:
    """README and .env.example name each variable of the compose file once, with the default it has."""
    section = README.split("\n## Deploying it\n", 1)[1].split("\n## ", 1)[0]
    table = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", section, re.MULTILINE))
    own = {name: rest for name, rest in variables().items() if name not in setting_names() or name in PASSWORDS}
    assert set(table) == set(own)
    for name, rest in own.items():
        default = "" if rest.startswith((":?", ":+")) else rest.removeprefix(":-")
        assert table[name] == ("to be set" if rest.startswith(":?") else f"`{default}`" if default else "empty")
        assert len(re.findall(rf"^# {name}={re.escape(default)}$", EXAMPLE, re.MULTILINE)) == 1, name


def test_the_demo_leads_to_the_sandbox_alone() -> None:
    """deploy/demo.env names every exchange's address inside, and each reaches the app."""
    lines = [line for line in (ROOT / "deploy/demo.env").read_text().splitlines() if not line.startswith("#")]
    values = dict(line.split("=", 1) for line in lines)
    assert values.pop("COMPOSE_PROFILES") == "demo"
    assert set(values) == {name for name in setting_names() if name.endswith(("_REST_URL", "_WS_URL"))}
    for name, value in values.items():
        exchange, kind, _ = name.split("_")
        port = 9101 + ["BYBIT", "BINANCE", "KRAKEN"].index(exchange)
        assert value == f"{'http' if kind == 'REST' else 'ws'}://sandbox:{port}"
        assert SERVICES["app"]["environment"][name] == f"${{{name}:-}}"


def test_the_dockerfile_is_clean() -> None:
    """hadolint finds nothing."""
    hadolint = Path(sys.executable).parent / "hadolint"
    checked = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_the_image_holds_the_product_and_nothing_else() -> None:
    """Only what .dockerignore lets through can be copied: no tests, no .env, no history. It does not run as root."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert patterns == ["*", "!requirements.txt", "!config.py", "!maintenance.py", "!src", "**/__pycache__"]
    assert re.search(r"^USER [1-9]\d+:[1-9]\d+$", DOCKERFILE, re.MULTILINE)
    assert len(set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE))) == 1
    assert re.search(r"^FROM python:3\.\d+\.\d+-slim-bookworm$", DOCKERFILE, re.MULTILINE)


def server_command() -> list[str]:
    """Return the command of the image, as a list."""
    (command,) = re.findall(r"^CMD (\[.*?\])$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    words: list[str] = json.loads(command.replace("\\\n", ""))
    return words


async def test_a_stop_lets_answers_finish(sandbox: Sandbox) -> None:
    """The image's own command, told to stop: what was asked is answered, nobody new is let in, and it ends well."""
    port = free_port()
    command = [sys.executable, "-m", *server_command()]
    command[command.index("--host") + 1], command[command.index("--port") + 1] = "127.0.0.1", str(port)
    environment = sandbox.settings
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=os.environ | environment | {"REDIS_HOST": "", "LOG_LEVEL": "WARNING"}
    )
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(timeout=20) as client:
        try:
            await until_ready(client, url)
            assert (await client.get(f"{url}/ticker/ETH/USDT?exchange=bybit")).status_code == 200
            await sandbox.set("bybit", hang=True, rate_limit=-1)
            sandbox.clear_counts()
            asked = asyncio.create_task(client.get(f"{url}/ticker/BTC/USDT?exchange=bybit"))
            await eventually(lambda: sandbox.count("bybit", "tickers") == 1)
            process.terminate()
            await refused(port)
            await sandbox.set("bybit", rate_limit=-1)
            assert (await asked).status_code in (200, 504)  # the exchange's own answer, or its timeout, but an answer
            # uvicorn hands the signal on when all is done; as a container's first process that is an end with 0.
            assert await asyncio.wait_for(process.wait(), 15) in (0, -signal.SIGTERM)
        finally:
            if process.returncode is None:
                process.kill()


async def until_ready(client: httpx.AsyncClient, url: str) -> None:
    async with asyncio.timeout(180):
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(f"{url}/health/ready")).status_code == 200:
                    return
            await asyncio.sleep(0.05)


async def refused(port: int) -> None:
    """Wait until nobody listens any more."""
    async with asyncio.timeout(10):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                return
            writer.close()
            await asyncio.sleep(0.02)
