"""Does mixed precision pay, and which of its reasons count? KL at equal bytes, on text that calibration has not seen.

    python benchmarks/mixed_precision.py BUNDLE --calibration TEXT --text DIR [--bits 3.5 ...] [--json FILE]

BUNDLE is float32. Dense tensors are int8 throughout; what differs is how the experts' bytes are spread:

    uniform      one format for all experts; the others get as many bytes
    random       the combined plan's formats, dealt out to experts at random
    frequency    only how often experts are chosen counts
    error        only how far formats move an expert's output counts
    no layer     both, but not how much an error in the layer reaches the logits
    combined     all three, as `quantize --scheme mixed` does

The last column is the slice whose name is `ood`, text of a kind that neither training nor calibration had.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.resume import Work
from pocketmoe.bundle.store import padded
from pocketmoe.calibration import Calibration
from pocketmoe.profiles.calibration.calibrate import calibrate
from pocketmoe.profiles.quality.quality import QualityReport, Slice, evaluate, read_slices
from pocketmoe.quantize.algorithms.formats import BlockFormat, Format
from pocketmoe.quantize.apply import quantize_bundle
from pocketmoe.quantize.experts import inner_side, matrices_of, record_bytes
from pocketmoe.quantize.float_expert import FloatExpert
from pocketmoe.quantize.mixed.choose import Costs, make_plan, measure_costs, scheme_of
from pocketmoe.quantize.mixed.sensitivity import Sensitivity
from pocketmoe.quantize.plan import PlannedExpert, QuantizationPlan, SizeBudget
from pocketmoe.quantize.schemes import Scheme, find_scheme

UNIFORM = (BlockFormat(2, 64, False), BlockFormat(2, 32, False), BlockFormat(4, 128, False), BlockFormat(4, 64, False))
DENSE = find_scheme("int8").dense


class Bench:
    """One bundle, its calibration, and a place for the variants."""

    def __init__(
        self, bundle: Bundle, calibration: Calibration, scratch: Path, texts: list[Slice], tokens: int
    ) -> None:
        self.bundle, self.calibration, self.scratch = bundle, calibration, scratch
        self.texts, self.tokens = texts, tokens

    def bits_of(self, form: Format) -> float:
        """A weight of an expert, with whatever its record takes on disk."""
        (kind,) = (FloatExpert(self.bundle.path(kind.graph), kind) for kind in self.bundle.manifest.expert_kinds)
        matrices = matrices_of(kind.kind)
        weights = sum(tensor.nbytes // 4 for tensor in matrices)
        forms = [form.fitted(inner_side(kind, tensor)) for tensor in matrices]
        return 8 * padded(record_bytes(kind, forms)) / weights + 1e-6

    def judge(self, scheme: Scheme) -> QualityReport:
        made = quantize_bundle(self.bundle.root, self.scratch / "made", scheme=scheme, calibration=self.calibration)
        return evaluate(made, self.texts, reference=self.bundle, max_tokens=self.tokens)

    def row(self, bits: float, name: str, scheme: Scheme) -> dict[str, object]:
        report = self.judge(scheme)
        kl = {piece.name: mean_kl(piece.quality) for piece in report.slices}
        found = {"bits": bits, "plan": name, "bytes": report.candidate_bytes, "kl": mean_kl(report.overall), **kl}
        print("  ".join(f"{v:9.5f}" if isinstance(v, float) else f"{v:>10}" for v in found.values()), flush=True)
        return found


def mean_kl(quality: object) -> float:
    divergence = getattr(quality, "divergence", None)
    assert divergence is not None
    return divergence.mean_kl_nats.value


def only(costs: Costs, what: str) -> Costs:
    """Costs that know less: what is left out is the mean of all experts."""
    found = list(costs.experts.values())
    errors = tuple(map(tuple, np.mean([s.errors for s in found], axis=0)))
    factor, share = float(np.mean([s.factor for s in found])), float(np.mean([s.share for s in found]))

    def blind(s: Sensitivity) -> Sensitivity:
        if what == "frequency":
            return replace(s, factor=factor, errors=errors)
        return replace(s, factor=factor, share=share if what == "error" else s.share)

    return replace(costs, experts={expert: blind(s) for expert, s in costs.experts.items()})


def dealt(plan: QuantizationPlan) -> QuantizationPlan:
    """The same formats, for other experts."""
    order = np.random.default_rng(0).permutation(len(plan.experts))
    experts = [
        PlannedExpert(layer=e.layer, expert=e.expert, formats=plan.experts[o].formats, loss=e.loss)
        for e, o in zip(plan.experts, order, strict=True)
    ]
    return QuantizationPlan(
        **{**{name: getattr(plan, name) for name in plan.__struct_fields__}, "experts": tuple(experts)}
    )


def uniform(form: Format) -> Scheme:
    return Scheme("uniform", form, DENSE, algorithm="gptq")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=float, nargs="+", default=[3.5], help="sizes in which no format comes")
    parser.add_argument("--tokens", type=int, default=2048, help="of each text")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bundle, texts = Bundle.open(args.bundle), read_slices(args.text)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        calibration = calibrate(bundle, read_slices(args.calibration), scratch=scratch)
        bench = Bench(bundle, calibration, scratch, texts, args.tokens)
        costs = measure_costs(bundle, calibration, algorithm="gptq", measure=lambda _: 0.0, work=Work(scratch))
        costs = replace(costs, dense={})
        print("  ".join(f"{name:>10}" for name in ("bits", "plan", "bytes", "kl", *(t.name for t in texts))))
        rows = [bench.row(0, "rtn int4-64", replace(uniform(BlockFormat(4, 64, False)), algorithm="nearest"))]
        sizes = {bench.bits_of(form): form for form in UNIFORM}
        for bits in sorted({*sizes, *args.bits}):
            if bits in sizes:
                rows.append(bench.row(bits, sizes[bits].label, uniform(sizes[bits])))
            plans = {"combined": make_plan(bundle, costs, SizeBudget(bits=bits), None)}
            for name in ("frequency", "error", "no layer"):
                plans[name] = make_plan(bundle, only(costs, name), SizeBudget(bits=bits), None)
            plans["random"] = dealt(plans["combined"])
            for name, plan in plans.items():
                rows.append(bench.row(bits, name, replace(scheme_of(plan, "gptq"), dense=DENSE)))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
