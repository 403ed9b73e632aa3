"""The bundles that are run: a tiny random OLMoE in every format, and the trained reference model in int4."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from scripts.emulated.userland import REPOSITORY

SCHEMES: dict[str, tuple[str, ...]] = {
    "int8": ("--scheme", "int8"),
    "int4": ("--scheme", "int4"),
    "int4-all": ("--scheme", "int4-all"),
    "nf4": ("--scheme", "nf4"),
    "mixed": ("--scheme", "mixed", "--size-budget", "30%"),
    "int4, caches in int8": ("--scheme", "int4", "--kv", "int8"),
}
FLOAT = "fp32"
REFERENCE = "reference model, int4"
_CALIBRATED = {"mixed", "int4, caches in int8"}


def make_bundles(folder: Path) -> dict[str, Path]:
    """Bundles by name, made below the folder where they are not there yet; needs the extra `export`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = REPOSITORY / "models/reference/calibration.txt"
    found = {name: folder / name.replace(", ", "-").replace(" ", "-") for name in (FLOAT, *SCHEMES, REFERENCE)}
    if not found[FLOAT].exists():
        _save_checkpoint(folder / "checkpoint")
        _pocketmoe("export", str(folder / "checkpoint"), "-o", str(found[FLOAT]))
    for name, options in SCHEMES.items():
        calibration = ("--calibration", str(text), "--calibration-tokens", "512") if name in _CALIBRATED else ()
        if not found[name].exists():
            _pocketmoe("quantize", str(found[FLOAT]), "-o", str(found[name]), *options, *calibration)
    if not found[REFERENCE].exists():
        checkpoint = REPOSITORY / "models/reference/checkpoint"
        _pocketmoe("export", str(checkpoint), "-o", str(found[REFERENCE]), "--scheme", "int4")
    return found


def _save_checkpoint(target: Path) -> None:
    from tests import tiny

    target.mkdir(exist_ok=True)
    tiny.save_checkpoint(target, tiny.make_model("olmoe"))


def _pocketmoe(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pocketmoe", *arguments], cwd=REPOSITORY, check=True)
