"""Train the reference model: a small OlmoeForCausalLM, on CPU, resumable.

Usage: ``python train.py`` after corpus.py and tokenizer.py. The run is a function of the step alone (data,
schedule, seed); an interrupted run continues from work/state.safetensors when the command is given again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fast_experts
import torch
from data import Batches
from optimizer import make_optimizers, restore, state_tensors
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, OlmoeConfig, OlmoeForCausalLM

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of the run."""

    seed: int = 20260
    steps: int = 670
    batch: int = 16
    length: int = 256
    adam_rate: float = 2.5e-3
    muon_rate: float = 4e-3
    final_factor: float = 0.02
    warmup: int = 60
    decay_start: int = 350
    weight_decay: float = 0.1
    clip: float = 1.0
    balance: float = 0.02
    z_loss: float = 0.001


def model_config(vocab: int, eos: int, pad: int) -> OlmoeConfig:
    """The architecture: 6 layers of 32 experts, 4 active."""
    return OlmoeConfig(
        vocab_size=vocab,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_experts=32,
        num_experts_per_tok=4,
        max_position_embeddings=1024,
        norm_topk_prob=False,
        tie_word_embeddings=False,
        router_aux_loss_coef=0.01,
        eos_token_id=eos,
        pad_token_id=pad,
        bos_token_id=None,
    )


def rate_factor(recipe: Recipe, step: int) -> float:
    """The learning rates relative to their peaks: warm-up, a plateau, then a cosine to the final factor."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    start = recipe.decay_start
    if step < start:
        return 1.0
    part = min(1.0, (step - start) / (recipe.steps - start))
    return recipe.final_factor + (1 - recipe.final_factor) * 0.5 * (1 + math.cos(math.pi * part))


class RouterLosses:
    """Collects router logits by forward hooks and turns them into the auxiliary losses.

    The balance is taken per layer (a loss pooled over the layers would let single layers collapse) and over
    the whole batch (which mixes the kinds, so experts may still specialise in a kind).
    """

    def __init__(self, model: OlmoeForCausalLM, top_k: int) -> None:
        self.logits: list[torch.Tensor] = []
        self.indices: list[torch.Tensor] = []
        self.top_k = top_k
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._keep)

    def _keep(self, _module: torch.nn.Module, _inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        self.logits.append(output[0])
        self.indices.append(output[2])

    def take(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(balance loss, z loss, largest expert share times E) of the last forward; clears the record."""
        balance, z_loss, worst = [], [], 0.0
        for logits, index in zip(self.logits, self.indices, strict=True):
            logits = logits.float()
            experts = logits.shape[-1]
            share = torch.bincount(index.reshape(-1), minlength=experts).float() / index.numel()
            balance.append(experts * (share * logits.softmax(-1).mean(0)).sum())
            z_loss.append(logits.logsumexp(-1).square().mean())
            worst = max(worst, float(share.max()) * experts)
        self.logits.clear()
        self.indices.clear()
        return torch.stack(balance).mean(), torch.stack(z_loss).mean(), worst


