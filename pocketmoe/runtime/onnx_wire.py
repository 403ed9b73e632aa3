"""Reads, and changes, where a saved ONNX model keeps its initializers' bytes, without the onnx package.

The runtime needs this of the models that ONNX Runtime writes for it, and no more; importing onnx for it would add
15 MB to every process. Field numbers are those of onnx.proto (ModelProto.graph = 7, GraphProto.initializer = 5,
TensorProto.name = 8, .external_data = 13; StringStringEntryProto.key = 1, .value = 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Span(NamedTuple):
    """Bytes of the external data file: `packed` ones replace those of the initializer they were made from."""

    initializer: str
    offset: int
    nbytes: int
    packed: bool


def external_spans(model: bytes) -> list[Span]:
    """The external data of every initializer of the main graph, in file order.

    A packed initializer has one span for each packed buffer; its plain bytes are dead once a session exists.
    Raises ValueError for an initializer that is stored inside the model.
    """
    spans = []
    for graph in _fields(memoryview(model), 7):
        for initializer in _fields(graph, 5):
            name = _text(initializer, 8)
            entries = {_text(entry, 1): _text(entry, 2) for entry in _fields(initializer, 13)}
            if "offset" not in entries:
                raise ValueError(f"initializer {name} has no external data")
            spans.extend(_packed_spans(name, entries) or [_plain_span(name, entries)])
    return sorted(spans, key=lambda span: span.offset)


def with_offsets(model: bytes, moved: Callable[[int], str]) -> bytes:
    """The model with the external data of its main graph's initializers, plain and packed, at `moved(offset)`.

    That is a number in decimal, which may begin with zeros.
    """

    def entry(message: memoryview) -> bytes:
        key, value = _text(message, 1), _text(message, 2)
        if key == "offset":
            value = moved(int(value))
        elif key.startswith("prepacked_"):
            name, *buffers = value.split("|")
            parts = (buffer.split(";") for buffer in buffers)
            value = "|".join([name, *(";".join([moved(int(offset)), *rest]) for offset, *rest in parts)])
        return _rewritten(message, 2, lambda _: value.encode())

    def initializer(message: memoryview) -> bytes:
        return _rewritten(message, 13, entry)

    return _rewritten(memoryview(model), 7, lambda graph: _rewritten(graph, 5, initializer))


def _plain_span(name: str, entries: dict[str, str]) -> Span:
    return Span(name, int(entries["offset"]), int(entries["length"]), packed=False)


def _packed_spans(name: str, entries: dict[str, str]) -> list[Span]:
    """`prepacked_N` = key "|" offset ";" length ";" padding, repeated for each buffer of the packed weight."""
    spans = []
    for key, value in entries.items():
        if key.startswith("prepacked_"):
            for buffer in value.split("|")[1:]:
                offset, nbytes, _padding = buffer.split(";")
                spans.append(Span(name, int(offset), int(nbytes), packed=True))
    return spans


def _text(message: memoryview, number: int) -> str:
    return bytes(next(_fields(message, number), memoryview(b""))).decode()


def _fields(message: memoryview, number: int) -> Iterator[memoryview]:
    """The length-delimited fields of that number in a protobuf message."""
    return (payload for found, _, payload in _all_fields(message) if found == number and payload is not None)


def _rewritten(message: memoryview, number: int, change: Callable[[memoryview], bytes]) -> bytes:
    """The message with its length-delimited fields of that number changed."""
    parts: list[bytes | memoryview] = []
    for found, field, payload in _all_fields(message):
        if found == number and payload is not None:
            changed = change(payload)
            parts += [_to_varint(number << 3 | _BYTES), _to_varint(len(changed)), changed]
        else:
            parts.append(field)
    return b"".join(parts)


def _all_fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview | None]]:
    """Each field's number, its bytes as they are, and its payload where it is length-delimited."""
    position = 0
    while position < len(message):
        start, payload = position, None
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == _BYTES:
            nbytes, position = _varint(message, position)
            payload = message[position : position + nbytes]
            position += nbytes
        elif kind == _VARINT:
            _, position = _varint(message, position)
        elif kind in (_FIXED32, _FIXED64):
            position += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"protobuf wire type {kind}")
        yield tag >> 3, message[start:position], payload


def _to_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
