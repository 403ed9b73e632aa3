"""Planning: parameters against transformers' own count, bytes against real bundles, and advice that holds together."""

# pyright: reportCallIssue=false

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import padded
from pocketmoe.cli import main
from pocketmoe.errors import BadInput, UnsupportedModel
from pocketmoe.profiles.catalogue import devices
from pocketmoe.profiles.catalogue.devices import find_device
from pocketmoe.profiles.estimate import footprint, shapes
from pocketmoe.profiles.estimate.hit_curve import hit_curve
from pocketmoe.profiles.estimate.roofline import scheme_bits
from pocketmoe.profiles.plan import plan, planning
from pocketmoe.profiles.plan.advice import nothing_fits
from pocketmoe.profiles.plan.planning import PlanRequest, make_plan
from pocketmoe.quantize.algorithms.formats import all_formats
from pocketmoe.quantize.schemes import find_scheme
from pocketmoe.runtime.engine.claims import open_budget
from pocketmoe.runtime.engine.memory_plan import Load, MemoryRequest
from tests.profiles import made_up
from tests.profiles.profiles import write as write_profile

OLMOE: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": False,
    "vocab_size": 50304,
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}


GPT_OSS = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "tie_word_embeddings": False,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def checkpoint(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        (OLMOE, 6.92e9, 1.3e9),
        (QWEN3, 30.5e9, 3.3e9),
        (GPT_OSS, 20.9e9, 3.6e9),
        (GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128}, 116.8e9, 5.1e9),
        (DEEPSEEK_V3, 671e9, 37e9),
    ],
    ids=["olmoe", "qwen3", "gpt-oss-20b", "gpt-oss-120b", "deepseek-v3"],
)
def test_published_parameter_counts(config: dict[str, Any], total: float, active: float) -> None:
    """Within 1% of the totals of the model cards, and 10% of what they call active, by no common rule."""
    shape = shapes.shape_of_config(config, "config.json")
    assert shape.parameters == pytest.approx(total, rel=0.01)
    assert shape.active_parameters == pytest.approx(active, rel=0.1)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("mixtral", {}),
        ("qwen2_moe", {}),
        ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3]}),
        ("granitemoe", {"tie_word_embeddings": True}),
        ("phimoe", {}),
        ("gpt_oss", {}),
        ("deepseek_v2", {"moe_intermediate_size": 1408, "num_experts_per_tok": 6, "first_k_dense_replace": 1}),
        ("deepseek_v3", {}),
        ("glm4_moe", {}),
        ("ernie4_5_moe", {}),
        ("minimax_m2", {}),
    ],
)
def test_parameters_as_transformers_counts_them(model_type: str, settings: dict[str, Any]) -> None:
    """From fields alone within 0.1% of the parameters of the model that transformers builds, without weights."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = CONFIG_MAPPING[model_type](**settings)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    shape = shapes.shape_of_config(json.loads(config.to_json_string(use_diff=False)), "config.json")
    assert shape.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.001)


def test_layers_built_otherwise_are_left_to_who_can_build_them(tmp_path: Path) -> None:
    """A hybrid model is refused from fields alone, and counted on the meta device where transformers is at hand."""
    from transformers import CONFIG_MAPPING

    from pocketmoe.export.checkpoint.counting import count_parameters

    config = CONFIG_MAPPING["qwen3_next"](num_hidden_layers=4, vocab_size=1024)
    directory = checkpoint(tmp_path / "hybrid", json.loads(config.to_json_string(use_diff=False)))
    with pytest.raises(UnsupportedModel, match="cannot be counted"):
        planning.read_model(directory)
    shape, found = planning.read_model(directory, count_parameters)
    assert (shape.moe_layers, shape.experts, shape.top_k) == (4, 512, 10)
    assert shape.expert_parameters == 3 * 2048 * 512
    assert [each.scheme for each in found] == [scheme.name for scheme in footprint.SCHEMES]


def test_bits_are_those_of_the_quantizer() -> None:
    """A scheme's bits per weight are what its blocks take in the quantizer."""
    for scheme in footprint.SCHEMES:
        if scheme.name in ("fp32", footprint.MIXED):
            continue
        recipe = find_scheme(scheme.name)
        for bits, form in (
            (scheme.expert_bits, recipe.experts),
            (scheme.dense_bits, recipe.dense["attention"]),
            (scheme.embedding_bits, recipe.dense["embedding"]),
        ):
            assert form.nbytes(1024, 4096) * 8 / (1024 * 4096) == pytest.approx(bits)


