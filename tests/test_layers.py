"""The shape of the code: imports point down, each edge has one owner, and the whole stays small."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lines of code. The aim is 4,500 for the gateway and 1,300 for streams. What runs in a browser has a bound in bytes:
# tests/test_dashboard.py.
STREAMS = {
    f"src.{name}" for name in ("bus", "streams", "upstream", "ccxt_stream", "feeds", "server_events", "websocket")
}
MAX_LINES = {"gateway": 4_711, "streams": 1_372, "sandbox": 900}
# A module may import those of lower levels, and neighbours as long as no circle comes of it. ARCHITECTURE.md holds the
# same table for people.
LEVELS = {
    "config": 0,
    "src.clock": 0,
    "src.errors": 0,
    "src.models": 0,
    "src.documents": 0,
    "src.markets": 0,
    "src.logs": 0,
    "src.http_client": 0,
    "src.openapi": 1,
    "src.circuit_breaker": 1,
    "src.metrics": 1,
    "src.ccxt_client": 1,
    "src.background": 2,
    "src.ccxt_stream": 2,
    "src.market_reader": 2,
    "src.redis_store": 2,
    "src.entry": 2,
    "src.redis_tier": 2,
    "src.memory": 2,
    "src.rate_limiter": 2,
    "src.recent": 2,
    "src.cache": 3,
    "src.exchanges": 3,
    "src.market_loader": 3,
    "src.gate": 3,
    "src.bus": 3,
    "src.gateway": 4,
    "src.feeds": 4,
    "src.upstream": 4,
    "src.responses": 5,
    "src.middleware": 5,
    "src.refresh_ahead": 5,
    "src.streams": 5,
    "src.status": 6,
    "src.server_events": 6,
    "src.websocket": 6,
    "src.fast_path": 6,
    "src.dashboard": 6,
    "src.api": 7,
    "maintenance": 7,
    "src.demo": 7,
}
SANDBOX = {"src.sandbox", "src.sandbox_wire", "src.sandbox_market", "src.sandbox_stream"}
OWNERS = {
    "ccxt": {"src.ccxt_client"},
    "redis": {"src.redis_store", "src.redis_tier", "src.bus"},
    "dotenv": {"config"},
}
# config reads it; demo hands its own on to the processes it starts, and reads no setting from it.
ENVIRONMENT = {"config", "src.demo"}
BANNED_NAMES = re.compile(r"(^|_)(utils?|helpers?|base|common|misc)$")


def modules() -> dict[str, Path]:
    """Find what the product is made of, by dotted name: the files at the root and in `src/`."""
    found = {path.stem: path for path in ROOT.glob("*.py")}
    return found | {f"src.{path.stem}": path for path in (ROOT / "src").rglob("*.py") if path.stem != "__init__"}


def outside() -> list[Path]:
    """Find the code that is not part of the product and may import all of it."""
    folders = ("tests", "benchmarks", "examples")
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


@cache
def imports(path: Path) -> frozenset[str]:
    """Name every module a file imports, wherever in the file; those of `src` by their full names."""
    return frozenset(_imports(ast.parse(path.read_text())))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "src":
                yield from (f"src.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def own_imports(name: str) -> set[str]:
    """Name the modules of the product that a module of it imports."""
    return {other for other in imports(modules()[name]) if other.split(".")[0] in {"src", "config", "maintenance"}}


def packages(name: str) -> set[str]:
    """Name the top packages a module imports."""
    return {other.split(".")[0] for other in imports(modules()[name])}


def reads_environment(path: Path) -> bool:
    """Whether a file reaches for the environment in any of the ways Python has."""
    for node in ast.walk(ast.parse(path.read_text())):
        reached = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            reached = {node.attr}
        if reached & {"environ", "environb", "getenv", "getenvb"}:
            return True
    return False


def test_every_module_has_a_level() -> None:
    """A new file has to be given its place, and a file that is gone gives its place up."""
    assert set(modules()) == set(LEVELS) | SANDBOX


@pytest.mark.parametrize("name", LEVELS)
def test_imports_never_point_up(name: str) -> None:
    """No module imports one of a higher level."""
    upward = {other for other in own_imports(name) if LEVELS.get(other, -1) > LEVELS[name]}
    assert not upward


def test_no_import_runs_in_a_circle() -> None:
    """Neighbours on one level may import each other, but never in a circle."""
    order = list(TopologicalSorter({name: own_imports(name) for name in LEVELS}).static_order())
    assert len(order) >= len(LEVELS)


@pytest.mark.parametrize("package", OWNERS)
def test_each_edge_has_its_owners(package: str) -> None:
    """The libraries behind which another system begins are imported nowhere but at their edge."""
    assert {name for name in modules() if package in packages(name)} == OWNERS[package]


def test_one_reader_of_the_environment() -> None:
    """Settings come from config.py; nothing else looks into the environment."""
    assert {name for name, path in modules().items() if reads_environment(path)} == ENVIRONMENT


def test_sandbox_knows_nothing_of_the_gateway() -> None:
    """The simulated exchanges import only each other, so that they share no mistake with what they test."""
    assert set().union(*(own_imports(name) for name in SANDBOX)) <= SANDBOX


def test_gateway_knows_nothing_of_the_sandbox() -> None:
    """Only the demo, the tests and the benchmarks use the simulated exchanges."""
    users = {name for name in LEVELS if own_imports(name) & SANDBOX}
    assert users <= {"src.demo"}


def test_product_imports_no_tests() -> None:
    """Nothing that is shipped needs the tests or the benchmarks."""
    assert not {name for name in modules() if packages(name) & {"tests", "benchmarks"}}


def test_importing_the_package_does_nothing() -> None:
    """`src` itself is empty: importing one module loads no other."""
    assert (ROOT / "src" / "__init__.py").read_text() == ""


def test_it_stays_small() -> None:
    """Each part is no more code than one person can read; tests and benchmarks are not counted."""
    lines = {name: code_lines(path.read_text()) for name, path in modules().items()}
    parts = dict.fromkeys(MAX_LINES, 0)
    for name, count in lines.items():
        parts["sandbox" if name in SANDBOX else "streams" if name in STREAMS else "gateway"] += count
    assert not {part: count for part, count in parts.items() if count > MAX_LINES[part]}


def code_lines(source: str) -> int:
    """Count as line counters do: lines that are not blank, comment or docstring."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                documented.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" and at not in documented for at, line in lines)


def test_modules_are_named_after_what_happens_in_them() -> None:
    """No module has a name under which anything could be put."""
    assert not [name for name in modules() if BANNED_NAMES.search(name.rpartition(".")[2])]


def test_architecture_shows_the_same_levels() -> None:
    """The table in ARCHITECTURE.md is the one that is checked here."""
    rows = re.findall(r"^\| (\d) \| `([\w/]+)\.py` \|", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    assert {path.replace("/", "."): int(level) for level, path in rows} == LEVELS
    assert len(rows) == len(LEVELS)
