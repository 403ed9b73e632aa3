"""Where experts are converted: on this machine's threads, or by Ray (https://ray.io) in processes here or elsewhere.

The driver reads, writes and logs what is written; a worker is sent an expert's bytes and the quantizer of its kind, and
needs no file. What comes back does not depend on who did it: workers whose packages are not the driver's are refused.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir
import onnxruntime
from threadpoolctl import threadpool_limits

import pocketmoe
from pocketmoe.bundle.stream import Buffer
from pocketmoe.calibration import ExpertSample
from pocketmoe.errors import BadInput, PocketMoEError, install
from pocketmoe.quantize.experts import ExpertReport, KindQuantizer

Workers = int | str | None  # threads; `ray`: Ray started here; `ray://host:port`: a cluster. None: a thread per core
Convert = Callable[[Buffer, str, ExpertSample | None], tuple[Buffer, ExpertReport]]

LOCAL = "ray"
_SCHEME = "ray://"
PACKAGES = {"onnx-ir": onnx_ir, "onnxruntime": onnxruntime, "numpy": np, "pocketmoe": pocketmoe}


class Crew(Protocol):
    """Converts experts. `size`: how many of them to have under way at a time."""

    @property
    def size(self) -> int: ...

    def converter(self, quantizer: KindQuantizer) -> Convert:
        """`quantizer.convert`, wherever it runs; called from `size` threads, it raises what that raises."""
        ...


def check_workers(workers: Workers) -> None:
    """Raises BadInput for what is no number of threads or address, and where Ray is wanted and not installed."""
    if workers is None or (isinstance(workers, int) and workers > 0):
        return
    if not isinstance(workers, str) or (workers != LOCAL and not workers.startswith(_SCHEME)):
        raise BadInput(f"workers {workers!r} are unknown", f"Give a number, {LOCAL}, or {_SCHEME}HOST:PORT.")
    if not find_spec("ray"):
        raise BadInput(f"workers {workers!r} need ray, which is not installed", install("ray"))


def threads_of(workers: Workers) -> int:
    """How many threads this machine itself works with."""
    return workers if isinstance(workers, int) else os.cpu_count() or 1


@contextlib.contextmanager
def open_crew(workers: Workers) -> Generator[Crew]:
    """Raises BadInput as `check_workers`, and for a cluster that does not answer."""
    check_workers(workers)
    if isinstance(workers, str):
        with _ray(workers) as crew:
            yield crew
    else:
        yield _Threads(threads_of(workers))


@dataclass(frozen=True)
class _Threads:
    size: int

    def converter(self, quantizer: KindQuantizer) -> Convert:
        return lambda record, name, sample: quantizer.convert(memoryview(record), name, sample)


class _Ray:
    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._task = ray.remote(num_cpus=1, max_retries=3)(_convert)  # a worker that dies is replaced
        self.size = int(ray.cluster_resources().get("CPU", 1)) + 1  # one is on its way

    def converter(self, quantizer: KindQuantizer) -> Convert:
        sent = self._ray.put(quantizer)

        def convert(record: Buffer, name: str, sample: ExpertSample | None) -> tuple[Buffer, ExpertReport]:
            data = np.frombuffer(record, np.uint8)
            try:
                return self._ray.get(self._task.remote(sent, data, name, sample, versions()))
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, PocketMoEError) else error from None
            except self._ray.exceptions.RayError as error:
                raise BadInput(
                    f"{name}: its Ray worker was lost, three more too ({type(error).__name__})",
                    "See to the workers' memory and run the same command again: it goes on where it was.",
                ) from error

        return convert


def _convert(
    quantizer: KindQuantizer, record: np.ndarray, name: str, sample: ExpertSample | None, driver: dict[str, str]
) -> tuple[Buffer, ExpertReport]:
    """What a Ray worker does. Raises BadInput where its packages are not the driver's."""
    mine = versions()
    if mine != driver:
        packages = ", ".join(f"{k} {v} instead of {driver[k]}" for k, v in mine.items() if v != driver[k])
        raise BadInput(f"a Ray worker has {packages}", "Install the same versions on all machines.")
    with threadpool_limits(1):
        return quantizer.convert(record.data, name, sample)


def versions() -> dict[str, str]:
    """Of the packages that quantized bytes depend on."""
    return {name: module.__version__ for name, module in PACKAGES.items()}


@contextlib.contextmanager
def _ray(workers: str) -> Generator[_Ray]:
    """A Ray of our own, or a cluster, which is sent our code; a session that is there already is used and left."""
    import ray

    if workers == LOCAL and ray.is_initialized():
        yield _Ray(ray)
        return
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if workers == LOCAL:
        options |= {"address": "local", "include_dashboard": False}
    else:
        code = str(Path(pocketmoe.__file__).parent)
        options = {"address": workers, "runtime_env": {"py_modules": [code]}, "log_to_driver": False}
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ImportError, TimeoutError) as error:
        raise BadInput(
            f"Ray at {workers} does not answer ({error})",
            "See `ray status` there, and that both sides have the same RAY_AUTH_TOKEN.",
        ) from error
    try:
        yield _Ray(ray)
    finally:
        ray.shutdown()
