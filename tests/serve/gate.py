"""Holds a server's model in the middle of a step, until a test lets it go on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from typing import Any

from tests.hang import HANG_S
from tests.serve.client import Running


class Gate:
    """`entered` is set once a step has come to the gate."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._open = threading.Event()

    def __call__(self, *_: Any) -> None:
        self.entered.set()
        assert self._open.wait(HANG_S)

    def wait(self) -> None:
        assert self.entered.wait(HANG_S)

    def open(self) -> None:
        self._open.set()


@contextlib.contextmanager
def gate(server: Running) -> Generator[Gate]:
    """No step of the loaded model ends before the gate is opened, or the block left."""
    held = Gate()
    model = server.serving.models.loaded
    assert model is not None
    engine = model.engine
    engine.on_routes = held
    try:
        yield held
    finally:
        held.open()
        engine.on_routes = None
