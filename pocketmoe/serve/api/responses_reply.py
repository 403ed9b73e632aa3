"""How an answer is told as OpenAI's response: a list of items, whole or as events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pocketmoe.runtime.conversation import Generation
from pocketmoe.runtime.model import Model
from pocketmoe.serve.api.errors import translated
from pocketmoe.serve.api.sampling import event
from pocketmoe.serve.api.speech import call_id
from pocketmoe.serve.api.work import Choice, Event, Piece, Progress, Scored
from pocketmoe.tools.calls import Part, Text, ToolCall
from pocketmoe.tools.families import Dialect


class ResponsesReply:
    """Items of an answer: reasoning, messages, calls, in the order in which they came; the last one may be open."""

    def __init__(self, streams: bool, asked: Mapping[str, Any]) -> None:
        """`asked`: what of the request is told again."""
        self.streams, self._asked = streams, asked
        self._id, self._created = _id("resp"), int(time.time())
        self._output: list[dict[str, Any]] = []
        self._is_open = False  # the last item: text goes on in it
        self._parser = Dialect().parser()  # until it begins
        self._result: Generation | None = None
        self._events = 0
        self._pending = self._reasoning_tokens = 0  # tokens whose text is not known yet; those of reasoning

    def begin(self, model: Model, choices: Sequence[Choice]) -> Iterator[bytes]:  # noqa: ARG002 - as others
        (choice,) = choices
        self._parser = choice.parser
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response("in_progress"))

    def push(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Progress):
            yield f": prompt {event.done}/{event.total}\n\n".encode()
        elif isinstance(event, Piece):
            self._pending += len(event.tokens)
            yield from self._tell(self._parser.push(event.text))
        elif not isinstance(event, Scored):
            yield from self._tell(self._parser.finish())
            self._result = event.result
            yield from self._finish()

    def end(self) -> Iterator[bytes]:
        yield self._event(f"response.{self._status}", response=self._response(self._status))

    def whole(self) -> dict[str, Any]:
        return self._response(self._status)

    def failed(self, error: Exception) -> bytes:
        told = {"code": "server_error", "message": translated(error).message}
        return self._event("response.failed", response={**self._response("failed"), "error": told})

    @property
    def _status(self) -> str:
        cut = self._result is not None and self._result.stop_reason in ("length", "context")
        return "incomplete" if cut else "completed"

    def _finish(self) -> Iterator[bytes]:
        """Close what is open; an answer without anything is an empty message."""
        if not self._output:
            yield from self._open("content")
        if self._is_open:
            yield from self._close(self._status)

    def _tell(self, parts: list[Part]) -> Iterator[bytes]:
        for part in parts:
            if isinstance(part, ToolCall):
                yield from self._tell_call(part)
            else:
                yield from self._tell_text(part)
        if parts:
            thought = all(isinstance(part, Text) and part.kind == "reasoning" for part in parts)
            self._reasoning_tokens += self._pending if thought else 0
            self._pending = 0

    def _tell_text(self, part: Text) -> Iterator[bytes]:
        if not self._is_open or (self._output[-1]["type"] == "reasoning") != (part.kind == "reasoning"):
            yield from self._open(part.kind)
        item = self._output[-1]
        item["content"][0]["text"] += part.text
        logprobs: dict[str, Any] = {} if part.kind == "reasoning" else {"logprobs": []}
        yield self._part_event(f"{_text_kind(item)}.delta", delta=part.text, **logprobs)

    def _tell_call(self, call: ToolCall) -> Iterator[bytes]:
        yield from self._close_open()
        item: dict[str, Any] = {
            "id": _id("fc"), "type": "function_call", "status": "in_progress", "call_id": call_id(call),
            "name": call.name, "arguments": "",
        }  # fmt: skip
        yield from self._add(item)
        place = {"item_id": item["id"], "output_index": len(self._output) - 1}
        item |= {"arguments": call.arguments, "status": "completed"}
        yield self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
        done = {"name": call.name, "arguments": call.arguments}
        yield self._event("response.function_call_arguments.done", **place, **done)
        yield self._event("response.output_item.done", output_index=place["output_index"], item=item)

    def _open(self, kind: str) -> Iterator[bytes]:
        """A new item that text of a kind goes into."""
        yield from self._close_open()
        if kind == "reasoning":
            item: dict[str, Any] = {"id": _id("rs"), "type": "reasoning", "summary": []}
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        else:
            item = {"id": _id("msg"), "type": "message", "role": "assistant"}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item |= {"status": "in_progress", "content": []}
        yield from self._add(item)
        item["content"].append(part)
        self._is_open = True
        yield self._part_event("content_part.added", part=part)

    def _add(self, item: dict[str, Any]) -> Iterator[bytes]:
        self._output.append(item)
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)

    def _close_open(self) -> Iterator[bytes]:
        if self._is_open:
            yield from self._close("completed")

    def _close(self, status: str) -> Iterator[bytes]:
        item = self._output[-1]
        (part,) = item["content"]
        logprobs: dict[str, Any] = {} if item["type"] == "reasoning" else {"logprobs": []}
        yield self._part_event(f"{_text_kind(item)}.done", text=part["text"], **logprobs)
        yield self._part_event("content_part.done", part=part)
        item["status"], self._is_open = status, False
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _part_event(self, name: str, /, **fields: Any) -> bytes:
        """Something about the text of the last item."""
        index = len(self._output) - 1
        return self._event(
            f"response.{name}", item_id=self._output[-1]["id"], output_index=index, content_index=0, **fields
        )

    def _event(self, name: str, /, **fields: Any) -> bytes:
        self._events += 1
        return event({"type": name, "sequence_number": self._events - 1, **fields}, name)

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._output,
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "truncation": "disabled",
            **self._asked,
            "usage": self._usage(self._result) if self._result else None,
        }

    def _usage(self, result: Generation) -> dict[str, Any]:
        output = len(result.tokens)
        return {
            "input_tokens": result.prompt_tokens,
            "input_tokens_details": {"cached_tokens": result.reused_tokens, "cache_write_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": min(self._reasoning_tokens, output)},
            "total_tokens": result.prompt_tokens + output,
        }


def _text_kind(item: dict[str, Any]) -> str:
    return "reasoning_text" if item["type"] == "reasoning" else "output_text"


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
