"""Replay into a real Kafka: what arrives, what is made, and what a person is told when it cannot be."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from confluent_kafka import OFFSET_BEGINNING, TIMESTAMP_LOG_APPEND_TIME, Consumer, KafkaError, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource

from consumer.settings import load_settings
from consumer.topics import TopicSpec, ensure_topics, require_topic
from model.errors import UserError
from model.sessions import read_events
from scripts.simulator import simulate, write
from scripts.systems import HDFS

ROOT = Path(__file__).parents[2]
REAL = Path(os.environ.get("LOG_DATA", ROOT / "../shared/data")) / "hdfs" / "replay" / "events.csv.gz"


@pytest.fixture
def config(kafka, topic_name, tmp_path):
    """Write a settings file with a topic of the test's own."""

    def make(**sections):
        settings = {
            "kafka": {"bootstrap.servers": kafka.bootstrap},
            "topics": {"events": topic_name, "partitions": 3},
        }
        for name, values in sections.items():
            settings.setdefault(name, {}).update(values)
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return make


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    write(simulate(100, 0.1, 7), HDFS, folder)
    return folder


def command(config, *options):
    return [sys.executable, "-m", "scripts.replay", "--config", str(config), *map(str, options)]


def run(config, *options):
    """Run the command as a user does; return its status and, its line breaks made spaces, what it said."""
    done = subprocess.run(command(config, *options), cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def read(settings):
    """Return the messages of the topic, each partition's in order."""
    topic = settings.topics.events
    consumer = Consumer(
        settings.kafka.for_consumer(enable_partition_eof=True, enable_auto_commit=False) | {"log_level": 0}
    )
    partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
    consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in partitions])
    unread, messages = set(partitions), []
    while unread:
        for message in consumer.consume(10_000, timeout=1):
            if message.error() is None:
                messages.append(message)
            else:
                assert message.error().code() == KafkaError._PARTITION_EOF
                unread.discard(message.partition())
    consumer.close()
    return sorted(messages, key=lambda message: (message.partition(), message.offset()))


def by_block(messages):
    """Return each block's messages as (event id, timestamp), None for a tombstone."""
    blocks = {}
    for message in messages:
        event = None if message.value() is None else json.loads(message.value())
        blocks.setdefault(message.key().decode(), []).append(event and (event["event_id"], event["timestamp"]))
    return blocks


def expected(path):
    blocks = {}
    for event in read_events(path):
        blocks.setdefault(event.block_id, []).append((event.event_id, event.timestamp))
    return blocks


@pytest.mark.parametrize("name", ["events.csv.gz", "sessions.jsonl"])
def test_every_block_arrives_whole_in_order_and_in_one_partition(config, simulated, name):
    path = config()
    before = time.time() * 1000
    status, said = run(path, simulated / name)
    assert status == 0, said
    messages = read(load_settings(path))
    assert by_block(messages) == expected(simulated / name)
    assert len({(message.key(), message.partition()) for message in messages}) == 100
    assert {message.partition() for message in messages} == {0, 1, 2}
    assert all(message.timestamp()[0] == TIMESTAMP_LOG_APPEND_TIME for message in messages)
    assert all(message.timestamp()[1] >= before - 1000 for message in messages), "Kafka's own time, not the event's"
    assert re.search(rf"{len(messages):,} events of 100 blocks into \S+ in [\d.]+ s \([\d,]+ events/s\)", said)


def test_tombstones_end_each_block(config, simulated):
    path = config()
    status, said = run(path, simulated / "events.csv.gz", "--tombstones")
    assert status == 0, said
    wanted = expected(simulated / "events.csv.gz")
    assert by_block(read(load_settings(path))) == {block: [*life, None] for block, life in wanted.items()}


def test_without_keys_blocks_spread(config, simulated):
    path = config()
    status, said = run(path, simulated / "events.csv.gz", "--unkeyed")
    assert status == 0, said
    assert {message.key() for message in read(load_settings(path))} == {None}


