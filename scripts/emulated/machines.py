"""The processors that are tried, each with what it has and lacks, and how Python runs on it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.emulated.userland import PYTHON, REPOSITORY, arm64_root, arm64_site, qemu

ARM = {
    "cortex-a53": "Armv8.0: no dot product (Raspberry Pi 3)",
    "cortex-a76": "Armv8.2: dot product (Raspberry Pi 5; a Jetson Orin's Cortex-A78AE has the same)",
    "max": "Armv9: SVE2, SME, int8 matrix products",
}
_OLDEST = "fpu cx8 cmov mmx fxsr sse sse2"
_NEHALEM = f"{_OLDEST} pni ssse3 sse4_1 sse4_2 popcnt cx16 lahf_lm"
_SANDY_BRIDGE = f"{_NEHALEM} avx xsave f16c"
X86 = {  # what each has beside its name, and its flags as /proc/cpuinfo would say them: qemu shows this machine's own
    "Haswell": ("AVX2; no AVX-512, no VNNI", f"{_SANDY_BRIDGE} avx2 fma bmi1 bmi2"),
    "IvyBridge": ("AVX; no AVX2", _SANDY_BRIDGE),
    "Westmere": ("SSE4.2; no AVX", _NEHALEM),
    "qemu64": ("SSE2 only, as before 2008", _OLDEST),
}
# qemu's x86 has no AVX-512: a machine with AVX-512 and without VNNI cannot be emulated.


@dataclass(frozen=True)
class Machine:
    """A processor: `command` is Python on it, to which its arguments are added."""

    name: str
    has: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict[str, str])

    def start(self, module_and_arguments: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """A module of this repository, started there with its arguments, its streams as text."""
        environment = {**os.environ, **self.environment, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [*self.command, "-m", *module_and_arguments]
        return subprocess.Popen(command, env=environment, cwd=REPOSITORY, text=True, **options)


def this_machine() -> Machine:
    """What the others are compared with."""
    return Machine("this machine", "", (sys.executable,), {"PYTHONPATH": str(REPOSITORY)})


def arm(cpu: str, folder: Path) -> Machine:
    """An Arm core of qemu's name, with Debian 12's Python. Raises Missing."""
    root, site = arm64_root(folder), arm64_site(folder)
    command = (str(qemu("aarch64", folder)), "-cpu", cpu, "-L", str(root), str(root / f"usr/bin/python{PYTHON}"))
    return Machine(f"Arm {cpu}", ARM[cpu], command, {"PYTHONPATH": f"{REPOSITORY}:{site}"})


def x86(cpu: str, folder: Path) -> Machine:
    """An x86-64 of qemu's name, with this machine's Python and wheels. Raises Missing."""
    has, flags = X86[cpu]
    root = folder / "x86" / cpu
    (root / "proc").mkdir(parents=True, exist_ok=True)
    (root / "proc/cpuinfo").write_text(f"processor\t: 0\nmodel name\t: emulated {cpu}\nflags\t\t: {flags}\n\n")
    python = str(Path(sys.executable).resolve())
    command = (str(qemu("x86_64", folder)), "-cpu", cpu, "-L", str(root), python)
    site = sysconfig.get_path("purelib")
    return Machine(f"x86-64 {cpu}", has, command, {"PYTHONPATH": f"{REPOSITORY}:{site}"})
