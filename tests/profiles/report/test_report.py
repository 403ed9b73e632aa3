"""The page: whole by itself, a table for each picture, and deaf to whatever a bundle is called."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import msgspec
import pytest

from pocketmoe.profiles.catalogue.devices import find_device
from pocketmoe.profiles.estimate.device_prediction import predict_device
from pocketmoe.profiles.profile import Energy, Profile, StoredKind
from pocketmoe.profiles.report.headline import headline, knee
from pocketmoe.profiles.report.html import el
from pocketmoe.profiles.report.page import render
from tests.profiles import made_up

VOID = {"meta", "br", "hr", "img", "link", "input"}
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "ul", "li", "b", "section", "div"),
    *("figure", "figcaption", "details", "summary", "span", "table", "caption", "thead", "tbody", "tr", "th", "td"),
    *("svg", "g", "line", "polyline", "polygon", "rect", "circle", "path", "text"),
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
    """It nests, refers to nothing outside, and has seven pictures, and one of other machines."""
    text = render(made_up.profile(), [predict_device(made_up.profile(), "pi5-8gb", find_device("pi5-8gb"))])
    page = Page(text)
    assert set(page.tags) <= ALLOWED
    assert page.figures == [(1, 1)] * 8
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "srcset", "action", "data", "style"}
    assert not [name for name in names if name.startswith("on")]
    for outside in ("http:", "https:", "url(", "@import", "//", "<script"):
        assert outside not in text, outside
    assert "prefers-color-scheme: dark" in text
    for words in ("predicted", "calibrated on", "Energy unavailable", "Raspberry Pi 5", "Belady", "S-MBU"):
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
    busy = made_up.run(16, others_cpu=0.4, decode_tokens_per_s=200.0)
    page = Page(render(made_up.profile(made_up.run(2), busy)))
    assert "16 slots (40%)" in page.text
    assert page.attributes.count(("class", "loaded")) == 3, (
        "its tile, that of the first token, and its row of the table"
    )
    assert "measured while others were busy" in page.text
    assert "loaded" not in [value for _, value in Page(render(made_up.profile(made_up.run(2)))).attributes]
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


SPEEDS = (20.0, 50.0, 91.0, 100.0)


def speeds() -> Profile:
    """Four budgets of 104, 116, 124 and 132 MB, of which the third makes nine tenths of the fastest."""
    slots = (2, 8, 12, 16)
    return made_up.profile(*(made_up.run(n, decode_tokens_per_s=speed) for n, speed in zip(slots, SPEEDS, strict=True)))


def test_the_headline_says_what_saved_memory_costs() -> None:
    """Speed, knee and least budget in the title, the first sentence and the tiles; the ring is on the knee's dot."""
    page = render(speeds())
    title, lead = (re.findall(f"<{tag}[^>]*>(.*?)</{tag[:2].strip()}>", page)[0] for tag in ("h1", 'p class="lead"'))
    assert title == "made up on Made-up CPU: 100 tokens/s"
    assert lead == (
        "100 tokens/s in 132.0 MB; the knee is at 124.0 MB: 6% less memory, 91% of the speed. The least measured, "
        "104.0 MB, takes 21% less memory and makes 20 tokens/s, 20% of the speed."
    )
    ring = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="6"', page)
    dots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="4" class="a">', page)
    assert ring == [dots[2]]
    assert "on this machine" not in title


def test_a_flat_curve_has_its_knee_at_the_least_budget() -> None:
    runs = [made_up.run(2), made_up.run(16)]
    assert knee(runs) is runs[0]
    assert headline(runs).endswith("the least budget that was measured is enough.")
    assert headline(runs[:1]) == "100 tokens/s in 104.0 MB."


def test_what_is_unavailable_has_no_tile_and_what_is_constant_no_column() -> None:
    """The second column is the speed; what all runs have alike is said once, in words; a single run keeps all."""
    page = render(speeds())
    (tiles,) = re.findall(r'<ul class="tiles">(.*?)</ul>', page)
    assert "unavailable" not in tiles
    table = page.partition("All measurements")[2].partition("</table>")[0]
    titles = re.findall(r'scope="col">(.*?)</th>', table)
    assert titles[:2] == ["memory", "tokens/s"]
    assert {"disk", "limit", "energy/token", "heat"} & {*titles} == set()
    assert "disk as it is" in table
    alone = render(made_up.profile(made_up.run(2))).partition("All measurements")[2].partition("</table>")[0]
    assert "disk" in re.findall(r'scope="col">(.*?)</th>', alone)
    energy = Energy(label="measured", source="RAPL package", joules_per_token=0.5)
    assert "0.50 J" in render(made_up.profile(made_up.run(2, energy=energy)))


def test_predicted_devices_share_one_picture_and_say_their_assumptions_once() -> None:
    names = ("pi5-8gb", "laptop-8gb", "orin-nano-8gb")
    page = render(speeds(), [predict_device(speeds(), name, find_device(name)) for name in names])
    section = page.partition("Predicted on other machines")[2].partition("</section>")[0]
    assert section.count("<svg") == 1
    assert section.count('scope="rowgroup"') == section.count("<polygon") == 3
    assert section.count("Assumed:") == 1


def test_every_table_scrolls_by_keyboard_and_nothing_moves() -> None:
    page = render(speeds())
    assert page.count('class="scroll" tabindex="0" role="region" aria-label=') == page.count("<table")
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert ".scroll:focus-visible, summary:focus-visible { outline" in style
    assert not re.search(r"animation|transition|scroll-behavior", style)


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.2, from #rrggbb."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_graphics_stand_out_in_both_themes(theme: int) -> None:
    """WCAG 2.2: text 4.5 to 1, grey text too, graphics 3 to 1, on the page and on its cards."""
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", render(speeds()).split(":root {")[1 + theme].split("}")[0]))
    assert {"a", "b", "c", "d", "e", "f", "heat", "ink", "soft"} <= {*colours}
    for under in ("paper", "card"):
        for name, least in {**dict.fromkeys(("ink", "soft"), 4.5), **dict.fromkeys("abcdef", 3.0), "heat": 3.0}.items():
            assert contrast(colours[name], colours[under]) >= least, (name, under)
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