def test_bits_of_a_label_are_those_of_its_format() -> None:
    """Parameters are told from bytes by them: a label that is not understood would count as float32."""
    for form in all_formats():
        assert scheme_bits(form.label) == pytest.approx(8 * form.nbytes(1024, 2048) / (1024 * 2048))
    assert scheme_bits("int4-b64 + nf4-b32") == (4.5 + 5) / 2
    assert scheme_bits("fp32") == 32


def test_bytes_and_the_fixed_part_are_those_of_a_bundle(tiny_bundle: Callable[[str], Bundle]) -> None:
    """Experts and dense weights to the byte; what the runtime claims beside the process, within a tenth or 2 MB."""
    bundle = tiny_bundle("olmoe")
    (found, *_) = footprint.footprints_of_bundle(bundle)
    dense = sum(tensor.nbytes for tensor in bundle.manifest.dense)
    with bundle.open_store() as store:
        assert found.routed_bytes == sum(padded(record.nbytes) for record in store.records.values())
    assert found.dense_bytes + found.mapped_bytes == pytest.approx(dense, rel=0.001)
    claims = open_budget(MemoryRequest(expert_share=0.0), bundle.manifest, Load(256, 128)).claims
    claimed = sum(nbytes for what, nbytes in claims.items() if what not in ("process", "loading"))
    ours = found.fixed_bytes(256) - 66_000_000  # Python and what else is there before a model
    assert ours == pytest.approx(claimed, rel=0.1, abs=2e6)


@pytest.mark.parametrize("device", ["pi5-8gb", "laptop-16gb", "agx-orin-64gb"])
def test_more_memory_is_never_slower_and_what_fits_fits(tmp_path: Path, device: str) -> None:
    """Speed and hits grow with the budget; a recommendation fits the device; its words are bigrig's."""
    report = make_plan(PlanRequest(checkpoint(tmp_path / "olmoe", OLMOE), device))
    assert report.recommended in report.candidates
    for candidate in report.candidates:
        assert candidate.fits == (candidate.memory_bytes <= report.usable_memory_bytes)
    for scheme in ("fp32", "int8", "int4"):
        rows = sorted(
            (c for c in report.candidates if (c.scheme, c.kv) == (scheme, "float32")), key=lambda c: c.memory_bytes
        )
        for less, more in itertools.pairwise(rows):
            assert more.speed.tokens_per_s >= less.speed.tokens_per_s * 0.999
            assert more.speed.hit_rate >= less.speed.hit_rate
            assert more.speed.read_bytes_per_token <= less.speed.read_bytes_per_token
    assert [plan.verdict_of(rate) for rate in (15, 14.9, 8, 3, 2.9)] == ["fast", "good", "good", "usable", "slow"]


def test_a_decode_step_by_hand(tmp_path: Path) -> None:
    """All experts in memory: bytes over what int4 and int8 stream at, and what each layer takes.

    The laptop: 89.6 GB/s of bus, two thirds of which stream, 3.379e12 operations per second. With a quarter in memory
    the reads come on top.
    """
    shape, found = planning.read_model(checkpoint(tmp_path / "olmoe", OLMOE))
    int4 = next(each for each in found if each.scheme == "int4")
    machine = plan.machine_of_device("laptop-16gb", find_device("laptop-16gb"))
    hits = hit_curve(shape)
    memory, weights = 0.67 * 89.6e9, 3.379e12 / 2
    experts = 16 * 8 * 3 * 2048 * 1024 * 4.5625 / 8
    dense = (16 * 4 * 2048 * 2048 + 50304 * 2048) * 8.5 / 8 + 4 * (16 * 64 * 2048 + 33 * 2048)
    compute_s = experts / memory + experts * 8 / 4.5625 / (0.45 * weights)
    compute_s += dense / memory + dense / 8.5 * 8 / (0.8 * weights)
    compute_s += 16 * (0.00018 + 0.000163)
    compute_s += 128 * 16 * 2 * 2048 * 4 / (0.25 * memory)  # keys and values of the prompt
    full = plan.predict(int4, 1.0, hits, machine, 128)
    assert full.hit_rate == 1
    assert 1 / full.tokens_per_s == pytest.approx(compute_s, rel=0.01)
    quarter = plan.predict(int4, 0.25, hits, machine, 128)
    assert 0.5 < quarter.hit_rate < 0.8  # .61 to .63 were measured on OLMoE (docs/LOG.md)
    read_s = quarter.read_bytes_per_token / machine.disk_bytes_per_s(int4.expert_bytes)
    assert 1 / quarter.tokens_per_s < compute_s + read_s
    assert 1 / quarter.tokens_per_s > max(compute_s, read_s)


