"""Text to token ids and back: /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from pocketmoe.runtime.model import Model
from pocketmoe.serve.api.chat import Message, said
from pocketmoe.serve.api.decoding import decode
from pocketmoe.serve.api.errors import refused
from pocketmoe.serve.api.sampling import ModelName, TokenId, refuse_foreign_ids
from pocketmoe.serve.api.work import Question


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """A text, or a conversation."""

    model: ModelName
    prompt: Annotated[str, Meta(min_length=1)] | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=10_000)] | None = None
    add_special_tokens: bool | None = None  # to a text, as its tokenizer does; the default


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Token ids."""

    model: ModelName
    tokens: Annotated[list[TokenId], Meta(max_length=1 << 20)]


def tokenize(body: bytes) -> Question:
    """The token ids of a text or a conversation. Raises ApiError."""
    request = decode(body, TokenizeRequest)
    if (request.prompt is None) == (request.messages is None):
        raise refused("prompt", "give either 'prompt' or 'messages'")
    if request.messages is not None and request.add_special_tokens is not None:
        raise refused("add_special_tokens", "'add_special_tokens' goes with 'prompt' alone")

    def answer(model: Model) -> Any:
        if request.prompt is not None:
            ids = model.tokenize(request.prompt, add_special_tokens=request.add_special_tokens is not False)
        else:
            ids = model.prompt_ids([said(message) for message in request.messages or ()])
        return {"tokens": ids, "count": len(ids), "max_model_len": model.context_length}

    return Question(request.model, "prompt" if request.messages is None else "messages", answer)


def detokenize(body: bytes) -> Question:
    """The text of token ids, without special tokens. Raises ApiError."""
    request = decode(body, DetokenizeRequest)

    def answer(model: Model) -> Any:
        refuse_foreign_ids(request.tokens, model.bundle.manifest.model.vocab_size, "tokens")
        return {"prompt": model.detokenize(request.tokens)}

    return Question(request.model, "tokens", answer)
