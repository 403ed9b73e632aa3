"""What deploy/ holds fits the server: its options, its metrics, its exit codes, its times; and gives nothing away."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from pocketmoe.cli import main
from pocketmoe.errors import BadInput, BudgetTooSmall
from pocketmoe.runtime.model import LoadRequest
from tests import runnable
from tests.hang import HANG_S

pytest.importorskip("uvicorn")

from pocketmoe.serve.server import ServeRequest, Serving

REPOSITORY = Path(__file__).parents[1]
DEPLOY = REPOSITORY / "deploy"
UNIT = DEPLOY / "pocketmoe.service"
BOARDS = sorted((DEPLOY / "grafana/dashboards").glob("*.json"))


def read_yaml(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, with lines that go on joined."""
    text = re.sub(r"\\\n\s*", "", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def unit() -> dict[str, list[str]]:
    """The settings of the unit's sections, each with all its values."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Each call of `pocketmoe` in deploy/ and its page: where it stands, and its arguments."""
    found = dict(instructions())
    yield "Dockerfile", [*json.loads(found["ENTRYPOINT"]), *json.loads(found["CMD"])][1:]
    yield "compose.yaml", read_yaml("compose.yaml")["services"]["pocketmoe"]["command"]
    yield "pocketmoe.service", shlex.split(unit()["ExecStart"][0].removesuffix("$POCKETMOE_OPTIONS"))[1:]
    page = (REPOSITORY / "docs/DEPLOY.md").read_text(encoding="utf-8")
    for line in re.findall(r"^ *(?:sudo (?:-u \w+ )?)?(?:/opt/pocketmoe/bin/)?pocketmoe (.+)$", page, re.MULTILINE):
        yield f"DEPLOY.md: {line}", shlex.split(line, comments=True)
    for line in re.findall(r"^ *docker run [^\n]* pocketmoe (serve .+)$", page.replace("\\\n", ""), re.MULTILINE):
        yield f"DEPLOY.md: {line}", shlex.split(line, comments=True)


def test_every_option_that_is_used_exists() -> None:
    """Command lines are understood by the command line itself; one with a wrong option is not."""
    found = [*command_lines()]
    assert len(found) > 4
    for where, arguments in found:
        with main.make_context("pocketmoe", [*arguments], resilient_parsing=False) as context:
            name, command, rest = main.resolve_command(context, [*arguments])
            assert command, where
            command.make_context(name, rest, parent=context)
    with main.make_context("pocketmoe", ["serve"]) as context, pytest.raises(click.NoSuchOption):
        main.commands["serve"].make_context("serve", ["x", "--no-such-option"], parent=context)


def metric_names(server: Serving) -> set[str]:
    """What Prometheus calls the series of a server's registry."""
    ends = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    return {family.name + end for family in server.metrics.registry.collect() for end in ends[family.type]}


@pytest.fixture
def server(tmp_path: Path) -> Serving:
    """One that is not run."""
    runnable.write_bundle(tmp_path / "B")
    return Serving(ServeRequest({"b": tmp_path / "B"}, LoadRequest(), port=0), lambda _: None, listens=False)


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.stem)
def test_every_metric_of_a_board_is_one_that_the_server_tells(board: Path, server: Serving) -> None:
    """And each that the server tells is on the board. Panels do not overlap, and ask the one source that there is."""
    text = board.read_text(encoding="utf-8")
    panels = json.loads(text)["panels"]
    asked = {
        name for panel in panels for each in panel["targets"] for name in re.findall(r"pocketmoe_\w+", each["expr"])
    }
    known = metric_names(server)
    assert asked <= known
    told = {re.sub("_(bucket|sum|count)$", "", name) for name in known}
    assert told == {re.sub("_(bucket|sum|count)$", "", name) for name in asked}
    (source,) = read_yaml("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert {*re.findall(r'"uid": "(pocketmoe-\w+)"', text)} == {source["uid"]}
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len({*cells})
    assert max(x for x, _ in cells) < 24


def test_the_image_is_small_pinned_and_not_roots() -> None:
    """Two stages of one slim base with a version, a numbered user at the end, a health check, no shell around it."""
    found = instructions()
    bases = [rest.split()[0] for name, rest in found if name == "FROM"]
    assert len(bases) == 2
    assert len({*bases}) == 1
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", bases[0])
    last_stage = found[max(at for at, (name, _) in enumerate(found) if name == "FROM") :]
    users = [rest for name, rest in last_stage if name == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    names = [name for name, _ in last_stage]
    assert names.index("USER") > max(at for at, name in enumerate(names) if name in {"RUN", "COPY"})
    for name, rest in found:
        assert name != "ADD"
        assert name not in {"ENTRYPOINT", "CMD"} or isinstance(json.loads(rest), list)
        assert name not in {"ENV", "ARG"} or not re.search("KEY|TOKEN|SECRET|PASSWORD", rest)
    assert "/health" in dict(last_stage)["HEALTHCHECK"]


def test_only_what_the_image_needs_is_sent_to_its_build() -> None:
    """What is copied is there, and let through by the ignore file; nothing else is."""
    rules = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        name for kind, rest in instructions() if kind == "COPY" and "--from" not in rest for name in rest.split()[:-1]
    }
    assert copied == allowed
    assert all((REPOSITORY / name).exists() for name in copied)
    assert not any(fnmatch(f"deploy/secrets/{name}", rule) for name in ("api_key",) for rule in allowed)


def test_services_are_pinned_confined_and_not_open_to_the_network() -> None:
    """Versions, no capabilities, ports of this machine alone, shared memory as large as memory, files that exist."""
    compose = read_yaml("compose.yaml")
    services = compose["services"]
    assert {*services} == {"pocketmoe", "prometheus", "grafana"}
    for name, service in services.items():
        assert re.search(r":(v?\d+\.\d+\.\d+|local)$", service["image"]), name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "cap_add", "network_mode", "pid", "devices"} & {*service}
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for volume in service["volumes"]:
            source = re.sub(r"\$\{[^}]*\}", "variable", volume).split(":")[0]
            assert source in compose["volumes"] or source == "variable" or (DEPLOY / source).exists(), volume
    server = services["pocketmoe"]
    assert server["mem_limit"] == server["memswap_limit"] == server["shm_size"]
    assert server["read_only"] is True
    assert server["ulimits"]["memlock"] == -1


