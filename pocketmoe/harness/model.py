"""What lm-evaluation-harness asks of a model, answered by a bundle: log-likelihoods and greedy answers.

Its own `hf` model is the measure: the same tokens go in, cut to the same windows. The class is made where the harness
is imported, so that nothing else needs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput
from pocketmoe.runtime.tokenizer import Text

_MOST_ANSWER = 256  # tokens, where a task does not say

Score = tuple[float, bool]
Done = Callable[[int, int], None]


class Logits(Protocol):
    """An engine, or a checkpoint that is run by transformers: `feed` appends to a text, `reset` begins another."""

    def reset(self) -> None:
        """Begin another text."""
        ...

    def feed(self, tokens: Sequence[int], rows: Literal["last", "all"] = "last") -> np.ndarray:
        """Append tokens. Returns logits, float32 [rows, vocab], of the last token or of all."""
        ...


class Scorer:
    """Log-likelihoods and greedy answers of token ids by one model, with the tokenizer of a bundle."""

    def __init__(self, model: Logits, bundle: Bundle, length: int) -> None:
        """`length`: the most tokens that are read at once."""
        self.model, self.text, self.length = model, Text(bundle), length
        self.seal = bundle.manifest.sha256
        self.ends = bundle.manifest.model.eos_token_ids
        if not self.ends:
            raise BadInput(f"{bundle.root} has no token that ends texts", "Tasks need one: export it again.")
        begun = bundle.manifest.model.bos_token_id
        self.prefix = self.ends[0] if begun is None else begun

    def encode(self, string: str, special: bool | None = None) -> list[int]:
        """Token ids; no second beginning where the string has one of its own."""
        if not string:
            return []
        has_own = special is None and string.startswith(self.text.name(self.prefix))
        return self.text.encode(string, add_special_tokens=not has_own if special is None else special)

    def score(self, context: Sequence[int], following: Sequence[int]) -> Score:
        """log p(following | context), and whether it is what the model would say; the last of what is too long."""
        ids = [*context, *following][-(self.length + 1) :]
        wanted = np.array(ids[-min(len(following), len(ids) - 1) :])
        self.model.reset()
        logits = self.model.feed(ids[:-1], rows="all")[-len(wanted) :].astype(np.float64)
        rows = np.arange(len(wanted))
        shifted = logits - logits.max(axis=1, keepdims=True)
        likelihoods = shifted[rows, wanted] - np.log(np.exp(shifted).sum(axis=1))
        return float(likelihoods.sum()), bool((logits.argmax(axis=1) == wanted).all())

    def answer(self, prompt: str, until: Sequence[str], most: int) -> str:
        """A greedy answer, up to an end of text or to any of `until`, which is cut off."""
        ids = self.encode(prompt)[-max(1, self.length - most) :] or [self.prefix]
        self.model.reset()
        logits = self.model.feed(ids)
        found: list[int] = []
        while len(found) < most:
            token = int(logits[-1].argmax())
            if token in self.ends:
                break
            found.append(token)
            said = self.text.decode(found)
            if any(stop in said for stop in until):
                break
            logits = self.model.feed([token])
        said = self.text.decode(found) if found else ""
        return min((said.split(stop)[0] for stop in until), key=len, default=said)


class Requests:
    """The methods of an `lm_eval.api.model.TemplateLM`: requests are answered one after the other, in their order."""

    scorer: Scorer
    done: Done

    @property
    def eot_token_id(self) -> int:
        return self.scorer.ends[0]

    @property
    def prefix_token_id(self) -> int:
        return self.scorer.prefix

    @property
    def max_length(self) -> int:
        return self.scorer.length

    @property
    def tokenizer_name(self) -> str:
        return self.scorer.seal

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        return self.scorer.encode(string, add_special_tokens)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: object) -> list[Score]:
        return [
            self._told(self.scorer.score(context, following), number, requests)
            for number, (_, context, following) in enumerate(requests, 1)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: object) -> list[float]:
        return [self._told(self._rolling(r.args[0]), number, requests) for number, r in enumerate(requests, 1)]

    def _rolling(self, string: str) -> float:
        tools: Any = importlib.import_module("lm_eval.utils")
        windows = tools.get_rolling_token_windows(
            token_list=self.scorer.encode(string),
            prefix_token=self.scorer.prefix,
            max_seq_len=self.scorer.length,
            context_len=1,
        )
        return sum(self.scorer.score(*tools.make_disjoint_window(window))[0] for window in windows)

    def generate_until(self, requests: Sequence[Any], **_: object) -> list[str]:
        return [self._told(self._answer(*r.args), number, requests) for number, r in enumerate(requests, 1)]

    def _answer(self, prompt: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") or options.get("temperature"):
            raise BadInput("a task samples its answers", "Only greedy answers are compared here.")
        until: Any = options.get("until") or ()
        stops = [until] if isinstance(until, str) else list(map(str, until))
        return self.scorer.answer(prompt, stops, int(options.get("max_gen_toks", _MOST_ANSWER)))

    def _told(self, result: Any, number: int, requests: Sequence[Any]) -> Any:
        self.done(number, len(requests))
        return result


def make_model(scorer: Scorer, done: Done) -> Any:
    """A model of the harness; `done` hears of each request: how many were answered, and of how many."""
    base: Any = importlib.import_module("lm_eval.api.model").TemplateLM
    model: Any = type("BundleModel", (Requests, base), {})()
    model.scorer, model.done = scorer, done
    return model
