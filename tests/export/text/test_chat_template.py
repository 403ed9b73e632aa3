"""Chat templates of a checkpoint: found where transformers finds them, refused in one line, tried when exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pocketmoe.errors import BadInput
from pocketmoe.export.text import chat_template
from tests.tiny import save_tokenizer

CONFIG = "tokenizer_config.json"


def settings(root: Path, value: Any) -> None:
    (root / CONFIG).write_text(json.dumps({"chat_template": value}))


def files(root: Path, named: dict[str, str]) -> None:
    for name, text in named.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


PLACES: list[tuple[Any, dict[str, str]]] = [
    ("in the settings", {}),
    ([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}], {}),
    ([{"name": "rag", "template": "r"}], {}),
    (None, {"chat_template.jinja": "file\r\nof two lines"}),
    ("in the settings", {"chat_template.jinja": "the file wins"}),
    ([{"name": "rag", "template": "r"}], {"chat_template.jinja": "the file wins alone"}),
    ("lost", {"additional_chat_templates/tool_use.jinja": "t"}),
    (None, {"chat_template.jinja": "d", "additional_chat_templates/x.y.jinja": "r"}),
    (None, {}),
]  # fmt: skip


@pytest.mark.parametrize(("value", "named"), PLACES)
def test_templates_are_found_where_transformers_finds_them(tmp_path: Path, value: Any, named: dict[str, str]) -> None:
    """The same templates by the same names."""
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config if value is None else {**config, "chat_template": value}))
    files(tmp_path, named)
    theirs = AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert chat_template.find(tmp_path) == ({"default": theirs} if isinstance(theirs, str) else theirs or {})


DEEP = "[" * 5000 + "]" * 5000
BAD: list[Any] = [
    5, [5], [{}], [{"name": "a"}], [{"template": "a"}], [{"name": [], "template": "a"}], [{"name": "a", "template": 5}],
    [["a"]], {"default": 5}, True, "\ud800", [{"name": "../x", "template": "a"}], [{"name": "", "template": "a"}],
    [{"name": "a" * 100, "template": "a"}], [{"name": f"n{i}", "template": "a"} for i in range(40)], "x" * 300_000,
]  # fmt: skip


@pytest.mark.parametrize("value", BAD, ids=lambda value: str(value)[:30].encode("ascii", "replace").decode())
def test_what_is_no_template_is_one_line(tmp_path: Path, value: Any) -> None:
    """Wrong types, names that are paths, half characters, too many and too large ones."""
    settings(tmp_path, value)
    with pytest.raises(BadInput) as refused:
        chat_template.find(tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert len(refused.value.one_line()) < 300


@pytest.mark.parametrize("data", [b"\xff", b"{", b"[]", DEEP.encode(), b'{"chat_template": ' + DEEP.encode() + b"}"])
def test_settings_that_cannot_be_read_are_one_line(tmp_path: Path, data: bytes) -> None:
    """Not UTF-8, not JSON, no object, nested deep."""
    (tmp_path / CONFIG).write_bytes(data)
    with pytest.raises(BadInput, match=CONFIG):
        chat_template.find(tmp_path)


def test_a_template_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    """The file is named."""
    (tmp_path / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(BadInput, match=r"chat_template\.jinja: is not UTF-8 \(byte 3\)"):
        chat_template.find(tmp_path)


def test_a_link_to_outside_is_refused(tmp_path: Path) -> None:
    """A template must not bring somebody's own files into a bundle; the hub's cache and links inside may."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    root = tmp_path / "models--a--b" / "snapshots" / ("0" * 8)
    root.mkdir(parents=True)
    (root / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(BadInput, match="link to outside"):
        chat_template.find(root)
    (root / "chat_template.jinja").unlink()
    blobs = root.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "1").write_text("fine")
    (root / "chat_template.jinja").symlink_to("../../blobs/1")
    assert chat_template.find(root) == {"default": "fine"}


@pytest.mark.parametrize(
    ("template", "noted"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", []),
        ("{{ messages[0].content.nothing.more }}", ["a user's message"]),
        ("{{ 'a' * 10 ** 10 }}", ["more than", "--raw"]),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no\x1b[2J') }}{% endif %}x", ["a system message"]),
        ("{% if tools %}{{ 1 / 0 }}{% endif %}x", ["tools", "ZeroDivisionError"]),
        ("{% if x %}", ["a user's message"]),
        ("", ["no text"]),
    ],
)
def test_a_template_that_cannot_work_is_said(tmp_path: Path, template: str, noted: list[str]) -> None:
    """One note, without control characters, that says for what the template fails."""
    settings(tmp_path, template)
    target = tmp_path / "tokenizer"
    target.mkdir()
    chat_template.write(tmp_path, target)
    assert (target / "chat_template.jinja").read_text() == template
    notes = [*chat_template.remarks(tmp_path, target)]
    assert len(notes) == bool(noted)
    assert all(words in notes[0] for words in noted)
    assert all(note.isprintable() for note in notes)


def test_all_templates_are_in_the_bundle(tmp_path: Path) -> None:
    """By the names of transformers' files; without a default the user is told."""
    settings(tmp_path, [{"name": "tool_use", "template": "t"}, {"name": "rag", "template": "r"}])
    target = tmp_path / "tokenizer"
    target.mkdir()
    chat_template.write(tmp_path, target)
    folder = target / "additional_chat_templates"
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"tool_use.jinja": "t", "rag.jinja": "r"}
    assert ["no default" in note for note in chat_template.remarks(tmp_path, target)] == [True]
