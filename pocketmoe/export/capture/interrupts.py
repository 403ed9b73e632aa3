"""Ctrl-C while torch traces: raised where Python runs by itself, not where native code has called it.

Symbolic sizes are Python objects that native code asks hundreds of thousands of questions in one export. An exception
out of such an answer either ends the process (where the asking function must not throw) or comes back as another error
(`TypeError: failed to unpack the object`), which reads as if the model could not be exported.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_CALLED_BACK = ("torch/fx/experimental/sym_node.py", "torch/fx/experimental/symbolic_shapes.py", "torch/_subclasses/")
_AGAIN_S = 0.005


@contextmanager
def outside_callbacks() -> Iterator[None]:
    """Inside, SIGINT reaches its handler once no answer to native code is being computed, some ms later at most.

    Only in the main thread, which is where Python handles signals; elsewhere nothing changes.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def handle(number: int, frame: FrameType | None) -> Any:
        if not _is_called_back(frame):
            return before(number, frame)
        again = threading.Timer(_AGAIN_S, signal.pthread_kill, (threading.main_thread().ident, number))
        again.daemon = True
        again.start()
        return None

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _is_called_back(frame: FrameType | None) -> bool:
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in _CALLED_BACK):
            return True
        frame = frame.f_back
    return False
