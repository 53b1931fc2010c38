"""`python -m scripts.verify`: were the right alerts published, each of them once?

Reads the event topic again, up to what the consumer group has committed, through the detector's core in this one
process, and compares with what is in the alerts topic, byte for byte. Sessions begun before today's model and
threshold came into force were judged by others as well: their alerts are counted and not compared.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from confluent_kafka import Consumer, KafkaException, TopicPartition
from rich.table import Table

from consumer.artifacts import Artifacts
from consumer.events import Messages
from consumer.history import TopicHistory
from consumer.records import DRIFT, DamagedRecordError, DriftState
from consumer.settings import Settings, load_settings
from consumer.topics import require_topic
from model.cli import argument_parser, console, progress_bar, run
from model.errors import UserError
from scripts.alerts import TopicReader, decode, read_alerts
from scripts.output import check_file, write_json

Key = tuple[str, int]
"""Alert id and revision: what makes an alert one."""


@dataclass(frozen=True)
class Comparison:
    """Alerts published against those that the events call for."""

    events: int
    alerts_expected: int
    alerts_missing: int
    alerts_duplicated: int
    alerts_different: int
    alerts_extra: int
    alerts_not_compared: int = 0
    dead_letters: int = 0

    @property
    def is_exact(self) -> bool:
        """Whether every alert is there once, and no other."""
        return not (self.alerts_missing or self.alerts_duplicated or self.alerts_different or self.alerts_extra)


def main() -> int:
    """Compare and print; the exit status is 0 only if all is as it should be."""
    parser = argument_parser("scripts.verify", "Compare the alerts topic with the events, offline.")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result as JSON")
    arguments = parser.parse_args()
    check_file("--json", arguments.json)
    settings = load_settings(arguments.config)
    result = verify(settings)
    table = Table(
        "", "alerts", title=f"{result.events:,} messages read again, {result.dead_letters:,} of them no events"
    )
    for name, count in asdict(result).items():
        if name.startswith("alerts_"):
            table.add_row(name.removeprefix("alerts_"), f"{count:,}")
    console.print(table)
    write_json(arguments.json, asdict(result))
    return 0 if result.is_exact else 1


def verify(settings: Settings) -> Comparison:
    """Compare what is published with what the committed events call for.

    Raises:
        UserError: topics, model or threshold are not there or do not fit, or events that the group has read are gone.
    """
    artifacts = Artifacts.load(settings)
    detector, decoder = artifacts.detector(settings), artifacts.decoder(settings)
    committed = _committed(settings)
    since = _in_force_since(settings, detector.judge, committed)
    expected: dict[Key, bytes] = {}
    events = dead_letters = 0
    with (
        TopicHistory(settings, settings.topics.events) as history,
        progress_bar("reading the events again", sum(committed.values())) as advance,
    ):
        for partition, end in committed.items():
            detector.assign(partition, since=since[partition])
            for messages in history.read(partition, 0, end):
                batch, refused = decoder.decode(Messages.of(messages))  # what is refused is in the dead-letter topic
                events += len(messages)
                dead_letters += len(refused)
                for alert in detector.process({partition: batch}):
                    if alert.source.first_offset >= since[partition]:
                        expected[alert.alert_id, alert.revision] = alert.encode()
                advance(len(messages))
            detector.revoke(partition)
    if dead_letters == events:
        raise UserError(
            f"{settings.topics.events}: none of its {events:,} messages is an event: nothing to verify; "
            f"see {settings.topics.dead_letters}, and events: in the settings"
        )
    published = read_alerts(settings, settled=True)
    return _compare(expected, published, since, committed, events=events, dead_letters=dead_letters)


def _compare(
    expected: dict[Key, bytes],
    published: Iterator[bytes],
    since: dict[int, int],
    committed: dict[int, int],
    **counted: int,
) -> Comparison:
    seen: Counter[Key] = Counter()
    different = extra = not_compared = 0
    for value in published:
        alert = decode(value)
        if alert.source.last_offset >= committed.get(alert.source.partition, 0):
            continue  # committed after this comparison began
        key = (alert.alert_id, alert.revision)
        seen[key] += 1
        if alert.source.first_offset < since[alert.source.partition]:
            not_compared += 1
        elif key not in expected:
            extra += 1
        elif expected[key] != value:
            different += 1
    return Comparison(
        alerts_expected=len(expected),
        alerts_missing=len(expected.keys() - seen.keys()),
        alerts_duplicated=seen.total() - len(seen),
        alerts_different=different,
        alerts_extra=extra,
        alerts_not_compared=not_compared,
        **counted,
    )


def _in_force_since(settings: Settings, judge: bytes, committed: dict[int, int]) -> dict[int, int]:
    """Return the offset from which on each partition has been judged by today's artifacts: its end if by others."""
    since = dict.fromkeys(committed, 0)
    reader = TopicReader(settings, settings.topics.state)
    try:
        while not reader.is_settled:
            message = reader.poll(0.2)
            if message is not None and message.key() == DRIFT and message.value() is not None:
                state = DriftState.unpack(message.value())
                partition = message.partition()
                since[partition] = state.since if state.judge == judge else committed[partition]
    except (KafkaException, DamagedRecordError) as error:
        raise UserError(f"{settings.topics.state}: {error}") from None
    finally:
        reader.close()
    return since


def _committed(settings: Settings) -> dict[int, int]:
    """Return the group's committed offset of each partition."""
    topic = settings.topics.events
    partitions = [TopicPartition(topic, number) for number in range(require_topic(settings, topic))]
    consumer = Consumer(settings.kafka.for_consumer() | {"isolation.level": "read_committed", "log_level": 3})
    try:
        found = {place.partition: max(place.offset, 0) for place in consumer.committed(partitions, timeout=30)}
        if not any(found.values()):
            raise UserError(
                f"the group {settings.kafka.group} has committed nothing of {topic}: nothing to verify; "
                "is kafka.consumer.group.id that of the consumer, and did it run?"
            )
        for place in partitions:
            low, _ = consumer.get_watermark_offsets(place, timeout=10)
            if low and found[place.partition]:
                raise UserError(
                    f"{topic}/{place.partition}: events before offset {low} are gone: windows cannot be made again"
                )
    except KafkaException as error:
        raise UserError(f"kafka: {error.args[0].str()}") from None
    finally:
        consumer.close()
    return found


if __name__ == "__main__":
    run(main)
