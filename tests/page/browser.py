"""A headless Chromium for the tests of the page, and the errors that the page reports in it.

page, errors = await open_page(browser, f"{live.url}/", 1440, 900)
...
assert not await axe(page)
errors.assert_none()
"""

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import pytest
from playwright.async_api import Browser, ConsoleMessage, Page, Request, async_playwright, expect

ROOT = Path(__file__).parents[2]
NPM_FOLDER = ROOT / "tests" / "page" / "node_modules"
# In this order: on Ubuntu, chromium-browser may be a stub that only prints a hint.
CHROMIUM_NAMES = ("chromium", "google-chrome", "chromium-browser")
# Tests may run as root, and the browser must not use the network by itself.
CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WCAG = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")
PATIENCE_MS = 120_000  # timeout on a busy machine
expect.set_options(timeout=PATIENCE_MS)
# Runs before the page. The page's Content-Security-Policy does not apply to an init script.
WATCH = """
window.__violations = [];
addEventListener("securitypolicyviolation", (event) => {
  const { effectiveDirective, blockedURI, sourceFile, lineNumber, sample } = event;
  const text = [effectiveDirective, blockedURI, sourceFile, lineNumber, sample].join(" ");
  window.__violations.push(text);
  console.error(`content security policy: ${text}`);
});
"""


def missing(reason: str) -> NoReturn:
    """Skip a test without its tool. With VIRTUOSO_ALL_TOOLS, fail the test."""
    if os.environ.get("VIRTUOSO_ALL_TOOLS"):
        pytest.fail(reason)
    pytest.skip(reason)


def find_chromium() -> str | None:
    """Return the path of the system's Chromium or Chrome."""
    return next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


@cache
def find_node() -> str | None:
    """Return the path of a working Node: that of the package playwright, or the system's.

    The former needs the library libatomic.
    """
    package = find_spec("playwright")
    names = ["node"]
    if package and package.origin:
        names.insert(0, str(Path(package.origin).parent / "driver" / "node"))
    for node in filter(None, map(shutil.which, names)):
        if subprocess.run([node, "--version"], capture_output=True).returncode == 0:
            return node
    return None


def npm_file(path: str) -> Path:
    """Return the path of a file in node_modules, such as axe-core/axe.min.js."""
    file = NPM_FOLDER / path
    if not file.exists():
        missing(
            f"{path.split('/')[0]} is not installed (make test tries `npm ci --prefix tests/page`)"
        )
    return file


@dataclass
class PageErrors:
    """Errors of a page: console messages, exceptions, failed requests, policy violations.

    A response with a status of 400 or above is a console error, too.
    """

    messages: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        page.on("console", self._add_message)
        page.on("pageerror", lambda error: self.messages.append(f"uncaught: {error}"))
        page.on("requestfailed", self._add_failure)
        page.on("crash", lambda _: self.messages.append("the page crashed"))

    def _add_message(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning", "assert"):
            place = message.location
            self.messages.append(
                f"{message.type}: {message.text} ({place['url']}:{place['lineNumber']})"
            )

    def _add_failure(self, request: Request) -> None:
        self.messages.append(f"request failed: {request.method} {request.url}: {request.failure}")

    def clear(self) -> None:
        """Forget the errors so far, for example after the test stopped the gateway."""
        self.messages.clear()

    def assert_none(self, but: str = "") -> None:
        """Assert that there are no errors, except those that match the expression `but`."""
        left = [fault for fault in self.messages if not (but and re.search(but, fault))]
        assert not left, "\n".join(left)


@asynccontextmanager
async def chromium(*options: str, scrollbars: bool = False) -> AsyncIterator[Browser]:
    """Run the system's Chromium with an empty profile.

    Raises `FileNotFoundError` if Chromium is not installed.

    Playwright hides scrollbars. With `scrollbars` they reduce the room for content, as on
    most desktops.
    """
    if (program := find_chromium()) is None:
        raise FileNotFoundError(
            f"none of {', '.join(CHROMIUM_NAMES)} is installed (Debian: chromium)"
        )
    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(
            executable_path=program,
            args=[*CHROMIUM_OPTIONS, *options],
            ignore_default_args=["--hide-scrollbars"] if scrollbars else None,
        )
        try:
            yield launched
        finally:
            await launched.close()


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """Start a browser for one test. Test modules import this fixture by its name."""
    try:
        async with chromium(scrollbars=True) as launched:
            yield launched
    except FileNotFoundError as error:
        missing(str(error))


async def open_page(
    browser: Browser,
    url: str,
    width: int,
    height: int,
    *,
    dark: bool = False,
    reduced_motion: bool = False,
    zone: str = "Europe/Berlin",
    locale: str = "en-US",
    **more: Any,
) -> tuple[Page, PageErrors]:
    """Open a URL in a new profile. `more` are arguments of `Browser.new_context`."""
    context = await browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce" if reduced_motion else "no-preference",
        timezone_id=zone,
        locale=locale,
        **more,
    )
    context.set_default_timeout(PATIENCE_MS)
    await context.add_init_script(WATCH)
    page, errors = await context.new_page(), PageErrors()
    errors.watch(page)
    await page.goto(url)
    return page, errors


async def axe(page: Page) -> str:
    """Return the accessibility problems that axe-core finds, as text.

    The browser's debugger runs axe-core, so that the page's Content-Security-Policy stays active
    and does not block the script.
    """
    source = await asyncio.to_thread(npm_file("axe-core/axe.min.js").read_text)
    options = f"{{runOnly: {list(WCAG)}, resultTypes: ['violations']}}"
    session = await page.context.new_cdp_session(page)
    try:
        await session.send("Runtime.evaluate", {"expression": f"{source}; 0"})
        run = {
            "expression": f"axe.run(document, {options})",
            "awaitPromise": True,
            "returnByValue": True,
        }
        answer = await session.send("Runtime.evaluate", run)
    finally:
        await session.detach()
    assert "exceptionDetails" not in answer, answer
    return "\n".join(_describe(violation) for violation in answer["result"]["value"]["violations"])


def _describe(violation: dict[str, Any]) -> str:
    """Return a violated rule and its places as text."""
    lines = [f"{violation['id']} ({violation['impact']}): {violation['help']}"]
    for node in violation["nodes"]:
        summary = " ".join(str(node.get("failureSummary", "")).split())
        lines.append(f"  {node['target']} {node['html'][:160]}: {summary}")
    return "\n".join(lines)
