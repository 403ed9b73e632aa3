"""Ray's workers write what threads write, and fail as they do."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput, BudgetTooSmall, DamagedFile, GateFailed, PocketMoEError
from pocketmoe.quantize import workers
from pocketmoe.quantize.apply import quantize_bundle
from pocketmoe.quantize.experts import KindQuantizer
from pocketmoe.quantize.workers import LOCAL, Convert, check_workers, open_crew
from tests.bundles import tree

TinyBundle = Callable[[str], Bundle]
ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]  # Ray's own, while it starts


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def hired(work: Callable[[], Any], use: Callable[[Convert], Any]) -> Any:
    """Use what a worker of Ray makes of a quantizer that does this work."""

    class Quantizer(KindQuantizer):
        def __init__(self) -> None:
            """Of no bundle."""

        def convert(self, record: memoryview, name: str, sample: object, kept: object = None) -> Any:
            return work()

    with open_crew(LOCAL) as crew:
        return use(crew.converter(Quantizer()))


@pytest.mark.usefixtures("cluster")
def test_ray_writes_the_same_bytes(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    source = tiny_bundle("olmoe").root
    here = quantize_bundle(source, tmp_path / "here", scheme="int4", workers=1)
    there = quantize_bundle(source, tmp_path / "there", scheme="int4", workers=LOCAL)
    assert tree(there.root) == tree(here.root)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    "error",
    [GateFailed("layer 1, expert 2: off", "More bits."), DamagedFile("records", "cut off"), ValueError("a bug")],
)
def test_an_error_of_a_worker_is_raised_as_it_is(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        hired(fail, lambda convert: convert(b"record", "layer 1, expert 2", None))
    assert str(error) in str(caught.value)
    if isinstance(error, PocketMoEError):
        assert isinstance(caught.value, PocketMoEError)
        assert caught.value.one_line() == error.one_line()


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_dies_is_replaced_and_one_that_always_dies_named(tmp_path: Path) -> None:
    died = tmp_path / "died"

    def die_once() -> tuple[bytes, None]:
        if not died.exists():
            died.touch()
            os._exit(1)
        return b"quantized", None

    assert hired(die_once, lambda convert: convert(b"record", "layer 0, expert 0", None)) == (b"quantized", None)
    with pytest.raises(BadInput, match="layer 0, expert 3: its Ray worker was lost"):
        hired(lambda: os._exit(1), lambda convert: convert(b"record", "layer 0, expert 3", None))


@pytest.mark.usefixtures("cluster")
def test_workers_of_another_version_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "versions", lambda: {**dict.fromkeys(workers.PACKAGES, "0"), "numpy": "1.0"})
    with pytest.raises(BadInput, match=r"a Ray worker has .*numpy .* instead of 1\.0"):
        hired(lambda: None, lambda convert: convert(b"record", "layer 0, expert 0", None))


@pytest.mark.parametrize("workers", [0, -1, "many", "http://host", "ray:host"])
def test_unknown_workers_are_refused_before_anything_is_done(tmp_path: Path, workers: int | str) -> None:
    with pytest.raises(BadInput, match="are unknown"):
        quantize_bundle(tmp_path / "nothing", tmp_path / "q", scheme="int4", workers=workers)


def test_missing_ray_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "find_spec", lambda _: None)
    with pytest.raises(BadInput, match="need ray, which is not installed") as caught:
        check_workers("ray://host:10001")
    assert "[ray]" in caught.value.remedy


def test_errors_survive_the_way_between_processes() -> None:
    for error in (GateFailed("a", "b"), DamagedFile("file", "cut off"), BudgetTooSmall(10, 2_500_000)):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert (copy.one_line(), vars(copy)) == (error.one_line(), vars(error))
