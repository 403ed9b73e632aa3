"""Where `from_pretrained` finds a bundle: on disk, on the hub, or in a checkpoint of which one is made first."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from pocketmoe import api
from pocketmoe.bundle.manifest import MANIFEST
from pocketmoe.bundle.progress import Progress
from pocketmoe.errors import BadInput
from pocketmoe.hub.client import Reference
from pocketmoe.hub.pull import Access, pull, reference_of
from pocketmoe.runtime.backends.choice import BackendName
from pocketmoe.runtime.paging.prefetch import PrefetchMode

PathLike = str | os.PathLike[str]
Folder = tempfile.TemporaryDirectory[str]


class LoadOptions(TypedDict, total=False):
    """Those of `pocketmoe.load` that a model for transformers takes."""

    memory: str | int | None
    context: int | None
    threads: int | None
    backend: BackendName
    prefetch: PrefetchMode
    drop_cold: float
    prefer_cached: float
    sequences: int  # how many rows a batch may have
    prefix_cache: PathLike | None
    prefix_cache_size: str | int


def export_first(
    checkpoint: str, output: PathLike | None, options: Mapping[str, Any], progress: Progress
) -> tuple[Path, Folder | None]:
    """Make a bundle of a checkpoint; without `output` in a folder that is the caller's to remove.

    `options`: those of `pocketmoe.export`, which raises what this raises; BadInput for a bundle.
    """
    if (Path(checkpoint) / MANIFEST).is_file():
        raise BadInput(
            f"{checkpoint} is a bundle already", "Leave out export=True; pocketmoe quantize makes it smaller."
        )
    folder = None
    if output is None:
        folder = tempfile.TemporaryDirectory(prefix="pocketmoe-")
        output = Path(folder.name) / "bundle"
    try:
        return api.export(checkpoint, output, **options, progress=progress).root, folder
    except BaseException:
        if folder is not None:
            folder.cleanup()
        raise


def find_bundle(place: PathLike, revision: str | None, access: Access, progress: Progress) -> Path:
    """Where a bundle is; one of the hub is downloaded where it has to be. Raises what `pull` raises."""
    reference = reference_of(place) if isinstance(place, str) else None
    if reference is None:
        if revision is not None:
            raise BadInput(f"{place} is a local path, which has no revisions", "Leave out revision.")
        return Path(place)
    if revision is not None:
        reference = Reference(reference.repository, revision)
    return pull(reference, access, progress)
