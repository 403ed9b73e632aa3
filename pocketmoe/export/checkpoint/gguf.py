"""A GGUF file as a checkpoint's directory: transformers' configuration and tokenizer of it, and its blocks by name.

The blocks are copied as they are, experts apart, into a safetensors file under transformers' names; what they stand for
is read from there (`export/packed/gguf.py`). The architectures are those that transformers has a mapping for and that
were tried here; how wide experts are, which that mapping leaves out, the tensors say.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from pocketmoe.bundle.progress import Progress
from pocketmoe.bundle.store import translate_write_errors
from pocketmoe.errors import BadInput, UnsupportedModel, first_line, printable
from pocketmoe.export.packed.gguf import BLOCKS
from pocketmoe.export.tensors.gguf import GgufHeader, GgufTensor, is_gguf, read_header
from pocketmoe.export.tensors.shards import SINGLE

ARCHITECTURES = ("qwen2moe", "qwen3moe", "minimax-m2")
_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}
_PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_OF_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate", "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj", "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj", "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}  # fmt: skip
_OF_ARCHITECTURE = {  # what is called otherwise there
    "minimax-m2": {
        "ffn_gate_inp": "block_sparse_moe.gate", "exp_probs_b": "block_sparse_moe.e_score_correction_",
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1", "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    },
}  # fmt: skip
_WIDTH = {"minimax-m2": "intermediate_size"}  # of experts; elsewhere moe_intermediate_size
_NAME = re.compile(r"(?:blk\.(\d{1,4})\.)?([a-z0-9_]+)\.(weight|bias)")
_CHUNK = 8 << 20
_OTHER = "Export the model that it was made from, or its quantization in safetensors."


@contextlib.contextmanager
def as_directory(source: Path, beside: Path, progress: Progress) -> Generator[Path]:
    """`source` itself, or, of a GGUF file, a directory of that name below `beside` that is gone afterwards.

    Raises DamagedFile, BadInput, UnsupportedModel, OutputError.
    """
    if not source.is_file() or not is_gguf(source):
        yield source
        return
    header = read_header(source)
    architecture = header.settings.get("general.architecture")
    if architecture not in ARCHITECTURES:
        said = printable(str(architecture))[:40]
        raise UnsupportedModel(f"{source} holds a model of architecture {said!r}, which is not read from GGUF", _OTHER)
    with translate_write_errors(beside), tempfile.TemporaryDirectory(prefix=".gguf-", dir=beside) as folder:
        root = Path(folder) / source.stem
        root.mkdir()
        (root / "config.json").write_text(json.dumps(_config(source, header, str(architecture))), encoding="utf-8")
        _write_tokenizer(source, root)
        _write_tensors(source, header, str(architecture), root / SINGLE, progress)
        yield root


def _config(source: Path, header: GgufHeader, architecture: str) -> dict[str, Any]:
    """By transformers' mapping, with the sizes that it leaves to the defaults of one published model."""
    from transformers import modeling_gguf_pytorch_utils

    scaling = header.settings.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        said = printable(str(scaling))[:20]
        raise UnsupportedModel(
            f"{source} scales its positions ({said}), which transformers' mapping leaves out", _OTHER
        )
    try:
        load = cast("Callable[[str], dict[str, dict[str, Any]]]", modeling_gguf_pytorch_utils.load_gguf_checkpoint)
        config = load(str(source))["config"]
    except Exception as error:
        raise BadInput(f"{source}: transformers cannot read its settings ({first_line(error)})", _OTHER) from error
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    for name, setting in (
        ("ffn_gate_exps", _WIDTH.get(architecture, "moe_intermediate_size")),
        ("ffn_gate_shexp", "shared_expert_intermediate_size"),
    ):
        if (shape := shapes.get(f"blk.0.{name}.weight")) is not None and len(shape) > 1:
            config[setting] = shape[-2]
    config.pop("_model_name_or_path", None)
    return {name: value.tolist() if isinstance(value, np.generic) else value for name, value in config.items()}


