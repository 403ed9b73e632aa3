"""What runs on the emulated processor itself, in one process, since each start of Python there takes seconds.

    python -m scripts.emulated.guest '{"bundles": {NAME: PATH, ...}, "answers": [[NAME, BACKEND], ...], "prompt": ...}'

It calls the command line as a user's shell does, and prints a line of JSON for each call.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from pocketmoe.cli import main as command_line


def call(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command_line(list(arguments))
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else int(done.code is not None)
    return code, out.getvalue(), err.getvalue()


def say(case: str, code: int, out: str, err: str) -> None:
    print(json.dumps({"case": case, "code": code, "out": out, "err": err[-2000:]}), flush=True)


def copied(bundle: str, name: str) -> Path:
    target = Path(bundle).with_name(name)
    shutil.copytree(bundle, target, ignore=shutil.ignore_patterns("packed"))
    return target


def damaged(bundle: str) -> str:
    """A copy with some bytes of an expert changed."""
    target = copied(bundle, "damaged")
    with open(target / "experts.bin", "r+b") as store:
        store.seek(100)
        store.write(b"\0damage\0")
    return str(target)


def main() -> None:
    work: dict[str, Any] = json.loads(sys.argv[1])
    bundles: dict[str, str] = work["bundles"]
    options = ("--raw", "-p", work["prompt"], "--max-tokens", str(work["tokens"]), "--logprobs", "5", "--json")
    for name, backend in work["answers"]:
        say(f"{name}: {backend}", *call("run", bundles[name], *options, "--backend", backend))
    for case, arguments in commands(bundles["int4"], options).items():
        say(case, *call(*arguments))
    say("doctor", *call("doctor", "--json"))


def commands(int4: str, options: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The other calls by case, in their order."""
    in_place = str(copied(int4, "in-place"))
    return {
        "pack": ("pack", "--in-place", in_place),
        "packed": ("run", in_place, *options, "--backend", "slots"),
        "undo": ("pack", "--undo", in_place),
        "verify": ("verify", in_place),
        "usage": ("run", int4, "--backend", "none"),
        "missing": ("run", f"{int4}-none", "-p", "a"),
        "damaged": ("verify", damaged(int4)),
        "budget": ("run", int4, "-p", "a", "--memory", "8MB"),
    }


if __name__ == "__main__":
    main()
