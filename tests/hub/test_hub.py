"""Bundles on a hub on this machine: pushed, pulled, named by their ids, and every way in which that can fail."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from click.testing import CliRunner, Result

import pocketmoe
from pocketmoe.bundle.in_place import IN_PLACE
from pocketmoe.bundle.manifest import MANIFEST, MAX_MANIFEST_BYTES, STORE, Provenance, read_manifest, seal
from pocketmoe.bundle.reader import Bundle
from pocketmoe.cli import main
from pocketmoe.errors import BadInput, PocketMoEError
from pocketmoe.hub.card import README, metadata
from pocketmoe.hub.client import Reference
from pocketmoe.hub.pull import Access, find_bundle, find_description, pull, pull_to, reference_of
from pocketmoe.hub.push import push
from tests.bundles import manifest, reseal, tree, write_bundle
from tests.hang import HANG_S
from tests.hub.server import READER, Files, Repository, WritableHub

THERE = Reference("me/tiny")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The one line of a command that exits 3."""
    done = invoke(*arguments)
    assert done.exit_code == 3, done.output
    (line,) = (line for line in done.stderr.splitlines() if not line.startswith(("Downloading", "Uploading")))
    assert line.startswith("Error: ")
    return line


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def pushed(hub: WritableHub, bundle: Bundle) -> Repository:
    """`bundle` as me/tiny, with things beside it that are none of it."""
    push(bundle.root, THERE)
    repository = hub.repositories["me/tiny"]
    more = {"pytorch_model.bin": b"pickle", "graphs/other.onnx": b"stray", "packed/0123456789abcdef/experts.bin": b"x"}
    repository.commit({**newest(repository), **more})
    hub.requests.clear()
    return repository


def newest(repository: Repository) -> Files:
    return repository.commits[repository.branches["main"]]


def files_of(root: Path) -> dict[str, bytes]:
    """The files of a bundle, links followed."""
    return {name: (root / name).read_bytes() for name in (*read_manifest(root / MANIFEST).files, MANIFEST)}


def test_what_was_pushed_is_pulled(hub: WritableHub, bundle: Bundle, tmp_path: Path) -> None:
    """Byte for byte, without packed copies or whatever else lay beside; with a card that the hub can file."""
    (bundle.root / "packed/0123456789abcdef").mkdir(parents=True)
    (bundle.root / "packed/0123456789abcdef/uses.f64").write_bytes(b"counts")
    (bundle.root / "diary.txt").write_text("private")
    done = invoke("push", bundle.root, "me/tiny", "--private")
    assert done.exit_code == 0, done.output
    assert "(private)" in done.stderr
    assert done.stdout == f"{hub.url}/me/tiny\n"
    there = newest(hub.repositories["me/tiny"])
    assert there.keys() - {README, ".gitattributes"} == {*bundle.manifest.files, MANIFEST}
    assert hub.repositories["me/tiny"].private
    target = tmp_path / "pulled"
    done = invoke("pull", "me/tiny", "-o", target)
    assert (done.exit_code, done.stdout) == (0, f"{target}\n"), done.output
    assert tree(target) == files_of(bundle.root)
    assert f"Downloading {hub.url}/me/tiny at" in done.stderr
    done = invoke("pull", "me/tiny")
    root = Path(done.stdout.strip())
    assert root.is_relative_to(tmp_path / "cache")
    assert files_of(root) == files_of(bundle.root)


