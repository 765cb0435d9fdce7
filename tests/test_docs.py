"""The documents and .env.example agree with the code."""

import fnmatch
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import pytest

from config import load_settings, setting_names
from docs import generate
from src.api import create_app
from src.core import metrics
from src.core.errors import GatewayError, Unavailable
from src.sandbox.knobs import Knobs
from tests.conftest import StartGateway

ROOT = Path(__file__).parents[1]
NO_FILE = Path("/nonexistent/.env")
README = (ROOT / "README.md").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()
DOCUMENTS = sorted(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
)
MAX_DOCUMENT_LINES = {"README.md": 130, "ARCHITECTURE.md": 90, "CONTRIBUTING.md": 40}
# Prints the label values that exist at the start. Other tests have added more to this process.
PRINT_LABELS = """
import json, prometheus_client
from src.api import create_app
from src.core import metrics
metrics.initialise((), (), ())
samples = [sample for family in prometheus_client.REGISTRY.collect() for sample in family.samples]
labels = [item for sample in samples if "virtuoso" in sample.name for item in sample.labels.items()]
free = {"route", "method", "code", "le", "version", "python"}
print(json.dumps([value for name, value in labels if name not in free]))
"""


def section(document: str, heading: str) -> str:
    """Return the text of a document under a heading of the second level."""
    text = (ROOT / document).read_text()
    return text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def rows(document: str, heading: str) -> list[list[str]]:
    """Return the cells of all table rows in a section that contain a name in code letters."""
    lines = section(document, heading).splitlines()
    table = [line for line in lines if line.startswith("| ") and "`" in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def names_in(cell: str) -> list[str]:
    """Return the names in code letters in a table cell."""
    return re.findall(r"`([^`]+)`", cell)


def routes() -> dict[str, str]:
    """Map the path of every route to its method. HEAD is left out; a WebSocket has no method."""
    app: Any = create_app(load_settings({}, NO_FILE)).app
    methods = {}
    for route in app.routes:
        (methods[route.path_format],) = getattr(route, "methods", {"WebSocket"}) - {"HEAD"}
    return methods


def own_metrics() -> dict[str, tuple[str, ...]]:
    """Map the name of every metric, as a scrape shows it, to its labels."""
    types = (prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram)
    labels = {}
    for metric in vars(metrics).values():
        if isinstance(metric, types):
            (family,) = metric.describe()
            suffix = "_total" if family.type == "counter" else ""
            labels[family.name + suffix] = tuple(metric._labelnames)
    return labels


def error_classes(parent: type[GatewayError] = GatewayError) -> Iterator[type[GatewayError]]:
    """Return every class of the error tree, with its root and branches."""
    yield parent
    for child in parent.__subclasses__():
        yield from error_classes(child)


def project_files() -> Iterator[tuple[Path, str]]:
    """Return every file of the project that git does not ignore, with its text."""
    patterns = (ROOT / ".gitignore").read_text().split()
    ignored = [".git", *(pattern.rstrip("/") for pattern in patterns)]

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
    """The first screen has one sentence, then the two commands."""
    title, sentence, commands, *_ = README.split("\n\n")
    assert title.startswith("# ")
    assert sentence.count(". ") == 0
    assert sentence.endswith(".")
    assert re.findall(r"^make (\w+)", commands, re.MULTILINE) == ["demo", "test"]


@pytest.mark.parametrize("document", MAX_DOCUMENT_LINES)
def test_first_documents_stay_short(document: str) -> None:
    """README.md, ARCHITECTURE.md and CONTRIBUTING.md keep to their budgets of lines."""
    assert len((ROOT / document).read_text().splitlines()) <= MAX_DOCUMENT_LINES[document]


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != "README.md"])
def test_documents_say_who_they_are_for(document: str) -> None:
    """The first paragraph of each document names its readers."""
    paragraph = (ROOT / document).read_text().split("\n\n")[1]
    assert re.search(r"\b[Ff]or\b", paragraph), paragraph


@pytest.mark.parametrize("path", generate.documents(), ids=lambda path: path.name)
def test_generated_tables_match_the_code(path: Path) -> None:
    """`make docs` would change nothing."""
    assert path.read_text() == generate.documents()[path], "run make docs"


def test_settings_document_lists_every_setting_once() -> None:
    """docs/settings.md has each setting in one row."""
    cells = [row[0] for row in rows("docs/settings.md", "Tables")]
    names = [name for cell in cells for name in names_in(cell)]
    assert sorted(names) == sorted(setting_names())


def test_api_document_lists_every_route_once() -> None:
    """docs/api.md has each route with its method."""
    table = [(names_in(row[1])[0], row[0]) for row in rows("docs/api.md", "Endpoints")]
    assert sorted(table) == sorted(routes().items())


def test_readme_names_every_endpoint() -> None:
    """README.md has every path, apart from the files of the page and of Swagger UI."""
    paths = {
        name for row in rows("README.md", "Endpoints") for cell in row for name in names_in(cell)
    }
    assert paths == {path for path in routes() if not path.endswith("{name}")}


def test_metrics_document_lists_every_metric_once() -> None:
    """docs/metrics.md has each metric with its labels."""
    table = [
        (names_in(row[0])[0], tuple(names_in(row[2]))) for row in rows("docs/metrics.md", "Table")
    ]
    assert sorted(table) == sorted(own_metrics().items())
    assert all(name.startswith("virtuoso_") for name, _ in table)


