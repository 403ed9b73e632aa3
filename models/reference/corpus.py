"""Build the corpus of the reference model: download, unpack, clean, split, and write the shipped texts.

Usage: ``python corpus.py [--work DIR]``. Needs apt-get, dpkg-deb and pip.
Downloads are by package name only; the SHA-256 of every package file used is recorded in corpus.lock.json.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from extract import documents, drop_boilerplate, read_text, usable

HERE = Path(__file__).resolve().parent
KINDS = ("prose", "docs", "python", "french")
HELDOUT_CHARS = 56_000
HELDOUT_PER_DOCUMENT = 9_000
CALIBRATION_CHARS = 25_000
CALIBRATION_PER_DOCUMENT = 3_000


@dataclass
class Source:
    """One package's contribution to one kind of text."""

    package: str
    registry: str
    version: str
    licence: str
    kind: str
    format: str
    include: list[str]
    exclude: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)
    cap: int = 10**9
    ship: bool = False


@dataclass
class Document:
    """A cleaned text with where it came from."""

    source: Source
    name: str
    text: str

    @property
    def rank(self) -> str:
        """A fixed pseudo-random order: the hash of package and name."""
        return hashlib.sha256(f"{self.source.package}/{self.name}".encode()).hexdigest()


def load_sources(path: Path) -> list[Source]:
    """The [[source]] tables of the recipe."""
    return [Source(**table) for table in tomllib.loads(path.read_text())["source"]]


def progress(message: str) -> None:
    """One line on stderr."""
    sys.stderr.write(message + "\n")


def download(source: Source, packages: Path) -> Path:
    """Fetch the package file unless it is already there; returns its path."""
    normalised = source.package.replace("-", "?") if source.registry == "pypi" else source.package
    pattern = f"{normalised}[-_]*" if source.registry == "pypi" else f"{normalised}_*.deb"
    if not (found := sorted(packages.glob(pattern))):
        progress(f"downloading {source.package}")
        if source.registry == "debian":
            command = ["apt-get", "download", source.package]
        else:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
            command.append(f"{source.package}=={source.version}")
        subprocess.run(command, cwd=packages, check=True, stdout=subprocess.DEVNULL)
        found = sorted(packages.glob(pattern))
    if source.registry == "debian":
        version = found[-1].name.split("_")[1].replace("%3a", ":")
        subprocess.run(["dpkg", "--compare-versions", version, "ge", source.version], check=True)
    return found[-1]


def unpack(package: Path, target: Path) -> Path:
    """Unpack a .deb, wheel or source archive into ``target``/<file name>."""
    folder = target / package.name
    if folder.exists():
        return folder
    partial = target / (package.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if package.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(package), str(partial)], check=True)
    elif package.suffix in {".whl", ".zip"}:
        with zipfile.ZipFile(package) as archive:
            archive.extractall(partial)
    else:
        with tarfile.open(package) as archive:
            archive.extractall(partial, filter="data")
    partial.rename(folder)
    return folder


def matches(name: str, globs: list[str]) -> bool:
    """True if any glob matches; ``*`` also crosses slashes."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def read_source(source: Source, folder: Path) -> list[Document]:
    """All usable documents of one source, without the lines common to most of them."""
    named: list[tuple[str, str]] = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
        name = path.relative_to(folder).as_posix()
        if matches(name, source.include) and not matches(name, source.exclude):
            named.extend(documents(path, name, source.format))
    texts = [text for _, text in named]
    if source.format == "html":
        texts = drop_boilerplate(texts)
    return [Document(source, n, t) for (n, _), t in zip(named, texts, strict=True) if usable(t)]


def split(found: list[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, without exact duplicates, training capped per source."""
    seen: set[str] = set()
    train: list[Document] = []
    heldout: list[Document] = []
    used: dict[int, int] = defaultdict(int)
    held_first = sorted(found, key=lambda d: (not matches(d.name, d.source.heldout), d.rank))
    for document in held_first:
        digest = hashlib.sha256(document.text.encode()).hexdigest()
        if digest in seen:
            continue
        seen.add(digest)
        key = id(document.source)
        if matches(document.name, document.source.heldout):
            heldout.append(document)
        elif used[key] < document.source.cap:
            used[key] += len(document.text)
            train.append(document)
    return train, heldout


