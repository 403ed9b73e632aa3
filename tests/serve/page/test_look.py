"""The page can be read and used at any width, in the light and in the dark, by whoever cannot see it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.serve.page.conftest import Open
from tests.serve.page.fake_server import FakeServer, finish, reasoning, refusal, usage

WIDE_TEXT = "\n\n".join(["word " * 30, f"```python\n# {'long ' * 60}\n```", "W" * 400, "| a |\n|---|\n| `b` |"])
# Each text's contrast against what is behind it, after WCAG 2.2; what is disabled is exempt there, but not here.
CONTRASTS = """() => {
  const parsed = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const channel = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = parsed(getComputedStyle(each).backgroundColor);
      if ((colour[3] ?? 1) === 1) return colour;
    }
    return [255, 255, 255];
  };
  const shown = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (!text || !element.checkVisibility() || element.closest(".unseen, script, style, noscript")) continue;
    const [one, other] = [parsed(getComputedStyle(element).color), behind(element)].map(luminance);
    const [lighter, darker] = [Math.max(one, other), Math.min(one, other)];
    shown.push([text.slice(0, 40), (lighter + 0.05) / (darker + 0.05)]);
  }
  return shown;
}"""
TOO_WIDE = """() => [...document.querySelectorAll("html, body, main, #turns, aside")]
  .filter((each) => each.scrollWidth > each.clientWidth + 1).map((each) => each.id || each.localName)"""
FOCUSED = """() => {
  const element = document.activeElement;
  element.dataset.order ??= document.querySelectorAll("[data-order]").length;
  const name = element.ariaLabel || element.labels?.[0]?.textContent || element.textContent;
  const outlined = getComputedStyle(element).outlineStyle !== "none";
  return [element.dataset.order, element.localName, Boolean(name || element.getAttribute("aria-labelledby")), outlined];
}"""
NOT_REACHED = """() => [...document.querySelectorAll("button, input, textarea, select, canvas, summary, a[href]")]
  .filter((each) => each.checkVisibility() && !each.disabled && !each.dataset.order).map((each) => each.outerHTML)"""


def filled(open_page: Open, fake: FakeServer, **how: Any) -> Page:
    """A page with everything on it: an answer, an error, and one that is coming."""
    fake.answers = [
        [reasoning("hm"), WIDE_TEXT, finish(), usage(90, 40, 3)],
        refusal(500, "An error. " + "E" * 300),
        [{"comment": "prompt 1/2"}, threading.Event()],
    ]
    page = open_page(**how)
    for number, wanted in enumerate((".figures:not(:empty)", "[role=alert]", ".progress")):
        page.fill("#message", f"question {number} " + "Q" * 200)
        page.press("#message", "Enter")
        expect(page.locator(f".assistant {wanted}").last).to_be_visible()
    page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_it_fits_and_can_be_read(open_page: Open, fake: FakeServer, width: int, scheme: str) -> None:
    """In no view does anything stick out sideways, and every text stands off what is behind it by 4.5 to 1."""
    page = filled(open_page, fake, width=width, color_scheme=scheme)
    seen: dict[str, float] = {}
    for name in ("Chat", "Machine", "Settings") if width == 400 else ("",):
        if name:
            page.get_by_role("button", name=name, exact=True).click()
        assert page.evaluate(TOO_WIDE) == []
        seen.update(page.evaluate(CONTRASTS))
    assert len(seen) > 40
    assert {text: contrast for text, contrast in seen.items() if contrast < 4.5} == {}


def test_everything_has_a_name_and_an_order(open_page: Open, fake: FakeServer) -> None:
    """Tab reaches every control that is shown, each with a name and seen to have the focus."""
    page = filled(open_page, fake)
    page.focus(".skip")
    reached: set[str] = set()
    while (found := page.evaluate(FOCUSED))[0] not in reached:
        order, tag, named, outlined = found
        assert tag == "body" or (named and outlined), found
        reached.add(order)
        page.keyboard.press("Tab")
    assert len(reached) > 20
    assert page.evaluate(NOT_REACHED) == []


def test_landmarks_and_headings_tell_what_is_where(open_page: Open, fake: FakeServer) -> None:
    """One main heading, named regions, one polite live region, and alerts for what went wrong."""
    page = filled(open_page, fake)
    assert page.get_by_role("heading", level=1).all_inner_texts() == ["PocketMoE"]
    for name in ("Conversation", "This machine", "Settings"):
        expect(page.get_by_role("region", name=name, exact=True)).to_be_visible()
    expect(page.get_by_role("banner")).to_be_visible()
    expect(page.get_by_role("main")).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("The answer has begun.")
    assert page.locator("article").count() == 6


def test_nothing_moves_where_motion_is_not_wanted(open_page: Open, fake: FakeServer) -> None:
    """With prefers-reduced-motion no element is animated; without it, what works is seen to."""
    for motion, moving in (("reduce", 0), ("no-preference", 1)):
        page = filled(open_page, fake, reduced_motion=motion)
        expect(page.locator(".busy .progress")).to_be_visible()
        running = "document.getAnimations().filter((each) => each.playState === 'running').length"
        assert page.evaluate(running) == moving
