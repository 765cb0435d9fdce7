"""The code of the page: eslint, unit tests in Node, and a self-test of the browser helpers.

The page's ES modules have no package.json, so that an older Node takes them for CommonJS. The
unit tests run on a copy, in a folder with a package.json.
"""

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from aiohttp import web
from playwright.async_api import Browser

from src.sandbox.server import listen
from tests.conftest import eventually
from tests.page.browser import ROOT, axe, browser, find_node, missing, npm_file, open_page

__all__ = ["browser"]  # a fixture, which pytest finds by its name

STATIC = Path("src/static")
DOCS = Path("src/static/docs")
TESTS = Path("tests/page")
TOOL_TIMEOUT_SECONDS = 300  # on a busy machine
MAX_COLUMNS = 100
STRICT = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
PAGE = (
    '<!doctype html><html lang="en"><title>Test</title><main><h1>Test</h1>{}</main>'
    '<script src="/test.js"></script></html>'
)
FAULTS = {  # the reported error -> a script that causes the error
    "error: broken": "console.error('broken')",
    "uncaught: broken": "throw new Error('broken')",
    "request failed: GET": "fetch('/cut').catch(() => 0)",
    "404": "fetch('/nothing')",
    "content security policy: connect-src": "fetch('http://127.0.0.1:1/').catch(() => 0)",
    "content security policy: style-src-elem": (
        "const style = document.createElement('style'); style.textContent = 'p {}';"
        "document.head.append(style)"
    ),
    "content security policy: require-trusted-types-for": "document.body.innerHTML = '<p>Test</p>'",
}


