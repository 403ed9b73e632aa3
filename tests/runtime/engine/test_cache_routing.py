"""Preferring experts in memory: against numpy on transformers' own router weights, and against exact routing."""

# pyright: reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import pytest

from pocketmoe.bundle.manifest import MoeLayer
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput
from pocketmoe.runtime.engine.cache_routing import BONUS, ROUTED, CacheAwareRouting, kept, with_bonus
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.run import RunRequest, run_prompt

TEXT = np.random.default_rng(0).integers(2, 500, 120).tolist()
PROMPT = 20


def options(memory: str, strength: float) -> EngineOptions:
    return EngineOptions(MemoryRequest.parse(memory), 200, prefetch="off", prefer_cached=strength)


class Step(NamedTuple):
    """One token in one MoE layer, as the engine had it."""

    layer: int
    residents: np.ndarray
    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray


class Seen(NamedTuple):
    prompt: np.ndarray  # logits
    answer: np.ndarray
    steps: list[Step]
    misses: int
    bytes_read: int
    replaced_share: float


def decode(bundle: Bundle, options: EngineOptions) -> Seen:
    """A prompt, then a fixed text token by token, with every choice noted."""
    steps: list[Step] = []
    residents: dict[int, np.ndarray] = {}
    bonus = CacheAwareRouting.bonus

    def note_residents(self: CacheAwareRouting, layer: int, resident: np.ndarray, on: bool) -> np.ndarray:
        residents[layer] = resident
        return bonus(self, layer, resident, on)

    with pytest.MonkeyPatch.context() as patch, Engine(bundle, options) as engine:
        patch.setattr(CacheAwareRouting, "bonus", note_residents)
        prompt = engine.feed(TEXT[:PROMPT], rows="all")

        def note(layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, _summed: np.ndarray) -> None:
            had = residents.get(layer, np.empty(0))
            steps.append(Step(layer, had, x[0].copy(), ids[0].copy(), weights[0].copy()))

        engine.on_experts = note
        misses, nbytes = engine.stats.misses, engine.stats.bytes_read
        answer = np.concatenate([engine.feed([token]) for token in TEXT[PROMPT:]])
        misses, nbytes = engine.stats.misses - misses, engine.stats.bytes_read - nbytes
        return Seen(prompt, answer, steps, misses, nbytes, engine.cache_routing.replaced_share)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


class Router:
    """A layer's router in numpy: what it judges by (minus infinity: ruled out), and the weights of any choice."""

    def __init__(self, kind: str, weight: np.ndarray, bias: np.ndarray | None) -> None:
        self.kind, self.weight, self.bias = kind, weight, bias

    def judge(self, x: np.ndarray) -> np.ndarray:
        logits = self.weight @ x
        if self.kind == "gpt_oss":
            return logits + self.bias
        if self.kind != "deepseek_v3":
            return logits
        scores = 1 / (1 + np.exp(-logits)) + self.bias
        best_two = np.sort(scores.reshape(2, 4))[:, -2:].sum(1)  # two groups of four experts, one of which is taken
        return np.where(np.repeat(best_two == best_two.max(), 4), scores, -np.inf)

    def weigh(self, x: np.ndarray, ids: np.ndarray) -> np.ndarray:
        logits = self.weight @ x
        if self.kind == "olmoe":
            return softmax(logits)[ids]
        if self.kind == "mixtral":
            return softmax(logits)[ids] / softmax(logits)[ids].sum()
        if self.kind == "gpt_oss":
            return softmax((logits + self.bias)[ids])
        scores = 1 / (1 + np.exp(-logits[ids]))
        return 2.5 * scores / scores.sum()  # transformers' own routed_scaling_factor


def routers(kind: str, checkpoint: Path) -> list[Router]:
    """Of the MoE layers, in order."""
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors: dict[str, np.ndarray] = safetensors.load_file(checkpoint / "model.safetensors")
    names = [name for name in sorted(tensors) if name.endswith((".gate.weight", ".router.weight"))]
    found: list[Router] = []
    for name in names:
        module = name.removesuffix("weight")
        bias = tensors.get(f"{module}bias", tensors.get(f"{module}e_score_correction_bias"))
        found.append(Router(kind, tensors[name].astype(np.float64), bias))
    return found


