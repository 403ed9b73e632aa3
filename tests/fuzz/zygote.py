"""Cheap children: a process that has imported what is heavy forks one for each order, and watches it.

`Zygote` is the other end. An order and its answer are lines of JSON: what to call, where, and its limits; how the child
ended. A child is a session of its own, so that what it leaves running is found. At its end threads are waited for and
atexit runs, as in a program; only the tearing down of modules is left out, which would copy every page of torch.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]
CPU_S, STALL_S, WALL_S = 40.0, 40.0, 600.0  # CPU time, time without any CPU time, and a last resort
_POLL_S = 0.01
_PEAK = re.compile(r"VmHWM:\s+(\d+) kB")
_ADDRESS_SPACE = 16 << 30
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x00020000, 0x4000, 1 << 18
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Order:
    """One child: what it does, and what it may take."""

    task: str
    arguments: tuple[Any, ...]
    memory_bytes: int  # resident, at most, of the process itself
    child_bytes: int = 768 << 20  # more than that, of its children: SECURITY.md states 512 MiB and some for the text
    cpu_s: float = CPU_S
    heavy: bool = False  # needs torch


@dataclass(frozen=True)
class Ending:
    """How a child ended: exit code (negative: signal), and why it was killed, if it was."""

    code: int
    killed_for: str  # "", "cpu", "stall", "wall", "memory"
    seconds: float
    cpu_s: float
    peak_bytes: int
    left_in_memory: tuple[str, ...] = field(default=())  # what it left in /dev/shm
    left_running: tuple[str, ...] = field(default=())


class Zygote:
    """A forking process with some modules imported. Use it as a context manager."""

    def __init__(self, modules: Sequence[str], warm: str = "") -> None:
        """`warm`: "module:function" that is called once before the first fork; it must leave no thread behind."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "ORT_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONHASHSEED": "0",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.fuzz.zygote", warm, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what libraries say while they load
            text=True,
            env=environment,
            cwd=ROOT,
        )
        assert self._receive() == "ready"

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the forking process died")
        return json.loads(line)

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def run(self, order: Order, cwd: Path, output: Path, environment: dict[str, str]) -> Ending:
        """Run one order; what it says goes to `output`.out and `output`.err."""
        self._send({**asdict(order), "cwd": str(cwd), "output": str(output), "environment": environment})
        ending = self._receive()
        return Ending(**{**ending, **{name: tuple(ending[name]) for name in ("left_running", "left_in_memory")}})

    def learn(self, order: Order, cwd: Path, output: Path, environment: dict[str, str]) -> Ending:
        """Run an order, and import here what it imported there, so that later children need not."""
        modules = Path(f"{output}.modules")
        ending = self.run(order, cwd, output, {**environment, "FUZZ_MODULES": str(modules)})
        if modules.exists():
            self.preload(modules.read_text().split())
        return ending

    def preload(self, modules: Sequence[str]) -> None:
        """Import modules, as far as they can be."""
        self._send({"import": list(modules)})
        self._receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _import(names: Sequence[str]) -> None:
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _serve(answers: Any, own_shm: bool) -> dict[str, Any] | None:
    """Answer orders until there are none; in a child, return its order."""
    for line in sys.stdin:
        order = json.loads(line)
        if "import" in order:
            _import(order["import"])
            answer: Any = "imported"
        else:
            before, started = _shared_memory(), time.monotonic()
            pid = os.fork()
            if pid == 0:
                return order
            ending = _watch(pid, order, started)
            left = [] if ending.killed_for else [*_shared_memory() - before]
            left = left if own_shm else [name for name in left if str(pid) in name]
            answer = {**asdict(ending), "left_in_memory": left}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return None


def _own_shared_memory() -> bool:
    """Give this process and its children a /dev/shm of their own, where that is allowed (root)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None):
        return False
    return libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=2g") == 0


def _shared_memory() -> set[str]:
    return {entry.name for entry in os.scandir("/dev/shm") if "pocketmoe" in entry.name}


def _watch(pid: int, order: dict[str, Any], started: float) -> Ending:
    """Wait for a child; kill it when it takes more than it may."""
    killed_for, peak, last_cpu, moved = "", 0, -1.0, time.monotonic()
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        now = time.monotonic()
        cpu, own, children = _taken(pid)
        peak = max(peak, own)
        if cpu > last_cpu:
            last_cpu, moved = cpu, now
        if not killed_for:
            over = {
                "memory": own > order["memory_bytes"],
                "memory of a child": children > order["memory_bytes"] + order["child_bytes"],
                "cpu": cpu > order["cpu_s"],
                "stall": now - moved > STALL_S,
                "wall": now - started > WALL_S,
            }
            killed_for = next((why for why, is_over in over.items() if is_over), "")
            if killed_for:
                _kill_session(pid)
        time.sleep(_POLL_S)
    left = _kill_session(pid)
    code = os.waitstatus_to_exitcode(status)
    cpu_s, left = usage.ru_utime + usage.ru_stime, () if killed_for else left
    return Ending(code, killed_for, time.monotonic() - started, cpu_s, peak, left_running=left)


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for path in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (path / "children").read_text().split())
    return found


def _taken(pid: int) -> tuple[float, int, int]:
    """CPU seconds of a process and all below it; the most that it had resident, and the largest of those below it."""
    ticks, own, largest = 0, 0, 0
    for process in _tree(pid):
        with contextlib.suppress(OSError, ValueError):
            ticks += sum(map(int, Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:15]))
            found = _PEAK.search(Path(f"/proc/{process}/status").read_text())
            peak = int(found[1]) * 1024 if found else 0
            own, largest = (peak, largest) if process == pid else (own, max(largest, peak))
    return ticks / _TICKS, own, largest


def _kill_session(session: int) -> tuple[str, ...]:
    """Kill every process of a session; return the names of those that were alive."""
    names = []
    for path in Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            name, _, rest = (path / "stat").read_text().partition("(")[2].rpartition(")")
            fields = rest.split()
            if int(fields[3]) == session and fields[0] != "Z":
                os.kill(int(path.name), signal.SIGKILL)
                names.append(name)
    return tuple(names)


def _become(order: dict[str, Any]) -> int:
    """In the child: do the order, return the exit code."""
    os.setsid()
    os.chdir(order["cwd"])
    os.environ.update(order["environment"])
    for name, number in (("out", 1), ("err", 2)):
        file = os.open(f"{order['output']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout, sys.stderr = (open(n, "rw"[n > 0], encoding="utf-8", buffering=1) for n in range(3))  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module, _, function = order["task"].partition(":")
    try:
        code = getattr(importlib.import_module(module), function)(*order["arguments"])
    except SystemExit as done:
        code = done.code
    except BaseException:  # noqa: BLE001 - what a program would die of
        traceback.print_exc()
        code = 1
    if "FUZZ_MODULES" in order["environment"]:
        Path(order["environment"]["FUZZ_MODULES"]).write_text("\n".join(sys.modules))
    return code if isinstance(code, int) else int(code is not None)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # whatever imports print goes to stderr
    os.dup2(2, 1)
    own_shm = _own_shared_memory()
    _import(sys.argv[2:])
    if sys.argv[1]:
        module, _, function = sys.argv[1].partition(":")
        with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
            getattr(importlib.import_module(module), function)()
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    answers.write('"ready"\n')
    answers.flush()
    order = _serve(answers, own_shm)
    if order is not None:
        code = _become(order)
        threading._shutdown()  # type: ignore[attr-defined] - what the interpreter does before atexit
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
