"""A hub on this machine, and this process as one that uses it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.server import OWNER, WritableHub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    """An empty hub, an empty cache in `tmp_path / "cache"`, and its owner's token.

    huggingface_hub has read its settings by now: they are set where it keeps them.
    """
    from huggingface_hub import constants

    hub = WritableHub()
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", OWNER)
    monkeypatch.setenv("NO_PROXY", "*")
    yield hub
    hub.shutdown()
    hub.server_close()
