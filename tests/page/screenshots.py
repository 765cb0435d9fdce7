"""Take the pictures of the page in docs/images: each view, at a desk and on a phone, light and dark.

`make screenshots`. They are of a gateway of its own with simulated exchanges, whose prices move, so that no two runs
take the same ones. While the page is worked at:
`python -m tests.page.screenshots --only market-desk-dark --out folder`, and `--url` takes them of a gateway that runs.
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

LIVELY_SECONDS = 5.0  # some updates come, and the gateway has figures of itself
FOLDER = ROOT / "docs" / "images"


class View(NamedTuple):
    """One view of the page: its address, and what has to be in it before it is pictured."""

    path: str
    ready: str  # a CSS selector
    text: str  # that is in one of those that can be seen, as a regular expression


class Size(NamedTuple):
    """One kind of screen."""

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
    """Take one picture, and say so; returns whether all was there, and nothing complained of."""
    view_name, size_name, scheme = name.split("-")
    view, size = VIEWS[view_name], SIZES[size_name]
    page, seen = await open_page(
        browser, url + view.path, size.width, size.height, dark=scheme == "dark", zone="UTC", **size.more
    )
    try:
        await page.locator(view.ready).filter(has_text=re.compile(view.text), visible=True).first.wait_for()
    except PlaywrightTimeoutError:  # what is there is pictured: it shows what is wrong
        seen.faults.append(f"nothing visible is {view.ready} with a text like {view.text!r}")
    await asyncio.sleep(LIVELY_SECONDS)
    file = folder / f"{name}.png"
    picture = await page.screenshot(path=file, animations="disabled")
    await page.context.close()
    print(f"{file}: {len(picture) / 1024:.0f} KB", *seen.faults, sep="\n  ")
    return not seen.faults


async def take_all(url: str, names: list[str], folder: Path) -> bool:
    """Take these pictures, one after the other; returns whether all are as they should be."""
    async with chromium() as browser:
        return all([await take(browser, url, name, folder) for name in names])


@contextmanager
def own_gateway() -> Iterator[str]:
    """Run a gateway with simulated exchanges and a Redis; gives its address."""
    with Servers() as servers:
        yield servers.gateway(servers.sandbox(), {"REDIS_URL": servers.redis()}).url


def main() -> int:
    """Take what is asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description="Take the pictures of the page.")
    parser.add_argument("--only", choices=NAMES, action="append", metavar="NAME", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder to write to")
    parser.add_argument("--url", default="", help="of a gateway that runs already")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with nullcontext(options.url.rstrip("/")) if options.url else own_gateway() as url:
        return 0 if asyncio.run(take_all(url, options.only or NAMES, options.out)) else 1


if __name__ == "__main__":
    sys.exit(main())
