"""measure, which is hidden: what each process of `profile` does."""

from __future__ import annotations

import json

import click


@click.command(hidden=True)
@click.argument("order")
def measure(order: str) -> None:
    """Do one part of a profile: ORDER is JSON, and so is the answer. Progress goes to stderr, a line each."""
    import msgspec

    from pocketmoe.profiles.measure import worker
    from pocketmoe.runtime.memory.budget import refuse_over_budget

    def tell(what: str, done: int, total: int) -> None:
        click.echo(json.dumps([what, done, total]), err=True)

    try:
        found = msgspec.json.decode(order, type=worker.Order)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise click.BadParameter(f"{error}", param_hint="'ORDER'") from error
    is_survey = found.memory_bytes is None and found.expert_share is None
    answer = worker.survey(found, tell) if is_survey else worker.measure(found, tell)
    click.echo(msgspec.json.encode(answer))
    if isinstance(answer, worker.Measured):
        refuse_over_budget(answer.run.peak_memory_bytes, answer.run.memory_budget_bytes)
