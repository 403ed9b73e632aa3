"""Installs the package in fresh environments, as people do, uses it there, and notes what came of it.

    python scripts/install_matrix.py BUNDLE [--only WORD ...] [--work DIR]

BUNDLE is the demo's (demo/olmoe-int4). sdist and wheel are built from the commit; of each row of `CASES` an environment
is made by uv, with what the package itself asks for and no more, used as `CHECKS` say, and removed. Results go to
docs/installs.json, each row in the place of its last one; docs/generate_install.py makes a table of them. An index, or
a folder with torch for CPU, is named to uv by its own variables (UV_FIND_LINKS). A row that fails is written down like
the others, and ends this with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import select
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.runnable import put  # noqa: E402 - of these sources

RESULTS = ROOT / "docs/installs.json"
REFERENCE = ROOT / "models/reference"
LONGEST_S = 1800
PROMPT = ["--prompt", "To create an index, use the", "--memory", "40%", "--max-tokens", "8", "--raw"]
SCHEMA = json.dumps({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]})


@dataclass(frozen=True)
class Case:
    """A way to install. `source`: wheel, sdist, or clone, a folder of the sources."""

    source: str
    extras: str = ""
    checks: tuple[str, ...] = ()  # after those that every installation is to pass
    python: str = "3.11"
    lowest: bool = False  # the lowest versions that the package says would do, of what it names itself
    beside: tuple[str, ...] = ()  # what the checks need

    @property
    def name(self) -> str:
        lowest = ", lowest versions" if self.lowest else ""
        return f"{self.source}{f'[{self.extras}]' if self.extras else ''}, Python {self.python}{lowest}"


TESTS = ("pytest", "pytest-xdist", "hypothesis", "jsonschema")
EVERYTHING = "export,hub,optimum,chat,grammar,serve,ray"
CASES = [
    Case("wheel", checks=("what is missing is said",)),
    Case("wheel", python="3.12"),
    Case("wheel", python="3.13"),
    Case("sdist"),
    Case("clone"),
    Case("wheel", "chat", ("chat at a terminal",)),
    Case("wheel", "grammar", ("an answer held to a schema",)),
    Case("wheel", "serve", ("a server",)),
    Case("wheel", "ray", ("Ray",)),
    Case("wheel", "hub", ("the hub's library",)),
    Case("wheel", lowest=True),
    Case("wheel", "chat,grammar,serve", ("chat at a terminal", "an answer held to a schema", "a server"), lowest=True),
    Case("wheel", "export", ("an export",)),
    Case("wheel", EVERYTHING, ("an export", "a server", "an answer held to a schema", "Ray", "optimum-cli")),
    Case("wheel", EVERYTHING, ("an export", "optimum-cli", "the runtime's tests"), lowest=True, beside=TESTS),
]


@dataclass
class Installed:
    """An environment with the package in it, and what the checks use."""

    folder: Path
    bundle: Path
    chats: Path  # the same bundle with a chat template
    sources: Path
    log: list[str] = field(default_factory=list[str])

    def program(self, name: str) -> str:
        return str(self.folder / "bin" / name)

    def run(self, *words: object, code: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """A command of the environment, far from the sources. Raises Failed for another exit code."""
        program, *rest = map(str, words)
        command = [self.program(program), *rest]
        found = subprocess.run(
            command, cwd=self.folder, env=clean(), input=stdin, capture_output=True, text=True, timeout=LONGEST_S,
        )  # fmt: skip
        if found.returncode != code:
            last = (found.stderr or found.stdout).strip().splitlines()[-1:] or [""]
            raise Failed(f"{shlex.join([program, *rest])[:80]}: exit code {found.returncode}: {last[0][:300]}")
        return found


class Failed(Exception):
    """What a check has found."""


def clean() -> dict[str, str]:
    """This process's environment without what would let Python find these sources, or this environment."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def expect(holds: object, what: str) -> None:
    if not holds:
        raise Failed(what)


def versions(here: Installed) -> None:
    lines = here.run("pocketmoe", "--version").stdout.splitlines()
    expect(re.fullmatch(r"pocketmoe, version \S+", lines[0]), f"--version begins with {lines[0]}")
    here.log.append(lines[1])


