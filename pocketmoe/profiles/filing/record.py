"""What `eval -o DIR` files: eval.json and eval.html, and the bundle's model card with what the evaluation found.

The record says what is needed to repeat the evaluation and to tell whether somebody's files are those it is about:
seals of bundles, hashes of texts and of the gate file, options, versions, the machine. It holds none of the texts.
"""

from __future__ import annotations

import hashlib
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort

from pocketmoe import __version__
from pocketmoe.bundle.files import read_whole, write_whole
from pocketmoe.bundle.inspection import CARD, schemes_of, with_section
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import translate_write_errors
from pocketmoe.profiles.machine.doctor import read_cpu, read_memory
from pocketmoe.profiles.quality.evaluation import EvalRequest
from pocketmoe.profiles.quality.gate import Verdict
from pocketmoe.profiles.quality.models import ReferenceInfo
from pocketmoe.profiles.quality.report import QualityReport
from pocketmoe.profiles.quality.tasks import TaskFigure

RECORD, FORMAT = "eval.json", 1
_LARGEST_CARD = 16 << 20
_EVALUATION = "## Evaluation"


@dataclass(frozen=True)
class Evaluated:
    """A bundle as it was evaluated. `seal`: the SHA-256 of its manifest, which names the hash of every file."""

    path: str
    seal: str
    architecture: str
    source: str
    revision: str | None
    licence: str | None
    schemes: dict[str, str]
    steps: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class GateFile:
    """The limits that were asked for."""

    path: str
    sha256: str
    text: str


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation. `made_at`: UTC, ISO 8601. `options`: those of the command that decide the figures."""

    format: int
    made_at: str
    passed: bool
    candidate: Evaluated
    reference: Evaluated | None
    options: dict[str, Any]
    gate: GateFile | None
    versions: dict[str, str]
    machine: dict[str, Any]
    report: QualityReport
    verdicts: tuple[Verdict, ...]
    tasks: tuple[TaskFigure, ...] = ()  # of lm-evaluation-harness


def make_record(
    bundle: Path,
    request: EvalRequest,
    report: QualityReport,
    verdicts: Sequence[Verdict],
    checkpoint: ReferenceInfo | None = None,
    tasks: Sequence[TaskFigure] = (),
) -> EvalRecord:
    """The record of an evaluation that has just been made. Raises BadInput or DamagedFile where files are gone.

    `checkpoint`: the reference, where that is one.
    """
    cpu, memory = read_cpu(), read_memory()
    reference = _evaluated(request.reference) if request.reference and checkpoint is None else None
    return EvalRecord(
        format=FORMAT,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        passed=all(verdict.passed for verdict in verdicts),
        candidate=_evaluated(bundle),
        reference=reference if checkpoint is None else _checkpoint(bundle, checkpoint),
        options=_options(request),
        gate=_gate(request.gate) if request.gate else None,
        versions={
            "pocketmoe": __version__,
            "onnxruntime": ort.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        machine={
            "cpu": cpu.model,
            "architecture": cpu.architecture,
            "features": list(cpu.features),
            "cores": cpu.cores,
            "memory_bytes": memory.total_bytes,
            "system": f"{platform.system()} {platform.release()}",
        },
        report=report,
        verdicts=tuple(verdicts),
        tasks=tuple(tasks),
    )


def make_place(directory: Path) -> None:
    """See to it that a record can be filed there, before it takes an hour to make one. Raises OutputError."""
    with translate_write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass


def file_record(record: EvalRecord, directory: Path, page: str, card: str) -> None:
    """Write eval.json, eval.html and MODEL_CARD.md into a directory, each whole or not at all. Raises OutputError."""
    data = msgspec.json.format(msgspec.json.encode(record), indent=1)
    write_whole(directory / RECORD, data + b"\n")
    write_whole(directory / "eval.html", page.encode("utf-8", "surrogateescape"))
    write_whole(directory / CARD, card.encode("utf-8", "surrogateescape"))


def card_with_verdict(bundle: Path, record: EvalRecord) -> str:
    """The bundle's model card with a section on the evaluation, to be published beside it.

    The card in the bundle stays as it is: its bytes are part of the seal that the record names. Raises DamagedFile.
    """
    opened = Bundle.open(bundle)
    path = opened.root / CARD
    text = read_whole(path, _LARGEST_CARD, "").decode("utf-8", "replace") if path.is_file() else ""
    failed = [verdict for verdict in record.verdicts if not verdict.passed]
    compared = f" against {record.reference.source} ({record.reference.seal[:12]})" if record.reference else ""
    lines = [
        f"{record.made_at}, pocketmoe {record.versions['pocketmoe']}, bundle {record.candidate.seal[:12]}{compared}:",
        f"**{'passed' if record.passed else 'FAILED'}**, {len(record.verdicts) - len(failed)} of "
        f"{len(record.verdicts)} gates hold.",
        "",
        *(f"- FAILED: {verdict}" for verdict in failed),
        f"- perplexity {record.report.overall.perplexity.value:.3f} on {record.report.overall.scored_tokens} tokens",
    ]
    if found := record.report.overall.divergence:
        lines.append(
            f"- mean KL {found.mean_kl_nats.value:.5f} nats, top-1 {found.top1_agreement.value:.1%}, "
            f"perplexity x {found.perplexity_ratio.value:.4f}"
        )
    return with_section(text, _EVALUATION, lines)


def _evaluated(path: Path) -> Evaluated:
    manifest = Bundle.open(path).manifest
    provenance = manifest.provenance
    return Evaluated(
        path=str(path),
        seal=manifest.sha256,
        architecture=manifest.model.architecture,
        source=provenance.source,
        revision=provenance.revision,
        licence=provenance.licence,
        schemes=schemes_of(manifest),
        steps=provenance.steps,
        nbytes=sum(entry.nbytes for entry in manifest.files.values()),
    )


def _checkpoint(bundle: Path, found: ReferenceInfo) -> Evaluated:
    """A checkpoint as a reference, and whether the bundle says that it was made of these very files."""
    made_of = Bundle.open(bundle).manifest.provenance.files
    same = bool(made_of) and all(found.files.get(name) == sha for name, sha in made_of.items())
    return Evaluated(
        path=str(found.path),
        seal=found.seal,
        architecture=found.architecture,
        source=found.source,
        revision=found.revision,
        licence=found.licence,
        schemes={"computed by": found.computed_by},
        steps=(f"the checkpoint itself; the bundle was made of {'these very' if same else 'other'} files",),
        nbytes=found.nbytes,
    )


def _options(request: EvalRequest) -> dict[str, Any]:
    """What was asked for beside bundles and gates, in JSON's types; where packed experts lie decides no figure."""
    found = {field.name: getattr(request, field.name) for field in fields(request)}
    for name in ("reference", "gate", "journal", "packed"):
        del found[name]
    memory, pairs = found.pop("memory"), found.pop("pairs")
    found |= {"pairs": str(pairs)} if pairs else {}
    return {**found, "text": str(request.text), "memory": asdict(memory) if memory else None}


def _gate(path: Path) -> GateFile:
    data = read_whole(path, 1 << 20, "Name a file of limits.")
    return GateFile(str(path), hashlib.sha256(data).hexdigest(), data.decode("utf-8", "replace"))
