"""One server for most tests of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.client import Running, request_for, running, write_bundle, write_speaker


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("serve") / "small")


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speaker(tmp_path_factory.mktemp("serve") / "speaker")


@pytest.fixture(scope="module")
def speaking(speaker: Path) -> Iterator[Running]:
    """A server whose model can be held to JSON and to calls of tools."""
    with running(request_for(speaker)) as server:
        yield server


@pytest.fixture(scope="module")
def server(small: Path) -> Iterator[Running]:
    with running(request_for(small)) as server:
        yield server
