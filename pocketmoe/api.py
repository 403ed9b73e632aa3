"""What Python users call: `pocketmoe.load`, and the commands' work as functions.

    import pocketmoe

    with pocketmoe.load("SMALL", memory="4GB") as model:
        print(model.generate("Why is the sky blue?").text)

Everything raises the classes of `pocketmoe.errors`; nothing prints. What is heavy is imported when it is used.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pocketmoe.bundle.packed import PackedPlace
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.errors import BadInput, require
from pocketmoe.runtime.conversation import Chat, Generation, Stream
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.model import LoadRequest, Model
from pocketmoe.runtime.prefix_cache.kept import PrefixCacheRequest
from pocketmoe.sizes import parse_size

if TYPE_CHECKING:
    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.pipeline.evaluate import Evaluation
    from pocketmoe.profiles.plan.plan import PlanReport
    from pocketmoe.runtime.backends.choice import BackendName
    from pocketmoe.runtime.paging.prefetch import PrefetchMode

__all__ = ["Chat", "Evaluation", "Generation", "Model", "Stream", "evaluate", "export", "load", "plan", "quantize"]

PathLike = str | os.PathLike[str]


def load(
    bundle: PathLike,
    *,
    memory: str | int | None = None,
    context: int | None = None,
    threads: int | None = None,
    backend: BackendName = "auto",
    prefetch: PrefetchMode = "auto",
    drop_cold: float = 0.0,
    prefer_cached: float = 0.0,
    sequences: int = 1,
    structured: bool | None = None,
    prefix_cache: PathLike | None = None,
    prefix_cache_size: str | int = "2GB",
    packed_dir: PathLike | None = None,
    progress: Progress = no_progress,
) -> Model:
    """A bundle, ready to answer. Use it in a `with` block, or close it.

    `bundle`: its directory or, as a string, the hub id of one (`ORG/NAME`, `ORG/NAME@REVISION`), which is downloaded
    where no directory has that name and the hub's cache does not have it; a `Path` is never an id. So it is in the
    other functions. `memory`: for the whole process: "800MB", "1.5GiB", bytes, or "40%": room for 40% of the experts;
    None: 80% of what is free. `context`: the longest text in tokens, prompt and answer together; None: 4096, or the
    model's own if that is less. `sequences`: how many texts are computed at once for callers in threads, and kept for
    what begins alike; each takes memory for `context` tokens. `prefix_cache`: a directory in which what prompts compute
    is kept, for texts that begin alike, also after a restart; `prefix_cache_size`: the most that it may take there. It
    reveals the texts. `packed_dir`: where experts go as this CPU wants them; None: into the bundle. `structured`:
    whether to set memory aside for answers that are held to a schema, an expression or a grammar; None: where the extra
    `grammar` is installed. `progress(what, done, total)` is told what takes long. The other options are those of
    `pocketmoe run`.
    Raises BadInput, DamagedFile, OutputError, BudgetTooSmall or OverBudget.
    """
    kept = None
    if prefix_cache is not None:
        kept = PrefixCacheRequest(Path(prefix_cache), _bytes(prefix_cache_size))
    request = LoadRequest(
        memory=_memory(memory),
        context=context,
        threads=threads,
        backend=backend,
        prefetch=prefetch,
        drop_cold=drop_cold,
        prefer_cached=prefer_cached,
        sequences=sequences,
        structured=structured,
        prefix_cache=kept,
        packed=PackedPlace(Path(packed_dir), always=True) if packed_dir is not None else None,
    )
    return Model(_bundle(bundle, progress), request, progress)


def export(
    checkpoint: str,
    output: PathLike,
    *,
    scheme: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    adapter: str | None = None,
    workers: int | str | None = None,
    packed: bool = False,
    progress: Progress = no_progress,
) -> Bundle:
    """Turn a checkpoint, a directory or a hub id, into a bundle; the options are those of `pocketmoe export`.

    Needs pocketmoe[export]. Raises BadInput, UnsupportedModel, DamagedFile or OutputError.
    """
    require("torch", "export")
    from pocketmoe.pipeline import export as pipeline

    with _meant("export"):
        request = pipeline.ExportRequest(
            scheme=scheme,
            revision=revision,
            trust_remote_code=trust_remote_code,
            adapter=adapter,
            workers=workers,
            packed=packed,
        )
    return pipeline.export(checkpoint, Path(output), request, progress)


def evaluate(
    bundle: PathLike,
    text: PathLike | None = None,
    *,
    reference: PathLike | None = None,
    gate: PathLike | None = None,
    free: int = 16,
    ood: Sequence[str] = (),
    pairs: PathLike | None = None,
    tasks: Sequence[str] = (),
    task_dir: PathLike | None = None,
    limit: int | None = None,
    resume: PathLike | None = None,
    output: PathLike | None = None,
    memory: str | int | None = None,
    max_tokens: int | None = None,
    drop_cold: float = 0.0,
    prefer_cached: float = 0.0,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Say how well a bundle predicts a text, a file or a directory of *.txt; the options are those of `pocketmoe eval`.

    `reference`: a bundle, or a checkpoint's directory, which transformers runs (extra `export`). `tasks`: names of
    lm-evaluation-harness (extra `lm-eval`), `text` may be None then, and `report` is; the harness downloads data of its
    own tasks unless the environment says HF_HUB_OFFLINE=1. `output`: a directory for record, page and model card. A
    gate that does not hold raises nothing here: see `passed`.
    Raises BadInput, DamagedFile, BudgetTooSmall or OutputError.
    """
    from pocketmoe.harness.tasks import TasksRequest
    from pocketmoe.pipeline import evaluate as pipeline
    from pocketmoe.profiles.quality.evaluation import EvalRequest

    by = EvalRequest(
        text=_path(text),
        reference=None if reference is None else _bundle(reference, progress),
        gate=_path(gate),
        free_prompts=free,
        out_of_distribution=tuple(ood),
        journal=_path(resume),
        memory=_memory(memory),
        max_tokens=max_tokens,
        drop_cold=drop_cold,
        prefer_cached=prefer_cached,
        threads=threads,
        pairs=_path(pairs),
    )
    asked = TasksRequest(tasks=[*tasks], folder=_path(task_dir), limit=limit) if tasks else None
    with _meant("eval"):
        request = pipeline.EvaluateRequest(by=by, tasks=asked, output=_path(output))
    return pipeline.evaluate(_bundle(bundle, progress), request, progress)


