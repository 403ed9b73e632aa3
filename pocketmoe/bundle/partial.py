"""Partial directories: what is being written lies beside its target under a name of its own until it is complete.

What a killed writer leaves is found by the next one to the same target, which goes on with it or removes it. Its name
alone does not make it ours: archives and clones bring directories of any name. So nothing is removed but a directory
of this user's, never a link, that holds `.resume`, or is empty, or is what the caller says it would have written; and
nothing is gone on with but what was written here. A file's time of change tells that: the system sets it, no archive
can.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from pocketmoe.bundle.files import changed_ns, is_folder, is_plain_file
from pocketmoe.bundle.manifest import STORE
from pocketmoe.bundle.progress import OnStep, Progress, no_progress, no_step
from pocketmoe.system.files import open_folder
from pocketmoe.system.locks import lock_now

PARTIAL = ".partial"
RESUME = ".resume"  # in it: the plan, which experts are written (`stream`), what steps found (`resume`)
_DIGITS = 8  # of a partial directory's name


def left_beside(target: Path, suffix: str) -> Iterator[Path]:
    """What lies beside the target under a name that a writer to it gives, whatever it is."""
    return target.parent.glob(f".{glob.escape(target.name)}.{'?' * _DIGITS}{suffix}")


@contextlib.contextmanager
def partial_directory(
    target: Path,
    plan: str | None = None,
    progress: Progress = no_progress,
    is_ours: Callable[[Path], bool] = lambda _: False,
    mode: int = 0o755,
    on_step: OnStep = no_step,
    keeps: Callable[[BaseException], bool] = lambda _: False,
) -> Generator[Path]:
    """A directory beside the target to write in, which is removed at the end; those of killed writers go first.

    Where one of them had the same plan, it is that one, with the experts it had written (`stream`). It is locked, so
    that the next writer to the same target can tell one in use from one left behind. `is_ours` knows directories
    without `.resume` that may be removed all the same. `on_step` is told `locked`, before the directory has its plan.
    What an error leaves that `keeps` knows stays, as if the writer had been killed.
    Raises OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = False

    def remove(root: Path) -> None:
        if not kept:
            _remove(root)

    with contextlib.ExitStack() as cleanup:
        left = _clean_up_after_the_killed(target, plan, cleanup, progress, is_ours, remove)
        root = left or _make_locked(target, cleanup, mode, remove)
        on_step("locked")
        if left is None:
            _begin(root, plan)
        try:
            yield root
        except BaseException as error:
            kept = keeps(error)
            raise


def mark_complete(partial: Path) -> None:
    """Remove what a partial directory has for another run to go on with: nothing is left to do."""
    shutil.rmtree(partial / RESUME, ignore_errors=True)


def _begin(root: Path, plan: str | None) -> None:
    (root / RESUME).mkdir(mode=0o755)
    if plan is not None:
        noted = root / RESUME / "plan"
        noted.write_text(plan, encoding="utf-8")
        (root / RESUME / "changed").write_text(str(changed_ns(noted)))


def _make_locked(target: Path, cleanup: contextlib.ExitStack, mode: int, remove: Callable[[Path], None]) -> Path:
    """A new locked directory beside the target, which `cleanup` removes and unlocks."""
    while True:
        root = target.with_name(f".{target.name}.{secrets.token_hex(_DIGITS // 2)}{PARTIAL}")
        try:
            root.mkdir(mode=mode)
        except FileExistsError:
            continue
        try:
            fd = _lock(root)
        except (BlockingIOError, FileNotFoundError):
            continue  # another writer takes it for a leftover, and removes it
        except OSError:
            pass  # no locks here, and then no writer removes what it cannot lock
        else:
            cleanup.callback(os.close, fd)
        cleanup.callback(remove, root)
        if root.exists():
            return root


def _lock(directory: Path) -> int:
    """Lock a directory until the returned descriptor is closed or the process ends. Raises OSError, also for a link."""
    fd = open_folder(directory)
    try:
        lock_now(fd)
    except OSError:
        os.close(fd)
        raise
    return fd


def _clean_up_after_the_killed(
    target: Path,
    plan: str | None,
    cleanup: contextlib.ExitStack,
    progress: Progress,
    is_ours: Callable[[Path], bool],
    remove: Callable[[Path], None],
) -> Path | None:
    """Remove what writers to this target left when they were killed.

    A partial directory with the same plan is locked, emptied of all but its experts, and returned.
    """
    taken: Path | None = None
    for partial in left_beside(target, PARTIAL):
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            fd = _lock(partial)
            held.callback(os.close, fd)
            if not _is_known(partial, fd, is_ours):
                continue
            found = _plan_of(partial)
            if taken is None and plan is not None and found == plan:
                _empty(partial, {STORE, RESUME})
                taken = partial
                cleanup.push(held.pop_all())
                cleanup.callback(remove, partial)
                progress("going on where an earlier run was killed", 0, 0)
                continue
            if found and plan is not None and taken is None:
                progress("starting over: the source or the options changed since an earlier run was killed", 0, 0)
            _remove(partial)
    return taken


def _is_known(partial: Path, fd: int, is_ours: Callable[[Path], bool]) -> bool:
    """Whether a directory of a partial directory's name, open as `fd`, is one, by what it holds and whose it is."""
    if os.fstat(fd).st_uid != os.geteuid():
        return False
    return is_folder(partial / RESUME) or not any(partial.iterdir()) or is_ours(partial)


def _remove(partial: Path) -> None:
    """Remove a partial directory, last of all what it is known by: a kill in between leaves one that is known still."""
    with contextlib.suppress(OSError):
        (partial / RESUME).mkdir(exist_ok=True)
        _empty(partial, {RESUME})
    shutil.rmtree(partial, ignore_errors=True)


def _plan_of(partial: Path) -> str | None:
    """The plan of a partial directory that was written here; None where there is none."""
    noted, changed = partial / RESUME / "plan", partial / RESUME / "changed"
    if not (is_plain_file(noted) and is_plain_file(changed)):
        return None
    if changed.read_text() != str(changed_ns(noted)):
        return None  # it was copied or unpacked
    return noted.read_text(encoding="utf-8")


def _empty(folder: Path, keep: set[str]) -> None:
    """Remove everything in a folder but those names. Links are removed, never followed. Raises OSError."""
    for path in folder.iterdir():
        if path.name in keep:
            continue
        if is_folder(path):
            shutil.rmtree(path)
        else:
            path.unlink()
