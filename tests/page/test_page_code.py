"""The code of the page: what eslint and node's own tests say of it; and that the tests' browser hides nothing.

The page's modules are ES modules without a build step and without a package.json beside them, so that an older node
takes them for CommonJS. Its tests run in a copy of both, in a folder whose package.json says what they are.
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

__all__ = ["browser"]  # a fixture: pytest finds it here by its name

STATIC, DOCS, OWN = Path("src/static"), Path("src/static/docs"), Path("tests/page")
SECONDS = 300  # longest that a tool may take, on a starved machine
STRICT = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
PAGE = '<!doctype html><html lang="en"><title>it</title><main><h1>it</h1>{}</main><script src="/it.js"></script></html>'
WRONG = {  # what it is seen as -> a script that does it
    "error: so it is": "console.error('so it is')",
    "uncaught: so it is": "throw new Error('so it is')",
    "request failed: GET": "fetch('/cut').catch(() => 0)",
    "404": "fetch('/nothing')",
    "content security policy: connect-src": "fetch('http://127.0.0.1:1/').catch(() => 0)",
    "content security policy: style-src-elem": (
        "const it = document.createElement('style'); it.textContent = 'p {}'; document.head.append(it)"
    ),
    "content security policy: require-trusted-types-for": "document.body.innerHTML = '<p>it</p>'",
}


def run_node(*arguments: str, folder: Path = ROOT, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run node, and return what it printed."""
    if (node := find_node()) is None:
        missing("no node runs (the package playwright carries one, which needs the library libatomic)")
    command = [node, *arguments]
    return subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, timeout=SECONDS, check=False)


def test_eslint_has_no_complaint() -> None:
    """Neither of the page's code nor of its tests; a warning counts as an error."""
    program = npm_file("eslint/bin/eslint.js")
    options = ["--config", str(OWN / "eslint.config.js"), "--max-warnings", "0"]
    linted = run_node(str(program), *options, str(STATIC), str(DOCS), str(OWN))
    if linted.returncode:
        pytest.fail(linted.stdout + linted.stderr, pytrace=False)


def test_eslint_complains() -> None:
    """The rules are in force in the page's folder: each of these lines breaks the rule behind it, and no other does."""
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
    options = ["--config", str(OWN / "eslint.config.js"), "--format", "json", "--stdin"]
    code = "\n".join(line for line, _ in broken) + "\n"
    linted = run_node(str(program), *options, "--stdin-filename", str(STATIC / "it.js"), text=code)
    assert linted.returncode == 1, linted.stderr
    found = {(message["line"], message["ruleId"]) for message in json.loads(linted.stdout)[0]["messages"]}
    assert found == {(number, rule) for number, (_, rule) in enumerate(broken, start=1)}


def test_what_npm_installs_is_pinned() -> None:
    """Each package by its hash, wherever it is fetched from; what we ask for by one version."""
    wanted = json.loads((ROOT / OWN / "package.json").read_text())
    locked = json.loads((ROOT / OWN / "package-lock.json").read_text())["packages"]
    assert wanted["private"] is True
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted["devDependencies"].values())
    assert locked[""]["devDependencies"] == wanted["devDependencies"]
    assert all(package["integrity"].startswith("sha512-") for name, package in locked.items() if name)
    assert not [name for name, package in locked.items() if "resolved" in package]


def run_tests(folder: Path, tests: Sequence[Path]) -> subprocess.CompletedProcess[str]:
    """Run node's test runner over a copy of the page's modules and of these tests."""
    shutil.copytree(ROOT / STATIC, folder / STATIC)
    (folder / OWN).mkdir(parents=True)
    (folder / "package.json").write_text('{"type": "module"}')
    copies = [shutil.copy(test, folder / OWN) for test in tests]
    return run_node("--test", "--test-reporter=spec", *(str(copy) for copy in copies), folder=folder)


def test_node_tests_pass(tmp_path: Path) -> None:
    """All of tests/page/*.test.js; those that fail are named with what they say."""
    tests = sorted((ROOT / OWN).glob("*.test.js"))
    assert tests
    ran = run_tests(tmp_path, tests)
    if ran.returncode:
        pytest.fail(failed_tests(ran.stdout) or ran.stdout + ran.stderr, pytrace=False)


def failed_tests(report: str) -> str:
    """Return the part of a spec report about what failed, which stands at its end."""
    return report.rpartition("failing tests:")[2].strip()


def test_failing_node_tests_are_named(tmp_path: Path) -> None:
    """Each of them by its name; what passes is left out."""
    test = tmp_path / "it.test.js"
    test.write_text(
        'import assert from "node:assert/strict";\n'
        'import test from "node:test";\n'
        'test("one is two", () => assert.equal(1, 2));\n'
        'test("one is three", () => assert.equal(1, 3));\n'
        'test("one is one", () => assert.equal(1, 1));\n'
    )
    ran = run_tests(tmp_path / "copy", [test])
    assert ran.returncode == 1
    told = failed_tests(ran.stdout)
    assert "one is two" in told
    assert "one is three" in told
    assert "one is one" not in told


@pytest.fixture
async def strict() -> AsyncIterator[str]:
    """The address of a page under a strict policy, which is fine but for the `body` in its query."""

    async def answer(request: web.Request) -> web.Response:
        kind, body = {
            "/": ("text/html", PAGE.format(request.query.get("body", ""))),
            "/it.js": ("text/javascript", "globalThis.ran = true"),
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
async def test_a_strict_page_is_examined_as_it_is(browser: Browser, strict: str) -> None:
    """The tests' own scripts and axe-core run in it, and break no rule of its policy."""
    page, seen = await open_page(browser, strict, 800, 600)
    assert await page.evaluate("ran") is True
    await page.wait_for_function("() => globalThis.ran")
    assert not await axe(page)
    seen.clean()


@pytest.mark.full
async def test_what_axe_finds_is_told(browser: Browser, strict: str) -> None:
    """The rule, and where it is broken."""
    page, _ = await open_page(browser, f"{strict}?body=<img src=/it.png>", 800, 600)
    assert re.search(r"image-alt \(critical\).*\n.*img", await axe(page))


@pytest.mark.full
async def test_what_a_page_does_wrong_is_seen(browser: Browser, strict: str) -> None:
    """Each of the ways, and a page that did it is not clean."""
    for fault, script in WRONG.items():
        page, seen = await open_page(browser, strict, 800, 600)
        await page.evaluate(f"() => {{ setTimeout(() => {{ {script} }}) }}")
        with contextlib.suppress(TimeoutError):
            await eventually(lambda: any(fault in told for told in seen.faults))  # noqa: B023
        with pytest.raises(AssertionError, match=re.escape(fault)):
            seen.clean()
        seen.clean(but=".")
        seen.forget()
        seen.clean()
        await page.context.close()


def test_the_runbook_has_every_place_that_is_named() -> None:
    """What an operator is told to read is there."""
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    places = {heading.lower().replace(" ", "-") for heading in headings}
    named = set(re.findall(r'"(virtuoso[a-z]+|exchange-errors)"', (ROOT / STATIC / "gateway.js").read_text()))
    assert len(named) >= 7
    assert named <= places