def commands(here: Installed) -> None:
    """What a device does with a bundle."""
    here.run("pocketmoe", "verify", here.bundle)
    expect(json.loads(here.run("pocketmoe", "inspect", here.bundle, "--json").stdout), "inspect says nothing")
    expect(json.loads(here.run("pocketmoe", "doctor", "--json").stdout)["slots_work"], "slots cannot be used")
    found = json.loads(here.run("pocketmoe", "run", here.bundle, *PROMPT, "--json").stdout)
    expect(found["generated_tokens"] == 8 and found["backend"] == "slots", "run gave another answer")
    here.run("pocketmoe", "plan", here.bundle, "--device", "this", "--json")
    here.run("pocketmoe", "chat", here.chats, "--memory", "40%", "--max-tokens", "8", stdin="Hello\n/quit\n")


def python(here: Installed) -> None:
    """The library: nothing heavy is imported that was not asked for."""
    code = f"""
import sys, pocketmoe
with pocketmoe.load({str(here.bundle)!r}, memory="40%", context=256) as model:
    assert len(model.generate("Hello", max_tokens=8, temperature=0).tokens) <= 8
assert not {{"torch", "transformers", "onnx", "rich"}} & {{*sys.modules}}, "something heavy was imported"
"""
    here.run("python", "-W", "error", "-c", code)


def missing(here: Installed) -> None:
    """Each command that needs an extra says the line that adds it; the line, run as it stands, does."""
    checkpoint, output = REFERENCE / "checkpoint", here.folder / "none"
    for extra, words in {
        "export": ("export", checkpoint, "-o", output),
        "serve": ("serve", here.bundle),
        "grammar": ("run", here.bundle, *PROMPT, "--json-schema", SCHEMA),
    }.items():
        said = here.run("pocketmoe", *words, code=3).stderr
        line = re.search(r"pip install (.+?)\.$", said.strip())
        expect(line, f"without {extra} it says: {said.strip()[-300:]}")
        assert line
        wanted = shlex.split(line[1])
        expect(wanted[-1].endswith(f"[{extra}]"), f"without {extra} it says {line[0]}")
        if extra == "grammar":
            here.run("pip", "install", "--quiet", "--disable-pip-version-check", *wanted)
            held_to_a_schema(here)


def held_to_a_schema(here: Installed) -> None:
    found = here.run("pocketmoe", "run", here.bundle, "-p", "Yes?", "--max-tokens", "40", "--json-schema", SCHEMA)
    expect({*json.loads(found.stdout)} == {"a"}, f"the answer is {found.stdout[:100]}")


def chat_at_a_terminal(here: Installed) -> None:
    """With the editor of the extra: a turn, and out."""
    here.run("python", "-c", "import prompt_toolkit")
    outer, inner = pty.openpty()
    command = [here.program("pocketmoe"), "chat", str(here.chats), "--memory", "40%", "--max-tokens", "8"]
    process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=clean() | {"TERM": "xterm"})
    os.close(inner)
    said = b""
    for awaited, answer in (("/help", "Hello\r"), ("hits", "/quit\r")):
        until = time.monotonic() + LONGEST_S
        while awaited.encode() not in said and time.monotonic() < until:
            try:
                if select.select([outer], [], [], 1)[0]:
                    said += os.read(outer, 4096)
            except OSError as error:  # the other end is closed
                raise Failed(f"chat ended: {said[-200:]!r}") from error
        time.sleep(0.5)  # the editor takes the terminal over
        os.write(outer, answer.encode())
        said = b""
    while process.poll() is None:
        if select.select([outer], [], [], 1)[0]:
            try:
                os.read(outer, 4096)
            except OSError:  # it is gone
                break
    expect(process.wait(60) == 0, f"chat ended with {process.returncode}")
    os.close(outer)