def test_the_card_says_what_the_hub_understands(hub: WritableHub, bundle: Bundle) -> None:
    provenance = Provenance(source="allenai/tiny", revision="1" * 40, licence="Apache-2.0", datasets=("a/b", "no id!"))
    reseal(bundle.root, provenance=provenance)
    push(bundle.root, THERE)
    text = newest(hub.repositories["me/tiny"])[README].decode()
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("allenai/tiny", "quantized")
    assert (front["license"], front["library_name"], front["pipeline_tag"]) == (
        "apache-2.0",
        "pocketmoe",
        "text-generation",
    )
    assert {"pocketmoe", "moe", "onnx", "tiny", "fp32"} <= {*front["tags"]}
    assert front["datasets"] == ["a/b"]
    assert "pocketmoe run me/tiny" in text
    assert read_manifest(bundle.root / MANIFEST).sha256 in text


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"source": "folder"}, {}),
        ({"source": "folder", "base_model": "a/b, not one, c/d"}, {"base_model": ["a/b", "c/d"]}),
        ({"source": "a/b", "base_model": "c/d"}, {"base_model": "a/b"}),
        ({"source": "x", "licence": "other", "licence_name": "mine", "licence_link": "https://x.example"},
         {"license": "other", "license_name": "mine", "license_link": "https://x.example"}),
        ({"source": "x", "licence": "My Own: ---\n"}, {"license": "other", "license_name": "My Own: ---\n"}),
    ],
)  # fmt: skip
def test_the_card_of_odd_sources(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = metadata(manifest(provenance=Provenance(**given)))
    assert {key: found[key] for key in wanted} == wanted
    assert ("base_model" in found) == ("base_model" in wanted)


def test_only_what_the_manifest_names_is_downloaded(hub: WritableHub, pushed: Repository, tmp_path: Path) -> None:
    """No pickle, no graph that is not listed, no packed experts; once, and then nothing."""
    root = pull(THERE)
    assert hub.downloaded() == {*read_manifest(root / MANIFEST).files, MANIFEST}
    hub.requests.clear()
    assert pull(THERE) == pull(THERE, check=True) == root
    assert hub.downloaded() == set()


def test_revisions(hub: WritableHub, bundle: Bundle, tmp_path: Path) -> None:
    """A branch is made, and its bundle pulled by branch or commit; the main branch stays as it is."""
    first = push(bundle.root, THERE)
    other = write_bundle(tmp_path / "other", seed=1)
    second = push(other.root, Reference("me/tiny", "v2"))
    for reference, wanted in (
        (THERE, bundle),
        (Reference("me/tiny", first.commit), bundle),
        (Reference("me/tiny", "v2"), other),
        (Reference("me/tiny", second.commit), other),
    ):
        assert files_of(pull(reference)) == files_of(wanted.root)
    assert "no revision 'v3'" in refused("pull", "me/tiny@v3")
    assert "is a commit" in refused("push", bundle.root, "me/tiny", "--revision", first.commit)


def test_a_push_replaces_what_was_there(hub: WritableHub, bundle: Bundle, pushed: Repository) -> None:
    """Files that the new bundle does not have go, but not those that no bundle had; large ones are not sent twice."""
    names = dict(bundle.manifest.files)
    gone = "tokenizer/tokenizer.json"
    del names[gone]
    reseal(bundle.root, files=names)
    push(bundle.root, THERE)
    there = newest(pushed)
    assert gone not in there
    assert there["pytorch_model.bin"] == b"pickle"
    assert hub.uploaded() == []


def test_a_push_that_breaks_off_changes_nothing_and_goes_on(hub: WritableHub, bundle: Bundle) -> None:
    """What has been sent of large files is not sent again."""
    hub.refused_uploads = 1
    assert "broke off" in refused("push", bundle.root, "me/tiny")
    assert newest(hub.repositories["me/tiny"]).keys() == {".gitattributes"}
    sent = set(hub.uploaded()) & hub.blobs.keys()
    hub.requests.clear()
    assert invoke("push", bundle.root, "me/tiny").exit_code == 0
    assert not sent & {*hub.uploaded()}
    assert STORE in newest(hub.repositories["me/tiny"])


def test_private_means_private(hub: WritableHub, bundle: Bundle, pushed: Repository) -> None:
    """What exists and is public is not pushed to with --private."""
    assert "exists and is public" in refused("push", bundle.root, "me/tiny", "--private")
    assert hub.uploaded() == []


def test_a_repository_of_something_else_is_left_alone(hub: WritableHub, bundle: Bundle) -> None:
    hub.repositories["me/model"] = Repository()
    hub.repositories["me/model"].commit({"model.safetensors": b"weights", "README.md": b"mine"})
    assert "holds something else than a bundle: model.safetensors" in refused("push", bundle.root, "me/model")


def test_what_the_hub_leaves_out_is_noticed(hub: WritableHub, bundle: Bundle) -> None:
    hub.ignored = {"graphs/expert_0.onnx"}
    assert "has not taken graphs/expert_0.onnx" in refused("push", bundle.root, "me/tiny")


def test_damaged_and_packed_bundles_are_not_pushed(hub: WritableHub, bundle: Bundle, tmp_path: Path) -> None:
    """Nothing is asked of the hub."""
    folder = bundle.root / "packed/0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / IN_PLACE).write_text("{}")
    assert "pack" in refused("push", bundle.root, "me/tiny")
    (folder / IN_PLACE).unlink()
    folder.with_name("0123456789abcdef.unfinished").mkdir()
    assert "packed in place, which has not ended" in refused("push", bundle.root, "me/tiny")
    folder.with_name("0123456789abcdef.unfinished").rmdir()
    store = bytearray((bundle.root / STORE).read_bytes())
    store[5] ^= 1
    (bundle.root / STORE).write_bytes(store)
    assert "does not match its hash" in refused("push", bundle.root, "me/tiny")
    assert "no PocketMoE" in refused("push", tmp_path, "me/tiny").replace("not a PocketMoE", "no PocketMoE")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "repository", "words"),
    [
        (None, "me/tiny", "hf auth login"),
        ("wrong", "me/tiny", "hf auth login"),
        (READER, "me/tiny", "does not let you write"),
        (READER, "me/new", "does not let you write"),
        ("hf_owner", "somebody/new", "does not let you write"),
    ],
)
def test_who_may_push(
    hub: WritableHub,
    bundle: Bundle,
    pushed: Repository,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    repository: str,
    words: str,
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert words in refused("push", bundle.root, repository)
    assert hub.uploaded() == []


def test_who_may_pull(hub: WritableHub, pushed: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Private and gated repositories, a wrong token, a name that nobody has."""
    pushed.private = True
    assert pull(THERE, Access(token=READER))
    monkeypatch.delenv("HF_TOKEN")
    for name in ("me/tiny", "me/none"):
        assert "no model on the hub that you may see" in refused("pull", name, "-o", tmp_path / "x")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "hf auth login" in refused("pull", "me/tiny", "-o", tmp_path / "x")
    monkeypatch.setenv("HF_TOKEN", READER)
    pushed.private, pushed.gated = False, True
    pushed.commit({**newest(pushed), "new": b""})
    assert "gated" in refused("pull", "me/tiny", "-o", tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".x", "x"))] == []


def test_offline(hub: WritableHub, pushed: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is in the cache is used without a word to anybody, also by -o; what is not there is said in a line."""
    from huggingface_hub import constants

    root = pull(THERE)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull(THERE) == root
    assert tree(pull_to(THERE, tmp_path / "copy").root) == files_of(root)
    assert "not in the hub's cache" in refused("pull", "me/other")
    assert "HF_HUB_OFFLINE" in refused("push", root, "me/tiny")
    (root / STORE).unlink()
    assert "experts.bin" in refused("pull", "me/tiny")
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refused("pull", "me/other")


@pytest.mark.parametrize("own", [False, True])
def test_a_pull_that_breaks_off_goes_on(
    hub: WritableHub, pushed: Repository, tmp_path: Path, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the cache and in a directory of its own alike: what is complete is not asked for again."""
    monkeypatch.setattr("time.sleep", lambda _: None)  # before huggingface_hub tries again
    command = ["pull", "me/tiny", *(["-o", tmp_path / "own"] if own else [])]
    hub.cut = STORE
    assert "broke off" in refused(*command)
    assert not (tmp_path / "own").exists()
    complete = hub.downloaded() - {STORE, MANIFEST}
    hub.cut = None
    hub.requests.clear()
    done = invoke(*command)
    assert done.exit_code == 0, done.output
    assert STORE in hub.downloaded()
    assert len(complete) > 3
    assert not hub.downloaded() & complete
    root = Path(done.stdout.strip())
    assert files_of(root) == {name: newest(pushed)[name] for name in files_of(root)}
    assert not list(tmp_path.glob(".own.*"))


@contextlib.contextmanager
def file_system(place: Path, *options: str) -> Generator[Callable[[str], None]]:
    """A small file system in memory; what is given can change its options."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a small file system here")
    try:

        def change(option: str) -> None:
            subprocess.run(["mount", "-o", f"remount,{option}", str(place)], check=True)

        yield change
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_cache_that_cannot_be_written(hub: WritableHub, pushed: Repository, tmp_path: Path) -> None:
    """What it has is used; what it has not is refused, and -o does without it."""
    from huggingface_hub import constants

    with file_system(tmp_path / "disk", "size=4m") as change, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "disk/cache"))
        root = pull(THERE)
        change("ro")
        assert pull(THERE, check=True) == root
        pushed.commit({name: data for name, data in newest(pushed).items() if name != "pytorch_model.bin"})
        assert "cannot be written" in refused("pull", "me/tiny")
        assert tree(pull_to(THERE, tmp_path / "own").root) == files_of(root)


