"""Which rounding loses least? Output error of experts' matrices on rows that calibration has not seen.

    python benchmarks/roundings.py BUNDLE --calibration TEXT --text DIR [--experts N]

BUNDLE is float32. Of N experts spread over its layers, every matrix is rounded in every way to every format that is
asked for, and multiplied with what a text that was held out brings to it: ||x (W - Q)^T|| / ||x W^T||, rows weighted
by the router, mean over matrices. Then the same for gptq from fewer and fewer calibration rows, which shows how many
it takes to be better than rounding without any.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketmoe.bundle.reader import Bundle
from pocketmoe.calibration import Calibration, ExpertSample, Hessian
from pocketmoe.profiles.calibration.calibrate import calibrate
from pocketmoe.profiles.quality.quality import read_slices
from pocketmoe.quantize.algorithms.choice import ALGORITHMS, find_algorithm
from pocketmoe.quantize.algorithms.formats import BlockFormat, Format, all_formats, dequantize
from pocketmoe.quantize.algorithms.gptq import gptq
from pocketmoe.quantize.experts import matrices_of
from pocketmoe.quantize.float_expert import FloatExpert

FEWER = (4, 8, 16, 32, 64, 128, 256, 512, 1024)  # calibration rows
FEWER_FORMATS = (BlockFormat(2, 64, False), BlockFormat(4, 64, False))
LEAST_HELD_OUT = 64  # rows, of an expert that is looked at


@dataclass(frozen=True)
class Matrix:
    """One matrix [N, K], and what goes into it, router weights multiplied in: in calibration, and held out."""

    weight: np.ndarray
    calibration: np.ndarray
    held_out: np.ndarray

    def hessian(self, rows: int | None = None) -> Hessian:
        """Of calibration rows, by default all, taken evenly."""
        x = self.calibration
        if rows is not None:
            x = x[np.linspace(0, len(x) - 1, rows).astype(int)]
        return Hessian(np.asarray(x.T @ x, np.float32), len(x))

    def error(self, restored: np.ndarray) -> float:
        truth = self.held_out @ self.weight.T
        return float(np.linalg.norm(self.held_out @ (self.weight - restored).T) / np.linalg.norm(truth))


def matrices(bundle: Bundle, seen: Calibration, unseen: Calibration, count: int) -> Iterator[Matrix]:
    """The matrices of `count` experts, of those that both texts reached."""
    kind = bundle.manifest.expert_kinds[0]
    expert = FloatExpert(bundle.path(kind.graph), kind)
    with bundle.open_store() as store:
        reached = [e for e in store.records if len(unseen.of(e).x) >= LEAST_HELD_OUT <= len(seen.of(e).x)]
        for chosen in (reached[i * len(reached) // count] for i in range(count)):
            weights = expert.weights(memoryview(bytes(store.read(chosen))))
            inputs = [_weighted_inputs(expert, weights, text.of(chosen)) for text in (seen, unseen)]
            for tensor in matrices_of(kind):
                stored = weights[tensor.name]
                weight = stored if expert.uses[tensor.name].by_rows else np.ascontiguousarray(stored.T)
                yield Matrix(weight, inputs[0][tensor.name], inputs[1][tensor.name])


def _weighted_inputs(
    expert: FloatExpert, weights: dict[str, np.ndarray], sample: ExpertSample
) -> dict[str, np.ndarray]:
    return {name: expert.inputs_of(name, weights, sample.x) * sample.weights[:, None] for name in expert.uses}


def fitted(form: Format, matrix: Matrix) -> Format:
    return form.fitted(matrix.weight.shape[1])


def print_roundings(found: list[Matrix], forms: list[Format]) -> None:
    print(f"\n| format | {' | '.join(ALGORITHMS)} |\n|{'---|' * (len(ALGORITHMS) + 1)}")
    for form in forms:
        cells = [form.label]
        for name in ALGORITHMS:
            algorithm = find_algorithm(name)
            errors = [
                m.error(dequantize(algorithm(m.weight, fitted(form, m), name="w", hessian=m.hessian()))) for m in found
            ]
            cells.append(f"{np.mean(errors):.4f}")
        print(f"| {' | '.join(cells)} |", flush=True)


def print_fewer_rows(found: list[Matrix]) -> None:
    """gptq on the plain grid from that many rows, by the number of inputs, against rounding without calibration."""
    print(f"\n| format | K | matrices | nearest | search | {' | '.join(f'{rows} rows' for rows in FEWER)} |")
    print(f"|{'---|' * (len(FEWER) + 5)}")
    for form in FEWER_FORMATS:
        for k in sorted({m.weight.shape[1] for m in found}):
            these = [m for m in found if m.weight.shape[1] == k and len(m.calibration) >= FEWER[-1]]
            if not these:
                continue
            grids = [find_algorithm("nearest")(m.weight, fitted(form, m), name="w") for m in these]
            plain = np.mean([m.error(dequantize(g)) for m, g in zip(these, grids, strict=True)])
            best = np.mean(
                [m.error(dequantize(find_algorithm("search")(m.weight, fitted(form, m), name="w"))) for m in these]
            )
            cells = [form.label, str(k), str(len(these)), f"{plain:.4f}", f"{best:.4f}"]
            for rows in FEWER:
                pairs = zip(these, grids, strict=True)
                cells.append(
                    f"{np.mean([m.error(dequantize(gptq(m.weight, g, m.hessian(rows)))) for m, g in pairs]):.4f}"
                )
            print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, metavar="TEXT")
    parser.add_argument("--text", type=Path, required=True, metavar="DIR")
    parser.add_argument("--experts", type=int, default=24)
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    with tempfile.TemporaryDirectory() as scratch:
        seen, unseen = (
            calibrate(bundle, read_slices(text), scratch=Path(scratch)) for text in (options.calibration, options.text)
        )
        found = list(matrices(bundle, seen, unseen, options.experts))
    rows = [len(m.calibration) for m in found]
    print(f"{len(found)} matrices; calibration rows {min(rows)} to {max(rows)}; calibrated by {seen.source}")
    print_fewer_rows(found)
    print_roundings(found, [form for form in all_formats() if form.block >= 32])


if __name__ == "__main__":
    main()