def test_what_would_do_would_do(tmp_path: Path) -> None:
    """With the memory, or with the disk, that the advice names, the target is reached; with a tenth less it is not."""
    path = checkpoint(tmp_path / "olmoe", OLMOE)
    target = 5.0
    report = make_plan(PlanRequest(path, "pi5-8gb-microsd", target, reserve_bytes=7_600_000_000))
    assert report.recommended is None
    remedy = report.remedy
    assert remedy is not None
    assert remedy.memory_bytes is not None
    error = nothing_fits(report)
    assert error.exit_code == 4
    assert f"{remedy.memory_bytes / 1e9:.2f} GB" in error.one_line()
    shape, found = planning.read_model(path)
    hits, machine = hit_curve(shape), plan.machine_of_device("x", find_device("pi5-8gb-microsd"), 7_600_000_000)
    fastest = next(each for each in found if each.scheme == remedy.scheme)
    fastest = fastest.with_int8_caches() if remedy.kv == "int8" else fastest
    usable = remedy.memory_bytes - 7_600_000_000

    def speed(memory: float) -> float:
        share = fastest.share_in(memory, 2048)
        return plan.predict(fastest, share, hits, machine, 128).tokens_per_s if share >= 0 else 0

    assert speed(usable) >= target
    assert speed(usable * 0.9) < target


def test_weights_as_trained_are_never_advised_for_a_checkpoint(tmp_path: Path) -> None:
    """Not even where they are the best that reaches the target; each choice is the best in its way."""
    report = make_plan(PlanRequest(checkpoint(tmp_path / "olmoe", OLMOE), "thor-128gb", 1.0))
    advice = report.advice
    assert advice.fastest is not None
    assert advice.best_quality is not None
    assert advice.least_memory is not None
    assert report.recommended == advice.best_quality
    assert advice.best_quality.scheme == "int8"
    usable = [c for c in report.candidates if c.fits and c.scheme != "fp32" and c.speed.tokens_per_s >= 1.0]
    assert advice.least_memory.memory_bytes == min(c.memory_bytes for c in usable)
    assert advice.fastest.speed.tokens_per_s >= 0.95 * max(c.speed.tokens_per_s for c in usable)


def test_ranges_hold_their_middle(tmp_path: Path) -> None:
    """Of speed, first token and hits, and hits are those of several traces."""
    report = make_plan(PlanRequest(checkpoint(tmp_path / "qwen3", QWEN3), "laptop-8gb", context_tokens=10**6))
    assert (report.context_tokens, report.asked_context_tokens) == (40960, 10**6)
    for speed in (candidate.speed for candidate in report.candidates):
        assert speed.tokens_per_s_low < speed.tokens_per_s < speed.tokens_per_s_high
        assert speed.ttft_s_low < speed.ttft_s < speed.ttft_s_high
        assert speed.hit_rate_low <= speed.hit_rate <= speed.hit_rate_high


