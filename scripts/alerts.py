"""`python -m scripts.alerts`: reads the alerts topic for a person, or as JSON lines for a program."""

import sys
from argparse import Namespace
from collections.abc import Iterator

import msgspec
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition
from rich.markup import escape
from rich.table import Table

from consumer.alerts import Alert
from consumer.settings import Settings, load_settings
from consumer.topics import require_topic
from model.cli import argument_parser, console, errors, run
from model.errors import UserError

_COLUMNS = ("time", "block", "score", "offending event", "expected instead", "source")
_SHOWN = 200


def main() -> None:
    """Print the alerts that are there; with --follow also those to come."""
    parser = argument_parser("scripts.alerts", "Read the alerts topic.")
    parser.add_argument("--follow", action="store_true", help="go on with new alerts until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="one alert a line, as published")
    parser.add_argument("--last", type=int, default=_SHOWN, metavar="N", help=f"rows in the table (default: {_SHOWN})")
    arguments = parser.parse_args()
    settings = load_settings(arguments.config)
    try:
        _print(settings, arguments)
    except BrokenPipeError:
        sys.stderr.close()  # the reader, head for one, has seen enough


def _print(settings: Settings, arguments: Namespace) -> None:
    values = read_alerts(settings, follow=arguments.follow)
    if arguments.json:
        for value in values:
            print(value.decode(), flush=arguments.follow)
    elif arguments.follow:
        for value in values:
            console.print(_line(_decode(value)), soft_wrap=True)
    else:
        alerts = [_decode(value) for value in values]
        table = Table(*_COLUMNS, title=f"{len(alerts):,} alerts in {settings.topics.alerts}")
        for alert in alerts[-arguments.last :] if arguments.last > 0 else ():
            table.add_row(*_cells(alert))
        console.print(table)
        if len(alerts) > arguments.last:
            errors.print(f"the last {arguments.last:,} are shown; --last N shows more, --json all")


def read_alerts(settings: Settings, *, follow: bool = False) -> Iterator[bytes]:
    """Yield the committed alerts as published, those of a block in order; with `follow` never end.

    Raises:
        UserError: there is no such topic, or Kafka refuses.
    """
    topic = settings.topics.alerts
    partitions = require_topic(settings, topic)
    group = f"{settings.kafka.group}-alert-reader"  # librdkafka wants one; nothing is ever committed for it
    consumer = Consumer(
        settings.kafka.for_consumer()
        | {
            "group.id": group,
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
    )
    try:
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in range(partitions)])
        unfinished = set(range(partitions))
        while follow or unfinished:
            message = consumer.poll(0.2)
            if message is None:
                continue
            error = message.error()
            if error is None:
                value = message.value()
                if value is not None:
                    yield value
            elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - confluent-kafka's name for it
                unfinished.discard(message.partition())
            elif not error.retriable():
                raise UserError(f"{topic}: {error.str()}")
    except KafkaException as error:
        raise UserError(f"{topic}: {error.args[0].str()}") from None
    finally:
        consumer.close()


def _decode(value: bytes) -> Alert:
    try:
        return msgspec.json.decode(value, type=Alert)
    except msgspec.DecodeError as error:
        raise UserError(f"a message in the alerts topic is no alert of this version ({error}); use --json") from None


def _cells(alert: Alert) -> tuple[str, ...]:
    offender = alert.offender
    expected = ", ".join(f"{other.event_id} {other.probability:.0%}" for other in offender.expected)
    revision = f" (revision {alert.revision})" if alert.revision > 1 else ""
    what = offender.event_id + (f": {offender.template}" if offender.template else "")
    cells = (
        alert.last_event_time,
        alert.block_id + revision,
        f"{alert.score:.2f} > {alert.threshold:.2f}",
        f"event {offender.position}, {what}" if alert.reason == "event" else f"ended after {alert.events_seen} events",
        expected,
        f"{alert.source.partition}:{offender.offset}",
    )
    return tuple(map(escape, cells))


def _line(alert: Alert) -> str:
    when, block, score, what, expected, source = _cells(alert)
    return f"{when}  [bold]{block}[/]  [red]{score}[/]  {what}  [dim]expected {expected}  at {source}[/]"


if __name__ == "__main__":
    run(main)