def excerpts(pool: list[Document], total: int, each: int) -> tuple[str, list[str]]:
    """Openings of documents, taken in turn from the sources, up to ``total`` characters; (text, credits)."""
    queues: dict[str, list[Document]] = defaultdict(list)
    for document in sorted(pool, key=lambda d: d.rank):
        queues[document.source.package].append(document)
    parts: list[str] = []
    origins: list[str] = []
    while any(queues.values()) and sum(map(len, parts)) < total:
        for package, queue in queues.items():
            if queue and sum(map(len, parts)) < total:
                document = queue.pop(0)
                whole = document.text
                skip = whole.find("\n\n", len(whole) // 3) if len(whole) > 10 * each else 0
                piece = whole[max(skip, 0) :].lstrip("\n")[:each]
                parts.append(piece[: piece.rfind("\n") + 1])
                origins.append(f"{package}: {document.name} ({document.source.licence})")
    return "\n\n".join(parts), origins


def write_shipped(train: list[Document], heldout: list[Document]) -> None:
    """The held-out files, the calibration text and the notice that credits both."""
    folder = HERE / "heldout"
    folder.mkdir(exist_ok=True)
    notice = ["# Origin and licence of the shipped texts", ""]
    notice += [
        "Written by corpus.py. Each entry names the package, the document, and its licence.",
        "The packages' own licence files are in licences/.",
        "",
    ]
    for kind in (*KINDS, "ood"):
        pool = [d for d in heldout if d.source.kind == kind and d.source.ship]
        each = max(HELDOUT_PER_DOCUMENT, HELDOUT_CHARS // max(len(pool), 1))
        text, origins = excerpts(pool, HELDOUT_CHARS, each)
        (folder / f"{kind}.txt").write_text(text)
        notice += [f"## {kind}.txt", "", *[f"- {line}" for line in origins], ""]
    mixed = []
    notice += ["## ../calibration.txt (from training text)", ""]
    for kind in KINDS:
        pool = [d for d in train if d.source.kind == kind and d.source.ship]
        text, origins = excerpts(pool, CALIBRATION_CHARS, CALIBRATION_PER_DOCUMENT)
        mixed.append(text)
        notice += [f"- {line}" for line in origins]
    (HERE / "calibration.txt").write_text("\n\n".join(mixed))
    (folder / "NOTICE.md").write_text("\n".join(notice) + "\n")


def copy_licence(source: Source, folder: Path) -> None:
    """Put the package's own licence file beside the shipped texts: heldout/licences/<package>.txt."""
    names = [f"usr/share/doc/{source.package}/copyright"]
    names += ["*.dist-info/LICEN[SC]E*", "*.dist-info/licenses/LICEN[SC]E*", "*/COPYING*", "*/LICEN[SC]E*"]
    found = next((path for name in names for path in sorted(folder.glob(name)) if path.is_file()), None)
    target = HERE / "heldout" / "licences" / f"{source.package}.txt"
    target.parent.mkdir(parents=True, exist_ok=True)
    if found is not None:
        target.write_text(read_text(found))


def write_training(train: list[Document], work: Path) -> dict[str, dict[str, int]]:
    """One JSON-lines file per kind; returns documents and characters per kind."""
    folder = work / "train"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for kind in KINDS:
        chosen = sorted((d for d in train if d.source.kind == kind), key=lambda d: d.rank)
        lines = [json.dumps({"name": f"{d.source.package}/{d.name}", "text": d.text}) for d in chosen]
        (folder / f"{kind}.jsonl").write_text("\n".join(lines) + "\n")
        sizes[kind] = {"documents": len(chosen), "characters": sum(len(d.text) for d in chosen)}
    return sizes


def main() -> None:
    """Build everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="downloads and intermediate files")
    work = parser.parse_args().work
    packages = work / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    lock: dict[str, dict[str, str | int]] = {}
    found: list[Document] = []
    for source in load_sources(HERE / "corpus.toml"):
        package = download(source, packages)
        digest = hashlib.sha256(package.read_bytes()).hexdigest()
        lock[package.name] = {"registry": source.registry, "sha256": digest, "bytes": package.stat().st_size}
        folder = unpack(package, work / "unpacked")
        these = read_source(source, folder)
        if source.ship:
            copy_licence(source, folder)
        size = sum(len(d.text) for d in these)
        progress(f"{source.kind:7} {source.package:24} {len(these):5} documents {size:9} characters")
        found.extend(these)
    train, heldout = split(found)
    sizes = write_training(train, work)
    write_shipped(train, heldout)
    summary = {"packages": dict(sorted(lock.items())), "training": sizes}
    (HERE / "corpus.lock.json").write_text(json.dumps(summary, indent=1) + "\n")
    progress(json.dumps(sizes))


if __name__ == "__main__":
    main()
