"""Traces: what is written is what was routed, nothing is left of a run that failed, and hostile files are refused."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.bundle.manifest import MoeLayer
from pocketmoe.errors import DamagedFile, OutputError
from pocketmoe.runtime.trace import PoolInfo, TraceInfo, TraceWriter, info_path, read_trace

TOP_K, EXPERTS = (2, 3, 1), (4, 9, 300)


def layers() -> list[MoeLayer]:
    return [
        MoeLayer(n_experts=n, top_k=k, x="x", expert_ids="i", expert_weights="w", output="y")
        for n, k in zip(EXPERTS, TOP_K, strict=True)
    ]


def described(**changes: object) -> TraceInfo:
    whole = TraceInfo(
        sha256="",
        architecture="TinyMoe",
        bundle_sha256="0" * 64,
        experts=EXPERTS,
        prompt_walks=(),
        pools=(PoolInfo(read_bytes=100, slot_bytes=120, slots=5),),
        fixed_bytes=1000,
        loading_bytes=300,
    )
    return msgspec.structs.replace(whole, **changes)


def routes(tokens: int, seed: int = 0) -> list[np.ndarray]:
    """For each layer int64 [tokens, top_k], distinct within a token."""
    rng = np.random.default_rng(seed)
    return [np.argsort(rng.random((tokens, n)), axis=1)[:, :k] for n, k in zip(EXPERTS, TOP_K, strict=True)]


def record(path: Path, walks: list[int], prompt: int = 0, chunk: int = 4, **changes: object) -> list[np.ndarray]:
    """Record random routes of these walks, which come in chunks; return them whole."""
    whole = routes(sum(walks))
    start = 0
    with TraceWriter(path, layers(), prompt) as writer:
        for length in walks:
            for layer, ids in enumerate(whole):
                for at in range(start, start + length, chunk):
                    writer(layer, ids[at : min(at + chunk, start + length)])
            start += length
        writer.publish(described(**changes))
    return whole


@settings(max_examples=25, deadline=None)
@given(prompt=st.lists(st.integers(1, 9), min_size=1, max_size=3), answer=st.integers(0, 12))
def test_what_is_read_is_what_was_routed(
    tmp_path_factory: pytest.TempPathFactory, prompt: list[int], answer: int
) -> None:
    """Ids by token, layer and place, -1 where a layer has fewer; the prompt's walks; any NumPy can read the array."""
    path = tmp_path_factory.mktemp("trace") / "t.npy"
    whole = record(path, [*prompt, *[1] * answer], prompt=sum(prompt))
    trace = read_trace(path)
    assert trace.experts == EXPERTS
    assert trace.prompt_walks == tuple(prompt)
    for layer, ids in enumerate(whole):
        assert np.array_equal(trace.ids[:, layer, : TOP_K[layer]], ids)
        assert (trace.ids[:, layer, TOP_K[layer] :] == -1).all()
    plain = np.load(path, allow_pickle=False)
    assert plain.dtype == np.int16
    assert np.array_equal(plain, trace.ids)
    assert sorted(p.name for p in path.parent.iterdir()) == ["t.npy", "t.npy.json"]
    assert path.stat().st_mode & 0o77 == 0, "the text is nobody else's business"


def test_a_run_that_fails_leaves_the_trace_before_it(tmp_path: Path) -> None:
    """Without `publish` there is no new file, and an old trace stays as it was."""
    path = tmp_path / "t.npy"
    record(path, [3, 1], prompt=3)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with TraceWriter(path, layers(), 2) as writer:
        for layer, ids in enumerate(routes(2)):
            writer(layer, ids)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    record(path, [4])
    assert len(read_trace(path).ids) == 4


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    """A directory, and a file in a directory that is not there."""
    for place in (tmp_path, tmp_path / "none" / "t.npy"):
        with pytest.raises(OutputError, match=place.name):
            TraceWriter(place, layers(), 1)
    assert not list(tmp_path.iterdir())


def test_an_array_alone_is_a_trace(tmp_path: Path) -> None:
    """Without the .json every layer has the experts up to the highest seen, and there is no prompt."""
    path = tmp_path / "t.npy"
    np.save(path, np.array([[[1, 0], [5, 2]]], np.int64))
    trace = read_trace(path)
    assert trace.experts == (6, 6)
    assert trace.prompt_walks == ()
    assert trace.info is None


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(text: str) -> bytes:
    data = text.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(data).to_bytes(2, "little") + data


