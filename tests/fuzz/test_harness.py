"""The harness finds what it is there to find: each planted fault, and no fault where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from pocketmoe.bundle.manifest import MANIFEST, read_manifest
from tests.bundles import write_bundle
from tests.fuzz import bundles, configs, tokenizers
from tests.fuzz.cases import Case, Step, perform, same_tokens, where
from tests.fuzz.mutate import json_bytes
from tests.fuzz.place import Place
from tests.fuzz.zygote import Order, Zygote

MIB = 1 << 20


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote(["tests.fuzz.planted"]) as forking:
        yield forking


def planted(name: str, *arguments: object, cpu_s: float = 30, writes: tuple[str, ...] = ()) -> Step:
    order = Order(f"tests.fuzz.planted:{name}", arguments, memory_bytes=100 * MIB, child_bytes=100 * MIB, cpu_s=cpu_s)
    return Step(order, writes=writes)


def faults(zygote: Zygote, root: Path, step: Step) -> list[str]:
    place = Place.make(root / "case")
    (place.cwd / "in.txt").write_text("x")
    return [group for group, _ in perform(Case("", "", (step,)), place, {False: zygote, True: zygote}).faults]


@pytest.mark.parametrize(
    ("step", "group"),
    [
        (planted("fail"), "traceback: ?:? IndexError"),
        (planted("refuse", "Error: no such file.\n", 1), "exit 1"),
        (planted("refuse", "something is wrong\n", 3), "exit 3 without a line"),
        (planted("spin", cpu_s=0.2), "cpu: ?:? "),
        (planted("grow"), "memory: ?:? "),
        (planted("grow_in_a_child"), "memory of a child: ?:? "),
        (planted("leave_running"), "left running"),
        (planted("delete"), "files: removed canary"),
        (planted("write_home"), "files: left home"),
        (planted("change_input"), "files: changed cwd"),
        (planted("copy_secret", writes=("out",)), "secret copied"),
    ],
    ids=lambda value: value.order.task.partition(":")[2] if isinstance(value, Step) else "",
)
def test_a_planted_fault_is_found(zygote: Zygote, tmp_path: Path, step: Step, group: str) -> None:
    """Each kind of fault is reported as what it is."""
    assert group in faults(zygote, tmp_path, step)


@pytest.mark.parametrize("code", [0, 2, 3, 4, 5])
def test_a_refusal_in_one_line_is_no_fault(zygote: Zygote, tmp_path: Path, code: int) -> None:
    """An exit code of the list, with a line that says why, is what is wanted."""
    assert faults(zygote, tmp_path, planted("refuse", "\r|### | 3/4\rError: not a bundle.\n", code)) == []


def test_faults_are_grouped_by_the_innermost_frame_of_ours() -> None:
    """Two tracebacks through the same line of ours are one fault, whatever library raised."""
    text = (
        'Traceback (most recent call last):\n  File "/x/pocketmoe/cli.py", line 3, in main\n'
        '  File "/x/pocketmoe/runtime/text.py", line 9, in encode\n'
        '  File "/y/tokenizers/a.py", line 1, in go\nValueError: {}\n'
    )
    assert where(text.format("a")) == where(text.format("b: c")) == "runtime/text.py:encode ValueError"


def test_answers_may_part_only_where_two_logits_are_equal() -> None:
    """A tie is nobody's fault; a shorter answer and another token are."""
    assert same_tokens([1, 2, 3], [1, 2, 3], [1.0, 1.0, 1.0])
    assert same_tokens([1, 9, 9], [1, 2, 3], [1.0, 1e-6, 1.0])
    assert not same_tokens([1, 9, 9], [1, 2, 3], [1.0, 0.5, 1.0])
    assert not same_tokens([1, 2], [1, 2, 3], [1.0, 1.0, 1.0])
    assert not same_tokens([1, 2, 3, 4], [1, 2, 3], [1.0, 1.0, 1.0])


def test_an_attackers_seal_holds(tmp_path: Path) -> None:
    """What `bundles.seal` writes is a manifest that the reader takes: what is refused is refused for the mutation."""
    root = write_bundle(tmp_path / "b").root
    path = root / "graphs/dense.bin"
    path.write_bytes(path.read_bytes()[::-1] or b"x")
    before = read_manifest(root / MANIFEST)
    bundles.seal(root, bundles.load(root))
    after = read_manifest(root / MANIFEST)
    assert after.model == before.model
    assert list(after.files) == list(before.files)


@pytest.mark.parametrize("number", range(20))
def test_a_seed_makes_the_same_mutation_again(number: int) -> None:
    """A case can be replayed from target, seed and number."""
    for mutate in (
        lambda r: configs.mutate_config(r, b'{"hidden_size": 4}'),
        lambda r: tokenizers.mutate_settings(r, {}),
    ):
        assert mutate(Random(f"t:1:{number}")) == mutate(Random(f"t:1:{number}"))


def test_json_is_written_as_python_writes_it() -> None:
    """NaN, infinities and lone surrogates reach the readers, which must cope with them."""
    assert json_bytes([float("nan"), float("inf"), "\ud800"]) == b'[NaN, Infinity, "\\ud800"]'