def server(here: Installed) -> None:
    """It answers; a signal ends it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = here.folder / "server.log"
    command = [here.program("pocketmoe"), "serve", str(here.bundle), "--memory", "40%", "--port", str(port)]
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=clean(), stdout=file, stderr=file, cwd=here.folder)
    try:
        until = time.monotonic() + LONGEST_S
        body = json.dumps({"prompt": "Hello", "max_tokens": 4, "model": here.bundle.name}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body)
        request.add_header("Content-Type", "application/json")
        answer: Any = None
        while answer is None and process.poll() is None and time.monotonic() < until:
            try:
                with urllib.request.urlopen(request, timeout=60) as got:
                    answer = json.load(got)
            except OSError as error:
                if hasattr(error, "code"):
                    raise Failed(f"the server says {error}") from error
                time.sleep(0.2)
        expect(answer and answer["usage"]["completion_tokens"], f"no answer: {log.read_text()[-200:]}")
    finally:
        process.terminate()
        process.wait(60)


def ray(here: Installed) -> None:
    """Ray, and Ray Serve, start."""
    code = "import ray, ray.serve; ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False); ray.shutdown()"
    here.run("python", "-c", code)


def export(here: Installed) -> None:
    """From the reference model's checkpoint to an answer, quantized on the way by calibration."""
    work = here.folder / "export"
    here.run("pocketmoe", "export", REFERENCE / "checkpoint", "-o", work / "whole")
    calibration = ["--calibration", REFERENCE / "calibration.txt", "--calibration-tokens", "512"]
    here.run("pocketmoe", "quantize", work / "whole", "-o", work / "small", "--scheme", "mixed", "--size-budget", "50%",
             *calibration)  # fmt: skip
    here.run("pocketmoe", "run", work / "small", *PROMPT)
    shutil.rmtree(work)


def hub(here: Installed) -> None:
    """Nothing is missing: a name that the hub's cache does not have is looked for, and said not to be there."""
    code = "import huggingface_hub, sys; from pocketmoe.cli import main; sys.exit(main(['pull', 'nobody/nothing']))"
    said = here.run("python", "-c", f"import os; os.environ['HF_HUB_OFFLINE'] = '1'; {code}", code=3).stderr
    expect("cannot be reached" in said, f"pull says: {said[-200:]}")


def optimum(here: Installed) -> None:
    """Its command line has ours."""
    expect(
        "BUNDLE" in here.run("optimum-cli", "pocketmoe", "quantize", "--help").stdout, "optimum-cli has no pocketmoe"
    )


def runtime_tests(here: Installed) -> None:
    """The tests of the runtime's rooms, with these versions."""
    wanted = ["tests/bundle", "tests/runtime/paging", "tests/runtime/memory", "tests/runtime/test_sampling.py",
              "tests/runtime/test_sampling_reference.py", "tests/runtime/test_text_stream.py", "tests/tools",
              "tests/grammar", "tests/chat_template", "tests/runtime/backends"]  # fmt: skip
    there = [path for path in wanted if (here.sources / path).exists()]
    command = [here.program("python"), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not root and not slow"]
    found = subprocess.run(
        [*command, *there], cwd=here.sources, env=clean(), capture_output=True, text=True, timeout=LONGEST_S
    )
    last = found.stdout.strip().splitlines()[-1:] or [found.stderr[-300:]]
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", found.stdout, re.MULTILINE)
    (here.folder.parent / "tests.log").write_text(found.stdout)
    expect(found.returncode == 0, f"{last[0]}: {', '.join(failed[:8])}")
    here.log.append(last[0])


ALWAYS: dict[str, Callable[[Installed], None]] = {
    "--version": versions, "the commands of a device": commands, "the library": python,
}  # fmt: skip
CHECKS: dict[str, Callable[[Installed], None]] = {
    **ALWAYS,
    "what is missing is said": missing,
    "chat at a terminal": chat_at_a_terminal,
    "an answer held to a schema": held_to_a_schema,
    "a server": server,
    "Ray": ray,
    "an export": export,
    "the hub's library": hub,
    "optimum-cli": optimum,
    "the runtime's tests": runtime_tests,
}


def build(work: Path) -> dict[str, Path]:
    """The commit's sources as a folder of their own, and sdist and wheel of them."""
    sources, dist = work / "sources", work / "dist"
    sources.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "x", "-C", sources], input=archive, check=True)
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", dist], cwd=sources, check=True)
    return {"clone": sources, "sdist": next(dist.glob("*.tar.gz")), "wheel": next(dist.glob("*.whl"))}


