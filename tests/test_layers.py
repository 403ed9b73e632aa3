"""The arrows between the parts point one way, imports stay lazy, and modules stay small: held over the source."""

# pyright: reportArgumentType=false

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from pocketmoe.cli import main
from tests.hang import HANG_S

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "pocketmoe"
MODULES = sorted(PACKAGE.rglob("*.py"))
BASE = {"errors", "sizes", "jsonfile", "system"}
FORMAT = {*BASE, "bundle", "calibration", "coded", "isolated", "chat_template", "ort"}
ENGINE = {*FORMAT, "runtime/engine", "runtime/paging", "runtime/backends", "runtime/memory"}
RUNTIME = {*ENGINE, "grammar", "tools", "runtime", "runtime/prefix_cache"}
QUANTIZE = {*FORMAT, "quantize", "quantize/algorithms", "quantize/graphs", "quantize/mixed"}
MAY_IMPORT: dict[str, set[str]] = {  # a room and what it may import beside itself and the version; from the bottom up
    "errors": set(),
    "sizes": set(),
    "jsonfile": {"errors"},
    "system": set(),
    "isolated": {"system"},
    "ort": {"errors"},
    "process": {"errors"},
    "bundle": {"errors", "sizes", "system"},
    "hub": {*BASE, "bundle"},
    "calibration": {"bundle", "system"},
    "coded": {"bundle"},
    "chat_template": {"errors", "jsonfile", "bundle"},
    "grammar": {"errors", "jsonfile", "isolated"},
    "tools": {"errors", "jsonfile", "grammar"},
    "export/capture": {"errors", "bundle", "ort"},
    "export/tensors": BASE,
    "export/packed": {*BASE, "export/tensors"},
    "export/checkpoint": {*FORMAT, "hub", "export/capture", "export/tensors", "export/packed"},
    "export/text": {*FORMAT, "export/capture", "export/tensors", "export/checkpoint"},
    "export/cut": {*FORMAT, "export/capture", "export/checkpoint", "export/packed"},
    "export/portable": FORMAT,
    "export": {*FORMAT, "export/capture", "export/tensors", "export/checkpoint", "export/text", "export/cut"},
    "quantize/algorithms": {"errors", "calibration"},
    "quantize/graphs": {*FORMAT, "quantize/algorithms"},
    "quantize": {*FORMAT, "quantize/algorithms", "quantize/graphs"},
    "quantize/mixed": {*FORMAT, "quantize/algorithms", "quantize"},
    "runtime/memory": {"errors", "system"},
    "runtime/backends": {*FORMAT, "runtime/memory"},
    "runtime/paging": {*FORMAT, "runtime/memory", "runtime/backends"},
    "runtime/engine": {*FORMAT, "runtime/memory", "runtime/backends", "runtime/paging"},
    "runtime/prefix_cache": ENGINE,
    "runtime": RUNTIME,
    "serve/page": set(),
    "serve/api": RUNTIME,
    "serve": {*RUNTIME, "serve/api", "serve/page"},
    "serve/replicas": {*RUNTIME, "serve/api", "serve"},
    "batch": RUNTIME,
    "profiles": FORMAT,
    "profiles/catalogue": FORMAT,
    "profiles/machine": {*RUNTIME, "profiles"},
    "profiles/routing": RUNTIME,
    "profiles/quality": RUNTIME,
    "profiles/calibration": {*RUNTIME, "profiles/quality"},
    "harness": {*RUNTIME, "profiles/quality"},
    "profiles/estimate": {*RUNTIME, "profiles", "profiles/catalogue", "profiles/routing"},
    "profiles/report": {*FORMAT, "profiles", "profiles/estimate"},
    "profiles/measure": {*RUNTIME, "profiles", "profiles/machine", "profiles/routing"},
    "profiles/plan": {*FORMAT, "profiles/catalogue", "profiles/machine", "profiles/estimate"},
    "profiles/filing": {*RUNTIME, "profiles/machine", "profiles/quality", "profiles/report"},
    "profiles/compare": {*FORMAT, "profiles", "profiles/catalogue", "profiles/estimate", "profiles/report"},
    "pipeline": {
        *RUNTIME,
        *QUANTIZE,
        *("export", "export/checkpoint", "harness"),
        *("profiles/quality", "profiles/calibration", "profiles/filing"),
    },
}
MAY_IMPORT["api"] = {*MAY_IMPORT}
MAY_IMPORT["console"] = {*MAY_IMPORT} - {"pipeline", "api"}
MAY_IMPORT["commands"] = {*MAY_IMPORT}
MAY_IMPORT["cli"] = {"commands", "errors", "process"}
MAY_IMPORT["integrations"] = {*MAY_IMPORT}
MAY_IMPORT["__main__"] = {"cli", "process"}
MAY_IMPORT["__init__"] = set()
TERMINAL = {"cli", "commands", "console", "process", "__main__"}
NOT_FOR_THE_RUNTIME = [
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "optimum",
    "bitsandbytes",
]


