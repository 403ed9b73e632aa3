"""Conversations beside each other, with forks, resets and kills: nothing over the budget, the tokens of fresh runs.

    python benchmarks/conversations.py BUNDLE [--turns 1000] [--share 0.4] [--sequences 3] [--seed 0]
        [--prefix-cache SIZE]

Needs root. Four talkers, each a thread of one process, take turns with a model of `--sequences` texts, in a memory
cgroup of exactly its budget. A talker says a piece of the held-out texts, 8 to 60 tokens, and gets an answer of up to
24 at temperature 1 with a seed of its own; or it goes on from a copy of another's text, takes back its last turns,
begins anew, closes its stream after some pieces, or has another thread close it. A process ends after 50 turns; every
second one is killed (SIGKILL) while answers are computed. What talkers hold goes on in the next process, where nothing
is kept, or with `--prefix-cache` what prompts have left on disk, within that size.

Then a process with room for all experts and one text computes every prompt from its first token, and compares: tokens
of an answer that was closed must be its beginning. Exits 1 when one differs, a process was killed that was not to be,
or memory was over the budget.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

from machine import THREADS, command_line

from pocketmoe.bundle.reader import Bundle
from pocketmoe.profiles.machine.limit import run_limited
from pocketmoe.runtime.answer import Answer, Asked
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.model import LoadRequest, Model
from pocketmoe.runtime.prefix_cache.kept import PrefixCacheRequest
from pocketmoe.runtime.sampling import Sampling
from pocketmoe.runtime.tokenizer import Text
from pocketmoe.sizes import parse_size

HELD_OUT = Path(__file__).parent.parent / "models" / "reference" / "heldout"
TALKERS = 4
TURNS_OF_A_PROCESS = 50
LONGEST = 24  # tokens of an answer
CONTEXT = 768
HEAD = (
    "turns", "forks", "taken back", "begun anew", "closed", "processes", "killed", "tokens", "reused of prompts",
    "budget MB", "highest cgroup peak MB", "wrong answers",
)  # fmt: skip


@dataclass
class Talk:
    """What the talkers of a process share: their texts, and the journal in which a turn is a line."""

    model: Model
    pieces: list[list[int]]
    journal: Path
    texts: list[list[int]]
    left: int  # turns
    dies_at: int | None  # turns left when the process kills itself
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, **turn: object) -> None:
        with open(self.journal, "a") as lines:
            lines.write(json.dumps(turn) + "\n")

    def take_turns(self, talker: int, seed: int) -> None:
        """Until none is left."""
        rng = random.Random(seed * TALKERS + talker)
        while True:
            with self.lock:
                if self.left <= 0:
                    return
                self.left -= 1
                kind = self._prepare(talker, rng)
                text = self.texts[talker] = [*self.texts[talker], *rng.choice(self.pieces)[: rng.randint(8, 60)]]
            self._say(talker, text, kind, rng)

    def _prepare(self, talker: int, rng: random.Random) -> str:
        """Fork, take back, begin anew or go on; the lock is held."""
        kind = rng.choices(["goes on", "fork", "taken back", "anew"], [6, 2, 1, 1])[0]
        if kind == "fork":
            self.texts[talker] = list(rng.choice(self.texts))
        elif kind == "taken back":
            self.texts[talker] = self.texts[talker][: rng.randrange(len(self.texts[talker]) + 1)]
        if kind == "anew" or len(self.texts[talker]) > CONTEXT - 60 - LONGEST:
            kind, self.texts[talker] = "anew", []
        return kind

    def _say(self, talker: int, text: list[int], kind: str, rng: random.Random) -> None:
        seed, most = rng.randrange(1 << 31), rng.randint(1, LONGEST)
        ends = rng.choices(["itself", "closed", "by another"], [7, 2, 1])[0]
        closes_after = rng.randint(0, 6) if ends != "itself" else None
        stream = self.model.stream(text, max_tokens=most, temperature=1.0, seed=seed)
        for number, _ in enumerate(stream):
            if number == closes_after:
                if ends == "closed":
                    break
                threading.Thread(target=stream.close, daemon=True).start()
            if self.dies_at is not None and self.left <= self.dies_at:
                with self.lock:
                    self.note(kind="killed")
                    os.kill(os.getpid(), signal.SIGKILL)
        stream.close()
        result = stream.result if stream.has_result else None
        tokens = list(result.tokens) if result else []
        with self.lock:
            self.texts[talker] = [*text, *tokens]
            reused = result.reused_tokens if result else 0
            ended = ends == "itself"
            self.note(
                kind=kind, talker=talker, prompt=text, seed=seed, most=most, tokens=tokens, ended=ended, reused=reused
            )


def texts_of(journal: Path) -> list[list[int]]:
    """Where the talkers are by a journal."""
    texts: list[list[int]] = [[] for _ in range(TALKERS)]
    for turn in read(journal):
        if "talker" in turn:
            texts[turn["talker"]] = turn["prompt"] + turn["tokens"]
    return texts


def read(journal: Path) -> list[dict]:
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []


def talk(args: argparse.Namespace) -> dict:
    """The turns of one process."""
    bundle = Bundle.open(args.bundle)
    text = Text(bundle)
    files = sorted(HELD_OUT.glob("*.txt"))
    ids = [token for file in files for token in text.encode(file.read_text(encoding="utf-8")[:20_000])]
    memory = MemoryRequest(args.memory, None if args.memory else args.share)
    kept = PrefixCacheRequest(args.journal.parent / "prefixes", args.prefix_cache) if args.prefix_cache else None
    request = LoadRequest(memory, CONTEXT, THREADS, sequences=args.sequences, prefix_cache=kept)
    with Model(args.bundle, request) as model:
        pieces = [ids[start : start + 60] for start in range(0, len(ids) - 60, 60)]
        rng = random.Random(args.seed)
        dies_at = rng.randrange(args.turns) if args.dies else None
        state = Talk(model, pieces, args.journal, texts_of(args.journal), args.turns, dies_at)
        threads = [threading.Thread(target=state.take_turns, args=(talker, args.seed)) for talker in range(TALKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"budget": model.memory["budget"], "peak": model.memory["peak"]}


def check(args: argparse.Namespace) -> dict:
    """How many answers of the journal are not those of a text computed from its first token."""
    bundle, wrong = Bundle.open(args.bundle), 0
    text = Text(bundle)
    options = EngineOptions(MemoryRequest(expert_share=1.0), CONTEXT, THREADS)
    with Engine(bundle, options) as engine:
        for turn in read(args.journal):
            if "talker" not in turn:
                continue
            engine.reset()
            asked = Asked(turn["most"], Sampling(temperature=1.0, seed=turn["seed"]))
            answer = Answer(engine, text, turn["prompt"], asked, CONTEXT)
            pieces = answer.pieces()
            while len(answer.tokens) < len(turn["tokens"]) and next(pieces, None) is not None:
                pass
            if turn["ended"]:
                for _ in pieces:
                    pass
            same = (
                answer.tokens == turn["tokens"]
                if turn["ended"]
                else answer.tokens[: len(turn["tokens"])] == turn["tokens"]
            )
            if not same:
                print(json.dumps({**turn, "right": answer.tokens}), file=sys.stderr)
            wrong += not same
    return {"wrong": wrong}


def run_all(args: argparse.Namespace, folder: Path) -> bool:
    """All processes, the comparison, the table; whether everything was as it should."""
    journal = folder / "journal"
    common = [
        sys.executable,
        __file__,
        str(args.bundle),
        "--share",
        str(args.share),
        "--sequences",
        str(args.sequences),
        *(["--prefix-cache", str(args.prefix_cache)] if args.prefix_cache else []),
    ]
    probe = run_limited([*common, "--journal", str(folder / "none"), "--worker", "talk", "--turns", "0"], None)
    if probe.returncode:
        raise SystemExit(probe.stderr)
    budget = json.loads(probe.stdout.splitlines()[-1])["budget"]
    peak = processes = killed = 0
    while (done := sum("talker" in turn for turn in read(journal))) < args.turns:
        turns, dies = min(TURNS_OF_A_PROCESS, args.turns - done), processes % 2 == 1
        seed = args.seed * 1000 + processes
        command = [*common, "--journal", str(journal), "--worker", "talk", "--turns", str(turns), "--seed", str(seed)]
        command += ["--memory", str(budget)]
        run = run_limited([*command, "--dies"] if dies else command, budget, 3600)
        processes, peak = processes + 1, max(peak, run.peak_bytes)
        was_to_die = bool(read(journal)) and read(journal)[-1]["kind"] == "killed"
        if run.returncode and not (run.returncode == -signal.SIGKILL and was_to_die):
            raise SystemExit(f"process {processes}: exit {run.returncode}: {run.stderr[-500:]}")
        killed += run.returncode != 0
        print(f"  {done} turns, process {processes}: {run.peak_bytes / 1e6:.1f} MB at most", file=sys.stderr)
    checked = run_limited([*common, "--journal", str(journal), "--worker", "check"], None, 7200)
    if checked.returncode:
        raise SystemExit(checked.stderr)
    wrong = json.loads(checked.stdout.splitlines()[-1])["wrong"]
    print(checked.stderr, end="", file=sys.stderr)
    turns = [turn for turn in read(journal) if "talker" in turn]
    kinds = [turn["kind"] for turn in turns]
    cells = [len(turns), kinds.count("fork"), kinds.count("taken back"), kinds.count("anew")]
    cells += [sum(not turn["ended"] for turn in turns), processes, killed, sum(len(turn["tokens"]) for turn in turns)]
    reused = sum(turn["reused"] for turn in turns) / sum(len(turn["prompt"]) for turn in turns)
    shown = [*map(str, cells), f"{reused:.0%}", f"{budget / 1e6:.1f}", f"{peak / 1e6:.1f}", str(wrong)]
    print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|\n| {' | '.join(shown)} |\n\n`{command_line()}`")
    return not wrong and peak <= budget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--share", type=float, default=0.4)
    parser.add_argument("--sequences", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a new folder in which the journal stays")
    parser.add_argument("--prefix-cache", type=parse_size, metavar="SIZE")
    parser.add_argument("--worker", choices=["talk", "check"], help="what a process of this does")
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--memory", type=int, help="of a worker, in bytes; without it by the share")
    parser.add_argument("--dies", action="store_true")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(talk(args) if args.worker == "talk" else check(args)), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.keep:
            args.keep.mkdir(parents=True)
        sys.exit(not run_all(args, args.keep or Path(folder)))


if __name__ == "__main__":
    main()
