"""Two replicas in a Ray of our own: a conversation goes on where it began, each keeps to its budget."""

from __future__ import annotations

import json
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.serve.replicas.cluster import Cluster
from tests.hang import HANG_S
from tests.serve.client import Running, request_for

CHAT = "/v1/chat/completions"


class Remote(Running):
    """Reached by its address alone."""

    url = ""

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@pytest.mark.skipif(
    not all(map(find_spec, ("ray", "fastapi", "aiohttp"))),
    reason="Ray Serve is not installed: pip install 'ray[serve]'",
)
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_replicas_answer_as_one_server(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are alike whoever gives them, turns of a conversation have one replica, and all ends cleanly."""
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", str(HANG_S))  # a busy machine is no fault
    lines: list[dict[str, Any]] = []
    request = request_for(small, memory=MemoryRequest.parse("400MB"))
    cluster = Cluster(request, "local", 2, lambda line: lines.append(json.loads(line)))
    ready, failed = threading.Event(), []

    def run() -> None:
        try:
            cluster.run(ready.set)
        except BaseException as error:  # noqa: BLE001 - told below
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(HANG_S)
    assert not failed
    server = Remote(None, lines)  # type: ignore[arg-type]
    server.url = cluster.url
    assert sorted(line["replica"] for line in lines if line["event"] == "loaded") == [0, 1]
    assert {line["budget"] for line in lines if line["event"] == "loaded"} == {400_000_000}
    texts = set()
    for start in ("a", "b"):
        messages: list[dict[str, str]] = []
        for _ in range(3):
            messages += [{"role": "user", "content": f"{start} c d " + " " * 600}]
            told = server.post(CHAT, {"model": "small", "messages": messages, "max_tokens": 4, "temperature": 0})
            assert told.status == 200
            messages += [{"role": "assistant", "content": "e " + " " * 600}]
            texts.add(told.json["choices"][0]["message"]["content"])
    asked = [line["replica"] for line in lines if line["event"] == "request"]
    assert len({*asked[:3]}) == len({*asked[3:]}) == 1
    assert texts
    streamed = server.post(CHAT, {"model": "small", "messages": messages[:1], "max_tokens": 4, "stream": True})
    assert streamed.events[-1] == "[DONE]"
    assert cluster.server
    cluster.server.stop()
    thread.join(HANG_S)
    assert not thread.is_alive()
    assert not failed
