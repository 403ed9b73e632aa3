"""llama.cpp's quantizations of a checkpoint and our bundles of it, by the same figures on the same text.

    python benchmarks/quantized_peers.py CHECKPOINT REFERENCE [BUNDLE ...] --text DIRECTORY [--types Q4_0,Q4_K_M,...]
        [--max-tokens N] [--work DIRECTORY] [--json FILE]

REFERENCE is the float32 bundle of CHECKPOINT, whose logits everything is compared with; needs
`pip install gguf llama-cpp-python`. Each GGUF is made by llama.cpp's own quantizer without an importance matrix, and
its logits come from llama.cpp: both over the same windows of 512 tokens. The row F32 says how far two engines with the
same weights are apart. `bits` are of experts' weights, scales included. Bytes are those of weights: tokenizer, graphs
and whatever llama.cpp holds twice because it lacks a shape (gguf_file.py) are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import gguf
import numpy as np
from gguf_file import Checkpoint, Type, write_gguf

from pocketmoe.bundle.reader import Bundle
from pocketmoe.console.progress import ProgressBar
from pocketmoe.profiles.quality.divergence import Bootstrap, Estimate, RowScores, compare_rows
from pocketmoe.profiles.quality.quality import read_slices
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.tokenizer import Text

WINDOW = 512
TYPES = "Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q4_0,IQ4_NL,Q3_K_M,Q2_K"
Logits = Callable[[np.ndarray], np.ndarray]  # int [n] -> float32 [n, vocab]


@dataclass
class Candidate:
    """What is measured: its size, how long it took to make, and the scores of each window."""

    name: str
    weight_bytes: int
    expert_bytes: int
    expert_bits: float
    logits: Logits
    seconds: float | None = None  # to quantize; a bundle's is not known here
    types: dict[str, int] = field(default_factory=dict)  # elements in each of llama.cpp's types
    windows: list[RowScores] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One line of the table, for all text or one slice of it."""

    name: str
    slice: str
    weight_bytes: int
    expert_bytes: int
    expert_bits: float
    seconds: float | None
    types: dict[str, int]
    tokens: int
    perplexity: Estimate
    perplexity_ratio: Estimate
    mean_kl_nats: Estimate
    p99_kl_nats: Estimate
    top1_agreement: Estimate


def summarize(candidate: Candidate, name: str, windows: list[RowScores]) -> Row:
    bootstrap = Bootstrap(len(windows))
    counts = np.array([len(window.nll) for window in windows], np.float64)
    nll = np.array([window.nll.sum() for window in windows])
    gap = nll - np.array([window.reference_nll.sum() for window in windows])
    kl = [window.kl for window in windows]
    window_of = np.repeat(np.arange(len(windows)), [len(part) for part in kl])
    same = np.array([window.same_top1.sum() for window in windows])
    return Row(
        name=candidate.name,
        slice=name,
        weight_bytes=candidate.weight_bytes,
        expert_bytes=candidate.expert_bytes,
        expert_bits=candidate.expert_bits,
        seconds=candidate.seconds,
        types=candidate.types,
        tokens=int(counts.sum()),
        perplexity=bootstrap.ratio(nll, counts, np.exp),
        perplexity_ratio=bootstrap.ratio(gap, counts, np.exp),
        mean_kl_nats=bootstrap.ratio(np.array([part.sum() for part in kl]), counts),
        p99_kl_nats=bootstrap.quantile(np.concatenate(kl), window_of, 0.99),
        top1_agreement=bootstrap.ratio(same, counts),
    )


def open_gguf(path: Path, name: str, seconds: float | None, repeats: int, stack: contextlib.ExitStack) -> Candidate:
    import llamacpp_library as llamacpp  # where llama.cpp's own package is

    total = experts = weights = 0
    types: Counter[str] = Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        share = repeats if any(part in tensor.name for part in ("attn_k.", "attn_v.", "attn_k_norm.")) else 1
        total += int(tensor.n_bytes) // share
        types[tensor.tensor_type.name] += int(tensor.n_elements) // share
        if "_exps" in tensor.name:
            experts += int(tensor.n_bytes)
            weights += int(tensor.n_elements)
    model = stack.enter_context(llamacpp.Model(path, WINDOW))
    name = f"llama.cpp {name}"
    return Candidate(name, total, experts, 8 * experts / weights, model.logits, seconds, dict(types))


def open_bundle(path: Path, n_weights: int, stack: contextlib.ExitStack) -> Candidate:
    bundle = Bundle.open(path)
    options = EngineOptions(memory=MemoryRequest.parse("100%"), capacity=WINDOW)
    engine = stack.enter_context(Engine(bundle, options))

    def logits(tokens: np.ndarray) -> np.ndarray:
        engine.reset()
        return engine.feed(tokens.tolist(), rows="all")

    kinds = bundle.manifest.expert_kinds
    with bundle.open_store() as store:
        experts = sum(kinds[record.kind].nbytes for record in store.records.values())
    dense = sum(tensor.nbytes for tensor in bundle.manifest.dense)
    return Candidate(path.name, dense + experts, experts, 8 * experts / n_weights, logits)