def test_a_full_disk(hub: WritableHub, pushed: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the download where it is known, and on the way where it is not; nothing is left behind."""
    with file_system(tmp_path / "disk", "size=48k"):
        target = tmp_path / "disk/own"
        assert "GB are free" in refused("pull", "me/tiny", "-o", target)
        monkeypatch.setattr("pocketmoe.hub.pull.check_space", lambda *_: None)
        assert "disk is full" in refused("pull", "me/tiny", "-o", target)
        assert list((tmp_path / "disk").iterdir()) == []


def spoil_experts(repository: Repository) -> None:
    files = dict(newest(repository))
    files[STORE] = bytes([files[STORE][0] ^ 1]) + files[STORE][1:]
    repository.commit(files)


def lying(change: Callable[[Any], Any]) -> Callable[[Repository], None]:
    """A repository whose manifest was changed and sealed again."""

    def spoil(repository: Repository) -> None:
        files = dict(newest(repository))
        known = msgspec.json.decode(files[MANIFEST], type=type(manifest()))
        files[MANIFEST] = seal(msgspec.structs.replace(known, files=change(dict(known.files))))
        repository.commit(files)

    return spoil


def huge(files: dict[str, Any]) -> dict[str, Any]:
    return {**files, STORE: msgspec.structs.replace(files[STORE], nbytes=1 << 60)}


def renamed(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda files: {**files, name: files[STORE]}


def bloated_manifest(repository: Repository) -> None:
    repository.commit({**newest(repository), MANIFEST: bytes(MAX_MANIFEST_BYTES + 1)})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_experts, "does not have the hash"),
        (lying(huge), "says that experts.bin has"),
        (lying(renamed("../../etc/cron.d/x")), "outside the bundle"),
        (lying(renamed("/etc/cron.d/x")), "outside the bundle"),
        (lying(renamed("packed/0123456789abcdef/experts.bin")), "is no file of a bundle"),
        (lying(renamed(".cache/x")), "is no file of a bundle"),
        (lying(renamed("graphs/../x")), "outside the bundle"),
        (lying(renamed("absent.bin")), "does not have"),
        (bloated_manifest, "more than"),
        (lambda there: there.commit({"model.safetensors": b""}), "it has no manifest.json"),
        (lambda there: there.commit({MANIFEST: b"{}"}), "does not match its own hash"),
    ],
)
@pytest.mark.parametrize("own", [False, True])
def test_a_repository_that_means_harm(
    hub: WritableHub,
    pushed: Repository,
    tmp_path: Path,
    own: bool,
    spoil: Callable[[Repository], None],
    words: str,
) -> None:
    """One line; no file of it is anywhere but in the cache, and none that was downloaded before its check stays."""
    spoil(pushed)
    outside = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    assert words in refused("pull", "me/tiny", *(["-o", tmp_path / "own"] if own else []))
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == outside
    assert "pytorch_model.bin" not in hub.downloaded()
    assert not list((tmp_path / "cache").rglob(STORE))


def test_a_link_in_a_cache_that_leads_elsewhere(hub: WritableHub, pushed: Repository, tmp_path: Path) -> None:
    """As of a cache that was copied from somebody: it is refused, not followed."""
    root = pull(THERE)
    secret = tmp_path / "secret"
    secret.write_bytes((root / STORE).read_bytes())
    (root / STORE).unlink()
    (root / STORE).symlink_to(secret)
    assert "symbolic link" in refused("pull", "me/tiny")


def test_what_is_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that exists is none; nor is what is not written like one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    assert reference_of("org/name") == Reference("org/name")
    assert reference_of("org/name@feature/x") == Reference("org/name", "feature/x")
    for name in ("./org/name", "/org/name", "a/b/c", "name", "org/name@", "org/", "../a", "~/x", "a/b@../c d", "ö/x"):
        assert reference_of(name) is None, name
        assert find_bundle(name) == Path(name)
    (tmp_path / "org/name").mkdir()
    assert reference_of("org/name") is None
    with pytest.raises(BadInput, match="no revisions"):
        reference_of("org/name@main")
    (tmp_path / "org/name").rmdir()
    (tmp_path / "org/name").symlink_to("nowhere")
    assert reference_of("org/name") is None


COMMANDS = [
    ["run", "ID", "-p", "x"],
    ["chat", "ID"],
    ["serve", "ID"],
    ["inspect", "ID"],
    ["verify", "ID"],
    ["quantize", "ID", "-o", "OUT"],
    ["eval", "ID", "--text", "TEXT"],
    ["eval", "LOCAL", "--reference", "ID", "--text", "TEXT"],
    ["profile", "ID", "-o", "OUT"],
    ["plan", "ID", "--device", "pi5-8gb"],
    ["export-portable", "ID", "-o", "OUT"],
    ["pack", "ID"],
    ["pull", "ID"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:3]))
def test_every_command_takes_an_id(hub: WritableHub, bundle: Bundle, tmp_path: Path, command: list[str]) -> None:
    """Each looks for it on the hub, and says in one line that it is not there."""
    (tmp_path / "text.txt").write_text("some text")
    places = {"OUT": tmp_path / "out", "TEXT": tmp_path / "text.txt", "LOCAL": bundle.root}
    line = refused(*(places.get(word, "me/none" if word == "ID" else word) for word in command))
    assert "me/none is no directory here, and no model on the hub that you may see" in line
    assert any("me/none" in path for _, path, _ in hub.requests)


def test_ids_where_bundles_are_taken(hub: WritableHub, pushed: Repository, tmp_path: Path) -> None:
    """`inspect` shows a hub's bundle; `plan` needs its manifest alone; Python's functions take ids as strings."""
    done = invoke("plan", "me/tiny", "--device", "pi5-8gb", "--context", "16", "--json")
    assert '"me/tiny"' in done.stdout, done.output
    assert hub.downloaded() == {MANIFEST}
    assert find_description(THERE).name == MANIFEST
    assert invoke("inspect", "me/tiny").exit_code == 0
    with pytest.raises(PocketMoEError, match="tokenizer") as caught:
        pocketmoe.load("me/tiny")
    assert "no model on the hub" not in str(caught.value)
    with pytest.raises(BadInput, match="not a PocketMoE bundle"):
        pocketmoe.load(Path("me/tiny"))
    with pytest.raises(BadInput, match="no model on the hub"):
        pocketmoe.load("me/none")


def test_without_huggingface_hub(bundle: Bundle, tmp_path: Path) -> None:
    """A runtime alone reads local bundles, and says which extra the others need."""
    code = """
import sys
from importlib.abc import MetaPathFinder
class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "huggingface_hub":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "huggingface_hub" else find(name, package)
from pocketmoe.cli import main
main(sys.argv[1:])
"""
    for arguments, code_of_exit in ((("inspect", "me/tiny"), 3), (("push", str(bundle.root), "me/x"), 3)):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == code_of_exit, done.stderr
        assert done.stderr.count("\n") == 1
        assert "[hub]" in done.stderr