def test_metrics_document_lists_label_values() -> None:
    """docs/metrics.md has every label value that exists from the start."""
    values = set(
        json.loads(subprocess.check_output([sys.executable, "-c", PRINT_LABELS], cwd=ROOT))
    )
    documented = {
        name for row in rows("docs/metrics.md", "Label values") for name in names_in(row[2])
    }
    assert values <= documented


def test_every_metric_is_defined_in_the_metrics_module() -> None:
    """No other module creates a metric of the gateway."""
    families = prometheus_client.REGISTRY.collect()
    names = {family.name for family in families if family.name.startswith("virtuoso_")}
    assert names == {name.removesuffix("_total") for name in own_metrics()}


def test_every_metric_is_updated() -> None:
    """Each metric is set, incremented or observed somewhere, not only created."""
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    unused = []
    for name in own_metrics():
        variable = name.removeprefix("virtuoso_")
        methods = r"(\.labels\([^)]*\)+)?\.(set|inc|observe|set_function)\("
        uses = rf"metrics\.{variable}\b|^ *{variable}{methods}"
        if not re.search(uses, source, re.MULTILINE):
            unused.append(name)
    assert not unused


def test_api_document_lists_every_error_once() -> None:
    """docs/api.md has each error code with its status. `Unavailable` is a branch and never sent."""
    sent = {error.code: str(error.status) for error in error_classes() if error is not Unavailable}
    table = [(names_in(row[0])[0], row[1]) for row in rows("docs/api.md", "Errors")]
    assert sorted(table) == sorted(sent.items())


def test_a_code_has_one_status() -> None:
    """Errors with the same code have the same status."""
    codes = {error.code for error in error_classes()}
    assert len(codes) == len({(error.code, error.status) for error in error_classes()})


def test_sandbox_document_lists_every_knob_once() -> None:
    """docs/sandbox.md has each knob of the simulated exchanges in one row."""
    names = [names_in(row[0])[0] for row in rows("docs/sandbox.md", "Knobs")]
    assert sorted(names) == sorted(inspect.signature(Knobs).parameters)


def test_documents_and_makefile_agree() -> None:
    """Every `make` command in a document exists, and the documents name the important ones."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    text = "\n".join((ROOT / document).read_text() for document in DOCUMENTS)
    commands = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.MULTILINE))
    assert commands <= targets
    assert {"demo", "run", "test", "test-all", "format", "docs", "bench"} <= commands


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_named_in_documents_exist(document: str) -> None:
    """Every file that a document links to exists, and every module that it names."""
    text = (ROOT / document).read_text()
    links = re.findall(r"(?:\]\(|src=\")([\w./-]+)(?:#[\w-]+)?[)\"]", text)
    files = {os.path.normpath(Path(document).parent / link) for link in links}
    files |= set(re.findall(r"`((?:src|tests)/[\w/]+\.py)`", text))
    assert not [name for name in files if not (ROOT / name).exists()]


def test_example_lists_every_setting_with_its_default() -> None:
    """.env.example has each setting once, after its description, commented out, with its default.

    The variables of Docker Compose follow: tests/deployment/test_compose.py checks them.
    """
    pairs = re.findall(r"^# (.+)\n# ([A-Z][A-Z0-9_]*)=(.*)$", EXAMPLE, re.MULTILINE)
    expected = [
        (field.description, name, generate.default_text(default))
        for name, (field, default) in setting_names().items()
    ]
    assert pairs[: len(expected)] == expected
    assert all(line.startswith("#") or not line for line in EXAMPLE.splitlines())


def test_example_changes_nothing(tmp_path: Path) -> None:
    """A copy of .env.example changes no setting. With every line active it gives the defaults."""
    defaults = load_settings({}, NO_FILE)
    file = tmp_path / ".env"
    file.write_text(EXAMPLE)
    assert load_settings({}, file) == defaults
    file.write_text(re.sub(r"^# ([A-Z][A-Z0-9_]*=)", r"\1", EXAMPLE, flags=re.MULTILINE))
    assert "\nTICKER_TTL_SECONDS=15\n" in file.read_text()
    assert load_settings({}, file) == defaults


async def test_answer_in_readme_is_a_real_one(start: StartGateway) -> None:
    """The answer in README.md has the headers and members of a real one, in the same order."""
    pattern = r"```console\n\$ curl -i http://[^/\s]+(/\S+)\nHTTP/1.1 200 OK\n(.*?)\n\n(.*?)\n```"
    example = re.search(pattern, README, re.DOTALL)
    assert example is not None
    path, head, body = example.groups()
    gateway = await start()
    answer = await gateway.get(path)
    assert list(answer.headers) == [line.split(":")[0].lower() for line in head.splitlines()]
    assert list(answer.json()) == list(json.loads(body))
    (length,) = re.findall(r"^content-length: (\d+)$", head, re.MULTILINE)
    assert int(length) == len(body.encode())


async def test_answers_in_api_document_are_real_ones(start: StartGateway) -> None:
    """Each answer to a GET in docs/api.md has the members of a real one, in the same order."""
    text = (ROOT / "docs" / "api.md").read_text()
    examples = re.findall(
        r"^\$ curl -s '?http://[^/\s]+(/[^\s']+)'?\n(\{.*\})$", text, re.MULTILINE
    )
    assert len(examples) >= 7
    gateway = await start()
    await gateway.get("/tickers?symbols=BTC-USDT&exchange=all")
    for path, body in examples:
        answer = await gateway.get(path)
        assert list(answer.json()) == list(json.loads(body)), path


def test_no_file_contains_a_home_path() -> None:
    """No file contains an absolute path to a home folder, which exists on one machine only."""
    home_path = re.compile(r"/(?:home|Users)/\w")
    assert not [str(path) for path, text in project_files() if home_path.search(text)]
