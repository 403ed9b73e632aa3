"""The page: whole by itself, a table for each picture, and deaf to whatever a bundle is called."""

from __future__ import annotations

from html.parser import HTMLParser

import msgspec
import pytest

from pocketmoe.profiles.catalogue.devices import find_device
from pocketmoe.profiles.estimate.device_prediction import predict_device
from pocketmoe.profiles.profile import StoredKind
from pocketmoe.profiles.report.html import el
from pocketmoe.profiles.report.page import render
from tests.profiles import made_up

VOID = {"meta", "br", "hr", "img", "link", "input"}
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "ul", "li", "b", "section", "div"),
    *("figure", "figcaption", "details", "summary", "span", "table", "caption", "thead", "tbody", "tr", "th", "td"),
    *("svg", "g", "line", "polyline", "rect", "circle", "path", "text"),
}


class Page(HTMLParser):
    """What a page consists of; complains of what does not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.figures: list[tuple[int, int]] = []  # pictures and tables of each section with a figure
        self._section = [0, 0]
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self._section = [0, 0]
        self._section[0] += tag == "svg"
        self._section[1] += tag == "tbody"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section" and self._section[0]:
            self.figures.append((self._section[0], self._section[1]))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_every_picture_has_its_table() -> None:
    """It nests, refers to nothing outside, and has seven pictures."""
    text = render(made_up.profile(), [predict_device(made_up.profile(), "pi5-8gb", find_device("pi5-8gb"))])
    page = Page(text)
    assert set(page.tags) <= ALLOWED
    assert page.figures == [(1, 1)] * 7
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "srcset", "action", "data", "style"}
    assert not [name for name in names if name.startswith("on")]
    for outside in ("http:", "https:", "url(", "@import", "//", "<script"):
        assert outside not in text, outside
    assert "prefers-color-scheme: dark" in text
    for words in ("predicted", "calibrated on", "unavailable", "Raspberry Pi 5", "Belady", "S-MBU"):
        assert words in page.text, words


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;/title>"


def test_hostile_names_are_text() -> None:
    """Whatever a bundle, a file or a machine is called shows as it is, and adds no element."""
    plain = made_up.profile()
    profile = msgspec.structs.replace(
        plain,
        model=msgspec.structs.replace(plain.model, name=HOSTILE, architecture=HOSTILE, schemes={HOSTILE: HOSTILE}),
        workload=msgspec.structs.replace(plain.workload, source="text", text=HOSTILE),
        machine=msgspec.structs.replace(plain.machine, cpu=HOSTILE, software={HOSTILE: HOSTILE}, disk_problem=HOSTILE),
        runs=tuple(
            msgspec.structs.replace(r, memory=HOSTILE, limited_by="process", limit_problem=HOSTILE) for r in plain.runs
        ),
    )
    page = Page(render(profile))
    assert page.tags.count("script") == page.tags.count("img") == 0
    assert set(page.tags) <= ALLOWED
    assert page.text.count(HOSTILE) > 8
    assert el("a", HOSTILE, title=HOSTILE).count("<") == 2


@pytest.mark.parametrize("runs", [1, 2, 5])
def test_any_number_of_runs_makes_a_page(runs: int) -> None:
    """One budget alone, too, and one that nothing was read at."""
    some = [made_up.run(2 + 2 * n, bytes_read_per_token=0.0, hit_rate=1.0) for n in range(runs)]
    assert Page(render(made_up.profile(*some))).figures == [(1, 1)] * 7


def test_what_disturbed_the_measurement_is_said() -> None:
    busy = made_up.run(16, others_cpu=0.4)
    page = Page(render(made_up.profile(made_up.run(2), busy)))
    assert "16 slots (40%)" in page.text
    assert "NO: a bug" in Page(render(made_up.profile(made_up.run(2), made_up.run(16, tokens_sha256="0" * 64)))).text


def test_mixed_precision_is_drawn() -> None:
    """Where experts are of several kinds the page has a picture more, with how many are of each; else none."""
    kinds = (StoredKind(scheme="int2-b64-asym", nbytes=500), StoredKind(scheme="int4-b64-asym", nbytes=900))
    of_expert = tuple(tuple(int(e == layer) for e in range(count)) for layer, count in enumerate(made_up.MODEL.experts))
    model = msgspec.structs.replace(made_up.MODEL, expert_kinds=kinds, expert_kind_of=of_expert)
    drawn = render(made_up.profile(made_up.run(2), made_up.run(16), model=model))
    assert "How experts are stored" in drawn
    assert "int2-b64-asym" in drawn
    assert len(Page(drawn).figures) == 8
    assert "How experts are stored" not in render(made_up.profile(made_up.run(2), made_up.run(16)))
