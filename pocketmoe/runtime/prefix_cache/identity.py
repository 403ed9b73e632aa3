"""What decides the bits of a state: the bundle, the machine's kernels, and every token up to it.

A file's name is made of all of it, so that a state is found only where computing anew would give the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import onnxruntime as ort

from pocketmoe import __version__
from pocketmoe.bundle.manifest import Manifest
from pocketmoe.runtime.backends.cpu import cpu_facts

_FORMAT = "1"  # raised when files, or what this version computes, change


def identity(manifest: Manifest, chunk: int) -> bytes:
    """A digest of all but the tokens, 32 bytes: bundle, CPU, ONNX Runtime, numpy, and tokens in a prompt's chunk.

    The bundle's seal is over its weights and over how its caches are kept. Budget, backend and threads change no bit.
    """
    facts = [_FORMAT, __version__, manifest.sha256, str(chunk), ort.__version__, np.__version__, *cpu_facts()]
    return hashlib.sha256("\n".join(facts).encode()).digest()


def block_names(root: bytes, tokens: Sequence[int], chunk: int) -> Iterator[str]:
    """For each whole chunk of a text, a name for the text up to its end: 64 hex digits.

    `root`: what `identity` says. Each name is a hash over the one before and the chunk's tokens.
    """
    name = root
    for end in range(chunk, len(tokens) + 1, chunk):
        name = hashlib.sha256(name + np.asarray(tokens[end - chunk : end], "<i8").tobytes()).digest()
        yield name.hex()
