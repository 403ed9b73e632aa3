"""Several models in one server: one is loaded at a time, no request is lost, and none waits for ever."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.errors import BadInput
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.memory.pressure import Pressure
from pocketmoe.serve import server as server_module
from pocketmoe.system.memory import process_bytes
from tests.hang import HANG_S
from tests.serve.client import Running, request_for, running, write_bundle
from tests.serve.gate import gate
from tests.serve.test_load import ask, until

PATH = "/v1/completions"
BODY: dict[str, Any] = {"prompt": "a b c", "max_tokens": 6}


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "other")


@pytest.fixture
def clients() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def states(server: Running) -> dict[str, str]:
    return {model["id"]: model["pocketmoe"]["state"] for model in server.get("/v1/models").json["data"]}


def test_models_take_turns(small: Path, other: Path, clients: ThreadPoolExecutor) -> None:
    """A request for another model waits for what runs, and goes before what came later for the loaded one."""
    with running(request_for(small, other, parallel=2)) as server:
        assert states(server) == {"small": "loaded", "other": "unloaded"}
        with gate(server) as held:
            first = ask(server, clients, model="small")
            held.wait()
            second = ask(server, clients, model="other")
            until(server, running=1, waiting=1)
            third = ask(server, clients, model="small")
            until(server, running=1, waiting=2)
        answers = [each.result().json for each in (first, second, third)]
        assert [answer["model"] for answer in answers] == ["small", "other", "small"]
        assert answers[0]["choices"] == answers[1]["choices"] == answers[2]["choices"]
        order = [line["model"] for line in server.lines if line["event"] == "loaded"]
        assert order == ["small", "other", "small"]
        assert states(server) == {"small": "loaded", "other": "unloaded"}


def test_a_model_that_nobody_asks_is_unloaded(small: Path) -> None:
    """Its memory is given back; the next request loads it again, and gets the same answer."""
    with running(request_for(small, idle_unload_s=0.05)) as server:
        first = server.post(PATH, {**BODY, "model": "small"}).json["choices"]
        server.wait_for(event="unloaded")
        assert server.get("/ready").status == 200
        assert server.get("/pocketmoe/state").json["claims"] == {}
        assert server.post(PATH, {**BODY, "model": "small"}).json["choices"] == first


def test_a_model_that_cannot_be_loaded_is_an_error_of_its_own(small: Path, other: Path) -> None:
    """Damaged, gone, or no bundle any more: its request is told so, a line of the log says why, and the other model
    goes on; once there is a bundle again it is served."""
    with running(request_for(small, other)) as server:
        for change, why in (
            (lambda: shutil.rmtree(other / "graphs"), "graphs"),
            (lambda: shutil.rmtree(other), "other"),
            (lambda: other.write_text("a file"), "other"),
        ):
            change()
            found = server.post(PATH, {**BODY, "model": "other"})
            assert (found.status, found.json["error"]["code"]) == (503, "model_unavailable")
            assert str(other) not in found.body.decode()
            line = server.wait_for(event="request", status=503)
            assert why in line["error"]
            assert "Traceback" not in line["error"]
            assert server.post(PATH, {**BODY, "model": "small"}).status == 200
        other.unlink()
        write_bundle(other)
        assert server.post(PATH, {**BODY, "model": "other"}).status == 200
        assert not [line for line in server.lines if line["event"] in ("failure", "library")]


def test_a_bundle_that_goes_while_it_is_loaded_is_still_answered(other: Path) -> None:
    """What is loaded stays loaded, whatever becomes of its directory."""
    with running(request_for(other)) as server:
        first = server.post(PATH, {**BODY, "model": "other"}).json["choices"]
        other.rename(other.with_name("elsewhere"))
        assert server.post(PATH, {**BODY, "model": "other"}).json["choices"] == first


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of three bundles, within a budget."""
    root = tmp_path_factory.mktemp("three")
    plenty = process_bytes() + 400 * 10**6
    bundles = [write_bundle(root / name) for name in ("one", "two", "three")]
    with running(request_for(*bundles, memory=MemoryRequest(total_bytes=plenty))) as server:
        yield server


@settings(max_examples=6, deadline=None)
@given(order=st.lists(st.sampled_from(["one", "two", "three"]), min_size=1, max_size=5))
def test_three_models_in_any_order(three: Running, order: list[str]) -> None:
    """One at a time is loaded, anew only where another was asked for before."""
    before = next(name for name, state in states(three).items() if state == "loaded")
    three.lines.clear()
    answers = [three.post(PATH, {**BODY, "model": name}).json for name in order]
    assert [answer["model"] for answer in answers] == order
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1  # they are the same bundle
    changes = [name for last, name in pairwise([before, *order]) if last != name]
    assert [line["model"] for line in three.lines if line["event"] == "loaded"] == changes
    assert states(three) == {name: "loaded" if name == order[-1] else "unloaded" for name in ("one", "two", "three")}
    assert three.get("/pocketmoe/state").json["peak_bytes"] > 0


def test_the_end_does_not_wait_for_a_model_that_nobody_wants(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to end while its first model is being packed, a server ends; nothing but that is in its log."""
    packing = threading.Event()

    def pack_for_ever(_path: Path, _load: Any, progress: Any) -> None:
        while True:
            packing.set()
            progress("packing experts", 0, 1)

    monkeypatch.setattr(server_module, "Model", pack_for_ever)
    lines: list[str] = []
    serving = server_module.Serving(replace(request_for(small), port=0), lines.append)
    thread = threading.Thread(target=serving.run)
    thread.start()
    assert packing.wait(HANG_S)
    serving.server.stop()
    thread.join(HANG_S)
    assert not thread.is_alive()
    assert lines == []


def test_what_cannot_be_served_is_said_before_there_is_a_server(small: Path, tmp_path: Path) -> None:
    """No bundle, a context that the model has not, an address that is taken."""
    for request in (request_for(tmp_path / "nothing"), request_for(small, host="203.0.113.7")):
        with pytest.raises(BadInput), running(request):
            pass


def test_an_elastic_budget_gives_way_and_comes_back(
    small: Path, monkeypatch: pytest.MonkeyPatch, clients: ThreadPoolExecutor
) -> None:
    """While the system is short of memory the model has less, and stays loaded; no answer changes, and none is lost."""
    plenty = process_bytes() + 400 * 10**6  # the budget is the whole process's, and this one has run other tests
    told = {"pressure": Pressure(0.0, 0, 0)}
    monkeypatch.setattr(server_module, "ELASTIC_S", 0.02)
    monkeypatch.setattr(server_module, "read_pressure", lambda: told["pressure"])
    request = request_for(small, memory=MemoryRequest(total_bytes=plenty), elastic=True)
    with running(request) as server:
        body = {**BODY, "model": "small"}
        first = server.post(PATH, body).json["choices"]
        with gate(server) as held:
            under_way = clients.submit(server.post, PATH, body)
            held.wait()
            told["pressure"] = Pressure(0.9, 0, 0)
        budget = server.wait_for(event="resized")["budget_bytes"]
        assert budget < plenty
        assert under_way.result().json["choices"] == first
        assert server.post(PATH, body).json["choices"] == first
        told["pressure"] = Pressure(0.0, 10**9, 10**9)
        while budget < plenty:
            budget = server.wait_for(event="resized")["budget_bytes"]
        assert server.post(PATH, body).json["choices"] == first
        assert len([line for line in server.lines if line["event"] == "loaded"]) == 1
    assert server.serving.peak_and_budget  # not judged: in this process other tests have left theirs
