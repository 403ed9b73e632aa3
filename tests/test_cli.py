"""The command line as scripts see it: exit codes, what is on stdout, what is on stderr."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pocketmoe.bundle.reader import Bundle
from pocketmoe.cli import main
from pocketmoe.runtime.backends.probe import probe_slots
from tests.hang import HANG_S

RUN_FIELDS = {
    "text",
    "tokens",
    "prompt_tokens",
    "generated_tokens",
    "ttft_s",
    "decode_tokens_per_s",
    "peak_memory_bytes",
    "expert_hit_rate",
    "bytes_read",
    "backend",
    "memory_budget_bytes",
}


def pocketmoe(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pocketmoe.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG_S)


def is_for_machines(command: click.Command) -> bool:
    return any("--json" in parameter.opts for parameter in command.params)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[[str], Bundle]) -> Path:
    return tiny_bundle("olmoe").root


def test_run_json_is_one_object_and_the_text_that_is_streamed(bundle: Path) -> None:
    """`--json` prints one object with the promised fields; without it the same text is streamed to stdout."""
    options = (bundle, "--prompt", "hello world", "--raw", "--max-tokens", "12", "--memory", "50%")
    as_json = pocketmoe("run", *options, "--json")
    assert as_json.returncode == 0, as_json.stderr
    report = json.loads(as_json.stdout)
    assert set(report) >= RUN_FIELDS
    assert len(report["tokens"]) == report["generated_tokens"] <= 12
    assert 0 < report["peak_memory_bytes"] <= report["memory_budget_bytes"]
    streamed = pocketmoe("run", *options)
    assert streamed.stdout.rstrip("\n") == report["text"].rstrip("\n")
    assert "tokens/s" in streamed.stderr


def test_a_conversation_pieces_and_what_is_said(bundle: Path, tmp_path: Path) -> None:
    """`--messages` and `--system` are rendered; `--jsonl` streams; stderr has a line, with -v a table."""
    talk = tmp_path / "talk.json"
    talk.write_text('[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]')
    options = ("run", bundle, "--max-tokens", "8", "--memory", "50%")
    one = pocketmoe(*options, "--messages", talk, "--jsonl", "-q")
    *pieces, report = map(json.loads, one.stdout.splitlines())
    assert "".join(piece["text"] for piece in pieces) == report["text"]
    assert report["sampling"]["temperature"] == 0
    other = pocketmoe(*options, "hello", "--system", "be brief", "-v")
    assert other.stdout == report["text"] + "\n"
    assert "hit rate" in other.stderr
    assert one.stderr == ""
    stop = report["text"][2:5]
    stopped = pocketmoe(*options, "hello", "--system", "be brief", "--stop", stop)
    assert stopped.stdout == report["text"].partition(stop)[0] + "\n"
    assert stopped.stderr.count("\n") == 1


def test_sampling_is_repeatable_with_a_seed(bundle: Path) -> None:
    """The same seed gives the same tokens, another seed others."""
    options = (bundle, "--prompt", "a b c", "--raw", "--max-tokens", "12", "--temperature", "1", "--json")
    first, again, other = (json.loads(pocketmoe("run", *options, "--seed", s).stdout)["tokens"] for s in "112")
    assert first == again != other


def test_exit_codes_name_the_kind_of_failure(bundle: Path, tmp_path: Path) -> None:
    """2 usage, 3 bad input, 4 budget; each with one line on stderr that ends in what to do, and nothing on stdout."""
    prompt = ("--prompt", "hello")
    long_prompt = ("--prompt", "hello " * 300, "--raw")
    cases = [
        (2, ("run", bundle), "--prompt"),
        (2, ("run", bundle, *prompt, "--memory", "much"), "not a size"),
        (2, ("frobnicate",), "frobnicate"),
        (3, ("run", tmp_path / "none", *prompt), "not a PocketMoE bundle"),
        (3, ("run", bundle, "--prompt", ""), "prompt is empty"),
        (3, ("run", bundle, "--prompt", "latin-1: \udce9"), "not UTF-8"),
        (3, ("run", bundle, *long_prompt), "context"),
        (2, ("run", bundle, *prompt, "--raw", "--system", "x"), "--raw goes without"),
        (2, ("run", bundle, *prompt, "-v", "-q"), "--verbose or --quiet"),
        (2, ("run", bundle, *prompt, "--logit-bias", "3"), "ID=NUMBER"),
        (3, ("run", bundle, "--messages", tmp_path / "none"), "cannot be read"),
        (3, ("verify", tmp_path), "not a PocketMoE bundle"),
        (3, ("export", tmp_path, "-o", tmp_path / "out"), "config.json"),
        (3, ("export", "nowhere", "-o", tmp_path / "out"), "neither a directory that exists nor a hub id"),
        (3, ("export", tmp_path, "-o", tmp_path / "out", "--revision", "main"), "no revisions"),
        (2, ("export", tmp_path, "-o", tmp_path / "out", "--scheme", "int3"), "int3"),
        (2, ("quantize", bundle, "-o", tmp_path / "out", "--scheme", "int3"), "int3"),
        (2, ("plan", bundle, "--device", "int3"), "no device is named"),
        (3, ("quantize", tmp_path, "-o", tmp_path / "out"), "not a PocketMoE bundle"),
        (3, ("eval", bundle, "--text", tmp_path / "none.txt"), "none.txt"),
        (4, ("run", bundle, *prompt, "--raw", "--memory", "20MB"), "least that would do is"),
    ]
    for code, args, words in cases:
        done = pocketmoe(*args)
        assert done.returncode == code, (args, done.stderr)
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        if code > 2:
            assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name, command in main.commands.items() if is_for_machines(command)])
def test_machines_get_an_error_as_an_object(name: str) -> None:
    """With --json a line on stderr has what people are told without it, in parts; stdout stays empty."""
    given = {"doctor": ["--nowhere"], "compare": ["/nowhere", "-o", "/nowhere"], "packed": ["/nowhere", "more"]}.get(
        name, ["/nowhere"]
    )
    for wrong in (given, ["--frobnicate", *given]):
        told, plain = (CliRunner().invoke(main, [name, *how, *wrong]) for how in (["--json"], []))
        found = json.loads(told.stderr)
        assert (told.stdout, plain.stdout) == ("", "")
        assert found.keys() == {"error", "remedy", "exit_code"}
        assert told.exit_code == plain.exit_code == found["exit_code"] > 1
        assert found["error"] in plain.stderr
    as_text = CliRunner().invoke(main, [name, *wrong, "--", "--json"])
    assert as_text.stderr.startswith("Usage: ")


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (("plan", "BUNDLE", "--device", "laptop-8g"), "laptop-8gb"),
        (("plan", "BUNDLE", "--device", "Jetson-ORIN-nano"), "orin-nano-8gb"),
        (("quantize", "BUNDLE", "-o", "out", "--scheme", "int5"), "int4"),
        (("quantize", "BUNDLE", "-o", "out", "--rounding", "gptqq"), "gptq"),
        (("quantize", "BUNDLE", "-o", "out", "--format", "atention=int8-b64"), "attention"),
        (("replay", "out", "--policy", "LRV"), "lru"),
        (("run", "BUNDLE", "--memry", "4GB"), "--memory"),
        (("plam", "BUNDLE"), "plan"),
    ],
)
def test_a_name_that_nothing_has_is_usage_and_what_was_meant_is_asked(
    bundle: Path, args: tuple[str, ...], meant: str
) -> None:
    """Devices, schemes, roundings, classes, policies, options, commands: exit 2, and the names most alike."""
    done = CliRunner().invoke(main, [str(bundle) if arg == "BUNDLE" else arg for arg in args])
    assert done.exit_code == 2, done.stderr
    assert re.search(rf"Did you mean .*{meant}", done.stderr)


def test_threads_beyond_the_processors_are_as_many_as_those(bundle: Path) -> None:
    """It is said; the answer is the same."""
    options = ("run", bundle, "--prompt", "hello", "--raw", "--max-tokens", "3", "--json")
    many, one = pocketmoe(*options, "--threads", "1000"), pocketmoe(*options, "--threads", "1")
    assert "1000 threads are more than the" in many.stderr
    assert json.loads(many.stdout)["tokens"] == json.loads(one.stdout)["tokens"]


def test_inspect_verify_doctor_and_eval_answer_machines_and_people(bundle: Path, tmp_path: Path) -> None:
    """Each prints its figures as one JSON object or as a table, and exits 0."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    inspection = json.loads(pocketmoe("inspect", bundle, "--json").stdout)
    assert inspection["architecture"] == "OlmoeForCausalLM"
    assert inspection["experts_per_layer"] == [8] * inspection["moe_layers"]
    assert "OlmoeForCausalLM" in pocketmoe("inspect", bundle).stdout
    assert pocketmoe("verify", bundle).returncode == 0
    quality = json.loads(pocketmoe("eval", bundle, "--text", text, "--reference", bundle, "--json").stdout)
    assert quality["overall"]["divergence"]["mean_kl_nats"]["value"] == 0
    doctor = json.loads(pocketmoe("doctor", "--json").stdout)
    assert doctor["slots_work"] is (probe_slots() == "")
    assert doctor["ram"]["one_thread_bytes_per_s"] > 0
