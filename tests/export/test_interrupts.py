"""Ctrl-C in the middle of a capture is Ctrl-C, wherever torch's native code has called Python."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental import sym_node

from pocketmoe.export.capture import capture
from pocketmoe.export.capture.custom_op import find_experts
from pocketmoe.export.capture.interrupts import outside_callbacks
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's exporter


def as_if_in(path: str, call: Callable[[], object]) -> Callable[[], object]:
    """`call`, called from a function of that file."""
    names: dict[str, Any] = {"call": call}
    exec(compile("def outer():\n    return call()\n", path, "exec"), names)
    outer: Callable[[], object] = names["outer"]
    return outer


def interrupt() -> str:
    signal.raise_signal(signal.SIGINT)
    return "went on"


def test_an_interrupt_waits_for_the_end_of_a_callback() -> None:
    done = []

    def work() -> None:
        with outside_callbacks():
            done.append(as_if_in(sym_node.__file__, interrupt)())
            while True:
                time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_elsewhere_comes_at_once_and_by_the_handler_that_was_there() -> None:
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: seen.append(number))
    try:
        with outside_callbacks():
            as_if_in("/somewhere/model.py", interrupt)()
            assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_changes_no_handler() -> None:
    found = []

    def work() -> None:
        with outside_callbacks():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_a_capture_is_interrupted_and_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """While torch unpacks a symbolic size: a KeyboardInterrupt there came out as an architecture that is refused."""
    model = tiny.make_model("mixtral")
    plain, calls = sym_node.SymNode.is_int, []

    def is_int(node: Any) -> Any:
        calls.append(node)
        if len(calls) == 1:
            as_if_in(sym_node.__file__, interrupt)()
        return plain(node)

    monkeypatch.setattr(sym_node.SymNode, "is_int", is_int)
    with pytest.raises(KeyboardInterrupt):
        capture(model, find_experts(model))
    assert calls
    with torch.no_grad():
        assert model(torch.tensor([[5, 6]])).logits.isfinite().all()
