"""`/docs`: its files and their policy, and Swagger UI in a real browser."""

import pytest
from playwright.async_api import Browser, expect

from src.sandbox.server import Sandbox
from src.web import dashboard
from tests.conftest import StartGateway
from tests.page.browser import browser, open_page
from tests.page.test_page import gateway
from tests.web.test_openapi import DOCUMENTED

__all__ = ["browser"]  # a fixture
PATIENCE_MS = 240_000  # Swagger UI needs several seconds of CPU, which a busy machine takes long to give


async def test_docs_files_have_the_policy_of_the_page(start: StartGateway) -> None:
    """The page, the script that starts it, and Swagger UI are ours to send; only images may be data: URLs as well."""
    live = await start(wait=False, api_keys="desk:12345678")
    page = (await live.get("/")).headers["content-security-policy"]
    for path in ("/docs", "/docs/start.js", *(f"/docs/{name}" for name in dashboard.SWAGGER_UI)):
        answer = await live.get(path)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert policy.replace(" data:", "") == page, path
        assert "img-src 'self' data:;" in policy
        assert "unsafe" not in policy
        again = await live.get(path, headers={"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304
    text = (await live.get("/docs")).text
    assert "<style" not in text
    assert "style=" not in text
    assert text.count("<script") == text.count('<script defer src="/docs/')
    for path in ("/docs/", "/docs/nothing.js", "/docs/oauth2-redirect", "/static/start.js"):
        assert (await live.get(path)).status_code == 404, path


@pytest.mark.full
async def test_docs_show_every_operation_and_try_one(browser: Browser, lively: Sandbox) -> None:
    """All operations are listed, `getTicker` answers its example, and nothing is fetched from elsewhere or refused."""
    async with gateway(lively) as live:
        page, seen = await open_page(browser, "about:blank", 1280, 900)
        page.set_default_timeout(PATIENCE_MS)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        await page.goto(f"{live.url}/docs")
        await expect(page.locator(".opblock")).to_have_count(len(DOCUMENTED), timeout=PATIENCE_MS)
        ticker = page.locator("[id$=-getTicker]")
        await ticker.locator(".opblock-summary-control").click()
        await expect(ticker.locator(".parameters code").first).to_have_text("BTC-USDT", timeout=PATIENCE_MS)
        await ticker.locator(".try-out__btn").click()
        await expect(ticker.locator("[data-param-name=symbol] input")).to_have_value("BTC-USDT", timeout=PATIENCE_MS)
        await ticker.locator(".execute").click()
        answer = ticker.locator(".live-responses-table")
        await expect(answer.locator("tbody .response-col_status").first).to_have_text("200", timeout=PATIENCE_MS)
        await expect(answer.locator("code").first).to_contain_text('"symbol": "BTC/USDT"', timeout=PATIENCE_MS)
        await page.locator("[id$=-recordMaintenance] .opblock-summary-control").click()
        await expect(page.locator("[id$=-recordMaintenance] .responses-inner")).to_be_visible(timeout=PATIENCE_MS)
        assert f"{live.url}/ticker/BTC-USDT" in asked
        assert not [url for url in asked if not url.startswith((live.url, "data:"))]
        seen.clean()
