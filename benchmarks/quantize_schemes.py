"""How should an expert's weights be stored? Bytes, error and speed of one expert per format, on this machine.

    python benchmarks/quantize_schemes.py [--shape olmoe|reference|both] [--repeats N]

The expert is y = down(silu(gate(x)) * up(x)). Weights are drawn from Student's t with 8 degrees of freedom (heavier
tails than a Gaussian, as trained weights have); activations are normalized rows in which one channel in 64 is ten
times the others. Errors are relative (Frobenius): of the weights against float32, and of the expert's output with
exact (accuracy level 0) and int8 activations (level 4), which four-bit floats do not know. Times are the least of many
runs on one thread. Weights are rounded by `search`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from pocketmoe.quantize.algorithms.choice import find_algorithm
from pocketmoe.quantize.algorithms.formats import FloatFormat, Format, all_formats, relative_error

SHAPES = {"olmoe": (2048, 1024), "reference": (256, 64)}  # hidden, ffn
LEVELS, ROWS = (0, 4), (1, 32)


@dataclass(frozen=True)
class Cost:
    """What a format does to one expert: bytes, error of its weights, and by accuracy level its output's error and time.

    `times_us`: by accuracy level and rows.
    """

    nbytes: int
    bits_per_weight: float
    weight_error: float
    output_errors: dict[int, float]
    times_us: dict[tuple[int, int], float]


def expert_weights(hidden: int, ffn: int) -> dict[str, np.ndarray]:
    """gate, up [ffn, hidden] and down [hidden, ffn], float32."""
    rng = np.random.default_rng(0)
    shapes = {"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}
    return {k: (rng.standard_t(8, s) / np.sqrt(s[1])).astype(np.float32) for k, s in shapes.items()}


def activations(rows: int, hidden: int) -> np.ndarray:
    """float32 [rows, hidden] with a few loud channels, each row normalized to mean square 1."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, hidden)) * np.where(np.arange(hidden) % 64 == 7, 10, 1)
    return (x / np.sqrt(np.square(x).mean(axis=1, keepdims=True))).astype(np.float32)


def expert_model(weights: dict[str, np.ndarray], form: Format | None, level: int) -> bytes:
    """The expert as an ONNX model with weights inside: MatMul when `form` is None, else MatMulNBits or MatMulBnb4."""
    nodes, initializers = [], []
    for name, source, result in (("gate", "x", "g"), ("up", "x", "u"), ("down", "h", "y")):
        op, arrays, attributes = product(weights[name], form, level)
        names = [f"{name}.{i}" for i in range(len(arrays))]
        initializers += [numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True)]
        domain = "" if form is None else "com.microsoft"
        nodes.append(helper.make_node(op, [source, *names], [result], domain=domain, **attributes))
    nodes[2:2] = [helper.make_node("Sigmoid", ["g"], ["s"]), helper.make_node("Mul", ["g", "s"], ["silu"])]
    nodes[4:4] = [helper.make_node("Mul", ["silu", "u"], ["h"])]
    hidden = weights["gate"].shape[1]
    io = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", hidden]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "expert", io[:1], io[1:], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def product(weight: np.ndarray, form: Format | None, level: int) -> tuple[str, list[np.ndarray], dict[str, int]]:
    """The operator that multiplies by a matrix [N, K] in a format, its constant inputs and its attributes."""
    if form is None:
        return "MatMul", [weight.T.copy()], {}
    n, k = weight.shape
    matrix = find_algorithm("search")(weight, form.fitted(k), name="w")
    attributes = {"K": k, "N": n, "block_size": matrix.format.block}
    if isinstance(form, FloatFormat):
        return "MatMulBnb4", [part.reshape(-1) for part in matrix.parts], attributes | {"quant_type": form.quant_type}
    return "MatMulNBits", list(matrix.parts), attributes | {"bits": form.bits, "accuracy_level": level}


def session(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def least_us(run: ort.InferenceSession, x: np.ndarray, repeats: int) -> float:
    """The least time of one run in microseconds, after warming up."""
    times = []
    for _ in range(repeats + 5):
        start = time.perf_counter()
        run.run(None, {"x": x})
        times.append(time.perf_counter() - start)
    return min(times[5:]) * 1e6


def exact(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The float64 output of the expert."""
    gate, up, down = (weights[k].astype(np.float64).T for k in ("gate", "up", "down"))
    g = x @ gate
    return (g / (1 + np.exp(-g)) * (x @ up)) @ down


def measure(
    weights: dict[str, np.ndarray], form: Format | None, repeats: int, levels: tuple[int, ...] = LEVELS
) -> Cost:
    """What a format costs one expert; float32 when `form` is None."""
    hidden = weights["gate"].shape[1]
    x = activations(256, hidden)
    truth = exact(weights, x.astype(np.float64))
    if form is None:
        nbytes, weight_error = sum(w.nbytes for w in weights.values()), 0.0
    else:
        matrices = {k: find_algorithm("search")(w, form.fitted(w.shape[1]), name=k) for k, w in weights.items()}
        nbytes = sum(part.nbytes for m in matrices.values() for part in m.parts)
        weight_error = float(np.mean([relative_error(weights[k], m) for k, m in matrices.items()]))
    errors, times = {}, {}
    for level in levels:
        run = session(expert_model(weights, form, level))
        y = run.run(None, {"x": x})[0]
        errors[level] = float(np.linalg.norm(y - truth) / np.linalg.norm(truth))
        for rows in ROWS:
            times[level, rows] = least_us(
                run, activations(rows, hidden), repeats if rows == 1 else max(1, repeats // 4)
            )
    bits = nbytes * 8 / sum(w.size for w in weights.values())
    return Cost(nbytes, bits, weight_error, errors, times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES, "both"], default="both")
    parser.add_argument("--repeats", type=int, default=60)
    arguments = parser.parse_args()
    print(f"onnxruntime {ort.__version__}, onnx {onnx.__version__}, one thread; us = least of {arguments.repeats} runs")
    columns = ["format", "bytes", "bits/weight", "weight error", *(f"output error L{level}" for level in LEVELS)]
    columns += [f"us L{level} M={rows}" for level in LEVELS for rows in ROWS]
    for shape in SHAPES if arguments.shape == "both" else [arguments.shape]:
        hidden, ffn = SHAPES[shape]
        weights = expert_weights(hidden, ffn)
        print(f"\n## {shape}: hidden {hidden}, ffn {ffn}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for form in (None, *all_formats()):
            cost = measure(weights, form, arguments.repeats)
            cells = [form.label if form else "fp32", f"{cost.nbytes}", f"{cost.bits_per_weight:.3f}"]
            cells += [f"{error:.4f}" for error in (cost.weight_error, *cost.output_errors.values())]
            cells += [f"{time_us:.0f}" for time_us in cost.times_us.values()]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
