"""`python -m scripts.alerts`: reads the alerts topic for a person, or as JSON lines for a program."""

import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from heapq import heappop, heappush
from pathlib import Path

import msgspec
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition
from rich.live import Live
from rich.table import Table
from rich.text import Text

from consumer.alerts import Alert
from consumer.clients import client
from consumer.logs import printable
from consumer.patience import AT_END, Patience
from consumer.settings import Settings, load_settings
from consumer.topics import require_topic
from model.cli import argument_parser, console, errors, run
from model.errors import UserError
from model.sessions import read_labels
from scripts.live import OTHER_COLOUR, SEVERITY_COLOURS, LiveAlerts

_SHOWN = 200
_REDRAW_SECONDS = 0.25


def main() -> None:
    """Print the alerts that are there; with --follow also those to come."""
    parser = argument_parser("scripts.alerts", "Read the alerts topic.")
    parser.add_argument(
        "--follow", action="store_true", help="go on with new alerts until Ctrl-C: a live view on a terminal"
    )
    parser.add_argument("--json", action="store_true", help="one alert a line, as published")
    parser.add_argument("--last", type=int, default=_SHOWN, metavar="N", help=f"rows in the table (default: {_SHOWN})")
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="CSV with BlockId,Label: how many failing and healthy blocks alerted",
    )
    arguments = parser.parse_args()
    if arguments.last < 0:
        parser.error("--last should be 0 or more")
    settings = load_settings(arguments.config)
    try:
        _print(settings, arguments)
    except BrokenPipeError:
        sys.stderr.close()  # the reader, head for one, has seen enough


def _print(settings: Settings, arguments: Namespace) -> None:
    if arguments.follow and console.is_terminal and not arguments.json:
        watch(settings)
        return
    if not (arguments.follow or arguments.json or arguments.labels):
        _print_newest(settings, arguments.last)
        return
    values = read_alerts(settings, follow=arguments.follow)
    if arguments.labels:
        console.print(found(read_labels(arguments.labels), map(decode, values)))
    elif arguments.json:
        for value in values:
            print(value.decode(), flush=arguments.follow)
    else:
        for value in values:
            console.print(one_line(decode(value)), soft_wrap=True)


def _print_newest(settings: Settings, most: int) -> None:
    """Print a table of the alerts that were published last, in that order: partitions come one after the other."""
    total = 0
    newest: list[tuple[int, int, Message]] = []  # no more than are shown: a topic may hold more than memory does
    for total, message in enumerate(read_messages(settings), 1):
        heappush(newest, (message.timestamp()[1], total, message))
        if len(newest) > most:
            heappop(newest)
    table = Table(title=f"{total:,} alerts in {settings.topics.alerts}")
    for heading, width in (
        ("time", 10),
        ("block", 24),
        ("severity, score", 15),
        ("what happened, what was expected", None),
    ):
        table.add_column(heading, max_width=width, overflow="fold")
    for _, _, message in sorted(newest):
        when, severity, block, score, what, expected = columns(decode(message.value()))
        table.add_row(when, block, Text.assemble(severity, "\n", score), Text.assemble(what, "\n", _expected(expected)))
    console.print(table)
    if total > most:
        errors.print(f"the last {most:,} to be published are shown; --last N shows more, --json all")


def found(failing: Mapping[str, bool], alerts: Iterable[Alert]) -> Table:
    """Count labelled blocks by their gravest alert."""
    gravest: dict[str, Alert] = {}
    for alert in alerts:
        if alert.block_id in failing and alert.score >= gravest.get(alert.block_id, alert).score:
            gravest[alert.block_id] = alert
    by_severity = Counter((failing[block], alert.severity) for block, alert in gravest.items())
    table = Table("", "failing blocks", "healthy blocks", title="labelled blocks by their gravest alert")
    for severity in dict.fromkeys(alert.severity for alert in sorted(gravest.values(), key=lambda alert: -alert.score)):
        table.add_row(severity, *(f"{by_severity[label, severity]:,}" for label in (True, False)))
    alerted = Counter(failing[block] for block in gravest)
    table.add_section()
    blocks = Counter(failing.values())
    table.add_row("any alert", *(f"{alerted[label]:,} of {blocks[label]:,}" for label in (True, False)))
    return table