def test_several_texts_at_once_take_the_memory_of_each(tmp_path: Path) -> None:
    """Four texts take three times a text's caches more, and a little for each of them."""
    path = checkpoint(tmp_path / "olmoe", OLMOE)
    one, four = (make_plan(PlanRequest(path, "laptop-8gb", sequences=count)) for count in (1, 4))
    caches = 4 * 2 * 16 * 2048 * one.context_tokens  # keys and values of 16 layers, float32
    for alone, together in zip(one.candidates, four.candidates, strict=False):
        if (alone.scheme, alone.kv) == (together.scheme, together.kv) and alone.share == together.share:
            assert 0 < together.memory_bytes - alone.memory_bytes - 3 * caches < 20_000_000
            break
    else:
        pytest.fail("no candidate of the same share")
    assert (one.sequences, four.sequences) == (1, 4)


def test_devices_have_names_in_any_case_and_are_added_by_a_file(tmp_path: Path) -> None:
    """A file of one more device; a misspelt name is answered with those most alike; `this` is listed."""
    path = checkpoint(tmp_path / "olmoe", OLMOE)
    assert make_plan(PlanRequest(path, "PI5-8GB")).device == "pi5-8gb"
    known = Path(devices.__file__).with_name("devices.toml").read_text()
    more = tmp_path / "devices.toml"
    more.write_text("[my-box]\n" + known[known.index("title = ") :].split("\n[", 1)[0].replace("8 GB", "of my own", 1))
    report = make_plan(PlanRequest(path, "My-Box", devices=more))
    assert report.device_title == "Raspberry Pi 5, of my own, NVMe disk"
    profile = write_profile(tmp_path, made_up.profile())
    found = CliRunner().invoke(main, ["profile", str(profile), "--predict", "MY-BOX", "--devices", str(more), "--json"])
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["predictions"][0]["title"] == "Raspberry Pi 5, of my own, NVMe disk"
    with pytest.raises(BadInput, match="no device is named") as caught:
        make_plan(PlanRequest(path, "pi5-8g"))
    assert "Did you mean pi5-8gb" in caught.value.one_line()
    assert "this, " in caught.value.one_line()


def test_a_dense_model_is_told_apart_without_building_it(tmp_path: Path) -> None:
    dense = {name: value for name, value in OLMOE.items() if "experts" not in name}

    def count(_path: Path) -> dict[str, int]:
        raise AssertionError("asked to build it")

    with pytest.raises(UnsupportedModel, match="dense model"):
        make_plan(PlanRequest(checkpoint(tmp_path / "dense", dense), "pi5-8gb"), count)


def test_a_hub_model_is_planned_by_its_configuration_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for by its id; without a network one line says so."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    asked = []

    def download(name: str, file: str, **_: Any) -> str:
        asked.append((name, file))
        if file == "manifest.json":
            raise EntryNotFoundError("a checkpoint")
        return str(checkpoint(tmp_path / "0123abcd", OLMOE) / file)

    def fail(_name: str, _file: str, **_: Any) -> str:
        raise LocalEntryNotFoundError("no network")

    command = ["plan", "allenai/OLMoE-1B-7B-0924", "--device", "pi5-8gb", "--json"]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = CliRunner().invoke(main, command)
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["model"] == "allenai/OLMoE-1B-7B-0924"
    assert asked == [("allenai/OLMoE-1B-7B-0924", file) for file in ("manifest.json", "config.json")]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    found = CliRunner().invoke(main, command)
    assert (found.exit_code, found.stdout) == (3, "")
    assert len(found.stderr.strip().splitlines()) == 1


def test_a_bundle_is_planned_in_its_own_scheme(tiny_bundle: Callable[[str], Bundle]) -> None:
    """An unquantized bundle may be quantized, and that is advised; nothing has to be downloaded or exported."""
    report = make_plan(PlanRequest(tiny_bundle("olmoe").root, "pi5-8gb"))
    assert report.predicted
    assert report.counted_from == "the bundle"
    assert {candidate.scheme for candidate in report.candidates} == {scheme.name for scheme in footprint.SCHEMES}
    assert report.recommended is not None
    assert report.recommended.scheme == "int8"
    assert report.making is None


