"""Mixed precision under a byte budget: candidates, what each would cost, and the plan that costs least.

Experts may take any combination of candidate formats for their matrices, of which the plan keeps a few, since each is a
size of slot of its own at run time. Dense tensors take one format per class, judged by the KL divergence of the whole
model with only that class quantized.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from threadpoolctl import threadpool_limits

from pocketmoe.bundle.manifest import Manifest, Role
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.resume import Work
from pocketmoe.bundle.store import ExpertId, padded
from pocketmoe.bundle.stream import ExpertSource, worker_pool
from pocketmoe.calibration import Calibration
from pocketmoe.errors import BadInput, SizeTooSmall
from pocketmoe.quantize.algorithms.choice import find_algorithm
from pocketmoe.quantize.algorithms.formats import BLOCKS, BlockFormat
from pocketmoe.quantize.apply import quantize_bundle, write_variant
from pocketmoe.quantize.dense import DensePlan
from pocketmoe.quantize.experts import inner_side, matrices_of, record_bytes
from pocketmoe.quantize.float_expert import FloatExpert
from pocketmoe.quantize.mixed import sensitivity
from pocketmoe.quantize.mixed.allocate import BudgetImpossible, Budgets, Option, allocate
from pocketmoe.quantize.mixed.sensitivity import Sensitivity
from pocketmoe.quantize.plan import PlannedClass, PlannedExpert, QuantizationPlan, SizeBudget
from pocketmoe.quantize.schemes import Scheme, find_scheme
from pocketmoe.quantize.workers import threads_of

# Two bits in blocks of 256 are thirty times slower in ONNX Runtime 1.32, and it takes no three (docs/LOG.md).
EXPERT_FORMATS = (
    BlockFormat(2, 32, symmetric=False),
    BlockFormat(2, 64, symmetric=False),
    BlockFormat(2, 128, symmetric=False),
    BlockFormat(4, 32, symmetric=False),
    BlockFormat(4, 64, symmetric=False),
    BlockFormat(4, 128, symmetric=False),
    BlockFormat(8, 128),
)
DENSE_FORMATS = (BlockFormat(4, 128, symmetric=False), BlockFormat(4, 32, symmetric=False), BlockFormat(8, 64))
MOST_KINDS = 6  # combinations of formats among the experts of one source kind
# Where each matrix would take gptq a second for each candidate, losses are measured by nearest: 16 minutes
# instead of hours for OLMoE-1B-7B, and 4 to 10% more KL for the same bytes on the reference model (docs/LOG.md).
_COSTLY_WEIGHTS = 1 << 19
_CHEAP_ALGORITHM = "nearest"
_SAFE_BITS = 4  # the least for experts that calibration did not reach
_CLASSES: tuple[Role, ...] = ("attention", "shared_expert", "head", "embedding")
_PER_EXPERT_BYTES = 320  # its lines in the index, the plan and the calibration's summary
_PER_TENSOR_BYTES = 700  # its lines in the manifest, and the graph's nodes


@dataclass(frozen=True)
class DenseCosts:
    """Of one class in each of DENSE_FORMATS: bytes and loss in nats."""

    nbytes: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Costs:
    """All that a plan is made from."""

    experts: Mapping[ExpertId, Sensitivity]
    kind_of: Mapping[ExpertId, int]
    dense: Mapping[Role, DenseCosts]
    experts_scale: float = 1.0  # what experts' losses are to be multiplied by, for their sum to be what was measured


def refuse_too_small(bundle: Bundle, size: SizeBudget) -> None:
    """Raises SizeTooSmall for a size that all weights at their fewest bits exceed: before hours of measuring."""
    with bundle.open_store() as store:
        kind_of = {expert: record.kind for expert, record in store.records.items()}
    fewest = min(form.bits for form in DENSE_FORMATS) / 32
    classes: dict[Role, int] = {}
    for tensor in bundle.manifest.dense:
        if tensor.role in _CLASSES:
            classes[tensor.role] = classes.get(tensor.role, 0) + int(tensor.nbytes * fewest)
    dense: dict[Role, DenseCosts] = {role: DenseCosts((nbytes,), (0.0,)) for role, nbytes in classes.items()}
    layout = _Layout(bundle, Costs({}, kind_of, dense))
    least = layout.least_bytes(kind_of) + sum(classes.values())
    limit = size.resolve(bundle, layout.overhead_bytes, layout.n_weights)
    if limit < least:
        raise SizeTooSmall(limit, least, None, 0.0)


def plan_mixed(
    bundle: Bundle,
    calibration: Calibration,
    size: SizeBudget | None,
    fetched_bytes: float | None,
    *,
    algorithm: str,
    measure: Callable[[Bundle], float],
    work: Work,
) -> QuantizationPlan:
    """Measure what formats cost a float32 bundle, and choose the best that a budget allows.

    Losses of experts add up only roughly: errors of matrices and layers are not independent, and what follows a layer
    does not see them as the white noise by which its factor was found. So the first plan's experts are measured all
    together, their losses scaled to that, and the plan is made anew, which weighs them rightly against dense tensors.
    `measure`: mean KL divergence, in nats, of a bundle whose dense part is quantized, from `bundle`. `work`:
    keeps what was measured, all for the same arguments; its scratch, where such bundles are written, is on the file
    system of `bundle`. Raises BadInput without a budget, SizeTooSmall.
    """
    costs = measure_costs(bundle, calibration, algorithm=algorithm, measure=measure, work=work)
    first = make_plan(bundle, costs, size, fetched_bytes)
    expected = sum(planned.loss for planned in first.experts)
    if expected <= 0:
        return first

    def kl_of_experts() -> float:
        variant = quantize_bundle(
            bundle.root,
            first_plan(work),
            scheme=replace(scheme_of(first, algorithm), dense={}),
            calibration=calibration,
            progress=work.progress,
            workers=work.workers,
        )
        return measure(variant)

    scale = work.once("experts", float, kl_of_experts) / expected
    return make_plan(bundle, replace(costs, experts_scale=scale), size, fetched_bytes)


def first_plan(work: Work) -> Path:
    """Where `plan_mixed` leaves the bundle that it quantized to measure: its plan keeps most of those experts."""
    return (work.kept or work.scratch) / "first"  # among kept results, a killed run goes on with it


def measure_costs(
    bundle: Bundle,
    calibration: Calibration,
    *,
    algorithm: str,
    measure: Callable[[Bundle], float],
    work: Work,
) -> Costs:
    """What plans are made from; arguments as in `plan_mixed`. Budgets do not matter here."""
    manifest = bundle.manifest
    floats = [FloatExpert(bundle.path(kind.graph), kind) for kind in manifest.expert_kinds]
    n_experts = [layer.n_experts for layer in manifest.moe_layers]
    largest = max(tensor.nbytes // 4 for kind in floats for tensor in matrices_of(kind.kind))
    measured_by = algorithm if largest <= _COSTLY_WEIGHTS else _CHEAP_ALGORITHM
    with threadpool_limits(1), worker_pool(threads_of(work.workers)) as pool, bundle.open_store() as store:
        experts = ExpertSource({expert: record.kind for expert, record in store.records.items()}, store.read)
        found = sensitivity.measure(
            experts, floats, calibration, EXPERT_FORMATS, find_algorithm(measured_by), n_experts, pool, work
        )
    variant = work.scratch / "variant"
    dense = measure_dense(
        bundle, algorithm, lambda scheme: measure(write_variant(bundle, variant, scheme, calibration)), work
    )
    return Costs(found, experts.kind_of, dense)


def dense_classes(manifest: Manifest) -> list[Role]:
    """The classes of dense tensors that a plan decides on; a tied embedding is one with the head."""
    present = {tensor.role for tensor in manifest.dense}
    return [role for role in _CLASSES if role in present]


def dense_scheme(forms: Mapping[Role, BlockFormat], algorithm: str) -> Scheme:
    """A scheme that quantizes these classes and nothing else of the dense tensors; an embedding's format is the tied
    head's too."""
    if "head" not in forms and "embedding" in forms:
        forms = {**forms, "head": forms["embedding"]}
    return Scheme("mixed", find_scheme("int4").experts, dict(forms), algorithm=algorithm)


