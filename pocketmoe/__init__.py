"""PocketMoE: Mixture-of-Experts language models on machines that are too small for them.

__main__.py     where the process begins: `python -m pocketmoe`, and the console script
api.py          load, export, quantize, evaluate, plan: what Python users call
calibration.py  what a calibration text showed of a model's experts
cli.py          the group of commands; the one place an error becomes an exit code
coded.py        the codes of weights that were quantized already, which an export hands to a quantizer to keep
errors.py       every error a user can meet, with its exit code and remedy
isolated.py     work on files of strangers in a child process with limits, so that a crash, a hang or a bomb ends the
                child alone
jsonfile.py     a JSON file of foreign making, read as Python's json and so transformers read it, within bounds
ort.py          the one door to ONNX Runtime: every session of the package is made and run here
process.py      the process around a command: its signals and its three streams. Light, since it comes before all other
                imports
sizes.py        what 800MB or 40% means
"""

import importlib
import os
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

TELEMETRY_OFF = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime 1.29 and later
    "HF_HUB_DISABLE_TELEMETRY": "1",  # what transformers is used with, in each request to the hub
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers asks the hub's bot to convert a checkpoint of pickles
    "RAY_USAGE_STATS_ENABLED": "0",
}
for _name, _value in TELEMETRY_OFF.items():
    os.environ.setdefault(_name, _value)

_PUBLIC = ("Chat", "Generation", "Model", "Stream", "evaluate", "export", "load", "plan", "quantize")
_ROOMS = ("export", "quantize")  # packages whose names `api` has functions of, too


class _Callable(ModuleType):
    """A package that can be called: that calls the function of its name in `api`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module("pocketmoe.api"), self.__name__.rpartition(".")[2])(*args, **options)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        """Python's import sets a package's modules as its attributes, which would hide a function of that name."""
        if name in _ROOMS and isinstance(value, ModuleType):
            value.__class__ = _Callable
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"pocketmoe.{name}")
    if name in _PUBLIC:
        return getattr(importlib.import_module("pocketmoe.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
