"""The processor, as far as it decides which kernels ONNX Runtime takes, and so the bits that they give."""

from __future__ import annotations

import platform

from pocketmoe.system.cpus import cpuinfo

_NAMES = ("model name", "flags", "Features", "CPU implementer", "CPU part")


def cpu_facts() -> list[str]:
    """Architecture, model and features, in a fixed order."""
    seen: set[str] = set()
    for line in cpuinfo().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in _NAMES:
            seen.add(value.strip())
    return [platform.machine(), *sorted(seen)]
