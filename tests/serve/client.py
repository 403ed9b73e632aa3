"""A server in a thread of this process, and what is sent to it: whole requests, or bytes that are none."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
from onnx import numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pocketmoe.bundle.manifest import MANIFEST, read_manifest, seal
from pocketmoe.runtime.model import LoadRequest
from pocketmoe.serve.server import ServeRequest, Serving
from tests import runnable
from tests.hang import HANG_S

TEMPLATE = (
    "{% for message in messages %}{{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}{{ 'h' if shout else 'g' }}{% endif %}"
)


def write_bundle(root: Path) -> Path:
    """The smallest bundle that runs, with a chat template: its words are a to h, its context 64 tokens."""
    runnable.write_bundle(root)
    runnable.put(root, "tokenizer/chat_template.jinja", TEMPLATE.encode())
    return root


SPEAKING = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% for message in messages %}"
    "<{{ message.role }}>{{ message.reasoning_content or '' }}{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}\n"
    "{% endfor %}<assistant{{ reasoning_effort or '' }}>"
)


def write_speaker(root: Path) -> Path:
    """The same with bytes for words, a context of 2048, and a template that knows tools: it can be held to JSON."""
    runnable.write_bundle(root)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    changed = runnable.graphs()
    table = numpy_helper.from_array(runnable.weights(2, len(alphabet), runnable.WIDTH), "table")
    head = numpy_helper.from_array(runnable.weights(4, runnable.WIDTH, len(alphabet)), "head")
    for name, weight in ((runnable.SEGMENTS[0], table), (runnable.SEGMENTS[2], head)):
        graph = changed[name].graph
        (place,) = [each for each in graph.initializer if each.name == weight.name]
        place.CopyFrom(weight)
        for output in graph.output:
            if output.name == "logits":
                output.type.tensor_type.shape.dim[2].dim_value = len(alphabet)
        runnable.put(root, name, changed[name].SerializeToString())
    whole = read_manifest(root / MANIFEST)
    model = msgspec.structs.replace(whole.model, vocab_size=len(alphabet), context_length=2048)
    (root / MANIFEST).write_bytes(seal(msgspec.structs.replace(whole, model=model)))
    runnable.put(root, "tokenizer/tokenizer.json", tokenizer.to_str().encode())
    runnable.put(root, "tokenizer/chat_template.jinja", SPEAKING.encode())
    return root


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The data of server-sent events; "[DONE]" as it is."""
        found = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in found]


@dataclass
class Running:
    """A server that runs, and the lines it has logged."""

    serving: Serving
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.serving.url.rpartition(":")[2])

    def post(self, path: str, value: Any, **headers: str) -> Answer:
        """Send JSON; bytes are sent as they are."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        return self.send("POST", path, body, {"content-type": "application/json", **headers})

    def get(self, path: str, **headers: str) -> Answer:
        return self.send("GET", path, None, headers)

    def send(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG_S)
        with contextlib.closing(connection):
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def raw(self, data: bytes, end: bool = True) -> bytes:
        """Send bytes, and all that comes back until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=HANG_S) as connection:
            with contextlib.suppress(OSError):  # it has closed already
                connection.sendall(data)
                if end:
                    connection.shutdown(socket.SHUT_WR)
            found = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := connection.recv(1 << 16):
                    found += piece
            return found

    def wait_for(self, **fields: Any) -> dict[str, Any]:
        """The next line of the log that has these fields; each is found once."""
        with _logged:
            found: list[dict[str, Any]] = []

            def look() -> bool:
                found[:] = [line for line in self.lines if fields.items() <= line.items()]
                return bool(found)

            assert _logged.wait_for(look, HANG_S)
            self.lines.remove(found[0])
            return found[0]


_logged = threading.Condition()


@contextlib.contextmanager
def running(request: ServeRequest) -> Generator[Running]:
    """Serve in a thread, on a port that is free, until the block ends."""
    lines: list[dict[str, Any]] = []

    def write(line: str) -> None:
        with _logged:
            lines.append(json.loads(line))
            _logged.notify_all()

    serving = Serving(replace(request, port=0), write)
    ready, failed = threading.Event(), []

    def run() -> None:
        try:
            serving.run(ready.set)
        except BaseException as error:  # noqa: BLE001 - told where the server was wanted
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(HANG_S)
        if failed:
            raise failed[0]
        yield Running(serving, lines)
    finally:
        serving.server.stop()
        thread.join(HANG_S)
        assert not thread.is_alive()


def request_for(*roots: Path, memory: Any = None, **options: Any) -> ServeRequest:
    """Serve these bundles, by the names of their directories."""
    return ServeRequest({root.name: root for root in roots}, LoadRequest(memory), **options)
