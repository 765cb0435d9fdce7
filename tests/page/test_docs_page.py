"""`/docs`: its files, their Content-Security-Policy, and Swagger UI in a real browser."""

import pytest
from playwright.async_api import Browser, expect

from src.sandbox.server import Sandbox
from src.web import dashboard
from tests.conftest import StartGateway
from tests.page.browser import browser, open_page
from tests.page.test_page import gateway
from tests.web.test_openapi import DOCUMENTED

__all__ = ["browser"]  # a fixture
PATIENCE_MS = 240_000  # Swagger UI needs several seconds of CPU


async def test_docs_files_have_the_policy_of_the_page(start: StartGateway) -> None:
    """The gateway serves all files. Only images may use data: URLs."""
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
async def test_docs_list_all_operations_and_send_requests(
    browser: Browser, lively: Sandbox
) -> None:
    """`getTicker` runs with its example. No request goes elsewhere, and the policy blocks none."""
    async with gateway(lively) as live:
        page, errors = await open_page(browser, "about:blank", 1280, 900)
        page.set_default_timeout(PATIENCE_MS)
        requested: list[str] = []
        page.on("request", lambda request: requested.append(request.url))
        await page.goto(f"{live.url}/docs")
        await expect(page.locator(".opblock")).to_have_count(len(DOCUMENTED), timeout=PATIENCE_MS)
        ticker = page.locator("[id$=-getTicker]")
        await ticker.locator(".opblock-summary-control").click()
        await expect(ticker.locator(".parameters code").first).to_have_text(
            "BTC-USDT", timeout=PATIENCE_MS
        )
        await ticker.locator(".try-out__btn").click()
        await expect(ticker.locator("[data-param-name=symbol] input")).to_have_value(
            "BTC-USDT", timeout=PATIENCE_MS
        )
        await ticker.locator(".execute").click()
        answer = ticker.locator(".live-responses-table")
        await expect(answer.locator("tbody .response-col_status").first).to_have_text(
            "200", timeout=PATIENCE_MS
        )
        await expect(answer.locator("code").first).to_contain_text(
            '"symbol": "BTC/USDT"', timeout=PATIENCE_MS
        )
        await page.locator("[id$=-recordMaintenance] .opblock-summary-control").click()
        await expect(page.locator("[id$=-recordMaintenance] .responses-inner")).to_be_visible(
            timeout=PATIENCE_MS
        )
        assert f"{live.url}/ticker/BTC-USDT" in requested
        assert not [url for url in requested if not url.startswith((live.url, "data:"))]
        errors.assert_none()