def test_prometheus_is_let_in() -> None:
    """It asks by a name that the server is told to know, with the key that the server is given."""
    (job,) = read_yaml("prometheus.yml")["scrape_configs"]
    ((target,),) = [each["targets"] for each in job["static_configs"]]
    host, _, port = target.partition(":")
    server = read_yaml("compose.yaml")["services"]["pocketmoe"]
    assert f"--allow-host={host}" in server["command"]
    assert port == str(ServeRequest.port) == dict(instructions())["EXPOSE"]
    key = job["authorization"]["credentials_file"]
    assert f"--api-key-file={key}" in server["command"]
    assert key == f"/run/secrets/{server['secrets'][0]}"


def test_no_key_is_in_the_repository() -> None:
    """The file of keys is ignored by git, and does not stand in what git knows."""
    place = DEPLOY / read_yaml("compose.yaml")["secrets"]["api_key"]["file"]
    ignored = (REPOSITORY / ".gitignore").read_text(encoding="utf-8").split()
    assert f"{place.parent.resolve().relative_to(REPOSITORY)}/" in ignored


def test_answers_have_the_time_to_end() -> None:
    """Who stops the server waits longer than it lets running answers take."""
    drain_s = ServeRequest.drain_s
    grace = read_yaml("compose.yaml")["services"]["pocketmoe"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > drain_s
    assert int(unit()["TimeoutStopSec"][0]) > drain_s


def test_the_unit_tries_again_only_what_may_mend_itself() -> None:
    """Not usage, bad input, or a budget that cannot be met."""
    codes = {click.UsageError.exit_code, BadInput.exit_code, BudgetTooSmall.exit_code}
    assert {*map(int, unit()["RestartPreventExitStatus"][0].split())} == codes


def test_the_unit_is_one_that_systemd_takes_and_finds_confined(tmp_path: Path) -> None:
    """No unknown setting, no warning, an exposure of at most 2 of 10; the server's memory cannot be swapped out."""
    settings = unit()
    assert settings["MemorySwapMax"] == ["0"]
    assert settings["LimitMEMLOCK"] == ["infinity"]
    assert settings["User"] == ["pocketmoe"]
    assert settings["NoNewPrivileges"] == ["yes"]
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    here = tmp_path / UNIT.name
    here.write_text(UNIT.read_text().replace("/opt/pocketmoe/bin/pocketmoe", sys.executable))
    for arguments in (["verify"], ["security", "--offline=true", "--threshold=20"]):
        done = subprocess.run(
            [analyze, *arguments, str(here)], capture_output=True, text=True, timeout=HANG_S, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert not done.stderr, arguments
