"""Experts packed for this machine, beside the published ones or in their place: what `pocketmoe pack` does."""

from __future__ import annotations

from pathlib import Path

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput
from pocketmoe.runtime.backends.pack_in_place import pack_in_place, unpack_in_place
from pocketmoe.runtime.backends.packing import open_packed, packed_folder
from pocketmoe.runtime.backends.packing import pack as pack_beside
from pocketmoe.runtime.backends.slots import SlotsUnavailable, memory_scratch


def pack(bundle: Bundle, *, in_place: bool = False, progress: Progress = no_progress) -> Path:
    """Pack a bundle's experts, where that was not done; the folder they are in.

    `in_place`: the published ones are given up as they are packed. Killed, it goes on when it is called again. Raises
    BadInput where nothing can be packed here, what packing raises, DamagedFile and OutputError.
    """
    try:
        with memory_scratch() as scratch:
            if in_place:
                pack_in_place(bundle, scratch, progress)
            else:
                (open_packed(bundle) or pack_beside(bundle, scratch, progress)).close()
    except SlotsUnavailable as error:
        raise BadInput(f"experts cannot be packed here: {error}", "Runs without packed experts are slower.") from error
    return packed_folder(bundle)


def unpack(bundle: Bundle, progress: Progress = no_progress) -> Path:
    """Have the experts as they were published again, on whatever machine; the bundle's folder."""
    unpack_in_place(bundle, progress)
    return bundle.root
