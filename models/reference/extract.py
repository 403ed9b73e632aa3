"""Turn package files into plain text documents."""

from __future__ import annotations

import gzip
import re
import struct
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

SKIPPED_TAGS = {"script", "style", "nav", "aside", "header", "footer", "head", "noscript", "form", "select"}
BLOCK_TAGS = {"p", "div", "li", "tr", "pre", "table", "ul", "ol", "dl", "dt", "dd", "br", "section"}
BLOCK_TAGS |= {"blockquote"}
HEADING_TAGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
MIN_CHARS = 400


class _TextOfHtml(HTMLParser):
    """Collects the visible text; keeps the line structure of <pre>."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipping: list[str] = []
        self.preformatted = 0

    def handle_starttag(self, tag: str, _attrs: list[tuple[str, str | None]]) -> None:
        """Open a tag: start skipping, or break the line."""
        if tag in SKIPPED_TAGS:
            self.skipping.append(tag)
        elif tag in HEADING_TAGS:
            self.parts.append("\n\n")
        elif tag in BLOCK_TAGS:
            self.parts.append("\n")
        if tag == "pre":
            self.preformatted += 1

    def handle_endtag(self, tag: str) -> None:
        """Close a tag: stop skipping, or break the line."""
        if tag in self.skipping:
            while self.skipping.pop() != tag:
                pass
        elif tag in HEADING_TAGS or tag in {"p", "pre", "table"}:
            self.parts.append("\n\n")
        elif tag in BLOCK_TAGS:
            self.parts.append("\n")
        if tag == "pre":
            self.preformatted = max(0, self.preformatted - 1)

    def handle_data(self, data: str) -> None:
        """Keep the text, with runs of space collapsed outside <pre>."""
        if not self.skipping:
            self.parts.append(data if self.preformatted else re.sub(r"\s+", " ", data))


def html_to_text(markup: str) -> str:
    """The visible text of an HTML page."""
    parser = _TextOfHtml()
    parser.feed(markup)
    parser.close()
    text = "".join(parser.parts)
    return re.sub(r"(?m)^ (?=\S)", "", text)


def read_text(path: Path) -> str:
    """A possibly gzipped file as text; UTF-8 first, Latin-1 as the fallback."""
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def clean(text: str) -> str:
    """Normalised Unicode and newlines, no trailing space, no form feeds, at most one blank line in a row."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n")
    text = text.replace("\u00a0", " ").replace("\ufeff", "").replace("\u00b6", "").replace("\x00", "")
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def rdb_documents(path: Path) -> Iterator[tuple[str, str]]:
    """Character vectors of an R lazy-load database, each as (title, text).

    Blocks are a big-endian length, a type byte ("2" or "Z") or nothing, and a zlib stream; they are found by
    walking the lengths. Strings are CHARSXP records: flags ending in type 9, a length, the bytes.
    """
    raw = path.read_bytes()
    start = raw.find(b"\x78", 4)
    while start >= 4 and start < len(raw):
        try:
            stream = zlib.decompressobj()
            data = stream.decompress(raw[start:])
        except zlib.error:
            start = raw.find(b"\x78", start + 1)
            continue
        lines = _r_strings(data)
        if len(lines) > 1000:
            yield next(line for line in lines if line.strip()), "\n".join(lines)
        start = raw.find(b"\x78", len(raw) - len(stream.unused_data))


def _r_strings(data: bytes) -> list[str]:
    """The strings of an XDR-serialised character vector."""
    position = data.find(b"\x00\x00\x00\x10")
    if position < 0:
        return []
    (count,) = struct.unpack(">i", data[position + 4 : position + 8])
    position += 8
    lines = []
    for _ in range(count):
        if position + 8 > len(data) or data[position + 3] != 9:
            break
        (length,) = struct.unpack(">i", data[position + 4 : position + 8])
        position += 8
        lines.append(data[position : position + max(length, 0)].decode("utf-8", "replace"))
        position += max(length, 0)
    return lines


def verse_documents(path: Path) -> Iterator[tuple[str, str]]:
    """Chapters' worth of verses from a generated Python module: its first triple-quoted string."""
    text = read_text(path).split('"""')[1].replace("[", "").replace("]", "")
    paragraphs = text.strip().split("\n")
    for number, start in enumerate(range(0, len(paragraphs), 60)):
        yield f"verses-{number:04d}", "\n".join(paragraphs[start : start + 60])


def documents(path: Path, name: str, form: str) -> Iterator[tuple[str, str]]:
    """(document name, clean text) for one file in the given form."""
    if form == "rdb":
        found: Iterator[tuple[str, str]] = rdb_documents(path)
    elif form == "verses":
        found = verse_documents(path)
    else:
        text = read_text(path)
        yield name, clean(html_to_text(text) if form == "html" else text)
        return
    for title, text in found:
        yield f"{name}#{title}", clean(text)


def drop_boilerplate(texts: list[str], share: float = 0.25, at_least: int = 20) -> list[str]:
    """Remove lines that occur in more than ``share`` of a source's documents (menus, page furniture)."""
    if len(texts) < at_least:
        return texts
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update({line.strip() for line in text.split("\n") if len(line.strip()) > 3})
    common = {line for line, count in counts.items() if count > share * len(texts)}
    return [clean("\n".join(line for line in t.split("\n") if line.strip() not in common)) for t in texts]


def usable(text: str) -> bool:
    """False for stubs and for machine-written tables."""
    if len(text) < MIN_CHARS:
        return False
    if max(map(len, text.split("\n"))) > 20000:
        return False
    letters = sum(c.isalpha() or c.isspace() for c in text[:20000])
    return letters / len(text[:20000]) > 0.6
