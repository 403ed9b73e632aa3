"""Against llama.cpp under the same memory limits: the same weights, the same tokens, fresh processes, cold start.

    python benchmarks/make_checkpoint.py olmoe-1b-7b -o CHECKPOINT && python benchmarks/routing.py CHECKPOINT olmoe
    pocketmoe export CHECKPOINT -o FP32 && pocketmoe quantize FP32 -o BUNDLE --scheme int4
    python benchmarks/against_llamacpp.py CHECKPOINT BUNDLE --json ROWS [--routing realistic] [--share 0.25 ...]

Needs root (memory cgroups), and beside the project `pip install gguf xllamacpp`. Writes CHECKPOINT/q4_0.gguf once. Rows
go to ROWS as they are measured; up to `--runs` of each, and `--table` only prints them.

A row is a pair of fresh processes with cold caches in memory cgroups of the same size, 2 threads each, both fed a
prompt of 512 tokens, then as a new text another such prompt and 64 tokens more, one at a time (teacher-forced). Of the
two prompts the first shows what starting costs, which llama.cpp does before it and we in it; the next does not.
llama.cpp (mmap, its default) runs with repacked weights and without; the faster one that lives counts. Budgets are
shares of the GGUF's size, or sizes.

Routing: "uniform" tokens are routed by chance, which understates any cache; "realistic" ones follow a trace because
routing.py has shaped their embeddings, in both engines alike, with no hook in either.

The limit: a token can take no less than the bytes it touches (dense weights, its experts, its attention states) over
the bandwidth of memory, nor than the bytes it misses over that of the disk. Both are measured with each pair, the disk
before and after it, at the size of an expert, two reads in flight.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from gguf_file import write_gguf
from llamacpp_table import render
from machine import THREADS, Outcome, append_row, command_line, disk_bandwidth, read_rows, run_cold
from routing import FIRST, RECORD, agreement

from pocketmoe.bundle.reader import Bundle
from pocketmoe.profiles.machine.bandwidth import measure_ram
from pocketmoe.profiles.machine.doctor import read_cpu
from pocketmoe.profiles.machine.limit import run_limited
from pocketmoe.sizes import parse_size

SHARES = ("none", "0.75", "0.5", "0.35", "0.25", "0.125")
PEERS = {"not repacked": ["--no-repack"], "repacked": [], "repacked, int8 caches": ["--caches", "q8_0"]}


def expert_file(bundle: Bundle) -> Path:
    """What slots are filled from: the experts packed for this CPU, or the bundle's own."""
    packed = sorted(bundle.root.glob("packed/*/experts.bin"))
    return packed[-1] if packed else bundle.root / "experts.bin"


def measure(args: argparse.Namespace, gguf: Path, share: str, routing: str) -> dict:
    """One row: our engine, llama.cpp in both ways, and the machine before, between and after.

    Repacked weights are a second copy: where a larger limit has killed it, a smaller one need not be tried.
    """
    bundle = Bundle.open(args.bundle)
    limit = limit_of(share, gguf.stat().st_size)
    block = max(kind.nbytes for kind in bundle.manifest.expert_kinds)
    feed = ["--prompt", str(args.prompt), "--tokens", str(args.tokens), "--routing", routing]
    feed += ["--first", str(args.first)] if args.first else []
    memory = ["--memory", str(limit)] if limit else []
    ram = measure_ram(THREADS).all_threads_bytes_per_s
    disk = [disk_bandwidth(expert_file(bundle), block)]
    ours = run_cold("ours.py", [str(bundle.root), *memory, *feed, "--prefetch", args.prefetch], limit, args.timeout)
    disk.append(disk_bandwidth(expert_file(bundle), block))
    peers = {}
    for how in args.peer:
        if how != "not repacked" and repacked_dies(args, limit):
            peers[how] = Outcome(None, "killed under a larger limit", 0)
        else:
            peers[how] = run_cold(
                "peer.py", [str(gguf), *feed, *PEERS[how], "--seconds", args.peer_seconds], limit, args.timeout
            )
    disk.append(disk_bandwidth(expert_file(bundle), block))
    return {
        **key(args, gguf, share, routing),
        "limit_bytes": limit,
        "caches": "int8" if any(state.dtype == "int8" for state in bundle.manifest.states) else "float32",
        "gguf_bytes": gguf.stat().st_size,
        "bundle_bytes": bundle.manifest.files["experts.bin"].nbytes + bundle.manifest.files["graphs/dense.bin"].nbytes,
        "threads": THREADS,
        "cpu": read_cpu().model,
        "date": datetime.now(UTC).date().isoformat(),
        "ram_bytes_per_s": max(ram, measure_ram(THREADS).all_threads_bytes_per_s),
        "disk_bytes_per_s_each": disk,
        "disk_bytes_per_s": statistics.mean(disk[:2]),  # around our own run, which alone is judged by it
        "ours": asdict(ours),
        "peers": {how: asdict(peer) for how, peer in peers.items()},
        "best_peer": best(peers),
    }


