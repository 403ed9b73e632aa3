"""A copy of a bundle in which some graphs are others: to look into it, or to measure what a change would do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from pocketmoe.bundle.manifest import Manifest
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import translate_write_errors
from pocketmoe.bundle.writer import BundleWriter


def write_with_graphs(bundle: Bundle, target: Path, graphs: Mapping[str, bytes], manifest: Manifest) -> Bundle:
    """Write `bundle` with these graphs, by file name, and this manifest; what is not changed is linked to.

    Raises DamagedFile, OutputError.
    """
    with BundleWriter(target) as writer, translate_write_errors(target):
        for name, entry in bundle.manifest.files.items():
            path = writer.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name in graphs:
                path.write_bytes(graphs[name])
            else:
                link_or_copy(bundle.path(name), path)
                writer.hashes[name] = entry.sha256
        return writer.publish(manifest)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file that is not going to change, or a copy on another file system."""
    try:
        os.link(source.resolve(), target)  # in the hub's cache it is a link, of which this would be another
    except OSError:
        shutil.copyfile(source, target)
