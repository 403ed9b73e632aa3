"""The page is one file that can load nothing and run nothing but what is in it."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

from pocketmoe.serve.page.document import document


class _Elements(HTMLParser):
    """Start tags with their attributes, and what stands in scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in self.inside:
            self.inside[self._open].append(data)


def elements() -> _Elements:
    parser = _Elements()
    parser.feed(document().body.decode())
    parser.close()
    return parser


def policy() -> dict[str, str]:
    parts = document().headers["Content-Security-Policy"].split("; ")
    return {name: value for name, _, value in (part.partition(" ") for part in parts)}


def test_everything_is_inside() -> None:
    """No element names a file or an address to load, and none has a style or a handler in an attribute."""
    for tag, attributes in elements().found:
        for name in ("src", "href", "srcset", "data", "action", "formaction", "poster"):
            value = attributes.get(name) or ""
            assert value.startswith(("#", "data:image/svg+xml,")) or not value, (tag, name)
        assert not [name for name in attributes if name == "style" or name.startswith("on")], tag


def test_the_policy_allows_the_script_and_the_style_that_are_inside() -> None:
    """By the hash of each, as a browser computes it; nothing else may run, load, frame or be asked."""
    inside = elements().inside
    for tag in ("script", "style"):
        text = "".join(inside[tag])
        assert len(text) > 1000
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy()[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy()["default-src"] == "'none'"
    assert policy()["connect-src"] == "'self'"
    assert policy()["frame-ancestors"] == "'none'"
    assert policy()["require-trusted-types-for"] == "'script'"


def test_every_label_and_reference_has_its_element() -> None:
    """Ids are unique; `for`, `aria-labelledby`, `aria-describedby` and the scripts name ids that are there."""
    parser = elements()
    ids = [attributes["id"] for _, attributes in parser.found if "id" in attributes]
    assert len(ids) == len({*ids})
    named = set(re.findall(r'byId\("([\w-]+)"\)', "".join(parser.inside["script"])))
    for _, attributes in parser.found:
        for name in ("for", "aria-labelledby", "aria-describedby"):
            named |= set((attributes.get(name) or "").split())
    assert len(named) > 20
    assert named <= {*ids}
