"""The ways to get tokens, each as one record that says what it costs, how fast it is, and how that is known."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal
from urllib.parse import urlsplit

from pocketmoe.profiles.catalogue.clouds import Api, Gpu, Instance, Prices, Published
from pocketmoe.profiles.compare import cost
from pocketmoe.profiles.compare.cost import Assumptions, BreakEven, DeviceCost, Work
from pocketmoe.profiles.compare.endpoint import Level, Measurement
from pocketmoe.profiles.compare.subject import Budget, Subject
from pocketmoe.profiles.estimate import roofline

Basis = Literal["measured", "published", "predicted", "price only"]
Kind = Literal["device", "gpu", "api"]
TOY_PARAMETERS = 1_000_000_000
"""Below, nobody would pay for the model, and from where on it pays is not reckoned."""
ASSUMED_POWER = "estimated from the power assumed"


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to get tokens. None for what is not known. Rates are of output tokens; a price includes the prompts."""

    name: str
    kind: Kind
    provider: str = ""
    gpu: str = ""
    users: int | None = None
    basis: Basis  # of latency and rates
    model: str
    same_model: bool
    ttft_s: float | None = None
    tokens_per_s_per_user: float | None = None
    tokens_per_s: float | None = None  # of all users together
    usd_per_mtok: float | None = None
    spot_usd_per_mtok: float | None = None
    usd_per_month: float | None = None  # rented around the clock, or owned and idle
    kwh_per_mtok: float | None = None
    energy_basis: str = "unavailable"
    break_even_tokens_per_day: float | None = None
    never: str = ""  # why there is no break-even
    how: str  # bits, GPUs, users; the budget of a device
    latency_source: str = ""
    price_source: str = ""
    price_as_of: str = ""
    price_confidence: str = ""


def effective_tokens_per_s(budget: Budget, work: Work) -> float:
    """Output tokens per second, one request after the other, the prompts' time included."""
    return work.output_tokens * cost.requests_per_s(work, budget.ttft_s, budget.tokens_per_s)


def seconds(value: float | None) -> str:
    """Two digits that mean something, however short it is."""
    return "-" if value is None else f"{value:.2g} s" if value < 10 else f"{value:.0f} s"


def number(value: float | None, form: str, unit: str = "") -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:{form}}{unit}"


def price(option: Option) -> float:
    return float("inf") if option.usd_per_mtok is None else option.usd_per_mtok


def same_model(a: str, b: str) -> bool:
    """Whether a model that is sold is this one: its name begins the other's, organisations and punctuation aside."""

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.rsplit("/", 1)[-1].lower())

    return len(plain(a)) > 3 and len(plain(b)) > 3 and (plain(a).startswith(plain(b)) or plain(b).startswith(plain(a)))