def measure_dense(
    bundle: Bundle, algorithm: str, measure: Callable[[Scheme], float], work: Work
) -> dict[Role, DenseCosts]:
    """What each class costs in each format. `measure`: the KL of the model with its dense part under a scheme."""
    classes = dense_classes(bundle.manifest)
    total = len(classes) * len(DENSE_FORMATS)

    def cost(number: int, role: Role) -> DenseCosts:
        nbytes: list[int] = []
        losses: list[float] = []
        for place, form in enumerate(DENSE_FORMATS):
            work.progress("measuring dense tensors", number * len(DENSE_FORMATS) + place, total)
            scheme = dense_scheme({role: form}, algorithm)
            nbytes.append(sum(t.nbytes for t in DensePlan(bundle, scheme).tensors() if t.role == role))
            losses.append(measure(scheme))
        return DenseCosts(tuple(nbytes), tuple(losses))

    found: dict[Role, DenseCosts] = {
        role: work.once(f"dense-{role}", DenseCosts, lambda number=number, role=role: cost(number, role))
        for number, role in enumerate(classes)
    }
    work.progress("measuring dense tensors", total, total)
    return found


def make_plan(bundle: Bundle, costs: Costs, size: SizeBudget | None, fetched_bytes: float | None) -> QuantizationPlan:
    """The plan of least expected loss within the budgets. Raises SizeTooSmall, with the least that would do."""
    layout = _Layout(bundle, costs)
    limit = None if size is None else size.resolve(bundle, layout.overhead_bytes, layout.n_weights)
    if limit is None and fetched_bytes is None:
        raise BadInput("mixed precision needs a budget", "Say how large it may get: --size-budget 40%, or 3.5bits.")
    parts = [*layout.expert_options(), *layout.dense_options()]
    expert_bytes = None if limit is None else limit - layout.overhead_bytes
    try:
        chosen = allocate(parts, Budgets(expert_bytes, fetched_bytes), MOST_KINDS * len(bundle.manifest.expert_kinds))
    except BudgetImpossible as least:
        raise SizeTooSmall(
            limit, least.least_bytes + layout.overhead_bytes, fetched_bytes, least.least_fetched_bytes
        ) from least
    return layout.plan(chosen, limit, fetched_bytes)


