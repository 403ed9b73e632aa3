"""Does speed hold as the number of experts grows, with the active parameters as they are?

    python benchmarks/growth.py DIRECTORY --build      makes DIRECTORY/BUNDLE for each size (an hour; 5 GB at most)
    python benchmarks/growth.py DIRECTORY --json ROWS [--plot docs/growth.svg]        measures, in minutes

Two layers, hidden 2048, ffn 512 (the experts of Qwen3-Next), top-8 of 8, 16, 32, 64, 128 and 256, int4, random weights.
Three lines: everything in memory, routed by chance; room for a quarter of the experts, routed by chance; the same with
the routing of OLMoE's statistics (routing.py). Needs root, to have caches cold.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from machine import append_row, command_line, read_rows, run_cold
from plot import Line, Plot, write_svg
from routing import TOKENS, shape_checkpoint

from pocketmoe.profiles.routing.synthetic import fitted_models, synthetic_routing

EXPERTS = (8, 16, 32, 64, 128, 256)
SETTINGS = ((1.0, "uniform"), (0.25, "uniform"), (0.25, "realistic"))
TOP_K = 8


def build(directory: Path, experts: int) -> None:
    """Checkpoint to int4 bundle; what is in between is deleted as soon as it can be."""
    target = directory / f"experts-{experts}"
    if target.exists():
        return
    checkpoint, scripts = directory / "checkpoint", Path(__file__).parent
    shutil.rmtree(checkpoint, ignore_errors=True)
    make = [str(scripts / "make_checkpoint.py"), "narrow", "-o", str(checkpoint), "--experts", str(experts)]
    subprocess.run([sys.executable, *make], check=True)
    if experts > TOP_K:
        model = replace(fitted_models()["olmoe"], experts=experts, layers=2)
        shape_checkpoint(checkpoint, synthetic_routing(model, [TOKENS]))
    command = [sys.executable, "-m", "pocketmoe.cli"]
    subprocess.run([*command, "export", str(checkpoint), "-o", str(target), "--scheme", "int4"], check=True)
    shutil.rmtree(checkpoint)


def measure(directory: Path, experts: int, share: float, routing: str) -> dict:
    """One row."""
    bundle = directory / f"experts-{experts}"
    feed = ["--prompt", "128", "--tokens", "256", "--share", str(share), "--routing", routing]
    run = run_cold("ours.py", [str(bundle), *feed], None)
    if not run.figures:
        raise SystemExit(f"{bundle}: {run.reason}")
    return {"layer_experts": experts, "share": share, "routing": routing, **run.figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS)
    parser.add_argument("--json", type=Path, help="rows are appended here, and not measured twice")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.build:
        args.directory.mkdir(parents=True, exist_ok=True)
        for experts in args.experts:
            build(args.directory, experts)
        return
    rows: dict[tuple[int, float, str], dict] = {}
    for row in read_rows(args.json) if args.json else []:
        rows[row["layer_experts"], row["share"], row["routing"]] = row
    print("| experts | in memory | routing | tokens/s | hits | MB/token | computing ms | waiting ms | Python |")
    print("|---|---|---|---|---|---|---|---|---|")
    for share, routing in SETTINGS:
        for experts in args.experts:
            if routing == "realistic" and experts == TOP_K:
                continue  # all are chosen, whatever the routing
            if (experts, share, routing) not in rows:
                rows[experts, share, routing] = row = measure(args.directory, experts, share, routing)
                if args.json:
                    append_row(args.json, row)
            print(line(rows[experts, share, routing]), flush=True)
    print(f"\n`{command_line()}`")
    if args.plot:
        lines = [curve(rows, share, routing, args.experts) for share, routing in SETTINGS]
        title = "Speed as the number of experts grows, 8 of them active"
        write_svg(args.plot, Plot(title, "experts in a layer", "tokens/s", lines, doubling=True, markers=True))


def line(row: dict) -> str:
    cells = [f"{row['layer_experts']}", f"{row['share']:.0%}", row["routing"], f"{row['tokens_per_s']:.1f}"]
    cells += [f"{row['hit_rate']:.0%}", f"{row['read_bytes_per_token'] / 1e6:.1f}"]
    cells += [f"{row['compute_s_per_token'] * 1e3:.2f}", f"{row['wait_s_per_token'] * 1e3:.2f}"]
    return "| " + " | ".join([*cells, f"{row['python_share']:.0%}"]) + " |"


def curve(rows: dict[tuple[int, float, str], dict], share: float, routing: str, sizes: list[int]) -> Line:
    points = [(size, rows[size, share, routing]["tokens_per_s"]) for size in sizes if (size, share, routing) in rows]
    return Line(f"{share:.0%} in memory, {routing}", [x for x, _ in points], [y for _, y in points])


if __name__ == "__main__":
    main()