GOOD = np.array([[[0, 1]], [[2, 0]]], np.int16)
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "text": b"no array",
    "zip": b"PK\x03\x04" + bytes(64),
    "version 3": b"\x93NUMPY\x03\x00" + npy(GOOD)[8:],
    "cut short": npy(GOOD)[:-1],
    "longer": npy(GOOD) + b"\0",
    "floats": npy(GOOD.astype(np.float32)),
    "two axes": npy(GOOD[0]),
    "no tokens": npy(GOOD[:0]),
    "other order": npy(np.asfortranarray(np.arange(24, dtype=np.int16).reshape(2, 3, 4))),
    "exabytes": header("{'descr': '<i2', 'fortran_order': False, 'shape': (2147483647, 2147483647, 2147483647)}"),
    "negative axis": header("{'descr': '<i2', 'fortran_order': False, 'shape': (-1, 1, 2)}"),
    "code": header("{'descr': '<i2', 'fortran_order': False, 'shape': __import__('os').getpid()}"),
    "nested": header("(" * 9000),
    "old python": header("{'descr': '<i2', 'fortran_order': False, 'shape': (2L, 1L, 2L)}") + GOOD.tobytes(),
    "records": header("{'descr': [('a', '<i2')], 'fortran_order': False, 'shape': (2, 1, 2)}") + GOOD.tobytes(),
    "below -1": npy(np.array([[[0, -2]]], np.int16)),
    "twice": npy(np.array([[[3, 3]]], np.int16)),
    "nothing": npy(np.array([[[-1, -1]]], np.int16)),
    "now and then": npy(np.array([[[0, 1]], [[0, -1]]], np.int16)),
    "beyond int16": npy(np.array([[[40000, 1]]], np.int32)),
    "beyond int64": npy(np.array([[[2**63, 1]]], np.uint64)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_trace_is_refused(tmp_path: Path, kind: str) -> None:
    """One line that names the file, and nothing is allocated, run or guessed."""
    path = tmp_path / "t.npy"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(DamagedFile, match=r"t\.npy") as refused:
        read_trace(path)
    assert refused.value.exit_code == 3
    assert "--trace" in refused.value.one_line()


class Payload:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (os.environ["POCKETMOE_TEST_PWNED"],)


def test_a_pickle_is_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array of objects, whose loading would run code, is refused for its dtype."""
    pwned = tmp_path / "pwned"
    monkeypatch.setenv("POCKETMOE_TEST_PWNED", str(pwned))
    path = tmp_path / "t.npy"
    np.save(path, np.array([[[Payload()]]], object), allow_pickle=True)
    with pytest.raises(DamagedFile, match="no array of integers"):
        read_trace(path)
    assert not pwned.exists()


BROKEN_INFO: dict[str, Callable[[dict], object]] = {
    "another trace": lambda info: info | {"sha256": "0" * 64},
    "layers": lambda info: info | {"experts": [4, 9]},
    "experts": lambda info: info | {"experts": [4, 9, 7]},
    "no experts": lambda info: info | {"experts": [0, 9, 300]},
    "many experts": lambda info: info | {"experts": [4, 9, 1 << 30]},
    "prompt": lambda info: info | {"prompt_walks": [2, 1 << 30]},
    "no pools": lambda info: info | {"pools": []},
    "pool": lambda info: info | {"pool_of": [[0] * 4, [0] * 9, [1] * 300]},
    "empty pool": lambda info: info | {"pools": info["pools"] * 2},
    "first pool empty": lambda info: info | {"pools": info["pools"] * 2, "pool_of": [[1] * n for n in EXPERTS]},
    "pools of a layer": lambda info: info | {"pool_of": [[0] * 4, [0] * 9, [0] * 299]},
    "bytes": lambda info: info | {"fixed_bytes": -1},
    "unknown field": lambda info: info | {"code": "x"},
    "format": lambda info: info | {"format": 2},
    "terminal": lambda info: info | {"architecture": "\x1b[2J"},
    "list": lambda info: [info],
}


@pytest.mark.parametrize("kind", BROKEN_INFO)
def test_a_description_that_does_not_fit_is_refused(tmp_path: Path, kind: str) -> None:
    """A .json that is another trace's, contradicts the array or itself, or is not one."""
    path = tmp_path / "t.npy"
    record(path, [2, 1, 1], prompt=2)
    good = json.loads(info_path(path).read_bytes())
    info_path(path).write_text(json.dumps(BROKEN_INFO[kind](good)))
    with pytest.raises(DamagedFile, match=r"t\.npy"):
        read_trace(path)
    for junk in (b"", b"\xff", b"[" * 100_000):
        info_path(path).write_bytes(junk)
        with pytest.raises(DamagedFile, match=r"t\.npy\.json"):
            read_trace(path)