def scheme_of(plan: QuantizationPlan, algorithm: str) -> Scheme:
    """The scheme that carries a plan out."""
    by_label = {form.label: form for form in _labelled((*EXPERT_FORMATS, *DENSE_FORMATS))}
    dense = dense_scheme(
        {role: by_label[plan.dense[role].format] for role in _CLASSES if role in plan.dense}, algorithm
    )
    by_expert = {ExpertId(e.layer, e.expert): tuple(by_label[label] for label in e.formats) for e in plan.experts}
    default = find_scheme("int4")
    return Scheme("mixed", default.experts, dense.dense, default.accuracy_level, algorithm, by_expert)


def _labelled(forms: Sequence[BlockFormat]) -> Iterator[BlockFormat]:
    """Each format with each block that short rows may bring it down to."""
    for form in forms:
        yield from (replace(form, block=block) for block in BLOCKS if block <= form.block)


class _Layout:
    """What the parts of a bundle would take in each format."""

    def __init__(self, bundle: Bundle, costs: Costs) -> None:
        self._manifest = manifest = bundle.manifest
        self._costs = costs
        self._floats = [FloatExpert(bundle.path(kind.graph), kind) for kind in manifest.expert_kinds]
        self._matrices = [matrices_of(kind) for kind in manifest.expert_kinds]
        expert_weights = sum(sum(t.nbytes // 4 for t in self._matrices[kind]) for kind in self._costs.kind_of.values())
        classes = {*costs.dense}
        self._expert_weights = expert_weights
        dense = [t for t in manifest.dense if t.role in classes]
        self.n_weights = expert_weights + sum(t.nbytes // 4 for t in dense)
        self.overhead_bytes = self._overhead(bundle, classes)

    def _overhead(self, bundle: Bundle, classes: Collection[str]) -> int:
        """Everything that is not quantized, no less than it will be."""
        manifest = self._manifest
        named = sum(
            entry.nbytes for name, entry in manifest.files.items() if not name.endswith(("dense.bin", "experts.bin"))
        )
        kept = sum(t.nbytes + 64 for t in manifest.dense if t.role not in classes)
        channels = 4 * sum(layer.n_experts for layer in manifest.moe_layers) * manifest.model.hidden_size
        lines = _PER_TENSOR_BYTES * len(manifest.dense) + _PER_EXPERT_BYTES * len(self._costs.experts)
        graphs = MOST_KINDS * sum(manifest.files[kind.graph].nbytes + 4096 for kind in manifest.expert_kinds)
        return named + kept + channels + lines + graphs + (bundle.root / "manifest.json").stat().st_size

    def least_bytes(self, kind_of: Mapping[ExpertId, int]) -> int:
        """Experts at their fewest bits, and everything that is not quantized."""
        least = [
            min(nbytes for _, nbytes in self._combinations(number).values()) for number in range(len(self._floats))
        ]
        return self.overhead_bytes + sum(least[kind] for kind in kind_of.values())

    def expert_options(self) -> list[list[Option]]:
        """For each expert, every combination of formats that it may have."""
        combinations = [self._combinations(number) for number in range(len(self._floats))]
        parts: list[list[Option]] = []
        for expert, found in self._costs.experts.items():
            kind = self._costs.kind_of[expert]
            options: list[Option] = []
            for label, (combination, nbytes) in combinations[kind].items():
                if not found.reached and min(EXPERT_FORMATS[i].bits for i in combination) < _SAFE_BITS:
                    continue
                loss = self._costs.experts_scale * sum(found.loss(m, c) for m, c in enumerate(combination))
                options.append(Option(label, nbytes, found.share * nbytes, loss, f"{kind}:{label}"))
            parts.append(options)
        return parts

    def _combinations(self, kind: int) -> dict[str, tuple[tuple[int, ...], int]]:
        """By label, which candidate each matrix of such an expert has, and the bytes of its record on disk.

        Where two candidates come to the same format, since rows are shorter than a block, the first counts.
        """
        rows = [inner_side(self._floats[kind], tensor) for tensor in self._matrices[kind]]
        found: dict[str, tuple[tuple[int, ...], int]] = {}
        for combination in itertools.product(range(len(EXPERT_FORMATS)), repeat=len(rows)):
            forms = [EXPERT_FORMATS[i].fitted(k) for i, k in zip(combination, rows, strict=True)]
            label = "+".join(form.label for form in forms)
            if label not in found:
                found[label] = combination, padded(record_bytes(self._floats[kind], forms))
        return found

    def dense_options(self) -> list[list[Option]]:
        return [
            [
                Option(form.label, nbytes, 0.0, loss)
                for form, nbytes, loss in zip(DENSE_FORMATS, costs.nbytes, costs.losses, strict=True)
            ]
            for costs in self._costs.dense.values()
        ]

    def plan(self, chosen: Sequence[Option], limit: int | None, fetched_bytes: float | None) -> QuantizationPlan:
        n_experts = len(self._costs.experts)
        experts, dense = chosen[:n_experts], chosen[n_experts:]
        expert_bytes = sum(option.nbytes for option in experts)
        quantized = expert_bytes + sum(option.nbytes for option in dense)
        return QuantizationPlan(
            size_budget_bytes=limit,
            fetch_budget_bytes=fetched_bytes,
            expected_bytes=quantized + self.overhead_bytes,
            expected_fetched_bytes_per_token=sum(option.fetched_bytes for option in experts),
            expected_kl=sum(option.loss for option in chosen),
            mean_expert_bits=8 * expert_bytes / self._expert_weights,
            mean_bits=8 * quantized / self.n_weights,
            matrices=tuple(tensor.name for tensor in self._matrices[0]),
            dense={
                role: PlannedClass(format=option.label, nbytes=option.nbytes, loss=option.loss)
                for role, option in zip(self._costs.dense, dense, strict=True)
            },
            experts=tuple(
                PlannedExpert(layer=e.layer, expert=e.expert, formats=tuple(o.label.split("+")), loss=o.loss)
                for e, o in zip(self._costs.experts, experts, strict=True)
            ),
        )
