"""What an export reads of a checkpoint: its own files and its hub cache's, and a model card within bounds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.errors import BadInput, DamagedFile
from pocketmoe.export.checkpoint import front_matter
from pocketmoe.export.checkpoint.checkpoint import Checkpoint
from pocketmoe.export.convert import export_checkpoint
from pocketmoe.export.tensors.directory import Directory
from pocketmoe.export.tensors.shards import SINGLE

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers loading the tiny models

READ = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md", SINGLE]


@pytest.fixture
def root(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint("olmoe"), tmp_path / "checkpoint"))


@pytest.mark.parametrize("name", [*READ, "chat_template.jinja", "merges.txt", "spiece.model", "hf_quant_config.json"])
def test_links_out_of_a_checkpoint_are_not_followed(name: str, root: Path, tmp_path: Path) -> None:
    """A bundle is published, with what was copied into it."""
    secret = tmp_path / "token"
    shutil.copy(root / name, secret) if (root / name).exists() else secret.write_text("{}")
    (root / name).unlink(missing_ok=True)
    (root / name).symlink_to(secret)
    with pytest.raises(BadInput, match="outside of the checkpoint") as caught:
        export_checkpoint(root, tmp_path / "bundle")
    assert name in str(caught.value)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "bundle").exists()


def test_links_of_other_kinds(root: Path, tmp_path: Path) -> None:
    """Through a directory, in a chain, by a path with dots, to a directory: all that is asked is where they end."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.json").write_text("{}")
    (root / "folder").symlink_to(outside)
    for target in ("folder/a.json", "../outside/a.json", "../checkpoint/../outside/a.json", "chain", outside):
        (root / "x.json").unlink(missing_ok=True)
        (root / "x.json").symlink_to(target)
        (root / "chain").unlink(missing_ok=True)
        (root / "chain").symlink_to(outside / "a.json")
        with pytest.raises(BadInput, match="outside of the checkpoint"):
            Directory(root).check()
    (root / "x.json").unlink()
    (root / "additional_chat_templates").symlink_to(outside)
    with pytest.raises(BadInput, match="additional_chat_templates"):
        Directory(root).check()


def test_links_within_a_checkpoint_and_a_hub_cache(root: Path, tmp_path: Path) -> None:
    """models--ORG--NAME/snapshots/COMMIT/FILE is a link to ../../blobs/HASH; to no other repository's."""
    blobs = tmp_path / "models--someone--tiny/blobs"
    snapshot = tmp_path / "models--someone--tiny/snapshots/0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for n, path in enumerate(sorted(root.iterdir())):
        shutil.copy(path, blobs / str(n))
        (snapshot / path.name).symlink_to(f"../../blobs/{n}")
    (snapshot / "again.json").symlink_to("config.json")
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    for way in (snapshot, link):
        checkpoint = Checkpoint(way)
        assert len(checkpoint.keys) == len(Checkpoint(root).keys)
        assert checkpoint.file("config.json") == way / "config.json"
        assert checkpoint.card_data["license"] == "apache-2.0"
    other = tmp_path / "models--someone--else/blobs"
    other.mkdir(parents=True)
    (other / "x").write_text("{}")
    (snapshot / "again.json").unlink()
    (snapshot / "again.json").symlink_to("../../../models--someone--else/blobs/x")
    with pytest.raises(BadInput, match="outside of the checkpoint"):
        Checkpoint(snapshot)


def test_what_is_no_regular_file_is_not_read(root: Path) -> None:
    for name in ("README.md", "config.json", SINGLE, "extra.json"):
        kept = (root / name).read_bytes() if (root / name).exists() else None
        (root / name).unlink(missing_ok=True)
        os.mkfifo(root / name)
        with pytest.raises(BadInput, match="not a regular file"):
            Checkpoint(root)
        (root / name).unlink()
        (root / name).mkdir()
        with pytest.raises(BadInput, match="not a regular file"):
            Checkpoint(root)
        (root / name).rmdir()
        (root / name).symlink_to("/dev/zero")
        with pytest.raises(BadInput, match="outside"):
            Checkpoint(root)
        (root / name).unlink()
        (root / name).symlink_to("nowhere")
        with pytest.raises(DamagedFile, match="leads nowhere"):
            Checkpoint(root)
        (root / name).unlink()
        if kept is not None:
            (root / name).write_bytes(kept)


def test_a_text_of_a_terabyte_is_not_read(root: Path) -> None:
    with open(root / "tokenizer.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadInput, match="more than any file of its kind"):
        Checkpoint(root)


def card(directory: Path, metadata: str, text: str = "# A\n") -> front_matter.ModelCard:
    (directory / "README.md").write_text(f"---\n{metadata}\n---\n{text}", encoding="utf-8")
    return front_matter.read_card(Directory(directory))


def test_what_a_bundle_states_of_a_card(tmp_path: Path) -> None:
    read = card(
        tmp_path,
        "license: other\nlicense_name: 'Some: licence'\nlicense_link: null\nbase_model:\n- a/b\n- c/d\n"
        "datasets: [x/y, ~, z]\nversion: 1.10\n2024-01-02: date\nmodel-index:\n- name: n\n  results:\n  - a: 1\n"
        "last: z",
    )
    assert read.note == ""
    assert read.text == "# A\n"
    assert read.data == {
        "license": "other",
        "license_name": "Some: licence",
        "license_link": None,
        "base_model": ["a/b", "c/d"],
        "datasets": ["x/y", None, "z"],
        "version": "1.10",
        "2024-01-02": "date",
        "model-index": [],
        "last": "z",
    }


BOMB = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))])


@pytest.mark.parametrize(
    "metadata",
    [
        BOMB,
        "a: &a [*a]",
        "license: [" + "[" * 1_000,
        "a:\n" + "\n".join(" " * n + "- " for n in range(1_000)),
        "{" * 100_000,
        "license: \x00",
        "license: 'open",
        "a: b: c",
        "- " * 50_000,
        "x: " + "y, " * 400_000,
        "\n".join(f"k{n}: v" for n in range(60_000)),
        "!!python/object/apply:os.system [id]: {",
    ],
)  # fmt: skip
def test_hostile_cards_lose_their_metadata_and_stop_nothing(metadata: str, tmp_path: Path) -> None:
    """No object is made, so neither memory nor time grows with what a card would come to."""
    read = card(tmp_path, metadata)
    assert read.data == {}
    assert read.note.startswith("the metadata of README.md is left out: it ")
    assert read.text == "# A\n"


@pytest.mark.parametrize(
    "value", ["2024-99-99", "!!int abc", "!!float x", "!!bool maybe", "!!timestamp x", "9" * 10_000]
)
def test_values_that_are_none_of_their_kind_are_text(value: str, tmp_path: Path) -> None:
    assert card(tmp_path, f"license: {value}").data == {"license": value.rpartition(" ")[2]}


@settings(max_examples=200, deadline=None)
@given(metadata=st.text(alphabet="ab:-[]{}&*!'\"|>?,%@~ \n\t#1", max_size=60))
def test_no_card_raises(metadata: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    read = card(tmp_path_factory.getbasetemp(), metadata)
    assert all(isinstance(key, str) for key in read.data)


def test_a_long_card_is_cut(tmp_path: Path) -> None:
    read = card(tmp_path, "license: mit", "x" * (5 << 20))
    assert len(read.text) < front_matter.MOST_TEXT
    assert "longer than 4 MiB" in read.note
