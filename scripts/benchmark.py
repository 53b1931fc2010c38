"""`python -m scripts.benchmark`: how fast, on a real Kafka of its own, and what exactly-once costs.

Everything is measured in one run on one machine, so the ratios mean something even where the machine is noisy: the
bare `consume()` loop first, which is the ceiling, then the real consumer process with both deliveries, the time from
a produced event to its visible alert, the return after kill -9 with many open blocks, and a flood of garbage.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import numpy as np
import yaml
from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition
from rich.table import Table

from consumer.settings import Settings, load_settings
from consumer.topics import TopicSpec, ensure_topics, require_topic
from model.bundle import Bundle
from model.cli import argument_parser, console, run
from model.errors import UserError
from model.sessions import Event, read_events
from scripts.alerts import TopicReader
from scripts.faults import lag
from scripts.local_kafka import QUICK_ABORTS, LocalKafka, free_port
from scripts.replay import Replayed, Sink, encoder, endless, paced, replay
from scripts.simulator import simulate

PARTS = ("throughput", "latency", "restore", "garbage")
_DELIVERIES = ("exactly_once", "at_least_once")
_WAIT_SECONDS = 300.0


def main() -> None:
    """Measure what was asked for, show it, write it."""
    parser = argument_parser(
        "scripts.benchmark", "Measure throughput, latency, restart and robustness on a real Kafka."
    )
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="events to stream (default: simulated ones)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--events", type=int, default=1_000_000, help="of the throughput part")
    parser.add_argument("--rate", type=float, default=5000, help="events a second of the latency part")
    parser.add_argument("--seconds", type=float, default=15, help="of the latency part")
    parser.add_argument("--open-blocks", type=int, default=500_000, help="of the restore part")
    parser.add_argument("--garbage", type=int, default=1_000_000, help="bad messages; a tenth as many good ones")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the results as JSON")
    arguments = parser.parse_args()
    given = load_settings(arguments.config)
    traffic = _traffic(arguments.file, Bundle.load(given.model.path))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        kafka = LocalKafka(
            Path(scratch) / "kafka",
            free_port(),
            properties=QUICK_ABORTS,
        )
        kafka.up()
        bench = _Bench(given, kafka, Path(scratch), traffic)
        try:
            if "throughput" in arguments.only:
                results["throughput"] = bench.throughput(arguments.events)
            if "latency" in arguments.only:
                results["latency_ms"] = bench.latency(arguments.rate, arguments.seconds)
            if "restore" in arguments.only:
                results["restore"] = bench.restore(arguments.open_blocks)
            if "garbage" in arguments.only:
                results["garbage"] = bench.garbage(arguments.garbage)
        finally:
            kafka.down(purge=True)
    for part, values in results.items():
        table = Table("", "", title=part)
        for name, value in _flat(values):
            table.add_row(name, f"{value:,.3g}" if isinstance(value, float) and value < 1000 else f"{value:,.0f}")
        console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


class _Bench:
    """Runs consumers with settings of their own against one broker."""

    def __init__(self, given: Settings, kafka: LocalKafka, folder: Path, traffic: Sequence[Event]) -> None:
        self._given = given
        self._traffic = traffic
        self._kafka = kafka
        self._folder = folder
        self._names = count(1)

    def throughput(self, events: int) -> dict[str, float]:
        """Messages a second: the bare loop, and the consumer with each delivery, from the same topic."""
        settings, _ = self._settings("exactly_once")
        self._fill(settings, islice(endless(self._traffic), events))
        ceiling = _bare_loop(settings)
        found: dict[str, float] = {"messages": float(events), "consume_ceiling_eps": ceiling}
        for delivery in _DELIVERIES:
            settings, config = self._settings(delivery, events_topic=settings.topics.events)
            with self._consumer(config):
                found[f"{delivery}_eps"] = _drain_rate(settings)
            found[f"{delivery}_ratio"] = found[f"{delivery}_eps"] / ceiling
        return found

    def latency(self, rate: float, seconds: float) -> dict[str, dict[str, float]]:
        """Milliseconds from producing an event to reading its alert with read_committed, under normal traffic."""
        return {delivery: self._latency(delivery, rate, seconds) for delivery in _DELIVERIES}

    def _latency(self, delivery: str, rate: float, seconds: float) -> dict[str, float]:
        settings, config = self._settings(delivery)
        with self._consumer(config) as process:
            _wait(lambda: "assigned partitions" in process.log.read_text(), "joining the group")
            traffic = paced(islice(endless(self._traffic), int(rate * seconds)), rate=rate)
            thread = Thread(target=replay, args=(settings, traffic), daemon=True)
            thread.start()
            producer = Producer(settings.kafka.for_producer() | {"linger.ms": 0})
            encode = encoder(settings.events)
            sent: dict[str, float] = {}
            taken: dict[str, float] = {}
            reader = TopicReader(settings, settings.topics.alerts)
            while thread.is_alive() or len(taken) < len(sent):
                if thread.is_alive():
                    probe = Event(self._traffic[0].timestamp, f"probe-{len(sent)}", "never seen before")
                    sent[probe.block_id] = time.monotonic()
                    producer.produce(settings.topics.events, encode(probe), probe.block_id)
                    producer.poll(0)
                until = time.monotonic() + 0.02
                while (left := until - time.monotonic()) > 0:
                    message = reader.poll(left)
                    if message is not None:
                        block = message.key().decode()
                        if block in sent:
                            taken.setdefault(block, time.monotonic())
                if not thread.is_alive() and time.monotonic() - max(sent.values()) > 30:
                    raise UserError(f"{len(sent) - len(taken)} alerts did not come")
            reader.close()
        delays = 1000 * np.array([taken[block] - at for block, at in sent.items()])
        quantiles = {f"p{q:g}": float(np.percentile(delays, q)) for q in (50, 99, 99.9)}
        return {"rate_eps": rate, "probes": float(len(delays)), **quantiles}

    def restore(self, blocks: int) -> dict[str, float]:
        """Seconds from kill -9 to the first new alert, with that many blocks open."""
        settings, config = self._settings("exactly_once", checkpoint="5s")
        event = self._traffic[0].event_id
        opened = (
            Event(1_704_067_200_000 + number // 100, f"open-{number % blocks}", event) for number in range(2 * blocks)
        )
        self._fill(settings, opened)
        with self._consumer(config) as process:
            _wait(lambda: lag(settings) == 0, "taking in the open blocks")
            time.sleep(20)  # a checkpoint or two: 20,000 sessions a commit
            resident = _resident_mb(process)
            process.kill()
            process.wait()
        killed = time.monotonic()
        self._fill(settings, [Event(1_704_067_300_000, "probe", "never seen before")])
        with self._consumer(config) as process:
            reader = TopicReader(settings, settings.topics.alerts)
            while True:
                message = reader.poll(1)
                if message is not None and message.key() == b"probe":
                    break
                if time.monotonic() - killed > _WAIT_SECONDS:
                    raise UserError(f"no alert after the restart; the consumer says: {process.log.read_text()[-500:]}")
            first = time.monotonic() - killed
            log = process.log.read_text()
            reader.close()
        restored = re.findall(r"([\d,]+) open blocks restored in ([\d.]+) s \(([\d.]+) s in Kafka\)", log)
        total = sum(float(seconds) for _, seconds, _ in restored)
        return {
            "open_blocks": float(sum(int(number.replace(",", "")) for number, _, _ in restored)),
            "resident_mb": resident,
            "first_alert_after_kill_s": first,
            "restore_s": total,
            "restore_kafka_share": sum(float(inside) for _, _, inside in restored) / total if total else 0.0,
            "session_timeout_s": 6.0,
        }

    def garbage(self, bad: int) -> dict[str, float]:
        """Short good blocks among many bad messages: all processed, all bad ones buried, memory flat."""
        settings, config = self._settings("exactly_once")
        good = bad // 10
        random = Random(1)
        encode = encoder(settings.events)

        def messages(begin: int, end: int) -> Iterator[tuple[bytes | None, bytes | None]]:
            for number in range(begin, end):
                for _ in range(10):
                    yield _junk(random)
                event = Event(1_704_067_200_000, f"good-{number}", "never seen before")
                yield event.block_id.encode(), encode(event)
                yield event.block_id.encode(), None  # closes it: what memory then still grows by is a leak

        with self._consumer(config) as process:
            _wait(lambda: "assigned partitions" in process.log.read_text(), "joining the group")
            self._send(settings, messages(0, good // 2))
            _wait(lambda: lag(settings) == 0, "the first half")
            before = _resident_mb(process)
            self._send(settings, messages(good // 2, good))
            _wait(lambda: lag(settings) == 0, "the second half")
            after = _resident_mb(process)
        alerted = {message.key() for message in _all(settings, settings.topics.alerts)}
        return {
            "bad": float(10 * good),
            "good": float(good),
            "good_alerted": float(len(alerted)),
            "dead_letters": float(sum(1 for _ in _all(settings, settings.topics.dead_letters))),
            "resident_mb_half_way": before,
            "resident_mb_at_end": after,
        }

    def _settings(self, delivery: str, events_topic: str = "", checkpoint: str = "30s") -> tuple[Settings, Path]:
        """Make topics and a group of their own, and write their settings."""
        name = f"bench-{next(self._names)}"
        changes = {
            "kafka": {
                "bootstrap.servers": self._kafka.bootstrap,
                "log_level": 2,
                "consumer": {"group.id": name, "session.timeout.ms": 6000},
            },
            "topics": {
                "events": events_topic or f"{name}-events",
                **{topic: f"{name}-{topic}" for topic in ("alerts", "dead_letters", "state")},
            },
            "device": self._given.device,
            "model": {"path": str(self._given.model.path.resolve())},
            "calibration": {"path": str(self._given.calibration.path.resolve())},
            "scoring": self._given.scoring.model_dump(include={"every", "cache_windows", "max_batch"}),
            "delivery": delivery,
            "checkpoint": {"interval": checkpoint},
        }
        path = self._folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(changes), encoding="utf-8")
        settings = load_settings(path)
        topics = settings.topics
        ensure_topics(settings, [TopicSpec(topic) for topic in (topics.events, topics.alerts, topics.dead_letters)])
        return settings, path

    @contextmanager
    def _consumer(self, config: Path) -> Iterator["_Process"]:
        """Run the real consumer process while the block runs."""
        process = _Process(config)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(timeout=60)

    @staticmethod
    def _fill(settings: Settings, events: Iterable[Event]) -> None:
        _check(replay(settings, iter(events)))

    @staticmethod
    def _send(settings: Settings, messages: Iterable[tuple[bytes | None, bytes | None]]) -> None:
        done = Replayed()
        with Sink(settings, settings.topics.events, done) as sink:
            for key, value in messages:
                sink.produce(key, value)
        _check(done)


class _Process(subprocess.Popen[bytes]):
    """A consumer process with its log."""

    def __init__(self, config: Path) -> None:
        self.log = config.with_suffix(f".{time.monotonic_ns()}.log")
        with self.log.open("wb") as output:
            super().__init__([sys.executable, "-m", "consumer", "--config", str(config)], stdout=output, stderr=output)


def _check(done: Replayed) -> None:
    if done.failed:
        raise UserError(f"{done.failed} messages were not delivered: {done.failure}")


def _traffic(file: Path | None, bundle: Bundle) -> Sequence[Event]:
    """Return the events to stream; those of another system than the model's would be nothing but alerts.

    Raises:
        UserError: the model knows less than half of them.
    """
    events = list(read_events(file)) if file else simulate(4000, 0.03, 1).events
    known = sum(event.event_id in bundle.vocabulary.tokens for event in events)
    if 2 * known < len(events):
        raise UserError(
            f"the model knows {known:,} of {len(events):,} events of {file or 'the simulator'}: "
            "name a FILE of its own system, or train it on python -m scripts.simulator"
        )
    return events


def _bare_loop(settings: Settings) -> float:
    """Return the messages a second of a loop that reads values and does nothing."""
    total = lag(settings)
    consumer = Consumer(settings.kafka.for_consumer() | {"auto.offset.reset": "earliest", "group.id": "bare-loop"})
    topic = settings.topics.events
    partitions = range(require_topic(settings, topic))
    consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in partitions])
    done = len(consumer.consume(1, 30))
    started = time.monotonic()
    while done < total:
        for message in consumer.consume(10_000, 0.1):
            message.value()
            done += 1
    seconds = time.monotonic() - started
    consumer.close()
    return done / seconds


def _drain_rate(settings: Settings) -> float:
    """Return the messages a second at which the group commits, from its first commit to its last."""
    total = _wait(lambda: lag(settings), "the topic")
    first: tuple[float, int] | None = None
    deadline = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < deadline:
        left, now = lag(settings), time.monotonic()
        if first is None and 0 <= left < total:
            first = (now, left)
        if left == 0 and first is not None:
            return first[1] / (now - first[0])
    raise UserError("the consumer does not get through the topic")


def _junk(random: Random) -> tuple[bytes | None, bytes | None]:
    kind = random.randrange(6)
    if kind == 0:
        return None, random.randbytes(random.randint(0, 300))
    if kind == 1:
        return b"k", b"[" * random.randint(1, 3000)
    if kind == 2:
        return b"k", b'{"block_id":"k","event_id":"e","timestamp":4000000000000}'
    if kind == 3:
        return b"other", b'{"block_id":"k","event_id":"e","timestamp":1}'
    if kind == 4:
        return b"k", b'{"block_id":"","event_id":"e","timestamp":NaN}'
    return None, None


def _all(settings: Settings, topic: str) -> Iterator[Any]:
    reader = TopicReader(settings, topic)
    try:
        while not reader.at_end:
            message = reader.poll(0.5)
            if message is not None:
                yield message
    finally:
        reader.close()


def _resident_mb(process: subprocess.Popen[bytes]) -> float:
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(process.pid)], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def _wait(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + _WAIT_SECONDS
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise UserError(f"{what} took longer than {_WAIT_SECONDS:.0f} s")
        time.sleep(0.1)
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield prefix + name, value


if __name__ == "__main__":
    run(main)
