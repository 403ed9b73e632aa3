"""A browser without a window, where there is one, and a server that says what a test wrote down."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest

from tests.hang import HANG_S
from tests.serve.page.fake_server import FakeServer

pytest.importorskip("playwright", reason="the page is tested with playwright: pip install pocketmoe[dev]")

from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

Open = Callable[..., Page]


@pytest.fixture(scope="module")  # while playwright is open no other test of this process can run an event loop
def browser() -> Iterator[Browser]:
    """Chromium of the system."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("there is no chromium here: apt-get install chromium")
    expect.set_options(timeout=HANG_S * 1000)
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=found)
        yield made
        made.close()


@pytest.fixture(scope="session")
def server() -> Iterator[FakeServer]:
    with FakeServer() as made:
        yield made


@pytest.fixture
def fake(server: FakeServer) -> FakeServer:
    """The server, with nothing to say yet."""
    server.reset()
    return server


@pytest.fixture
def complaints() -> list[str]:
    """What the browser complains of: errors of scripts, what its policy refused, dialogs."""
    return []


@pytest.fixture
def open_page(browser: Browser, fake: FakeServer, complaints: list[str]) -> Iterator[Open]:
    """open_page(width=..., color_scheme=..., ...): the page, connected; a complaint of the browser fails the test."""
    contexts: list[BrowserContext] = []

    def open_it(width: int = 1280, height: int = 800, *, ready: bool = True, **options: object) -> Page:
        viewport = {"width": width, "height": height}
        context = browser.new_context(viewport=viewport, **options)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(HANG_S * 1000)
        page.on("pageerror", lambda error: complaints.append(error.message))
        page.on("console", lambda message: complaints.extend([message.text] * (message.type == "error")))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(fake.url)
        if ready:
            expect(page.locator("#experts-words")).not_to_be_empty()
        return page

    yield open_it
    for context in contexts:
        context.close()
    refused = "Failed to load resource: the server responded with a status of"  # which a test asks for
    assert not [text for text in complaints if not text.startswith(refused)]
