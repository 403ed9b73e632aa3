"""Packs experts of one kind, one at a time, as ONNX Runtime lays their weights out for this CPU (`packing`)."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pocketmoe.bundle.store import PAGE, padded
from pocketmoe.ort import Rows, Session, session_options
from pocketmoe.runtime.backends.onnx_wire import Span, external_spans, with_integers_inline

DATA = "slot.bin"  # the name under which a saved model looks for its data
_ROWS_TRIED = (1, 2, 5, 16, 40)


class Pages(NamedTuple):
    """A page-aligned stretch of a data file, in bytes."""

    offset: int
    nbytes: int


class Packer:
    """Packs experts of one kind, and holds them to the layout of the first."""

    def __init__(self, graph: Path, scratch: Path) -> None:
        self._graph, self._path = graph.read_bytes(), graph
        self._scratch = scratch
        self._spans: list[Span] = []
        self.model = b""
        self.live: tuple[Pages, ...] = ()

    def pack(self, record: memoryview) -> bytes:
        """The data file of the expert whose record this is, padded to whole pages.

        The first call sets the layout; when it has ended, others may run at once.
        """
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            return self._pack(record, Path(folder))

    def pack_live(self, record: memoryview) -> bytes:
        """The live pages of that data file, which are all that is kept of an expert. Not for the first call."""
        data = self.pack(record)
        return b"".join(data[pages.offset : pages.offset + pages.nbytes] for pages in self.live)

    def go_on(self, model: bytes, live: Sequence[Pages]) -> None:
        """Hold experts to the layout that an earlier run has found."""
        self.model, self._spans, self.live = model, external_spans(model), tuple(live)

    def _pack(self, record: memoryview, folder: Path) -> bytes:
        (folder / "record").write_bytes(record)
        options = session_options(
            threads=1,
            session__model_external_initializers_file_folder_path=str(folder),
            session__save_external_prepacked_constant_initializers="1",
            session__optimized_model_external_initializers_file_name=DATA,
            session__optimized_model_external_initializers_min_size_in_bytes="0",
        )
        saved = folder / "saved.onnx"
        options.optimized_model_filepath = str(saved)
        Rows(Session(self._graph, options, self._path))
        data = (folder / DATA).read_bytes()
        model = with_integers_inline(saved.read_bytes(), data)
        spans = external_spans(model)
        if not self._spans:
            self.model, self._spans = model, spans
            self.live = live_pages(used_spans(model, data, spans, folder, self._path))
        elif spans != self._spans:
            raise ValueError("two experts of one kind were packed differently")
        return data.ljust(padded(len(data)), b"\0")


def used_spans(model: bytes, data: bytes, spans: Sequence[Span], folder: Path, graph: Path) -> list[Span]:
    """The spans that a session computes with.

    At accuracy level 4, kernels that fold scales and zero points into the packed weights never look at the plain ones,
    a tenth of the bytes. Which kernels do is ONNX Runtime's business, so it is tried: with noise in their place, the
    results of every kernel (one row, few, many) must not change by a bit.
    """
    plain = [span for span in spans if not span.packed]
    if len(plain) == len(spans):
        return list(spans)
    (folder / DATA).write_bytes(data)
    options = session_options(threads=1, session__model_external_initializers_file_folder_path=str(folder))
    expert = Rows(Session(model, options, graph))
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((rows, expert.width), np.float32) for rows in _ROWS_TRIED]
    before = [expert.run(x).copy() for x in xs]
    with open(folder / DATA, "r+b") as file, mmap.mmap(file.fileno(), len(data)) as mapping:
        for span in plain:
            mapping[span.offset : span.offset + span.nbytes] = rng.bytes(span.nbytes)
    after = [expert.run(x).copy() for x in xs]
    unused = all(np.array_equal(old, new) for old, new in zip(before, after, strict=True))
    return [span for span in spans if span.packed] if unused else list(spans)


def live_pages(spans: Sequence[Span]) -> tuple[Pages, ...]:
    """The whole pages that hold the spans, adjacent stretches merged, in file order."""
    stretches: list[Pages] = []
    for span in spans:
        start, end = span.offset // PAGE * PAGE, padded(span.offset + span.nbytes)
        if stretches and start <= stretches[-1].offset + stretches[-1].nbytes:
            first = stretches.pop()
            start, end = first.offset, max(end, first.offset + first.nbytes)
        stretches.append(Pages(start, end - start))
    return tuple(stretches)
