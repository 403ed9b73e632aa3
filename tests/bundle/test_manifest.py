"""manifest.json under attack: only a whole manifest whose parts fit together is read."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.bundle.manifest import (
    DENSE,
    FORMAT,
    MAX_MANIFEST_BYTES,
    STORE,
    FileEntry,
    Inputs,
    Manifest,
    Provenance,
    Tensor,
    read_manifest,
    safe_name,
    seal,
    validate_index,
)
from pocketmoe.bundle.store import ExpertId, Record
from pocketmoe.errors import DamagedFile
from tests import bundles

replace = msgspec.structs.replace
names = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=8)
numbers = st.integers(-(2**63), 2**63 - 1)


def complete(**changes: Any) -> Manifest:
    """The tiny bundle's manifest with its file list, but for `changes`."""
    listed = ["segment_00", "segment_01", "segment_02", "expert_0"]
    files = {name: FileEntry(nbytes=128, sha256="0" * 64) for name in [STORE, DENSE]}
    files |= {f"graphs/{name}.onnx": FileEntry(nbytes=1, sha256="0" * 64) for name in listed}
    return replace(bundles.manifest(files=files), **changes)


def sealed(path: Path, text: bytes) -> Path:
    """Write a manifest of the attacker's choice under a right seal; `text` begins after the seal's field."""
    start, zeros = b'{\n  "sha256": "', b"0" * 64
    digest = hashlib.sha256(start + zeros + text).hexdigest().encode()
    path.write_bytes(start + digest + text)
    return path


def written(path: Path, **changes: Any) -> Path:
    path.write_bytes(seal(complete(**changes)))
    return path


@given(
    notes=st.lists(names, max_size=3),
    source=names,
    steps=st.lists(names, max_size=3),
    versions=st.dictionaries(names, names, max_size=3),
    tokens=st.lists(numbers, max_size=3),
    entry=st.tuples(numbers, names),
)
@settings(max_examples=100, deadline=None)
def test_any_values_come_back(
    notes: list[str],
    source: str,
    steps: list[str],
    versions: dict[str, str],
    tokens: list[int],
    entry: tuple[int, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Whatever texts and numbers a manifest holds, reading gives back what was sealed."""
    whole = complete(
        notes=tuple(notes),
        provenance=Provenance(source=source, steps=tuple(steps), tools=versions),
        model=replace(bundles.manifest().model, eos_token_ids=tuple(tokens)),
    )
    whole.files["MODEL_CARD.md"] = FileEntry(nbytes=entry[0], sha256=entry[1])
    path = tmp_path_factory.getbasetemp() / "manifest.json"
    path.write_bytes(seal(whole))
    assert replace(read_manifest(path), sha256=whole.sha256) == whole


def test_any_changed_byte_is_found(tmp_path: Path) -> None:
    """Every byte of manifest.json counts, the seal's own digits included, and so does its length."""
    path = written(tmp_path / "manifest.json")
    whole = path.read_bytes()
    places = [*range(100), *range(100, len(whole), 11)]
    changed = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in places]
    changed += [whole[:i] for i in range(0, len(whole), 97)] + [whole + b" "]
    for data in changed:
        path.write_bytes(data)
        with pytest.raises(DamagedFile, match=r"manifest\.json: does not match its own hash"):
            read_manifest(path)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "a/../../x",
        "a/..",
        "..",
        ".",
        "",
        "./a",
        "a//b",
        "a/",
        "a\\b",
        "a\0b",
        "a\nb",
        "\x1b[2Ja",
    ],
)
def test_a_name_that_leaves_the_bundle_is_refused(tmp_path: Path, name: str) -> None:
    """A file name is relative, canonical, stays inside, and prints as it is."""
    path = written(tmp_path / "manifest.json", files={**complete().files, name: FileEntry(nbytes=1, sha256="")})
    with pytest.raises(DamagedFile, match=r"outside the bundle|control characters"):
        read_manifest(path)


@given(name=st.text(st.sampled_from("./\\ab"), max_size=8))
@settings(max_examples=200)
def test_a_safe_name_stays_inside(name: str) -> None:
    """A name that passes, joined to a directory, is that path and lies below it."""
    try:
        safe_name(Path("manifest.json"), name)
    except DamagedFile:
        return
    assert os.path.normpath(f"/bundle/{name}") == f"/bundle/{name}"


kind = bundles.manifest().expert_kinds[0]
layer = bundles.manifest().moe_layers[0]
state = bundles.manifest().states[0]
segments = bundles.manifest().segments
dense = bundles.manifest().dense[0]


