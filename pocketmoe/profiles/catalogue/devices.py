"""What is known of common devices (`devices.toml`), for predictions on machines that are not at hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from pocketmoe.errors import BadInput, UnknownName
from pocketmoe.profiles.catalogue.sourced_value import Figure, Name, Positive, SourcedValue, Text, read_toml

Instructions = Literal["avx2", "avx512_vnni", "amx", "neon_dotprod"]
"""What ONNX Runtime's int4 and int8 kernels compute with."""
_DATA = Path(__file__).with_name("devices.toml")


class DiskRate(SourcedValue, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Random reads of `read_bytes` each: a bandwidth without its read size says nothing."""

    read_bytes: Positive
    bytes_per_s: Positive


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine. Compute is the CPU's, which is what the runtime uses; bandwidth is the peak of the memory bus."""

    title: Text
    memory_bytes: Figure
    memory_bandwidth_bytes_per_s: Figure
    disk_name: Text
    disk: Annotated[tuple[DiskRate, ...], msgspec.Meta(min_length=1)]  # by ascending read size
    instructions: Instructions
    int8_ops_per_s: Figure
    fp16_flops_per_s: Figure
    idle_watts: Figure
    load_watts: Figure
    price_usd: Figure
    note: str = ""

    def disk_bytes_per_s(self, read_bytes: float) -> float:
        """What its disk gives at reads of this size: see `rate_at`."""
        return rate_at([(rate.read_bytes, rate.bytes_per_s) for rate in self.disk], read_bytes)

    def figures(self) -> Iterator[SourcedValue]:
        """Every sourced figure."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            yield from (value if isinstance(value, tuple) else [value] if isinstance(value, SourcedValue) else [])


def rate_at(rates: Sequence[tuple[float, float]], read_bytes: float) -> float:
    """Bytes per second at a read size, from (read size, bytes per second) pairs in ascending order.

    Between two known sizes by a straight line in logarithms. Larger reads get the largest's bandwidth; smaller ones
    take as long as the smallest that is known, which can only understate them.
    """
    (low, low_rate), (high, high_rate) = rates[0], rates[-1]
    if read_bytes <= low:
        return low_rate * read_bytes / low
    if read_bytes >= high:
        return high_rate
    for (a, rate_a), (b, rate_b) in itertools.pairwise(rates):
        if read_bytes <= b:
            part = math.log(read_bytes / a) / math.log(b / a)
            return rate_a * (rate_b / rate_a) ** part
    raise AssertionError("sizes must ascend")


@cache
def known_devices() -> dict[str, Device]:
    """The devices of `devices.toml`, by name."""
    return read_devices(_DATA)


def read_devices(path: Path) -> dict[str, Device]:
    """The devices of a file of that form. Raises BadInput."""
    devices = read_toml(path, dict[Name, Device])
    for name, device in devices.items():
        sizes = [rate.read_bytes for rate in device.disk]
        if sizes != sorted(set(sizes)):
            raise BadInput(f"{path}: {name}: the read sizes of its disk do not ascend", "Put them in order.")
    return devices


def find_device(name: str, devices: Mapping[str, Device] | None = None, others: Sequence[str] = ()) -> Device:
    """A device by its name in any case. Raises BadInput, with the names most alike and all there are.

    `devices`: those to choose from, of devices.toml where none are given; `others`: names that the caller has besides.
    """
    known = {key.lower(): device for key, device in (known_devices() if devices is None else devices).items()}
    if name.lower() in known:
        return known[name.lower()]
    raise UnknownName("device", name, [*others, *known])
