"""What the consumer does, in numbers for Prometheus, and whether it lives.

The service's loop hands over a `Status` now and then; a scrape, which runs in a thread of its own, reads the last one.
`consumer.web` serves it.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from consumer.records import Question

PREFIX = "log_anomaly"

HANGS_AFTER_SECONDS = 300.0
"""A loop that has not come by for so long hangs; a call to Kafka or restoring a large partition takes less."""

OUTCOMES = ("taken", "waiting", "refused")
"""What became of new models and thresholds."""

_MESSAGES = (1, 10, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 100_000, 1_000_000)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


@dataclass(frozen=True)
class PartitionStatus:
    """How an assigned partition stands; None where it is not known yet.

    Attributes:
        open_blocks: sessions that are open.
        watermark: largest event time, in milliseconds.
        lag: messages in the topic that have not been read.
        catch_up: messages to take in once more, without alerting, before the partition is restored.
        drift: how far each question is on its way to an alarm, which comes at 1.
        alarm: the question that raised the alarm.
    """

    open_blocks: int
    watermark: int | None
    lag: int | None
    catch_up: int
    drift: Mapping[Question, float]
    alarm: Question | None


@dataclass(frozen=True)
class Status:
    """How the service stands.

    Attributes:
        ready: whether it judges what comes in: it is in its group, and its partitions are restored.
        counts: by the name of the counter.
        alerts: published, by severity.
        dead_letters: by the kind of their reason, `consumer.letters.KINDS`.
        reloads: by outcome.
        levels: the threshold of each severity in nats, ascending; alerts begin at the first.
        scores: looks by the level of their score (`consumer.drift.levels`).
        artifacts: what names the model and the threshold in use.
        partitions: those that are assigned, by number.
    """

    ready: bool = False
    counts: Mapping[str, int] = field(default_factory=dict)
    alerts: Mapping[str, int] = field(default_factory=dict)
    dead_letters: Mapping[str, int] = field(default_factory=dict)
    reloads: Mapping[str, int] = field(default_factory=dict)
    levels: Mapping[str, float] = field(default_factory=dict)
    scores: Sequence[int] = ()
    artifacts: Mapping[str, str] = field(default_factory=dict)
    partitions: Mapping[int, PartitionStatus] = field(default_factory=dict)


_COUNTERS = {
    "messages": "Messages read.",
    "events": "Events judged.",
    "looks": "Looks taken: scorings of a window, cached ones included.",
    "cache_hits": "Looks whose score was known already.",
    "windows_scored": "Windows that went through the network, those of a restore included.",
    "evicted_blocks": "Blocks closed early to make room for others.",
    "skipped_lines": "Raw lines that name no block.",
    "crossed_blocks": "Blocks open in two partitions at once: messages are not keyed by block.",
}


class Standing(Protocol):
    """What is asked of the status of any process."""

    @property
    def ready(self) -> bool:
        """Whether the process does its work."""


S = TypeVar("S", bound=Standing)


class Vitals(ABC, Generic[S]):
    """What a process measures, in a registry of its own, how it stands, and whether its loop comes by."""

    def __init__(self, status: S) -> None:
        self.registry = CollectorRegistry()
        self.status = status
        self._came_by = time.monotonic()
        self.registry.register(self)

    @property
    def ready(self) -> bool:
        """Whether the process does its work."""
        return self.status.ready

    def beat(self) -> None:
        """Note that the loop came by."""
        self._came_by = time.monotonic()

    @property
    def lives(self) -> bool:
        """Whether the loop came by lately."""
        return time.monotonic() - self._came_by < HANGS_AFTER_SECONDS

    @abstractmethod
    def collect(self) -> Iterator[Metric]:
        """Yield what the last status says; Prometheus' name for it."""

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, buckets=_SECONDS, registry=self.registry)


class Metrics(Vitals[Status]):
    """Everything that is measured of the detector."""

    def __init__(self) -> None:
        super().__init__(Status())
        self.batch_seconds = self._histogram("batch_seconds", "Decoding and judging of one batch of messages.")
        self.batch_messages = Histogram(
            f"{PREFIX}_batch_messages", "Messages of one batch.", buckets=_MESSAGES, registry=self.registry
        )
        self.scoring_seconds = self._histogram("scoring_seconds", "Scores of one batch of looks: cache and network.")
        self.commit_seconds = self._histogram("commit_seconds", "Making alerts, windows and offsets durable.")
        self.restore_seconds = self._histogram("restore_seconds", "Restoring the windows of one partition.")
        self.restored_records = Counter(
            f"{PREFIX}_restored_records", "State records read to restore windows.", registry=self.registry
        )

    def collect(self) -> Iterator[Metric]:
        """Yield what the last status says."""
        status = self.status
        yield from counters(_COUNTERS, status.counts)
        yield counter("alerts", "Alerts published, revisions included.", "severity", status.alerts)
        yield counter("dead_letters", "Messages that could not be decoded.", "reason", status.dead_letters)
        yield counter(
            "reloads", "New models and thresholds, by what became of them.", "outcome", status.reloads, OUTCOMES
        )
        thresholds = GaugeMetricFamily(f"{PREFIX}_threshold_nats", "Thresholds in use.", labels=["severity"])
        for severity, threshold in status.levels.items():
            thresholds.add_metric([severity], threshold)
        yield thresholds
        yield GaugeMetricFamily(f"{PREFIX}_ready", "1 while all assigned partitions are restored.", float(status.ready))
        yield InfoMetricFamily(f"{PREFIX}_artifacts", "Model and threshold in use.", value=dict(status.artifacts))
        yield from _partitions(status.partitions)


def counters(texts: Mapping[str, str], counts: Mapping[str, int], prefix: str = "") -> Iterator[Metric]:
    """Yield a counter for each name in `texts`; what is not among the counts is 0."""
    for name, text in texts.items():
        yield CounterMetricFamily(f"{PREFIX}_{prefix}{name}", text, value=counts.get(name, 0))


def counter(name: str, text: str, label: str, counts: Mapping[str, int], known: Iterable[str] = ()) -> Metric:
    """Return a counter with a count for each value of its label; of the `known` ones that have none it is 0."""
    family = CounterMetricFamily(f"{PREFIX}_{name}", text, labels=[label])
    for value, count in {**dict.fromkeys(known, 0), **counts}.items():
        family.add_metric([value], count)
    return family


def by_partition(name: str, text: str, values: Mapping[int, float | None]) -> Metric:
    """Return a gauge with a value for each partition of which it is known."""
    family = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=["partition"])
    for number, value in values.items():
        if value is not None:
            family.add_metric([str(number)], value)
    return family


def _partitions(partitions: Mapping[int, PartitionStatus]) -> Iterator[Metric]:
    def gauge(name: str, text: str, value: Callable[[PartitionStatus], float | None]) -> Metric:
        return by_partition(name, text, {number: value(status) for number, status in partitions.items()})

    yield gauge("open_blocks", "Open blocks.", lambda status: status.open_blocks)
    yield gauge("lag_messages", "Messages that have not been read.", lambda status: status.lag)
    yield gauge(
        "watermark_timestamp_seconds",
        "Largest event time.",
        lambda status: None if status.watermark is None else status.watermark / 1000,
    )
    now = time.time()
    yield gauge(
        "watermark_delay_seconds",
        "How far the largest event time is behind the clock.",
        lambda status: None if status.watermark is None else now - status.watermark / 1000,
    )
    yield gauge(
        "catch_up_messages",
        "Messages to take in once more before the partition is restored.",
        lambda status: status.catch_up,
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
