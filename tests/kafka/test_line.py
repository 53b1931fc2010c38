"""The main job on a real Kafka: the documented commands, and the same alerts as the core gives offline."""

import json
import os
import signal
import time

import jsonschema
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from consumer.alerts import schema
from consumer.detector import Detector
from consumer.events import TOMBSTONE, EventBatch
from consumer.threshold import Threshold
from consumer.topics import SOURCE_CONFIG, TopicSpec, ensure_topics, warn_of_senders_clocks
from model.bundle import Bundle
from model.scoring import Scorer
from model.vocabulary import UNK
from scripts.simulator import simulate, write
from scripts.systems import HDFS


def offline(line):
    """Run the core over the messages that are in the topic, one at a time; return the alerts by block, as bytes."""
    bundle = Bundle.load(line.settings.model.path)
    threshold = Threshold.load(line.settings.calibration.path)
    detector = Detector(Scorer(bundle), threshold, topic=line.settings.topics.events, cache_windows=10**6)
    alerts = {}
    for number in range(line.settings.topics.partitions):
        detector.assign(number)
    for message in line.read(line.settings.topics.events):
        token, time, unknown = TOMBSTONE, 0, {}
        if message.value() is not None:
            event = json.loads(message.value())
            token, time = bundle.vocabulary.tokens.get(event["event_id"], UNK), event["timestamp"]
            if token == UNK:
                unknown[0] = event["event_id"]
        batch = EventBatch.of([message.key().decode()], [token], [time], [message.offset()], unknown)
        for alert in detector.process({message.partition(): batch}):
            alerts.setdefault(alert.block_id, []).append(alert.encode())
    return alerts


def published(line):
    alerts = {}
    for message in line.read(line.settings.topics.alerts):
        alerts.setdefault(message.key().decode(), []).append(message.value())
    return alerts


def test_train_calibrate_stream_and_read_alerts_as_a_user_does(line, tmp_path, monkeypatch):
    """The commands of the README on simulated logs; the alerts equal those of the core over the same events."""
    for name, blocks, faults, seed in (("train", 600, 0, 11), ("calibration", 600, 0, 12), ("live", 300, 0.05, 13)):
        write(simulate(blocks, faults, seed), HDFS, tmp_path / name)
    made = line(
        model={"path": str(tmp_path / "model"), "width": 32, "heads": 2, "feedforward": 64},
        training={"epochs": 15},
        calibration={"path": str(tmp_path / "threshold.json")},
    )
    said = made.run("model", "--normal", tmp_path / "train" / "sessions.jsonl")
    assert "parameters" in said.stdout
    said = made.run("calibration", "--normal", tmp_path / "calibration" / "sessions.jsonl")
    assert "of a million normal blocks about" in said.stdout
    assert float((tmp_path / "anomaly_threshold.txt").read_text()) > 0
    assert (tmp_path / "anomaly_strategy.txt").read_text() == "max\n"
    said = made.run("scripts.replay", "--tombstones", tmp_path / "live" / "events.csv.gz")
    assert "300 tombstones" in said.stdout

    made.consume_all()

    expected = offline(made)
    assert published(made) == expected
    assert len(expected) >= 15, "at least the blocks that fail"
    for alerts in expected.values():
        for alert in alerts:
            jsonschema.validate(json.loads(alert), schema(), cls=jsonschema.Draft202012Validator)
    said = made.run("scripts.alerts", "--json")
    assert sorted(said.stdout.splitlines()) == sorted(alert.decode() for some in expected.values() for alert in some)
    table = made.run("scripts.alerts").stdout
    assert "expected" in table
    alerts = made.read(made.settings.topics.alerts)
    newest = max(message.timestamp()[1] for message in alerts)
    monkeypatch.setenv("COLUMNS", "200")
    shown = made.run("scripts.alerts", "--last", 1).stdout
    assert any(message.key().decode()[:20] in shown for message in alerts if message.timestamp()[1] == newest)
    said = made.run(
        "scripts.evaluate", "--normal", tmp_path / "calibration" / "sessions.jsonl",
        "--anomalous", tmp_path / "live" / "sessions.jsonl", "--json", tmp_path / "out.json",
    )  # fmt: skip
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(result) >= {"auc", "average_precision", "at", "best_f1", "delay", "n_normal", "n_anomalous", "prior"}
    assert (result["n_normal"], result["n_anomalous"]) == (600, 15)
    assert set(result["at"][0]) >= {"q", "threshold", "false_alarm_rate", "recall", "precision", "f1"}


def test_two_members_share_the_work(line):
    made = line()
    first, second = made.start_consumer(), made.start_consumer()
    made.wait_for(lambda: "assigned" in first.log.read_text() and "assigned" in second.log.read_text(), what="joining")
    live = simulate(200, 0.1, 21)
    made.produce(
        (
            event.block_id,
            json.dumps({"block_id": event.block_id, "event_id": event.event_id, "timestamp": event.timestamp}),
        )
        for event in live.events
    )
    made.produce((block, None) for block in live.blocks)
    made.wait_for(lambda: made.lag() == 0, what="committing all input")
    for process in (first, second):
        status, seconds = made.stop(process)
        assert (status, seconds < 10) == (0, True), process.log.read_text()
    assert published(made) == offline(made)


