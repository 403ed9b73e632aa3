"""What a model writes becomes text and a few harmless elements, whatever it writes."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from pocketmoe.serve.page.document import document
from tests.serve.page.conftest import Open
from tests.serve.page.fake_server import FakeServer, finish

# What may become of a model's text: elements and their attributes.
PLAIN = ["blockquote", "del", "em", "h3", "h4", "h5", "h6", "hr", "li", "p", "span", "strong", "ul"]
HARMLESS = {
    **{tag: set[str]() for tag in [*PLAIN, "table", "tbody", "td", "th", "thead", "tr"]},
    "a": {"href", "title", "target", "rel"},
    "button": {"type", "aria-label"},
    "code": set[str](),
    "div": {"class", "tabindex", "role", "aria-label"},
    "pre": {"tabindex", "aria-label"},
    "ol": {"start"},
}
SHOW = """(texts) => texts.map((text) => {
  const place = document.createElement("div");
  showMarkdown(place, text);
  const found = [...place.querySelectorAll("*")];
  const attributes = (each) => Object.fromEntries([...each.attributes].map(({name, value}) => [name, value]));
  const shown = found.map((each) => [each.localName, attributes(each)]);
  for (const button of place.querySelectorAll("button")) button.remove();
  const aside = [...place.querySelectorAll("a")].map((a) => a.title + decodeURI(a.href));
  return [shown, place.textContent + aside.join("")];
})"""
ATTACKS = [
    "<script>document.title = 'taken'</script>",
    "<img src=x onerror=\"document.title='taken'\">",
    "<svg onload=alert(1)><a href='javascript:alert(2)'>x</a>",
    "[click](javascript:alert(1)) [click](JaVaScRiPt:alert(1)) [x](data:text/html,<script>alert(1)</script>)",
    "[x](vbscript:x) [x](\x01javascript:alert(1)) [x](java\tscript:alert(1)) <javascript:alert(1)>",
    "![x](https://tracker.example/pixel.png) ![x](data:image/png;base64,AAAA)",
    '[x](https://a.example/"onmouseover="alert(1)) [x](https://a.example "t" onclick="x")',
    "```html\n<iframe src=https://a.example></iframe>\n```",
    "`<b>` <b>bold</b> &lt;script&gt; &#60;script&#62;",
    "<style>*{display:none}</style><link rel=stylesheet href=//a.example/x.css><base href=//a.example>",
    "| <img src=x onerror=alert(1)> | b |\n|---|---|\n| <script>x</script> | [y](javascript:x) |",
    "# <script>alert(1)</script>\n> <iframe>\n- <object data=x>\n\n1. <embed>",
    "<form action=https://a.example><input name=q></form><meta http-equiv=refresh content='0;url=//a.example'>",
]
PIECES = [
    *"\n\n\n *_~`[]()!<>#|-+:\\\"' \t", "**", "***", "__", "```", "~~~", "- ", "1. ", "> ", "# ", "|---|---|\n", "](",
    "![", "https://a.example/x", "javascript:alert(1)", "<script>", "</script>", "<img src=x onerror=x>", "word", "  ",
    "    ", "&lt;", "\u202e", "\u2028", "é", "🦊", "\x00", "\ud800",
]  # fmt: skip


@pytest.fixture(scope="module")
def blank(browser: Browser, server: FakeServer) -> Iterator[Page]:
    """The page, of which only the renderer is wanted."""
    server.reset()
    page = browser.new_page()
    page.goto(server.url)
    expect(page).to_have_title("tiny · PocketMoE")
    yield page
    page.close()


def refuse_harm(shown: list[tuple[str, dict[str, str]]]) -> None:
    for tag, attributes in shown:
        assert tag in HARMLESS, tag
        assert {*attributes} <= HARMLESS[tag], (tag, attributes)
        if tag == "a":
            assert re.match(r"(https?://|mailto:)", attributes["href"]), attributes


def test_attacks_stay_text(blank: Page) -> None:
    """No script, frame, image, form, style or address to load comes out of any known trick; all can be read."""
    for text, (shown, readable) in zip(ATTACKS, blank.evaluate(SHOW, ATTACKS), strict=True):
        refuse_harm(shown)
        for word in re.findall(r"<(\w+)", text):
            assert f"<{word}" in readable, (text, readable)
    assert blank.title() == "tiny · PocketMoE"


@pytest.mark.parametrize("seed", range(3))
def test_no_text_becomes_anything_else(blank: Page, seed: int) -> None:
    """Random texts of markup's pieces give harmless elements alone, and lose no word."""
    chance = random.Random(seed)
    texts = ["".join(chance.choices(PIECES, k=chance.randrange(1, 60))) for _ in range(400)]
    texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    for text, (shown, readable) in zip(texts, blank.evaluate(SHOW, texts), strict=True):
        refuse_harm(shown)
        for word in ("word", "🦊", "é"):
            assert readable.count(word) >= text.count(word), (text, readable)


