"""The portable model in stock ONNX Runtime against our runtime with every expert in memory: the same bundle and prompt.

    python benchmarks/portable_model.py BUNDLE [--prompt TEXT] [--tokens 256] [--threads 1] [--rounds 3]

Contenders take turns, each time in a fresh process; a row is the median of the rounds. Peak memory is the process's
highest resident set (VmHWM; for us what `run` reports), mapped weights included. "same" counts the greedy tokens up to
the first that differs from ours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np


def child(model: str, prompt: list[int], count: int, threads: int) -> dict:
    """Load a portable model and decode greedily, with onnxruntime and numpy."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    began = time.perf_counter()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    load_s = time.perf_counter() - began
    facts = json.loads(session.get_modelmeta().custom_metadata_map["pocketmoe.interface"])
    names, outputs = facts["inputs"], [facts["logits"], *(state["output"] for state in facts["states"])]
    values = {s["input"]: np.zeros([max(n, 0) for n in s["shape"]], s["dtype"]) for s in facts["states"]}
    states, past, given, tokens, times = list(values), 0, prompt, [], []
    while len(tokens) < count:
        positions = np.arange(past, past + len(given), dtype=np.int64)[None]
        feeds = {names["token_ids"]: np.array([given], np.int64), names["positions"]: positions}
        feeds[names["past_length"]] = np.array([past], np.int64)
        feeds.pop(None, None)
        logits, *after = session.run(outputs, values | feeds)
        values = dict(zip(states, after, strict=True))
        past += len(given)
        given = [int(logits[0, -1].argmax())]
        tokens += given
        times.append(time.perf_counter())
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    speed = (count - 1) / (times[-1] - times[0])
    return {"tokens": tokens, "tokens_per_s": speed, "peak_bytes": int(peak.split()[1]) * 1024, "load_s": load_s}


def ours(bundle: Path, prompt: str, count: int, threads: int) -> dict:
    """The same by `pocketmoe run`."""
    command = [sys.executable, "-m", "pocketmoe.cli", "run", str(bundle), "--prompt", prompt, "--raw", "--json"]
    command += ["--memory", "100%", "--max-tokens", str(count), "--threads", str(threads)]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        "tokens": report["tokens"],
        "tokens_per_s": report["decode_tokens_per_s"],
        "peak_bytes": report["peak_memory_bytes"],
        "load_s": report["start_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", default="She looked out of the window, and")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.errors import BadInput
    from pocketmoe.export.portable.portable import export_portable
    from pocketmoe.runtime.tokenizer import Text

    ids = Text(Bundle.open(args.bundle)).encode(args.prompt)
    rows: dict[str, list[dict]] = {"pocketmoe run": []}
    with tempfile.TemporaryDirectory(dir=args.bundle.parent) as folder:
        models = {}
        for experts in ("if", "qmoe"):
            try:
                models[experts] = export_portable(args.bundle, Path(folder) / f"{experts}.onnx", experts=experts).model
            except BadInput as reason:
                print(reason)
        for _ in range(args.rounds):
            rows["pocketmoe run"].append(ours(args.bundle, args.prompt, args.tokens, args.threads))
            for experts, model in models.items():
                command = [sys.executable, __file__, "--child", str(model), json.dumps(ids)]
                command += [str(args.tokens), str(args.threads)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                rows.setdefault(f"ONNX Runtime, {experts}", []).append(json.loads(done.stdout))
    print("| by | tokens/s | peak MB | load s | same |\n|---|---|---|---|---|")
    wanted = rows["pocketmoe run"][0]["tokens"]
    for name, found in rows.items():
        speed, peak, load = (median(row[key] for row in found) for key in ("tokens_per_s", "peak_bytes", "load_s"))
        pairs = zip(wanted, found[0]["tokens"], strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(wanted))
        print(f"| {name} | {speed:.1f} | {peak / 1e6:.0f} | {load:.2f} | {same} of {len(wanted)} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        model, prompt, count, threads = sys.argv[2:]
        print(json.dumps(child(model, json.loads(prompt), int(count), int(threads))))
    else:
        main()
