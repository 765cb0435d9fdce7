"""Take the screenshots in docs/images: each view, on desktop and phone, light and dark.

`make screenshots` starts a gateway with simulated exchanges. Prices move, so that each run differs.
During development: `python -m tests.page.screenshots --only market-desk-dark --out folder`.
`--url` selects a running gateway.
"""

import argparse
import asyncio
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from playwright.async_api import Browser
from playwright.async_api import TimeoutError as PlaywrightTimeoutError

from benchmarks.servers import Servers
from tests.page.browser import ROOT, chromium, open_page

LIVELY_SECONDS = 5.0  # until there are updates and figures
FOLDER = ROOT / "docs" / "images"


class View(NamedTuple):
    """One view of the page, and what must be visible before the screenshot."""

    path: str
    ready: str  # a CSS selector
    text: str  # a regular expression for the text of a visible match


class Size(NamedTuple):
    """A screen."""

    width: int
    height: int
    more: dict[str, Any]


VIEWS = {
    "market": View("/", "#market td[data-cell=last]", r"\d"),
    "symbol": View("/#BTC-USDT", "#reading", r"\d"),
    "gateway": View("/#gateway", "#gateway [data-exchange]", r"\d"),
}
SIZES = {
    "desk": Size(1440, 900, {}),
    "phone": Size(390, 844, {"device_scale_factor": 2, "is_mobile": True, "has_touch": True}),
}
SCHEMES = ("light", "dark")
NAMES = [f"{view}-{size}-{scheme}" for view in VIEWS for size in SIZES for scheme in SCHEMES]


async def take(browser: Browser, url: str, name: str, folder: Path) -> bool:
    """Take one screenshot and print its path. Return true if the page had no errors."""
    view_name, size_name, scheme = name.split("-")
    view, size = VIEWS[view_name], SIZES[size_name]
    page, errors = await open_page(
        browser,
        url + view.path,
        size.width,
        size.height,
        dark=scheme == "dark",
        zone="UTC",
        **size.more,
    )
    try:
        await (
            page.locator(view.ready)
            .filter(has_text=re.compile(view.text), visible=True)
            .first.wait_for()
        )
    except PlaywrightTimeoutError:  # the screenshot shows the problem
        errors.messages.append(f"{view.ready} with a text like {view.text!r} is not visible")
    await asyncio.sleep(LIVELY_SECONDS)
    file = folder / f"{name}.png"
    picture = await page.screenshot(path=file, animations="disabled")
    await page.context.close()
    print(f"{file}: {len(picture) / 1024:.0f} KB", *errors.messages, sep="\n  ")
    return not errors.messages


async def take_all(url: str, names: list[str], folder: Path) -> bool:
    """Take these screenshots. Return true if no page had errors."""
    async with chromium() as browser:
        return all([await take(browser, url, name, folder) for name in names])


@contextmanager
def own_gateway() -> Iterator[str]:
    """Run a gateway with simulated exchanges and Redis. Yield its URL."""
    with Servers() as servers:
        yield servers.gateway(servers.sandbox(), {"REDIS_URL": servers.redis()}).url


def main() -> int:
    """Run the command line. Return the exit code."""
    parser = argparse.ArgumentParser(description="Take screenshots of the page.")
    parser.add_argument(
        "--only", choices=NAMES, action="append", metavar="NAME", help=f"one of {', '.join(NAMES)}"
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="the output folder")
    parser.add_argument("--url", default="", help="the URL of a running gateway")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with nullcontext(options.url.rstrip("/")) if options.url else own_gateway() as url:
        return 0 if asyncio.run(take_all(url, options.only or NAMES, options.out)) else 1


if __name__ == "__main__":
    sys.exit(main())