def test_what_cannot_be_decoded_goes_to_the_dead_letters_with_reason_and_origin(line):
    made = line()
    good = json.dumps({"block_id": "A", "event_id": "never seen before", "timestamp": 1000})
    process = made.start_consumer()
    made.wait_for(lambda: "assigned" in process.log.read_text(), what="joining")
    made.produce(
        [
            ("A", b"\xff\xfe", 1),
            ("A", good, 1),
            (None, b"[]", 1),
            ("B", good, 1),
            (None, None, 1),
            ("C", json.dumps({"block_id": "C", "event_id": "e", "timestamp": "soon"}), 1),
        ]
    )
    made.wait_for(lambda: made.lag() == 0, what="committing all input")
    made.stop(process)
    letters = made.read(made.settings.topics.dead_letters)
    reasons = {}
    for letter in letters:
        headers = dict(letter.headers())
        assert headers["dead_letter.topic"].decode() == made.settings.topics.events
        assert headers["dead_letter.partition"] == b"1"
        reasons[int(headers["dead_letter.offset"])] = headers["dead_letter.reason"].decode()
    assert sorted(reasons) == [0, 2, 3, 4, 5]
    assert "not an event" in reasons[0]
    assert "key is not the block id" in reasons[3]
    assert {letter.value() for letter in letters} >= {b"\xff\xfe", b"[]", good.encode(), None}
    assert [message.key() for message in made.read(made.settings.topics.alerts)] == [b"A"]


def test_one_bad_clock_closes_no_block_in_a_topic_that_the_consumer_made(line):
    """Though the sender stamps its messages by the same clock."""
    made = line()
    process = made.start_consumer()
    made.wait_for(lambda: "assigned" in process.log.read_text(), what="joining")
    producer = Producer({"bootstrap.servers": made.bootstrap, "log_level": 0})
    far = 4_102_444_800_000
    for block, moment in (("healthy", int(time.time() * 1000)), ("from 2100", far)):
        value = json.dumps({"block_id": block, "event_id": "E5", "timestamp": moment})
        producer.produce(made.settings.topics.events, value, block, partition=0, timestamp=moment)
    assert producer.flush(10) == 0
    made.wait_for(lambda: made.lag() == 0, what="committing all input")
    assert made.stop(process)[0] == 0
    (letter,) = made.read(made.settings.topics.dead_letters)
    assert letter.key() == b"from 2100"
    assert b"windows.max_ahead" in dict(letter.headers())["dead_letter.reason"]
    assert "2 messages, 1 looks" in process.log.read_text(), "a block that is closed is looked at once more"
    assert "message.timestamp.type" not in process.log.read_text()


FAR = {"message.timestamp.after.max.ms": str(2**63 - 1)}  # as before Kafka 4.0


@pytest.mark.parametrize(
    ("config", "warned"), [(FAR, True), ({}, False), (FAR | SOURCE_CONFIG, False)], ids=["any", "near", "brokers"]
)
def test_a_topic_that_takes_any_time_from_its_senders_is_warned_of(line, config, warned, caplog):
    made = line()
    name = made.settings.topics.events
    ensure_topics(made.settings, [TopicSpec(name, config=config)])
    warn_of_senders_clocks(made.settings, name)
    said = f"kafka-configs.sh --bootstrap-server {made.bootstrap} --alter --topic {name} --add-config message."
    assert [said in message for message in caplog.messages] == [True] * warned


def test_the_warning_comes_once_at_the_start(line):
    made = line()
    name = made.settings.topics.events
    ensure_topics(made.settings, [TopicSpec(name, config=FAR)])
    process = made.start_consumer()
    made.wait_for(lambda: "assigned" in process.log.read_text(), what="joining")
    assert made.stop(process)[0] == 0
    assert process.log.read_text().count(f"WARNING topic {name} has message.timestamp.type=CreateTime") == 1