def dotted(path: Path) -> str:
    """pocketmoe.bundle.store for pocketmoe/bundle/store.py, pocketmoe.runtime for pocketmoe/runtime/__init__.py."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(path: Path) -> str:
    """runtime/paging for runtime/paging/pager.py, runtime for runtime/run.py, errors for errors.py."""
    place = path.relative_to(PACKAGE)
    return place.parent.as_posix() if len(place.parts) > 1 else place.stem


def part_of(path: Path) -> str:
    return room_of(path).split("/")[0]


@cache
def room_of_module(module: str) -> str:
    path = REPOSITORY.joinpath(*module.split("."))
    return room_of(path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """(module, name) for each name that a file imports from a module, (module, None) for each `import`."""
    package = dotted(path) if path.name == "__init__.py" else dotted(path).rpartition(".")[0]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


@cache
def is_module(name: str) -> bool:
    return REPOSITORY.joinpath(*name.split(".")).with_suffix(".py").is_file()


def imported_modules(path: Path) -> Iterator[str]:
    """The modules of this package that a file imports; a name out of an `__init__` counts as that package."""
    for module, name in imports(path):
        if module.split(".")[0] == "pocketmoe":
            yield f"{module}.{name}" if name and is_module(f"{module}.{name}") else module


def run(code: str) -> str:
    """The output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=HANG_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_arrows_point_one_way() -> None:
    """A room imports only rooms below it; a new room finds its place in MAY_IMPORT first."""
    unknown = {room_of(path) for path in MODULES} - {*MAY_IMPORT}
    assert not unknown, f"say in {Path(__file__).name} what they may import"
    wrong = [
        f"{dotted(path)} imports {module}"
        for path in MODULES
        for module in imported_modules(path)
        if room_of_module(module) not in MAY_IMPORT[room_of(path)] | {room_of(path), "__init__"}
    ]
    assert wrong == []


def test_the_table_of_rooms_has_no_circle() -> None:
    """Each room imports only rooms that stand above it in the table, and every room of the table is there."""
    known: set[str] = {"__init__"}
    for room, others in MAY_IMPORT.items():
        assert others - {room} <= known, room
        known.add(room)
    assert {*MAY_IMPORT} - {room_of(path) for path in MODULES} <= {"__main__"}


def test_modules_of_a_room_import_no_circle() -> None:
    """Imports point one way inside the rooms too, lazy ones and those for types included."""
    below = {dotted(path): {*imported_modules(path)} for path in MODULES}
    while below:
        leaves = {name for name, others in below.items() if not others & below.keys()}
        assert leaves, f"a circle among {sorted(below)}"
        below = {name: others for name, others in below.items() if name not in leaves}


@pytest.mark.parametrize("room", sorted({path.parent for path in MODULES}), ids=lambda room: room.name)
def test_a_room_is_small_and_says_what_its_files_are(room: Path) -> None:
    """A folder has at most 12 modules, and its docstring has a line for each of them and for none that is gone.

    Of `commands/`, where a file is a command, there are as many as there are commands.
    """
    files = sorted(path.name for path in room.glob("*.py") if path.name != "__init__.py")
    assert len(files) <= (len(main.commands) if room.name == "commands" else 12)
    page = ast.get_docstring(parsed(room / "__init__.py")) or ""
    assert sorted(re.findall(r"^\s*(\w+\.py)  ", page, re.MULTILINE)) == files


