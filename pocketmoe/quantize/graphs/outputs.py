"""A copy of a bundle whose segments also give what goes into their matrices, for calibration to look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnx_ir as ir

from pocketmoe.bundle.manifest import Segment
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.writer import write_with_graphs
from pocketmoe.quantize.graphs.rewrite import externals, find_uses, load


@dataclass(frozen=True)
class ActivationOutputs:
    """The copy, and by name of a dense tensor the segment output that has its inputs, float32 [..., K]."""

    bundle: Bundle
    outputs: Mapping[str, str]


def write_with_activations(bundle: Bundle, target: Path) -> ActivationOutputs:
    """Write such a copy of a float32 bundle; large files are linked to, where the file system can.

    Raises DamagedFile, OutputError.
    """
    names = {tensor.offset: tensor.name for tensor in bundle.manifest.dense}
    found: dict[str, str] = {}
    segments: list[Segment] = []
    graphs: dict[str, bytes] = {}
    for segment in bundle.manifest.segments:
        model = load(bundle.path(segment.graph))
        segments.append(_add_outputs(model, segment, names, found))
        graphs[segment.graph] = ir.to_proto(model).SerializeToString()
    manifest = msgspec.structs.replace(bundle.manifest, segments=tuple(segments))
    return ActivationOutputs(write_with_graphs(bundle, target, graphs, manifest), found)


def _add_outputs(model: ir.Model, segment: Segment, names: Mapping[int, str], found: dict[str, str]) -> Segment:
    """Give each matrix's input an output of its own; one that several matrices share gets one."""
    uses = find_uses(model)
    added: dict[str, str] = {}
    for weight, tensor in externals(model).items():
        use = uses.get(weight)
        if use is None or use.kind != "matmul":
            continue
        source = next(iter(model.graph.initializers[weight].uses())).node.inputs[0]
        assert source is not None
        name = added.get(str(source.name))
        if name is None:
            name = added[str(source.name)] = f"activation.{segment.graph}.{len(added)}"
            node = ir.Node("", "Identity", [source], name=name)
            output = node.outputs[0]
            output.name = name
            output.type, output.shape = source.type or ir.TensorType(ir.DataType.FLOAT), source.shape
            model.graph.append(node)
            model.graph.outputs.append(output)
        found[names[tensor.offset or 0]] = name
    return msgspec.structs.replace(segment, outputs=(*segment.outputs, *added.values()))
