"""A bundle by its hub id: looked at, downloaded at one commit, checked against its seals before it is used.

Nothing is downloaded but what the bundle's manifest names, and that only where the repository has it in the size that
the manifest says; whatever else a repository holds stays there.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from pocketmoe.bundle.manifest import MANIFEST, MAX_MANIFEST_BYTES, Manifest, read_manifest
from pocketmoe.bundle.packed import PACKED
from pocketmoe.bundle.partial import RESUME
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import translate_write_errors
from pocketmoe.bundle.writer import BundleWriter, refuse_to_replace
from pocketmoe.errors import BadInput, DamagedFile, OutputError
from pocketmoe.hub.client import LIBRARY, Reference, bar, check_space, errors_of, quiet, require_hub, statuses
from pocketmoe.sizes import in_words

_TELL = "Tell its publisher, or name another revision."


@dataclass(frozen=True)
class Access:
    """How the hub is asked. None: as huggingface_hub's own settings say."""

    token: str | bool | None = None
    cache_dir: Path | None = None
    local_files_only: bool = False
    force_download: bool = False


@dataclass(frozen=True)
class _Listing:
    """What a repository holds at a commit."""

    commit: str
    sizes: dict[str, int]
    cached: dict[str, Path]  # what of it the hub's cache has


def reference_of(name: str) -> Reference | None:
    """The hub id that a name is; None where it is a path that exists, or not written like an id.

    Raises BadInput for a revision of a local path.
    """
    if os.path.lexists(name):
        return None
    reference = Reference.parse(name)
    if reference and reference.revision and os.path.lexists(reference.repository):
        raise BadInput(
            f"{reference.repository} is a local path, which has no revisions", f"Leave out @{reference.revision}."
        )
    return reference


def find_bundle(name: str, access: Access | None = None, progress: Progress = no_progress) -> Path:
    """The directory of a bundle: `name` itself where it exists, or is no hub id; else what `pull` gives.

    Raises BadInput, DamagedFile, OutputError.
    """
    reference = reference_of(name)
    return Path(name) if reference is None else pull(reference, access, progress)


def pull(
    reference: Reference, access: Access | None = None, progress: Progress = no_progress, *, check: bool = False
) -> Path:
    """The directory of a hub's bundle in the hub's cache, downloaded as far as it is not there.

    What was downloaded has the hashes of its manifest, or is removed again; `check`: so has what was there before.
    Raises BadInput, DamagedFile, OutputError.
    """
    require_hub(reference.repository)
    access = access or Access()
    with errors_of(reference.repository, reference.revision), quiet():
        listing = _look(reference, access)
        if listing is None:
            root, anew = _from_cache(reference, access), False
        else:
            root, anew = _into_cache(reference, listing, access, progress)
    if anew or check:
        _refuse_damaged(Bundle.open(root), reference, progress)
    return root


def pull_to(
    reference: Reference, target: Path, access: Access | None = None, progress: Progress = no_progress
) -> Bundle:
    """Publish a hub's bundle as a directory of its own, whole or not at all.

    A download that breaks off is gone on with by the next call for the same target and commit. Raises BadInput,
    DamagedFile, OutputError.
    """
    require_hub(reference.repository)
    access = access or Access()
    refuse_to_replace(Path(os.path.abspath(target)))  # noqa: PTH100 - as BundleWriter has it
    with errors_of(reference.repository, reference.revision), quiet():
        listing = _look(reference, access)
    if listing is None or listing.sizes.keys() == listing.cached.keys():
        source = Bundle.open(pull(reference, access, progress, check=True))
        with BundleWriter(target) as writer, translate_write_errors(target):
            _copy(source, writer.root)
            return writer.publish_sealed()
    plan = f"pull {reference.repository} {listing.commit}"
    with BundleWriter(target, plan, progress, keeps=_is_gone_on_with) as writer:
        folder = writer.root / RESUME / "download"
        with errors_of(reference.repository, reference.revision), quiet():
            manifest = _into_folder(reference, listing, folder, access, progress)
        with translate_write_errors(target):
            for name in (*manifest.files, MANIFEST):
                (writer.root / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).rename(writer.root / name)
        _refuse_damaged(Bundle.open(writer.root), reference, progress)
        return writer.publish_sealed()


def find_description(reference: Reference, access: Access | None = None) -> Path:
    """The manifest.json of a hub's bundle, or the config.json of a checkpoint, alone, in the hub's cache.

    Raises BadInput, OutputError.
    """
    import huggingface_hub
    from huggingface_hub import errors

    require_hub(reference.repository)
    access = access or Access()
    download = cast("Callable[..., str]", huggingface_hub.hf_hub_download)
    options: dict[str, Any] = {"revision": reference.revision, "library_name": LIBRARY, "token": access.token}
    with errors_of(reference.repository, reference.revision), quiet():
        try:
            return Path(download(reference.repository, MANIFEST, cache_dir=access.cache_dir, **options))
        except errors.EntryNotFoundError:
            return Path(download(reference.repository, "config.json", cache_dir=access.cache_dir, **options))


def _is_gone_on_with(error: BaseException) -> bool:
    """Whether what was downloaded before an error is of use to the next call: not where the disk is full, or a file
    is not what it should be."""
    return not isinstance(error, OutputError | DamagedFile)


def _snapshot(reference: Reference, access: Access, **options: Any) -> Any:
    """huggingface_hub's snapshot_download, whose `dry_run` decides what it gives."""
    import huggingface_hub

    download = cast("Callable[..., Any]", huggingface_hub.snapshot_download)
    given = {"revision": reference.revision, "library_name": LIBRARY, "token": access.token, "tqdm_class": bar()}
    return download(reference.repository, **{**given, "cache_dir": access.cache_dir, **options})


