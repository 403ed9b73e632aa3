"""Functions and methods of a model that are replaced by equivalent ones while it is captured."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from pocketmoe.export.capture import recurrence, registered

_METHODS = recurrence.METHODS | registered.METHODS


@contextmanager
def monkeypatched(model: torch.nn.Module) -> Generator[None]:
    """Inside, the functions and methods that `model` calls and that cannot be exported as they are are replaced.

    Functions in the Python modules of its classes by `recurrence.FUNCTIONS` and a `SelectiveScan`, methods by `METHODS`
    there and in `registered`.
    """
    scan = recurrence.SelectiveScan()
    functions = {**recurrence.FUNCTIONS, recurrence.SELECTIVE_SCAN: scan}
    with ExitStack() as stack:
        for source in {type(module).__module__ for module in model.modules()}:
            namespace = sys.modules[source]
            for name, value in list(vars(namespace).items()):
                function = functions.get(getattr(value, "__name__", "")) if callable(value) else None
                if function is not None:
                    stack.enter_context(replaced(namespace, name, function))
        for module in model.modules():
            for name, method in _METHODS.get(type(module).__name__, {}).items():
                stack.enter_context(replaced(module, name, functools.partial(method, module)))
            if "dynamic" in str(getattr(module, "rope_type", "")):
                # dynamic rotary scaling begins beyond the context length, which a text never exceeds here
                plain = functools.partial(inspect.unwrap(type(module).forward), module)
                stack.enter_context(replaced(module, "forward", plain))
            if recurrence.SELECTIVE_SCAN in inspect.unwrap(type(module).forward).__code__.co_names:
                stack.callback(module.register_forward_pre_hook(scan.remember, with_kwargs=True).remove)
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Generator[None]:
    """Inside, an attribute of a module, or of a Python module, is another."""
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
