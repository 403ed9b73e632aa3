"""What /metrics tells, in Prometheus' format and a registry of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from pocketmoe.runtime.conversation import Generation

disable_created_metrics()  # a second number beside each, which hardly anybody reads

_FIRST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.4, 0.8, 2, 5)
CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"


class Metrics:
    """Counters and histograms; gauges are read when they are asked for."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels: dict[str, Any] = {"registry": self.registry, "namespace": "pocketmoe"}
        self._requests = Counter("requests", "Requests, by path and status", ["path", "status"], **labels)
        self._refused = Counter("refused", "Requests refused before any work, by why", ["reason"], **labels)
        self._gone = Counter("clients_gone", "Clients that went away before their answer was complete", **labels)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts", ["model"], **labels)
        self._reused = Counter("reused_tokens", "Tokens of prompts that were not computed again", ["model"], **labels)
        self._generated = Counter("generated_tokens", "Tokens of answers", ["model"], **labels)
        self._read = Counter("expert_bytes_read", "Bytes of experts read from disk", ["model"], **labels)
        self._queue_s = Histogram("queue_seconds", "Until a place was free", buckets=_FIRST_S, **labels)
        self._first_s = Histogram(
            "first_token_seconds", "From place to first token", ["model"], buckets=_FIRST_S, **labels
        )
        self._token_s = Histogram("token_seconds", "A token after the first", ["model"], buckets=_TOKEN_S, **labels)
        self._hit_rate = Gauge(
            "expert_hit_rate", "Of the last answer's experts, in memory when wanted", ["model"], **labels
        )

    def gauge(self, name: str, about: str, read: Callable[[], float]) -> None:
        """Something to be looked at when it is asked for."""
        Gauge(name, about, registry=self.registry, namespace="pocketmoe").set_function(read)

    def answered(self, model: str, result: Generation) -> None:
        """An answer is complete, or as complete as it was wanted."""
        self._prompt.labels(model).inc(result.prompt_tokens)
        self._reused.labels(model).inc(result.reused_tokens)
        self._generated.labels(model).inc(len(result.tokens))
        self._read.labels(model).inc(result.bytes_read)
        self._first_s.labels(model).observe(result.ttft_s)
        if result.decode_tokens_per_s:
            self._token_s.labels(model).observe(1 / result.decode_tokens_per_s)
        if result.expert_hit_rate is not None:
            self._hit_rate.labels(model).set(result.expert_hit_rate)

    def done(self, path: str, status: int, reason: str | None) -> None:
        """A request is over; `reason`: the code with which it was refused."""
        self._requests.labels(path, str(status)).inc()
        if reason:
            self._refused.labels(reason).inc()

    def waited(self, seconds: float) -> None:
        self._queue_s.observe(seconds)

    def client_gone(self) -> None:
        self._gone.inc()

    def page(self) -> bytes:
        """All of it, as text."""
        return generate_latest(self.registry)