def _look(reference: Reference, access: Access) -> _Listing | None:
    """What the repository holds; None where the hub cannot be reached."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE or access.local_files_only:
        return None
    try:
        found = _snapshot(reference, access, dry_run=True, force_download=access.force_download)
    except errors.DryRunError as error:
        if statuses(error):
            raise
        return None
    sizes = {file.filename: file.file_size or 0 for file in found}
    if MANIFEST not in sizes:
        raise BadInput(
            f"{reference} is no PocketMoE bundle: it has no {MANIFEST}",
            f"To make one of a checkpoint: pocketmoe export {reference.repository} -o BUNDLE.",
        )
    if sizes[MANIFEST] > MAX_MANIFEST_BYTES:
        raise DamagedFile(f"{reference}/{MANIFEST}", f"has more than {MAX_MANIFEST_BYTES} bytes", _TELL)
    cached = {file.filename: Path(file.local_path) for file in found if not file.will_download}
    return _Listing(found[0].commit_hash, sizes, cached)


def _from_cache(reference: Reference, access: Access) -> Path:
    """Where the cache has a bundle. Raises what huggingface_hub raises where it has none."""
    return Path(_snapshot(reference, access, local_files_only=True, allow_patterns=[MANIFEST]))


def _into_cache(reference: Reference, listing: _Listing, access: Access, progress: Progress) -> tuple[Path, bool]:
    """Where the cache has the bundle now, and whether anything of it was downloaded."""
    from huggingface_hub import constants

    place = access.cache_dir or Path(constants.HF_HUB_CACHE)
    at_commit = {"revision": listing.commit, "force_download": access.force_download}
    where = listing.cached.get(MANIFEST)
    root = (
        where.parent
        if where and where.exists()
        else Path(_snapshot(reference, access, **at_commit, allow_patterns=[MANIFEST]))
    )
    manifest = _checked(read_manifest(root / MANIFEST), reference, listing)
    absent = [name for name in manifest.files if not (root / name).exists()]  # what another commit has is linked to
    missing = [name for name in manifest.files if name not in listing.cached]
    if missing or absent:
        check_space(reference.repository, sum(listing.sizes[name] for name in missing), place)
        _say(reference, listing, missing, progress)
        shown = bar(progress, f"downloading {reference.repository}")
        _snapshot(reference, access, **at_commit, allow_patterns=_exactly([*missing, *absent]), tqdm_class=shown)
    return root, bool(missing)


def _into_folder(reference: Reference, listing: _Listing, folder: Path, access: Access, progress: Progress) -> Manifest:
    """Download a bundle into a folder that may have some of it; what that has is not asked for again."""
    options = {"revision": listing.commit, "local_dir": folder}
    _snapshot(reference, access, **options, allow_patterns=[MANIFEST])
    manifest = _checked(read_manifest(folder / MANIFEST), reference, listing)
    missing = [name for name in manifest.files if not (folder / name).exists()]
    check_space(reference.repository, sum(listing.sizes[name] for name in missing), folder)
    _say(reference, listing, missing, progress)
    shown = bar(progress, f"downloading {reference.repository}")
    _snapshot(reference, access, **options, allow_patterns=_exactly(missing), tqdm_class=shown)
    return manifest


def _say(reference: Reference, listing: _Listing, names: list[str], progress: Progress) -> None:
    from huggingface_hub import constants

    if not names:
        return
    size = in_words(sum(listing.sizes[name] for name in names))
    where = f"{constants.ENDPOINT}/{reference.repository} at {listing.commit[:12]}"
    progress(f"downloading {where}: {len(names)} files, {size}", 0, 0)


def _exactly(names: list[str]) -> list[str]:
    """Patterns that match these names alone."""
    return [glob.escape(name) for name in names]


def _checked(manifest: Manifest, reference: Reference, listing: _Listing) -> Manifest:
    """A manifest whose files the repository has, in their sizes, under names that a bundle's own files have."""
    for name, entry in manifest.files.items():
        parts = PurePosixPath(name).parts
        place = f"{reference}/{MANIFEST}"
        if parts[0] == PACKED or name == MANIFEST or any(part.startswith(".") for part in parts):
            raise DamagedFile(place, f"names {name!r}, which is no file of a bundle", _TELL)
        if name not in listing.sizes:
            raise DamagedFile(place, f"names {name!r}, which the repository does not have", _TELL)
        if listing.sizes[name] != entry.nbytes:
            has = listing.sizes[name]
            raise DamagedFile(place, f"says that {name} has {entry.nbytes} bytes, the repository has {has}", _TELL)
    return manifest


def _refuse_damaged(bundle: Bundle, reference: Reference, progress: Progress) -> None:
    """Check every file's hash; those that differ are removed, from the hub's cache too. Raises DamagedFile."""
    damaged: list[str] = []
    for done, name in enumerate(bundle.manifest.files):
        progress(f"checking {reference.repository}", done, len(bundle.manifest.files))
        try:
            bundle.check_file(name)
        except DamagedFile:
            damaged.append(name)
    for name in damaged:
        path = bundle.root / name
        blob = Path(os.path.realpath(path))
        with translate_write_errors(path):
            path.unlink()
            if blob != path:
                blob.unlink(missing_ok=True)
    if damaged:
        raise DamagedFile(
            f"{reference}/{damaged[0]}",
            f"does not have the hash that its manifest says ({len(damaged)} of {len(bundle.manifest.files)} files)",
            "It was removed: run the same command again, and if that does not help tell its publisher.",
        )
    bundle.open_store().close()


def _copy(source: Bundle, root: Path) -> None:
    """The files of a bundle, its manifest among them, as they are. Raises OSError."""
    for name in (*source.manifest.files, MANIFEST):
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.root / name, target)
