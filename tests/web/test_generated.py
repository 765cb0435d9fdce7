"""Clients that public tools generate from the OpenAPI document, and the origin of `/docs`.

The tools have their own environments in pytest's cache folder; each is installed once.
"""

import asyncio
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from src.web.dashboard import SWAGGER_UI
from tests.conftest import Live, StartGateway, tool
from tests.page.browser import ROOT, missing

pytestmark = pytest.mark.full
OWN = ROOT / "tests" / "generated"
SECONDS = 540  # timeout of one tool, on a busy machine


def run(
    *command: object, folder: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a tool and return its output."""
    arguments = [str(part) for part in command]
    return subprocess.run(
        arguments,
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


async def check(*command: object, folder: Path = ROOT, **environment: str) -> str:
    """Run a tool beside the test's gateway and return its output; fail if the tool fails."""
    done = await asyncio.to_thread(run, *command, folder=folder, **environment)
    if done.returncode:
        pytest.fail(f"{command[0]}: {done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout + done.stderr


def install(folder: Path, pins: Path, commands: Sequence[Sequence[object]]) -> Path:
    """Run the commands that install what a file pins, unless that was done before."""
    folder.mkdir(parents=True, exist_ok=True)
    installed = folder / "installed"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other pytest workers wait
        if not installed.exists() or installed.read_bytes() != pins.read_bytes():
            for command in commands:
                done = run(*command)
                if done.returncode:
                    missing(
                        f"{pins.relative_to(ROOT)} could not be installed: {done.stderr[-500:]}"
                    )
            shutil.copy(pins, installed)
    return folder


@pytest.fixture(scope="session")
def python_tools(pytestconfig: pytest.Config) -> Path:
    """Install the generator of Python clients; return the folder of its programs."""
    folder, pins = cache(pytestconfig) / "python", OWN / "requirements.txt"
    pip = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    create = [sys.executable, "-m", "venv", "--clear", folder]
    return install(folder, pins, [create, [*pip, "--requirement", pins]]) / "bin"


@pytest.fixture(scope="session")
def npm_folder(pytestconfig: pytest.Config) -> Path:
    """Install the npm packages; return a folder with `node_modules`."""
    npm, folder = tool("npm", "npm"), cache(pytestconfig) / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(OWN / name, folder)
    ci = [npm, "ci", "--prefix", folder, "--silent", "--no-audit", "--no-fund", "--ignore-scripts"]
    return install(folder, OWN / "package-lock.json", [ci])


def cache(config: pytest.Config) -> Path:
    """Return the folder that pytest keeps for these tests; git ignores it."""
    assert config.cache is not None
    return config.cache.mkdir("generated")


async def save_document(live: Live, folder: Path) -> Path:
    """Write the OpenAPI document of a gateway into a file."""
    path = folder / "openapi.json"
    path.write_text((await live.get("/openapi.json")).text)
    return path


async def expected(live: Live) -> dict[str, Any]:
    """Return what the generated clients have to read."""
    ticker, book = (
        (await live.get("/ticker/BTC-USDT")).json(),
        (await live.get("/orderbook/BTC-USDT?limit=5")).json(),
    )
    problem = (await live.get("/ticker/BTC-USTD")).json()
    wanted = {"price": ticker["price"], "bids": book["bids"], "code": problem["code"]}
    assert len(book["bids"]) == 5
    assert problem["suggestions"]
    return wanted | {"suggestions": problem["suggestions"]}


async def test_python_client_is_generated_and_reads(
    start: StartGateway, python_tools: Path, tmp_path: Path
) -> None:
    """openapi-python-client has no warning; its client passes mypy and reads answers."""
    live, package = await start(), tmp_path / "virtuoso_client"
    document, python = await save_document(live, tmp_path), python_tools / "python"
    generate = [
        python_tools / "openapi-python-client",
        "generate",
        "--path",
        document,
        "--meta",
        "none",
    ]
    path = f"{python_tools}{os.pathsep}{os.environ['PATH']}"  # the generator runs ruff
    output = await check(
        *generate, "--output-path", package, "--fail-on-warning", folder=tmp_path, PATH=path
    )
    assert "warning" not in output.lower()
    reader = Path(shutil.copy(OWN / "read.py", tmp_path))
    await check(python, "-m", "compileall", "-q", package)
    types = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file=",
        "--strict",
        "--python-executable",
        python,
    ]
    await check(
        *types, "--follow-imports=silent", reader, folder=tmp_path
    )  # the generator's own code is not strict
    assert json.loads(await check(python, reader, live.url, folder=tmp_path)) == await expected(
        live
    )


async def test_typescript_client_is_generated_and_reads(
    start: StartGateway, npm_folder: Path, tmp_path: Path
) -> None:
    """openapi-typescript and tsc (strict) report nothing, and openapi-fetch reads the answers."""
    live, node = await start(), tool("node", "nodejs")
    document = await save_document(live, tmp_path)
    for name in ("read.ts", "tsconfig.json", "package.json"):
        shutil.copy(OWN / name, tmp_path)
    (tmp_path / "node_modules").symlink_to(npm_folder / "node_modules")
    modules = tmp_path / "node_modules"
    output = await check(
        node,
        modules / "openapi-typescript/bin/cli.js",
        document,
        "-o",
        "schema.ts",
        folder=tmp_path,
    )
    assert "warn" not in output.lower()
    assert "⚠" not in output
    compiler = modules / "typescript/bin/tsc"
    await check(node, compiler, "--noEmit", "--strict", "--project", ".", folder=tmp_path)
    await check(node, compiler, "--outDir", ".", "--project", ".", folder=tmp_path)
    assert json.loads(await check(node, "read.js", live.url, folder=tmp_path)) == await expected(
        live
    )


async def test_swagger_ui_equals_the_published_one(start: StartGateway, npm_folder: Path) -> None:
    """The files of fastapi_swagger are those of swagger-ui-dist, byte for byte."""
    live = await start(wait=False)
    for name in SWAGGER_UI:
        answer: httpx.Response = await live.get(f"/docs/{name}")
        assert (
            answer.content == (npm_folder / "node_modules" / "swagger-ui-dist" / name).read_bytes()
        ), name
