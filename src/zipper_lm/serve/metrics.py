"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a registry of their own.

    Args:
        pending: documents that wait or are being written now.
    """

    def __init__(self, pending: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "zipper", "registry": self.registry}
        self.requests = Counter("requests", "Requests that ended, by route and status.", ["route", "status"], **own)
        self.seconds = Histogram("request_seconds", "Seconds that requests took.", ["route"], buckets=_SECONDS, **own)
        self.first = Histogram(
            "first_output_seconds", "Seconds until the first token or sound of a request.", buckets=_SECONDS, **own
        )
        self.tokens = Counter("tokens", "Tokens written, by modality.", ["modality"], **own)
        self.sound = Counter("sound_seconds", "Seconds of sound, by whether it was read or written.", ["kind"], **own)
        self.cancelled = Counter("cancelled", "Documents whose clients went away.", **own)
        Gauge("documents", "Documents that wait or are being written.", **own).set_function(pending)

    def request(self, route: str, status: int, seconds: float) -> None:
        """One request ended."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def page(self) -> bytes:
        """Everything, in Prometheus's text format."""
        return generate_latest(self.registry)
