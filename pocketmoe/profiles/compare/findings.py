"""What a comparison comes to, in words derived from its numbers; and how far its predictions can be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pocketmoe.profiles.catalogue.clouds import Prices
from pocketmoe.profiles.compare.cost import Assumptions
from pocketmoe.profiles.compare.offers import TOY_PARAMETERS, Option, endpoint_name, number, seconds
from pocketmoe.profiles.compare.records import Comparison, DeviceSummary
from pocketmoe.profiles.estimate import roofline
from pocketmoe.profiles.estimate.roofline import Served

# Models that others measured, as far as the roofline needs them: experts by their config.json, of the 3 B active
# parameters what is neither routed nor the embedding; caches in the layers with full attention only.
_MEASURED = {
    "Qwen3.6-35B-A3B": Served(
        parameters=34_660_000_000,
        read_parameters=1_480_000_000,
        moe_layers=40,
        experts=256,
        top_k=8,
        expert_parameters=3 * 2048 * 512,
        layers=40,
        kv_values_per_token=10 * 2 * 2 * 256,
    ),
}
_BITS = {"bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "fp4": 4, "int4": 4}


def roofline_check(prices: Prices) -> tuple[str, ...]:
    """How latency is predicted, and each published measurement beside what the same formula gives for it."""
    lines = [
        "Predicted: step = max(bytes / (0.6 bandwidth), operations / (0.4 peak)) + 1 ms + 0.08 ms per layer; a step of "
        "B tokens reads E (1 - (1 - k/E)^B) experts of each layer (uniform routing, an upper bound); a prompt is one "
        "step. On a machine with several GPUs the model is split over as few as hold it."
    ]
    for row in prices.published:
        model = _MEASURED.get(row.model)
        if model is None or not row.users:
            continue
        gpu = prices.find_gpu(row.gpu)
        found = roofline.serve(
            model, gpu, row.gpus, _BITS[row.precision], row.users, row.prompt_tokens, row.output_tokens
        )
        off = found.tokens_per_s / row.output_tokens_per_s - 1
        lines.append(
            f"{row.model}, {row.precision}, {row.users} users on {row.gpu}: predicted {found.tokens_per_s:.0f} "
            f"tokens/s, published {row.output_tokens_per_s:.0f} ({row.source}): {off:+.0%}."
        )
    return tuple(lines)


def offers_of_the_model(found: Comparison) -> list[Option]:
    """What sells this very model to one user, with a price; a GPU that many must share only if it was measured."""
    return [
        option
        for option in found.options
        if option.kind != "device"
        and option.same_model
        and option.usd_per_mtok is not None
        and (option.kind == "api" or option.users == 1 or option.basis == "measured")
    ]


def verdict(found: Comparison) -> str:
    """Whether it pays, in a few words."""
    offers = offers_of_the_model(found)
    if found.parameters < TOY_PARAMETERS:
        return "a toy, whose prices decide nothing"
    if not offers:
        return "nobody listed offers it, so there is nothing to pay instead"
    cheapest, own = min(offers, key=_usd), found.device.usd_per_mtok
    if own <= _usd(cheapest):
        return "it pays"
    if cheapest.break_even_tokens_per_day is not None:
        return f"it pays from {_tokens(cheapest.break_even_tokens_per_day)} tokens a day on"
    return "it does not pay"


def find(found: Comparison) -> tuple[str, ...]:
    """Sentences, the most important first."""
    return tuple(_find(found))


def _find(found: Comparison) -> Iterator[str]:
    device, given = found.device, found.assumptions
    apis = [o for o in found.options if o.kind == "api"]
    gpus = [o for o in found.options if o.kind == "gpu" and o.usd_per_mtok is not None]
    yield _verdict_sentence(found)
    yield (
        f"This device at {device.memory} makes {device.effective_tokens_per_s:.1f} output tokens/s for one user "
        f"({device.basis}), prompts included. A million tokens cost {usd(device.usd_per_mtok)} when it works "
        f"{given.utilisation:.0%} of the time: {usd(device.marginal_usd_per_mtok)} of that for power above idling."
    )
    yield from _about_endpoint(found)
    if apis:
        yield _about_apis(device, apis)
    yield from _about_gpus(device, gpus, given)
    yield from _about_break_even(found)
    yield "What no price shows: the device answers without a network, and keeps the text to itself."


def _verdict_sentence(found: Comparison) -> str:
    device, share = found.device, f"{found.assumptions.utilisation:.0%}"
    offers = offers_of_the_model(found)
    if found.parameters < TOY_PARAMETERS:
        return (
            f"The model has {found.parameters / 1e6:,.0f} million parameters: a toy. What it costs here and elsewhere "
            "shows how the sums go, and decides nothing; no break-even is reckoned."
        )
    if not offers:
        return "No offer of this model is listed: there is no price to hold against the device's."
    cheapest = min(offers, key=_usd)
    asked = f"{cheapest.name} asks {usd(_usd(cheapest))} per million tokens"
    own = f"{usd(device.usd_per_mtok)} here"
    if device.usd_per_mtok <= _usd(cheapest):
        return f"It pays at {share} use: {own}, and the cheapest offer of this model, {asked}."
    times = device.usd_per_mtok / max(1e-12, _usd(cheapest))
    if cheapest.break_even_tokens_per_day is not None:
        return (
            f"It pays from {_tokens(cheapest.break_even_tokens_per_day)} tokens a day on; at {share} use, "
            f"{_tokens(found.assumptions.utilisation * device.most_tokens_per_day)} tokens a day, it is {own}, and "
            f"the cheapest offer of this model, {asked}, {times:.1f} times less."
        )
    return (
        f"It does not pay: {own}, and the cheapest offer of this model, {asked}, {times:.1f} times less; no use of the "
        f"device makes it cheaper ({cheapest.never})."
    )


def _about_endpoint(found: Comparison) -> Iterator[str]:
    if found.measurement is None:
        return
    name = endpoint_name(found.measurement)
    levels = [o for o in found.options if o.kind == "gpu" and o.basis == "measured"]
    told = "; ".join(
        f"{option.users} at once: {number(option.tokens_per_s_per_user, '.1f')} tokens/s each, first token after "
        f"{seconds(option.ttft_s)}"
        + (f", {usd(option.usd_per_mtok)} per million tokens" if option.usd_per_mtok is not None else "")
        for option in sorted(levels, key=lambda o: o.users or 0)
    )
    same = all(option.same_model for option in levels)
    alone = next((o.tokens_per_s_per_user for o in levels if o.users == 1 and o.tokens_per_s_per_user), None)
    against = (
        f" For one user that is {alone / found.device.tokens_per_s:.2g} times this device's speed." if alone else ""
    )
    yield (
        f"The endpoint that was measured, {name}{'' if same else ', serves a model of another name'}: {told}.{against}"
        + ("" if any(o.usd_per_mtok is not None for o in levels) else " No price of it is known: give --instance.")
    )


def _about_apis(device: DeviceSummary, apis: Sequence[Option]) -> str:
    own = [o for o in apis if o.same_model]
    among = own or list(apis)
    cheapest = min(among, key=_usd)
    what = "this model" if own else "another model, since none of the APIs listed sells this one"
    ratio = device.usd_per_mtok / max(1e-12, _usd(cheapest))
    compared = f"{ratio:.1f} times cheaper" if ratio > 1 else f"{1 / ratio:.1f} times dearer"
    electric = device.marginal_usd_per_mtok
    alone = (
        f" The device's electricity alone ({usd(electric)}) is above that: no use makes it cheaper."
        if electric > _usd(cheapest)
        else ""
    )
    return (
        f"The cheapest API, {cheapest.name} ({what}), asks {usd(_usd(cheapest))} for the same work: {compared} than "
        f"this device.{alone}{'' if own else ' Another model answers otherwise: compare quality before price.'}"
    )


def _about_gpus(device: DeviceSummary, gpus: Sequence[Option], given: Assumptions) -> Iterator[str]:
    own = [o for o in gpus if o.same_model]
    single = [o for o in own if o.users == 1]
    many = [o for o in own if (o.users or 0) > 1]
    if single:
        cheapest = min(single, key=_usd)
        yield (
            f"A GPU that serves one user and works {given.cloud_utilisation:.0%} of the hours that are paid (all of "
            f"them where it is paid by the second) costs {usd(_usd(cheapest))} at best ({cheapest.name}, "
            f"{cheapest.basis}) at {cheapest.tokens_per_s_per_user:.0f} tokens/s: "
            f"{_compared(_usd(cheapest), device.usd_per_mtok)}."
        )
        rent = min(single, key=lambda o: o.usd_per_month or float("inf"))
        month = device.fixed_usd_per_day * 365.25 / 12
        relation = "less" if month < (rent.usd_per_month or 0) else "more"
        yield (
            f"The cheapest one rented around the clock is {rent.name} at {usd(rent.usd_per_month or 0)} a month. "
            f"Owning this device, idle, is {usd(month)} a month: {relation}, as long as its "
            f"{device.effective_tokens_per_s:.1f} tokens/s are enough."
        )
    if many:
        busy = min(many, key=_usd)
        yield (
            f"With {busy.users} users at once a GPU makes a million for {usd(_usd(busy))} ({busy.name}, {busy.basis}): "
            f"{_compared(_usd(busy), device.usd_per_mtok)}. One person alone cannot fill it."
        )


def _about_break_even(found: Comparison) -> Iterator[str]:
    """Of this model, and of others apart: one that answers otherwise is not won against by price."""
    if found.parameters < TOY_PARAMETERS:
        return
    offers = offers_of_the_model(found)
    won = [o for o in offers if o.break_even_tokens_per_day is not None]
    if offers:
        yield (
            f"By the token, there is a break-even against {len(won)} of {len(offers)} offers of this model"
            + (
                f"; the earliest is {min(map(_even, won)):,.0f} tokens a day ({min(won, key=_even).name}), of "
                f"{found.device.most_tokens_per_day:,.0f} that the device can make."
                if won
                else ": the device is never cheaper."
            )
        )
    others = [o for o in found.options if o.kind == "api" and not o.same_model and o.usd_per_mtok is not None]
    beaten = [o for o in others if o.break_even_tokens_per_day is not None]
    if beaten:
        latest = max(beaten, key=_even)
        yield (
            f"Against {len(beaten)} of {len(others)} APIs of other models the device is cheaper from some number of "
            f"tokens a day on, at the latest from {_even(latest):,.0f} ({latest.name}), if this model will do instead."
        )


def _tokens(count: float) -> str:
    return f"{count / 1e6:.2g} million" if count >= 1e6 else f"{count:,.0f}"


def _compared(cloud: float, device: float) -> str:
    if cloud <= device:
        return f"{device / max(1e-12, cloud):.1f} times cheaper than this device"
    return f"{cloud / device:.1f} times dearer than this device"


def _usd(option: Option) -> float:
    return float("inf") if option.usd_per_mtok is None else option.usd_per_mtok


def _even(option: Option) -> float:
    return float("inf") if option.break_even_tokens_per_day is None else option.break_even_tokens_per_day


def usd(amount: float) -> str:
    """`0.21 USD`, with as many digits as mean something."""
    if amount == 0:
        return "0 USD"
    if amount >= 100:
        return f"{amount:,.0f} USD"
    return f"{amount:.2f} USD" if amount >= 0.095 else f"{amount:.2g} USD"
