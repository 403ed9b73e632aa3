"""llama.cpp's own quantizer and its logits, by the library itself; needs `pip install llama-cpp-python`.

That package builds llama.cpp from source, and declares its header for ctypes.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as api

RELEASE = f"llama-cpp-python {llama_cpp.__version__}"
_PREFIX = "LLAMA_FTYPE_MOSTLY_"
FILE_TYPES = {name.removeprefix(_PREFIX): value for name, value in vars(api).items() if name.startswith(_PREFIX)}


@api.llama_log_callback
def _silent(_level: int, _text: bytes, _data: object) -> None: ...


api.llama_log_set(_silent, None)
api.llama_backend_init()


def quantize(source: Path, target: Path, file_type: str) -> float:
    """Write a GGUF of floats as one of `FILE_TYPES`, as llama-quantize does without an importance matrix; seconds."""
    params = api.llama_model_quantize_default_params()
    params.nthread = os.cpu_count() or 1
    params.ftype = FILE_TYPES[file_type]
    began = time.perf_counter()
    failed = api.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    if failed:
        raise RuntimeError(f"llama.cpp does not quantize {source} to {file_type} ({failed})")
    return time.perf_counter() - began


class Model:
    """A GGUF that gives logits for windows of tokens, each from nothing; keys, values and attention in float32."""

    def __init__(self, path: Path, window: int) -> None:
        model_params = api.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = -(-window // 256) * 256
        params.n_threads = params.n_threads_batch = 1  # several spin while they wait, at the cost of whoever else runs
        params.type_k = params.type_v = 0  # GGML_TYPE_F32: what is measured is the weights
        params.flash_attn_type = 0  # disabled
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context for {path}")
        self._vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits after each of the tokens, int [n] -> float32 [n, vocab]."""
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        batch = api.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for place, token in enumerate(tokens.tolist()):
                batch.token[place], batch.pos[place] = token, place
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
                batch.logits[place] = 1
            failed = api.llama_decode(self._context, batch)
            if failed:
                raise RuntimeError(f"llama_decode fails with {failed}")
            found = api.llama_get_logits(self._context)
            return np.ctypeslib.as_array(found, (len(tokens), self._vocab)).copy()
        finally:
            api.llama_batch_free(batch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        api.llama_free(self._context)
        api.llama_model_free(self._model)
