"""`python -m consumer --rekey`: raw lines from any partitions become events keyed by block, exactly once.

It keeps nothing in memory that a successor would need, so its way to recover is to go back to the committed offset.
The steps are those of the service without the judging: lines are read and cut, and wait in the merge until none older
can come; their events and dead letters go to the delivery, and a commit makes them durable together with the offset of
the first line of each partition that still waits.
"""

import logging
import time
from contextlib import closing

from consumer.artifacts import ModelWatcher
from consumer.cutting import Cutter
from consumer.delivery import TransactionAborted, delivery_for
from consumer.faultpoints import come_by
from consumer.line_assignment import LineAssignment
from consumer.outbox import Outbox
from consumer.patience import Patience
from consumer.places import Places
from consumer.reading import lines_consumer
from consumer.rekey_metrics import RekeyMetrics, RekeyStatus
from consumer.settings import Settings
from consumer.web import serving

log = logging.getLogger("consumer")

_REPORT_SECONDS = 60.0
_STATUS_SECONDS = 1.0
_PER_COMMIT = 20_000  # messages: all that is pending might take longer than a transaction may last


class Rekeyer:
    """One re-keying process: a member of the consumer group `<kafka.consumer.group.id>-rekey`.

    Raises:
        UserError: there is no model, or it knows no lines, or not as the settings cut them.
    """

    def __init__(self, settings: Settings, patience: Patience) -> None:
        self._settings = settings
        self._topic = settings.topics.lines
        self.group = f"{settings.kafka.group}-rekey"
        self._watcher = ModelWatcher(settings)
        self._cutter = Cutter(settings, self._watcher.in_use)
        self._outbox = Outbox(settings)
        self._metrics = RekeyMetrics()
        patience.call_while_waiting(self._metrics.beat)
        self._patience = patience

    def run(self) -> None:
        """Work until a stop is asked for, then commit what is done and leave the group.

        Raises:
            UserError: Kafka refuses to go on (wrong credentials, missing rights, topic deleted …).
        """
        with serving(self._metrics, None, self._settings.metrics.listen):
            self._run()

    def _run(self) -> None:
        self._delivery = delivery_for(self._settings, self._patience)
        consumer = lines_consumer(self._settings, self.group, self._patience)
        self._assignment = LineAssignment(
            self._settings,
            consumer,
            self._delivery,
            Places(self._settings, consumer, self.group, self._patience),
            self._patience,
            self._metrics,
        )
        with closing(self._delivery), self._assignment.membership():
            self._loop()
        self._assignment.check()

    def status(self) -> RekeyStatus:
        """Return where things stand."""
        return RekeyStatus(
            ready=self._assignment.joined,
            counts=dict(self._outbox.counts),
            dead_letters=dict(self._outbox.dead_letters),
            reloads=dict(self._watcher.outcomes),
            model=self._watcher.in_use.fingerprint,
            pending=self._assignment.pending,
            lag=self._assignment.lag,
        )

    def _loop(self) -> None:
        interval = self._settings.commit.interval.total_seconds()
        wait = min(self._settings.scoring.max_wait.total_seconds(), interval)
        reload_interval = self._settings.reload.interval.total_seconds()
        now = status_at = time.monotonic()
        commit_at, reload_at, report_at = now + interval, now + reload_interval, now + _REPORT_SECONDS
        while not self._patience.stop_asked:
            self._metrics.beat()
            try:
                sent = 0
                for cut in self._assignment.read(wait, self._cutter):
                    sent += self._outbox.send(cut, self._delivery)
                    if sent > _PER_COMMIT:
                        self._assignment.commit()
                        sent = 0
                self._delivery.poll()
                self._assignment.check()
                now = time.monotonic()
                if now >= commit_at and not self._assignment.recovery_due:
                    self._assignment.commit()
                    commit_at = time.monotonic() + interval
                if now >= reload_at and not self._assignment.recovery_due:
                    reload_at = now + reload_interval
                    self._reload()
            except TransactionAborted as reason:
                log.warning("transaction aborted (%s): going back to what is committed", reason)
                self._assignment.recovery_due = True
            if self._assignment.recovery_due:
                self._assignment.recover()
            if now >= status_at:
                self._metrics.status = self.status()
                status_at = now + _STATUS_SECONDS
            if now >= report_at:
                self._report()
                report_at = now + _REPORT_SECONDS

    def _report(self) -> None:
        status = self.status()
        lag = sum(known or 0 for known in status.lag.values())
        log.info("%s; lag %s, %s of it pending", status, f"{lag:,}", f"{sum(status.pending.values()):,}")

    def _reload(self) -> None:
        """Take a new model if there is one; what is pending was cut by the old one, and is read again.

        Raises:
            TransactionAborted: as `LineAssignment.commit`; the new model has been taken.
        """
        bundle = self._watcher.poll()
        if bundle is None:
            return
        log.info("now %s", bundle)
        self._cutter = Cutter(self._settings, bundle)
        self._assignment.recovery_due = True
        self._assignment.commit()
        come_by("reload")
