"""`python -m scripts.demo`: the whole line in about two minutes, with nothing installed but this project.

A simulated cluster writes logs; the model trains on healthy blocks, the threshold comes from others, and the real
consumer process watches a live stream in which a few blocks fail. The broker is librdkafka's built-in mock, which
is enough to show the line and proves nothing about delivery: for that there is scripts.local_kafka.
"""

import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaml
from confluent_kafka.admin import AdminClient
from rich.rule import Rule
from rich.table import Table

from consumer.alerts import Alert
from consumer.settings import Settings, load_settings
from model.cli import argument_parser, console, run
from model.errors import UserError
from model.files import check_folder
from scripts.alerts import TopicReader, one_line
from scripts.replay import paced, replay
from scripts.simulator import Workload, simulate, write
from scripts.systems import HDFS

_RATE = 3000.0
_QUIET_SECONDS = 3.0
_PATIENCE_SECONDS = 60.0
_SHOWN = 25


@dataclass
class _Found:
    """Alerts as they came in, by block."""

    alerts: dict[str, Alert] = field(default_factory=dict)
    shown: int = 0


def main() -> int:
    """Run the demo; the exit status is 0 only if faults were found."""
    parser = argument_parser("scripts.demo", "Show the whole line on a simulated cluster and an embedded broker.")
    parser.add_argument("--folder", type=Path, default=Path("artifacts/demo"), help="where everything is written")
    parser.add_argument("--blocks", type=int, default=1200, help="blocks in the live stream (default: 1200)")
    parser.add_argument("--training-blocks", type=int, default=3000, help="healthy blocks to learn from")
    parser.add_argument("--epochs", type=int, default=25, help="passes over them")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    check_folder("--folder", folder)
    load_settings(arguments.config)  # a mistake in it should be told before anything starts

    _title("1. A simulated cluster writes its logs")
    for name, seed in (("train", 1), ("calibration", 2)):
        write(simulate(arguments.training_blocks, 0.0, 1000 * arguments.seed + seed), HDFS, folder / name)
    live = simulate(arguments.blocks, 0.03, 1000 * arguments.seed + 3, prefix="live_")
    write(live, HDFS, folder / "live")
    console.print(
        f"{arguments.training_blocks:,} healthy blocks to learn from, as many to calibrate on, and a live stream of "
        f"{len(live.events):,} events of {len(live.blocks):,} blocks, {len(live.faults)} of which will fail"
    )

    with embedded_broker() as bootstrap:
        config = configure(folder, bootstrap, arguments.epochs)
        settings = load_settings(config)
        _title("2. python -m model: what healthy looks like")
        command("model", config, "--normal", str(folder / "train" / "sessions.jsonl"))
        _title("3. python -m calibration: where healthy ends")
        command("calibration", config, "--normal", str(folder / "calibration" / "sessions.jsonl"))
        _title("4. python -m consumer: watching the stream")
        found, seconds = _stream(settings, config, live, folder / "consumer.log")
    return _summary(live, found, seconds)


@contextmanager
def embedded_broker() -> Iterator[str]:
    """Run librdkafka's mock cluster; it lives as long as its client."""
    client = AdminClient({"bootstrap.servers": "mock", "test.mock.num.brokers": 1, "log_level": 0})
    brokers = client.list_topics(timeout=10).brokers.values()
    yield ",".join(f"{broker.host}:{broker.port}" for broker in brokers)


def configure(folder: Path, bootstrap: str, epochs: int, **changes: Any) -> Path:
    """Write the demo's settings, those that differ from the defaults, and make its topics; return the file."""
    settings: dict[str, Any] = {
        "kafka": {"bootstrap.servers": bootstrap, "consumer": {"group.id": "demo"}},
        "device": "cpu",
        "delivery": "at_least_once",  # the mock has no transactional offsets
        "model": {"path": str(folder / "model")},
        "training": {"epochs": epochs},
        "calibration": {"path": str(folder / "threshold.json"), "quantile": 0.995},
    }
    for section, values in changes.items():
        settings[section] = settings.get(section, {}) | values
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    topics = Settings().topics
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for name in (topics.events, topics.alerts, topics.dead_letters, topics.state):
        admin.list_topics(topic=name, timeout=10)  # the mock creates a topic when it is asked about it
    return path


