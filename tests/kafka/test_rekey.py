"""Unkeyed lines become keyed events on a real Kafka: nothing lost, nothing twice, whatever is killed."""

import json
import signal
import time
from collections import Counter

import pytest
from confluent_kafka.admin import AdminClient, ConfigResource

from consumer.rekey import SOURCE_HEADER
from model.bundle import Bundle
from model.config import EventSettings
from model.lines import LineFormat, LineRules
from model.network import Autoencoder, Shape
from model.templates import event_id
from model.vocabulary import Vocabulary

TEMPLATES = ("drop <BLOCK>", "start <BLOCK> size <NUMBER>")
DROP, START = map(event_id, TEMPLATES)


@pytest.fixture(scope="module")
def knows_lines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("knows-lines")
    vocabulary = Vocabulary(tuple(sorted((DROP, START))))
    network = Autoencoder(Shape(len(vocabulary), 6, 16, 2, 1, 16)).eval()
    Bundle(network, vocabulary, {}, LineFormat(LineRules.of(EventSettings()), TEMPLATES)).save(folder / "model")
    return folder


def stamped_by(made, topic):
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
    admin = AdminClient({"bootstrap.servers": made.bootstrap})
    return admin.describe_configs([resource])[resource].result(10)["message.timestamp.type"].value


def lines(begin, end):
    """Return messages and the events that each should become: (block, event, time)."""
    for number in range(begin, end):
        head = f"081109 2035{number % 60:02} 7 INFO dfs.X: "
        time, block = 1226262900000 + 1000 * (number % 60), f"blk_{number % 97}"
        kind = number % 10
        if kind == 0:
            yield head + "namenode is up", []
        elif kind == 1:
            text = head + f"drop {block} blk_{number % 89}"
            yield text, [(name, DROP, time) for name in dict.fromkeys((block, f"blk_{number % 89}"))]
        elif kind == 2:
            yield head + f"{block} is on fire", [(block, head + f"{block} is on fire", time)]
        elif kind == 3:
            yield head + "start blk_" + "1" * 2000 + " size 1", None
        else:
            yield head + f"start {block} size {number}", [(block, START, time)]


def test_each_line_becomes_its_events_once_whatever_is_killed(line, knows_lines):
    made = line(model={"path": str(knows_lines / "model")}, commit={"interval": "200ms"}, scoring={"max_batch": 500})
    topics = made.settings.topics

    def left():
        return made.lag(topics.lines, f"{made.name}-rekey")

    written = []

    def write(count):
        messages = list(lines(len(written), len(written) + count))
        # In turn, as a shipper without keys does.
        made.produce([(None, text, (len(written) + n) % 3) for n, (text, _) in enumerate(messages)], topics.lines)
        written.extend(messages)

    def start(fault=""):
        process = made.start_consumer(fault, ["--rekey"])
        made.wait_for(lambda: process.poll() is not None or "assigned" in process.log.read_text(), what="joining")
        return process

    first = start("before_commit:2")
    while first.poll() is None and len(written) < 20_000:  # it dies with a transaction open, its second
        write(1000)
        time.sleep(0.3)
    assert first.returncode == -signal.SIGKILL
    second = start()
    third = start()  # two of them share the partitions
    write(4000)
    made.wait_for(lambda: left() < 3000, what="committing some")
    made.stop(second, signal.SIGKILL)
    write(2000)
    made.wait_for(lambda: left() == 0, what="committing all lines")
    status, seconds = made.stop(third)
    assert status == 0, third.log.read_text()
    assert seconds < 10

    wanted = Counter(event for _, events in written for event in events or ())
    found, places = Counter(), {}
    for message in made.read(topics.events):
        event = json.loads(message.value())
        assert message.key().decode() == event["block_id"]
        found[event["block_id"], event["event_id"], event["timestamp"]] += 1
        (source,) = (value for name, value in message.headers() if name == SOURCE_HEADER)
        topic, partition, offset = source.decode().split("/")
        assert topic == topics.lines
        places.setdefault((event["block_id"], partition), []).append(int(offset))
    assert found == wanted
    assert all(offsets == sorted(offsets) for offsets in places.values())
    letters = made.read(topics.dead_letters)
    assert len(letters) == sum(events is None for _, events in written)
    assert all(b"longer than 1024 bytes" in dict(letter.headers())["dead_letter.reason"] for letter in letters)


def test_tombstones_go_through_and_settings_that_do_not_fit_are_refused(line, knows_lines):
    made = line(model={"path": str(knows_lines / "model")})
    topics = made.settings.topics
    process = made.start_consumer(options=["--rekey"])
    made.wait_for(lambda: "assigned" in process.log.read_text(), what="joining")
    assert [stamped_by(made, name) for name in (topics.lines, topics.events)] == ["LogAppendTime"] * 2
    made.produce(
        [("blk_1", "081109 203500 7 INFO x: drop blk_1", 0), ("blk_1", None, 0), (None, None, 0)], topics.lines
    )
    made.wait_for(lambda: made.lag(topics.lines, f"{made.name}-rekey") == 0, what="committing")
    assert made.stop(process)[0] == 0
    assert [(m.key(), m.value() is None) for m in made.read(topics.events)] == [(b"blk_1", False), (b"blk_1", True)]
    assert len(made.read(topics.dead_letters)) == 1

    for changes, said in (
        ({"events": {"format": "text"}}, "set it to json"),
        ({"events": {"block_pattern": "req-[0-9]+"}}, "events.block_pattern is not what the model was trained with"),
    ):
        done = line(model={"path": str(knows_lines / "model")}, **changes).run("consumer", "--rekey", check=False)
        assert done.returncode == 2
        assert said in done.stderr.replace("\n", " ")
