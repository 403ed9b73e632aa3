"""One server for most tests of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.client import Running, request_for, running, write_bundle


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("serve") / "small")


@pytest.fixture(scope="module")
def server(small: Path) -> Iterator[Running]:
    with running(request_for(small)) as server:
        yield server