def test_a_bundle_with_int8_caches_takes_what_they_take(tiny_bundle: Callable[[str], Bundle], tmp_path: Path) -> None:
    """A manifest that says int8 counts one byte a value, not four, and is offered no int8 caches again."""
    bundle = tiny_bundle("olmoe")
    (full, *_) = footprint.footprints_of_bundle(bundle)
    states = tuple(msgspec.structs.replace(state, dtype="int8") for state in bundle.manifest.states)
    kinds = tuple(msgspec.structs.replace(kind, scheme="int4-b32-asym") for kind in bundle.manifest.expert_kinds)
    quantized = Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, states=states, expert_kinds=kinds))
    (found,) = footprint.footprints_of_bundle(quantized)
    assert found.kv == "int8"
    assert 4 * found.cache_bytes(1000) == full.cache_bytes(1000) == full.with_int8_caches().cache_bytes(1000) * 4
    assert plan.with_int8_caches([found], 100_000) == [found]


def test_int8_caches_are_offered_where_caches_are_much(tmp_path: Path) -> None:
    """After the same scheme without them, in less memory; not for a short text, nor for latents, which they are not."""
    path = checkpoint(tmp_path / "olmoe", OLMOE)
    short, long = (make_plan(PlanRequest(path, "laptop-16gb", context_tokens=n)) for n in (64, 4096))
    assert {c.kv for c in short.candidates} == {"float32"}
    pairs = [
        (full, small)
        for full, small in itertools.product(long.candidates, repeat=2)
        if (full.kv, small.kv) == ("float32", "int8") and (full.scheme, full.share) == (small.scheme, small.share)
    ]
    assert {full.scheme for full, _ in pairs} == {s.name for s in footprint.SCHEMES} - {"fp32"}
    saved = 3 * 2 * 16 * 2048 * 4096  # of keys and values in float32, of 16 layers
    assert all(abs(full.memory_bytes - small.memory_bytes - saved) < 1e6 for full, small in pairs if full.share == 1)
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    report = make_plan(PlanRequest(checkpoint(tmp_path / "latent", OLMOE | latent), "laptop-16gb", context_tokens=4096))
    assert {c.kv for c in report.candidates} == {"float32"}


def test_four_bit_floats_are_the_size_of_int4_and_slower(tmp_path: Path) -> None:
    """An expert in nf4 takes tens of times as long, as measured (docs/quantization.md): nothing but size is alike."""
    report = make_plan(PlanRequest(checkpoint(tmp_path / "olmoe", OLMOE), "laptop-16gb"))
    best = {c.scheme: c for c in report.candidates if c.share == 1 and c.kv == "float32"}
    assert best["nf4"].bundle_bytes == pytest.approx(best["int4"].bundle_bytes, rel=0.03)
    assert 2 < best["int4"].speed.tokens_per_s / best["nf4"].speed.tokens_per_s < 40
    advice = report.advice
    assert "nf4" not in {c.scheme for c in (advice.fastest, advice.best_quality, advice.least_memory) if c}


def test_without_a_target_what_can_be_reached_is_aimed_at(tmp_path: Path) -> None:
    """8 tokens/s, else 3, else the fastest there is, and then nothing is called the best at a target."""
    path, small = checkpoint(tmp_path / "qwen3", QWEN3), checkpoint(tmp_path / "olmoe", OLMOE)
    aims = {
        device: make_plan(PlanRequest(model, device)).advice
        for model, device in ((small, "laptop-16gb"), (path, "laptop-8gb"), (path, "pi5-4gb"))
    }
    assert [advice.aimed_tokens_per_s for advice in aims.values()] == [8, 3, 0]
    assert aims["pi5-4gb"].best_quality is None
    assert aims["pi5-4gb"].fastest is not None
    assert make_plan(PlanRequest(path, "pi5-4gb")).recommended == aims["pi5-4gb"].fastest


def test_what_getting_a_bundle_takes(tmp_path: Path) -> None:
    """The download by the type that config.json names, none where the weights are here; disk for all of it."""
    sizes: dict[str, int] = {}
    for name, settings in (
        ("bf16", {"torch_dtype": "bfloat16"}),
        ("float32", {"dtype": "float32"}),
        ("fp8", {"quantization_config": {"quant_method": "fp8"}}),
        ("nothing", {}),
    ):
        found = make_plan(PlanRequest(checkpoint(tmp_path / name, OLMOE | settings), "laptop-16gb"))
        making = found.making
        assert making is not None
        assert found.recommended is not None
        assert making.disk_bytes == making.download_bytes + found.recommended.bundle_bytes
        assert 0 < making.export_s_low < making.export_s_high
        sizes[name] = making.download_bytes
    assert sizes["bf16"] == sizes["nothing"] == 2 * sizes["fp8"] == sizes["float32"] / 2
    (tmp_path / "bf16/model.safetensors").write_bytes(b"0" * 1000)
    making = make_plan(PlanRequest(tmp_path / "bf16", "laptop-16gb")).making
    assert making is not None
    assert (making.download_bytes, making.checkpoint_bytes) == (0, 1000)