@pytest.mark.parametrize("kind", ["olmoe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_choice_and_weights_are_what_numpy_makes_of_the_router(
    kind: str, tiny_checkpoint: Callable[[str], Path], tiny_bundle: Callable[[str], Bundle]
) -> None:
    """Softmax before, normalised, after; sigmoid in groups. Every token and layer: the same experts, the same weights.

    The first choice is always the router's; over 30 tokens some others are not, and none out of a group ruled out is.
    """
    bundle, strength = tiny_bundle(kind), 0.4
    layers = routers(kind, tiny_checkpoint(kind))
    assert len(layers) == len(bundle.manifest.moe_layers)
    seen = decode(bundle, options("40%", strength))
    replaced = 0
    for step in seen.steps:
        judged = layers[step.layer].judge(step.x.astype(np.float64))
        finite = judged[np.isfinite(judged)]
        own = np.argsort(-judged)[:2]
        rest = judged + strength * (finite.max() - finite.min()) * step.residents
        rest[own[0]] = np.inf  # kept
        ranked = np.argsort(-rest)
        assert rest[ranked[1]] - rest[ranked[2]] > 1e-5 or rest[ranked[2]] == -np.inf, "too close to tell"
        assert step.ids[0] == own[0]
        assert set(step.ids) == set(ranked[:2])
        assert np.isfinite(judged[step.ids]).all()
        assert np.allclose(step.weights, layers[step.layer].weigh(step.x.astype(np.float64), step.ids), atol=1e-5)
        replaced += len(set(step.ids) - set(own))
    assert replaced >= 10
    assert seen.replaced_share == replaced / sum(step.ids.size for step in seen.steps)


def test_off_it_changes_nothing_and_neither_does_it_to_prompts_or_where_all_fits(
    tiny_bundle: Callable[[str], Bundle],
) -> None:
    """Equal to the bit: an answer with strength 0, a prompt with little memory, an answer with memory for all."""
    bundle = tiny_bundle("olmoe")
    exact = decode(bundle, options("40%", 0.0))
    assert exact.replaced_share == 0
    few = decode(bundle, options("20%", 1.0))
    assert np.array_equal(few.prompt, exact.prompt)
    assert not np.array_equal(few.answer, exact.answer)
    everything = decode(bundle, options("100%", 1.0))
    assert np.array_equal(everything.answer, exact.answer)
    assert everything.replaced_share == 0


def test_the_stronger_the_fewer_reads(tiny_bundle: Callable[[str], Bundle]) -> None:
    """At 40% of the experts, misses and bytes fall with each step of strength; a prompt's last chunk is no answer."""
    bundle = tiny_bundle("olmoe")
    seen = [decode(bundle, options("40%", strength)) for strength in (0.0, 0.2, 1.0)]
    assert seen[0].misses > seen[1].misses > seen[2].misses
    assert seen[0].bytes_read > seen[1].bytes_read > seen[2].bytes_read
    assert seen[2].misses < 0.7 * seen[0].misses
    assert seen[0].replaced_share < seen[1].replaced_share < seen[2].replaced_share <= 0.5  # of two choices one is kept
    with Engine(bundle, options("1%", 1.0)) as engine:
        engine.feed((TEXT * 2)[:129])  # in chunks of 128
        assert engine.cache_routing.choices == 0


def test_backends_prefer_alike(tiny_bundle: Callable[[str], Bundle]) -> None:
    """What numpy says holds for sessions too: the routers are in the segments, which backends share."""
    strong = replace(options("40%", 1.0), backend="sessions")
    assert decode(tiny_bundle("olmoe"), strong).replaced_share > 0.1


def layer(top_k: int) -> MoeLayer:
    names = {name: name for name in ("x", "expert_ids", "expert_weights", "output")}
    return MoeLayer(n_experts=8, top_k=top_k, **names)


def test_a_model_with_one_expert_a_token_is_refused() -> None:
    """It is always the router's first choice; one of several layers is enough to have a choice."""
    with pytest.raises(BadInput, match="one expert"):
        CacheAwareRouting(0.5, [layer(1), layer(1)])
    CacheAwareRouting(0.0, [layer(1)])
    CacheAwareRouting(0.5, [layer(1), layer(2)])
    assert [kept(top_k) for top_k in (1, 2, 3, 4, 8)] == [1, 1, 1, 2, 2]


def router_model(nodes: list[Any], **constants: Any) -> bytes:
    """A model from `logits`, float32 [tokens, 6], to `ids` and `weights`; `k` is 3."""
    onnx = pytest.importorskip("onnx")
    helper, floats, ints = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    known = {"k": np.array([3]), "last": np.array([-1]), **constants}
    graph = helper.make_graph(
        nodes,
        "router",
        [helper.make_tensor_value_info("logits", floats, ["tokens", 6])],
        [
            helper.make_tensor_value_info(name, kind, ["tokens", None])
            for name, kind in (("ids", ints), ("weights", floats))
        ],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in known.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def node(op_type: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    helper = pytest.importorskip("onnx").helper
    return helper.make_node(op_type, inputs.split(), outputs.split(), **attributes)


def test_what_is_made_is_a_valid_model() -> None:
    """By onnx's own checker, which wants nodes in order and types that fit."""
    onnx = pytest.importorskip("onnx")
    made = with_bonus(router_model([node("TopK", "logits k", "weights ids")]), "ids", "weights", 1)
    model = onnx.load_from_string(made)
    for value in model.graph.output[2:]:  # the checker wants a shape, ONNX Runtime does not
        value.type.tensor_type.shape.dim.extend(model.graph.output[0].type.tensor_type.shape.dim)
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["logits", BONUS]
    assert [value.name for value in model.graph.output] == ["ids", "weights", ROUTED]


LEAST = float(np.finfo(np.float32).min)


@pytest.mark.parametrize(
    ("fill", "as_sum"), [(0.0, False), (-np.inf, False), (LEAST, False), (-np.inf, True), (LEAST, True)]
)
def test_what_the_router_rules_out_stays_out(fill: float, as_sum: bool) -> None:
    """Masked to zero, to minus infinity, to the least number, by a Where or a sum: no bonus brings it back."""
    mask = np.array([[True, True, False, False, True, True]])
    if as_sum:
        masking = node("Add", "positive added", "scores")
        added = np.where(mask, 0, fill).astype(np.float32)
    else:
        masking, added = node("Where", "mask positive fill", "scores"), np.zeros(1, np.float32)
    nodes = [node("Sigmoid", "logits", "positive"), masking, node("TopK", "scores k", "weights ids")]
    model = router_model(nodes, mask=mask, fill=np.array(fill, np.float32), added=added)
    logits = np.array([[3, 1, 5, 5, -1, -2], [1, 2, 9, 9, 4, 3]], np.float32)
    bonus = np.array([0, 0, 1, 1, 0, 0.9], np.float32)
    session = ort.InferenceSession(with_bonus(model, "ids", "weights", 1))
    ids, weights, routed = (np.asarray(value) for value in session.run(None, {"logits": logits, BONUS: bonus}))
    assert routed.tolist() == [[0, 1, 4], [4, 5, 1]]
    assert ids.tolist() == [[0, 5, 1], [4, 5, 1]]
    assert np.allclose(weights, 1 / (1 + np.exp(-np.take_along_axis(logits, ids, 1))), atol=1e-6)


def test_without_a_bonus_the_choice_is_the_routers_to_the_bit() -> None:
    """Logits that a softmax makes equal: whichever the router takes is taken, though by logits it would be another."""
    nodes = [node("Softmax", "logits", "scores"), node("TopK", "scores k", "weights ids")]
    model = router_model(nodes)
    logits = np.array([[-200, -150, -120, 0, -1, -130]], np.float32)  # the least underflow to nothing
    own = ort.InferenceSession(model).run(None, {"logits": logits})
    session = ort.InferenceSession(with_bonus(model, "ids", "weights", 2))
    found = session.run(None, {"logits": logits, BONUS: np.zeros(6, np.float32)})
    assert np.array_equal(found[0], own[0])
    assert np.array_equal(found[1], own[1])
    assert np.asarray(found[0])[0, 2] == 0
    preferred = session.run(None, {"logits": logits, BONUS: np.eye(6, dtype=np.float32)[5]})
    assert np.asarray(preferred[0]).tolist() == [[3, 4, 5]]


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        ([node("TopK", "logits k", "weights first"), node("Neg", "first", "ids")], "by Neg"),
        ([node("TopK", "logits k", "weights ids", largest=0)], "largest"),
        ([node("TopK", "logits k", "weights ids", axis=0)], "last axis"),
        ([node("TopK", "logits k", "weights ids", sorted=0)], "in order"),
        ([node("TopK", "logits k", "v ids"), node("Softmax", "logits", "weights")], "do not follow"),
        (
            [node("TopK", "logits k", "v ids"), node("TopK", "logits k", "w i"), node("Add", "v w", "weights")],
            "apart, by TopK",
        ),
    ],
)
def test_other_ways_to_choose_are_refused(nodes: list[Any], why: str) -> None:
    """Each says what is in the way; the engine names the layer."""
    with pytest.raises(ValueError, match=why):
        with_bonus(router_model(nodes), "ids", "weights", 1)


def test_a_layer_that_cannot_is_named(tiny_bundle: Callable[[str], Bundle]) -> None:
    """phimoe takes its experts one after the other, by ArgMax."""
    with pytest.raises(BadInput, match=r"MoE layer 0 cannot prefer experts in memory.*by Concat") as refused:
        Engine(tiny_bundle("phimoe"), options("40%", 0.5))
    assert refused.value.remedy == "Leave --prefer-cached out."


def test_a_run_says_what_was_replaced_and_records_no_trace(
    tiny_bundle: Callable[[str], Bundle], tmp_path: Path
) -> None:
    """The share is in the report; a trace of it would say nothing of other budgets."""
    bundle = tiny_bundle("olmoe").root
    request = RunRequest("Once upon a time", memory=MemoryRequest.parse("20%"), max_tokens=20, prefer_cached=1.0)
    report = run_prompt(bundle, request, on_text=lambda *_: None)
    assert 0 < report.replaced_choices_share <= 0.5
    assert report.dropped_weight_share == 0
    with pytest.raises(BadInput, match="with --prefer-cached the routing depends on this budget"):
        run_prompt(bundle, replace(request, trace=tmp_path / "trace"), on_text=lambda *_: None)
    assert not (tmp_path / "trace").exists()
