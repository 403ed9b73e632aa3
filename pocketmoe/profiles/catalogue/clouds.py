"""What renting costs: GPUs, instances, hosted APIs and published throughput (`clouds.toml`), and a user's own rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from pocketmoe.errors import BadInput, UnknownName
from pocketmoe.profiles.catalogue.sourced_value import Amount, Figure, Name, Positive, SourcedValue, read_toml

_DATA = Path(__file__).with_name("clouds.toml")
_Count = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
_Tokens = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


class Gpu(SourcedValue, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One card. `dense_flops_per_s`: fp16 or bf16, without sparsity."""

    name: Name
    memory_bytes: Positive
    bandwidth_bytes_per_s: Positive
    dense_flops_per_s: Positive
    watts: Positive

    @property
    def key(self) -> tuple[str, ...]:
        return (self.name,)


class Instance(SourcedValue, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine for rent. `billed` by the second: nothing is paid while nothing runs."""

    provider: Name
    name: Name
    region: Name = "any"
    gpu: Name
    gpus: _Count = 1
    usd_per_hour: Positive
    spot: Figure | None = None  # USD per hour
    billed: Literal["hour", "second"] = "hour"

    @property
    def key(self) -> tuple[str, ...]:
        return (self.provider, self.name)

    @property
    def label(self) -> str:
        return f"{self.provider} {self.name}"


class Api(SourcedValue, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A hosted model."""

    provider: Name
    model: Name
    usd_per_mtok_in: Amount
    usd_per_mtok_out: Amount

    @property
    def key(self) -> tuple[str, ...]:
        return (self.provider, self.model)


class Published(SourcedValue, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Output tokens per second of all users together. `users` 0: as many as gave the highest rate."""

    gpu: Name
    gpus: _Count = 1
    model: Name
    engine: Name
    precision: Name
    users: Annotated[int, msgspec.Meta(ge=0, le=100_000)]
    prompt_tokens: _Tokens
    output_tokens: _Tokens
    output_tokens_per_s: Positive

    @property
    def key(self) -> tuple[str, ...]:
        return (self.gpu, self.model, str(self.users), self.engine, self.precision)


class Prices(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of prices: any of its lists may be missing."""

    gpu: tuple[Gpu, ...] = ()
    instance: tuple[Instance, ...] = ()
    api: tuple[Api, ...] = ()
    published: tuple[Published, ...] = ()

    def rows(self) -> Iterator[SourcedValue]:
        """Every sourced record, spot prices among them."""
        yield from (*self.gpu, *self.instance, *self.api, *self.published)
        yield from (instance.spot for instance in self.instance if instance.spot)

    def find_gpu(self, name: str) -> Gpu:
        """By its name in any case. Raises UnknownName."""
        for gpu in self.gpu:
            if gpu.name.lower() == name.lower():
                return gpu
        raise UnknownName("GPU", name, [gpu.name for gpu in self.gpu])

    def find_instance(self, label: str) -> Instance:
        """By `PROVIDER/NAME`, in any case. Raises UnknownName."""
        for instance in self.instance:
            if label.lower() in (f"{instance.provider}/{instance.name}".lower(), instance.label.lower()):
                return instance
        raise UnknownName("instance", label, [f"{instance.provider}/{instance.name}" for instance in self.instance])


def read_prices() -> Prices:
    """The prices that come with the package."""
    return _checked(read_toml(_DATA, Prices), _DATA, ())


def read_own(path: Path, base: Prices) -> Prices:
    """A user's rows. Raises BadInput for a file that is not of that form, or a GPU that nothing describes."""
    return _checked(read_toml(path, Prices), path, base.gpu)


def _checked(prices: Prices, path: Path, gpus: Iterable[Gpu]) -> Prices:
    known = {gpu.name for gpu in (*gpus, *prices.gpu)}
    for row in (*prices.instance, *prices.published):
        if row.gpu not in known:
            raise BadInput(
                f"{path}: {'/'.join(row.key)} has the GPU {row.gpu!r}, which no [[gpu]] describes",
                f"Add its row, or name one of: {', '.join(sorted(known))}.",
            )
    return prices


def merge(base: Prices, over: Prices) -> Prices:
    """`over`'s rows in the place of those with the same key, and after them."""
    return Prices(
        gpu=_merged(base.gpu, over.gpu),
        instance=_merged(base.instance, over.instance),
        api=_merged(base.api, over.api),
        published=_merged(base.published, over.published),
    )


_Row = TypeVar("_Row", Gpu, Instance, Api, Published)


def _merged(base: Iterable[_Row], over: Iterable[_Row]) -> tuple[_Row, ...]:
    return tuple({row.key: row for row in (*base, *over)}.values())


def choose(prices: Prices, clouds: Sequence[str]) -> Prices:
    """The instances and APIs of the clouds named: a provider, an instance, a GPU or a model; all for none named.

    Raises BadInput for a name that nothing has.
    """
    if not clouds:
        return prices
    wanted = {cloud.lower() for cloud in clouds}
    found: set[str] = set()

    def keep(row: Instance | Api) -> bool:
        names = {row.provider.lower(), "/".join(row.key).lower()}
        names |= {row.gpu.lower(), row.name.lower()} if isinstance(row, Instance) else {row.model.lower()}
        found.update(names & wanted)
        return bool(names & wanted)

    instances, apis = tuple(filter(keep, prices.instance)), tuple(filter(keep, prices.api))
    for cloud in clouds:
        if cloud.lower() not in found:
            providers = sorted({row.provider for row in (*prices.instance, *prices.api)})
            raise UnknownName("cloud", cloud, providers, "; or name an instance, GPU or model")
    return msgspec.structs.replace(prices, instance=instances, api=apis)
