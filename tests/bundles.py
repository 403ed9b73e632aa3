"""The smallest whole bundle: two MoE layers of random bytes, and graphs that nobody runs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec

from pocketmoe.bundle.manifest import (
    DENSE,
    MANIFEST,
    STORE,
    DenseTensor,
    ExpertKind,
    Inputs,
    Manifest,
    Model,
    MoeLayer,
    Provenance,
    Segment,
    State,
    Tensor,
    read_manifest,
    seal,
)
from pocketmoe.bundle.progress import OnStep, no_step
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId, StoreWriter
from pocketmoe.bundle.writer import BundleWriter

RECORD_BYTES = 4100  # two pages, the second of them mostly padding
LAYERS, EXPERTS = 2, 2


def record_of(expert: ExpertId, seed: int = 0) -> bytes:
    """The bytes that `write_bundle` gives an expert."""
    block = hashlib.sha256(f"{seed} {expert}".encode()).digest()
    return (block * -(-RECORD_BYTES // len(block)))[:RECORD_BYTES]


def manifest(store_index_sha256: str = "0" * 64, **changes: Any) -> Manifest:
    """A manifest in which everything fits together, but for `changes`."""
    layers = [
        MoeLayer(n_experts=EXPERTS, top_k=1, x=f"x{i}", expert_ids=f"ids{i}", expert_weights=f"w{i}", output=f"y{i}")
        for i in range(LAYERS)
    ]
    whole = Manifest(
        model=Model(
            architecture="TinyMoe",
            model_type="tiny",
            hidden_size=4,
            vocab_size=8,
            context_length=16,
            n_parameters=100,
        ),
        inputs=Inputs(),
        logits="logits",
        segments=(
            Segment(graph="graphs/segment_00.onnx", inputs=("input_ids", "past"), outputs=("x0", "ids0", "w0")),
            Segment(graph="graphs/segment_01.onnx", inputs=("y0",), outputs=("x1", "ids1", "w1")),
            Segment(graph="graphs/segment_02.onnx", inputs=("y1",), outputs=("logits", "present")),
        ),
        moe_layers=tuple(layers),
        expert_kinds=(
            ExpertKind(
                graph="graphs/expert_0.onnx",
                input="x",
                output="y",
                tensors=(Tensor(name="w", dtype="float32", shape=(1025,), offset=0, nbytes=RECORD_BYTES),),
                nbytes=RECORD_BYTES,
            ),
        ),
        states=(State(input="past", output="present", dtype="float32", shape=(1, 2, -1, 4), growing_axis=2),),
        dense=(DenseTensor(name="embed", role="embedding", dtype="float32", shape=(8, 4), offset=0, nbytes=128),),
        store_index_sha256=store_index_sha256,
        provenance=Provenance(source="made by hand"),
    )
    return msgspec.structs.replace(whole, **changes)


def fill(writer: BundleWriter, seed: int = 0, experts: bool = True) -> Manifest:
    """Write every file of a bundle but the manifest, which is returned; the experts too, unless told otherwise."""
    for name in ("segment_00", "segment_01", "segment_02", "expert_0"):
        (writer.root / f"graphs/{name}.onnx").write_bytes(f"{name} of {seed}".encode())
    (writer.root / DENSE).write_bytes(bytes([seed % 256]) * 128)
    (writer.root / "tokenizer").mkdir()
    (writer.root / "tokenizer/tokenizer.json").write_text("{}")
    if not experts:
        return manifest()
    with StoreWriter(writer.root / STORE) as store:
        for expert in (ExpertId(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)):
            store.append(expert, 0, record_of(expert, seed))
        return manifest(store.close())


def write_bundle(target: Path, seed: int = 0, on_step: OnStep = no_step) -> Bundle:
    """Publish a bundle whose every byte depends on `seed`."""
    with BundleWriter(target, on_step=on_step) as writer:
        return writer.publish(fill(writer, seed))


def write_runnable(target: Path, n_experts: int = EXPERTS) -> Bundle:
    """A bundle whose experts are the probe's, each with weights of its own, and whose other graphs nobody runs."""
    from pocketmoe.runtime.backends import probe

    nbytes = len(probe.probe_record(0))
    with BundleWriter(target) as writer:
        whole = fill(writer)
        (writer.root / "graphs/expert_0.onnx").write_bytes(probe.GRAPH.read_bytes())
        with StoreWriter(writer.root / STORE) as store:
            for number in range(LAYERS * n_experts):
                expert = ExpertId(number // n_experts, number % n_experts)
                store.append(expert, 0, probe.probe_record(number))
            index = store.close()
        tensors = (Tensor(name="w", dtype="uint8", shape=(nbytes,), offset=0, nbytes=nbytes),)
        kind = ExpertKind(graph="graphs/expert_0.onnx", input="x", output="y", tensors=tensors, nbytes=nbytes)
        model = msgspec.structs.replace(whole.model, hidden_size=probe.HIDDEN)
        layers = tuple(msgspec.structs.replace(layer, n_experts=n_experts) for layer in whole.moe_layers)
        changes = {"model": model, "moe_layers": layers, "expert_kinds": (kind,), "store_index_sha256": index}
        return writer.publish(msgspec.structs.replace(whole, **changes))


def scratch_folders() -> list[Path]:
    """The folders in memory that this process has open; they are removed before they are closed."""
    links = (Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))  # noqa: PTH208 - names alone
    paths = [link.readlink() for link in links if link.is_symlink()]
    return [path for path in paths if path.match("/dev/shm/.pocketmoe.*.partial")]


def reseal(root: Path, **changes: Any) -> None:
    """Do what an attacker can: change the manifest's fields and seal it again."""
    path = root / MANIFEST
    path.write_bytes(seal(msgspec.structs.replace(read_manifest(path), **changes)))


def tree(root: Path) -> dict[str, bytes]:
    """Every file below `root` with its bytes."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
