"""Which backend runs a bundle's experts here: slots where they can be had, else sessions, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pocketmoe.bundle.progress import Progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import StoreReader
from pocketmoe.errors import BadInput
from pocketmoe.runtime.backends.protocol import Backend
from pocketmoe.runtime.backends.sessions import SessionBackend
from pocketmoe.runtime.backends.slots import SlotsUnavailable, open_slots

BackendName = Literal["auto", "slots", "sessions"]
BackendMaker = Callable[[Bundle, StoreReader], Backend]


def open_backend(
    wanted: BackendName | BackendMaker, bundle: Bundle, store: StoreReader, available_bytes: int, progress: Progress
) -> tuple[Backend, str]:
    """The backend, and why it is not slots, or why there are not as many as would be good."""
    if wanted == "sessions":
        wanted = SessionBackend
    if not isinstance(wanted, str):
        return wanted(bundle, store), "asked for"
    try:
        backend = open_slots(bundle, store, available_bytes, progress)
        return backend, backend.limited
    except SlotsUnavailable as reason:
        if wanted == "slots":
            raise BadInput(f"slots cannot be used here: {reason}", "Leave --backend out to use sessions.") from reason
        progress(f"experts run in sessions, which is slower: {reason}", 0, 0)
        return SessionBackend(bundle, store), str(reason)
