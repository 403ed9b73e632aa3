"""Capture the model as one ONNX graph in which every MoE block is an Experts node."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pocketmoe.errors import UnsupportedModel, first_line
from pocketmoe.export.capture import custom_op
from pocketmoe.export.capture.attention import attention_in_place
from pocketmoe.export.capture.monkeypatches import monkeypatched

if TYPE_CHECKING:
    import onnx_ir as ir

    from pocketmoe.export.capture.adapters import MoeModule

_Result = TypeVar("_Result")


def capture(model: Any, experts: dict[str, MoeModule]) -> ir.Model:
    """The graph that continues a text: token ids [1, S] and states in, logits [1, S, V] and states out.

    Empty states make it a prefill. Raises UnsupportedModel when the exporter cannot take the architecture.
    """
    with quiet(), custom_op.experts_as_operator(model, experts), monkeypatched(model), attention_in_place(model):
        try:
            program = in_a_thread(lambda: _export(model))
        except Exception as error:
            raise UnsupportedModel(
                f"{type(model).__name__} cannot be exported to ONNX ({_cause(error)})",
                "Choose another architecture, or report this one.",
            ) from error
    layers = sorted(node.attributes[_LAYER].as_int() for node in program.graph if node.op_type == custom_op.OP_TYPE)
    if layers != list(range(len(experts))):
        raise UnsupportedModel(
            f"{type(model).__name__} has {len(experts)} experts modules, {len(layers)} of which its graph uses",
            "This architecture calls its experts in a way that the export does not support.",
        )
    return program


def compute_shapes(model: Any) -> None:
    """One forward pass of a model on the meta device, its experts as the custom operator. Raises whatever it raises."""
    import torch

    with quiet(), custom_op.experts_as_operator(model, custom_op.find_experts(model)), torch.no_grad():
        model(torch.zeros(1, _NEW_TOKENS, dtype=torch.int64, device="meta"))


def in_a_thread(compute: Callable[[], _Result]) -> _Result:
    """Run `work` in another thread; return what it returns, raise what it raises.

    Python handles signals in the first thread, which only waits here, so that a Ctrl-C raises here and is cleaned up
    after. Raised in `work` it could hit code of torch's that C++ calls and that may not throw: the process would abort.
    After a Ctrl-C nobody waits for the thread, since the process ends.
    """
    done: Future[_Result] = Future()

    def work() -> None:
        try:
            done.set_result(compute())
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            done.set_exception(error)

    before = threading.stack_size(_STACK_BYTES)
    try:
        threading.Thread(target=work, daemon=True, name="capture").start()
    finally:
        threading.stack_size(before)
    return done.result()


_LAYER = "layer"
_STACK_BYTES = 64 << 20  # tracing recurses deeply, and other threads than the first may have little
_NEW_TOKENS = 5  # in the sample that is captured, after 7 in the states


def _export(model: Any) -> ir.Model:
    import torch
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter
    from transformers.exporters.utils import decompose_for_generation  # pyright: ignore[reportUnknownVariableType]

    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]]) % model.config.get_text_config().vocab_size
    generation = _greedy(model.generation_config)
    # of the two graphs that `export_for_generation` would make, only the one that continues a text is needed
    decompose = cast("Callable[..., dict[str, tuple[Any, dict[str, Any]]]]", decompose_for_generation)
    parts = decompose(
        model,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        generation_config=generation,
        multi_token_decode=True,
    )
    decoder, inputs = parts["decode"]
    _lengthen(inputs, _NEW_TOKENS)
    config = OnnxConfig(dynamic=True, ort_fusions="cpu")
    program = OnnxExporter().export(decoder, inputs, config).program
    assert program is not None
    return program


def _lengthen(inputs: dict[str, Any], tokens: int) -> None:
    """Make the sample text longer by as many new tokens as it takes to have `tokens`.

    Dimensions of one size get one symbol, and transformers' sample has 2 new tokens: also the width of a convolution,
    or the number of key heads, which would then fix the number of tokens.
    """
    import torch

    ids = inputs["input_ids"]
    more = tokens - ids.shape[1]
    inputs["input_ids"] = torch.cat([ids, ids[:, -1:].expand(-1, more)], dim=1)
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if positions is not None:
        inputs["position_ids"] = torch.cat([positions, positions[..., -1:] + torch.arange(1, more + 1)], dim=-1)
    if isinstance(mask, torch.Tensor):
        inputs["attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, more)], dim=1)


def _greedy(generation_config: Any) -> Any:
    """Plain greedy generation of a few tokens that no end-of-text token can cut short."""
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=False, pad_token_id=0)
    config.bos_token_id = generation_config.bos_token_id
    return config


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    kind = type(error).__name__
    return f"{kind}: {first_line(error, most=200)}" if str(error).strip() else kind


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Exporters print, log and warn about their own business; inside, only errors get through."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
