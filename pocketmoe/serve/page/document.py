"""The page as one document with everything inside, and the headers that let it do nothing but talk to its server."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent
_SCRIPTS = ("markdown.js", "api.js", "conversation.js", "machine.js", "page.js")  # a later one uses the earlier ones


@dataclass(frozen=True)
class Document:
    """What a browser gets for `/`."""

    body: bytes
    headers: Mapping[str, str]


@cache
def document() -> Document:
    """The page. Its policy allows the script and the style that are in it, by their hashes, and its own server.

    Nothing else can be loaded or asked, no element can be made from text, and no other page can frame it.
    """
    style = _read("page.css")
    script = f'"use strict";\n{"".join(map(_read, _SCRIPTS))}'
    html = _read("page.html").replace("{{style}}", style).replace("{{script}}", script)
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "img-src": "data:",
        "connect-src": "'self'",
        "form-action": "'none'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return Document(
        html.encode(),
        {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
            "Cache-Control": "no-cache",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        },
    )


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
