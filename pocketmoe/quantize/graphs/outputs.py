"""A copy of a bundle whose segments also give what goes into their matrices, for calibration to look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnx_ir as ir

from pocketmoe.bundle.manifest import Segment
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.variant import write_with_graphs
from pocketmoe.quantize.graphs.rewrite import externals, find_uses, load


@dataclass(frozen=True)
class Tapped:
    """The copy, and by name of a dense tensor the segment output that has its inputs, float32 [..., K]."""

    bundle: Bundle
    outputs: Mapping[str, str]


def write_tapped(bundle: Bundle, target: Path) -> Tapped:
    """Write such a copy of a float32 bundle; large files are linked to, where the file system can.

    Raises DamagedFile, OutputError.
    """
    names = {tensor.offset: tensor.name for tensor in bundle.manifest.dense}
    found: dict[str, str] = {}
    segments: list[Segment] = []
    graphs: dict[str, bytes] = {}
    for segment in bundle.manifest.segments:
        model = load(bundle.path(segment.graph))
        segments.append(_tap(model, segment, names, found))
        graphs[segment.graph] = ir.to_proto(model).SerializeToString()
    manifest = msgspec.structs.replace(bundle.manifest, segments=tuple(segments))
    return Tapped(write_with_graphs(bundle, target, graphs, manifest), found)


def _tap(model: ir.Model, segment: Segment, names: Mapping[int, str], found: dict[str, str]) -> Segment:
    """Give each matrix's input an output of its own; one that several matrices share gets one."""
    uses = find_uses(model)
    taps: dict[str, str] = {}
    for weight, tensor in externals(model).items():
        use = uses.get(weight)
        if use is None or use.kind != "matmul":
            continue
        node = next(iter(model.graph.initializers[weight].uses())).node
        source = node.inputs[0]
        assert source is not None
        if source.name not in taps:
            taps[str(source.name)] = f"tap.{segment.graph}.{len(taps)}"
            tap = ir.Node("", "Identity", [source], name=taps[str(source.name)])
            tap.outputs[0].name = taps[str(source.name)]
            tap.outputs[0].type, tap.outputs[0].shape = source.type or ir.TensorType(ir.DataType.FLOAT), source.shape
            model.graph.append(tap)
            model.graph.outputs.append(tap.outputs[0])
        found[names[tensor.offset or 0]] = taps[str(source.name)]
    return msgspec.structs.replace(segment, outputs=(*segment.outputs, *taps.values()))