def command(module: str, config: Path, *options: str) -> None:
    """Run one of the project's commands to its end.

    Raises:
        UserError: it fails.
    """
    done = subprocess.run([sys.executable, "-m", module, "--config", str(config), *options], check=False)
    if done.returncode:
        raise UserError(f"python -m {module} ended with status {done.returncode}; its message is above")


def _stream(settings: Settings, config: Path, live: Workload, log: Path) -> tuple[_Found, float]:
    """Start the consumer, play the live stream, show alerts as they come; return them and the seconds it took."""
    found = _Found()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "consumer", "--config", str(config)], stdout=output, stderr=output
        )
    try:
        reader = TopicReader(settings, settings.topics.alerts)
        started = time.monotonic()

        def show(_: int) -> None:
            _take(reader, found)

        events = paced(iter(live.events), rate=_RATE)
        replay(settings, events, last_events=Counter(event.block_id for event in live.events), report=show)
        console.print(f"{len(live.events):,} events played in {time.monotonic() - started:.0f} s", style="dim")
        end = time.monotonic() + _PATIENCE_SECONDS
        quiet = time.monotonic() + _QUIET_SECONDS
        while time.monotonic() < min(end, quiet):
            if process.poll() is not None:
                raise UserError(f"the consumer ended early; its last words are in {log}")
            if _take(reader, found, wait=0.2) or not found.alerts:
                quiet = time.monotonic() + _QUIET_SECONDS
        seconds = time.monotonic() - started
        reader.close()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
    return found, seconds


def _take(reader: TopicReader, found: _Found, wait: float = 0.0) -> bool:
    """Show the alerts that have come in; say whether there were any."""
    any_came = False
    while (message := reader.poll(wait)) is not None:
        any_came = True
        alert = msgspec.json.decode(message.value(), type=Alert)
        if alert.block_id not in found.alerts and found.shown < _SHOWN:
            found.shown += 1
            console.print(one_line(alert), soft_wrap=True)
            if found.shown == _SHOWN:
                console.print("… and so on", style="dim")
        found.alerts[alert.block_id] = alert
    return any_came


def _summary(live: Workload, found: _Found, seconds: float) -> int:
    _title("5. What came of it")
    table = Table("injected fault", "blocks", "found")
    kinds = Counter(live.faults.values())
    hits = Counter(live.faults[block] for block in found.alerts if block in live.faults)
    for kind, count in sorted(kinds.items()):
        table.add_row(kind.replace("_", " "), f"{count:,}", f"{hits[kind]:,}")
    table.add_section()
    table.add_row("all", f"{len(live.faults):,}", f"{hits.total():,}")
    console.print(table)
    alarms = len(found.alerts) - hits.total()
    healthy = len(live.blocks) - len(live.faults)
    console.print(
        f"{len(live.events):,} events of {len(live.blocks):,} blocks at {len(live.events) / seconds:,.0f} events/s "
        f"(played at {_RATE:,.0f}/s); {alarms} false alarms among {healthy:,} healthy blocks ({alarms / healthy:.2%}, "
        "0.5% promised)"
    )
    console.print(
        "\nNext: a real Kafka with python -m scripts.local_kafka up, then the three commands with your own logs: "
        "see the README."
    )
    if not hits:
        console.print("No fault was found: that is not as it should be.", style="red")
        return 1
    return 0


def _title(text: str) -> None:
    console.print()
    console.print(Rule(text, align="left"))


if __name__ == "__main__":
    run(main)
