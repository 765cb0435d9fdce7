"""What README.md and .env.example say is what the code does."""

import fnmatch
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from pydantic import SecretStr

from config import load_settings, setting_names
from src.api import create_app
from src.core import metrics
from src.core.errors import GatewayError, Unavailable
from src.sandbox.server import Knobs
from tests.conftest import StartGateway

ROOT = Path(__file__).parents[1]
NO_FILE = Path("/nonexistent/.env")
README = (ROOT / "README.md").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()


def rows(heading: str) -> list[list[str]]:
    """Return the cells of every row of the first table under a heading whose rows name something in code letters."""
    section = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| ") and "`" in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def named(cell: str) -> list[str]:
    """Return what a cell names in code letters."""
    return re.findall(r"`([^`]+)`", cell)


def listed(heading: str, column: int = 0) -> list[str]:
    """Return every name in a column of a table, in order."""
    return [name for row in rows(heading) for name in named(row[column])]


def as_text(default: object) -> str:
    """Write a default as it would stand in the environment."""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return ",".join(default)
    return "" if isinstance(default, SecretStr) or default == {} else str(default)


def routes() -> dict[str, str]:
    """Map the path of every route to its method; HEAD goes without saying, and a WebSocket has none."""
    app: Any = create_app(load_settings({}, NO_FILE)).app
    found = {}
    for route in app.routes:
        (found[route.path_format],) = getattr(route, "methods", {"WebSocket"}) - {"HEAD"}
    return found


def own_metrics() -> dict[str, tuple[str, ...]]:
    """Map the name of every metric, as a scrape shows it, to its labels."""
    kinds = (prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram)
    found = {}
    for metric in vars(metrics).values():
        if isinstance(metric, kinds):
            (family,) = metric.describe()
            end = "_total" if family.type == "counter" else ""
            found[family.name + end] = tuple(metric._labelnames)
    return found


def errors(parent: type[GatewayError] = GatewayError) -> Iterator[type[GatewayError]]:
    """Walk the error tree, its root and branches included."""
    yield parent
    for child in parent.__subclasses__():
        yield from errors(child)


def project_files() -> Iterator[tuple[Path, str]]:
    """Give every file of the project with its text, without what git ignores."""
    ignored = [".git", *(pattern.rstrip("/") for pattern in (ROOT / ".gitignore").read_text().split())]

    def walk(folder: Path) -> Iterator[Path]:
        for path in folder.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored):
                continue
            if path.is_dir():
                yield from walk(path)
            else:
                yield path

    for path in walk(ROOT):
        yield path, path.read_text(errors="replace")


def test_readme_begins_with_how_to_run_and_test() -> None:
    """One sentence, then the two commands, then an answer: all on the first screen."""
    title, sentence, commands, *_ = README.split("\n\n")
    assert title.startswith("# ")
    assert sentence.count(". ") == 0
    assert sentence.endswith(".")
    assert re.findall(r"^make (\w+)", commands, re.MULTILINE) == ["demo", "test"]


def test_readme_lists_every_setting_once() -> None:
    """The settings table is complete, in the order of the code, with the true defaults."""
    assert sorted(listed("Settings")) == sorted(setting_names())
    for cells in rows("Settings"):
        for name in named(cells[0]):
            default = as_text(setting_names()[name][1])
            assert cells[1] == (f"`{default}`" if default else "empty"), name


def test_readme_lists_every_route_once() -> None:
    """The endpoints table is complete, with the right methods."""
    table = [(named(cells[1])[0], cells[0]) for cells in rows("Endpoints")]
    assert sorted(table) == sorted(routes().items())


def test_readme_lists_every_metric_once() -> None:
    """The metrics table is complete, with the labels of each."""
    table = [(named(cells[0])[0], tuple(named(cells[1]))) for cells in rows("Metrics")]
    assert sorted(table) == sorted(own_metrics().items())
    assert all(name.startswith("virtuoso_") for name, _ in table)


def test_every_metric_is_where_it_is_looked_for() -> None:
    """No metric of ours is made anywhere but in the module of metrics."""
    names = {family.name for family in prometheus_client.REGISTRY.collect() if family.name.startswith("virtuoso_")}
    assert names == {name.removesuffix("_total") for name in own_metrics()}


def test_every_metric_is_moved() -> None:
    """Each metric that is exported is also set, counted or observed by something, beyond being made at zero."""
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    idle = []
    for name in own_metrics():
        variable = name.removeprefix("virtuoso_")
        uses = rf"metrics\.{variable}\b|^ *{variable}(\.labels\([^)]*\)+)?\.(set|inc|observe|set_function)\("
        if not re.search(uses, source, re.MULTILINE):
            idle.append(name)
    assert not idle


def test_readme_lists_every_error_once() -> None:
    """The errors table is complete, with the status of each code."""
    sent = {error.code: str(error.status) for error in errors() if error is not Unavailable}  # a branch, never sent
    table = [(named(cells[0])[0], cells[1]) for cells in rows("Errors")]
    assert sorted(table) == sorted(sent.items())


def test_a_code_has_one_status() -> None:
    """Two errors with one code are one to a client, so they have one status."""
    assert len({error.code for error in errors()}) == len({(error.code, error.status) for error in errors()})


def test_readme_lists_every_knob_once() -> None:
    """The table of the sandbox's knobs is complete."""
    names = [named(cells[0])[0] for cells in rows("Breaking things in the sandbox")]
    assert sorted(names) == sorted(inspect.signature(Knobs).parameters)


def test_readme_and_makefile_agree() -> None:
    """Every `make` command in the README exists, and the ones people need are there."""
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", README, re.MULTILINE))
    assert shown <= targets
    assert {"demo", "run", "test", "format", "bench"} <= shown


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "docs/streaming.md"])
def test_files_named_in_documents_exist(document: str) -> None:
    """Every file a document names or links to is there."""
    text = (ROOT / document).read_text()
    paths = set(re.findall(r"(?:\]\(|src=\")([\w./-]+)[)\"]", text)) | set(
        re.findall(r"`((?:src|tests)/[\w*]+\.py)`", text)
    )
    assert paths
    folder = (ROOT / document).parent
    assert not [path for path in paths if not (list(ROOT.glob(path)) or (folder / path).is_file())]


