"""Two replicas in a Ray of our own: a conversation goes on where it began, each keeps to its budget."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.hang import HANG_S

REPOSITORY = Path(__file__).parents[3]
BUDGET = 400_000_000
SERVED = all(map(find_spec, ("ray", "grpc", "fastapi", "aiohttp")))


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=HANG_S) as response:
        return json.load(response)


@pytest.mark.slow
@pytest.mark.skipif(not SERVED, reason="Ray Serve is not installed: pip install 'ray[serve]'")
def test_two_replicas_answer_as_one_server(small: Path) -> None:
    """Turns of a conversation have one replica, two conversations have two; a signal ends all of it."""
    command = [
        "serve",
        small,
        "--memory",
        f"{BUDGET}B",
        "--ray",
        "local",
        "--replicas",
        "2",
        "--threads",
        "1",
        "--port",
        "0",
    ]
    environment = {**os.environ, "RAY_raylet_start_wait_time_s": str(int(HANG_S)), "PYTHONPATH": str(REPOSITORY)}
    server = subprocess.Popen(
        [sys.executable, "-m", "pocketmoe", *map(str, command)], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert server.stderr
    lines: list[str] = []
    try:
        url = ""
        while not url:
            line = server.stderr.readline()
            assert line, lines
            lines.append(line)
            found = re.search(r"^Serving small at (\S+)/v1", line)
            url = found[1] if found else ""
        loaded = [json.loads(line) for line in lines if line.startswith('{"time"')]
        assert sorted(line["replica"] for line in loaded if line["event"] == "loaded") == [0, 1]
        assert {line["budget"] for line in loaded if line["event"] == "loaded"} == {BUDGET}
        for start in ("a", "b"):
            messages: list[dict[str, str]] = []
            for _ in range(3):
                messages += [{"role": "user", "content": f"{start} c d " + " " * 600}]
                told = post(f"{url}/v1/chat/completions", {"model": "small", "messages": messages, "max_tokens": 4})
                assert told["usage"]["completion_tokens"] > 0
                messages += [{"role": "assistant", "content": "e " + " " * 600}]
        server.send_signal(signal.SIGTERM)
        _, rest = server.communicate(timeout=HANG_S)
        assert server.returncode == 0, rest
        asked = [json.loads(line) for line in rest.splitlines() if '"event": "request"' in line]
        chosen = [line["replica"] for line in asked if line["path"] == "/v1/chat/completions"]
        assert len(chosen) == 6
        assert [len({*chosen[:3]}), len({*chosen[3:]}), len({*chosen})] == [1, 1, 2]
    finally:
        server.kill()
        server.wait()
