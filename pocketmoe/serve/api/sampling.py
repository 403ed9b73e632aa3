"""How to choose tokens, as OpenAI's APIs have it, and names that other servers have added."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from pocketmoe.serve.api.errors import refused

ModelName = Annotated[str, Meta(min_length=1, max_length=256)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
StopString = Annotated[str, Meta(min_length=1, max_length=1000)]
Stops = StopString | Annotated[list[StopString], Meta(max_length=16)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
LogitBias = Annotated[dict[TokenId, Bias], Meta(max_length=1024)]

_NAMES = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "no_repeat_ngram", "min_tokens", "logit_bias",
)  # fmt: skip


class StreamOptions(Struct, forbid_unknown_fields=True):
    """What a stream has beside the answer."""

    include_usage: bool | None = None


class Sampled(Struct, kw_only=True, forbid_unknown_fields=True):
    """What requests for text have in common. What is not given is as the model's authors have it."""

    model: ModelName
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    stop: Stops | None = None
    seed: Seed | None = None
    n: Annotated[int, Meta(ge=1, le=16)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    min_p: Share | None = None
    typical_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=1000)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    no_repeat_ngram: Annotated[int, Meta(ge=0, le=1 << 20)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: bool | None = None  # vLLM's, by which benchmarks get answers of one length
    logit_bias: LogitBias | None = None
    return_token_ids: bool | None = None  # also give the answer's token ids
    user: str | None = None  # these three say who asks: nothing that an answer depends on, and nothing is kept of them
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


def sampling_options(request: Sampled) -> dict[str, Any]:
    """Options of `Model.stream` that a request sets."""
    if request.stream_options is not None and not request.stream:
        raise refused("stream_options", "'stream_options' goes with 'stream' alone")
    given = {name: getattr(request, name) for name in _NAMES}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if request.ignore_eos:
        options["min_tokens"] = 2**31 - 1
    if request.top_p == 0:
        options["top_p"] = sys.float_info.epsilon
    if request.seed is not None:
        options["seed"] = request.seed % 2**64
    if request.stop is not None:
        options["stop"] = request.stop
    return {"authors": True, **options}


def refuse_foreign_ids(ids: Mapping[int, object] | list[int], vocab_size: int, param: str) -> None:
    """Raise ApiError for token ids that the model does not have."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise refused(param, f"token {largest} is not one of the model's {vocab_size}", "invalid_token_id")


def encode(value: object) -> bytes:
    """JSON, in UTF-8."""
    return msgspec.json.encode(value)


def event(value: object, name: str | None = None) -> bytes:
    """A server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + encode(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"