def expert_weights(checkpoint: Checkpoint) -> int:
    """How many numbers the experts have."""
    config = checkpoint.config
    ffn = config.get("moe_intermediate_size", config["intermediate_size"])
    return 3 * config["hidden_size"] * ffn * config["num_experts"] * config["num_hidden_layers"]


def windows_of(tokens: np.ndarray) -> Iterator[np.ndarray]:
    return (tokens[start : start + WINDOW] for start in range(0, len(tokens) - 1, WINDOW))


def measure(args: argparse.Namespace, work: Path, stack: contextlib.ExitStack) -> list[Row]:
    import llamacpp_library as llamacpp  # where llama.cpp's own package is

    checkpoint = Checkpoint(args.checkpoint)
    floats = write_gguf(args.checkpoint, work / "F32.gguf", Type.F32)
    candidates = [open_gguf(floats, "F32", None, checkpoint.repeats, stack)]
    for name in args.types.split(","):
        path = work / f"{name}.gguf"
        seconds = llamacpp.quantize(floats, path, name)
        candidates.append(open_gguf(path, name, seconds, checkpoint.repeats, stack))
    candidates += [open_bundle(path, expert_weights(checkpoint), stack) for path in args.bundles]
    reference = open_bundle(args.reference, expert_weights(checkpoint), stack)
    tokenizer = Text(Bundle.open(args.reference))
    slices = read_slices(args.text)
    texts = [np.array(tokenizer.encode(piece.text)[: args.max_tokens], np.int64) for piece in slices]
    starts = [0]
    done, total = 0, sum(len(list(windows_of(tokens))) for tokens in texts)
    with ProgressBar() as bar:
        for tokens in texts:
            for window in windows_of(tokens):
                expected = reference.logits(window[:-1])
                for candidate in candidates:
                    candidate.windows.append(compare_rows(candidate.logits(window[:-1]), expected, window[1:]))
                done += 1
                bar("comparing", done, total)
            starts.append(done)
    pieces = [(piece.name, slice(a, b)) for piece, a, b in zip(slices, starts, starts[1:], strict=False)]
    pieces.append(("all", slice(None)))
    return [summarize(c, name, c.windows[part]) for c in candidates for name, part in pieces]


def print_table(rows: list[Row]) -> None:
    slices = [row.slice for row in rows if row.name == rows[0].name and row.slice != "all"]
    header = ["quantization", "MB", "expert bits", "perplexity", "mean KL", "p99 KL", "top-1", "s"]
    print("| " + " | ".join(header + [f"KL {name}" for name in slices]) + " |")
    print("|---" * (len(header) + len(slices)) + "|")
    for row in (row for row in rows if row.slice == "all"):
        kl, worst = row.mean_kl_nats, row.p99_kl_nats
        cells = [
            row.name,
            f"{row.weight_bytes / 1e6:.2f}",
            f"{row.expert_bits:.2f}",
            f"{row.perplexity.value:.3f} ({100 * (row.perplexity_ratio.value - 1):+.2f}%)",
            f"{kl.value:.5f} ({kl.low:.5f}-{kl.high:.5f})" if kl.low is not None else f"{kl.value:.5f}",
            f"{worst.value:.4f}",
            f"{100 * row.top1_agreement.value:.2f}%",
            "" if row.seconds is None else f"{row.seconds:.1f}",
        ]
        cells += [f"{r.mean_kl_nats.value:.5f}" for r in rows if r.name == row.name and r.slice != "all"]
        print("| " + " | ".join(cells) + " |")
    for row in (row for row in rows if row.slice == "all" and row.types):
        total = sum(row.types.values())
        print(f"{row.name}: " + ", ".join(f"{k} {100 * v / total:.1f}%" for k, v in sorted(row.types.items())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("bundles", type=Path, nargs="*")
    parser.add_argument("--text", type=Path, required=True, help="a file, or a directory whose *.txt are slices")
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--max-tokens", type=int, help="of each slice")
    parser.add_argument("--work", type=Path, help="where the GGUFs are kept; default: nowhere")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    import llamacpp_library as llamacpp  # where llama.cpp's own package is

    if wrong := set(args.types.split(",")) - set(llamacpp.FILE_TYPES):
        sys.exit(f"unknown types {', '.join(sorted(wrong))}; there are {', '.join(llamacpp.FILE_TYPES)}")
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        rows = measure(args, work, stack)
    print_table(rows)
    if args.json:
        record = {"llama.cpp": llamacpp.RELEASE, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
