"""Thousands of experts in one process: start-up, memory, time per step, open files and memory maps.

    python benchmarks/many_experts.py [--layers 48] [--experts 128] [--memory 100%,25%] [--files 1024] [--steps 64]

The bundle is made up: layers of a router alone, and int4 experts of hidden size 64 with random weights, so that what
is measured is what the number of experts costs and not their size. Each row is a process of its own under
`ulimit -n`: it opens the bundle (packed before), walks 8 chunks of 128 random tokens, which reach nearly every expert,
walks them again, and decodes. Needs the onnx package.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pocketmoe.bundle.manifest import STORE, ExpertKind, Inputs, Manifest, Model, MoeLayer, Provenance, Segment, Tensor
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId, StoreWriter
from pocketmoe.bundle.writer import BundleWriter
from pocketmoe.profiles.machine.doctor import read_cpu
from pocketmoe.runtime.backends import probe
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.memory.limits import read_limits

VOCAB, TOP_K, CHUNK, CHUNKS = 512, 8, 128, 8
HEAD = ["layers x experts", "memory", "slots", "open", "first prompt", "again", "ms/step", "peak", "maps", "files"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--memory", default="100%,25%")
    parser.add_argument("--files", type=int, default=1024, help="ulimit -n")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bundle", type=Path, help="measure this one (the processes that do)")
    args = parser.parse_args()
    if args.bundle:
        measure(args.bundle, args.memory, args.steps, args.threads)
        return
    print(read_cpu().model, "\n", "|".join(["", *HEAD, ""]), "\n", "|".join(["", *["---"] * len(HEAD), ""]), sep="")
    with tempfile.TemporaryDirectory() as directory:
        bundle = write_bundle(Path(directory) / "bundle", args.layers, args.experts)
        child(args, bundle, "2%")  # packs
        for memory in args.memory.split(","):
            found = child(args, bundle, memory)
            row = [f"{args.layers} x {args.experts}", memory, f"{found['slots']:,}", f"{found['open_s']:.1f} s"]
            row += [f"{found['first_s']:.1f} s", f"{found['again_s']:.1f} s", f"{found['step_ms']:.1f}"]
            row += [f"{found['peak_bytes'] / 1e6:.0f} MB", f"{found['maps']:,}", str(found["files"])]
            print("|".join(["", *row, ""]), flush=True)
            if found["reason"]:
                print(found["reason"])


def child(args: argparse.Namespace, bundle: Bundle, memory: str) -> dict:
    command = [sys.executable, __file__, "--bundle", str(bundle.root), "--memory", memory]
    command += ["--steps", str(args.steps), "--threads", str(args.threads)]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (args.files, args.files))

    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, preexec_fn=limit).stdout)


def measure(path: Path, memory: str, steps: int, threads: int) -> None:
    bundle = Bundle.open(path)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, VOCAB, CHUNK * CHUNKS).tolist()
    began = time.perf_counter()
    options = EngineOptions(MemoryRequest.parse(memory), 2 * len(prompt) + steps, threads, "slots")
    with Engine(bundle, options) as engine:
        times = [time.perf_counter() - began]
        for _ in range(2):
            began = time.perf_counter()
            engine.reset()
            engine.feed(prompt)
            times.append(time.perf_counter() - began)
        began = time.perf_counter()
        for token in rng.integers(0, VOCAB, steps).tolist():
            engine.feed([token])
        found = {
            "open_s": times[0],
            "first_s": times[1],
            "again_s": times[2],
            "step_ms": 1e3 * (time.perf_counter() - began) / steps,
            "slots": sum(engine.opened.slots.values()),
            "reason": engine.opened.backend_reason,
            "peak_bytes": (engine.budget.observe(), engine.budget.peak_bytes)[1],
            "maps": read_limits().maps_used,
            "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - their number alone
        }
    print(json.dumps(found))


def write_bundle(target: Path, layers: int, experts: int) -> Bundle:
    """A model of routers and experts: x + experts(x) in each layer, a head at the end."""
    nbytes = len(probe.probe_record(0))
    kind = ExpertKind(
        graph="graphs/expert_0.onnx",
        input="x",
        output="y",
        tensors=(Tensor(name="w", dtype="uint8", shape=(nbytes,), offset=0, nbytes=nbytes),),
        nbytes=nbytes,
        scheme="int4",
    )
    rng = np.random.default_rng(0)
    blocks = [probe.probe_record(seed) for seed in range(64)]
    moe = [MoeLayer(n_experts=experts, top_k=TOP_K, x=f"x{i}", expert_ids=f"ids{i}", expert_weights=f"w{i}",
                    output=f"y{i}") for i in range(layers)]  # fmt: skip
    segments = []
    with BundleWriter(target) as writer:
        (writer.root / "graphs/expert_0.onnx").write_bytes(probe.GRAPH.read_bytes())
        for index in range(layers + 1):
            name = f"graphs/segment_{index:02}.onnx"
            model, inputs, outputs = segment(index, layers, experts, rng)
            (writer.root / name).write_bytes(model)
            segments.append(Segment(graph=name, inputs=inputs, outputs=outputs))
        with StoreWriter(writer.root / STORE) as store:
            for layer in range(layers):
                for expert in range(experts):
                    data = bytearray(blocks[rng.integers(len(blocks))])
                    data[:32] = rng.bytes(32)
                    store.append(ExpertId(layer, expert), 0, data)
            index_sha256 = store.close()
        model = Model(architecture="Routers", model_type="routers", hidden_size=probe.HIDDEN, vocab_size=VOCAB,
                      context_length=1 << 20, n_parameters=0)  # fmt: skip
        return writer.publish(
            Manifest(
                model=model,
                inputs=Inputs(positions=None, past_length=None),
                logits="logits",
                segments=tuple(segments),
                moe_layers=tuple(moe),
                expert_kinds=(kind,),
                states=(),
                dense=(),
                store_index_sha256=index_sha256,
                provenance=Provenance(source="made up"),
            )
        )


def segment(index: int, layers: int, experts: int, rng: np.random.Generator) -> tuple[bytes, tuple, tuple]:
    """The graph before MoE layer `index`, or the last one, with the names of its inputs and outputs."""
    from onnx import TensorProto, helper, numpy_helper

    hidden = probe.HIDDEN
    weights = {"k": np.array([TOP_K], np.int64)}
    if index == 0:
        inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "n"])]
        weights |= {"embedding": rng.standard_normal((VOCAB, hidden), np.float32), "rows": np.array([-1, hidden])}
        nodes = [helper.make_node("Gather", ["embedding", "input_ids"], ["embedded"])]
        nodes += [helper.make_node("Reshape", ["embedded", "rows"], ["x0"])]
    else:
        before = (f"x{index - 1}", f"y{index - 1}")
        inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", hidden]) for name in before]
        weights |= {"ones": np.ones(hidden, np.float32)}
        nodes = [helper.make_node("Add", list(before), ["sum"])]
        nodes += [helper.make_node("LayerNormalization", ["sum", "ones"], [f"x{index}"])]
    if index < layers:
        weights["router"] = rng.standard_normal((hidden, experts), np.float32)
        nodes += [helper.make_node("MatMul", [f"x{index}", "router"], ["scores"])]
        nodes += [helper.make_node("TopK", ["scores", "k"], ["best", f"ids{index}"])]
        nodes += [helper.make_node("Softmax", ["best"], [f"w{index}"])]
        outputs = [helper.make_tensor_value_info(f"x{index}", TensorProto.FLOAT, ["n", hidden])]
        outputs += [helper.make_tensor_value_info(f"ids{index}", TensorProto.INT64, ["n", TOP_K])]
        outputs += [helper.make_tensor_value_info(f"w{index}", TensorProto.FLOAT, ["n", TOP_K])]
    else:
        weights |= {"head": rng.standard_normal((hidden, VOCAB), np.float32), "one": np.array([0])}
        nodes += [helper.make_node("MatMul", [f"x{index}", "head"], ["rows_of_logits"])]
        nodes += [helper.make_node("Unsqueeze", ["rows_of_logits", "one"], ["logits"])]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "n", VOCAB])]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "segment", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString(), tuple(i.name for i in inputs), tuple(o.name for o in outputs)


if __name__ == "__main__":
    main()