class TopicReader:
    """Reads the committed messages of a topic from the beginning, those of a block in order.

    Raises:
        UserError: there is no such topic, or Kafka refuses.
    """

    def __init__(self, settings: Settings, topic: str) -> None:
        self._topic = topic
        partitions = range(require_topic(settings, self._topic))
        self._unread, self._unsettled = set(partitions), set(partitions)
        self._held: dict[int, int] = {}  # by partition, where what brokers held ended when its end was first reached
        self._patience = Patience()
        self._consumer = client(
            Consumer,
            settings,
            settings.kafka.for_consumer()
            | {
                "group.id": f"{settings.kafka.group}-alert-reader",  # librdkafka wants one; nothing is committed for it
                "isolation.level": "read_committed",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "log_level": 2,
                "error_cb": self._notice,
            },
        )
        self._consumer.assign([TopicPartition(self._topic, number, OFFSET_BEGINNING) for number in partitions])

    @property
    def at_end(self) -> bool:
        """Whether all messages that were there have been read."""
        return not self._unread

    @property
    def is_settled(self) -> bool:
        """Whether they have been, and those of transactions that were open then, too, if these were committed."""
        return not self._unsettled

    def poll(self, seconds: float) -> Message | None:
        """Return the next message, None when none came within `seconds`.

        Raises:
            UserError: Kafka refuses.
        """
        try:
            message = self._consumer.poll(seconds)
        except KafkaException as error:
            raise UserError(f"{self._topic}: {error.args[0].str()}") from None
        self._patience.check()
        if message is None:
            return None
        trouble = message.error()
        if trouble is None:
            return message
        if trouble.code() == AT_END:
            self._take_end(message.partition(), message.offset())
        elif not trouble.retriable():
            raise UserError(f"{self._topic}: {trouble.str()}")
        return None

    def close(self) -> None:
        """Give back the connection."""
        self._consumer.close()

    def _take_end(self, partition: int, offset: int) -> None:
        self._unread.discard(partition)
        if partition not in self._held:
            place = TopicPartition(self._topic, partition)
            self._held[partition] = self._consumer.get_watermark_offsets(place, cached=True)[1]
        if offset >= self._held[partition]:  # else a transaction is open there, and another end is told when it is not
            self._unsettled.discard(partition)

    def _notice(self, error: KafkaError) -> None:
        if error.code() != KafkaError._ALL_BROKERS_DOWN:  # noqa: SLF001 - comes with an error that says which and why
            self._patience.notice(error)


def watch(settings: Settings) -> None:
    """Show the alerts as a picture that stays in place, until Ctrl-C.

    Raises:
        UserError: as `TopicReader` and `decode`.
    """
    view = LiveAlerts(settings.topics.alerts, columns)
    reader = TopicReader(settings, settings.topics.alerts)
    drawn = 0.0
    with closing(reader), Live(view, console=console, auto_refresh=False) as live:
        while True:
            message = reader.poll(_REDRAW_SECONDS)
            if message is not None:
                view.take(decode(message.value()), message.timestamp()[1] / 1000)
            if time.monotonic() - drawn >= _REDRAW_SECONDS:
                live.refresh()
                drawn = time.monotonic()


def read_alerts(settings: Settings, *, follow: bool = False, settled: bool = False) -> Iterator[bytes]:
    """Yield the committed alerts as published, those of a block in order.

    With `follow` never end. With `settled` wait for the end of transactions that are open, as after a kill.

    Raises:
        UserError: as `TopicReader`.
    """
    for message in read_messages(settings, follow=follow, settled=settled):
        yield message.value()


def read_messages(settings: Settings, *, follow: bool = False, settled: bool = False) -> Iterator[Message]:
    """Yield the messages of `read_alerts`.

    Raises:
        UserError: as `TopicReader`.
    """
    with closing(TopicReader(settings, settings.topics.alerts)) as reader:
        while follow or not (reader.is_settled if settled else reader.at_end):
            message = reader.poll(0.2)
            if message is not None:
                yield message


def decode(value: bytes) -> Alert:
    """Read a published alert.

    Raises:
        UserError: another version of this program wrote it.
    """
    try:
        return msgspec.json.decode(value, type=Alert)
    except msgspec.DecodeError as error:
        raise UserError(f"a message in the alerts topic is no alert of this version ({error}); use --json") from None


def columns(alert: Alert) -> tuple[Text, ...]:
    """Return time, severity, block, score, what happened and what was expected."""
    offender = alert.offender
    revision = f" (revision {alert.revision})" if alert.revision > 1 else ""
    expected = ", ".join(f"{other.event_id} {other.probability:.0%}" for other in offender.expected)
    if alert.reason == "counts":
        what = f"ended with {', '.join(f'{count.count} {count.event_id}' for count in offender.counts)}"
        expected = ", ".join(f"{count.usual} {count.event_id}" for count in offender.counts)
    elif alert.reason == "truncated":
        what = f"ended after {alert.events_seen} events"
    else:
        template = f": {offender.template}" if offender.template else ""
        what = f"event {offender.position} is {offender.event_id}{template}"
    when, *cells = (
        alert.last_event_time.replace("T", " ").removesuffix(".000Z").removesuffix("Z"),
        alert.block_id + revision,
        f"{alert.score:.2f} > {alert.threshold:.2f}",
        what,
        expected,
    )
    colour = SEVERITY_COLOURS.get(alert.severity, OTHER_COLOUR)
    return Text(when), Text(alert.severity, colour), *map(_plain, cells)


def _plain(text: str) -> Text:
    """Return text that the terminal takes for no more than text: names are written by anyone."""
    return Text(printable(text))


def _expected(names: Text) -> Text:
    return Text.assemble("expected ", names, style="dim")


def one_line(alert: Alert) -> Text:
    """Return the alert as a line."""
    when, severity, block, score, what, expected = columns(alert)
    block.stylize("bold")
    return Text("  ").join((when, severity, block, score, what, _expected(expected)))


if __name__ == "__main__":
    run(main)
