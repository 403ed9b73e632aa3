"""A profile of this device against rented GPUs and hosted APIs: cost, latency, energy, and from where on it pays.

Each figure says what it is: measured (here, or at an endpoint), published (by whom), predicted (the roofline model), or
a price alone. A GPU is shown twice, for one user and kept busy by many, since the device serves one.
"""

from __future__ import annotations

from dataclasses import replace

from pocketmoe.errors import BadInput
from pocketmoe.profiles.compare import cost
from pocketmoe.profiles.compare.cost import Assumptions, DeviceCost, Work
from pocketmoe.profiles.compare.findings import find, roofline_check
from pocketmoe.profiles.compare.offers import Offers, effective_tokens_per_s, price
from pocketmoe.profiles.compare.records import FORMAT, Comparison, DeviceSummary, Request
from pocketmoe.profiles.estimate.roofline import served_of_profile
from pocketmoe.profiles.profile import Profile, Run


def compare(request: Request) -> Comparison:
    """Budgets, GPUs and APIs as options with cost and speed. Raises BadInput for a profile that measured no budget."""
    profile, given = request.profile, request.assumptions
    runs = [run for run in profile.runs if run.read_bytes_per_s is None]
    if not runs:
        raise BadInput("the profile has no measured budget yet", "Measure one: pocketmoe profile BUNDLE -o DIR.")
    work = Work(profile.workload.prompt_tokens, profile.workload.output_tokens)
    best = max(runs, key=lambda run: effective_tokens_per_s(run, work))
    given = _measured_power(best, given)
    device = cost.device_cost(effective_tokens_per_s(best, work), given)
    source = profile.model.source
    model = request.model or (source if "/" in source else profile.model.name)
    offers = Offers(model, served_of_profile(profile), work, device, given, request.prices)
    summary = _summary(profile, best, work, device, given)
    gpus, too_small = offers.gpus()
    measured = offers.measured(request.measurement, request.instance) if request.measurement else ()
    options = (
        *(offers.own(run) for run in runs),
        *sorted([*measured, *offers.published(), *gpus], key=price),
        *sorted(map(offers.api, request.prices.api), key=price),
    )
    skipped = (*request.skipped, *too_small)
    return Comparison(
        format=FORMAT,
        created=request.created,
        model=model,
        parameters=profile.model.parameters,
        work=work,
        device=summary,
        assumptions=given,
        options=options,
        roofline=roofline_check(request.prices),
        findings=find(summary, options, given),
        warnings=request.warnings,
        skipped=skipped,
        measurement=request.measurement,
    )


def _measured_power(run: Run, given: Assumptions) -> Assumptions:
    """The assumptions, with the power that was measured in the place of the one assumed."""
    return given if run.energy.watts is None else replace(given, load_watts=run.energy.watts)


def _summary(profile: Profile, run: Run, work: Work, device: DeviceCost, given: Assumptions) -> DeviceSummary:
    used = given.utilisation * device.most_tokens_per_day
    return DeviceSummary(
        name=profile.machine.cpu,
        memory=run.memory,
        memory_budget_bytes=run.memory_budget_bytes,
        ttft_s=run.ttft_s,
        tokens_per_s=run.mean_tokens_per_s,
        effective_tokens_per_s=effective_tokens_per_s(run, work),
        fixed_usd_per_day=device.fixed_usd_per_day,
        marginal_usd_per_mtok=1e6 * device.marginal_usd_per_token,
        most_tokens_per_day=device.most_tokens_per_day,
        usd_per_mtok=device.usd_per_mtok(used),
        watts=given.load_watts,
        watts_basis=run.energy.label if run.energy.watts is not None else "assumed",
    )