@pytest.mark.parametrize(
    "path",
    sorted({*(PACKAGE / "commands").glob("*.py")} - {PACKAGE / "commands/__init__.py"}),
    ids=lambda path: path.stem,
)
def test_a_file_is_a_command_that_parses_calls_and_prints(path: Path) -> None:
    """One function is a command, has the file's name, examples, and a body of at most 30 lines beside its help."""
    decorated = [node for node in parsed(path).body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    (command,) = [node for node in decorated if "click.command" in ast.unparse(node.decorator_list[0])]
    assert command.name == path.stem
    first, last = command.body[1], command.body[-1]
    assert (last.end_lineno or 0) - first.lineno + 1 <= 30
    (known,) = [found for found in main.commands.values() if inspect.unwrap(found.callback).__module__ == dotted(path)]
    assert known.hidden or "pocketmoe" in (known.epilog or "")


def test_nothing_inside_imports_through_an_init() -> None:
    """Modules name the module that defines what they use; only the version lives in an `__init__`."""
    wrong = []
    for file, (module, name) in ((path, found) for path in MODULES for found in imports(path)):
        if module.startswith("pocketmoe.") or (module == "pocketmoe" and name not in {None, "__version__"}):
            through_init = REPOSITORY.joinpath(*module.split("."), "__init__.py").is_file()
            if through_init and not (name and is_module(f"{module}.{name}")):
                wrong.append(f"{dotted(file)}: {name} out of {module}")
    assert wrong == []


@pytest.mark.parametrize("part", ["runtime", "profiles", *sorted(FORMAT)])
def test_the_runtime_needs_nothing_of_export(part: str) -> None:
    """Every module of the runtime and the format imports where torch, onnx and their like are not installed."""
    names = [dotted(path) for path in MODULES if part_of(path) == part]
    run(f"""
import importlib, sys
for blocked in {NOT_FOR_THE_RUNTIME}:
    sys.modules[blocked] = None
for name in {names}:
    importlib.import_module(name)
""")
    for path in (path for path in MODULES if part_of(path) == part):
        assert not {module.split(".")[0] for module, _ in imports(path)} & {*NOT_FOR_THE_RUNTIME}


@pytest.mark.parametrize("code", ["import pocketmoe.cli", "from pocketmoe.cli import main; main(['--help'])"])
def test_the_command_line_starts_light(code: str) -> None:
    """Importing the CLI, and its --help, load no numpy, onnxruntime or torch."""
    heavy = {"numpy", "onnxruntime", "tokenizers", *NOT_FOR_THE_RUNTIME}
    run(f"""
import sys
try:
    {code}
except SystemExit as done:
    assert not done.code
loaded = sorted(set(sys.modules) & {heavy})
assert not loaded, loaded
""")


def test_the_library_is_silent_and_ignores_its_surroundings() -> None:
    """Library modules do not print, exit, or read the environment: that is the command line's business.

    Exceptions are the package's `__init__`, which switches telemetry off before anything can import onnxruntime, and
    the end of a child that `isolated` made.
    """
    allowed = {"pocketmoe": {"os.environ"}, "pocketmoe.isolated": {"os._exit"}}
    wrong = [
        f"{dotted(path)}, line {line}: {name}"
        for path in MODULES
        if part_of(path) not in TERMINAL
        for line, name in said_or_read(parsed(path))
        if name not in allowed.get(dotted(path), set())
    ]
    assert wrong == []


def said_or_read(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of what prints, exits or reads the environment; `from os import environ` too."""
    surroundings = {
        "sys.exit", "os._exit", "os.environ", "os.getenv", "os.putenv",
        "sys.argv", "sys.stdout", "sys.stderr", "sys.stdin",
    }  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = {node.func.id} & {"print", "exit", "quit", "input", "breakpoint"}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = {f"{node.value.id}.{node.attr}"} & surroundings
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names} & surroundings
        else:
            continue
        yield from ((node.lineno, name) for name in names)


def test_what_is_said_or_read_is_found() -> None:
    """A call, an attribute, an import by name; not a method of that name, nor another of the module's."""
    source = """
print("x")
sys.stdout.write("x")
from os import environ, fspath
self.exit()
os.fspath(path)
"""
    assert sorted(said_or_read(ast.parse(source))) == [(2, "print"), (3, "sys.stdout"), (4, "os.environ")]


def test_modules_and_functions_stay_small() -> None:
    """A module has fewer than 400 lines, a function fewer than 60."""
    assert [dotted(path) for path in MODULES if len(path.read_text(encoding="utf-8").splitlines()) >= 400] == []
    large = [
        f"{dotted(path)}: {node.name} at line {node.lineno}"
        for path in MODULES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno + 1 >= 60
    ]
    assert large == []


def test_the_architecture_page_names_every_room_once() -> None:
    """ARCHITECTURE.md fits on one page, and its table has every room once and none that is gone."""
    page = (REPOSITORY / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) < 100
    table = page.partition("## Rooms")[2].partition("## ")[0]
    named = sorted(re.findall(r"`([\w/]+)/`", table))
    assert named == sorted({room_of(path) for path in MODULES if path.parent != PACKAGE})


TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))


def is_private(name: str) -> bool:
    public = {"_fields", "_replace", "_asdict"}  # of every named tuple
    return name.startswith("_") and not name.startswith("__") and name not in public


def private_names() -> set[str]:
    """Every private name that the package gives to a function, class, module's value or attribute."""
    names: set[str] = set()
    for path in MODULES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return set(filter(is_private, names))


def privates_reached(tree: ast.Module, privates: set[str]) -> Iterator[str]:
    """Private names of the package that a test imports, looks up in an object not its own, or patches."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pocketmoe"):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif (
            isinstance(node, ast.Attribute) and node.attr in privates and ast.unparse(node.value) not in ("self", "cls")
        ):
            yield ast.unparse(node)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("setattr", "delattr")
        ):
            names = [arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            yield from (name for name in names if name.rpartition(".")[2] in privates)


def test_tests_go_by_public_names() -> None:
    """What a module keeps to itself can change without a test that fails: tests import and patch nothing private."""
    privates = private_names()
    reached = [
        f"{path.relative_to(REPOSITORY)}: {name}" for path in TESTS for name in privates_reached(parsed(path), privates)
    ]
    assert reached == []


def test_private_names_are_found() -> None:
    """An import, a lookup, a patch by name and by path; not another package's, nor the test's own."""
    source = """
from pocketmoe.runtime.run import _prompt_ids
from os import _exit
engine._pager.stats
usage._replace(free=0)
self._pager
monkeypatch.setattr(module, "_LIMITS", 1)
monkeypatch.setattr("pocketmoe.module._LIMITS", 1)
monkeypatch.setattr(module, "LIMITS", 1)
"""
    found = {*privates_reached(ast.parse(source), {"_pager", "_LIMITS"})}
    assert found == {"_prompt_ids", "engine._pager", "_LIMITS", "pocketmoe.module._LIMITS"}
