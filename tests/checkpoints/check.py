"""What comes of a variant: exported, run, and held against transformers, or against what a refusal must name."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.checkpoints import model_variants, tokenizer_variants
from tests.checkpoints.variant import Variant
from tests.fuzz.cases import HEAVY_BYTES, command, last_line, same_tokens
from tests.fuzz.place import Place
from tests.fuzz.seeds import Seeds
from tests.fuzz.zygote import Ending, Order

PARITY = 1e-3  # the largest difference of logits that counts as the same model
LENGTHS = (100, 190, 230, 300, 600)  # of prompts around a threshold of 200
_TASK = "tests.checkpoints.tasks"


@dataclass(frozen=True)
class Row:
    """A row of docs/checkpoints.md."""

    kind: str
    example: str
    how: str
    works: bool
    figure: str
    reason: str


@cache
def variants() -> dict[str, Variant]:
    found = [*tokenizer_variants.variants(), *model_variants.variants()]
    assert len({variant.name for variant in found}) == len(found)
    return {variant.name: variant for variant in found}


def find(name: str) -> Variant:
    return variants()[name]


class _Refused(Exception):
    """A command did not exit 0: how it ended, and its last line."""

    def __init__(self, what: str, ending: Ending, line: str) -> None:
        super().__init__(f"{what}: exit {ending.killed_for or ending.code}: {line}")
        self.code, self.line = ending.code, line


class _Differs(Exception):
    """The answer is not transformers'."""


