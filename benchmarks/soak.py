"""A long run: is memory flat over 20,000 generated tokens at a quarter of the experts, and are the tokens the same?

    python benchmarks/soak.py BUNDLE [--tokens 20000] [--share 0.25] [--text FILE ...] [--plot docs/soak.svg]

Needs root. One process generates, at temperature 1 with a fixed seed, texts as long as the model's context, each from
the next 64 tokens of the held-out texts, in a memory cgroup of exactly its budget. Every 50 tokens it notes what its
cgroup holds and cannot give back: anonymous and shared memory, so slots, but no mapped files. The slope is that of a
line through all samples after the first two texts, by which time every slot and every buffer has been used. A second
process does the same with room for every expert. Exits 1 when the tokens differ or memory grows by more than 1 MB in
as many tokens again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
from machine import THREADS, command_line, run_cold
from plot import Line, Plot, write_svg

from pocketmoe.bundle.reader import Bundle
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.sampling import Sampling, make_sampler
from pocketmoe.runtime.tokenizer import Text
from pocketmoe.system.memory import major_faults

HELD_OUT = Path(__file__).parent.parent / "models" / "reference" / "heldout"
PROMPT = 64
EVERY = 50
HEAD = (
    "experts in memory", "budget MB", "cgroup peak MB", "counted peak MB", "held MB, settled", "bytes per 1000 tokens",
    "hits", "tokens/s, first and last quarter", "major faults", "tokens' hash",
)  # fmt: skip
MOST_GROWTH_BYTES = 1_000_000  # in as many tokens again


def held_bytes() -> int:
    """What this process's cgroup holds and cannot give back: anonymous and shared memory, slots counted once."""
    lines = [line.split(":") for line in Path("/proc/self/cgroup").read_text().splitlines()]
    controller, path = next(line[1:] for line in lines if line[1] in ("", "memory"))
    stat = Path("/sys/fs/cgroup", controller, path.lstrip("/"), "memory.stat").read_text().splitlines()
    fields = {name: int(value) for name, value in (line.split() for line in stat)}
    return fields["rss" if controller else "anon"] + fields["shmem"]


def prompts(text: Text, files: list[Path]) -> list[list[int]]:
    """Pieces of `PROMPT` tokens, from each file in turn."""
    ids = [text.encode(file.read_text(encoding="utf-8")) for file in files]
    pieces = [[part[start : start + PROMPT] for start in range(0, len(part) - PROMPT, PROMPT)] for part in ids]
    return [piece for together in zip(*pieces, strict=False) for piece in together]


def generate(bundle: Bundle, memory: MemoryRequest, tokens: int, files: list[Path]) -> dict:
    """Texts one after the other until there are so many generated tokens; figures, samples and the tokens' hash."""
    capacity = bundle.manifest.model.context_length
    samples: list[tuple[int, int, float]] = []
    digest, done, starts = hashlib.sha256(), 0, []
    with Engine(bundle, EngineOptions(memory, capacity, THREADS)) as engine:
        began = time.perf_counter()
        for number, prompt in enumerate(prompts(Text(bundle), files) if tokens else []):
            starts.append(done)
            sample = make_sampler(Sampling(temperature=1.0, seed=number))
            engine.reset()
            logits = engine.feed(prompt)[-1]
            for _ in range(min(capacity - PROMPT, tokens - done)):
                token = sample(logits)
                digest.update(token.to_bytes(4, "little"))
                logits = engine.feed([token])[-1]
                done += 1
                if done % EVERY == 0:
                    samples.append((done, held_bytes(), time.perf_counter() - began))
            if done == tokens:
                break
        return {
            "tokens": done,
            "texts": len(starts),
            "sha256": digest.hexdigest(),
            "budget_bytes": engine.budget.total_bytes,
            "counted_peak_bytes": engine.budget.peak_bytes,
            "hit_rate": engine.stats.hit_rate,
            "bytes_read": engine.stats.bytes_read,
            "major_faults": major_faults(),
            "settled_after": starts[min(2, len(starts) - 1)] if starts else 0,
            "samples": samples,
        }


def slope_bytes_per_token(figures: dict) -> float:
    """Of the line through the memory samples after the first two texts."""
    settled = [sample for sample in figures["samples"] if sample[0] > figures["settled_after"]]
    at, nbytes, _ = np.array(settled or figures["samples"], float).T
    return float(np.polyfit(at, nbytes, 1)[0])


def describe(name: str, figures: dict, peak_bytes: int) -> str:
    """A line of the table."""
    at, nbytes, seconds = np.array(figures["samples"], float).T
    quarter = max(1, len(at) // 4)
    first, last = at[quarter - 1] / seconds[quarter - 1], (at[-1] - at[-quarter]) / (seconds[-1] - seconds[-quarter])
    settled = nbytes[at > figures["settled_after"]]
    cells = [name, f"{figures['budget_bytes'] / 1e6:.1f}", f"{peak_bytes / 1e6:.1f}"]
    cells += [f"{figures['counted_peak_bytes'] / 1e6:.1f}", f"{settled.min() / 1e6:.2f} to {settled.max() / 1e6:.2f}"]
    cells += [f"{slope_bytes_per_token(figures) * 1e3:+.0f}", f"{figures['hit_rate']:.0%}"]
    cells += [f"{first:.0f}, {last:.0f}", f"{figures['major_faults']}", figures["sha256"][:12]]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--text", type=Path, nargs="+", default=sorted(HELD_OUT.glob("*.txt")))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--worker", action="store_true", help="generate in this process and print the figures")
    args = parser.parse_args()
    if args.worker:
        memory = MemoryRequest(expert_share=args.share)
        print(json.dumps(generate(Bundle.open(args.bundle), memory, args.tokens, args.text)), flush=True)
        return
    print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|")
    runs = {}
    for share in (args.share, 1.0):
        worker = [str(args.bundle), "--worker", "--share", str(share), "--text", *map(str, args.text)]
        probe = run_cold("soak.py", [*worker, "--tokens", "0"], None)
        assert probe.figures, probe.reason
        limit = probe.figures["budget_bytes"]
        run = run_cold("soak.py", [*worker, "--tokens", str(args.tokens)], limit, timeout_s=3600)
        if not run.figures:
            raise SystemExit(f"with {share:.0%} of the experts: {run.reason}")
        runs[share] = run.figures
        print(describe(f"{share:.0%}", run.figures, run.peak_bytes), flush=True)
    if args.plot:
        lines = [Line(f"{share:.0%} of the experts", *memory_points(run)) for share, run in runs.items()]
        write_svg(args.plot, Plot("Memory of the process", "generated tokens", "MB held", lines))
    small, full = runs[args.share], runs[1.0]
    growth = slope_bytes_per_token(small) * args.tokens
    same = small["sha256"] == full["sha256"] and small["tokens"] == args.tokens
    print(f"\n{small['texts']} texts, the {'same' if same else 'NOT THE SAME'} {small['tokens']} tokens at both.")
    print(f"\n`{command_line()}`")
    sys.exit(not same or growth > MOST_GROWTH_BYTES)


def memory_points(figures: dict) -> tuple[list[float], list[float]]:
    """Tokens and MB."""
    return [sample[0] for sample in figures["samples"]], [sample[1] / 1e6 for sample in figures["samples"]]


if __name__ == "__main__":
    main()