class Offers:
    """Makes options that are all about the same work and device."""

    def __init__(self, subject: Subject, device: DeviceCost, given: Assumptions, prices: Prices) -> None:
        self._subject, self._model, self._served, self._work = subject, subject.model, subject.served, subject.work
        self._device, self._given, self._prices = device, given, prices

    def own(self, budget: Budget) -> Option:
        """This device at one budget."""
        effective = effective_tokens_per_s(budget, self._work)
        own = cost.device_cost(effective, self._given)
        watts = budget.watts if budget.watts is not None else self._given.load_watts
        return Option(
            name=f"this device, {budget.name}",
            kind="device",
            users=1,
            basis=self._subject.basis,
            model=self._model,
            same_model=True,
            ttft_s=budget.ttft_s,
            tokens_per_s_per_user=budget.tokens_per_s,
            tokens_per_s=effective,
            usd_per_mtok=own.usd_per_mtok(self._given.utilisation * own.most_tokens_per_day),
            usd_per_month=own.fixed_usd_per_day * 365.25 / 12,
            kwh_per_mtok=cost.kwh_per_mtok(watts, effective),
            energy_basis=budget.watts_label or ASSUMED_POWER,
            how=budget.how,
            latency_source=self._subject.source,
            price_source="assumptions",
        )

    def api(self, api: Api) -> Option:
        """A hosted model: a price by the token, and no latency that anyone vouches for."""
        usd = cost.api_usd_per_mtok(api.usd_per_mtok_in, api.usd_per_mtok_out, self._work)
        even = self._break_even(usd)
        return Option(
            name=f"{api.provider}: {api.model}",
            kind="api",
            provider=api.provider,
            basis="price only",
            model=api.model,
            same_model=same_model(api.model, self._model),
            usd_per_mtok=usd,
            break_even_tokens_per_day=even.tokens_per_day,
            never=even.why_never,
            how=f"{api.usd_per_mtok_in:g} in, {api.usd_per_mtok_out:g} out, per million tokens",
            price_source=api.source,
            price_as_of=api.as_of.isoformat(),
            price_confidence=api.confidence,
        )

    def _break_even(self, usd_per_mtok: float) -> BreakEven:
        """None against a toy: what it is sold for says nothing about a model that one would pay for."""
        if self._subject.parameters < TOY_PARAMETERS:
            return BreakEven(None)
        return cost.break_even(self._device, usd_per_mtok)

    def gpus(self) -> tuple[list[Option], list[str]]:
        """Each instance for one user and kept busy, predicted; and a line for those without room for the model."""
        options: list[Option] = []
        small: list[str] = []
        context = self._work.prompt_tokens + self._work.output_tokens
        for instance in self._prices.instance:
            gpu = self._prices.find_gpu(instance.gpu)
            fit = roofline.fit_gpus(self._served, gpu, instance.gpus, context)
            if fit is None:
                small.append(instance.label)
                continue
            options += [self._predicted(instance, gpu, fit, users) for users in (1, self._given.users)]
        noted = [f"no room for the model, even in 4 bits: {', '.join(small)}"] if small else []
        return options, noted

    def _predicted(self, instance: Instance, gpu: Gpu, fit: tuple[int, int], users: int) -> Option:
        bits, n = fit
        work = self._work
        found = roofline.serve(self._served, gpu, n, bits, users, work.prompt_tokens, work.output_tokens)
        copies = instance.gpus // n if users > 1 else 1
        return self._rented(
            instance,
            gpu,
            _Rate(
                users=found.users * copies,
                ttft_s=found.ttft_s,
                per_user=1 / found.step_s if users == 1 else found.tokens_per_s_per_user,
                total=found.tokens_per_s * copies,
                basis="predicted",
                source="roofline model",
                how=f"{bits}-bit weights, {copies} x {n} of {instance.gpus} GPUs"
                if instance.gpus > 1
                else f"{bits}-bit",
            ),
        )

    def measured(self, found: Measurement, instance: Instance | None) -> Iterator[Option]:
        """The endpoint, at each number of users; a price only where it was said what it ran on."""
        for level in found.levels:
            rate = _rate_of(level, f"measured at {found.url} on {found.measured_at}")
            if instance is not None:
                priced = self._rented(instance, self._prices.find_gpu(instance.gpu), rate, found.model)
                yield replace(priced, name=f"{endpoint_name(found)} on {priced.name}")
            else:
                yield replace(self._unpriced(rate, found.model), name=endpoint_name(found))

    def published(self) -> Iterator[Option]:
        """What others published for a GPU, at the cheapest instance that has it; under their workload, not this one."""
        for row in self._prices.published:
            offers = [i for i in self._prices.instance if i.gpu == row.gpu and i.gpus == row.gpus]
            if offers:
                cheapest = min(offers, key=lambda offer: offer.usd_per_hour)
                yield self._rented(cheapest, self._prices.find_gpu(row.gpu), _rate_published(row), row.model)

    def _rented(self, instance: Instance, gpu: Gpu, rate: _Rate, model: str = "") -> Option:
        used = 1.0 if instance.billed == "second" else self._given.cloud_utilisation
        usd = cost.rented_usd_per_mtok(instance.usd_per_hour, rate.total, used)
        even = self._break_even(usd)
        spot = instance.spot
        return replace(
            self._unpriced(rate, model or self._model),
            name=f"{instance.label} ({instance.gpus} x {gpu.name})",
            provider=instance.provider,
            gpu=gpu.name,
            usd_per_mtok=usd,
            spot_usd_per_mtok=cost.rented_usd_per_mtok(spot.value, rate.total, used) if spot else None,
            usd_per_month=instance.usd_per_hour * 24 * 365.25 / 12,
            kwh_per_mtok=cost.kwh_per_mtok(gpu.watts * instance.gpus, rate.total),
            energy_basis="estimated from the GPU's power limit",
            break_even_tokens_per_day=even.tokens_per_day,
            never=even.why_never,
            price_source=instance.source,
            price_as_of=instance.as_of.isoformat(),
            price_confidence=instance.confidence,
        )

    def _unpriced(self, rate: _Rate, model: str) -> Option:
        """A server of which no price is known."""
        return Option(
            name="endpoint",
            kind="gpu",
            users=rate.users or None,
            basis=rate.basis,
            model=model,
            same_model=same_model(model, self._model),
            ttft_s=rate.ttft_s,
            tokens_per_s_per_user=rate.per_user,
            tokens_per_s=rate.total,
            how=rate.how,
            latency_source=rate.source,
        )


@dataclass(frozen=True)
class _Rate:
    users: int  # 0: unknown
    ttft_s: float | None
    per_user: float | None
    total: float
    basis: Basis
    source: str
    how: str


def endpoint_name(found: Measurement) -> str:
    """The model as its server calls it, and where that is."""
    return f"{found.model} at {urlsplit(found.url).netloc or found.url}"


def _rate_of(level: Level, source: str) -> _Rate:
    return _Rate(
        users=level.users,
        ttft_s=level.ttft_median_s,
        per_user=level.tokens_per_s_per_user,
        total=level.tokens_per_s,
        basis="measured",
        source=source,
        how=f"{level.prompt_tokens:.0f} tokens in, {level.output_tokens:.0f} out, {level.requests} requests",
    )


def _rate_published(row: Published) -> _Rate:
    users = f"{row.users} users" if row.users else "as many users as gave the most"
    return _Rate(
        users=row.users,
        ttft_s=None,
        per_user=row.output_tokens_per_s / row.users if row.users else None,
        total=row.output_tokens_per_s,
        basis="published",
        source=f"{row.source}, {row.as_of}",
        how=f"{row.engine} {row.precision}, {row.prompt_tokens} in, {row.output_tokens} out, {users}",
    )


def chosen(options: Sequence[Option]) -> list[Option]:
    """What a picture has room for: the device at its best, each GPU where it is cheapest in either case, the APIs."""
    shown: dict[tuple[str, ...], Option] = {}
    for option in options:
        case = "one" if option.users == 1 else "many"
        key = {
            "device": ("device",),
            "gpu": ("gpu", option.gpu, case, option.basis, option.model, *_of_endpoint(option)),
            "api": ("api", option.name),
        }[option.kind]
        if key not in shown or price(option) < price(shown[key]):
            shown[key] = option
    return list(shown.values())


def cheapest_of_each(options: Sequence[Option]) -> list[Option]:
    """The first of each provider; options come by price."""
    found: dict[str, Option] = {}
    for option in options:
        found.setdefault(option.provider, option)
    return list(found.values())


def _of_endpoint(option: Option) -> tuple[str, ...]:
    """An endpoint was measured on purpose: each number of users counts."""
    return (option.name, str(option.users)) if option.basis == "measured" else ()
