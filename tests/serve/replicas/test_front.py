"""Several replicas behind one front, in one process: answers as of one server, prefixes used, losses survived."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pocketmoe.serve.app import guarded
from pocketmoe.serve.replicas.front import Front, Lost, Told
from pocketmoe.serve.replicas.replica import Replica
from pocketmoe.serve.server import Server, ServeRequest, config_of, listen, url_of
from tests.hang import HANG_S
from tests.serve import client
from tests.serve.client import Running, request_for, running

KEY = "sesame"
CHAT = "/v1/chat/completions"


@dataclass
class Near:
    """A replica in this process. `broken`: it cannot be reached; "within": it breaks off after two messages."""

    replica: Replica
    broken: bool | str = False
    asked: int = 0
    ended: list[str] = field(default_factory=list)

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Told]:
        self.asked += scope["method"] == "POST"
        if self.broken is True:
            raise Lost
        async with contextlib.aclosing(self.replica.answer(scope, body)) as told:
            count = 0
            async for each in told:
                yield each
                count += each[0] == "message"
                if self.broken == "within" and count == 2:
                    raise Lost


@dataclass
class Behind(Running):
    """A front that runs, and what is behind it."""

    near: list[Near] = field(default_factory=list)
    front: Any = None
    url: str = ""

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@contextlib.contextmanager
def fronted(request: ServeRequest, replicas: int) -> Generator[Behind]:
    """A front and its replicas, in a thread, until the block ends."""
    lines: list[dict[str, Any]] = []
    listener = listen("127.0.0.1", 0)
    ready = threading.Event()

    def write(line: str) -> None:
        with client._logged:
            lines.append(json.loads(line))
            client._logged.notify_all()

    found = Behind(None, lines, url=url_of(listener))  # type: ignore[arg-type]

    async def serve() -> None:
        found.near = [Near(Replica(ServeRequest(request.bundles, request.load, port=0))) for _ in range(replicas)]
        loaded = [await near.replica.load() for near in found.near]
        found.front = Front(found.near, loaded[0].parallel, loaded[0].body_bytes, write)
        for index, each in enumerate(loaded):
            found.front.log(each.lines, index)
        server = Server(
            config_of(guarded(found.front, request.names, request.origins, request.keys), request), found.front
        )
        found.serving = server  # type: ignore[assignment]
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.005)
        ready.set()
        await serving
        for near in found.near:
            await near.replica.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(HANG_S)
    try:
        yield found
    finally:
        found.serving.stop()  # type: ignore[attr-defined]
        thread.join(HANG_S)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def behind(small: Path) -> Generator[Behind]:
    with fronted(request_for(small, keys=(KEY,)), 2) as found:
        yield found


@pytest.fixture(autouse=True)
def whole(behind: Behind) -> None:
    for near in behind.near:
        near.broken = False


def asked(text: str = "a b c", **more: Any) -> dict[str, Any]:
    return {
        "model": "small",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 6,
        "temperature": 0,
        **more,
    }


def post(server: Running, body: Any, path: str = CHAT) -> Any:
    return server.post(path, body, x_api_key=KEY)


def test_answers_are_those_of_one_server(behind: Behind, small: Path) -> None:
    """Whole, streamed and refused: status, text, tokens and errors are the same."""
    with running(request_for(small)) as one:
        for body in (asked(), asked(n=2), asked("a " * 500), asked(model="other"), b"{", {"model": "small"}):
            direct, through = one.post(CHAT, body), post(behind, body)
            assert through.status == direct.status
            if direct.status == 200:
                assert through.json["choices"] == direct.json["choices"]
            else:
                assert through.json == direct.json
        streams = [answer.events for answer in (one.post(CHAT, asked(stream=True)), post(behind, asked(stream=True)))]
        texts = [[event["choices"][0]["delta"] for event in events[:-1]] for events in streams]
        assert texts[0] == texts[1]
        assert streams[1][-1] == "[DONE]"
        assert behind.get("/v1/models", x_api_key=KEY).json["data"][0]["id"] == "small"


def test_the_front_is_guarded(behind: Behind) -> None:
    """Without the key nothing reaches a replica; nor does what is too large, or comes under a foreign name."""
    before = [near.asked for near in behind.near]
    assert behind.post(CHAT, asked()).status == 401
    assert behind.get("/metrics").status == 401
    assert post(behind, asked("x" * (2 << 20))).status == 413
    assert behind.post(CHAT, asked(), x_api_key=KEY, host="evil.example").status == 403
    assert [near.asked for near in behind.near] == before
    assert behind.get("/health").status == behind.get("/").status == 200


def test_a_conversation_stays_with_its_replica(behind: Behind) -> None:
    """Turns of a long text go to one replica, another text to the other one that does less."""
    chosen = []
    messages: list[dict[str, str]] = []
    for turn in range(4):
        messages += [{"role": "user", "content": f"{turn} " + "z" * 600}]
        before = [near.asked for near in behind.near]
        post(behind, asked(messages=messages))
        chosen += [index for index, near in enumerate(behind.near) if near.asked > before[index]]
        messages += [{"role": "assistant", "content": "y" * 600}]
    assert len(chosen) == 4
    assert len({*chosen}) == 1


def test_metrics_and_states_are_of_all(behind: Behind) -> None:
    """Each sample has its replica; memory and counts of the state are sums over both."""
    post(behind, asked())
    page = behind.get("/metrics", x_api_key=KEY)
    assert page.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(page.body.decode())}
    budgets = {sample.labels["replica"]: sample.value for sample in families["pocketmoe_memory_budget_bytes"].samples}
    assert {*budgets} == {"0", "1"}
    state = behind.get("/pocketmoe/state", x_api_key=KEY).json
    assert state["budget_bytes"] == sum(budgets.values())
    assert state["models"][0]["loaded"] is True
    generated = sum(sample.value for sample in families["pocketmoe_generated_tokens"].samples)
    assert generated > 0


def test_another_replica_answers_for_one_that_is_lost(behind: Behind) -> None:
    """Before its answer has begun nobody notices; where there is none left, that is told."""
    before = [near.asked for near in behind.near]
    expected = post(behind, asked("q" * 2000))
    (first,) = [near for near, count in zip(behind.near, before, strict=True) if near.asked > count]
    first.broken = True
    again = post(behind, asked("q" * 2000))
    assert (again.status, again.json.get("choices")) == (expected.status, expected.json.get("choices"))
    for near in behind.near:
        near.broken = True
    refused = post(behind, asked())
    assert (refused.status, refused.json["error"]["code"]) == (503, "replica_lost")
    assert int(refused.headers["retry-after"]) > 0


def test_an_answer_that_breaks_off_is_seen_to(behind: Behind) -> None:
    """A stream whose replica is lost ends without its end, so that no client takes the half for the whole."""
    for near in behind.near:
        near.broken = "within"
    with pytest.raises(http.client.IncompleteRead):
        post(behind, asked(stream=True))


def test_the_log_says_which_replica_answered(behind: Behind) -> None:
    """A line for each request, as of one server, with the replica's number."""
    name = post(behind, asked()).headers["x-request-id"]
    line = behind.wait_for(event="request", id=name)
    assert line["path"] == CHAT
    assert line["replica"] in (0, 1)
