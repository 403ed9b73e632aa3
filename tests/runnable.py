"""The smallest bundle that runs: two MoE layers over four experts of width 4, its graphs made by hand with onnx.

Opening and running it takes some 20 ms, so that many changes of it can be tried.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pocketmoe.bundle.manifest import (
    MANIFEST,
    STORE,
    ExpertKind,
    FileEntry,
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
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId, StoreWriter
from pocketmoe.bundle.writer import BundleWriter

LAYERS, EXPERTS, TOP_K, WIDTH, VOCAB = 2, 4, 2, 4, 8
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
SEGMENTS = [f"graphs/segment_0{index}.onnx" for index in range(LAYERS + 1)]
ROUTER, EXPERT = "graphs/router_01.onnx", "graphs/expert_0.onnx"
GRAPHS = [*SEGMENTS, ROUTER, EXPERT]


def weights(seed: int, *shape: int) -> np.ndarray:
    """Numbers of a seed, float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def port(name: str, dtype: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def model(nodes: list, inputs: list, outputs: list, **constants: np.ndarray) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _router(x: str, ids: str, expert_weights: str) -> list:
    return [
        helper.make_node("MatMul", [x, "router"], ["scores"]),
        helper.make_node("TopK", ["scores", "k"], ["values", ids]),
        helper.make_node("Softmax", ["values"], [expert_weights], axis=-1),
    ]


def _chosen(ids: str, expert_weights: str) -> list:
    return [port(ids, INT64, "T", TOP_K), port(expert_weights, FLOAT, "T", TOP_K)]


def graphs() -> dict[str, onnx.ModelProto]:
    """The bundle's graphs by file name."""
    routing = {"router": weights(1, WIDTH, EXPERTS), "k": np.array([TOP_K], np.int64)}
    first = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        helper.make_node("Unsqueeze", ["embedded", "one"], ["new"]),
        helper.make_node("Concat", ["past", "new"], ["present"], axis=2),
        helper.make_node("Reshape", ["embedded", "flat"], ["x0"]),
    ]
    second = [helper.make_node("Add", ["y0", "bias"], ["x1"])]
    head = [
        helper.make_node("MatMul", ["y1", "head"], ["rows"]),
        helper.make_node("Unsqueeze", ["rows", "zero"], ["logits"]),
    ]
    expert = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [port("x", FLOAT, "rows", WIDTH)],
        [port("y", FLOAT, "rows", WIDTH)],
        w=weights(0, WIDTH, WIDTH),
    )
    outside = expert.graph.initializer[0]
    outside.ClearField("raw_data")
    outside.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "record"), ("offset", "0"), ("length", str(4 * WIDTH * WIDTH))):
        outside.external_data.add(key=key, value=value)
    return {
        SEGMENTS[0]: model(
            first + _router("x0", "ids0", "w0"),
            [port("input_ids", INT64, 1, "T"), port("past", FLOAT, 1, 1, "P", WIDTH)],
            [port("x0", FLOAT, "T", WIDTH), *_chosen("ids0", "w0"), port("present", FLOAT, 1, 1, "N", WIDTH)],
            table=weights(2, VOCAB, WIDTH),
            one=np.array([1], np.int64),
            flat=np.array([-1, WIDTH], np.int64),
            **routing,
        ),
        SEGMENTS[1]: model(
            second + _router("x1", "ids1", "w1"),
            [port("y0", FLOAT, "T", WIDTH)],
            [port("x1", FLOAT, "T", WIDTH), *_chosen("ids1", "w1")],
            bias=weights(3, WIDTH),
            **routing,
        ),
        SEGMENTS[2]: model(
            head,
            [port("y1", FLOAT, "T", WIDTH)],
            [port("logits", FLOAT, 1, "T", VOCAB)],
            head=weights(4, WIDTH, VOCAB),
            zero=np.array([0], np.int64),
        ),
        ROUTER: model(
            _router("x", "expert_ids", "expert_weights"),
            [port("x", FLOAT, "T", WIDTH)],
            _chosen("expert_ids", "expert_weights"),
            **routing,
        ),
        EXPERT: expert,
    }


def manifest(store_index_sha256: str) -> Manifest:
    layers = [
        MoeLayer(
            n_experts=EXPERTS,
            top_k=TOP_K,
            x=f"x{i}",
            expert_ids=f"ids{i}",
            expert_weights=f"w{i}",
            output=f"y{i}",
            router=ROUTER if i else None,
        )
        for i in range(LAYERS)
    ]
    matrix = Tensor(name="w", dtype="float32", shape=(WIDTH, WIDTH), offset=0, nbytes=4 * WIDTH * WIDTH)
    return Manifest(
        model=Model(
            architecture="Runnable",
            model_type="runnable",
            hidden_size=WIDTH,
            vocab_size=VOCAB,
            context_length=64,
            n_parameters=100,
        ),
        inputs=Inputs(positions=None, past_length=None),
        logits="logits",
        segments=(
            Segment(graph=SEGMENTS[0], inputs=("input_ids", "past"), outputs=("x0", "ids0", "w0", "present")),
            Segment(graph=SEGMENTS[1], inputs=("y0",), outputs=("x1", "ids1", "w1")),
            Segment(graph=SEGMENTS[2], inputs=("y1",), outputs=("logits",)),
        ),
        moe_layers=tuple(layers),
        expert_kinds=(ExpertKind(graph=EXPERT, input="x", output="y", tensors=(matrix,), nbytes=matrix.nbytes),),
        states=(State(input="past", output="present", dtype="float32", shape=(1, 1, -1, WIDTH), growing_axis=2),),
        dense=(),
        store_index_sha256=store_index_sha256,
        provenance=Provenance(source="made by hand"),
    )


def write_bundle(target: Path) -> Bundle:
    """Publish the bundle, with a tokenizer of the words a to h."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate("abcdefgh")}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with BundleWriter(target) as writer:
        for name, graph in graphs().items():
            (writer.root / name).write_bytes(graph.SerializeToString())
        (writer.root / "tokenizer").mkdir()
        tokenizer.save(str(writer.root / "tokenizer/tokenizer.json"))
        with StoreWriter(writer.root / STORE) as store:
            for layer in range(LAYERS):
                for expert in range(EXPERTS):
                    record = weights(10 + EXPERTS * layer + expert, WIDTH, WIDTH).tobytes()
                    store.append(ExpertId(layer, expert), 0, record)
            return writer.publish(manifest(store.close()))


def put(root: Path, name: str, data: bytes) -> None:
    """Do what an attacker can: put another file in a graph's place and seal the manifest again."""
    (root / name).write_bytes(data)
    path = root / MANIFEST
    whole = read_manifest(path)
    entry = FileEntry(nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    path.write_bytes(seal(msgspec.structs.replace(whole, files={**whole.files, name: entry})))


def change(root: Path, name: str, edit: Callable[[onnx.ModelProto], object]) -> None:
    """Put an edited graph in the place of the bundle's own."""
    graph = graphs()[name]
    edit(graph)
    put(root, name, graph.SerializeToString())


def replace_value(graph: onnx.ModelProto, name: str, *nodes: onnx.NodeProto, **constants: np.ndarray) -> None:
    """Let `nodes` make the value `name`, out of `own`, which is what made it before."""
    for node in graph.graph.node:
        node.output[:] = ["own" if output == name else output for output in node.output]
    graph.graph.node.extend(nodes)
    graph.graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in constants.items())
