"""The entry of `export`: find the checkpoint, refuse at once what can be refused, convert it, pack it if wanted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import require
from pocketmoe.export import early_checks
from pocketmoe.export.checkpoint import hub
from pocketmoe.quantize.schemes import FLOAT32, KEEP, find_scheme
from pocketmoe.runtime.backends.pack import pack

if TYPE_CHECKING:
    from pocketmoe.quantize.workers import Workers

_COPIED = (None, KEEP, FLOAT32)


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """How to export. `scheme`: a name of `schemes`, `keep` or `float32`; None: `keep` where there are codes, or else
    `float32`.

    `revision`: of a hub id. `trust_remote_code`: run Python code that comes with the checkpoint, where transformers
    lacks the model. `adapter`: a LoRA adapter to merge, by directory or hub id. `packed`: keep the experts only as this
    machine's CPU wants them. Raises ValueError for workers where nothing is rounded.
    """

    scheme: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    adapter: str | None = None
    workers: Workers = None
    packed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheme", self.scheme.lower() if self.scheme else None)
        if self.workers and self.scheme in _COPIED:
            raise ValueError("--workers is for a --scheme that rounds: without it experts are only copied.")


def export(checkpoint: str, output: Path, request: ExportRequest, progress: Progress = no_progress) -> Bundle:
    """Turn a checkpoint, by directory, GGUF file or hub id, into a bundle at `output`.

    What names, headers and config.json say is refused before torch is imported or weights are downloaded. What a killed
    call left is gone on with. Raises BadInput, UnsupportedModel, DamagedFile, OutputError, GateFailed; then what was at
    `output` before is untouched.
    """
    require("torch", "export")
    progress("looking at the checkpoint", 0, 1)
    if request.scheme is not None and request.scheme not in _COPIED:
        find_scheme(request.scheme)
    early_checks.check_target(output)
    early_checks.check_hub(checkpoint, request.revision)
    code = request.trust_remote_code
    source = hub.find(checkpoint, revision=request.revision, code=code, progress=progress)
    adapter = None if request.adapter is None else hub.find(request.adapter, progress=progress)
    if not source.is_file():  # a GGUF file says it all by itself
        early_checks.check_source(source, code, adapter is not None)
    from pocketmoe.quantize.apply import for_export

    quantizer, keeper = for_export(request.scheme, request.workers)
    from pocketmoe.export.convert import export_checkpoint  # torch takes seconds

    bundle = export_checkpoint(
        source,
        output,
        quantizer=quantizer,
        keeper=keeper,
        must_keep=request.scheme == KEEP,
        run_its_code=code,
        adapter=adapter,
        progress=progress,
    )
    if not request.packed:
        return bundle
    pack(bundle, in_place=True, progress=progress)
    return Bundle.open(bundle.root)