def _write_tokenizer(source: Path, root: Path) -> None:
    from transformers import AutoTokenizer

    try:
        from_pretrained = cast("Callable[..., Any]", AutoTokenizer.from_pretrained)
        from_pretrained(source.parent, gguf_file=source.name).save_pretrained(root)
    except Exception as error:
        said = f"{source}: transformers cannot make a tokenizer of it ({first_line(error)})"
        raise UnsupportedModel(said, _OTHER) from error


@dataclass(frozen=True)
class _Copy:
    """A tensor of the new file: dtype in safetensors' words, and its bytes in the old one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def _copies(source: Path, tensor: GgufTensor, architecture: str) -> Iterator[_Copy]:
    """What becomes of a tensor: itself, or one for each expert that it stacks. Raises UnsupportedModel."""
    match = _NAME.fullmatch(tensor.name)
    layer, part, leaf = match.groups() if match else (None, "", "")
    prefix, own = f"model.layers.{layer}.", _OF_ARCHITECTURE.get(architecture, {})
    if layer is not None and part in _EXPERTS and leaf == "weight" and len(tensor.shape) == 3:
        module = own.get(part, _EXPERTS[part])
        nbytes = tensor.nbytes // tensor.shape[0]
        for expert in range(tensor.shape[0]):
            yield _copy(
                prefix + module.format(expert), leaf, tensor, tensor.shape[1:], tensor.offset + expert * nbytes, nbytes
            )
        return
    known = _WHOLE.get(part) if layer is None else (_OF_LAYER | own).get(part)
    if known is None:
        said = f"{source}: tensor {printable(tensor.name)[:80]!r} has no place in the model"
        raise UnsupportedModel(said, "Convert the model anew, or report the file.")
    shape = (1, *tensor.shape) if part == "ffn_gate_inp_shexp" and len(tensor.shape) == 1 else tensor.shape
    yield _copy(known if layer is None else prefix + known, leaf, tensor, shape, tensor.offset, tensor.nbytes)


def _copy(module: str, leaf: str, tensor: GgufTensor, shape: tuple[int, ...], offset: int, nbytes: int) -> _Copy:
    if tensor.type in _PLAIN:
        return _Copy(f"{module}{'' if module.endswith('_') else '.'}{leaf}", _PLAIN[tensor.type], shape, offset, nbytes)
    rows = nbytes // max(1, shape[0]) if len(shape) == 2 else 0
    return _Copy(f"{module}{BLOCKS}{tensor.type}", "U8", (shape[0], rows) if rows else (nbytes,), offset, nbytes)


def _write_tensors(source: Path, header: GgufHeader, architecture: str, target: Path, progress: Progress) -> None:
    """Write a safetensors file of the same bytes, some at a time."""
    copies = [copy for tensor in header.tensors for copy in _copies(source, tensor, architecture)]
    copies.sort(key=lambda copy: -_WIDTHS[copy.dtype])  # so that each lies at a multiple of its numbers' width
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for copy in copies:
        entries[copy.name] = {"dtype": copy.dtype, "shape": copy.shape, "data_offsets": [end, end + copy.nbytes]}
        end += copy.nbytes
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    done = 0
    with open(source, "rb") as old, open(target, "wb") as new:
        new.write(len(head).to_bytes(8, "little") + head)
        for copy in copies:
            progress("reading the GGUF file (MB)", done // 1_000_000, max(1, end // 1_000_000))
            _copy_bytes(old, new, copy)
            done += copy.nbytes


def _copy_bytes(old: BinaryIO, new: BinaryIO, copy: _Copy) -> None:
    old.seek(copy.offset)
    left = copy.nbytes
    while left:
        data = old.read(min(left, _CHUNK))
        if not data:
            raise BadInput(f"{old.name} ended while it was being read", "Export again when it is complete.")
        new.write(data)
        left -= len(data)
