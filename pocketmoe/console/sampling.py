"""How to choose tokens, and what an answer is held to, as options of `run` and `chat`."""

# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false
# pyright: reportMissingTypeArgument=false
# (click's ParamType is generic in newer versions alone)

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pocketmoe.bundle.files import read_text
from pocketmoe.console.numbers import MOST_TOKENS, PATH, SEED, Number, Whole
from pocketmoe.console.options import gathered
from pocketmoe.grammar.constraint import Constraint, constraint


class LogitBias(click.ParamType):
    """ID=NUMBER."""

    name = "ID=NUMBER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        if not isinstance(value, str):
            return value
        token, sign, number = value.partition("=")
        if not sign:
            self.fail(f"{value[:40]!r} is not ID=NUMBER", param, ctx)
        return Whole(0, MOST_TOKENS).convert(token, param, ctx), Number(-1000, 1000).convert(number, param, ctx)


class TemplateVariable(click.ParamType):
    """NAME=VALUE, where a value is JSON if it can be, else a text."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if not isinstance(value, str):
            return value
        name, sign, text = value.partition("=")
        if not sign:
            self.fail(f"{value[:40]!r} is not NAME=VALUE", param, ctx)
        try:
            return template_variable(name, text)
        except ValueError as error:
            self.fail(str(error), param, ctx)


_OF_THE_CONVERSATION = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "template"}


def template_variable(name: str, text: str) -> tuple[str, Any]:
    """A variable for a chat template, such as `enable_thinking` and `false`. Raises ValueError."""
    if not name.isidentifier() or name in _OF_THE_CONVERSATION:
        raise ValueError(f"{name[:40]!r} is no variable that a chat template could be given")
    try:
        return name, json.loads(text)
    except (ValueError, RecursionError):
        return name, text


template_option = click.option(
    "--template",
    type=TemplateVariable(),
    multiple=True,
    help="A variable for the chat template, such as enable_thinking=false; may be given again.",
)


def _constraint(json_schema: str | None, regex: str | None, grammar: Path | None) -> Constraint | None:
    asked = {"--json-schema": json_schema, "--regex": regex, "--grammar": grammar}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise click.UsageError(f"Choose one of {' and '.join(given)}.")
    if json_schema is not None and not json_schema.lstrip().startswith("{"):
        json_schema = read_text(Path(json_schema), "Give a file, or the JSON schema itself: an object.")
    return constraint(json_schema, regex, grammar and read_text(grammar, "Give it as UTF-8 text."))


constraint_options = gathered(
    "constraint",
    _constraint,
    click.option(
        "--json-schema", metavar="FILE|JSON", help="Hold the answer to this JSON schema (needs the extra `grammar`)."
    ),
    click.option("--regex", metavar="REGEX", help="Hold the whole answer to this regular expression."),
    click.option(
        "--grammar", type=PATH, metavar="FILE", help="Hold the answer to this grammar, in llguidance's form of Lark."
    ),
)


_NUMBERS: dict[str, tuple[click.ParamType, float, str]] = {  # in the order in which they work (runtime/sampling.py)
    "repetition_penalty": (Number(0, 1000, open_below=True), 1.0, "Above 1: against tokens that the text has."),
    "frequency_penalty": (Number(0, 1000), 0.0, "Against a token, for each time that the answer has it."),
    "presence_penalty": (Number(0, 1000), 0.0, "Against a token that the answer has."),
    "no_repeat_ngram": (Whole(0, 1 << 20), 0, "No N tokens in a row twice."),
    "min_tokens": (Whole(0, MOST_TOKENS), 0, "The shortest answer."),
    "temperature": (Number(0, 1000), 0.0, "0 is greedy."),
    "top_k": (Whole(0, MOST_TOKENS), 0, "Only the N likeliest tokens; 0: all."),
    "top_p": (Number(0, 1, open_below=True), 1.0, "Nucleus sampling."),
    "min_p": (Number(0, 1), 0.0, "Only tokens at least so likely, as a share of the likeliest."),
    "typical_p": (Number(0, 1, open_below=True), 1.0, "Only tokens as surprising as is to be expected."),
}


def settings() -> dict[str, click.ParamType]:
    """What can be set by name, and what is a value of it."""
    return {name: kind for name, (kind, _, _) in _NUMBERS.items()} | {"seed": SEED}


def sampling_options(by_authors: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options that a command gets as one dict `sampling`, of those that were given or have a default.

    `by_authors`: what is not given is as the model's authors have it, and has no default here.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_sampling(**values: Any) -> Any:
            given = {name: values.pop(name) for name in (*settings(), "logit_bias")}
            return command(**values, sampling={name: value for name, value in given.items() if value not in (None, ())})

        bias = click.option(
            "--logit-bias", type=LogitBias(), multiple=True, help="Add to a token's logit; may be given again."
        )
        seed = click.option("--seed", type=SEED, metavar="N", help="For the same samples again.")
        numbers = [
            click.option(
                f"--{name.replace('_', '-')}",
                type=kind,
                metavar="N" if isinstance(kind, Whole) else "X",
                default=None if by_authors else default,
                show_default=not by_authors,
                help=help_,
            )
            for name, (kind, default, help_) in _NUMBERS.items()
        ]
        for option in (seed, *reversed(numbers), bias):
            with_sampling = option(with_sampling)
        return with_sampling

    return decorate
