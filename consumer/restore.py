"""Where a partition's new owner starts: reads the state topic and compares it with the group's committed offset.

Start, crash, aborted transaction, rebalance and lost partition all come through here.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

from consumer.checkpoint import Recovered, Replay, recover
from consumer.faultpoints import come_by
from consumer.patience import Patience, is_passing
from consumer.refusals import with_remedy
from consumer.settings import Settings
from consumer.topics import check_state_topic
from model.errors import UserError
from model.vocabulary import Vocabulary

log = logging.getLogger("consumer")

T = TypeVar("T")

_CALL_SECONDS = 10.0
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


def _empty(offset: int, records: Mapping[bytes, bytes]) -> Start:
    """Begin without windows: what the records hold no longer fits."""
    return Start(offset, Recovered(), Replay(offset, {}), list(records))


class Restorer:
    """Reads state partitions, with a consumer of its own. Waits for brokers that are away, however long.

    Args:
        consumer: the group's, to ask for committed offsets.
    """

    def __init__(self, settings: Settings, consumer: Consumer, patience: Patience) -> None:
        self._settings = settings
        self._group = consumer
        self._patience = patience

    def start(self, partition: int, vocabulary: Vocabulary) -> Start:
        """Return where to begin with an input partition, its windows in the tokens of `vocabulary`.

        Raises:
            UserError: the state topic cannot be read or belongs to another group, or the partition is gone.
        """
        began = time.monotonic()
        topic = self._settings.topics.events
        with closing(self._reader()) as reader:
            committed = self._patiently(reader, lambda: self._committed(topic, partition))
            low, high = self._patiently(reader, lambda: self._bounds(reader, topic, partition))
            asked = time.monotonic()
            records = self._read(reader, partition)
            kafka = time.monotonic() - asked
        come_by("restore")
        where = f"{topic}/{partition}"
        try:
            recovered = recover(records, vocabulary)
        except (KeyError, IndexError, ValueError, msgspec.MsgspecError) as error:
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
        if committed.offset < 0 or committed.offset > high:
            if checkpoint is not None or committed.offset > high:
                log.warning("%s: the group's offsets were reset or the topic was made anew: windows start empty", where)
            return _empty(self._fresh_offset(low, high), records)
        if committed.offset < low:
            log.warning(
                "%s: events %d to %d were deleted before they were read and cannot be judged; keep events for longer "
                "than the consumer may be away", where, committed.offset, low - 1,
            )  # fmt: skip
        begin = max(committed.offset, low)
        if checkpoint is None:
            log.warning(
                "%s: no windows are stored (was the state topic deleted?): blocks in mid-life start anew", where
            )
            return _empty(begin, records)
        transactional = self._settings.delivery == "exactly_once"
        if committed.offset < checkpoint.offset and transactional:
            log.warning("%s: the group's offsets were set back to %d: windows start empty", where, committed.offset)
            return _empty(begin, records)
        if checkpoint.offset < min(low, committed.offset):
            log.warning(
                "%s: events %d to %d are gone from the topic: windows may lack them; keep events longer than "
                "checkpoint.interval", where, checkpoint.offset, min(low, committed.offset) - 1,
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

    def _reader(self) -> Consumer:
        return Consumer(
            {"queued.min.messages": 1_000_000}
            | self._settings.kafka.for_consumer()
            | {  # under the group's name, on which it has rights; it never joins
                "isolation.level": "read_committed",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "log_level": 2,
                "error_cb": self._patience.notice,
            },
            logger=log,
        )

    def _committed(self, topic: str, partition: int) -> TopicPartition:
        (committed,) = self._group.committed([TopicPartition(topic, partition)], timeout=_CALL_SECONDS)
        if committed.error is not None:
            raise KafkaException(committed.error)
        return committed

    def _bounds(self, reader: Consumer, topic: str, partition: int) -> tuple[int, int]:
        """Return the first offset of an input partition, and the one after its last."""
        if partition not in _partitions(reader, topic):
            raise UserError(f"topic {topic} no longer has the partition {partition}; was it deleted?")
        return reader.get_watermark_offsets(TopicPartition(topic, partition), timeout=_CALL_SECONDS)

    def _read(self, reader: Consumer, partition: int) -> dict[bytes, bytes]:
        """Return the latest committed record of each key of a state partition."""
        topic = self._settings.topics.state
        # Not the group's consumer: this runs in its callback, and there list_topics would break its next callback.
        if partition not in self._patiently(reader, lambda: _partitions(reader, topic)):
            check_state_topic(self._settings)  # partitions were added to the event topic, or this one was deleted
        records: dict[bytes, bytes] = {}
        count = 0
        said = time.monotonic()
        reader.assign([TopicPartition(topic, partition, OFFSET_BEGINNING)])
        while True:
            for message in reader.consume(10_000, 0.2):
                error = message.error()
                if error is None:
                    self._patience.heard()
                    count += 1
                    if message.value() is None:
                        records.pop(message.key(), None)
                    else:
                        records[message.key()] = message.value()
                elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - librdkafka's own
                    return records
                elif is_passing(error):
                    self._patience.retry(error)
                else:
                    raise UserError(f"topic {topic} cannot be read: {with_remedy(error)}")
            self._patience.check()
            if time.monotonic() - said > _SAY_AFTER_SECONDS:
                said = time.monotonic()
                log.info("restoring %s/%d: %s records read", topic, partition, f"{count:,}")

    def _patiently(self, reader: Consumer, call: Callable[[], T]) -> T:
        """Make a call again while brokers are away or busy: a predecessor's transaction may have to time out first."""
        while True:
            try:
                return call()
            except KafkaException as error:
                if not is_passing(error.args[0]):
                    raise UserError(f"kafka: {with_remedy(error.args[0])}") from None
                reader.poll(0.1)  # a pause in which the client tells its troubles
                self._patience.retry(error.args[0])


def _partitions(reader: Consumer, topic: str) -> Mapping[int, Any]:
    found = reader.list_topics(topic, timeout=_CALL_SECONDS).topics[topic]
    if found.error is not None and is_passing(found.error):
        raise KafkaException(found.error)
    return found.partitions
