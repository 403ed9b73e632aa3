"""The page and the server it belongs to: a conversation, a text continued, and what the machine did for it."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Browser, Page, expect

from pocketmoe.runtime.model import LoadRequest, Model
from tests import runnable
from tests.hang import HANG_S
from tests.serve.client import Running, request_for, running

KEY = "sesame"


def opened(browser: Browser, server: Running) -> Page:
    page = browser.new_page()
    page.set_default_timeout(HANG_S * 1000)
    page.goto(server.serving.url)
    return page


def say(page: Page, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def test_a_conversation_with_a_model(browser: Browser, small: Path) -> None:
    """With the key: the model's own answer, its figures, the experts it used; what is too long is told, and stays."""
    with Model(small, LoadRequest()) as model:
        expected = model.generate([{"role": "user", "content": "a b c"}], max_tokens=8)
    with running(request_for(small, keys=(KEY,))) as server:
        page = opened(browser, server)
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        page.get_by_label("Most tokens").fill("8")
        page.get_by_label("Temperature").fill("0")
        say(page, "a b c")
        expect(page.locator(".assistant .figures")).to_contain_text(f"{len(expected.tokens)} tokens")
        assert page.locator(".assistant > .text").inner_text() == expected.text.strip()
        expect(page.locator("#tile-hits")).to_contain_text("%")
        used = page.evaluate("machine.last.model.uses.flat().reduce((sum, count) => sum + count)")
        computed = expected.prompt_tokens + len(expected.tokens) - 1
        assert used == computed * runnable.TOP_K * runnable.LAYERS
        budget = page.evaluate("machine.last.state.budget_bytes")
        assert 0 < page.evaluate("machine.last.state.used_bytes") <= budget
        say(page, "a " * 100)
        expect(page.get_by_role("alert")).to_contain_text("tokens")
        page.close()


def test_a_text_is_continued_by_a_model_without_a_template(browser: Browser, tmp_path: Path) -> None:
    """The page knows from the server's list that this one does not chat."""
    plain = tmp_path / "plain"
    runnable.write_bundle(plain)
    with Model(plain, LoadRequest()) as model:
        expected = model.generate("a b c", max_tokens=5, raw=True).text
    with running(request_for(plain)) as server:
        page = opened(browser, server)
        page.get_by_label("Most tokens").fill("5")
        page.get_by_label("Temperature").fill("0")
        expect(page.locator("#message")).to_have_attribute("placeholder", "Text to continue")
        say(page, "a b c")
        expect(page.locator(".assistant .figures")).to_contain_text("limit of tokens")
        assert page.locator(".assistant > .text").text_content() == expected
        page.close()
