"""What keeps the results of long work: steps that are done once, lines of which a kill tears only the last."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocketmoe.bundle.resume import Log, Work, resumable_work
from pocketmoe.errors import OutputError


def test_a_step_is_done_once(tmp_path: Path) -> None:
    """Its result comes back in its type; a step that fails is done again; work that keeps nothing does each anew."""
    made: list[str] = []

    def make() -> tuple[int, float]:
        made.append("")
        if len(made) == 1:
            raise ValueError("too early")
        return len(made), 0.1

    with resumable_work(tmp_path / "out", "a plan", workers=3) as work:
        assert work.workers == 3
        with pytest.raises(ValueError, match="too early"):
            work.once("step", tuple[int, float], make)
        assert [work.once("step", tuple[int, float], make) for _ in range(2)] == [(2, 0.1)] * 2
    assert list(tmp_path.iterdir()) == []
    forgetful = Work(tmp_path)
    assert [forgetful.once("step", tuple[int, float], make)[0] for _ in range(2)] == [3, 4]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("durable", [True, False])
def test_a_torn_line_can_be_cut_off(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"whole\ntor")
    with Log(path, durable) as log:
        whole, torn = log.read()
        assert (whole, torn) == (b"whole\n", b"tor")
        log.truncate(len(whole))
        log.append(b"next\n")
        assert path.read_bytes() == b"whole\nnext\n"
        assert log.read() == [b"whole\n", b"next\n"]


def test_a_log_has_one_writer(tmp_path: Path) -> None:
    with Log(tmp_path / "log") as log:
        assert log.try_lock()
        with Log(tmp_path / "log") as other:
            assert not other.try_lock()
    with Log(tmp_path / "log") as log:
        assert log.try_lock()
        assert log.is_plain(0)
        log.append(b"line\n")
        assert not log.is_plain(4)


def test_a_log_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="log: cannot be written"):
        Log(tmp_path / "nothing/log")
