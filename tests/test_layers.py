"""The arrows between the parts point one way, imports stay lazy, and modules stay small: held over the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "pocketmoe"
MODULES = sorted(PACKAGE.rglob("*.py"))
FORMAT = {"errors", "store", "manifest", "bundle", "streaming", "calibration", "variant", "files", "steps", "sizes"}
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "store": {"errors"},
    "manifest": {"errors", "store"},
    "bundle": {"errors", "store", "manifest"},
    "streaming": {"errors", "store", "manifest", "bundle"},
    "sizes": set(),
    "files": {"errors", "store"},
    "steps": {"store", "bundle", "files"},
    "calibration": {"store", "bundle", "steps"},
    "variant": {"store", "manifest", "bundle"},
    "export": FORMAT,
    "quantize": FORMAT,
    "runtime": FORMAT,
    "profiles": FORMAT | {"runtime"},
    "console": set(),
    "inspection": FORMAT | {"console"},
    "tables": {"console", "inspection", "profiles", "runtime"},  # the last three for their types alone
    "commands": FORMAT | {"export", "quantize", "runtime", "profiles", "console", "inspection", "tables"},
    "process": {"errors"},
    "cli": {"commands", "errors", "process"},
    "__main__": {"cli", "process"},
}
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
    """pocketmoe.store for pocketmoe/bundle/store.py, pocketmoe.runtime for pocketmoe/runtime/__init__.py."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


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
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_arrows_point_one_way(path: Path) -> None:
    """A part imports only the parts below it; a new part finds its place in MAY_IMPORT first."""
    part = part_of(path)
    assert part in MAY_IMPORT, f"say in {Path(__file__).name} what {part} may import"
    for module in imported_modules(path):
        other = [*module.split("."), "__init__"][1]
        assert other in MAY_IMPORT[part] | {part, "__init__"}, f"{dotted(path)} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_nothing_inside_imports_through_an_init(path: Path) -> None:
    """Modules name the module that defines what they use; only the version lives in an `__init__`."""
    for module, name in imports(path):
        if module.startswith("pocketmoe.") or (module == "pocketmoe" and name not in {None, "__version__"}):
            through_init = REPOSITORY.joinpath(*module.split("."), "__init__.py").is_file()
            assert not through_init or (name and is_module(f"{module}.{name}")), f"{name} out of {module}"


@pytest.mark.parametrize("part", ["runtime", *sorted(FORMAT)])
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


@pytest.mark.skipif(not (PACKAGE / "cli.py").exists(), reason="no cli.py yet")
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


@pytest.mark.parametrize("path", [path for path in MODULES if part_of(path) not in TERMINAL], ids=dotted)
def test_the_library_is_silent_and_ignores_its_surroundings(path: Path) -> None:
    """Library modules do not print, exit, or read the environment: that is the command line's business.

    The one exception is the package's `__init__`, which switches telemetry off before anything can import onnxruntime.
    """
    allowed = {("os", "environ")} if path == PACKAGE / "__init__.py" else set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"print", "exit", "quit", "input", "breakpoint"}, f"line {node.lineno}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {
                ("sys", "exit"), ("os", "_exit"), ("os", "environ"), ("os", "getenv"), ("os", "putenv"),
                ("sys", "argv"), ("sys", "stdout"), ("sys", "stderr"), ("sys", "stdin"),
            } - allowed, f"line {node.lineno}"  # fmt: skip
        elif isinstance(node, ast.ImportFrom) and node.module in {"os", "sys"}:
            assert not {alias.name for alias in node.names} & {"environ", "getenv", "exit", "stdout", "stderr", "argv"}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_modules_and_functions_stay_small(path: Path) -> None:
    """A module has fewer than 400 lines, a function fewer than 60."""
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno + 1 < 60, f"{node.name} at line {node.lineno}"


@pytest.mark.skipif(not (REPOSITORY / "ARCHITECTURE.md").exists(), reason="no ARCHITECTURE.md yet")
def test_the_architecture_page_names_every_module_once() -> None:
    """ARCHITECTURE.md has every module by its path below pocketmoe/, once, and none that is gone."""
    page = (REPOSITORY / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = sorted(re.findall(r"(?<![\w./])(?:pocketmoe/)?((?:\w+/)*\w+\.py)\b", page))
    named = [name for name in named if not name.startswith(("tests/", "benchmarks/", "models/", "lab/"))]
    assert named == sorted(path.relative_to(PACKAGE).as_posix() for path in MODULES if path.name != "__init__.py")
