"""What the re-keyer does, in numbers for Prometheus. Their names are its own: sums over detectors leave it out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric

from consumer.letters import KINDS
from consumer.metrics import OUTCOMES, PREFIX, Vitals, by_partition, counter, counters

_COUNTERS = {
    "lines": "Lines done with: sent as events or dead letters, or skipped.",
    "events": "Events sent.",
    "unmatched_lines": "Lines of no template, sent as their text.",
    "skipped_lines": "Lines that name no block.",
}


@dataclass(frozen=True)
class RekeyStatus:
    """How the re-keyer stands.

    Attributes:
        ready: whether it is in its group.
        counts: by the name of the counter.
        dead_letters: by the kind of their reason.
        reloads: of the model, by outcome.
        model: fingerprint of the one in use.
        pending: by partition, lines that were read and wait until none older can come.
        lag: by partition, lines that are not done with, pending ones included; None where it is not known yet.
    """

    ready: bool = False
    counts: Mapping[str, int] = field(default_factory=dict)
    dead_letters: Mapping[str, int] = field(default_factory=dict)
    reloads: Mapping[str, int] = field(default_factory=dict)
    model: str = ""
    pending: Mapping[int, int] = field(default_factory=dict)
    lag: Mapping[int, int | None] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = {name: self.counts.get(name, 0) for name in _COUNTERS}
        return (
            f"{counts['lines']:,} lines, {counts['unmatched_lines']:,} of them of no template, "
            f"{counts['skipped_lines']:,} without a block; {counts['events']:,} events, "
            f"{sum(self.dead_letters.values()):,} dead letters"
        )


class RekeyMetrics(Vitals[RekeyStatus]):
    """Everything that is measured of the re-keyer."""

    def __init__(self) -> None:
        super().__init__(RekeyStatus())
        self.commit_seconds = self._histogram("rekey_commit_seconds", "Making events and offsets durable.")

    def collect(self) -> Iterator[Metric]:
        """Yield what the last status says."""
        status = self.status
        yield from counters(_COUNTERS, status.counts, "rekey_")
        yield counter("rekey_dead_letters", "Messages that could not be cut.", "reason", status.dead_letters, KINDS)
        yield counter("rekey_reloads", "New models, by what became of them.", "outcome", status.reloads, OUTCOMES)
        yield GaugeMetricFamily(f"{PREFIX}_rekey_ready", "1 while it is in its group.", float(status.ready))
        yield InfoMetricFamily(f"{PREFIX}_rekey_artifacts", "Model in use.", value={"model": status.model})
        yield by_partition("rekey_pending_lines", "Lines that wait until none older can come.", status.pending)
        yield by_partition("rekey_lag_messages", "Lines that are not done with.", status.lag)