def install(case: Case, built: dict[str, Path], folder: Path) -> None:
    """Raises Failed with what uv says."""
    extras = f"[{case.extras}]" if case.extras else ""
    lines = [["uv", "venv", "--quiet", "--seed", "--python", case.python, str(folder)]]
    add = ["uv", "pip", "install", "--quiet", "--python", str(folder)]
    if case.lowest:  # what the package asks for by name, before the package, whose own needs are then met
        named = [word for extra in case.extras.split(",") if extra for word in ("--extra", extra)]
        lines.append([*add, "--resolution", "lowest-direct", "-r", str(built["clone"] / "pyproject.toml"), *named])
    lines.append([*add, f"pocketmoe{extras} @ {built[case.source].as_uri()}"])
    if case.beside:
        lines.append([*add, *case.beside])
    for line in lines:
        done = subprocess.run(line, env=clean(), capture_output=True, text=True, timeout=LONGEST_S)
        if done.returncode:
            raise Failed(f"cannot be installed: {' '.join(done.stderr.split())[:400]}")


def copied(bundle: Path, to: Path) -> Path:
    """As it comes to another machine."""
    return Path(shutil.copytree(bundle, to, ignore=shutil.ignore_patterns("packed")))


def with_template(bundle: Path, to: Path) -> Path:
    """A copy with a chat template, which the reference model has none of."""
    copied(bundle, to)
    put(to, "tokenizer/chat_template.jinja", b"{% for message in messages %}{{ message.content }}\n{% endfor %}")
    return to


def size_mb(folder: Path) -> int:
    return round(sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6)


def tried(case: Case, built: dict[str, Path], bundle: Path, work: Path) -> dict[str, Any]:
    """A row of the table."""
    folder = work / "environment"
    row: dict[str, Any] = {"name": case.name, "source": case.source, "extras": case.extras, "python": case.python,
                           "lowest": case.lowest, "date": time.strftime("%Y-%m-%d")}  # fmt: skip
    checks: dict[str, str] = {}
    try:
        install(case, built, folder)
        row["megabytes"] = size_mb(folder)
        here = Installed(folder, copied(bundle, work / "BUNDLE"), with_template(bundle, work / "CHATS"), built["clone"])
        for name in (*ALWAYS, *case.checks):
            try:
                CHECKS[name](here)
                checks[name] = "ok"
            except (Failed, subprocess.SubprocessError, OSError, ValueError, LookupError) as error:
                checks[name] = f"{error}"[:500] or type(error).__name__
            print(f"  {name}: {checks[name]}", flush=True)
        row["said"] = here.log
    except Failed as error:
        checks["installing"] = f"{error}"
        print(f"  {error}", flush=True)
    for name in ("environment", "BUNDLE", "CHATS"):
        shutil.rmtree(work / name, ignore_errors=True)
    return {**row, "checks": checks}


def note(row: dict[str, Any]) -> None:
    """Write a row where its last one stood; rows of cases that are no more go."""
    rows = {old["name"]: old for old in (json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else [])}
    rows[row["name"]] = row
    kept = [rows[case.name] for case in CASES if case.name in rows]
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="the demo's bundle, demo/olmoe-int4")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows whose name has one of these")
    parser.add_argument("--work", type=Path, help="where environments are made (default: the system's)")
    args = parser.parse_args(arguments)
    wanted = [case for case in CASES if not args.only or any(word in case.name for word in args.only)]
    failed = False
    with tempfile.TemporaryDirectory(dir=args.work, prefix="installs-") as folder:
        work = Path(folder)
        built = build(work)
        for case in wanted:
            print(case.name, flush=True)
            row = tried(case, built, args.bundle.resolve(), work)
            failed |= any(found != "ok" for found in row["checks"].values())
            note(row)
    sys.exit(failed)


if __name__ == "__main__":
    main()
