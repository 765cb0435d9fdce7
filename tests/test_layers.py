"""The structure of the code: packages, the direction of imports, and size budgets."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each package may import itself and these others. `config` may be imported from everywhere but the
# sandbox.
CORE: set[str] = {"core"}
PACKAGES: dict[str, set[str]] = {
    "core": CORE,
    "store": CORE | {"store"},
    "exchanges": CORE | {"store", "exchanges"},
    "cache": CORE | {"store", "cache"},
    "gateway": CORE | {"store", "exchanges", "cache", "gateway"},
    "streams": CORE | {"store", "exchanges", "cache", "gateway", "streams"},
    "web": CORE | {"store", "exchanges", "cache", "gateway", "streams", "web"},
    "raw": CORE | {"store", "exchanges", "cache", "gateway", "streams", "web", "raw"},
    "api": CORE | {"store", "exchanges", "cache", "gateway", "streams", "web", "raw", "api"},
    "sandbox": {"sandbox"},
    "maintenance": CORE | {"store", "exchanges", "cache", "gateway"},
}
GATEWAY_MODULES = {
    "src.candles",
    "src.gateway",
    "src.kinds",
    "src.last_prices",
    "src.refresh_ahead",
}
STREAM_MODULES = {"src.web.websocket", "src.web.server_events"}  # counted with the streams package

# Lines of code, without blank lines, comments and docstrings. The page has a budget in bytes:
# tests/web/test_dashboard.py. The goals are 4,500, 1,300, 1,200 and 400:
# see docs/decisions.md. Until a part is there, its limit only falls.
MAX_LINES = {"core": 7_093, "streams": 1_632, "sandbox": 1_969, "raw": 664}

# Libraries that only these modules import.
OWNERS = {
    "ccxt": {"src.exchanges.ccxt_client"},
    "redis": {"src.store.redis", "src.cache.redis_tier", "src.streams.bus"},
    "dotenv": {"config"},
}
# config reads the settings. The demo passes its environment on to the processes it starts.
ENVIRONMENT = {"config", "src.sandbox.demo"}
MAX_METHODS = 20
MAX_FUNCTION_LINES = 40  # with its docstring
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BANNED_NAMES = re.compile(r"(^|_)(utils?|helpers?|base|common|misc)$")


def modules() -> dict[str, Path]:
    """Return the modules of the product by dotted name: the files at the root and in `src/`."""
    found = {path.stem: path for path in ROOT.glob("*.py")}
    for path in (ROOT / "src").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def package_of(name: str) -> str:
    """Return the package of a module; `gateway` stands for the modules between the packages."""
    if name in GATEWAY_MODULES:
        return "gateway"
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


@cache
def imports(path: Path) -> frozenset[str]:
    """Return the names of all modules that a file imports, also inside functions."""
    return frozenset(_imports(ast.parse(path.read_text())))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            full_names = [f"{node.module}.{alias.name}" for alias in node.names]
            known = modules().keys() & set(full_names)
            yield from known or [node.module or ""]


def own_imports(name: str) -> set[str]:
    """Return the modules of the product that a module imports."""
    return {
        other
        for other in imports(modules()[name])
        if other.split(".")[0] in {"src", "config", "maintenance"}
    }


def libraries(name: str) -> set[str]:
    """Return the top-level packages that a module imports."""
    return {other.split(".")[0] for other in imports(modules()[name])}


def reads_environment(path: Path) -> bool:
    """Return True if a file uses `os.environ` or `os.getenv`, or imports them from `os`."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = set()
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
            names = {node.attr}
        if names & {"environ", "environb", "getenv", "getenvb"}:
            return True
    return False


def test_every_module_belongs_to_a_package() -> None:
    """A new module goes into one of the packages."""
    assert {
        package_of(name) for name in modules() if name not in {"config", "src"}
    } == PACKAGES.keys()


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package: str) -> None:
    """Imports go one way: api, web, streams, gateway, cache and exchanges, store, core."""
    forbidden = {
        f"{name} imports {other}"
        for name in modules()
        if name not in {"config", "src"} and package_of(name) == package
        for other in own_imports(name) - {"config"}
        if package_of(other) not in PACKAGES[package]
    }
    assert not forbidden


def test_imports_have_no_cycles() -> None:
    """`TopologicalSorter` raises an error if modules import each other in a cycle."""
    order = list(
        TopologicalSorter({name: own_imports(name) - {name} for name in modules()}).static_order()
    )
    assert len(order) >= len(modules())


@pytest.mark.parametrize("library", OWNERS)
def test_libraries_are_imported_only_by_their_owners(library: str) -> None:
    """ccxt, Redis and dotenv are imported only by the modules in `OWNERS`."""
    assert {name for name in modules() if library in libraries(name)} == OWNERS[library]


def test_only_config_reads_the_environment() -> None:
    """Settings come from config.py; no other module reads the environment."""
    assert {name for name, path in modules().items() if reads_environment(path)} == ENVIRONMENT


def test_sandbox_does_not_use_the_config() -> None:
    """The simulated exchanges share no code with the gateway, so they do not share its bugs."""
    sandbox = [name for name in modules() if package_of(name) == "sandbox"]
    assert not [name for name in sandbox if "config" in own_imports(name)]


def test_product_imports_no_tests() -> None:
    """No module of the product imports the tests or the benchmarks."""
    assert not {name for name in modules() if libraries(name) & {"tests", "benchmarks"}}


def test_importing_the_package_imports_nothing_else() -> None:
    """`src/__init__.py` is empty."""
    assert (ROOT / "src" / "__init__.py").read_text() == ""


def test_budgets() -> None:
    """The core, streams and sandbox stay within their budgets of lines of code."""
    sizes = dict.fromkeys(PACKAGES | {"config": set()}, 0)
    parts = dict.fromkeys(MAX_LINES, 0)
    for name, path in modules().items():
        package = "streams" if name in STREAM_MODULES else package_of(name)
        lines = code_lines(path.read_text())
        if name != "src":
            sizes[package] += lines
        parts[package if package in parts else "core"] += lines
    print(f"lines of code: {parts}; by package: {sizes}")
    assert not {part: count for part, count in parts.items() if count > MAX_LINES[part]}


def code_lines(source: str) -> int:
    """Count lines that are not blank and not only a comment or docstring.

    A string below an attribute is a docstring, too (PEP 257).
    """
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            docstrings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(
        bool(line.strip()) and line.strip()[0] != "#" and number not in docstrings
        for number, line in lines
    )


def test_classes_and_functions_stay_small() -> None:
    """No class has more than 20 methods, and no function is longer than one screen."""
    large = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                methods = [item for item in node.body if isinstance(item, FUNCTIONS)]
                large += [f"{name}.{node.name}"] if len(methods) > MAX_METHODS else []
            elif isinstance(node, FUNCTIONS):
                lines = (node.end_lineno or 0) - node.body[0].lineno
                large += [f"{name}.{node.name}"] if lines >= MAX_FUNCTION_LINES else []
    assert not large


def test_module_names_are_specific() -> None:
    """No module has a name that fits any content, such as `utils`."""
    assert not [name for name in modules() if BANNED_NAMES.search(name.rpartition(".")[2])]


def test_architecture_lists_every_module() -> None:
    """ARCHITECTURE.md names every module of the product."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    missing = [
        name
        for name in modules()
        if name != "src" and not re.search(rf"\b{name.rpartition('.')[2]}\b", text)
    ]
    assert not missing
