"""Where a partition's new owner starts: reads the state topic and compares it with the group's committed offset.

Start, crash, aborted transaction, rebalance and lost partition all come through here.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

from consumer.checkpoint import Recovered, Replay, recover
from consumer.faultpoints import come_by
from consumer.records import DamagedRecordError
from consumer.settings import Settings
from consumer.topics import check_state_topic
from model.errors import UserError
from model.vocabulary import Vocabulary

log = logging.getLogger("consumer")

T = TypeVar("T")

_CALL_SECONDS = 10.0
_PATIENCE_SECONDS = 600.0
_SAY_AFTER_SECONDS = 5.0


@dataclass
class Start:
    """How to begin with a partition.

    Attributes:
        offset: of the first input message to read.
        recovered: sessions to restore.
        replay: what a predecessor has done already.
        leftovers: keys of records that no longer mean anything and are to be deleted.
    """

    offset: int
    recovered: Recovered
    replay: Replay
    leftovers: list[bytes]


class Restorer:
    """Reads state partitions, with a consumer of its own.

    Args:
        consumer: the group's, to ask for committed offsets.
    """

    def __init__(self, settings: Settings, consumer: Consumer) -> None:
        self._settings = settings
        self._group = consumer

    def start(self, partition: int, vocabulary: Vocabulary) -> Start:
        """Return where to begin with an input partition, its windows in the tokens of `vocabulary`.

        Raises:
            UserError: the state topic cannot be read or belongs to another group.
        """
        began = time.monotonic()
        topic = self._settings.topics.events
        low, high = self._patiently(
            lambda: self._group.get_watermark_offsets(TopicPartition(topic, partition), timeout=_CALL_SECONDS)
        )
        (committed,) = self._patiently(
            lambda: self._group.committed([TopicPartition(topic, partition)], timeout=_CALL_SECONDS)
        )
        asked = time.monotonic()
        records = self._read(partition)
        kafka = time.monotonic() - asked
        come_by("restore")
        where = f"{topic}/{partition}"
        try:
            recovered = recover(records, vocabulary)
        except (DamagedRecordError, KeyError) as error:
            raise UserError(
                f"{self._settings.topics.state}/{partition}: the stored windows cannot be read ({error}); "
                "delete the topic to start with empty windows"
            ) from None
        checkpoint = recovered.checkpoint
        if checkpoint is not None and checkpoint.group != self._settings.kafka.group:
            raise UserError(
                f"topic {self._settings.topics.state} belongs to the consumer group {checkpoint.group}; "
                "give this group a state topic of its own: topics.state"
            )
        fresh = self._fresh_offset(low, high)
        if committed.offset < 0 or committed.offset > high:
            if checkpoint is not None or committed.offset > high:
                log.warning("%s: the group's offsets were reset or the topic was made anew: windows start empty", where)
            return Start(fresh, Recovered(), Replay(fresh, {}), list(records))
        if checkpoint is None:
            log.warning(
                "%s: no windows are stored (was the state topic deleted?): blocks in mid-life start anew", where
            )
            return Start(committed.offset, Recovered(), Replay(committed.offset, {}), list(records))
        transactional = self._settings.delivery == "exactly_once"
        if committed.offset < checkpoint.offset and transactional:
            log.warning("%s: the group's offsets were set back to %d: windows start empty", where, committed.offset)
            return Start(committed.offset, Recovered(), Replay(committed.offset, {}), list(records))
        if checkpoint.offset < low:
            log.warning(
                "%s: events %d to %d are gone from the topic: windows may lack them; keep events longer than "
                "checkpoint.interval", where, checkpoint.offset, low - 1,
            )  # fmt: skip
        offset = max(checkpoint.offset, low)
        replay = Replay(
            max(committed.offset, offset),
            {block: state.last_offset for block, state in recovered.sessions.items()} | recovered.markers,
        )
        log.info(
            "%s: %s open blocks restored in %.1f s (%.1f s in Kafka), %s events to catch up without alerting",
            where, f"{len(recovered.sessions):,}", time.monotonic() - began, kafka, f"{replay.until - offset:,}",
        )  # fmt: skip
        return Start(offset, recovered, replay, [])

    def _fresh_offset(self, low: int, high: int) -> int:
        policy = str(self._settings.kafka.for_consumer().get("auto.offset.reset", "earliest"))
        return high if policy in {"latest", "largest", "end"} else low

    def _read(self, partition: int) -> dict[bytes, bytes]:
        """Return the latest committed record of each key of a state partition."""
        topic = self._settings.topics.state
        heard: list[KafkaError] = []
        reader = Consumer(
            {"queued.min.messages": 1_000_000}
            | self._settings.kafka.for_consumer()
            | {
                "group.id": f"{self._settings.kafka.group}-restore",  # librdkafka wants one; it never joins
                "isolation.level": "read_committed",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "log_level": 3,
                "error_cb": heard.append,
            },
            logger=log,
        )
        records: dict[bytes, bytes] = {}
        count = 0
        said = time.monotonic()
        silent_since = time.monotonic()
        try:
            # Not the group's consumer: this runs in its callback, and there list_topics would break its next callback.
            there = self._patiently(lambda: reader.list_topics(topic, timeout=_CALL_SECONDS)).topics[topic].partitions
            if partition not in there:  # partitions were added to the event topic, or the state topic was deleted
                check_state_topic(self._settings)
            reader.assign([TopicPartition(topic, partition, OFFSET_BEGINNING)])
            while True:
                for message in reader.consume(10_000, 0.2):
                    silent_since = time.monotonic()
                    error = message.error()
                    if error is None:
                        count += 1
                        if message.value() is None:
                            records.pop(message.key(), None)
                        else:
                            records[message.key()] = message.value()
                    elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - librdkafka's own
                        return records
                    elif not error.retriable():
                        raise UserError(f"topic {topic} cannot be read: {error.str()}")
                if time.monotonic() - said > _SAY_AFTER_SECONDS:
                    said = time.monotonic()
                    log.info("restoring %s/%d: %s records read", topic, partition, f"{count:,}")
                if time.monotonic() - silent_since > _PATIENCE_SECONDS:
                    reason = heard[-1].str() if heard else "no answer"
                    raise UserError(f"topic {topic} cannot be read: {reason}")
        finally:
            reader.close()

    @staticmethod
    def _patiently(call: Callable[[], T]) -> T:
        """Make a call again while the brokers are busy: a predecessor's transaction may have to time out first."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return call()
            except KafkaException as error:
                if not _passing(error.args[0]) or time.monotonic() > deadline:
                    raise UserError(f"kafka: {error.args[0].str()}") from None
                time.sleep(0.1)


def _passing(error: KafkaError) -> bool:
    return error.retriable() or error.code() in {
        KafkaError._TIMED_OUT,  # noqa: SLF001
        KafkaError._TRANSPORT,  # noqa: SLF001
        KafkaError._WAIT_COORD,  # noqa: SLF001
        KafkaError._ALL_BROKERS_DOWN,  # noqa: SLF001
        KafkaError.UNSTABLE_OFFSET_COMMIT,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.NOT_COORDINATOR,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
    }