class Check:
    """One variant in a place of its own."""

    def __init__(self, variant: Variant, seeds: Seeds) -> None:
        self._variant, self._seeds = variant, seeds
        root = seeds.root / f"variant-{hashlib.sha256(variant.name.encode()).hexdigest()[:12]}"
        shutil.rmtree(root, ignore_errors=True)
        self._place = Place.make(root)
        self.checkpoint, self._truth, self._bundle = (self._place.cwd / name for name in ("c", "truth", "b"))

    def _do(self, what: str, order: Order) -> str:
        """Run one child; return what it printed."""
        output = self._place.root / "output"
        ending = self._seeds.zygotes[order.heavy].run(order, self._place.cwd, output, self._place.environment())
        stdout, stderr = (output.with_suffix(f".{end}").read_text(errors="replace") for end in ("out", "err"))
        if ending.code or ending.killed_for:
            raise _Refused(what, ending, last_line(stderr))
        return stdout

    def _task(self, name: str, *arguments: Any) -> str:
        return self._do(name, Order(f"{_TASK}:{name}", arguments, 2 * HEAVY_BYTES, cpu_s=300, heavy=True))

    def row(self) -> Row:
        """Build, export, run, judge; the files are removed."""
        variant = self._variant
        try:
            self._build()
            figure, reason = self._judge()
        finally:
            shutil.rmtree(self._place.root, ignore_errors=True)
        return Row(variant.kind, variant.example, self._how(), not reason, figure, reason)

    def _how(self) -> str:
        variant = self._variant
        if variant.refused and not variant.or_tokens:
            return f"refused, naming `{variant.refused}`".replace("|", "` or `")
        how = {
            "texts": f"ids of {len(tokenizer_variants.texts())} texts, and answers",
            "logits": f"logits after {', '.join(map(str, LENGTHS))} tokens",
            "open files": "answers at `ulimit -n 1024`",
        }.get(variant.measure, "answers")
        return f"{how} as transformers'" + (
            f", or refused, naming `{variant.refused}`".replace("|", "` or `") if variant.refused else ""
        )

    def _build(self) -> None:
        self._task("build", self._variant.name, str(self.checkpoint), str(self._truth))
        if self._variant.tokenizer_only:
            self._task("complete", str(self.checkpoint), str(self._seeds.checkpoint(self._variant.model)))
            shutil.copytree(self._seeds.bundle(self._variant.model), self._bundle)

    def _judge(self) -> tuple[str, str]:
        """A figure, and why it does not work; empty when it does."""
        variant = self._variant
        try:
            self._export()
            figure = self._measure()
        except _Refused as refusal:
            if variant.refused and refusal.code in {2, 3} and re.search(variant.refused, refusal.line.lower()):
                return f"exit {refusal.code}", ""
            return f"exit {refusal.code}", self._tidy(str(refusal))
        except _Differs as difference:
            return "", self._tidy(str(difference))
        if variant.refused and not variant.or_tokens:
            return figure, "accepted without a word"
        return figure, ""

    def _tidy(self, text: str) -> str:
        return re.sub(rf"{re.escape(str(self._place.root))}/cwd/", "", " ".join(text.split()))[:300]

    def _export(self) -> None:
        if self._variant.tokenizer_only:
            order = Order("tests.fuzz.tasks:retokenize", ("c", "b"), HEAVY_BYTES, heavy=True)
        else:
            options = [option.format(checkpoint="c") for option in self._variant.options]
            order = command("export", "c", "-o", "b", *options, heavy=True, memory_bytes=2 * HEAVY_BYTES, cpu_s=300)
        self._do("export", order)

    def _measure(self) -> str:
        match self._variant.measure:
            case "logits":
                worst = json.loads(self._task("compare_logits", "c", "b", LENGTHS))
                if not worst <= PARITY:
                    raise _Differs(f"logits differ by {worst:.2g}")
                return f"{worst:.1e}"
            case "texts":
                texts = tokenizer_variants.texts()
                found = json.loads(self._task("compare_ids", "c", "b", texts))
                if found["same"] < len(texts):
                    raise _Differs(f"ids of {found['same']} of {len(texts)} texts; not of {found['first']!r}")
                return f"{len(texts)} of {len(texts)} texts, {self._answers()}"
            case "bundle in hub cache":
                self._into_cache()
                return self._answers()
            case "open files":
                return self._answers("tests.checkpoints.tasks:few_files")
            case _:
                return self._answers()

    def _into_cache(self) -> None:
        """Lay the bundle out as the hub's cache does."""
        blobs, snapshot = (self._place.cwd / f"models--a--b/{name}" for name in ("blobs", "snapshots/1"))
        blobs.mkdir(parents=True)
        for n, path in enumerate(path for path in sorted(self._bundle.rglob("*")) if path.is_file()):
            link = snapshot / path.relative_to(self._bundle)
            link.parent.mkdir(parents=True, exist_ok=True)
            path.rename(blobs / f"{n:040x}")
            link.symlink_to(f"{'../' * (len(link.relative_to(snapshot).parts) + 1)}blobs/{n:040x}")
        shutil.rmtree(self._bundle)
        self._bundle.symlink_to(snapshot)

    def _answers(self, task: str = "tests.fuzz.tasks:command") -> str:
        """Greedy answers to the prompts, plain or as a chat, with their number of tokens."""
        variant = self._variant
        target = self._place.cwd / "truth.json"
        truth = self._truth if self._truth.exists() else self.checkpoint
        options = ("--max-tokens", str(variant.tokens), "--json", *([] if variant.chat else ["--raw"]))
        runs = [
            Order(task, ("run", "b", f"--prompt={text}", *options), HEAVY_BYTES, cpu_s=120) for text in variant.prompts
        ]
        found = [json.loads(self._do("run", order)) for order in runs]
        prompts = [{"text": text, "chat": variant.chat} for text in variant.prompts]
        arguments = (str(truth), prompts, variant.tokens, str(target))
        self._do("transformers", Order("tests.fuzz.tasks:transformers_answer", arguments, 2 * HEAVY_BYTES, heavy=True))
        for text, ours, theirs in zip(variant.prompts, found, json.loads(target.read_text()), strict=True):
            if ours["prompt_tokens"] != len(theirs["prompt"]):
                raise _Differs(f"{text!r}: {ours['prompt_tokens']} tokens, {len(theirs['prompt'])} in transformers")
            if not same_tokens(ours["tokens"], theirs["tokens"], theirs["margins"]):
                raise _Differs(f"{text!r}: {ours['tokens'][:8]}, in transformers {theirs['tokens'][:8]}")
        return f"{sum(len(ours['tokens']) for ours in found)} tokens"
