"""Unkeyed lines become keyed events on a real Kafka: nothing lost, nothing twice, whatever is killed."""

import datetime as dt
import json
import signal
import time
import urllib.error
import urllib.request
from collections import Counter

import pytest
from confluent_kafka.admin import AdminClient, ConfigResource

from consumer.outbox import SOURCE_HEADER
from consumer.topics import TopicSpec, ensure_topics
from model.templates import event_id
from scripts.local_kafka import free_port

DROP, START = map(event_id, ("drop <BLOCK>", "start <BLOCK> size <NUMBER>"))


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


def timed(second):
    """Return a line of its own second; every 50 of them are of as many blocks."""
    moment = dt.datetime(2008, 11, 9, tzinfo=dt.UTC) + dt.timedelta(seconds=second)
    return f"{moment:%y%m%d %H%M%S} 7 INFO dfs.X: start blk_{second % 50} size {second}"


BACKLOGS = {
    "spread": lambda second: second % 3,
    "one partition is behind, one is empty": lambda second: 1 - second // 25_000,
}
"""The partition of each of the lines; in the second case the other one has to be paused before it may be sent."""


@pytest.mark.parametrize(
    ("backlog", "fault"),
    [("spread", ""), ("spread", "before_commit:3"), ("one partition is behind, one is empty", "")],
)
def test_a_backlog_comes_out_in_the_order_of_its_times(line, knows_lines, backlog, fault):
    made = line(model={"path": str(knows_lines / "model")}, commit={"interval": "50ms"}, scoring={"max_batch": 500})
    topics = made.settings.topics
    ensure_topics(made.settings, [TopicSpec(topics.lines)])
    made.produce([(None, timed(second), BACKLOGS[backlog](second)) for second in range(40_000)], topics.lines)
    process = made.start_consumer(fault, ["--rekey"])
    if fault:
        assert process.wait(timeout=60) == -signal.SIGKILL
        assert 0 < len(made.read(topics.events)) < 40_000, "in the middle"
        process = made.start_consumer(options=["--rekey"])
    made.wait_for(lambda: "assigned" in process.log.read_text(), what="joining")
    made.wait_for(lambda: made.lag(topics.lines, f"{made.name}-rekey") == 0, what="committing all lines")
    assert made.stop(process)[0] == 0, process.log.read_text()
    assert "40,000 lines" in process.log.read_text() or fault

    found = {}
    for message in made.read(topics.events):
        found.setdefault(message.key(), []).append(json.loads(message.value())["timestamp"])
    assert len(found) == 50
    for times in found.values():
        assert len(times) == 800, "none is lost, none comes twice"
        assert times == sorted(times)


def test_a_line_does_not_wait_for_partitions_that_are_at_their_end_and_numbers_are_served(line, knows_lines):
    address = f"127.0.0.1:{free_port()}"
    made = line(model={"path": str(knows_lines / "model")}, metrics={"listen": address})
    topics = made.settings.topics

    def get(path):
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
            return answer.read().decode()

    process = made.start_consumer(options=["--rekey"])
    made.wait_for(lambda: "assigned" in process.log.read_text(), what="joining")
    for count in range(1, 4):
        made.produce([(None, timed(count), 1)], topics.lines)
        written = time.monotonic()
        made.wait_for(lambda many=count: len(made.read(topics.events)) == many, what="sending it")
        assert time.monotonic() - written < 2
    made.wait_for(lambda: "log_anomaly_rekey_lines_total 3.0" in get("/metrics"), what="counting")
    assert 'log_anomaly_rekey_lag_messages{partition="1"} 0.0' in get("/metrics")
    assert get("/healthz") == get("/readyz") == "OK\n"
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        get("/")
    caught.value.close()
    assert made.stop(process)[0] == 0
    assert "no line for" not in process.log.read_text()


def test_tombstones_go_through_and_settings_that_do_not_fit_are_refused(line, knows_lines):
    made = line(model={"path": str(knows_lines / "model")})
    topics = made.settings.topics
    process = made.start_consumer(options=["--rekey"])
    made.wait_for(lambda: "assigned" in process.log.read_text(), what="joining")
    assert [stamped_by(made, name) for name in (topics.lines, topics.events)] == ["CreateTime", "LogAppendTime"]
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


def test_after_a_crash_too_a_line_without_a_time_is_as_old_as_the_one_before(line, knows_lines):
    """Else the first line of a stack trace in old logs would be of today, and end every block of its partition."""
    made = line(model={"path": str(knows_lines / "model")}, commit={"interval": "50ms"})
    topics = made.settings.topics
    trace = ("081109 203500 7 INFO dfs.X: start blk_1 size 5", "at start blk_1", "at blk_1 again")
    for number, text in enumerate(trace):
        process = made.start_consumer(options=["--rekey"])
        made.wait_for(lambda log=process.log: "assigned" in log.read_text(), what="joining")
        made.produce([(None, text, 1)], topics.lines)
        made.wait_for(lambda many=number: len(made.read(topics.events)) > many, what="sending it")
        made.stop(process, signal.SIGKILL)
    found = [json.loads(message.value())["timestamp"] for message in made.read(topics.events)]
    assert found == [1_226_262_900_000] * 3