def test_missing_topics_are_named_when_they_may_not_be_created(line):
    made = line(topics={"create": False})
    done = made.run("consumer", check=False)
    assert done.returncode == 2
    assert "missing topics" in done.stderr
    topics = made.settings.topics
    for name in (topics.events, topics.alerts, topics.dead_letters, topics.state):
        assert name in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broker_that_is_not_there_is_said_in_one_sentence(line):
    made = line(kafka={"bootstrap.servers": "127.0.0.1:1", "socket.connection.setup.timeout.ms": 1000})
    done = made.run("consumer", check=False)
    assert done.returncode == 2
    assert "no broker answers at kafka.bootstrap.servers 127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_librdkafka_setting_is_named(line):
    made = line(kafka={"no.such.property": 1})
    done = made.run("consumer", check=False)
    assert done.returncode == 2
    assert "no.such.property" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_threshold_of_another_model_is_refused(line, tmp_path):
    made = line()
    write(simulate(100, 0, 5), HDFS, tmp_path / "train")
    other = line(model={"path": str(tmp_path / "other")}, training={"epochs": 1})
    other.run("model", "--normal", tmp_path / "train" / "sessions.jsonl")
    done = other.run("consumer", check=False)
    assert done.returncode == 2
    assert "made for model" in done.stderr
    assert "python -m calibration" in done.stderr
    assert made.settings.calibration.path.is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_commits_and_leaves_the_group_at_once(line, number):
    made = line()
    process = made.start_consumer()
    made.wait_for(lambda: "assigned" in process.log.read_text(), what="joining")
    made.produce([("A", json.dumps({"block_id": "A", "event_id": "x", "timestamp": 0}))] * 50)
    status, seconds = made.stop(process, number)
    assert status == 0, process.log.read_text()
    assert seconds < 10
    admin = AdminClient({"bootstrap.servers": made.bootstrap, "log_level": 0})
    group = admin.describe_consumer_groups([made.name])[made.name].result(timeout=10)
    assert group.members == []
    before = made.lag()
    made.consume_all()
    assert before <= 50
    assert made.lag() == 0


def test_a_partition_that_falls_silent_closes_its_blocks_on_the_wall_clock(line, artifacts, tmp_path):
    """Half a block and then nothing: after the idle timeout it is judged whole, without any further message."""
    raw = json.loads((artifacts / "threshold.json").read_text())
    (tmp_path / "threshold.json").write_text(json.dumps(raw | {"idle_timeout_ms": 3000}))
    made = line(windows={"idle_timeout": "3s"}, calibration={"path": str(tmp_path / "threshold.json")})
    whole = next(session for session in simulate(20, 0, 31).sessions() if len(session.events) > 12)
    process = made.start_consumer()
    made.wait_for(lambda: "assigned" in process.log.read_text(), what="joining")
    made.produce(
        (whole.block_id, json.dumps({"block_id": whole.block_id, "event_id": event, "timestamp": number}))
        for number, event in enumerate(whole.events[:4])
    )
    sender = Producer({"bootstrap.servers": made.bootstrap, "transactional.id": made.name})
    sender.init_transactions(30)
    sender.begin_transaction()
    sender.produce(made.settings.topics.events, b"more of it", whole.block_id.encode())
    sender.flush(30)
    time.sleep(7)
    assert made.read(made.settings.topics.alerts) == [], "what waits for its transaction is no silence"
    sender.abort_transaction(30)
    sent = time.monotonic()
    made.wait_for(lambda: made.read(made.settings.topics.alerts), what="an alert")
    assert time.monotonic() - sent > 2.5
    (last, *_) = (json.loads(message.value()) for message in reversed(made.read(made.settings.topics.alerts)))
    assert last["reason"] == "truncated"
    assert last["block_id"] == whole.block_id
    assert made.stop(process)[0] == 0


def test_offsets_are_committed_only_after_their_alerts_are_acknowledged(line):
    """Killed at any moment: whatever is committed has its alerts in the topic."""
    made = line()
    process = made.start_consumer()
    made.wait_for(lambda: "assigned" in process.log.read_text(), what="joining")
    made.produce(
        (f"b{number}", json.dumps({"block_id": f"b{number}", "event_id": "never seen", "timestamp": 0}))
        for number in range(20_000)
    )
    made.wait_for(lambda: made.lag() < 20_000, what="the first commit")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    committed = 20_000 - made.lag()
    alerted = {message.key() for message in made.read(made.settings.topics.alerts)}
    assert len(alerted) >= committed
    made.consume_all()
    assert len({message.key() for message in made.read(made.settings.topics.alerts)}) == 20_000


def test_json_logs_are_an_object_a_line_librdkafkas_too_and_tell_no_secret(line):
    made = line(kafka={"sasl.password": "s3cret", "linger.ms": 5, "log_level": 6})
    process = made.start_consumer(options=["--log-format", "json"])
    made.wait_for(lambda: "assigned partitions" in process.log.read_text(), what="joining")
    assert made.stop(process)[0] == 0
    said = process.log.read_text()
    assert "s3cret" not in said
    lines = [json.loads(text) for text in said.splitlines()]
    assert all({"timestamp", "level", "logger", "message"} <= line.keys() for line in lines)
    messages = [line["message"] for line in lines]
    assert any("CONFWARN" in message for message in messages), "librdkafka warns of a producer's setting"
    assert messages[-1].startswith("stopped: 0 messages")
    introduction = "\n".join(messages)
    for text in (
        f"{made.settings.topics.events}, 3 partitions, as group ", f"alerts to {made.settings.topics.alerts}",
        "exactly_once", "weights on cpu", " nats (max)", f"topics.events {made.settings.topics.events}",
    ):  # fmt: skip
        assert text in introduction
