"""`python -m scripts.replay`: plays a file into the log topic, as the systems that wrote it would have."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
from confluent_kafka import KafkaError, KafkaException, Message, Producer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from consumer.clients import client
from consumer.settings import Settings, load_settings
from consumer.topics import TopicSpec, ensure_topics
from model.cli import argument_parser, console, run
from model.config import EventSettings
from model.errors import UserError
from model.lines import LineCutter, LineRules
from model.rawlog import is_raw, texts
from model.sessions import Event, read_events

FLUSH_SECONDS = 60.0
REPORT_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Line:
    """A raw log line; `timestamp` in milliseconds since 1970, None before the first line that tells one."""

    timestamp: int | None
    blocks: tuple[str, ...]
    text: str


TimedT = TypeVar("TimedT", bound=Event | Line)


@dataclass
class Replayed:
    """What a replay did; `failed` messages were not delivered, `failure` says why the last of them was not."""

    events: int = 0
    tombstones: int = 0
    failed: int = 0
    failure: str = ""


def main() -> None:
    """Play the file, showing progress, and say what was done."""
    parser = argument_parser("scripts.replay", "Play a session or event file into the log topic.")
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="event CSV, session JSONL, Event_traces.csv or raw lines"
    )
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--rate", type=float, metavar="N", help="events a second (default: as fast as Kafka takes them)")
    pace.add_argument("--speed", type=float, metavar="X", help="play timestamps at X times real time")
    parser.add_argument("--tombstones", action="store_true", help="end each block after its last event in the file")
    parser.add_argument(
        "--topic",
        metavar="T",
        help="play into this topic (default: topics.events; topics.lines for raw lines if events.format is json)",
    )
    keyed = parser.add_mutually_exclusive_group()
    keyed.add_argument("--keyed", action="store_true", default=True, help="key = block id, the first one (default)")
    keyed.add_argument("--unkeyed", dest="keyed", action="store_false", help="no key: blocks spread over partitions")
    arguments = parser.parse_args()
    settings = load_settings(arguments.config)
    for option in ("rate", "speed"):
        value = getattr(arguments, option)
        if value is not None and not value > 0:  # nan, too
            raise UserError(f"--{option} {value:g}: a number above zero is needed")
    if arguments.tombstones and not arguments.keyed:
        raise UserError("--tombstones needs keys: a tombstone names its block by its key; leave out --unkeyed")

    rules = LineRules.of(settings.events)
    raw = is_raw(arguments.file, rules)
    topics = settings.topics
    topic = arguments.topic or (topics.lines if raw and settings.events.format == "json" else topics.events)

    def read() -> Iterator[Event | Line]:
        return read_lines(arguments.file, rules) if raw else read_events(arguments.file)

    unit = "lines" if raw else "events"
    ensure_topics(settings, [TopicSpec(topic)])
    with console.status(Text(f"counting the {unit} of {arguments.file.name}")):
        lasts, total = Counter[str](), 0
        for item in read():
            lasts.update(blocks_of(item))
            total += 1
    started = time.monotonic()
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:,} of {task.total:,} " + unit),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task(f"replaying {arguments.file.name}", total=total)
        done = replay(
            settings,
            paced(read(), rate=arguments.rate, speed=arguments.speed),
            topic=topic,
            keyed=arguments.keyed,
            last_events=lasts if arguments.tombstones else None,
            report=lambda events: bar.update(task, completed=events),
        )
    seconds = time.monotonic() - started
    if done.failed:
        raise _undelivered(done, topic)
    tombstones = f", {done.tombstones:,} tombstones" if done.tombstones else ""
    console.print(
        f"{done.events:,} {unit} of {len(lasts):,} blocks{tombstones} into {topic} "
        f"in {seconds:.1f} s ({done.events / seconds:,.0f} {unit}/s)"
    )


def read_lines(path: Path, rules: LineRules) -> Iterator[Line]:
    """Yield the lines of a raw log; one without a time is as old as the one before it.

    Raises:
        UserError: the file cannot be read.
    """
    cutter = LineCutter(rules)
    last: int | None = None
    for text in texts(path):
        time_ms = cutter.time(text)
        last = last if time_ms is None else time_ms
        yield Line(last, tuple(cutter.cut(text)[0]), text)


def blocks_of(item: Event | Line) -> tuple[str, ...]:
    """Return the blocks that an event or a line is of."""
    return item.blocks if isinstance(item, Line) else (item.block_id,)


def replay(
    settings: Settings,
    events: Iterator[Event | Line],
    *,
    topic: str | None = None,
    keyed: bool = True,
    last_events: Counter[str] | None = None,
    report: Callable[[int], None] = lambda _: None,
) -> Replayed:
    """Produce `events`, or lines, in order, and wait until Kafka has them.

    Args:
        settings: where Kafka is and what an event's fields are called.
        events: what to produce.
        topic: where to; `topics.events` if None.
        keyed: whether a message's key is its block id.
        last_events: how many events each block has: a tombstone follows its last one. Only with keys.
        report: called ten times a second with the number of events so far, and at the end.

    Raises:
        UserError: a Kafka setting is wrong, or messages were lost in a replay that something interrupted.
    """
    done = Replayed()
    left = Counter(last_events)
    encode = encoder(settings.events)
    reported = time.monotonic()
    with Sink(settings, topic or settings.topics.events, done) as sink:
        for event in events:
            blocks = blocks_of(event)
            value = event.text.encode() if isinstance(event, Line) else encode(event)
            sink.produce(blocks[0].encode() if keyed and blocks else None, value)
            done.events += 1
            for block in blocks if last_events is not None else ():
                left[block] -= 1
                if left[block] == 0:
                    sink.produce(block.encode(), None)
                    done.tombstones += 1
            if time.monotonic() - reported > REPORT_SECONDS:
                report(done.events)
                reported = time.monotonic()
    report(done.events)
    return done


class Sink:
    """A producer that waits when Kafka is behind and counts what was not delivered; leaving it flushes."""

    def __init__(self, settings: Settings, topic: str, done: Replayed) -> None:
        self._topic = topic
        self._done = done
        self._producer = client(
            Producer,
            settings,
            # log_level 3: below it is news of things that librdkafka mends itself
            {"linger.ms": 20, "queue.buffering.max.messages": 200_000, "log_level": 3}
            | settings.kafka.for_producer()
            | {"enable.idempotence": True, "delivery.report.only.error": True},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if lost := self._producer.flush(FLUSH_SECONDS):
            self._done.failed += lost
            self._done.failure = self._done.failure or f"no broker took them within {FLUSH_SECONDS:.0f} s"
        if error is not None and self._done.failed:  # nobody gets to see `done`
            raise _undelivered(self._done, self._topic) from error

    def produce(self, key: bytes | None, value: bytes | None) -> None:
        """Hand over a message; waits while Kafka is behind."""
        while True:
            try:
                self._producer.produce(self._topic, value, key, on_delivery=self._on_delivery)
            except BufferError:
                self._producer.poll(0.1)
            except KafkaException as error:  # it cannot even be queued: too large, for example
                self._on_delivery(error.args[0])
                return
            else:
                self._producer.poll(0)
                return

    def _on_delivery(self, error: KafkaError | None, _: Message | None = None) -> None:
        if error is not None:
            self._done.failed += 1
            self._done.failure = error.str()


def _undelivered(done: Replayed, topic: str) -> UserError:
    return UserError(
        f"{done.failed:,} messages were not delivered to {topic}: {done.failure}; see to that and replay the file again"
    )


def encoder(fields: EventSettings) -> Callable[[Event], bytes]:
    """Return what turns an event into a message value with the configured field names."""
    encode = msgspec.json.Encoder().encode

    def value(event: Event) -> bytes:
        item: dict[str, Any] = {
            fields.block_id: event.block_id,
            fields.event_id: event.event_id,
            fields.timestamp: event.timestamp,
        }
        return encode(item)

    return value


def endless(events: Sequence[Event]) -> Iterator[Event]:
    """Yield `events` again and again, under fresh block ids and later and later."""
    span = events[-1].timestamp - events[0].timestamp + 1
    for turn in count():
        for event in events:
            yield Event(event.timestamp + turn * span, f"{event.block_id}.{turn}", event.event_id)


def paced(
    events: Iterator[TimedT],
    *,
    rate: float | None = None,
    speed: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[TimedT]:
    """Yield events no sooner than `rate` a second, or than their timestamps at `speed` times real time."""
    start = clock()
    first: int | None = None
    for number, event in enumerate(events):
        due = start
        if rate is not None:
            due += number / rate
        elif speed is not None and event.timestamp is not None:
            first = event.timestamp if first is None else first
            due += (event.timestamp - first) / 1000 / speed
        ahead = due - clock()
        if ahead > 0.001:
            sleep(ahead)
        yield event


if __name__ == "__main__":
    run(main)
