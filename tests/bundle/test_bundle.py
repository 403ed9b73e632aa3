"""Bundles under attack and through accidents: damage is named, and a good bundle is never lost."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.bundle import writer as writing
from pocketmoe.bundle.manifest import DENSE, MANIFEST, STORE, FileEntry
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId, translate_write_errors
from pocketmoe.bundle.writer import BundleWriter, write_with_graphs
from pocketmoe.errors import BadInput, DamagedFile, OutputError
from tests import bundles

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """The path of a whole bundle."""
    return bundles.write_bundle(tmp_path / "bundle").root


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a whole bundle."""
    return bundles.tree(bundles.write_bundle(tmp_path_factory.mktemp("shared") / "bundle").root)


@pytest.fixture(params=[True, False], ids=["exchange", "two steps"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of replacing a bundle: the atomic one, and the one for file systems that lack it."""
    if not request.param:
        monkeypatch.setattr(writing, "exchange", lambda a, b: False)


def only(target: Path) -> None:
    """Nothing lies beside the target: no partial directory, nothing moved aside."""
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def use(root: Path) -> None:
    """What the runtime does with a bundle before it trusts it, and then its experts."""
    bundle = Bundle.open(root)
    bundle.check_all_but_store()
    with bundle.open_store() as store:
        for expert in store.records:
            store.read(expert)


# Damage


def test_a_whole_bundle_opens_and_verifies(target: Path) -> None:
    """What was published is read back, and verify has nothing to say."""
    bundle = Bundle.open(target)
    with bundle.open_store() as store:
        assert bytes(store.read(ExpertId(1, 1))) == bundles.record_of(ExpertId(1, 1))
    seen: list[tuple[str, int, int]] = []
    assert list(bundle.verify(lambda *step: seen.append(step))) == []
    assert seen[-1] == ("verifying", len(bundle.manifest.files), len(bundle.manifest.files))


@given(data=st.data(), bit=st.integers(0, 7))
@settings(max_examples=200, deadline=None)
def test_any_flipped_bit_is_found_and_named(
    shared: dict[str, bytes], data: st.DataObject, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One flipped bit in any file is refused before use, and verify names the file."""
    name = data.draw(st.sampled_from(sorted(shared)))
    position = data.draw(st.integers(0, len(shared[name]) - 1))
    root = tmp_path_factory.getbasetemp() / "flipped"
    for other, content in shared.items():
        damaged = bytearray(content)
        if other == name:
            damaged[position] ^= 1 << bit
        (root / other).parent.mkdir(parents=True, exist_ok=True)
        (root / other).write_bytes(damaged)
    with pytest.raises(DamagedFile) as caught:
        use(root)
    assert caught.value.path == root / name
    if name != MANIFEST:
        found = list(Bundle.open(root).verify())
        assert found
        assert all(line.startswith(f"{root / name}: ") for line in found)


def test_a_cut_grown_missing_or_replaced_file_is_found_at_open(shared: dict[str, bytes], target: Path) -> None:
    """Every file's presence, kind and size are checked when the bundle opens, and the error names it."""
    for name, content in shared.items():
        path = target / name
        for wrong in (content[:-1], content + b"x", content[: len(content) // 2]):
            path.write_bytes(wrong)
            with pytest.raises(DamagedFile, match=name):
                Bundle.open(target)
        path.unlink()
        with pytest.raises(BadInput, match=r"is missing|not a PocketMoE bundle"):
            Bundle.open(target)
        path.mkdir()
        with pytest.raises(BadInput, match=r"is missing|not a PocketMoE bundle"):
            Bundle.open(target)
        path.rmdir()
        path.write_bytes(content)
    use(target)


@pytest.mark.parametrize("name", [STORE, DENSE, "graphs", "tokenizer"])
def test_a_symbolic_link_inside_is_refused(target: Path, tmp_path: Path, name: str) -> None:
    """A file or directory that leads elsewhere is refused, even to the very same bytes."""
    moved = tmp_path / "elsewhere"
    (target / name).rename(moved)
    (target / name).symlink_to(moved)
    with pytest.raises(DamagedFile, match="symbolic link"):
        Bundle.open(target)


@pytest.fixture
def snapshot(target: Path, tmp_path: Path) -> Path:
    """That bundle as the hub's cache keeps it: links to files that are called by their hashes."""
    repository = tmp_path / "models--somebody--tiny"
    for name, content in bundles.tree(target).items():
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = repository / "snapshots/0123abc" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return repository / "snapshots/0123abc"


def test_a_bundle_in_the_hubs_cache_is_read_where_it_lies(snapshot: Path, tmp_path: Path) -> None:
    """Also by a link to it, and as a folder of a larger repository; what is made of it has no links."""
    use(snapshot)
    assert list(Bundle.open(snapshot).verify()) == []
    (tmp_path / "mine").symlink_to(snapshot)
    use(tmp_path / "mine")
    copy = write_with_graphs(Bundle.open(snapshot), tmp_path / "copy", {}, Bundle.open(snapshot).manifest)
    assert not any(path.is_symlink() for path in copy.root.rglob("*"))
    larger = snapshot.with_name("4567def") / "int4"
    larger.parent.mkdir()
    shutil.copytree(snapshot, larger, symlinks=True)
    for link in [path for path in larger.rglob("*") if path.is_symlink()]:
        blob = snapshot.parents[1] / "blobs" / link.readlink().name
        link.unlink()
        link.symlink_to(blob)
    use(larger)


@pytest.mark.parametrize("name", [MANIFEST, STORE, DENSE, "graphs/segment_00.onnx", "tokenizer/tokenizer.json"])
def test_a_link_that_leaves_the_hubs_cache_is_refused(snapshot: Path, tmp_path: Path, name: str) -> None:
    """To the same bytes elsewhere, directly or by a link in blobs, out of another repository, or where no cache is."""
    link = snapshot / name
    blob = link.resolve()
    outside = tmp_path / "outside"
    other = tmp_path / "models--somebody--else/blobs" / blob.name
    other.parent.mkdir(parents=True)
    for copy in (outside, other, blob.parents[1] / "beside"):
        shutil.copy(blob, copy)
        link.unlink()
        link.symlink_to(copy)
        with pytest.raises(DamagedFile, match="symbolic link"):
            Bundle.open(snapshot)
    link.unlink()
    link.symlink_to(blob)
    use(snapshot)
    blob.unlink()
    blob.symlink_to(outside)
    with pytest.raises(DamagedFile, match="symbolic link"):
        Bundle.open(snapshot)
    blob.unlink()
    shutil.copy(outside, blob)
    snapshot.parent.rename(snapshot.parent.with_name("elsewhere"))
    with pytest.raises(DamagedFile, match="symbolic link"):
        Bundle.open(snapshot.parent.with_name("elsewhere") / snapshot.name)


def test_blobs_that_lead_elsewhere_are_refused(snapshot: Path, tmp_path: Path) -> None:
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(tmp_path / "etc")
    blobs.symlink_to(tmp_path / "etc")
    with pytest.raises(DamagedFile, match="symbolic link"):
        Bundle.open(snapshot)


def test_names_that_a_forger_seals_are_refused(target: Path) -> None:
    """A sealed manifest cannot reach outside the bundle, nor make open raise anything but DamagedFile."""
    whole = Bundle.open(target).manifest
    for name in ("../bundle/manifest.json", "/dev/zero", "x" * 300, "a/" * 3000 + "b", f"{MANIFEST}/x", "a\0"):
        bundles.reseal(target, files={**whole.files, name: FileEntry(nbytes=0, sha256="")})
        with pytest.raises(DamagedFile):
            Bundle.open(target)
        (target / MANIFEST).write_bytes(bundles.seal(whole))


def test_only_named_files_are_handed_out(target: Path) -> None:
    """A file that the manifest does not name has no path, even when it lies in the bundle."""
    (target / "extra.bin").write_bytes(b"x")
    with pytest.raises(DamagedFile, match="names no file"):
        Bundle.open(target).path("extra.bin")


def test_a_graph_finds_only_files_whose_hash_is_known_beside_it(target: Path) -> None:
    """Nothing that the manifest does not name may lie in graphs/, where a graph could take weights from it."""
    unlisted = target / "graphs/more/weights.bin"
    unlisted.parent.mkdir()
    for make in (lambda: unlisted.write_bytes(b""), lambda: unlisted.symlink_to("/dev/zero")):
        make()
        with pytest.raises(DamagedFile, match=r"weights\.bin: is not a file of this bundle"):
            Bundle.open(target)
        unlisted.unlink()


def test_a_store_that_lacks_an_expert_of_the_manifest_does_not_open(target: Path) -> None:
    """Manifest and store are compared whenever the store opens; verify says it too, though every hash is right."""
    whole = Bundle.open(target).manifest
    more = msgspec.structs.replace(whole.moe_layers[0], n_experts=3)
    bundles.reseal(target, moe_layers=(more, whole.moe_layers[1]))
    with pytest.raises(DamagedFile, match="no record of layer 0, expert 2"):
        Bundle.open(target).open_store()
    assert any("expert 2" in line for line in Bundle.open(target).verify())


def test_verify_lists_everything_that_is_damaged(target: Path) -> None:
    """Two damaged records and a damaged graph make four lines: the store, each record, and the graph."""
    bundle = Bundle.open(target)
    with bundle.open_store() as store:
        places = [store.records[ExpertId(0, 1)].offset, store.records[ExpertId(1, 0)].offset]
    content = bytearray((target / STORE).read_bytes())
    for place in places:
        content[place] ^= 1
    (target / STORE).write_bytes(content)
    (target / "graphs/expert_0.onnx").write_bytes(b"Expert_0 of 0")
    lines = list(bundle.verify())
    for line, what in zip(lines, [STORE, "layer 0, expert 1", "layer 1, expert 0", "expert_0.onnx"], strict=True):
        assert what in line
    (target / DENSE).unlink()
    assert any("cannot be read" in line for line in bundle.verify())


@pytest.mark.parametrize("root", ["nothing", "x" * 300, "a\0b"])
def test_what_is_no_bundle_is_bad_input(tmp_path: Path, root: str) -> None:
    """A path without a bundle, or that cannot be one, gets a remedy and not a traceback."""
    with pytest.raises(BadInput, match="not a PocketMoE bundle") as caught:
        Bundle.open(tmp_path / root)
    assert "pocketmoe export" in caught.value.remedy


# Publication


@pytest.mark.usefixtures("swap")
def test_publishing_replaces_a_bundle_and_leaves_nothing(target: Path) -> None:
    """A new bundle takes the old one's place whole, what the old one had packed goes with it, nothing stays beside."""
    (target / "packed/0123456789abcdef").mkdir(parents=True)
    (target / "packed/0123456789abcdef/kind_0.seed").write_bytes(b"made on the device")
    bundles.write_bundle(target, seed=1)
    with Bundle.open(target).open_store() as store:
        assert bytes(store.read(ExpertId(0, 0))) == bundles.record_of(ExpertId(0, 0), seed=1)
    assert not (target / "packed").exists()
    only(target)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OutputError("disk full"), None])
def test_leaving_without_publishing_leaves_nothing(target: Path, error: BaseException | None) -> None:
    """An interrupt, an error or a change of mind removes the partial directory; the old bundle is untouched."""
    before = bundles.tree(target)
    try:
        with BundleWriter(target) as writer:
            bundles.fill(writer, seed=1)
            if error:
                raise error
    except (KeyboardInterrupt, OutputError):
        pass
    assert bundles.tree(target) == before
    only(target)


@pytest.mark.usefixtures("swap")
@pytest.mark.parametrize("step", ["locked", "filled", "hashed", "sealed", "synced", "complete"])
def test_an_interrupt_at_any_step_keeps_the_old_bundle(target: Path, step: str) -> None:
    """Ctrl-C during any step of publishing leaves the old bundle whole and nothing beside it."""
    before = bundles.tree(target)

    def interrupt(name: str) -> None:
        if name == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bundles.write_bundle(target, seed=1, on_step=interrupt)
    assert bundles.tree(target) == before
    only(target)


def test_a_failed_second_step_puts_the_old_bundle_back(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an atomic exchange, an error between the two renames is undone."""
    before, rename = bundles.tree(target), Path.rename

    def fail_for_the_new_one(self: Path, to: Path) -> Path:
        if to == target and self.suffix == ".partial":
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(writing, "exchange", lambda a, b: False)
    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(OutputError, match="Input/output error"):
        bundles.write_bundle(target, seed=1)
    assert bundles.tree(target) == before
    only(target)


def test_a_bundle_that_does_not_fit_together_is_not_published(target: Path) -> None:
    """A manifest that disagrees with the store or the files is refused before the old bundle goes."""
    before = bundles.tree(target)
    for changes in ({"store_index_sha256": "0" * 64}, {"logits": "nothing"}, {"moe_layers": ()}):
        with pytest.raises(DamagedFile), BundleWriter(target) as writer:
            writer.publish(msgspec.structs.replace(bundles.fill(writer, seed=1), **changes))
        assert bundles.tree(target) == before
        only(target)


def test_what_is_not_just_a_bundle_is_not_replaced(target: Path, tmp_path: Path) -> None:
    """Somebody's file, directory, link, web application or notes beside the experts are refused and stay."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "webapp").mkdir()
    (tmp_path / "webapp/manifest.json").write_text('{"name": "mine"}')
    (target / "notes.txt").write_text("mine")
    before = bundles.tree(tmp_path)
    for name in ("file", "link", "webapp", "bundle", "."):
        with pytest.raises(OutputError, match="exists and is not"):
            BundleWriter(tmp_path / name)
    assert bundles.tree(tmp_path) == before


def test_a_directory_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """Export takes hours: what somebody puts at the target during that time stays."""
    target = tmp_path / "bundle"
    with BundleWriter(target) as writer:
        manifest = bundles.fill(writer)
        target.mkdir()
        (target / "mine.txt").write_text("mine")
        with pytest.raises(OutputError, match="exists and is not"):
            writer.publish(manifest)
    assert bundles.tree(target) == {"mine.txt": b"mine"}
    only(target)


def test_an_empty_directory_and_missing_parents_are_fine(tmp_path: Path) -> None:
    """The target may be an empty directory, or lie where no directory is yet, or be written with dots."""
    (tmp_path / "empty").mkdir()
    for name in ("empty", "a/b/c", "a/b/../d"):
        bundles.write_bundle(tmp_path / name)
        use(tmp_path / name)


def test_an_unwritable_place_is_an_output_error(tmp_path: Path) -> None:
    """A file where a parent directory should be, and a name too long, are one line for the user."""
    (tmp_path / "file").write_text("")
    for name in ("file/bundle", "x" * 250):
        with pytest.raises(OutputError, match="cannot be written"):
            BundleWriter(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a small file system here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("free", range(0, 40 << 10, 5 << 10))
def test_a_disk_that_fills_up_leaves_the_old_bundle(small_disk: Path, free: int) -> None:
    """Whichever write runs out of space, the old bundle stays whole, the error says so, and the space is freed."""
    target = small_disk / "bundle"
    bundles.write_bundle(target)
    before, filler = bundles.tree(target), small_disk / "filler"
    available = os.statvfs(small_disk).f_bavail * 4096
    filler.write_bytes(bytes(available - free))
    with pytest.raises(OutputError, match="No space left") as caught, translate_write_errors(target):
        bundles.write_bundle(target, seed=1)
    assert "Free some space" in caught.value.remedy
    assert bundles.tree(target) == before
    filler.unlink()
    only(target)


@pytest.mark.parametrize("suffix", [".partial", ".replaced"])
@pytest.mark.parametrize("what", ["folder", "link", "link to an empty folder", "file", "forged plan"])
def test_what_only_has_the_name_of_a_leftover_stays(target: Path, tmp_path: Path, suffix: str, what: str) -> None:
    """Somebody's folder, a link to one, or a file, called as a killed writer's; an archive's plan is not used."""
    home = tmp_path / "home"
    (home / "Documents").mkdir(parents=True)
    (home / "Documents/thesis.txt").write_text("mine")
    (home / "empty").mkdir()
    place = target.with_name(f".{target.name}.0123abcd{suffix}")
    if what == "folder":
        shutil.copytree(home, place)
    elif what == "file":
        place.write_text("mine")
    elif what == "forged plan":
        (place / ".resume").mkdir(parents=True)
        (place / ".resume/plan").write_text("a plan")
        (place / ".resume/changed").write_text("0")
        (place / STORE).symlink_to(home / "Documents/thesis.txt")
        (place / ".resume/journal").symlink_to(home / "Documents/thesis.txt")
    else:
        place.symlink_to(home / "empty" if "empty" in what else home)
    before = bundles.tree(tmp_path)
    said: list[str] = []
    with BundleWriter(target, "a plan", lambda what, *_: said.append(what)) as writer:
        bundles.fill(writer)
        assert not any(path.is_symlink() for path in writer.root.rglob("*"))
    assert said == []
    after = bundles.tree(tmp_path)
    assert {**after, **before} == before if what == "forged plan" else after == before
    assert os.path.lexists(place) == (what != "forged plan" or suffix == ".replaced")
    assert (home / "empty").is_dir()


# Other processes

CHILD = """
import sys
from pathlib import Path
from tests import bundles
from pocketmoe.bundle import writer
two_steps, stop_after = sys.argv[2] == "two steps", sys.argv[3]
if two_steps:
    writer.exchange = lambda a, b: False

def pause(step):
    if step == stop_after:
        print("here", flush=True)
        sys.stdin.read()

bundles.write_bundle(Path(sys.argv[1]), seed=1, on_step=pause)
"""


def start_writer(target: Path, stop_after: str, how: str = "exchange") -> subprocess.Popen[bytes]:
    """Another process that publishes seed 1 to the target, waiting after the named step until its stdin closes."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(target), how, stop_after],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout
    assert child.stdout.readline() == b"here\n"
    return child


@pytest.mark.parametrize(
    ("stop_after", "how", "survivor"),
    [
        ("locked", "exchange", 0),
        ("synced", "exchange", 0),
        ("in place", "exchange", 1),
        ("in place", "two steps", 1),
    ],
)
def test_a_killed_writer_leaves_a_whole_bundle(target: Path, stop_after: str, how: str, survivor: int) -> None:
    """After kill -9 at any step, one of the two bundles is there, whole; the next writer removes the leftovers."""
    child = start_writer(target, stop_after, how)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    use(target)
    assert Bundle.open(target).check_file(DENSE).read_bytes() == bytes([survivor]) * 128
    bundles.write_bundle(target, seed=2)
    only(target)


def test_a_kill_between_two_steps_is_mended_by_the_next_writer(target: Path) -> None:
    """Without an atomic exchange the old bundle may lie aside after kill -9: the next writer puts it back."""
    before = bundles.tree(target)
    child = start_writer(target, "moved aside", "two steps")
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not target.exists()
    with BundleWriter(target):
        assert bundles.tree(target) == before
    only(target)


def test_a_living_writers_directory_is_not_a_leftover(target: Path) -> None:
    """A second writer to the same target leaves the first one's directory alone; whoever is last wins."""
    child = start_writer(target, "locked")
    bundles.write_bundle(target, seed=2)
    child.communicate()
    assert child.returncode == 0
    assert Bundle.open(target).check_file(DENSE).read_bytes() == bytes([1]) * 128
    only(target)


def test_readers_see_one_whole_bundle_while_others_are_published(target: Path) -> None:
    """Opening during publications always works, and an open store keeps reading the bundle that it was opened on."""
    stop, failures = threading.Event(), []
    store = Bundle.open(target).open_store()

    def read() -> None:
        while not stop.is_set():
            try:
                Bundle.open(target)
            except Exception as error:  # noqa: BLE001 - the test's subject
                failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for seed in range(1, 40):
        bundles.write_bundle(target, seed)
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures
    with store:
        assert bytes(store.read(ExpertId(1, 0))) == bundles.record_of(ExpertId(1, 0))
    shutil.rmtree(target)
