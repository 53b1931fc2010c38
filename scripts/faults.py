"""`python -m scripts.faults`: breaks the consumer on purpose, on a real Kafka, and counts what went wrong.

Several consumer processes read a stream while a seeded schedule kills them at random moments and at chosen points,
stops them until they are fenced, lets instances join and leave, aborts transactions, and kills the broker. Then
`scripts.verify` compares the alerts with those of the detector's core over the same events without any fault.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path
from random import Random
from threading import Thread

import yaml
from confluent_kafka import Consumer, KafkaException, TopicPartition
from rich.table import Table

from consumer.artifacts import Artifacts
from consumer.faultpoints import PLACES
from consumer.patience import NOT_COMMITTED
from consumer.settings import Settings, load_settings, milliseconds
from consumer.topics import TopicSpec, ensure_topics, require_topic
from model.cli import argument_parser, console, run
from model.errors import UserError
from model.files import check_folder
from model.sessions import Event, read_events
from scripts.local_kafka import QUICK_ABORTS, LocalKafka, free_port
from scripts.output import check_file, write_json
from scripts.replay import endless, paced, replay
from scripts.simulator import simulate
from scripts.verify import Comparison, verify

_DRAIN_SECONDS = 300.0
_SESSION_MS = 6000


@dataclass
class Tally:
    """What was done to the consumers, and what they said about it."""

    seed: int
    events: int = 0
    kills: int = 0
    broker_restarts: int = 0
    joins: int = 0
    leaves: int = 0
    stops: int = 0
    aborts: int = 0
    rebalances: int = 0
    fenced: int = 0
    unexpected_exits: int = 0
    seconds: float = 0.0
    exits: list[str] = field(default_factory=list)


def main() -> int:
    """Run the schedule and compare; the exit status is 0 only if every alert is there once."""
    parser = argument_parser(
        "scripts.faults", "Break the consumer on purpose and check that no alert is lost or doubled."
    )
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="events to stream (default: simulated ones)")
    parser.add_argument("--events", type=int, default=200_000, help="stream at least so many, the file repeated")
    parser.add_argument("--rate", type=float, help="events a second (default: spread over the schedule)")
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs, half of them at chosen points of the code")
    parser.add_argument("--broker-restarts", type=int, default=2)
    parser.add_argument("--joins", type=int, default=4, help="instances that join, and leave again later")
    parser.add_argument("--fencings", type=int, default=1, help="SIGSTOPs that outlast the group's session timeout")
    parser.add_argument("--aborts", type=int, default=2, help="aborted transactions")
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result as JSON")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep logs and the broker's data there")
    arguments = parser.parse_args()
    check_file("--json", arguments.json)
    check_folder("--keep", arguments.keep)
    if arguments.keep and any(arguments.keep.iterdir()):
        raise UserError(f"--keep {arguments.keep}: has other things in it; name an empty or a new folder")
    for option in ("events", "instances"):
        if getattr(arguments, option) < 1:
            raise UserError(f"--{option} {getattr(arguments, option)}: at least one is needed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        tally, result = _Trial(arguments, arguments.keep or Path(scratch)).run()
    outcome = asdict(result) | asdict(tally)
    table = Table("", "count", title="faults, and what came of them")
    for name, value in outcome.items():
        if name != "exits":
            table.add_row(name.replace("_", " "), f"{value:,.0f}")
    console.print(table)
    write_json(arguments.json, outcome)
    return 0 if result.is_exact and not tally.unexpected_exits else 1


class _Trial:
    """One run of the schedule against a broker of its own."""

    def __init__(self, arguments: Namespace, folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        self._random = Random(arguments.seed)
        self._tally = Tally(arguments.seed)
        self._instances: dict[subprocess.Popen[bytes], Path] = {}
        self._started = count(1)
        self._broker_away = False
        self._kafka = LocalKafka(
            folder / "kafka",
            free_port(),
            properties=QUICK_ABORTS,
        )

    def run(self) -> tuple[Tally, Comparison]:
        settings = self._settings()
        begun = time.monotonic()
        try:
            self._kafka.up()
            self._play(settings, begun)
            self._read_logs()
            result = verify(settings)
        finally:
            self._kafka.down(purge=self._arguments.keep is None)
        self._tally.seconds = time.monotonic() - begun
        return self._tally, result

    def _play(self, settings: Settings, begun: float) -> None:
        """Stream the events while the faults happen, until the consumers have committed all; then none of them runs."""
        try:
            ensure_topics(settings, [TopicSpec(settings.topics.events)])
            schedule = self._schedule()
            events = list(_repeated(self._arguments.file, self._arguments.events, self._arguments.seed))
            self._tally.events = len(events)
            rate = self._arguments.rate or max(1000.0, len(events) / (2.5 * len(schedule) + 20))
            last = {event.block_id: 0 for event in events}
            for event in events:
                last[event.block_id] += 1
            source = Thread(target=self._stream, args=(settings, events, rate, last), daemon=True)
            for _ in range(self._arguments.instances):
                self._start()
            source.start()
            for number, fault in enumerate(schedule, 1):
                console.print(f"{time.monotonic() - begun:6.0f} s  {number}/{len(schedule)}  {fault}", style="dim")
                getattr(self, f"_{fault}")()
                self._supervise(self._random.uniform(0.3, 2.0))
            console.print(f"{time.monotonic() - begun:6.0f} s  no more faults: the rest of the stream", style="dim")
            while source.is_alive():
                self._supervise(0.5)
            self._drain(settings)
        finally:
            for instance in self._instances:
                instance.kill()
                instance.wait()

    def _settings(self) -> Settings:
        """Write the trial's settings: those given, with topics, brokers and short times of its own."""
        given = load_settings(self._arguments.config)
        Artifacts.load(given)  # consumers without a model would end as often as they are started
        changes = {
            "kafka": {
                "bootstrap.servers": self._kafka.bootstrap,
                "log_level": 2,  # that the broker is away is no news here
                "consumer": {"group.id": "faults", "session.timeout.ms": _SESSION_MS, "heartbeat.interval.ms": 500},
                "producer": {"transaction.timeout.ms": 5000},
            },
            "topics": {"partitions": 6},
            "device": "cpu",
            "model": {"path": str(given.model.path.resolve())},
            "calibration": {"path": str(given.calibration.path.resolve())},
            "scoring": {"every": given.scoring.every},
            "windows": {"idle_timeout": f"{milliseconds(given.windows.idle_timeout)}ms"},
            "delivery": given.delivery,
            "checkpoint": {"interval": "2s"},
        }
        path = self._folder / "config.yaml"
        path.write_text(yaml.safe_dump(changes), encoding="utf-8")
        return load_settings(path)

    def _schedule(self) -> list[str]:
        wanted = self._arguments
        schedule = (
            ["kill"] * (wanted.kills // 2)
            + ["kill_at_a_point"] * (wanted.kills - wanted.kills // 2)
            + ["restart_broker"] * wanted.broker_restarts
            + ["join"] * wanted.joins
            + ["leave"] * wanted.joins
            + ["fence"] * wanted.fencings
            + ["abort"] * wanted.aborts
        )
        self._random.shuffle(schedule)
        return schedule

    def _stream(self, settings: Settings, events: list[Event], rate: float, last: dict[str, int]) -> None:
        done = replay(settings, paced(iter(events), rate=rate), last_events=Counter(last))
        if done.failed:
            self._tally.exits.append(f"{done.failed} events were not delivered: {done.failure}")

    def _start(self, fault: str = "") -> subprocess.Popen[bytes]:
        log = self._folder / f"consumer-{next(self._started)}.log"
        with log.open("wb") as output:
            instance = subprocess.Popen(
                [sys.executable, "-m", "consumer", "--config", str(self._folder / "config.yaml")],
                stdout=output, stderr=output, env=os.environ | {"LOG_ANOMALY_FAULT": fault},
            )  # fmt: skip
        self._instances[instance] = log
        return instance

    def _alive(self) -> list[subprocess.Popen[bytes]]:
        return [instance for instance in self._instances if instance.poll() is None]

    def _any(self) -> subprocess.Popen[bytes]:
        self._supervise(0)  # the last of them may have ended just now
        return self._random.choice(self._alive())

    def _supervise(self, seconds: float) -> None:
        """Wait, and start again what ends: as an orchestrator would."""
        end = time.monotonic() + seconds
        while True:
            for instance in [instance for instance in self._instances if instance.poll() is not None]:
                self._note_end(instance)
            while len(self._alive()) < self._arguments.instances:
                self._start()
            if time.monotonic() >= end:
                return
            time.sleep(0.1)

    def _note_end(self, instance: subprocess.Popen[bytes]) -> None:
        log = self._instances.pop(instance)
        if instance.returncode == -signal.SIGKILL:
            self._tally.kills += 1
        elif instance.returncode == 2 and self._broker_away:
            pass  # it was just starting and said that no broker answers
        elif instance.returncode not in {0, NOT_COMMITTED, -signal.SIGTERM}:
            self._tally.unexpected_exits += 1
            lines = log.read_text(errors="replace").splitlines()
            self._tally.exits.append(f"{log.name}: status {instance.returncode}: {lines[-1] if lines else ''}")
            console.print(self._tally.exits[-1], style="red")

    def _kill(self) -> None:
        self._any().kill()

    def _kill_at_a_point(self) -> None:
        """Replace an instance by one that dies at a place in the code; wait until it has."""
        place = self._random.choice([place for place in PLACES if place not in {"abort", "reload"}])
        times = self._random.randint(1, 8) if place.endswith("commit") else self._random.randint(1, 2)
        self._any().terminate()
        doomed = self._start(f"{place}:{times}")
        end = time.monotonic() + 20
        while doomed.poll() is None and time.monotonic() < end:
            self._supervise(0.2)
        if doomed.poll() is None:
            doomed.kill()  # it did not come by there often enough

    def _abort(self) -> None:
        self._tally.aborts += 1
        self._any().terminate()
        self._start(f"abort:{self._random.randint(1, 8)}")
        self._supervise(5)

    def _fence(self) -> None:
        """Stop an instance until the group has given its partitions to others; then let it go on."""
        self._tally.stops += 1
        stopped = self._any()
        stopped.send_signal(signal.SIGSTOP)
        self._supervise(_SESSION_MS / 1000 + 4)
        if stopped.poll() is None:
            stopped.send_signal(signal.SIGCONT)
        self._supervise(3)

    def _join(self) -> None:
        self._tally.joins += 1
        self._start()

    def _leave(self) -> None:
        self._tally.leaves += 1
        self._any().terminate()

    def _restart_broker(self) -> None:
        self._tally.broker_restarts += 1
        self._broker_away = True
        self._kafka.kill()
        self._supervise(self._random.uniform(0.5, 3))
        self._kafka.up()
        self._supervise(1)
        self._broker_away = False

    def _drain(self, settings: Settings) -> None:
        """Wait until the group has committed all input, then stop everybody in good order."""
        deadline = time.monotonic() + _DRAIN_SECONDS
        while (left := lag(settings)) != 0:
            self._supervise(0.5)
            if time.monotonic() > deadline:
                raise UserError(
                    f"{left} events are still not committed after {_DRAIN_SECONDS:.0f} s; see the logs (--keep)"
                )
        for instance in self._alive():
            instance.terminate()
        for instance in list(self._instances):
            instance.wait(timeout=60)
            self._note_end(instance)

    def _read_logs(self) -> None:
        for log in self._folder.glob("consumer-*.log"):
            text = log.read_text(errors="replace")
            self._tally.rebalances += text.count("assigned partitions")
            self._tally.fenced += text.count("lost partitions") + text.count("transaction aborted")


def _repeated(file: Path | None, events: int, seed: int) -> Iterator[Event]:
    """Yield the stream in whole turns until there are enough events."""
    once = list(read_events(file)) if file else simulate(min(2000, events // 20 + 1), 0.05, seed).events
    turns = -(-events // len(once))
    return islice(endless(once), turns * len(once))


def lag(settings: Settings) -> int:
    """Return the number of input messages that the group has not committed; -1 while nobody can say."""
    topic = settings.topics.events
    consumer = Consumer(settings.kafka.for_consumer() | {"isolation.level": "read_committed", "log_level": 0})
    try:
        places = [TopicPartition(topic, number) for number in range(require_topic(settings, topic))]
        return sum(
            consumer.get_watermark_offsets(place, timeout=10)[1] - max(place.offset, 0)
            for place in consumer.committed(places, timeout=10)
        )
    except KafkaException:
        return -1
    finally:
        consumer.close()


if __name__ == "__main__":
    run(main)