def run_node(
    *arguments: str, folder: Path = ROOT, text: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run Node and return its output."""
    if (node := find_node()) is None:
        missing("Node does not run (the one in the package playwright needs the library libatomic)")
    command = [node, *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        input=text,
        capture_output=True,
        text=True,
        timeout=TOOL_TIMEOUT_SECONDS,
        check=False,
    )


def test_eslint_reports_no_problems() -> None:
    """Eslint accepts the page and its tests. A warning counts as an error."""
    program = npm_file("eslint/bin/eslint.js")
    options = ["--config", str(TESTS / "eslint.config.js"), "--max-warnings", "0"]
    linted = run_node(str(program), *options, str(STATIC), str(DOCS), str(TESTS))
    if linted.returncode:
        pytest.fail(linted.stdout + linted.stderr, pytrace=False)


def test_eslint_rules_are_active() -> None:
    """In the page's folder, each of these lines breaks exactly one rule."""
    broken = [
        ('document.body.innerHTML = "";', "no-restricted-properties"),
        ('document.body.insertAdjacentHTML("beforeend", "");', "no-restricted-properties"),
        ('document.write("");', "no-restricted-properties"),
        ('document.body.setAttribute("style", "");', "no-restricted-syntax"),
        ('fetch("https://example.org/");', "no-restricted-syntax"),
        ('setTimeout("1");', "no-implied-eval"),
        ("const unused = 1;", "no-unused-vars"),
        ("fetch(nowhere);", "no-undef"),
    ]
    program = npm_file("eslint/bin/eslint.js")
    options = ["--config", str(TESTS / "eslint.config.js"), "--format", "json", "--stdin"]
    code = "\n".join(line for line, _ in broken) + "\n"
    linted = run_node(
        str(program), *options, "--stdin-filename", str(STATIC / "test.js"), text=code
    )
    assert linted.returncode == 1, linted.stderr
    found = {
        (message["line"], message["ruleId"]) for message in json.loads(linted.stdout)[0]["messages"]
    }
    assert found == {(number, rule) for number, (_, rule) in enumerate(broken, start=1)}


def test_lines_have_at_most_100_columns() -> None:
    """Lines of scripts, styles and HTML fit, with tabs of four columns."""
    names = [*(ROOT / STATIC).rglob("*"), *(ROOT / TESTS).glob("*.js")]
    long = [
        f"{path.name}:{number}"
        for path in names
        if path.suffix in (".js", ".css", ".html")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if len(line.expandtabs(4)) > MAX_COLUMNS
    ]
    assert long == []


def test_npm_packages_are_pinned() -> None:
    """Every package has a hash and no URL. Direct dependencies have an exact version."""
    wanted = json.loads((ROOT / TESTS / "package.json").read_text())
    locked = json.loads((ROOT / TESTS / "package-lock.json").read_text())["packages"]
    assert wanted["private"] is True
    assert all(
        re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted["devDependencies"].values()
    )
    assert locked[""]["devDependencies"] == wanted["devDependencies"]
    assert all(
        package["integrity"].startswith("sha512-") for name, package in locked.items() if name
    )
    assert not [name for name, package in locked.items() if "resolved" in package]


def run_tests(folder: Path, tests: Sequence[Path]) -> subprocess.CompletedProcess[str]:
    """Run Node's test runner on a copy of the page and these tests."""
    shutil.copytree(ROOT / STATIC, folder / STATIC)
    (folder / TESTS).mkdir(parents=True)
    (folder / "package.json").write_text('{"type": "module"}')
    copies = [shutil.copy(test, folder / TESTS) for test in tests]
    return run_node(
        "--test", "--test-reporter=spec", *(str(copy) for copy in copies), folder=folder
    )


def test_node_tests_pass(tmp_path: Path) -> None:
    """All of tests/page/*.test.js pass. The failed ones are reported."""
    tests = sorted((ROOT / TESTS).glob("*.test.js"))
    assert tests
    ran = run_tests(tmp_path, tests)
    if ran.returncode:
        pytest.fail(failed_tests(ran.stdout) or ran.stdout + ran.stderr, pytrace=False)


def failed_tests(report: str) -> str:
    """Return the failures, at the end of a spec report."""
    return report.rpartition("failing tests:")[2].strip()


def test_failed_node_tests_are_reported(tmp_path: Path) -> None:
    """The report contains all failed tests and no others."""
    test = tmp_path / "sample.test.js"
    test.write_text(
        'import assert from "node:assert/strict";\n'
        'import test from "node:test";\n'
        'test("one is two", () => assert.equal(1, 2));\n'
        'test("one is three", () => assert.equal(1, 3));\n'
        'test("one is one", () => assert.equal(1, 1));\n'
    )
    ran = run_tests(tmp_path / "copy", [test])
    assert ran.returncode == 1
    report = failed_tests(ran.stdout)
    assert "one is two" in report
    assert "one is three" in report
    assert "one is one" not in report


@pytest.fixture
async def strict() -> AsyncIterator[str]:
    """Serve a page with a strict policy. Its query can add a `body`. Yield the URL."""

    async def answer(request: web.Request) -> web.Response:
        kind, body = {
            "/": ("text/html", PAGE.format(request.query.get("body", ""))),
            "/test.js": ("text/javascript", "globalThis.ran = true"),
        }.get(request.path, ("text/plain", ""))
        if request.path == "/cut" and request.transport is not None:
            request.transport.abort()
        status = 404 if request.path == "/nothing" else 200
        headers = {"Content-Security-Policy": STRICT}
        return web.Response(text=body, content_type=kind, status=status, headers=headers)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner, port = await listen(app, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{port}/"
    await runner.cleanup()


@pytest.mark.full
async def test_helpers_respect_a_strict_policy(browser: Browser, strict: str) -> None:
    """The helpers' scripts and axe-core run in the page without a policy violation."""
    page, errors = await open_page(browser, strict, 800, 600)
    assert await page.evaluate("ran") is True
    await page.wait_for_function("() => globalThis.ran")
    assert not await axe(page)
    errors.assert_none()


@pytest.mark.full
async def test_axe_problems_are_reported(browser: Browser, strict: str) -> None:
    """The report names the rule and the element."""
    page, _ = await open_page(browser, f"{strict}?body=<img src=/test.png>", 800, 600)
    assert re.search(r"image-alt \(critical\).*\n.*img", await axe(page))


@pytest.mark.full
async def test_page_errors_are_reported(browser: Browser, strict: str) -> None:
    """Every kind of error is reported, and makes `assert_none` fail."""
    for fault, script in FAULTS.items():
        page, errors = await open_page(browser, strict, 800, 600)
        await page.evaluate(f"() => {{ setTimeout(() => {{ {script} }}) }}")
        with contextlib.suppress(TimeoutError):
            await eventually(lambda: any(fault in message for message in errors.messages))  # noqa: B023
        with pytest.raises(AssertionError, match=re.escape(fault)):
            errors.assert_none()
        errors.assert_none(but=".")
        errors.clear()
        errors.assert_none()
        await page.context.close()


def test_runbook_has_all_linked_sections() -> None:
    """The advice in the gateway view links to existing sections."""
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    linked = set(
        re.findall(
            r'"(virtuoso[a-z]+|exchange-errors)"', (ROOT / STATIC / "gateway_view.js").read_text()
        )
    )
    assert len(linked) >= 7
    assert linked <= anchors
