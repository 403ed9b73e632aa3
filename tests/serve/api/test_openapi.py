"""The description of the APIs, beside what they do."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from pocketmoe.serve.api.openapi import REQUESTS
from tests.serve.client import Running
from tests.serve.test_refusals import READERS

PATHS = dict(zip(REQUESTS, READERS.values(), strict=True))


@pytest.fixture(scope="module")
def description(server: Running) -> dict[str, Any]:
    return server.get("/openapi.json").json


def test_every_path_is_described(server: Running, description: dict[str, Any]) -> None:
    """And every path that is described is there."""
    routes = {route.path for route in server.serving.server.config.app.routes}  # type: ignore[union-attr]
    undescribed = {"/", "/openapi.json", "/v1/models/{name:path}"}
    assert set(description["paths"]) == routes - undescribed
    for path, methods in description["paths"].items():
        for method in methods:
            assert server.send(method.upper(), path, b"", {"content-type": "application/json"}).status in (200, 400)


@pytest.mark.parametrize("path", PATHS)
def test_the_schemas_allow_what_is_answered(server: Running, description: dict[str, Any], path: str) -> None:
    """A request that is answered keeps to its schema; one with a wrong or unknown field does not."""
    wanted = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator = Draft202012Validator({**wanted, "components": description["components"]})
    assert validator.is_valid(PATHS[path])
    assert server.post(path, PATHS[path]).status == 200
    for wrong in ({"unknown": 1}, {"model": 7}, {"model": ""}):
        assert not validator.is_valid({**PATHS[path], **wrong})
        assert server.post(path, {**PATHS[path], **wrong}).status == 400
    Draft202012Validator.check_schema(json.loads(json.dumps(wanted)))