@pytest.mark.parametrize("columns", ["80", "200"])
@pytest.mark.parametrize(
    ("device", "target"), [("laptop-16gb", None), ("pi5-4gb", None), ("pi5-8gb-microsd", 50), ("thor-128gb", None)]
)
def test_the_answer_comes_first_within_eighty_columns(
    tmp_path: Path, device: str, target: int | None, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sentence with scheme, budget and speed, or with what would do; the rule and the words are explained below."""
    monkeypatch.setenv("COLUMNS", columns)
    path = checkpoint(tmp_path / "qwen3", QWEN3)
    asked = ["--target-tokens-per-s", str(target)] if target else []
    found = CliRunner().invoke(main, ["plan", str(path), "--device", device, *asked])
    lines = found.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    first = " ".join(lines[:3])
    if target:
        assert found.exit_code == 4
        assert "would" in first
    else:
        assert found.exit_code == 0
        assert first.startswith(f"On {device}, take ")
        assert "--memory" in first
        assert "the reference model of 12.8 million parameters" in found.stdout.replace("\n", " ")
    for word in ("fast from 15", "good from 8", "usable from 3", "slow below"):
        assert word in found.stdout.replace("\n", " ")
    assert not any(line.split()[:1] == ["fp32"] for line in lines)
    refuse_idle_rows(lines)


def refuse_idle_rows(lines: list[str]) -> None:
    """A scheme that is slow at its best has one row where others are not; none stands twice with the same figures."""
    begin = next(number for number, line in enumerate(lines) if line.split()[:2] == ["scheme", "experts"])
    rows = [line.split() for line in lines[begin + 1 : lines.index("", begin)]]
    verdicts = {row[0]: [other[-1] for other in rows if other[0] == row[0]] for row in rows}
    if any(row[-1] in ("fast", "good", "usable") for row in rows):
        assert all(len(found) == 1 for found in verdicts.values() if {*found} == {"slow"})
    same = [(row[0].removesuffix("+kv8"), row[2], row[3]) for row in rows]
    assert len({*same}) == len(same)


def test_a_device_that_has_too_little_memory_is_told_how_much_would_do(tmp_path: Path) -> None:
    """How much would run it at all, and how fast then; nothing of a target that nobody set."""
    path = checkpoint(tmp_path / "qwen3", QWEN3)
    report = make_plan(PlanRequest(path, "pi5-4gb", reserve_bytes=3_500_000_000))
    error = nothing_fits(report)
    remedy = report.remedy
    assert remedy is not None
    assert f"{remedy.least_memory_bytes / 1e9:.2f} GB of memory in all would run it" in error.one_line()
    more = make_plan(PlanRequest(path, "pi5-4gb", reserve_bytes=3_500_000_000 - remedy.least_memory_bytes + 4 * 2**30))
    assert more.recommended is not None
    with pytest.raises(BadInput, match="leave nothing"):
        make_plan(PlanRequest(path, "pi5-4gb", reserve_bytes=9_000_000_000))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "hidden_size"),
        (json.dumps(OLMOE | {"num_experts": 1}), "not of a mixture"),
        (json.dumps(OLMOE | {"hidden_size": "big"}), "hidden_size"),
        (json.dumps(OLMOE | {"num_experts": None, "num_experts_per_tok": None}), "num_experts"),
        (json.dumps(OLMOE | {"hidden_size": -5}), "hidden_size"),
        (None, "cannot be read"),
    ],
)
def test_bad_configurations_are_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadInput) as caught:
        planning.read_model(tmp_path)
    assert words in caught.value.one_line()
    assert caught.value.exit_code == 3