def test_ctrl_c_leaves_a_whole_beginning(config, simulated):
    path = config(topics={"partitions": 1})
    settings = load_settings(path)
    ensure_topics(settings, [TopicSpec(settings.topics.events)])
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    process = subprocess.Popen(
        command(path, simulated / "events.csv.gz", "--rate", "30"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    signal.signal(signal.SIGINT, inherited)
    deadline = time.monotonic() + 60
    watcher = Consumer(settings.kafka.for_consumer() | {"log_level": 0})
    while watcher.get_watermark_offsets(TopicPartition(settings.topics.events, 0), timeout=10)[1] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    watcher.close()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "interrupted\n")
    got = [json.loads(message.value()) for message in read(settings)]
    wanted = [asdict(event) for event in read_events(simulated / "events.csv.gz")]
    assert 0 < len(got) < len(wanted)
    assert got == wanted[: len(got)]


def test_what_the_broker_refuses_is_counted(config, tmp_path):
    """The broker, not the client, finds these too large."""
    path = config()
    settings = load_settings(path)
    ensure_topics(settings, [TopicSpec(settings.topics.events, config={"max.message.bytes": "2000"})])
    events = tmp_path / "events.csv"
    long = "x" * 5000
    events.write_text(f"timestamp,block_id,event_id\n1,a,E1\n2,{long}1,E1\n3,{long}2,E1\n")
    status, said = run(path, events)
    assert status == 2
    told = re.search(r"error: (\d) messages were not delivered to \S+: .*too large; see to that and replay", said)
    assert told, said
    assert int(told[1]) == 3 - len(read(settings)) >= 2
    assert "Traceback" not in said


# topics


def partitions_and_policy(settings, name):
    admin = AdminClient(settings.kafka.for_admin())
    resource = ConfigResource(ConfigResource.Type.TOPIC, name)
    policy = admin.describe_configs([resource])[resource].result(10)["cleanup.policy"].value
    return len(admin.list_topics(name, timeout=10).topics[name].partitions), policy


def test_topics_are_made_as_described_and_then_left_alone(config, topic_name):
    settings = load_settings(config())
    plain, special = f"{topic_name}-plain", f"{topic_name}-special"
    specs = [TopicSpec(plain), TopicSpec(special, 5, {"cleanup.policy": "compact"})]
    assert ensure_topics(settings, specs) == [plain, special]
    assert partitions_and_policy(settings, plain) == (3, "delete")
    assert partitions_and_policy(settings, special) == (5, "compact")
    assert ensure_topics(settings, [TopicSpec(plain, 9), TopicSpec(special, 9)]) == []
    assert (require_topic(settings, plain), require_topic(settings, special)) == (3, 5)
    assert partitions_and_policy(settings, special) == (5, "compact")


def test_many_may_make_the_same_topic_at_once(config, topic_name):
    settings = load_settings(config())
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: ensure_topics(settings, [TopicSpec(topic_name)]), range(8)))
    assert [name for names in made for name in names] == [topic_name]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (TopicSpec("no good name"), "topic no good name cannot be created: .*see to the settings under topics"),
        (TopicSpec("{}-x", config={"no.such": "1"}), "cannot be created: .*no.such"),
    ],
)
def test_what_kafka_will_not_make_is_one_sentence(config, topic_name, spec, said):
    spec = TopicSpec(spec.name.format(topic_name), config=spec.config)
    with pytest.raises(UserError, match=said):
        ensure_topics(load_settings(config()), [spec])


def test_more_replicas_than_brokers(config, topic_name):
    with pytest.raises(UserError, match=f"topic {topic_name} cannot be created: .*eplication"):
        ensure_topics(load_settings(config(topics={"replication_factor": 3})), [TopicSpec(topic_name)])


def test_a_topic_that_may_not_be_made_is_named(config, simulated, topic_name):
    status, said = run(config(topics={"create": False}), simulated / "events.csv.gz")
    assert (status, "Traceback" in said) == (2, False)
    assert said.startswith(f"error: missing topics: {topic_name}; create them, or set topics.create: true")


def test_a_wrong_setting_is_named(config, simulated):
    status, said = run(config(kafka={"producer": {"linger.ms": "soon"}}), simulated / "events.csv.gz")
    assert (status, "Traceback" in said) == (2, False)
    assert "error: kafka.producer.linger.ms: " in said


def test_a_broker_that_is_not_there_is_told_soon(config, simulated):
    started = time.monotonic()
    nowhere = {"bootstrap.servers": "127.0.0.1:1", "socket.connection.setup.timeout.ms": 2000}
    status, said = run(config(kafka=nowhere), simulated / "events.csv.gz")
    assert (status, "Traceback" in said, "rdkafka" in said) == (2, False, False)
    assert "error: no broker answers at kafka.bootstrap.servers 127.0.0.1:1" in said
    assert time.monotonic() - started < 12, "two seconds and the start of Python"


# the real logs


@pytest.mark.data
@pytest.mark.skipif(not REAL.is_file(), reason="no real logs here: name their folder in LOG_DATA")
def test_the_real_logs_arrive_whole(config):
    path = config()
    status, said = run(path, REAL, "--tombstones")
    assert status == 0, said
    print(said)
    assert "222,579 events of 11,501 blocks, 11,501 tombstones" in said
    assert by_block(read(load_settings(path))) == {block: [*life, None] for block, life in expected(REAL).items()}
