"""Work in a child with limits: its result comes back, and whatever it does otherwise is one error."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest

from pocketmoe.isolated import IsolatedFailure, Limits, isolated

LIMITS = Limits(memory_bytes=256 << 20, cpu_s=20, wall_s=120)


class Panic(BaseException):
    """What is none of Exception's, as the panics of native code."""


def no_children() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
def test_the_result_comes_back_whole(size: int) -> None:
    """Bytes of any length, also more than a pipe holds."""
    data = os.urandom(size)
    assert isolated(lambda: data, LIMITS) == data
    assert no_children()


def panics() -> bytes:
    os.write(2, b"thread panicked\n")
    raise Panic("range end index\n out of range")


def endless() -> bytes:
    while True:
        pass


def waits() -> bytes:
    signal.pause()
    return b""


@pytest.mark.parametrize(
    ("work", "limits", "said"),
    [
        (panics, LIMITS, "^range end index out of range$"),
        (lambda: b"%d" % (1 // 0), LIMITS, "by zero"),
        (lambda: bytes(1 << 30), LIMITS, "MemoryError"),
        (lambda: os.abort(), LIMITS, "it crashes, or needs more than 256 MiB .SIGABRT."),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), LIMITS, "SIGSEGV"),
        (lambda: os._exit(3), LIMITS, "it ends with exit code 3"),
        (endless, Limits(LIMITS.memory_bytes, cpu_s=1, wall_s=600), "more than 1 s of processor time"),
        (waits, Limits(LIMITS.memory_bytes, cpu_s=20, wall_s=0), "longer than 0 s"),
    ],
)
def test_whatever_happens_is_one_error(
    work: Callable[[], bytes], limits: Limits, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Panics, crashes, bombs and hangs end the child, which says nothing and leaves nothing."""
    with pytest.raises(IsolatedFailure, match=said):
        isolated(work, limits)
    assert capfd.readouterr() == ("", "")
    assert no_children()


def test_the_parent_is_not_limited() -> None:
    """What is set for the child holds for it alone; what it changes stays there."""
    import resource

    before = [resource.getrlimit(which) for which in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_CORE)]
    seen: list[int] = []
    isolated(lambda: b"%d" % len(seen.append(1) or seen), LIMITS)
    assert not seen
    assert before == [
        resource.getrlimit(which) for which in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_CORE)
    ]


def test_an_interrupt_leaves_no_child() -> None:
    """Ctrl-C while a child works: the child is ended, the interrupt goes on."""
    main = threading.main_thread().ident
    assert main is not None
    alarm = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
    alarm.start()
    with pytest.raises(KeyboardInterrupt):
        isolated(waits, LIMITS)
    alarm.join()
    assert no_children()


def test_beside_busy_threads() -> None:
    """A child can be made while threads tokenize, as in a server: what they hold does not stop it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    text = "abab ba " * 200
    expected = made.encode(text).ids
    done = threading.Event()

    def busy() -> None:
        while not done.is_set():
            made.encode(text)

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            assert isolated(lambda: bytes(made.encode(text).ids), LIMITS) == bytes(expected)
    finally:
        done.set()
        for thread in threads:
            thread.join()
