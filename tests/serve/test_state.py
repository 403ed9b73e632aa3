"""What is looked at: models, the page, the machine's state, metrics."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests import runnable
from tests.serve.client import Running


def test_the_state_follows_the_answers(server: Running) -> None:
    """Memory adds up to the budget's claims; experts that were used are counted, tokens and hits grow with answers."""
    before = server.get("/pocketmoe/state").json
    answer = server.post("/v1/completions", {"model": "small", "prompt": "a b c d", "max_tokens": 10}).json
    after = server.get("/pocketmoe/state").json
    assert 0 < after["used_bytes"] <= after["peak_bytes"] <= after["budget_bytes"]
    assert sum(after["claims"].values()) <= after["budget_bytes"]
    assert after["claims"]["beside the engine"] >= server.serving.request.beside_bytes(64)  # and schemas
    (model,) = after["models"]
    assert (model["id"], model["loaded"]) == ("small", True)
    assert [len(layer) for layer in model["resident"]] == [runnable.EXPERTS] * runnable.LAYERS
    used = [sum(layer) for layer in model["uses"]]
    tokens = answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"] - 1
    earlier = [sum(layer) for layer in before["models"][0]["uses"]]
    assert [now - then for now, then in zip(used, earlier, strict=True)] == [runnable.TOP_K * tokens] * runnable.LAYERS
    assert all(set(layer) <= {"0", "1"} and "1" in layer for layer in model["resident"])
    assert model["counts"]["tokens"] - before["models"][0]["counts"]["tokens"] == 9
    assert (after["running"], after["waiting"]) == (0, 0)


def test_models_and_health(server: Running) -> None:
    """The list, one of it by name, and what is not there."""
    (model,) = server.get("/v1/models").json["data"]
    assert model == server.get("/v1/models/small").json
    assert (model["id"], model["object"], model["max_model_len"]) == ("small", "model", 64)
    assert model["pocketmoe"] == {"chat": True, "state": "loaded"}
    missing = server.get("/v1/models/other")
    assert (missing.status, missing.json["error"]["code"]) == (404, "model_not_found")
    assert server.get("/health").status == server.get("/ready").status == 200
    page = server.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert server.send("POST", "/health", b"", {}).status == 405
    assert server.get("/nothing").json["error"]["code"] == "not_found"


def test_metrics_count_what_was_answered(server: Running) -> None:
    """In Prometheus' own format: tokens, histograms, refusals, memory."""

    def read() -> dict[str, float]:
        text = server.get("/metrics").body.decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {f"{sample.name}{sorted(sample.labels.items())}": sample.value for sample in samples}

    before = read()
    server.post("/v1/completions", {"model": "small", "prompt": "a b c", "max_tokens": 6})
    server.post("/v1/completions", {"model": "small", "prompt": 7})
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    model = [("model", "small")]
    assert grown(f"pocketmoe_prompt_tokens_total{model}") == 3
    assert grown(f"pocketmoe_generated_tokens_total{model}") == 6
    assert grown(f"pocketmoe_first_token_seconds_count{model}") == 1
    assert grown(f"pocketmoe_token_seconds_count{model}") == 1
    assert grown("pocketmoe_refused_total[('reason', 'invalid_type')]") == 1
    assert grown("pocketmoe_requests_total[('path', '/v1/completions'), ('status', '400')]") == 1
    assert 0 < after["pocketmoe_memory_peak_bytes[]"] <= after["pocketmoe_memory_budget_bytes[]"]
    assert not any("created" in name for name in after)
