"""Tests of the deployment: Compose file, Dockerfile, image contents and shutdown."""

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
DEPLOYING = (ROOT / "docs" / "deploying.md").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PASSWORDS = {"REDIS_PASSWORD", "GRAFANA_PASSWORD"}
DEMO = {"sandbox", "traffic"}
every_service = pytest.mark.parametrize("name", SERVICES)


def variables() -> dict[str, str]:
    """Map every variable of the Compose file to the text after its name."""
    return dict(re.findall(r"(?<!\$)\$\{(\w+)([^{}]*(?:\{[^{}]*\}[^{}]*)?)\}", TEXT))


def megabytes(size: str) -> int:
    """Parse a size of the Compose file."""
    return int(size[:-1]) * {"m": 1, "g": 1024}[size[-1]]


def test_compose_file_matches_the_schema() -> None:
    """The schema is that of the Compose specification."""
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        str(COMPOSE),
    ]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_docker_compose_accepts_the_file(tmp_path: Path) -> None:
    """Both with and without the demo profile. A missing password is rejected."""
    docker = shutil.which("docker")
    if (
        docker is None
        or subprocess.run(
            [docker, "compose", "version"], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("docker compose is not installed (its plugin of version 2)")
    files = ["--project-directory", str(tmp_path), "-f", str(COMPOSE)]
    command = [docker, "compose", *files, "--profile", "demo", "config", "-q"]
    environment = {"PATH": str(Path(docker).parent)} | dict.fromkeys(PASSWORDS, "a-password")
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    for missing in PASSWORDS:
        without = {name: value for name, value in environment.items() if name != missing}
        rejected = subprocess.run(command, env=without, capture_output=True, text=True, check=False)
        assert rejected.returncode != 0
        assert missing in rejected.stderr


def test_services_are_the_documented_ones() -> None:
    """The demo services need a profile."""
    promised = {"app", "edge", "redis", "redis-exporter", "prometheus", "alertmanager", "grafana"}
    assert set(SERVICES) == promised | DEMO
    assert {
        name for name, service in SERVICES.items() if service.get("profiles") == ["demo"]
    } == DEMO


@every_service
def test_containers_have_no_privileges(name: str) -> None:
    """Read-only root, no capabilities, no host namespaces, no root user."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    forbidden = {
        "privileged",
        "cap_add",
        "network_mode",
        "pid",
        "ipc",
        "devices",
        "userns_mode",
        "container_name",
    }
    assert not forbidden & set(service)
    assert service.get("user") not in ("root", "0")
    assert not any("docker.sock" in str(volume) for volume in service.get("volumes", []))


@every_service
def test_containers_have_resource_limits(name: str) -> None:
    """Memory, processes, logs and tmpfs are limited. Containers restart after a crash."""
    service = SERVICES[name]
    assert 0 < megabytes(service["mem_limit"]) <= 1024
    assert 0 < service["pids_limit"] <= 128
    assert service["logging"] == {
        "driver": "json-file",
        "options": {"max-size": "10m", "max-file": "3"},
    }
    assert service["restart"] == "unless-stopped"
    assert all("size=" in mount for mount in service.get("tmpfs", []))


@every_service
def test_images_are_pinned_to_full_versions(name: str) -> None:
    """The image of the gateway uses the tag of the deployment."""
    image = SERVICES[name]["image"]
    if name == "app" or name in DEMO:
        assert image == "${REGISTRY:+${REGISTRY:-}/}virtuoso:${TAG:-latest}"
    else:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+(-alpine)?", image)


def test_number_of_replicas_is_a_setting() -> None:
    """Without it, `docker compose up -d` would reduce the replicas to one."""
    assert SERVICES["app"]["scale"] == "${APP_REPLICAS:-1}"


@every_service
def test_services_have_health_checks(name: str) -> None:
    """The app uses the check of its image. Dependencies wait for healthy services."""
    check = SERVICES[name].get("healthcheck", {})
    if name == "app":
        assert check == {}
        assert re.search(r"^HEALTHCHECK .*\n.*/health/live", DOCKERFILE, re.MULTILINE)
    elif name == "traffic":
        assert check == {"disable": True}
    else:
        assert {"test", "interval", "timeout", "start_period"} <= set(check)
    assert all(
        wait == {"condition": "service_healthy"}
        for wait in SERVICES[name].get("depends_on", {}).values()
    )


def test_only_edge_and_grafana_are_published() -> None:
    """By default only on 127.0.0.1."""
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"edge", "grafana"}
    for ports in published.values():
        for port in ports:
            assert re.match(r"\$\{(EDGE|GRAFANA)_BIND:-127\.0\.0\.1\}:", port)
    assert all("expose" not in service for service in SERVICES.values())


def test_internal_network_has_no_external_access() -> None:
    """Only services that need it are in another network."""
    assert DOCUMENT["networks"]["inner"] == {"internal": True}
    ways = {name: set(service["networks"]) - {"inner"} for name, service in SERVICES.items()}
    assert {name: way for name, way in ways.items() if way} == {
        "app": {"out"}, "alertmanager": {"out"}, "edge": {"front"}, "grafana": {"front"},
    }  # fmt: skip


def test_passwords_are_required() -> None:
    """The Redis password is not in a process list, and Grafana allows no sign-up."""
    assert {name for name, rest in variables().items() if rest.startswith(":?")} == PASSWORDS
    assert "requirepass" in " ".join(SERVICES["redis"]["command"])
    assert "REDIS_PASSWORD" not in " ".join(SERVICES["redis"]["command"])
    assert SERVICES["grafana"]["environment"]["GF_USERS_ALLOW_SIGN_UP"] == "false"
    assert SERVICES["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"].startswith(
        "${GRAFANA_PASSWORD:?"
    )


def test_redis_evicts_and_never_writes_to_disk() -> None:
    """The memory limit of Redis fits into that of its container."""
    command = " ".join(SERVICES["redis"]["command"])
    assert "maxmemory-policy allkeys-lru" in command
    assert "appendonly no" in command
    assert 'save ""' in command
    (limit,) = re.findall(r"maxmemory (\d+)mb", command)
    assert int(limit) * 1.4 < megabytes(SERVICES["redis"]["mem_limit"])


def test_prometheus_retention_is_limited() -> None:
    """By time (30 days) and by size."""
    command = SERVICES["prometheus"]["command"]
    assert "--storage.tsdb.retention.time=30d" in command
    assert any(option.startswith("--storage.tsdb.retention.size=") for option in command)


def test_mounted_files_exist_and_are_read_only() -> None:
    """All other mounts are named volumes."""
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source, _, options = volume.replace(
                "${TLS_DIR:-./deploy/edge/tls}", "./deploy/edge/tls"
            ).split(":") + ([] if volume.count(":") > 1 else [""])
            if source.startswith("."):
                assert (ROOT / source).exists(), source
                assert options == "ro", volume
            else:
                assert source in DOCUMENT["volumes"]


def test_shutdown_and_keep_alive_times_are_consistent() -> None:
    """Shutdown ends before the grace period. The edge closes idle connections first."""
    options = server_command()
    patience = int(options[options.index("--timeout-graceful-shutdown") + 1])
    assert patience < int(SERVICES["app"]["stop_grace_period"].rstrip("s"))
    pools = re.findall(
        r"upstream \w+ \{(.*?)\}", (ROOT / "deploy/edge/upstream.conf").read_text(), re.DOTALL
    )
    (kept,) = re.findall(r"keepalive_timeout (\d+)s", " ".join(pools))
    assert int(kept) < int(options[options.index("--timeout-keep-alive") + 1])
    assert "--no-proxy-headers" in options
    assert "STOPSIGNAL SIGTERM" in DOCKERFILE


def test_compose_variables_are_documented() -> None:
    """docs/deploying.md and .env.example list each variable with its default."""
    section = DEPLOYING.split("\n## Compose variables\n", 1)[1].split("\n## ", 1)[0]
    table = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", section, re.MULTILINE))
    compose_only = {
        name: rest
        for name, rest in variables().items()
        if name not in setting_names() or name in PASSWORDS
    }
    assert set(table) == set(compose_only)
    for name, rest in compose_only.items():
        default = "" if rest.startswith((":?", ":+")) else rest.removeprefix(":-")
        shown = f"`{default}`" if default else "empty"
        assert table[name] == ("required" if rest.startswith(":?") else shown)
        assert len(re.findall(rf"^# {name}={re.escape(default)}$", EXAMPLE, re.MULTILINE)) == 1, (
            name
        )


def test_demo_settings_use_only_the_sandbox() -> None:
    """deploy/demo.env sets the URL of every exchange, and the app receives each."""
    lines = [
        line
        for line in (ROOT / "deploy/demo.env").read_text().splitlines()
        if not line.startswith("#")
    ]
    values = dict(line.split("=", 1) for line in lines)
    assert values.pop("COMPOSE_PROFILES") == "demo"
    assert set(values) == {
        name for name in setting_names() if name.endswith(("_REST_URL", "_WS_URL"))
    }
    for name, value in values.items():
        exchange, kind, _ = name.split("_")
        port = 9101 + ["BYBIT", "BINANCE", "KRAKEN"].index(exchange)
        assert value == f"{'http' if kind == 'REST' else 'ws'}://sandbox:{port}"
        assert SERVICES["app"]["environment"][name] == f"${{{name}:-}}"


def test_dockerfile_passes_hadolint() -> None:
    """There are no warnings."""
    hadolint = Path(sys.executable).parent / "hadolint"
    checked = subprocess.run(
        [hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout) == (0, "")


def test_image_contains_only_the_product() -> None:
    """.dockerignore excludes tests, .env and history. The image does not run as root."""
    patterns = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert patterns == [
        "*",
        "!requirements.txt",
        "!config.py",
        "!maintenance.py",
        "!src",
        "**/__pycache__",
    ]
    assert re.search(r"^USER [1-9]\d+:[1-9]\d+$", DOCKERFILE, re.MULTILINE)
    assert len(set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE))) == 1
    assert re.search(r"^FROM python:3\.\d+\.\d+-slim-bookworm$", DOCKERFILE, re.MULTILINE)


def server_command() -> list[str]:
    """Return the command of the image as a list."""
    (command,) = re.findall(r"^CMD (\[.*?\])$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    words: list[str] = json.loads(command.replace("\\\n", ""))
    return words


async def test_shutdown_completes_open_requests(sandbox: Sandbox) -> None:
    """The command of the image refuses new connections on SIGTERM and exits cleanly."""
    port = free_port()
    command = [sys.executable, "-m", *server_command()]
    command[command.index("--host") + 1], command[command.index("--port") + 1] = (
        "127.0.0.1",
        str(port),
    )
    environment = sandbox.settings
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=ROOT,
        env=os.environ | environment | {"REDIS_HOST": "", "LOG_LEVEL": "WARNING"},
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
            await wait_until_refused(port)
            await sandbox.set("bybit", rate_limit=-1)
            assert (await asked).status_code in (200, 504)  # value of the exchange, or its timeout
            # uvicorn raises the signal again after shutdown. As the first process of a container,
            # it exits with 0.
            assert await asyncio.wait_for(process.wait(), 15) in (0, -signal.SIGTERM)
        finally:
            if process.returncode is None:
                process.kill()


async def until_ready(client: httpx.AsyncClient, url: str) -> None:
    """Wait until the gateway is ready."""
    async with asyncio.timeout(180):
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(f"{url}/health/ready")).status_code == 200:
                    return
            await asyncio.sleep(0.05)


async def wait_until_refused(port: int) -> None:
    """Wait until the port refuses connections."""
    async with asyncio.timeout(10):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                return
            writer.close()
            await asyncio.sleep(0.02)