def tensor(**changes: Any) -> Tensor:
    return replace(Tensor(name="w", dtype="float32", shape=(4,), offset=0, nbytes=16), **changes)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"segments": segments[:2]}, "one segment more"),
        ({"moe_layers": (replace(layer, top_k=3), layer)}, "3 of 2 experts"),
        ({"moe_layers": (replace(layer, top_k=0), layer)}, "top_k|>= 1"),
        ({"model": replace(bundles.manifest().model, hidden_size=2**40)}, "hidden_size"),
        ({"notes": ("clears the screen: \x1b[2J",)}, "control characters"),
        ({"provenance": Provenance(source="x", tools={"\x9b2J": ""})}, "control characters"),
        ({"moe_layers": (replace(layer, router="graphs/none.onnx"), layer)}, "lists no file 'graphs/none.onnx'"),
        ({"segments": (replace(segments[0], graph="../x.onnx"), *segments[1:])}, "lists no file '../x.onnx'"),
        ({"expert_kinds": (replace(kind, graph="/x.onnx"),)}, "lists no file '/x.onnx'"),
        ({"files": {}}, "lists no file"),
        ({"expert_kinds": (replace(kind, graph=STORE),)}, "has a graph outside"),
        ({"segments": (replace(segments[0], inputs=("mystery",)), *segments[1:])}, "reads 'mystery'"),
        ({"segments": (segments[0], replace(segments[1], inputs=("y1",)), segments[2])}, "reads 'y1'"),
        ({"moe_layers": (layer, replace(layer, x="nowhere"))}, "MoE layer 1 reads 'nowhere'"),
        ({"logits": "nothing"}, "reads 'nothing'"),
        ({"states": (replace(state, output="nothing"),)}, "reads 'nothing'"),
        ({"states": (replace(state, shape=(1, 2, -1, -1)),)}, "impossible shape"),
        ({"states": (replace(state, growing_axis=7),)}, "impossible shape"),
        ({"states": (replace(state, shape=(1, 2, -1, 4), with_room=True),)}, "impossible shape"),
        ({"states": (replace(state, shape=(1, 1, 2, 4), growing_axis=None, with_room=True),)}, "impossible shape"),
        ({"states": (replace(state, shape=(1, 1, -1, 4), with_room=True, in_place=True),)}, "impossible shape"),
        ({"states": (replace(state, shape=(1, 2, 3, 4)),)}, "impossible shape"),
        ({"states": (replace(state, dtype="object"),)}, "impossible shape"),
        ({"dense": (replace(dense, offset=1),)}, "end at byte 129 of 128"),
        ({"dense": (replace(dense, offset=-128),)}, "impossible place"),
        ({"dense": (dense, replace(dense, name="again", offset=64))}, "impossible place"),
        ({"dense": (replace(dense, offset=2**62),)}, "of 128"),
        ({"dense": (replace(dense, shape=(2**40, 2**40)),)}, "cannot be"),
        ({"dense": (replace(dense, shape=(1,) * 100_000),)}, "cannot be"),
        ({"expert_kinds": (replace(kind, tensors=(tensor(dtype="V16", shape=(1,)),)),)}, "cannot be 'V16'"),
        ({"expert_kinds": (replace(kind, tensors=(tensor(shape=(-1, -4)),)),)}, "impossible place"),
        ({"expert_kinds": (replace(kind, tensors=(tensor(nbytes=-16),)),)}, "impossible place"),
        ({"expert_kinds": (replace(kind, tensors=(tensor(), tensor(name="v", offset=15))),)}, "impossible place"),
        ({"expert_kinds": (replace(kind, nbytes=8, tensors=(tensor(),)),)}, "end at byte 16 of 8"),
        (
            {
                "segments": (
                    segments[0],
                    msgspec.structs.replace(segments[1], inputs=("y0", "y0")),
                    segments[2],
                )
            },
            "reads or makes a value twice",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    """A sealed manifest with an impossible place, shape, count or name is refused, and says which."""
    path = written(tmp_path / "manifest.json", **changes)
    with pytest.raises(DamagedFile, match=complaint):
        read_manifest(path)


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, item in items for found in places(item, (*place, key)))]


JSON = msgspec.to_builtins(complete())
NASTY = [
    None,
    True,
    -1,
    0,
    2**31,
    2**64,
    -(2**63),
    1e300,
    "",
    "..",
    "\0",
    "a" * 5000,
    [],
    [None],
    [2**62] * 9,
    {},
    {"a": 1},
]