def limit_of(share: str, gguf_bytes: int) -> int | None:
    """Bytes, or None for no limit."""
    if share == "none":
        return None
    return parse_size(share) if share.endswith("B") else int(float(share) * gguf_bytes)


def repacked_dies(args: argparse.Namespace, limit: int | None) -> bool:
    """Whether a row of this checkpoint says so."""
    rows = [row for row in read_rows(args.json) if row["checkpoint"] == args.checkpoint.name and row["limit_bytes"]]
    larger = [row for row in rows if limit and row["limit_bytes"] >= limit]
    outcomes = [row["peers"][how] for row in larger for how in row["peers"] if how != "not repacked"]
    return any(outcome["reason"].startswith("killed") for outcome in outcomes)


def best(peers: dict[str, Outcome]) -> str | None:
    """The way in which llama.cpp was fastest, or None where it never finished."""
    speeds = {how: peer.figures["tokens_per_s"] for how, peer in peers.items() if peer.figures}
    return max(speeds, key=speeds.__getitem__) if speeds else None


def key(args: argparse.Namespace, gguf: Path, share: str, routing: str) -> dict:
    """What makes two rows the same measurement."""
    return {
        "bundle": args.bundle.name,
        "checkpoint": gguf.parent.name,
        "share": share,
        "routing": routing,
        "prompt": args.prompt,
        "first": args.first,
        "tokens": args.tokens,
        "prefetch": args.prefetch,
    }


def rows_of(file: Path, wanted: dict) -> list[dict]:
    """The runs of one setting that there are."""
    return [row for row in read_rows(file) if wanted.items() <= row.items()]


def peer_follows(gguf: Path) -> float:
    """The share of the trace's experts that llama.cpp's fp32 routers choose on its Q4_0 embeddings."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    wanted = np.load(gguf.with_name(RECORD))
    found = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    table = found["token_embd.weight"]
    states = dequantize(table.data[FIRST : FIRST + len(wanted)], table.tensor_type)
    chosen = np.empty_like(wanted)
    for layer in range(wanted.shape[1]):
        logits = states @ found[f"blk.{layer}.ffn_gate_inp.weight"].data.T
        chosen[:, layer] = np.argpartition(-logits, wanted.shape[2] - 1, axis=1)[:, : wanted.shape[2]]
    return agreement(chosen, wanted)


def note(checkpoint: Path, gguf: Path, routing: str) -> str:
    """What the routing of a table is; refuses a realistic one that the checkpoint does not have."""
    if routing == "uniform":
        return "Routing by chance."
    if not (checkpoint / RECORD).exists():
        raise SystemExit(
            f"{checkpoint} routes by chance only: python benchmarks/routing.py {checkpoint} olmoe, anew export"
        )
    return f"Realistic routing: llama.cpp's routers on its own embeddings choose {peer_follows(gguf):.1%} of the trace."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--json", type=Path, required=True, help="rows are appended here, up to --runs of each")
    parser.add_argument("--routing", choices=("uniform", "realistic"), nargs="+", default=["uniform", "realistic"])
    parser.add_argument("--share", nargs="+", default=SHARES, help="of the GGUF's size, a size (8GB), or none")
    parser.add_argument("--first", type=int, help="tokens of the first prompt, where it is to be shorter")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prefetch", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--peer", choices=PEERS, nargs="*", default=[*PEERS][:2], help="ways of llama.cpp to try")
    parser.add_argument("--runs", type=int, default=3, help="of each row, ours and llama.cpp's by turns")
    parser.add_argument("--timeout", type=float, default=400, help="seconds after which a run is given up")
    parser.add_argument("--peer-seconds", default="30", help="after which llama.cpp's speed is known")
    parser.add_argument("--table", action="store_true", help="print what there is, measure nothing")
    args = parser.parse_args()
    gguf = write_gguf(args.checkpoint)
    if not args.table:  # packs the experts for this CPU, which is done once
        warm = [
            sys.executable,
            str(Path(__file__).with_name("ours.py")),
            str(args.bundle),
            "--prompt",
            "1",
            "--tokens",
            "1",
        ]
        run_limited(warm, None, timeout_s=1200)
    for routing in args.routing:
        said = note(args.checkpoint, gguf, routing)
        for share in args.share:
            wanted = key(args, gguf, share, routing)
            for _ in range(len(rows_of(args.json, wanted)), 0 if args.table else args.runs):
                append_row(args.json, measure(args, gguf, share, routing))
                print(render(rows_of(args.json, wanted)), flush=True)
        rows = [row for share in args.share for row in rows_of(args.json, key(args, gguf, share, routing))]
        print(f"\n{said}\n\n{render(rows)}", flush=True)
    print(f"\n`{command_line()}`")


if __name__ == "__main__":
    main()
