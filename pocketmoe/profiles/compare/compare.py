"""A model on a device against rented GPUs and hosted APIs: cost, latency, energy, and from where on it pays.

Each figure says what it is: measured (here, or at an endpoint), published (by whom), predicted (the roofline model, or
the plan), or a price alone. A GPU is shown twice, for one user and kept busy by many, since the device serves one.
"""

from __future__ import annotations

from dataclasses import replace

from pocketmoe.profiles.compare import cost
from pocketmoe.profiles.compare.cost import Assumptions, DeviceCost
from pocketmoe.profiles.compare.findings import find, roofline_check, verdict
from pocketmoe.profiles.compare.offers import Offers, effective_tokens_per_s, price
from pocketmoe.profiles.compare.records import FORMAT, Comparison, DeviceSummary, Request
from pocketmoe.profiles.compare.subject import Budget, Subject


def compare(request: Request) -> Comparison:
    """Budgets, GPUs and APIs as options with cost and speed."""
    subject, given = request.subject, request.assumptions
    best = max(subject.budgets, key=lambda budget: effective_tokens_per_s(budget, subject.work))
    given = _measured_power(best, given)
    device = cost.device_cost(effective_tokens_per_s(best, subject.work), given)
    offers = Offers(replace(subject, model=request.model or subject.model), device, given, request.prices)
    summary = _summary(subject, best, device, given)
    gpus, too_small = offers.gpus()
    measured = offers.measured(request.measurement, request.instance) if request.measurement else ()
    options = (
        *(offers.own(budget) for budget in subject.budgets),
        *sorted([*measured, *offers.published(), *gpus], key=price),
        *sorted(map(offers.api, request.prices.api), key=price),
    )
    found = Comparison(
        format=FORMAT,
        created=request.created,
        model=request.model or subject.model,
        parameters=subject.parameters,
        work=subject.work,
        device=summary,
        assumptions=given,
        options=options,
        roofline=roofline_check(request.prices),
        findings=(),
        warnings=(*request.warnings, *subject.notes),
        skipped=(*request.skipped, *too_small),
        measurement=request.measurement,
    )
    return replace(found, verdict=verdict(found), findings=find(found))


def _measured_power(budget: Budget, given: Assumptions) -> Assumptions:
    """The assumptions, with the power that was measured in the place of the one assumed."""
    return given if budget.watts is None else replace(given, load_watts=budget.watts)


def _summary(subject: Subject, budget: Budget, device: DeviceCost, given: Assumptions) -> DeviceSummary:
    used = given.utilisation * device.most_tokens_per_day
    return DeviceSummary(
        name=subject.device,
        memory=budget.name,
        memory_budget_bytes=budget.memory_budget_bytes,
        ttft_s=budget.ttft_s,
        tokens_per_s=budget.tokens_per_s,
        effective_tokens_per_s=effective_tokens_per_s(budget, subject.work),
        fixed_usd_per_day=device.fixed_usd_per_day,
        marginal_usd_per_mtok=1e6 * device.marginal_usd_per_token,
        most_tokens_per_day=device.most_tokens_per_day,
        usd_per_mtok=device.usd_per_mtok(used),
        watts=given.load_watts,
        watts_basis=budget.watts_label or "assumed",
        basis=subject.basis,
    )
