"""Train the reference model: a small OlmoeForCausalLM, on CPU, resumable.

Usage: ``python train.py`` after corpus.py and tokenizer.py. The run is a function of the step alone (data,
schedule, seed); an interrupted run continues from work/state.safetensors when the command is given again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, OlmoeConfig, OlmoeForCausalLM

import fast_experts
from data import Batches

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of the run."""

    seed: int = 20260
    steps: int = 2600
    batch: int = 16
    length: int = 256
    peak_rate: float = 2.5e-3
    final_rate: float = 5e-5
    warmup: int = 100
    decay_from: float = 0.6
    weight_decay: float = 0.1
    clip: float = 1.0
    balance: float = 0.01
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


def learning_rate(recipe: Recipe, step: int) -> float:
    """Warm-up, a plateau, then a cosine down to the final rate."""
    if step < recipe.warmup:
        return recipe.peak_rate * (step + 1) / recipe.warmup
    start = int(recipe.decay_from * recipe.steps)
    if step < start:
        return recipe.peak_rate
    part = min(1.0, (step - start) / (recipe.steps - start))
    return recipe.final_rate + (recipe.peak_rate - recipe.final_rate) * 0.5 * (1 + math.cos(math.pi * part))


class RouterLosses:
    """Collects router logits by forward hooks and turns them into the auxiliary losses.

    The balance is taken per layer (a loss pooled over the layers would let single layers collapse) and over the
    whole batch (which mixes the kinds, so experts may still specialise in a kind).
    """

    def __init__(self, model: OlmoeForCausalLM, top_k: int) -> None:
        self.logits: list[torch.Tensor] = []
        self.indices: list[torch.Tensor] = []
        self.top_k = top_k
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        self.logits.append(output[0])
        self.indices.append(output[2])

    def take(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(balance loss, z loss, largest expert share times E) of the last forward pass; clears the record."""
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


def make_optimizer(model: OlmoeForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def save_state(path: Path, model: OlmoeForCausalLM, optimizer: torch.optim.AdamW, notes: dict[str, Any]) -> None:
    """Parameters, both moments and the notes in one safetensors file, replaced atomically."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"notes": json.dumps(notes)})
    os.replace(partial, path)


def load_state(path: Path, model: OlmoeForCausalLM, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """Restore what :func:`save_state` wrote; returns the notes."""
    with safe_open(path, "pt") as state:
        notes: dict[str, Any] = json.loads(state.metadata()["notes"])
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                parameter.copy_(state.get_tensor(f"model.{name}"))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(notes["step"])),
                "exp_avg": state.get_tensor(f"exp_avg.{name}"),
                "exp_avg_sq": state.get_tensor(f"exp_avg_sq.{name}"),
            }
    return notes


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
    optimizer: torch.optim.AdamW,
    router: RouterLosses,
    batch: torch.Tensor,
    recipe: Recipe,
    step: int,
) -> tuple[float, float, float]:
    """One update on batch (B, length + 1); returns (language loss, balance loss, worst expert load)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch[:, :-1], use_cache=False).logits
    loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    balance, z_loss, worst = router.take()
    total = loss + recipe.balance * balance + recipe.z_loss * z_loss
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
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
    optimizer = make_optimizer(model, recipe)
    router = RouterLosses(model, model.config.num_experts_per_tok)
    data = Batches(options.work / "tokens", recipe.length, recipe.batch, recipe.seed)
    checks = heldout_batches(tokenizer, recipe.length, 12)
    state = options.work / "state.safetensors"
    notes: dict[str, Any] = {"step": 0, "seconds": 0.0, "recipe": asdict(recipe), "history": []}
    if state.exists():
        notes = load_state(state, model, optimizer)
    notes["recipe"] = asdict(recipe)
    clock = time.monotonic() - notes["seconds"]
    recent: list[float] = []
    for step in range(notes["step"], min(recipe.steps, options.until)):
        loss, balance, worst = train_step(model, optimizer, router, data.batch(step), recipe, step)
        recent = [*recent[-49:], loss]
        done = step + 1
        if done % 25 == 0:
            seconds = time.monotonic() - clock
            mean = sum(recent) / len(recent)
            sys.stderr.write(f"{done}/{recipe.steps} {seconds:.0f}s loss {mean:.3f} balance {balance:.3f} {worst:.2f}\n")
        if done % options.every == 0 or done in (recipe.steps, options.until):
            losses = heldout_loss(model, checks)
            router.take()
            notes["history"].append({"step": done, "train": sum(recent) / len(recent), "heldout": losses})
            notes.update(step=done, seconds=time.monotonic() - clock, epochs=data.epochs(done))
            sys.stderr.write(json.dumps(notes["history"][-1]) + "\n")
            save_state(state, model, optimizer, notes)
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
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="length of the run (shapes the schedule)")
    parser.add_argument("--until", type=int, default=10**9, help="stop here, to be resumed later")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run(options, Recipe(steps=options.steps))


if __name__ == "__main__":
    main()
