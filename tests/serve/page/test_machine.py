"""What the page shows of the machine is what the server's state says."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.serve.page.conftest import Open
from tests.serve.page.fake_server import EXPERTS, LAYERS, FakeServer, finish


def model_of(fake: FakeServer) -> dict[str, Any]:
    (model,) = fake.state["models"]
    return model


def colours(page: Page) -> list[list[str]]:
    """What each expert is painted with, layer by layer, as #rrggbb."""
    return page.evaluate(
        f"""() => {{
          const canvas = document.getElementById("experts");
          const [width, height] = [canvas.width / {EXPERTS}, canvas.height / {LAYERS}];
          const context = canvas.getContext("2d");
          const at = (row, column) => context.getImageData((column + 0.4) * width, (row + 0.4) * height, 1, 1).data;
          const hex = (data) => "#" + [...data].slice(0, 3).map((v) => v.toString(16).padStart(2, "0")).join("");
          const numbers = (count) => [...Array(count).keys()];
          return numbers({LAYERS}).map((row) => numbers({EXPERTS}).map((column) => hex(at(row, column))));
        }}"""
    )


def palette(page: Page) -> dict[str, str]:
    return page.evaluate(
        """() => Object.fromEntries(["absent", "resident", "used", "fetched"].map(
          (name) => [name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim()]))"""
    )


def test_memory_is_shown_by_what_it_is_for(open_page: Open, fake: FakeServer) -> None:
    """In bytes and in widths that are shares of the budget, the rest of it included."""
    page = open_page()
    expect(page.locator("#memory-used")).to_have_text("150 MB of 200 MB")
    expect(page.locator("#memory-peak")).to_have_text("peak 170 MB")
    page.get_by_text("What the budget is for").click()
    assert page.locator("#claims li").all_inner_texts() == [
        "expert slots\n80.0 MB", "process\n70.0 MB", "dense weights\n30.0 MB", "not promised\n20.0 MB",
    ]  # fmt: skip
    parts = page.locator("#memory-bar i")
    widths = [float(parts.nth(at).evaluate("(part) => parseFloat(part.style.width)")) for at in range(parts.count())]
    assert widths == pytest.approx([40, 35, 15])
    expect(page.locator("#memory-bar")).to_have_accessible_name("Memory: 150 MB of 200 MB, peak 170 MB")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_experts_light_up_as_they_are_used(open_page: Open, fake: FakeServer, scheme: str) -> None:
    """Those in memory in one colour, those that had to be fetched in another; figures are those of the answer."""
    model = model_of(fake)
    model["counts"] = dict.fromkeys(model["counts"], 1000)
    end = threading.Event()
    fake.answers = [["a", end, "b", finish()]]
    page = open_page(color_scheme=scheme, reduced_motion="reduce")
    known = palette(page)
    assert len({*known.values()}) == 4
    expected = [[known["resident"], known["absent"]] * (EXPERTS // 2) for _ in range(LAYERS)]
    assert colours(page) == expected
    page.fill("#message", "go")
    page.press("#message", "Enter")
    expect(page.locator(".assistant > .text")).to_have_text("a")
    model["uses"][0][0] += 3
    model["uses"][2][5] += 1
    more = zip(model["counts"], (70, 5, 25, 50e6, 1.0, 4.0, 10), strict=True)  # hits, guessed hits, misses, ...
    model["counts"] = {name: 1000 + count for name, count in more}
    expect(page.locator("#experts-words")).to_contain_text("2 just used")
    expected[0][0], expected[2][5] = known["used"], known["fetched"]
    assert colours(page) == expected
    tiles = {name: page.locator(f"#tile-{name}").inner_text() for name in ("hits", "waiting", "speed", "read")}
    assert tiles == {"hits": "75%", "waiting": "25%", "speed": "2.50", "read": "50.0 MB"}
    expect(page.locator("#tiles-of")).to_contain_text("Since the last question")
    end.set()


def test_an_expert_can_be_asked_about(open_page: Open, fake: FakeServer) -> None:
    """By arrow keys as by pointing: where it is and how often it was used, said to a screen reader too."""
    model_of(fake)["uses"][1][1] = 1234
    page = open_page()
    page.focus("#experts")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#experts-at")).to_have_text("Layer 2, expert 2: on disk, used for 1,234 tokens.")
    for _ in range(EXPERTS + 1):
        page.keyboard.press("ArrowLeft")
    expect(page.locator("#experts-at")).to_contain_text("Layer 2, expert 1: in memory")
    page.keyboard.press("Tab")
    expect(page.locator("#experts-at")).to_be_empty()
    box = page.locator("#experts").bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] * 2.5 / EXPERTS, box["y"] + box["height"] * 3.5 / LAYERS)
    expect(page.locator("#experts-at")).to_contain_text("Layer 4, expert 3")
    expect(page.locator("#experts-words")).to_contain_text("16 of 32 in memory")


def test_a_server_without_a_state_is_a_conversation_still(open_page: Open, fake: FakeServer) -> None:
    """The page says that it knows nothing of the machine, and asks no more."""
    fake.state = {}  # without what the page reads
    fake.answers = [["x", finish()]]
    page = open_page(ready=False)
    expect(page.locator("#machine-words")).to_contain_text("No figures")
    page.fill("#message", "go")
    page.press("#message", "Enter")
    expect(page.locator(".assistant > .text")).to_have_text("x")


def test_a_model_that_is_not_loaded_shows_no_experts(open_page: Open, fake: FakeServer) -> None:
    """And says that it will be when it is asked; once it is, its experts appear."""
    whole = dict(model_of(fake))
    model_of(fake).update(loaded=False, resident=[], uses=[])
    page = open_page(ready=False)
    expect(page.locator("#machine-words")).to_contain_text("not in memory")
    expect(page.locator("#experts")).to_be_hidden()
    fake.state["models"] = [whole]
    fake.answers = [["x", finish()]]
    page.fill("#message", "go")
    page.press("#message", "Enter")
    expect(page.locator("#experts")).to_be_visible()
    expect(page.locator("#machine-words")).to_be_hidden()