def test_example_lists_every_setting_with_its_default() -> None:
    """.env.example has each setting once, after its description, with the default, commented out."""
    pairs = re.findall(r"^# (.+)\n# ([A-Z][A-Z0-9_]*)=(.*)$", EXAMPLE, re.MULTILINE)
    expected = [(field.description, name, as_text(default)) for name, (field, default) in setting_names().items()]
    assert pairs[: len(expected)] == expected  # behind them stand those of compose: tests/deployment/test_compose.py
    assert all(line.startswith("#") or not line for line in EXAMPLE.splitlines())


def test_example_changes_nothing(tmp_path: Path) -> None:
    """A copy of .env.example is no settings at all, and with every line uncommented it is the defaults."""
    bare = load_settings({}, NO_FILE)
    file = tmp_path / ".env"
    file.write_text(EXAMPLE)
    assert load_settings({}, file) == bare
    file.write_text(re.sub(r"^# ([A-Z][A-Z0-9_]*=)", r"\1", EXAMPLE, flags=re.MULTILINE))
    assert "\nTICKER_TTL_SECONDS=15\n" in file.read_text()
    assert load_settings({}, file) == bare


async def test_answer_in_readme_is_a_real_one(start: StartGateway) -> None:
    """The answer under the first curl has the headers and members that the gateway sends, in their order."""
    shown = re.search(
        r"```console\n\$ curl -i http://[^/\s]+(/\S+)\nHTTP/1.1 200 OK\n(.*?)\n\n(.*?)\n```", README, re.DOTALL
    )
    assert shown is not None
    path, head, body = shown.groups()
    live = await start()
    answered = await live.get(path)
    assert list(answered.headers) == [line.split(":")[0].lower() for line in head.splitlines()]
    assert list(answered.json()) == list(json.loads(body))
    (told,) = re.findall(r"^content-length: (\d+)$", head, re.MULTILINE)
    assert int(told) == len(body.encode())


def test_project_speaks_only_of_itself() -> None:
    """No file tells of the place it was made in."""
    elsewhere = re.compile(r"[/]work/|shared[/]")
    assert not [str(path) for path, text in project_files() if elsewhere.search(text)]
