"""The campaign: cases of a target, one after another, and what they came to. Exit 1 when a case has a fault."""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from random import Random

from tests.fuzz.cases import Outcome, discard, perform
from tests.fuzz.place import Place
from tests.fuzz.seeds import Seeds
from tests.fuzz.zygote import Zygote

TARGETS = ("bundles", "checkpoints", "inputs", "configs", "tokenizers")
_ROUND = ("bundles", "inputs") * 3 + ("bundles",) * 4 + ("tokenizers", "tokenizers", "checkpoints", "configs")
_LIGHT = ("numpy", "onnxruntime", "tokenizers", "jinja2.sandbox", "click", "psutil", "pocketmoe.cli")
_HEAVY = (*_LIGHT, "torch", "transformers", "onnx", "onnxscript", "tests.tiny")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def one(target: str, seed: int, number: int, seeds: Seeds, keep: bool = False) -> Outcome:
    """One case, made from its target, seed and number alone."""
    root = seeds.root / f"{target}-{seed}-{number}"
    shutil.rmtree(root, ignore_errors=True)
    place = Place.make(root)
    (place.cwd / "text.txt").write_text("Once upon a time there was a little girl who lived near the forest. " * 3)
    case = importlib.import_module(f"tests.fuzz.{target}").make(Random(f"{target}:{seed}:{number}"), place, seeds)
    outcome = perform(case, place, seeds.zygotes)
    if keep:
        say(f"in {place.cwd}:")
        for step in case.steps:
            say("    " + " ".join(map(str, step.order.arguments)))
    else:
        discard(place)
    return outcome


def campaign(options: argparse.Namespace, seeds: Seeds) -> int:
    """Run cases; report; return how many have faults."""
    groups: dict[str, list[str]] = collections.defaultdict(list)
    endings: collections.Counter[str] = collections.Counter()
    bad, ends = 0, time.monotonic() + options.seconds if options.seconds else None
    report = options.report.open("a") if options.report else None
    turns = [target for target in _ROUND if target in options.target]
    for number in range(options.start, options.start + options.cases):
        if ends and time.monotonic() > ends:
            break
        target = turns[number % len(turns)]
        outcome = one(target, options.seed, number, seeds)
        name = f"{target}:{options.seed}:{number}"
        bad += bool(outcome.faults)
        endings[f"{target} {' '.join(outcome.codes)}"] += 1
        for group, detail in outcome.faults:
            groups[f"{target} {group}"].append(f"{name} [{outcome.kind}] {outcome.what[:150]} | {detail[:200]}")
        if report:
            report.write(json.dumps({"case": name, **asdict(outcome)}) + "\n")
            report.flush()
    _summary(options, groups, endings)
    return bad


def _summary(options: argparse.Namespace, groups: dict[str, list[str]], endings: collections.Counter[str]) -> None:
    total = sum(endings.values())
    say(f"{total} cases with seed {options.seed}")
    for ending, count in sorted(endings.items(), key=lambda item: -item[1]):
        say(f"  {count:5} {ending}")
    for group, examples in sorted(groups.items(), key=lambda item: -len(item[1])):
        say(f"{len(examples):5} {group}")
        for example in examples[: options.examples]:
            say(f"        {example}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be given again; default: all")
    parser.add_argument("--cases", type=int, default=1 << 40, help="how many, in turn of the targets")
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--seconds", type=float, help="stop after so long; default: when all cases are done")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    parser.add_argument("--small", action="store_true", help="one architecture: ready sooner")
    parser.add_argument("--work", type=Path, help="where seeds are kept; default: a temporary directory")
    parser.add_argument("--report", type=Path, help="a line of JSON for each case")
    parser.add_argument("--examples", type=int, default=2, help="of each group of faults")
    parser.add_argument("--replay", metavar="TARGET:SEED:NUMBER", help="one case, whose files are kept (with --work)")
    options = parser.parse_args(arguments)
    options.target = options.target or [*TARGETS]
    if not options.seconds and options.cases == 1 << 40 and not options.replay:
        parser.error("say --cases or --seconds")
    return options


def zygotes(stack: ExitStack) -> dict[bool, Zygote]:
    """Two processes to fork from: with torch, and without."""
    return {
        False: stack.enter_context(Zygote(_LIGHT)),
        True: stack.enter_context(Zygote(_HEAVY, "tests.fuzz.tasks:warm")),
    }


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    with ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-")))
        work.mkdir(parents=True, exist_ok=True)
        seeds = Seeds(work.resolve(), zygotes(stack), options.small)
        if options.replay:
            target, seed, number = options.replay.split(":")
            outcome = one(target, int(seed), int(number), seeds, keep=True)
            say(json.dumps(asdict(outcome), indent=1))
            return int(bool(outcome.faults))
        say(f"seed {options.seed}")
        return int(campaign(options, seeds) > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
