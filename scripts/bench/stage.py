"""The stage of every part: a broker, traffic, topics and settings for each trial, consumer processes."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import yaml
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, TopicPartition

from consumer.settings import Settings, load_settings
from consumer.topics import TopicSpec, ensure_topics, require_topic
from model.cli import console
from model.errors import UserError
from model.sessions import Event
from scripts.local_kafka import LocalKafka
from scripts.replay import Replayed, Sink, encoder, endless

Message = tuple[bytes | None, bytes | None]
"""Key and value."""

JOINED = "assigned partitions"
"""The consumer's log says this when it has joined its group."""

_PATIENCE_SECONDS = 900.0
_LOOK_SECONDS = 0.02


@dataclass(frozen=True)
class Trial:
    """A consumer group with settings, topics but for the events', and a settings file of its own."""

    settings: Settings
    config: Path


class Process(subprocess.Popen[bytes]):
    """A process with its log; ended with the block that it is used in."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            super().__init__(command, stdout=output, stderr=output)

    def said(self, words: str) -> bool:
        """Whether its log has these words.

        Raises:
            UserError: the process has ended without saying them.
        """
        text = self.log.read_text(errors="replace")
        if words not in text and self.poll() is not None:
            raise UserError(f"a process of the benchmark ended early; it said: {text[-500:].strip()}")
        return words in text

    @property
    def resident(self) -> int:
        """Bytes of memory in use."""
        done = subprocess.run(["ps", "-o", "rss=", "-p", str(self.pid)], capture_output=True, text=True, check=True)
        return int(done.stdout) * 1024

    def __exit__(self, *_: object) -> None:
        if self.poll() is None:
            self.terminate()
            try:
                self.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.kill()
        super().__exit__(None, None, None)


class Stage:
    """Makes trials on one broker, all with the model and the threshold of the settings given."""

    def __init__(self, given: Settings, kafka: LocalKafka, folder: Path, traffic: Sequence[Event]) -> None:
        self.given = given
        self.folder = folder
        self.traffic = traffic
        self.known: dict[str, Any] = {}
        """What parts have found out that others need, by name."""
        self._kafka = kafka
        self._numbers = count(1)
        self._streams: dict[int, str] = {}
        self.encode = encoder(given.events)

    def trial(
        self, *, events_topic: str = "", sections: Mapping[str, Mapping[str, Any]] | None = None, **top: Any
    ) -> Trial:
        """Make the topics of a new group, and write its settings: those given, changed by `sections` and `top`."""
        name = f"bench-{next(self._numbers)}"
        given = self.given
        changes: dict[str, Any] = {
            "kafka": {
                "bootstrap.servers": self._kafka.bootstrap,
                "log_level": 2,
                "consumer": {"group.id": name, "session.timeout.ms": 6000},
            },
            "topics": {
                "events": events_topic or f"{name}-events",
                **{topic: f"{name}-{topic}" for topic in ("alerts", "dead_letters", "state")},
            },
            "device": given.device,
            "model": {"path": str(given.model.path.resolve())},
            "calibration": {"path": str(given.calibration.path.resolve())},
            "scoring": given.scoring.model_dump(include={"every", "cache_windows", "max_batch"}),
            "events": given.events.model_dump(),
            **top,
        }
        for section, values in (sections or {}).items():
            changes[section] = {**changes.get(section, {}), **values}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(changes), encoding="utf-8")
        settings = load_settings(path)
        topics = settings.topics
        ensure_topics(settings, map(TopicSpec, (topics.events, topics.alerts, topics.dead_letters)))
        return Trial(settings, path)

    def consumer(self, trial: Trial) -> Process:
        """Start the real consumer."""
        return self.process([sys.executable, "-m", "consumer", "--config", str(trial.config)])

    def process(self, command: Sequence[str]) -> Process:
        """Start a process whose output goes to a log of its own."""
        return Process(command, self.folder / f"process-{next(self._numbers)}.log")

    def messages(self, events: Iterable[Event]) -> Iterator[Message]:
        """Yield events as Kafka will have them."""
        return ((event.block_id.encode(), self.encode(event)) for event in events)

    def stream(self, events: int) -> str:
        """Return a topic with that many messages of the traffic, repeated under fresh block ids; filled once."""
        if events not in self._streams:
            trial = self.trial()
            send(trial.settings, self.messages(islice(endless(self.traffic), events)), f"{events:,} messages")
            self._streams[events] = trial.settings.topics.events
        return self._streams[events]


def send(settings: Settings, messages: Iterable[Message], what: str) -> None:
    """Write messages to the event topic, as fast as Kafka takes them.

    Raises:
        UserError: some were not delivered.
    """
    done = Replayed()
    with console.status(f"writing {what}"), Sink(settings, settings.topics.events, done) as sink:
        for key, value in messages:
            sink.produce(key, value)
    if done.failed:
        raise UserError(f"{done.failed} messages were not delivered: {done.failure}")


class Committed:
    """How far a group has committed its input."""

    def __init__(self, settings: Settings) -> None:
        self._consumer = Consumer(settings.kafka.for_consumer() | {"isolation.level": "read_uncommitted"})
        topic = settings.topics.events
        self._places = [TopicPartition(topic, number) for number in range(require_topic(settings, topic))]

    def close(self) -> None:
        """Leave."""
        self._consumer.close()

    @property
    def total(self) -> int:
        """Messages in the topic."""
        return sum(self._consumer.get_watermark_offsets(place, timeout=10)[1] for place in self._places)

    @property
    def now(self) -> int:
        """Messages whose offsets are committed."""
        try:
            return sum(max(place.offset, 0) for place in self._consumer.committed(self._places, timeout=10))
        except KafkaException:  # the coordinator moves: the next look will tell
            return 0


@contextmanager
def committed(settings: Settings) -> Iterator[Committed]:
    """Watch a group while the block runs."""
    watch = Committed(settings)
    try:
        yield watch
    finally:
        watch.close()


class Drain:
    """How a group came through its topic: (seconds, messages committed by then), growing."""

    def __init__(self, commits: Sequence[tuple[float, int]]) -> None:
        self._commits = commits

    def rate(self, skip: int = 0) -> float:
        """Return the messages a second after the first `skip` ones and the commit after them.

        Raises:
            UserError: a single commit was all.
        """
        (began, first), (ended, last) = next(at for at in self._commits if at[1] > skip), self._commits[-1]
        if first >= last:
            raise UserError(f"{last:,} messages are one commit: too few to tell a rate; ask for more of them")
        return (last - first) / (ended - began)


def drained(settings: Settings, process: Process | None = None) -> Drain:
    """Wait until the group has committed all.

    Raises:
        UserError: it takes too long, or the process has ended.
    """
    commits = [(0.0, 0)]
    with committed(settings) as watch:
        total = watch.total
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline:
            done, now = watch.now, time.monotonic()
            if done > commits[-1][1]:
                commits.append((now, done))
            if done >= total:
                return Drain(commits)
            if process is not None and process.poll() is not None:
                process.said("the whole topic")
            time.sleep(_LOOK_SECONDS)
    raise UserError("the consumer does not get through the topic")


def settled(settings: Settings, process: Process) -> None:
    """Wait until the group has committed all, however few there are.

    Raises:
        UserError: it takes too long, or the process has ended.
    """
    with committed(settings) as watch:
        total = watch.total
        wait(
            lambda: watch.now >= total or (process.poll() is not None and process.said("the whole topic")), "the topic"
        )


def wait(condition: Callable[[], Any], what: str) -> Any:
    """Return what `condition` gives as soon as it is true.

    Raises:
        UserError: it does not become true.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise UserError(f"{what} took longer than {_PATIENCE_SECONDS:.0f} s")
        time.sleep(0.05)
    return found


def bare_loop(settings: Settings, read_ahead: Mapping[str, Any]) -> float:
    """Return the messages a second of a loop that reads values and does nothing, with some settings of librdkafka."""
    with committed(settings) as watch:
        total = watch.total
    topic = settings.topics.events
    consumer = Consumer({**read_ahead, **settings.kafka.for_consumer(), "group.id": "bare-loop"})
    consumer.assign([TopicPartition(topic, n, OFFSET_BEGINNING) for n in range(require_topic(settings, topic))])
    done = len(consumer.consume(1, 30))
    started = time.monotonic()
    while done < total:
        for message in consumer.consume(10_000, 0.1):
            message.value()
            done += 1
    seconds = time.monotonic() - started
    consumer.close()
    return done / seconds
