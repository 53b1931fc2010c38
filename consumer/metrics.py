"""What the consumer does, for Prometheus, and whether it lives and is ready, for whoever keeps it running.

The service's loop hands over a `Status` now and then; a scrape, which runs in a thread of its own, reads the last one.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from socketserver import ThreadingMixIn
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Histogram, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from consumer.records import Question
from model.errors import UserError

PREFIX = "log_anomaly"

HANGS_AFTER_SECONDS = 300.0
"""A loop that has not come by for so long hangs; a call to Kafka or restoring a large partition takes less."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


@dataclass(frozen=True)
class PartitionStatus:
    """How an assigned partition stands; None where it is not known yet.

    Attributes:
        open_blocks: sessions that are open.
        watermark: largest event time, in milliseconds.
        lag: messages in the topic that have not been read.
        drift: how far each question is on its way to an alarm, which comes at 1.
        alarm: the question that raised the alarm.
    """

    open_blocks: int
    watermark: int | None
    lag: int | None
    drift: Mapping[Question, float]
    alarm: Question | None


@dataclass(frozen=True)
class Status:
    """How the service stands: `counts` by the name of the counter, partitions by number."""

    ready: bool = False
    counts: Mapping[str, int] = field(default_factory=dict)
    reloads: Mapping[str, int] = field(default_factory=dict)
    threshold: float = 0.0
    artifacts: Mapping[str, str] = field(default_factory=dict)
    partitions: Mapping[int, PartitionStatus] = field(default_factory=dict)


_COUNTERS = {
    "messages": "Messages read.",
    "looks": "Looks taken: scorings of a window, cached ones included.",
    "windows_scored": "Windows that went through the network; the other looks came from the cache.",
    "alerts": "Alerts published, revisions included.",
    "dead_letters": "Messages that could not be decoded.",
    "evicted_blocks": "Blocks closed early to make room for others.",
}


class Metrics:
    """Everything that is measured, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.status = Status()
        self._came_by = time.monotonic()
        self.batch_seconds = self._histogram("batch_seconds", "Decoding and judging of one batch of messages.")
        self.commit_seconds = self._histogram("commit_seconds", "Making alerts, windows and offsets durable.")
        self.restore_seconds = self._histogram("restore_seconds", "Restoring the windows of one partition.")
        self.registry.register(self)

    def beat(self) -> None:
        """Note that the loop came by."""
        self._came_by = time.monotonic()

    @property
    def lives(self) -> bool:
        """Whether the loop came by lately."""
        return time.monotonic() - self._came_by < HANGS_AFTER_SECONDS

    def collect(self) -> Iterator[Metric]:
        """Yield what the last status says; Prometheus' name for it."""
        status = self.status
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"{PREFIX}_{name}", text, value=status.counts.get(name, 0))
        reloads = CounterMetricFamily(
            f"{PREFIX}_reloads", "New models and thresholds, by what became of them.", labels=["outcome"]
        )
        for outcome in ("taken", "waiting", "refused"):
            reloads.add_metric([outcome], status.reloads.get(outcome, 0))
        yield reloads
        yield GaugeMetricFamily(f"{PREFIX}_threshold_nats", "Threshold in use.", value=status.threshold)
        yield InfoMetricFamily(f"{PREFIX}_artifacts", "Model and threshold in use.", value=dict(status.artifacts))
        yield from _partitions(status.partitions)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, buckets=_SECONDS, registry=self.registry)


def _partitions(partitions: Mapping[int, PartitionStatus]) -> Iterator[Metric]:
    def gauge(name: str, text: str, value: Callable[[PartitionStatus], float | None]) -> Metric:
        family = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=["partition"])
        for number, status in partitions.items():
            known = value(status)
            if known is not None:
                family.add_metric([str(number)], known)
        return family

    yield gauge("open_blocks", "Open blocks.", lambda status: status.open_blocks)
    yield gauge("lag_messages", "Messages that have not been read.", lambda status: status.lag)
    yield gauge(
        "watermark_timestamp_seconds",
        "Largest event time.",
        lambda status: None if status.watermark is None else status.watermark / 1000,
    )
    labels = ["partition", "question"]
    evidence = GaugeMetricFamily(f"{PREFIX}_drift_evidence_ratio", "Evidence of drift; alarm at 1.", labels=labels)
    alarm = GaugeMetricFamily(f"{PREFIX}_drift_alarm", "1 where the threshold no longer holds.", labels=labels)
    for number, status in partitions.items():
        for question, ratio in status.drift.items():
            evidence.add_metric([str(number), question], ratio)
            alarm.add_metric([str(number), question], float(status.alarm == question))
    yield evidence
    yield alarm


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
        """Log nothing: a scrape is no news."""


class MetricsServer:
    """Serves /metrics, /healthz and /readyz in a thread of its own.

    Args:
        metrics: what to serve.
        listen: host:port; port 0 takes any free one, which `address` tells.

    Raises:
        UserError: the address cannot be had.
    """

    def __init__(self, metrics: Metrics, listen: str) -> None:
        host, _, port = listen.rpartition(":")
        scrape = make_wsgi_app(metrics.registry)

        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "/")
            if path == "/metrics":
                return scrape(environ, start_response)
            answers = {"/healthz": metrics.lives, "/readyz": metrics.lives and metrics.status.ready}
            known = answers.get(path)
            status = {True: "200 OK", False: "503 Service Unavailable", None: "404 Not Found"}[known]
            start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
            return [status.partition(" ")[2].encode() + b"\n"]

        try:
            self._server = make_server(host, int(port), app, _Server, _Silent)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"metrics.listen: {listen} cannot be had ({getattr(error, 'strerror', None) or error}); name another "
                "port, each consumer on a machine needs its own, or null for no metrics"
            ) from None
        self.address = f"{host}:{self._server.server_port}"
        Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