@given(place=st.sampled_from([place for place in places(JSON) if place]), value=st.sampled_from(NASTY))
@settings(max_examples=300, deadline=None)
def test_any_value_anywhere_is_read_or_refused(
    place: tuple[Any, ...], value: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever a forger puts in the place of any value, reading ends in a manifest or in DamagedFile."""
    forged = inner = msgspec.json.decode(msgspec.json.encode(JSON))
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    forged.pop("sha256", None)
    path = tmp_path_factory.getbasetemp() / "forged.json"
    with contextlib.suppress(DamagedFile):
        read_manifest(sealed(path, b'", ' + msgspec.json.encode(forged)[1:]))


def test_packed_four_bit_tensors_have_half_a_byte_per_item(tmp_path: Path) -> None:
    """int4 and uint4 tensors are stored two to a byte, rounded up."""
    four_bit = tensor(dtype="uint4", shape=(3, 3), nbytes=5)
    read_manifest(written(tmp_path / "manifest.json", expert_kinds=(replace(kind, tensors=(four_bit,)),)))


def test_another_format_says_so_even_with_unknown_fields(tmp_path: Path) -> None:
    """A newer bundle is told apart from a damaged one, and the remedy is another version."""
    path = sealed(tmp_path / "manifest.json", b'", "format": 7, "novelty": [1, {}]}')
    with pytest.raises(DamagedFile, match=f"has format 7, this version reads {FORMAT}") as caught:
        read_manifest(path)
    assert "version" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (seal(complete())[79:].replace(b'"notes"', b'"nodes"'), "unknown field `nodes`"),
        (seal(complete())[79:].replace(b'"top_k": 1', b'"top_k": "1"'), r"top_k|int"),
        (seal(complete())[79:].replace(b'"logits": "logits",', b""), "logits"),
        (b'", "format": 1, "deep": ' + b"[" * 10**5, ""),
        (b'", "format": 1, "notes": ["\xff"]}', ""),
        (b'", "format": null}', "null"),
        (b'"', ""),
    ],
    ids=["unknown field", "wrong type", "missing field", "deep", "not UTF-8", "no format", "cut"],
)
def test_a_sealed_manifest_of_another_shape_is_refused(tmp_path: Path, text: bytes, complaint: str) -> None:
    """A right seal proves nothing about the content: fields and types are checked, in words that name the file."""
    with pytest.raises(DamagedFile, match=rf"manifest\.json: cannot be read.*{complaint}"):
        read_manifest(sealed(tmp_path / "manifest.json", text))


def test_a_huge_or_missing_manifest_is_refused_unread(tmp_path: Path) -> None:
    """A sparse file of gigabytes costs no memory; no file at all is an error of ours."""
    path = tmp_path / "manifest.json"
    with pytest.raises(DamagedFile, match="cannot be read"):
        read_manifest(path)
    with open(path, "wb") as file:
        file.truncate(MAX_MANIFEST_BYTES * 64)
    with pytest.raises(DamagedFile, match="more than"):
        read_manifest(path)


def test_every_expert_has_its_record_and_no_other_expert_has_one() -> None:
    """A store must hold the model's experts: none missing, none extra, each of its kind's size."""
    whole = complete()
    nbytes = whole.expert_kinds[0].nbytes
    records = {
        ExpertId(i, j): Record(i, j, 0, 0, nbytes, "")
        for i, moe in enumerate(whole.moe_layers)
        for j in range(moe.n_experts)
    }
    validate_index(whole, records, Path(STORE))
    first = ExpertId(0, 0)
    for wrong, complaint in [
        ({key: record for key, record in records.items() if key != first}, "no record of layer 0, expert 0"),
        (records | {ExpertId(9, 0): Record(9, 0, 0, 0, nbytes, "")}, "does not have"),
        (records | {first: Record(0, 0, 1, 0, nbytes, "")}, "wrong kind"),
        (records | {first: Record(0, 0, 0, 0, nbytes + 1, "")}, "wrong kind"),
    ]:
        with pytest.raises(DamagedFile, match=complaint):
            validate_index(whole, wrong, Path(STORE))
    many = replace(whole, moe_layers=(replace(layer, n_experts=2**31 - 1), layer))
    with pytest.raises(DamagedFile, match="no record of layer 0, expert 2"):
        validate_index(many, records, Path(STORE))


def test_defaults_fill_in_what_an_older_writer_left_out() -> None:
    """Fields added later carry defaults, so that an older bundle stays readable."""
    assert msgspec.json.decode(b"{}", type=Inputs) == Inputs()
