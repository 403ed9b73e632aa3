"""The JSON that commands print and write keeps its field names, whatever the code calls them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import inspect

from pocketmoe.bundle.inspection import Inspection
from pocketmoe.bundle.manifest import Manifest
from pocketmoe.bundle.packed import PackedListing
from pocketmoe.profiles.compare.endpoint import Measurement
from pocketmoe.profiles.compare.records import Comparison
from pocketmoe.profiles.machine.doctor import DoctorReport
from pocketmoe.profiles.plan.plan import PlanReport
from pocketmoe.profiles.profile import Profile
from pocketmoe.profiles.quality.report import QualityReport
from pocketmoe.profiles.routing.replay import ReplayReport
from pocketmoe.quantize.plan import QuantizationPlan
from pocketmoe.runtime.generate import RunReport
from pocketmoe.runtime.trace import TraceInfo

RECORDS = (
    RunReport,
    QualityReport,
    Profile,
    PlanReport,
    ReplayReport,
    Inspection,
    PackedListing,
    DoctorReport,
    Comparison,
    Measurement,
    QuantizationPlan,
    TraceInfo,
    Manifest,
)
PROMISED = Path(__file__).with_name("json_fields.txt")  # a path a line; new ones are added by hand, none ever goes


def paths(kind: inspect.Type, prefix: str) -> Iterator[str]:
    """Every field below a type, as it is called in JSON: `RunReport.step.mean_s`."""
    if isinstance(kind, inspect.StructType | inspect.DataclassType):
        for field in kind.fields:
            yield f"{prefix}.{field.encode_name}"
            yield from paths(field.type, f"{prefix}.{field.encode_name}")
    elif isinstance(kind, inspect.Metadata):
        yield from paths(kind.type, prefix)
    elif isinstance(kind, inspect.UnionType):
        for option in kind.types:
            yield from paths(option, prefix)
    elif isinstance(kind, inspect.TupleType):
        for item in kind.item_types:
            yield from paths(item, prefix)
    elif isinstance(kind, inspect.VarTupleType | inspect.ListType):
        yield from paths(kind.item_type, prefix)
    elif isinstance(kind, inspect.DictType):
        yield from paths(kind.value_type, prefix)


def found(record: type[Any]) -> set[str]:
    return set(paths(inspect.type_info(record), record.__name__))


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_no_field_that_was_promised_is_gone(record: type[Any]) -> None:
    """Scripts and old files rely on each of them."""
    promised = {line for line in PROMISED.read_text().split() if line.split(".")[0] == record.__name__}
    assert promised, "nothing is promised"
    assert promised - found(record) == set()


def test_a_renamed_field_keeps_its_name_in_json() -> None:
    """A struct's own name for a field never shows."""
    as_json = msgspec.json.encode(Renamed(inside=1))
    assert as_json == b'{"outside":1}'
    assert found(Renamed) == {"Renamed.outside"}


class Renamed(msgspec.Struct):
    """A record whose field has another name in JSON."""

    inside: int = msgspec.field(name="outside")
