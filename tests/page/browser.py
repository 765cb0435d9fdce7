"""A real browser for the tests of the page: the system's Chromium without a window, and what is seen in it.

page, seen = await open_page(browser, f"{live.url}/", 1440, 900)
...
assert not await axe(page)
seen.clean()
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
# In this order: where Ubuntu has a program chromium-browser, it may only tell that there is none.
CHROMIUM_NAMES = ("chromium", "google-chrome", "chromium-browser")
# It may be root here, and has nothing to look up, fetch or tell by itself.
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
PATIENCE_MS = 120_000  # for what is about to be seen, on a starved machine
expect.set_options(timeout=PATIENCE_MS)
# Before any code of the page. An init script is the browser's own: the page's Content-Security-Policy does not count.
WATCH = """
window.__violations = [];
addEventListener("securitypolicyviolation", (event) => {
  const told = [event.effectiveDirective, event.blockedURI, event.sourceFile, event.lineNumber, event.sample].join(" ");
  window.__violations.push(told);
  console.error(`content security policy: ${told}`);
});
"""


def missing(what: str) -> NoReturn:
    """Skip the test that needs something that is not there, or fail it where all tools are promised."""
    if os.environ.get("VIRTUOSO_ALL_TOOLS"):
        pytest.fail(what)
    pytest.skip(what)


def find_chromium() -> str | None:
    """Find the system's Chromium, or Chrome."""
    return next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


@cache
def find_node() -> str | None:
    """Find a Node that runs: the one of the package playwright, which needs the library libatomic, or another."""
    package = find_spec("playwright")
    carried = [str(Path(package.origin).parent / "driver" / "node")] if package and package.origin else []
    found = filter(None, map(shutil.which, [*carried, "node"]))
    return next(
        (node for node in found if subprocess.run([node, "--version"], capture_output=True).returncode == 0), None
    )


def npm_file(path: str) -> Path:
    """Find a file of what npm installed for the tests, such as axe-core/axe.min.js."""
    file = NPM_FOLDER / path
    if not file.exists():
        missing(f"{path.split('/')[0]} is not installed (make test tries `npm ci --prefix tests/page`)")
    return file


@dataclass
class Seen:
    """What a page has complained of: errors on its console or uncaught, requests that failed, refusals of its policy.

    An answer of 400 and above is an error on the console, too.
    """

    faults: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.faults.append(f"uncaught: {error}"))
        page.on("requestfailed", self._failed)
        page.on("crash", lambda _: self.faults.append("the page crashed"))

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning", "assert"):
            place = message.location
            self.faults.append(f"{message.type}: {message.text} ({place['url']}:{place['lineNumber']})")

    def _failed(self, request: Request) -> None:
        self.faults.append(f"request failed: {request.method} {request.url}: {request.failure}")

    def forget(self) -> None:
        """Take what was complained of so far as meant, such as that a gateway is gone that the test has stopped."""
        self.faults.clear()

    def clean(self, but: str = "") -> None:
        """Assert that there was nothing, or nothing but what this expression is found in."""
        left = [fault for fault in self.faults if not (but and re.search(but, fault))]
        assert not left, "\n".join(left)


@asynccontextmanager
async def chromium(*options: str, scrollbars: bool = False) -> AsyncIterator[Browser]:
    """Run the system's Chromium with an empty profile; raises `FileNotFoundError` if it is not installed.

    Playwright hides scrollbars by default. With `scrollbars` they take room from the content, as on most desks.
    """
    if (program := find_chromium()) is None:
        raise FileNotFoundError(f"none of {', '.join(CHROMIUM_NAMES)} is installed (Debian: chromium)")
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
    """A browser of the test's own. To use it, a module of tests imports this name."""
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
) -> tuple[Page, Seen]:
    """Open an address as a new visitor with such a screen; `more` is for `Browser.new_context`."""
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
    page, seen = await context.new_page(), Seen()
    seen.watch(page)
    await page.goto(url)
    return page, seen


async def axe(page: Page) -> str:
    """Return what axe-core finds wrong for people who cannot see, hear or move well, as text; empty if nothing.

    It is evaluated by the browser's debugger, so that the page's Content-Security-Policy is left in force and does not
    stand in the way.
    """
    source = await asyncio.to_thread(npm_file("axe-core/axe.min.js").read_text)
    told = f"{{runOnly: {list(WCAG)}, resultTypes: ['violations']}}"
    session = await page.context.new_cdp_session(page)
    try:
        await session.send("Runtime.evaluate", {"expression": f"{source}; 0"})
        run = {"expression": f"axe.run(document, {told})", "awaitPromise": True, "returnByValue": True}
        answer = await session.send("Runtime.evaluate", run)
    finally:
        await session.detach()
    assert "exceptionDetails" not in answer, answer
    return "\n".join(_told(violation) for violation in answer["result"]["value"]["violations"])


def _told(violation: dict[str, Any]) -> str:
    """Write one broken rule, and where it is broken."""
    lines = [f"{violation['id']} ({violation['impact']}): {violation['help']}"]
    for node in violation["nodes"]:
        summary = " ".join(str(node.get("failureSummary", "")).split())
        lines.append(f"  {node['target']} {node['html'][:160]}: {summary}")
    return "\n".join(lines)
