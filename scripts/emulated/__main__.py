"""Runs the cases on emulated processors, and keeps what was found in docs/platforms.json.

    python -m scripts.emulated [arm] [x86] [--cpu NAME ...]

One process runs at a time, at low priority. An emulated core takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pocketmoe.errors import BadInput
from scripts.emulated.bundles import FLOAT, REFERENCE, make_bundles
from scripts.emulated.cases import ALONE, IN_THE_GUEST, Calls, Failed, calls_on, interrupted, judged
from scripts.emulated.machines import ARM, X86, Machine, arm, this_machine, x86
from scripts.emulated.userland import REPOSITORY, Missing, qemu, qemu_version

RECORD = REPOSITORY / "docs/platforms.json"
FOLDER = REPOSITORY / "build/emulated"
KINDS: dict[str, tuple[dict[str, Any], Callable[[str, Path], Machine]]] = {"arm": (ARM, arm), "x86": (X86, x86)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.emulated", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="arm or x86; default: both")
    parser.add_argument("--cpu", action="append", default=[], help="by qemu's name; may be given again")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where emulator, userland and bundles lie")
    wanted = parser.parse_args()
    os.nice(10)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what runs in the background ignore it
    try:
        failed = sum(run_all(wanted.kinds or [*KINDS], wanted.cpu, wanted.folder))
    except (Missing, Failed) as error:
        sys.exit(str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(map(str, error.cmd))[:200]} ended with {error.returncode}")
    sys.exit(f"{failed} cases failed" if failed else 0)


def run_all(kinds: list[str], only: list[str], folder: Path) -> Iterator[int]:
    """How many cases failed on each machine; what was found is in the record."""
    bundles = make_bundles(folder / "bundles")
    expected = dict(calls_on(this_machine(), own_copies(bundles)))
    for kind in kinds:
        cpus, make = KINDS[kind]
        for cpu in cpus:
            if not only or cpu in only:
                entry = try_machine(make(cpu, folder), bundles, expected)
                keep(kind, cpu, entry, qemu_version(qemu("x86_64", folder)))
                yield sum(not found["ok"] for found in entry["cases"].values())


def try_machine(machine: Machine, bundles: dict[str, Path], expected: Calls) -> dict[str, Any]:
    """Every case on one machine: what was found, by case."""
    print(f"{machine.name}: {machine.has}", flush=True)
    entry: dict[str, Any] = {"name": machine.name, "has": machine.has, "refused": "", "cases": {}}
    entry["refused"] = refusal(machine)
    if entry["refused"]:
        print(f"  refused: {entry['refused']}", flush=True)
        return entry
    copies, calls = own_copies(bundles), Calls()
    try:
        for name, found in calls_on(machine, copies):
            calls[name] = found
    except Failed as error:
        entry["cases"]["all"] = {"ok": False, "found": str(error)}
    (copies[FLOAT].parents[1] / f"{machine.name.replace(' ', '-')}.json").write_text(json.dumps([calls, expected]))
    for name in IN_THE_GUEST:
        tell(entry, name, lambda name=name: judged(name, calls, expected))
    for name, case in ALONE.items():
        bundle = copies[REFERENCE if case is interrupted else "int4"]
        tell(entry, name, lambda case=case, bundle=bundle: case(machine, bundle))
    return entry


def tell(entry: dict[str, Any], name: str, case: Callable[[], str]) -> None:
    """Judge a case, note what was found, and say it."""
    try:
        found = {"ok": True, "found": case()}
    except Failed as error:
        found = {"ok": False, "found": str(error)}
    except KeyError as error:
        found = {"ok": False, "found": f"it did not come to {error}"}
    entry["cases"][name] = found
    print(f"  {'ok  ' if found['ok'] else 'FAIL'} {name}: {found['found']}", flush=True)


def own_copies(bundles: dict[str, Path]) -> dict[str, Path]:
    """Bundles that a machine may pack for itself, in the place of the last machine's."""
    own = bundles[FLOAT].parent / "own"
    shutil.rmtree(own, ignore_errors=True)
    ignored = shutil.ignore_patterns("packed")
    return {name: Path(shutil.copytree(path, own / path.name, ignore=ignored)) for name, path in bundles.items()}


def refusal(machine: Machine) -> str:
    """The one line by which a machine is refused that is too old for any of it; "" where it is not."""
    process = machine.start(["pocketmoe", "--version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, err = process.communicate()
    lines = [line for line in err.splitlines() if "TCG doesn't support" not in line]
    return lines[0] if process.returncode == BadInput.exit_code and len(lines) == 1 else ""


def keep(kind: str, cpu: str, entry: dict[str, Any], emulator: str) -> None:
    """Put what was found on a machine into the record, in the place of what was found before."""
    record: dict[str, Any] = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {"machines": {}}
    record["emulator"] = f"qemu {emulator}"
    record["compared_with"] = f"{platform.machine()}, {_own_features()}"
    record["versions"] = {name: version(name) for name in ("onnxruntime", "numpy", "tokenizers")}
    record["machines"][f"{kind}/{cpu}"] = entry
    order = [f"{each}/{name}" for each, (cpus, _) in KINDS.items() for name in cpus]
    record["machines"] = {key: record["machines"][key] for key in order if key in record["machines"]}
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _own_features() -> str:
    from pocketmoe.profiles.machine.doctor import read_cpu

    return ", ".join(read_cpu().features)


if __name__ == "__main__":
    main()