def save_state(path: Path, tensors: dict[str, torch.Tensor], notes: dict[str, Any]) -> None:
    """The tensors and the notes in one safetensors file, replaced atomically."""
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"notes": json.dumps(notes)})
    partial.replace(path)


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What :func:`save_state` wrote."""
    with safe_open(path, "pt") as state:
        return {name: state.get_tensor(name) for name in state.keys()}, json.loads(state.metadata()["notes"])  # noqa: SIM118


def export(model: OlmoeForCausalLM, tokenizer_folder: Path, out: Path) -> None:
    """Write a bf16 checkpoint folder that AutoModelForCausalLM and AutoTokenizer load."""
    out.mkdir(parents=True, exist_ok=True)
    copy = OlmoeForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id, max_new_tokens=128
    )
    copy.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        source = tokenizer_folder / name
        if source.resolve() != (out / name).resolve():
            (out / name).write_bytes(source.read_bytes())


@torch.no_grad()
def heldout_loss(model: OlmoeForCausalLM, batches: dict[str, torch.Tensor]) -> dict[str, float]:
    """Mean loss per kind in nats per token; batches hold (N, length + 1) token ids."""
    losses = {}
    for kind, batch in batches.items():
        logits = model(batch[:, :-1]).logits.float()
        losses[kind] = float(functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
    return losses


def heldout_batches(tokenizer: Any, length: int, windows: int) -> dict[str, torch.Tensor]:
    """The first windows of every held-out file: kind -> (windows, length + 1)."""
    batches = {}
    for path in sorted((HERE / "heldout").glob("*.txt")):
        ids = torch.tensor(tokenizer(path.read_text(), verbose=False)["input_ids"])
        starts = torch.linspace(0, len(ids) - length - 1, windows).long().tolist()
        batches[path.stem] = torch.stack([ids[s : s + length + 1] for s in starts])
    return batches


def train_step(
    model: OlmoeForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    router: RouterLosses,
    batch: torch.Tensor,
    recipe: Recipe,
    step: int,
) -> tuple[float, float, float]:
    """One update on batch (B, length + 1); returns (language loss, balance loss, worst expert load)."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate_factor(recipe, step)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch[:, :-1], use_cache=False).logits
    loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    balance, z_loss, worst = router.take()
    total = loss + recipe.balance * balance + recipe.z_loss * z_loss
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item(), balance.item(), worst


def run(options: argparse.Namespace, recipe: Recipe) -> None:
    """Train to the last step, saving and reporting on the way."""
    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "checkpoint")
    model = OlmoeForCausalLM(model_config(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id))
    model.set_experts_implementation(fast_experts.register())
    model.train()
    optimizers = make_optimizers(model, recipe.adam_rate, recipe.muon_rate, recipe.weight_decay)
    router = RouterLosses(model, model.config.num_experts_per_tok)
    data = Batches(options.work / "tokens", recipe.length, recipe.batch, recipe.seed)
    checks = heldout_batches(tokenizer, recipe.length, 12)
    state = options.work / "state.safetensors"
    notes: dict[str, Any] = {"step": 0, "seconds": 0.0, "recipe": asdict(recipe), "history": []}
    if state.exists():
        tensors, notes = load_state(state)
        restore(model, optimizers, tensors)
    notes["recipe"] = asdict(recipe)
    clock = time.monotonic() - notes["seconds"]
    recent: list[float] = []
    for step in range(notes["step"], min(recipe.steps, options.until)):
        loss, balance, worst = train_step(model, optimizers, router, data.batch(step), recipe, step)
        recent = [*recent[-49:], loss]
        done = step + 1
        if done % 10 == 0:
            seconds = time.monotonic() - clock
            mean = sum(recent) / len(recent)
            figures = f"loss {mean:.3f} balance {balance:.3f} worst load {worst:.2f}"
            sys.stderr.write(f"{done}/{recipe.steps} {seconds:.0f}s {figures}\n")
        if done % options.every == 0 or done in (recipe.steps, options.until):
            losses = heldout_loss(model, checks)
            router.take()
            notes["history"].append({"step": done, "train": sum(recent) / len(recent), "heldout": losses})
            notes.update(step=done, seconds=time.monotonic() - clock, epochs=data.epochs(done))
            sys.stderr.write(json.dumps(notes["history"][-1]) + "\n")
            save_state(state, state_tensors(model, optimizers), notes)
            export(model, HERE / "checkpoint", options.work / "snapshot")
    if notes["step"] == recipe.steps:
        export(model, HERE / "checkpoint", options.out)
        notes["tokens"] = recipe.steps * recipe.batch * recipe.length
        (HERE / "training.json").write_text(json.dumps(notes, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="the work folder of corpus.py")
    parser.add_argument("--out", type=Path, default=HERE / "checkpoint", help="where the finished model goes")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--every", type=int, default=200, help="steps between saved states")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="length of the run")
    parser.add_argument("--until", type=int, default=10**9, help="stop here, to be resumed later")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run(options, Recipe(steps=options.steps))


if __name__ == "__main__":
    main()