def quantize(
    bundle: PathLike,
    output: PathLike,
    *,
    scheme: str = "int4",
    formats: Mapping[str, str] | None = None,
    size_budget: str | None = None,
    fetch_budget: str | None = None,
    rounding: str | None = None,
    kv: Literal["float32", "int8"] = "float32",
    calibration: PathLike | None = None,
    calibration_tokens: int = 16384,
    workers: int | str | None = None,
    packed: bool = False,
    progress: Progress = no_progress,
) -> Bundle:
    """Write a bundle with smaller weights, and caches if wanted; the options are those of `pocketmoe quantize`.

    Needs pocketmoe[export]. Raises BadInput, also for options that do not go together, and what
    `pipeline.quantize` raises.
    """
    require("onnx_ir", "quantize")
    from pocketmoe.pipeline import quantize as pipeline
    from pocketmoe.quantize.algorithms.formats import parse_format
    from pocketmoe.quantize.plan import SizeBudget

    with _meant("quantize"):
        request = pipeline.QuantizeRequest(
            scheme=scheme,
            formats={name: parse_format(label) for name, label in (formats or {}).items()},
            size_budget=None if size_budget is None else SizeBudget.parse(size_budget),
            fetch_budget=None if fetch_budget is None else parse_size(fetch_budget),
            rounding=rounding,
            kv=kv,
            calibration=_path(calibration),
            calibration_tokens=calibration_tokens,
            workers=workers,
        )
    quantized = pipeline.quantize(_bundle(bundle, progress), Path(output), request, progress).bundle
    return _packed(quantized, progress) if packed else quantized


def plan(
    model: PathLike,
    *,
    device: str,
    target_tokens_per_s: float | None = None,
    context: int = 2048,
    prompt_tokens: int = 128,
    reserve: int | None = None,
    sequences: int = 1,
    devices: PathLike | None = None,
    progress: Progress = no_progress,
) -> PlanReport:
    """Which scheme and budget of a checkpoint or bundle fit a device; the options are those of `pocketmoe plan`.

    `recommended` is None where nothing fits. Raises BadInput or DamagedFile.
    """
    from importlib.util import find_spec

    from pocketmoe.profiles.plan.planning import PlanRequest, make_plan

    more = None if devices is None else Path(devices)
    request = PlanRequest(
        _described(model), device, target_tokens_per_s, context, prompt_tokens, reserve, more, sequences=sequences
    )
    counts = find_spec("transformers") and find_spec("torch")
    return make_plan(request, _count if counts else None, progress)


def _count(config_json: Path) -> dict[str, int]:
    from pocketmoe.export.checkpoint.counting import count_parameters

    return count_parameters(config_json)


def _memory(memory: str | int | None) -> MemoryRequest | None:
    """Raises BadInput for what is no size."""
    if isinstance(memory, int):
        memory = f"{memory}B"
    try:
        return None if memory is None else MemoryRequest.parse(memory)
    except ValueError as error:
        raise BadInput(f"{error}", 'Say memory="800MB", "1.5GiB", a number of bytes, or "40%".') from error


def _bytes(size: str | int) -> int:
    """Raises BadInput for what is no size."""
    try:
        return size if isinstance(size, int) else parse_size(size)
    except ValueError as error:
        raise BadInput(f"{error}", 'Say prefix_cache_size="2GB", or a number of bytes.') from error


def _bundle(bundle: PathLike, progress: Progress) -> Path:
    """A bundle's directory. Raises what `find_bundle` raises."""
    if not isinstance(bundle, str):
        return Path(bundle)
    from pocketmoe.hub.pull import find_bundle

    return find_bundle(bundle, progress=progress)


def _described(model: PathLike) -> Path:
    """Where a model is, or what says what it is. Raises what `find_description` raises."""
    from pocketmoe.hub.pull import find_description, reference_of

    reference = reference_of(model) if isinstance(model, str) else None
    return Path(model) if reference is None else find_description(reference)


@contextlib.contextmanager
def _meant(command: str) -> Generator[None]:
    """A request that cannot be meant (ValueError) is a BadInput."""
    try:
        yield
    except ValueError as error:
        raise BadInput(f"{error}".rstrip("."), f"See `pocketmoe {command} --help`.") from error


def _path(path: PathLike | None) -> Path | None:
    return None if path is None else Path(path)


def _packed(bundle: Bundle, progress: Progress) -> Bundle:
    from pocketmoe.runtime.backends.pack import pack

    pack(bundle, in_place=True, progress=progress)
    return Bundle.open(bundle.root)
