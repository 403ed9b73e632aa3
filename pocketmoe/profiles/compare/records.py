"""What a comparison is made of, and the record it comes to."""

from __future__ import annotations

from dataclasses import dataclass

from pocketmoe.profiles.catalogue.clouds import Instance, Prices
from pocketmoe.profiles.compare.cost import Assumptions, Work
from pocketmoe.profiles.compare.endpoint import Measurement
from pocketmoe.profiles.compare.offers import Option
from pocketmoe.profiles.compare.subject import Subject

FORMAT = 1


@dataclass(frozen=True)
class DeviceSummary:
    """The device at its fastest budget, on which its costs stand. `basis`: of its speed, measured or predicted."""

    name: str
    memory: str
    memory_budget_bytes: int
    ttft_s: float
    tokens_per_s: float  # decoding
    effective_tokens_per_s: float  # output tokens, the prompts' time included
    fixed_usd_per_day: float
    marginal_usd_per_mtok: float
    most_tokens_per_day: float
    usd_per_mtok: float  # at the utilisation assumed
    watts: float
    watts_basis: str
    basis: str = "measured"


@dataclass(frozen=True)
class Comparison:
    """The content of compare.json."""

    format: int
    created: str
    model: str
    parameters: int
    work: Work
    device: DeviceSummary
    assumptions: Assumptions
    options: tuple[Option, ...]  # the device's own budgets, then GPUs, then APIs; each by price
    roofline: tuple[str, ...]  # how it is computed, how far it was off where somebody measured
    findings: tuple[str, ...]
    warnings: tuple[str, ...]
    skipped: tuple[str, ...]
    measurement: Measurement | None = None
    verdict: str = ""  # whether it pays, in a few words


@dataclass(frozen=True)
class Request:
    """What is compared with what. `instance`: where the measurement ran, for its price."""

    subject: Subject
    prices: Prices
    assumptions: Assumptions
    created: str
    model: str = ""  # what the model is called on a hub, where the subject does not know it
    measurement: Measurement | None = None
    instance: Instance | None = None
    warnings: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