@pytest.mark.parametrize("seed", range(2))
def test_a_text_looks_the_same_however_it_arrived(blank: Page, seed: int) -> None:
    """Shown piece by piece, as tokens come, a text ends as it does when shown at once."""
    chance = random.Random(seed)
    texts = ["".join(chance.choices(PIECES[:-1], k=40)) for _ in range(60)]
    differing = blank.evaluate(
        """(texts) => texts.filter((text) => {
          const [slow, fast] = [document.createElement("div"), document.createElement("div")];
          for (let end = 0; end <= text.length; end += 3) showMarkdown(slow, text.slice(0, end));
          showMarkdown(slow, text);
          showMarkdown(fast, text);
          return !slow.isEqualNode(fast);
        })""",
        texts,
    )
    assert differing == []


def test_what_is_common_is_rendered(blank: Page) -> None:
    """Emphasis, code, lists, tables, quotes and links as CommonMark and GitHub have them."""
    cases = {
        "a **b *c* d** `e*f*`": "<p>a <strong>b <em>c</em> d</strong> <code>e*f*</code></p>",
        "**b *c***": "<p><strong>b <em>c</em></strong></p>",
        "***x*** ~~y~~": "<p><strong><em>x</em></strong> <del>y</del></p>",
        "snake_case_name 2 * 3 * 4": "<p>snake_case_name 2 * 3 * 4</p>",
        "- a\n  - b\n- c": "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>",
        "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
        "## T ##\ntext": "<h4>T</h4><p>text</p>",
        "> a\n> - b": "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>",
        "---": "<hr>",
        "`` a`b ``": "<p><code>a`b</code></p>",
        r"\*a\*": "<p>*a*</p>",
        "**open": "<p>**open</p>",
        "see https://a.example/x_y_z. ok": "<p>see {https://a.example/x_y_z}. ok</p>",
    }
    shown = blank.evaluate(
        """(texts) => texts.map((text) => {
          const place = document.createElement("div");
          showMarkdown(place, text);
          for (const a of place.querySelectorAll("a")) a.replaceWith(`{${a.textContent}}`);
          return place.innerHTML;
        })""",
        [*cases],
    )
    assert dict(zip(cases, shown, strict=True)) == cases


def test_a_hostile_answer_asks_the_network_for_nothing(open_page: Open, fake: FakeServer) -> None:
    """A whole answer of attacks leaves the page as it is, and no request goes out but those to the server."""
    page = open_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    fake.answers = [[*("\n\n".join(ATTACKS) + "\n\nthe end").splitlines(keepends=True), finish()]]
    page.fill("#message", "attack")
    page.keyboard.press("Enter")
    expect(page.locator(".assistant .figures")).not_to_be_empty()
    expect(page.locator(".assistant > .text")).to_contain_text("the end")
    assert page.locator(".assistant .text :is(script, img, svg, iframe, form, style, link, object, embed)").count() == 0
    assert all(url.startswith(fake.url) for url in asked)


def test_the_policy_holds_even_where_the_renderer_would_fail(blank: Page) -> None:
    """A script or handler that got into the page, and markup made from text, are refused by the browser itself."""
    taken = blank.evaluate(
        """() => {
          const script = document.createElement("script");
          try { script.textContent = "document.title = 'taken'"; } catch {}
          document.body.append(script);
          let made = "made";
          try { document.createElement("div").innerHTML = "<b>x</b>"; } catch { made = "refused"; }
          return [document.title, made];
        }"""
    )
    assert taken == ["tiny · PocketMoE", "refused"]
    assert b"innerHTML" not in document().body
