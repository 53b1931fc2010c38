"""Where a partition's new owner starts: reads the state topic and compares it with the group's committed offset.

Start, crash, aborted transaction, rebalance and lost partition all come through here.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
from confluent_kafka import OFFSET_BEGINNING, Consumer, IsolationLevel, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from consumer.beginnings import Beginnings
from consumer.checkpoint import Recovered, Replay, recover
from consumer.clients import CALL_SECONDS, client, committed_offsets
from consumer.faultpoints import come_by
from consumer.patience import AT_END, Patience, is_passing
from consumer.records import Checkpoint
from consumer.refusals import with_remedy
from consumer.settings import Settings
from consumer.topics import check_state_topic
from model.errors import UserError
from model.vocabulary import Vocabulary

log = logging.getLogger("consumer")

_SAY_AFTER_SECONDS = 5.0


@dataclass
class Start:
    """How to begin with a partition.

    Attributes:
        offset: of the first input message to read.
        recovered: sessions to restore.
        replay: what a predecessor has done already.
        leftovers: keys of records that no longer mean anything and are to be deleted.
        chosen: whether the group has no offset that fits, so that only a commit makes others begin here, too.
    """

    offset: int
    recovered: Recovered
    replay: Replay
    leftovers: list[bytes]
    chosen: bool = False


def _empty(offset: int, records: Mapping[bytes, bytes], vocabulary: Vocabulary, *, chosen: bool = False) -> Start:
    """Begin without windows: what the records hold no longer fits."""
    return Start(offset, recover({}, vocabulary), Replay(offset, offset), list(records), chosen)


@contextmanager
def readable(topic: str, partition: int) -> Generator[None]:
    """Surround what reads records of a state partition: some are read only when their session is restored.

    Raises:
        UserError: one of them is damaged.
    """
    try:
        yield
    except (KeyError, IndexError, ValueError, msgspec.MsgspecError) as error:
        raise UserError(
            f"{topic}/{partition}: the stored windows cannot be read ({error}); "
            "delete the topic to start with empty windows"
        ) from None


def _tell_nobody(_: int) -> None:
    pass


class Restorer:
    """Reads state partitions, with clients of its own. Waits for brokers that are away, however long.

    Args:
        consumer: the group's, to ask for committed offsets.
        progress: told how many more state records have been read, while they are.
    """

    def __init__(
        self,
        settings: Settings,
        consumer: Consumer,
        patience: Patience,
        progress: Callable[[int], None] = _tell_nobody,
    ) -> None:
        self._settings = settings
        self._group = consumer
        self._patience = patience
        self._progress = progress
        self._beginnings = Beginnings(settings.kafka)

    def starts(self, partitions: Iterable[int], vocabulary: Vocabulary) -> Generator[Start]:
        """Yield where to begin with each input partition, its windows in the tokens of `vocabulary`.

        The clients live for this long: setting them up is most of the work when little is stored, and clients that
        idle until the next recovery would tell of an outage hours after it.

        Raises:
            UserError: the state topic cannot be read or belongs to another group, or a partition is gone.
        """
        admin = client(
            AdminClient,
            self._settings,
            {**self._settings.kafka.for_admin(), "log_level": 0, "error_cb": self._patience.notice},
        )
        with closing(self._reader()) as reader:
            for partition in partitions:
                yield self._start(admin, reader, partition, vocabulary)

    def _start(self, admin: AdminClient, reader: Consumer, partition: int, vocabulary: Vocabulary) -> Start:
        began = time.monotonic()
        topic = self._settings.topics.events
        place = TopicPartition(topic, partition)
        (committed,) = self._patience.ask(reader, lambda: committed_offsets(self._group, [place]))
        low, high = self._patience.ask(reader, lambda: self._bounds(reader, topic, partition))
        asked = time.monotonic()
        records = self._read(admin, reader, partition)
        kafka = time.monotonic() - asked
        come_by("restore")
        where = f"{topic}/{partition}"
        with readable(self._settings.topics.state, partition):
            recovered = recover(records, vocabulary)
        checkpoint = recovered.checkpoint
        if checkpoint is not None:
            self._require_own(checkpoint)
        if committed.offset >= 0:
            self._beginnings.forget(partition)
        if committed.offset < 0 or committed.offset > high:
            begin = self._beginnings.choose(partition, low, high)
            if checkpoint is not None or committed.offset > high:
                log.warning(
                    "%s: the group's offsets were reset or the topic was made anew: windows start empty, and what "
                    "comes from offset %d on is judged, once more if it was before", where, begin,
                )  # fmt: skip
            return _empty(begin, records, vocabulary, chosen=True)
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
            return _empty(begin, records, vocabulary)
        if committed.offset < checkpoint.offset:
            if self._settings.delivery == "exactly_once":
                log.warning("%s: the group's offsets were set back to %d: windows start empty", where, committed.offset)
                return _empty(begin, records, vocabulary)
            log.warning(
                "%s: the windows are ahead of the group's offset %d, as after a crash: going on at %d; if the offset "
                "was set back to judge events again, delete the state topic, too", where, committed.offset,
                checkpoint.offset,
            )  # fmt: skip
        if checkpoint.offset < min(low, committed.offset):
            log.warning(
                "%s: events %d to %d are gone from the topic: windows may lack them; keep events longer than "
                "checkpoint.interval", where, checkpoint.offset, min(low, committed.offset) - 1,
            )  # fmt: skip
        offset = max(checkpoint.offset, low)
        until = max(committed.offset, offset)
        replay = Replay(until, max(until, recovered.end))
        log.info(
            "%s: %s open blocks restored in %.1f s (%.1f s in Kafka), %s events to catch up without alerting",
            where, f"{len(recovered.sessions):,}", time.monotonic() - began, kafka, f"{replay.until - offset:,}",
        )  # fmt: skip
        return Start(offset, recovered, replay, [])

    def _require_own(self, checkpoint: Checkpoint) -> None:
        state, events, group = self._settings.topics.state, self._settings.topics.events, self._settings.kafka.group
        if checkpoint.group != group:
            raise UserError(
                f"topic {state} belongs to the consumer group {checkpoint.group}; "
                "give this group a state topic of its own: topics.state"
            )
        if checkpoint.topic not in (events, ""):
            raise UserError(
                f"topic {state} holds the windows of {checkpoint.topic}; "
                f"give the windows of {events} a topic of their own: topics.state"
            )

    def _reader(self) -> Consumer:
        return client(
            Consumer,
            self._settings,
            # Little is stored as a rule, and the end of a partition is told only after a fetch that found nothing.
            {"queued.min.messages": 1_000_000, "fetch.wait.max.ms": 20}
            | self._settings.kafka.for_consumer()
            | {  # under the group's name, on which it has rights; it never joins
                "isolation.level": "read_committed",
                "auto.offset.reset": "error",  # records that vanish meanwhile must not pass for the end
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "log_level": 2,
                "error_cb": self._patience.notice,
            },
            logger=log,
        )

    def _bounds(self, reader: Consumer, topic: str, partition: int) -> tuple[int, int]:
        """Return the first offset of an input partition, and the one after its last."""
        if partition not in _partitions(reader, topic):
            raise UserError(f"topic {topic} no longer has the partition {partition}; was it deleted?")
        return reader.get_watermark_offsets(TopicPartition(topic, partition), timeout=CALL_SECONDS)

    def _require(self, reader: Consumer, topic: str, partition: int) -> None:
        # Not the group's consumer: this runs in its callback, and there list_topics would break its next callback.
        if partition not in self._patience.ask(reader, lambda: _partitions(reader, topic)):
            check_state_topic(self._settings)  # partitions were added to the event topic, or this one was deleted

    def _end(self, admin: AdminClient, topic: str, partition: int) -> int:
        """Return the offset behind the last record that the partition's leader holds, committed or not."""
        place = TopicPartition(topic, partition)
        found = admin.list_offsets(
            {place: OffsetSpec.latest()},
            isolation_level=IsolationLevel.READ_UNCOMMITTED,
            request_timeout=CALL_SECONDS,
        )
        return int(found[place].result().offset)

    def _read(self, admin: AdminClient, reader: Consumer, partition: int) -> dict[bytes, bytes]:
        """Return the latest committed record of each key of a state partition.

        To be called once the group's offset is known. By then a predecessor's transaction is settled, but each
        partition is told by itself, and this one may not have been yet. The records are here, though: an end before
        the last of them is none to stop at, for what becomes of them is still to come.
        """
        topic = self._settings.topics.state
        self._require(reader, topic, partition)
        records: dict[bytes, bytes] = {}
        count = 0
        waits = ""
        said = time.monotonic()
        reader.assign([TopicPartition(topic, partition, OFFSET_BEGINNING)])
        while True:
            messages = reader.consume(10_000, 0.05)
            self._progress(len(messages))
            for message in messages:
                error = message.error()
                if message.partition() not in {partition, -1}:
                    continue  # left over from the partition before
                if error is None:
                    self._patience.heard()
                    count += 1
                    if message.value() is None:
                        records.pop(message.key(), None)
                    else:
                        records[message.key()] = message.value()
                elif error.code() == AT_END:
                    if message.offset() >= self._patience.ask(admin, lambda: self._end(admin, topic, partition)):
                        return records
                    waits = ", waiting for the end of a transaction"  # another end is told when that has come
                elif is_passing(error):
                    self._patience.retry(error)
                else:
                    raise UserError(f"topic {topic} cannot be read: {with_remedy(error)}")
            self._patience.check()
            if time.monotonic() - said > _SAY_AFTER_SECONDS:
                said = time.monotonic()
                log.info("restoring %s/%d: %s records read%s", topic, partition, f"{count:,}", waits)


def _partitions(reader: Consumer, topic: str) -> Mapping[int, Any]:
    found = reader.list_topics(topic, timeout=CALL_SECONDS).topics[topic]
    if found.error is not None and is_passing(found.error):
        raise KafkaException(found.error)
    return found.partitions
