"""One real Kafka for the whole run. Where it cannot be started these tests fail: they never skip."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
import yaml
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Producer, TopicPartition

from calibration.block_scores import block_scores
from calibration.calibrate import calibrate
from consumer.settings import load_settings
from model.bundle import Bundle
from model.config import EventSettings, ModelSettings, TrainingSettings
from model.lines import LineFormat, LineRules
from model.network import Autoencoder, Shape
from model.scoring import Scorer
from model.templates import event_id
from model.training import train
from model.vocabulary import Vocabulary
from scripts.local_kafka import QUICK_ABORTS, LocalKafka, free_port
from scripts.simulator import simulate

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def kafka(tmp_path_factory):
    broker = LocalKafka(
        tmp_path_factory.mktemp("kafka"),
        free_port(),
        properties=QUICK_ABORTS,
    )
    broker.up()
    yield broker
    broker.down(purge=True)


@pytest.fixture
def topic_name(request):
    """A name that no other test uses."""
    return f"{re.sub(r'[^a-zA-Z0-9._-]+', '-', request.node.name)[:60]}-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory):
    """A small model and its threshold, trained on simulated healthy blocks."""
    folder = tmp_path_factory.mktemp("artifacts")
    sessions = simulate(800, 0.0, 1).sessions()
    vocabulary = Vocabulary.of(session.events for session in sessions)
    network = train(
        [vocabulary.encode(session.events) for session in sessions],
        len(vocabulary),
        ModelSettings(width=32, heads=2, feedforward=64),
        TrainingSettings(epochs=20, batch_size=128),
        torch.device("cpu"),
    )
    bundle = Bundle(network, vocabulary)
    bundle.save(folder / "model")
    scorer = Scorer(bundle)
    scores = block_scores(simulate(800, 0.0, 2).sessions(), scorer, every=1).blocks
    day = 24 * 3600 * 1000
    calibrate(scores, scorer, quantile=0.95, every=1, idle_timeout_ms=day).save(folder / "threshold.json")
    return folder


@pytest.fixture(scope="session")
def knows_lines(tmp_path_factory):
    """A model, never trained, that knows two templates of raw lines."""
    folder = tmp_path_factory.mktemp("knows-lines")
    templates = ("drop <BLOCK>", "start <BLOCK> size <NUMBER>")
    vocabulary = Vocabulary(tuple(sorted(map(event_id, templates))))
    network = Autoencoder(Shape(len(vocabulary), 6, 16, 2, 1, 16)).eval()
    Bundle(network, vocabulary, {}, LineFormat(LineRules.of(EventSettings()), templates)).save(folder / "model")
    return folder


class Line:
    """A consumer group with topics of its own on the real Kafka, and the processes that a test starts there."""

    def __init__(self, broker, artifacts, folder, **changes):
        self.name = f"test-{uuid.uuid4().hex[:8]}"
        self.bootstrap = broker.bootstrap
        self.config = folder / f"{self.name}.yaml"
        settings = {
            "kafka": {
                "bootstrap.servers": broker.bootstrap,
                "consumer": {"group.id": self.name, "session.timeout.ms": 6000},
                "producer": {"transaction.timeout.ms": 5000},
            },
            "topics": {
                "lines": f"{self.name}-lines",
                "events": f"{self.name}-events",
                "alerts": f"{self.name}-alerts",
                "dead_letters": f"{self.name}-dead",
                "state": f"{self.name}-state",
                "partitions": 3,
            },
            "device": "cpu",
            "model": {"path": str(artifacts / "model")},
            "calibration": {"path": str(artifacts / "threshold.json")},
        }
        for section, values in changes.items():
            if isinstance(values, dict):
                settings.setdefault(section, {}).update(values)
            else:
                settings[section] = values
        self.config.write_text(yaml.safe_dump(settings))
        self.settings = load_settings(self.config)
        self.processes = []

    def run(self, module, *options, check=True):
        """Run one of the project's commands to its end."""
        done = subprocess.run(
            [sys.executable, "-m", module, "--config", str(self.config), *map(str, options)],
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=240,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def start_consumer(self, fault="", options=()):
        log = self.config.with_suffix(f".{len(self.processes)}.log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "consumer", "--config", str(self.config), *options],
                env=os.environ | {"LOG_ANOMALY_FAULT": fault},
                cwd=ROOT, stdout=output, stderr=output,
            )  # fmt: skip
        process.log = log
        self.processes.append(process)
        return process

    def stop(self, process, number=signal.SIGTERM):
        """Send a signal; return the exit status and the seconds that it took."""
        started = time.monotonic()
        process.send_signal(number)
        return process.wait(timeout=30), time.monotonic() - started

    def produce(self, messages, topic=None):
        """Send (key, value) messages, each with its own partition if it has a third part."""
        producer = Producer(
            {"bootstrap.servers": self.bootstrap, "linger.ms": 20, "enable.idempotence": True, "log_level": 0}
        )
        refused = []

        def delivered(error, _):
            if error is not None:
                refused.append(error)

        for key, value, *partition in messages:
            place = {"partition": partition[0]} if partition else {}
            producer.produce(topic or self.settings.topics.events, value, key, on_delivery=delivered, **place)
            producer.poll(0)
        assert producer.flush(30) == 0
        assert not refused

    def read(self, topic):
        """Return all committed messages of a topic, partition by partition."""
        consumer = Consumer(
            {
                "bootstrap.servers": self.bootstrap,
                "group.id": "reader",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "isolation.level": "read_committed",
                "log_level": 0,
            }
        )
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in partitions])
        unread, messages = set(partitions), []
        while unread:
            message = consumer.poll(10)
            assert message is not None, f"{topic} does not end"
            if message.error() is None:
                messages.append(message)
            else:
                assert message.error().code() == KafkaError._PARTITION_EOF, message.error()
                unread.discard(message.partition())
        consumer.close()
        return sorted(messages, key=lambda message: (message.partition(), message.offset()))

    def lag(self, topic=None, group=None):
        """Return how many input messages the group has not committed."""
        topic = topic or self.settings.topics.events
        consumer = Consumer({"bootstrap.servers": self.bootstrap, "group.id": group or self.name, "log_level": 0})
        try:
            partitions = [
                TopicPartition(topic, number)
                for number in consumer.list_topics(topic, timeout=10).topics[topic].partitions
            ]
            total = 0
            for committed in consumer.committed(partitions, timeout=10):
                low, high = consumer.get_watermark_offsets(committed, timeout=10)
                total += high - max(committed.offset, low)
            return total
        finally:
            consumer.close()

    def wait_for(self, condition, seconds=60, what="it"):
        deadline = time.monotonic() + seconds
        while not condition():
            for process in self.processes:
                assert process.poll() in (None, 0, -signal.SIGKILL), process.log.read_text()
            assert time.monotonic() < deadline, f"{what} did not happen; " + "\n".join(
                process.log.read_text() for process in self.processes
            )
            time.sleep(0.2)

    def consume_all(self):
        """Start a consumer, wait until it has committed everything, stop it."""
        process = self.start_consumer()
        self.wait_for(lambda: "assigned" in process.log.read_text(), what="joining")
        self.wait_for(lambda: self.lag() == 0, what="committing all input")
        status, seconds = self.stop(process)
        assert status == 0, process.log.read_text()
        assert seconds < 10
        return process


@pytest.fixture
def line(kafka, artifacts, tmp_path):
    """Make lines; what they started is killed at the end."""
    lines = []

    def make(broker=kafka, **changes):
        lines.append(Line(broker, artifacts, tmp_path, **changes))
        return lines[-1]

    yield make
    for made in lines:
        for process in made.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/kafka" in str(item.path):
            item.add_marker(pytest.mark.kafka)
