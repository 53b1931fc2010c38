"""What the status page shows: how things went in the last minutes, and the latest alerts.

The service's loop tells it, once a batch and once a second; the web server's threads ask.
"""

import re
import shlex
import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from threading import Lock
from typing import Any

import msgspec

from consumer.alerts import Alert
from consumer.drift import EDGES
from consumer.metrics import Status
from consumer.settings import Settings

ALERTS = 50
"""Blocks whose latest alert is kept."""

_SAMPLES = 300
_WITHOUT_QUOTES = re.compile(r"[A-Za-z0-9_.:/-]{1,200}")


class Board:
    """Bounded memory of what happened lately.

    Args:
        settings: whose topics and brokers are shown, and never anything else of `kafka`.
    """

    def __init__(self, settings: Settings) -> None:
        self._brokers = settings.kafka.bootstrap
        self._about = {
            "started": time.time(),
            "topics": {"events": settings.topics.events, "alerts": settings.topics.alerts},
            "group": settings.kafka.group,
            "edges": EDGES.tolist(),
        }
        self._lock = Lock()
        self._alerts: OrderedDict[str, tuple[int, Alert]] = OrderedDict()
        self._posted = 0
        self._status = Status()
        self._samples: deque[dict[str, float]] = deque(maxlen=_SAMPLES)
        self._last = time.monotonic(), 0

    def post(self, alerts: Sequence[Alert]) -> None:
        """Put up new alerts; a revision takes the place of what it revises."""
        with self._lock:
            for alert in alerts[-ALERTS:]:
                self._posted += 1
                self._alerts.pop(alert.alert_id, None)
                self._alerts[alert.alert_id] = self._posted, alert
            while len(self._alerts) > ALERTS:
                self._alerts.popitem(last=False)

    def sample(self, status: Status) -> None:
        """Note how things stand."""
        now, messages = time.monotonic(), status.counts.get("messages", 0)
        before, read = self._last
        self._last = now, messages
        lags = [partition.lag for partition in status.partitions.values() if partition.lag is not None]
        with self._lock:
            self._status = status
            self._samples.append(
                {
                    "time": time.time(),
                    "rate": (messages - read) / max(now - before, 1e-3),
                    "lag": sum(lags),
                }
            )

    def encode(self, after: int = 0) -> bytes:
        """Return everything as JSON, of the alerts those put up after number `after`."""
        with self._lock:
            status, samples, posted = self._status, list(self._samples), self._posted
            alerts = [(number, alert) for number, alert in self._alerts.values() if number > after]
        return msgspec.json.encode(
            {
                **self._about,
                "now": time.time(),
                "status": asdict(status),
                "samples": samples,
                "posted": posted,
                "alerts": [self._shown(number, alert) for number, alert in alerts],
            }
        )

    def _shown(self, number: int, alert: Alert) -> Mapping[str, Any]:
        return {"number": number, "alert": alert, "sources": source_commands(self._brokers, alert)}


def source_commands(brokers: str, alert: Alert) -> dict[str, str]:
    """Return shell commands that print the offending event and all events of the block, safe to paste.

    Block ids come from anywhere: one that a shell or a terminal might take for more than a name is left out, and the
    command prints what lies between the block's first and last event instead.
    """
    source = alert.source
    read = f"kcat -C -e -q -b {shlex.quote(brokers)} -t {shlex.quote(source.topic)} -p {source.partition}"
    block = f"{read} -o {source.first_offset} -c {source.last_offset - source.first_offset + 1}"
    if _WITHOUT_QUOTES.fullmatch(alert.block_id):
        block += f" | grep -Fe {alert.block_id}"
    return {"event": f"{read} -o {alert.offender.offset} -c 1", "block": block}
