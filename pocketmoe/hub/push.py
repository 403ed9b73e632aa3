"""A bundle to a repository of the hub, in one commit: it is there whole, or as it was before.

Sent are the files that the manifest names, the manifest, and a README.md made of the model card. What else lies in the
bundle's directory, packed experts above all, stays where it is.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketmoe.bundle.in_place import in_place_folder, refuse_unfinished
from pocketmoe.bundle.manifest import MANIFEST, Manifest, read_manifest
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput, DamagedFile
from pocketmoe.hub.card import README, readme
from pocketmoe.hub.client import LIBRARY, Reference, errors_of, quiet, require_hub
from pocketmoe.sizes import in_words

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoFile

_COMMIT = re.compile(r"[0-9a-f]{40}")
_OF_ANY_REPOSITORY = re.compile(r"\.gitattributes|\.gitignore|README\.md|LICEN[CS]E.*", re.IGNORECASE)


@dataclass(frozen=True)
class Pushed:
    """Where a bundle is now."""

    url: str
    commit: str
    files: int
    nbytes: int
    private: bool


def push(
    bundle: Path,
    reference: Reference,
    *,
    private: bool = False,
    token: str | bool | None = None,
    shows_bars: bool = False,
    progress: Progress = no_progress,
) -> Pushed:
    """Upload a bundle; its repository, and the branch that the reference names, are made where they are not there.

    `private`: only those whom the owner lets in see it; one that is public already is refused then. `shows_bars`: on
    stderr, by huggingface_hub. Every byte is checked against the manifest before anything is sent. Raises BadInput,
    DamagedFile.
    """
    require_hub(reference.repository)
    if reference.revision and _COMMIT.fullmatch(reference.revision):
        raise BadInput(f"{reference.revision} is a commit, to which nothing can be added", "Name a branch.")
    opened = Bundle.open(bundle)
    refuse_unfinished(bundle)
    if in_place_folder(bundle) is not None:
        raise BadInput(
            f"{bundle} is packed in place: it holds its experts only as this machine wants them",
            f"Read them back first: pocketmoe pack {bundle} --undo.",
        )
    damaged = next(opened.verify(progress), None)
    if damaged:
        raise DamagedFile(bundle, f"is not pushed: {damaged}")
    with errors_of(reference.repository, reference.revision, "upload"), quiet(shows_bars):
        from huggingface_hub import HfApi

        return _push(HfApi(token=token, library_name=LIBRARY), opened, reference, private, progress)


def _push(api: HfApi, bundle: Bundle, reference: Reference, private: bool, progress: Progress) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repository, manifest = reference.repository, bundle.manifest
    info = _repository(api, reference, private)
    before = _files(api, repository, str(info.sha))
    stale = _replaced(api, reference, str(info.sha), before.keys(), manifest)
    operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in stale]
    operations.append(CommitOperationAdd(README, readme(bundle, reference).encode()))
    operations += [CommitOperationAdd(name, str(bundle.root / name)) for name in (*manifest.files, MANIFEST)]
    nbytes = sum(entry.nbytes for entry in manifest.files.values())
    kind = "private" if info.private else "public"
    progress(f"uploading to {api.endpoint}/{reference} ({kind}): {len(operations)} files, {in_words(nbytes)}", 0, 0)
    done = api.create_commit(
        repository,
        operations,
        commit_message=f"PocketMoE bundle {manifest.sha256[:12]}",
        revision=reference.revision,
        parent_commit=info.sha,
    )
    _refuse_incomplete(_files(api, repository, done.oid), manifest, reference)
    return Pushed(f"{api.endpoint}/{repository}", done.oid, len(manifest.files) + 2, nbytes, bool(info.private))


def _repository(api: HfApi, reference: Reference, private: bool) -> ModelInfo:
    """The repository at the branch that is pushed to, both made where they are not there."""
    from huggingface_hub import errors

    name, branch = reference.repository, reference.revision
    try:
        there = api.model_info(name)
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError:
        api.create_repo(name, private=private, exist_ok=True)
        there = api.model_info(name)
    if private and not there.private:
        raise BadInput(
            f"{name} exists and is public, so that what is pushed there is not private",
            "Make it private in its settings on the hub, name another, or leave out --private.",
        )
    if branch is None:
        return there
    api.create_branch(name, branch=branch, exist_ok=True)
    return api.model_info(name, revision=branch)


def _files(api: HfApi, repository: str, revision: str) -> dict[str, RepoFile]:
    from huggingface_hub.hf_api import RepoFile

    found = api.list_repo_tree(repository, recursive=True, revision=revision)
    return {file.path: file for file in found if isinstance(file, RepoFile)}


def _replaced(api: HfApi, reference: Reference, commit: str, names: Any, manifest: Manifest) -> list[str]:
    """Which files of a bundle that is there already go. Raises BadInput where something else is there."""
    if MANIFEST in names:
        with tempfile.TemporaryDirectory(prefix="pocketmoe-") as folder:
            old = api.hf_hub_download(reference.repository, MANIFEST, revision=commit, local_dir=folder)
            return sorted((read_manifest(Path(old)).files.keys() & names) - manifest.files.keys())
    others = sorted(name for name in names if not _OF_ANY_REPOSITORY.fullmatch(name))
    if others:
        raise BadInput(
            f"{reference} holds something else than a bundle: {others[0]}, in all {len(others)} files",
            "Name a repository of its own, or another branch by --revision.",
        )
    return []


def _refuse_incomplete(found: dict[str, RepoFile], manifest: Manifest, reference: Reference) -> None:
    """What the hub has now is what was sent, as far as it says: sizes, and SHA-256 of large files."""
    for name, entry in manifest.files.items():
        there = found.get(name)
        sha256 = entry.sha256 if there is None or there.lfs is None else there.lfs.sha256
        if there is None or there.size != entry.nbytes or sha256 != entry.sha256:
            raise BadInput(
                f"{reference} is not the bundle after all: the hub has not taken {name} as it is",
                "Look for a .gitignore there, and push again.",
            )
