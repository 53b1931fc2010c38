"""Replay's parts by themselves, and all of it on librdkafka's mock broker, which the demo uses."""

import json
import re
import sys
from collections import Counter
from itertools import pairwise, repeat

import pytest
import yaml
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, TopicPartition
from confluent_kafka.admin import AdminClient
from hypothesis import given
from hypothesis import strategies as st

from consumer import topics
from consumer.events import Decoder, EventBatch
from consumer.settings import EventSettings, load_settings
from consumer.topics import TopicSpec, ensure_topics, require_topic
from model.errors import UserError
from model.sessions import Event
from scripts import replay as module
from scripts.replay import encoder, main, paced, replay

BLOCKS = ("A", "B", "C", "Ü")

ids = st.text(min_size=1, max_size=20)
events_of_any_kind = st.lists(st.builds(Event, st.integers(0, 10**12), ids, ids), max_size=30)
field_names = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters='"\\'), min_size=1)
names = st.lists(field_names, min_size=3, max_size=3, unique=True)


class Time:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now, self.naps = 1000.0, 0

    def clock(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds
        self.naps += 1

    def of(self, events, **pace):
        """Return the seconds after the start at which each event came."""
        return [self.now - 1000 for _ in paced(iter(events), **pace, clock=self.clock, sleep=self.sleep)]


@pytest.fixture(scope="module")
def mock():
    client = AdminClient({"bootstrap.servers": "mock", "test.mock.num.brokers": 1, "log_level": 0})
    yield ",".join(f"{broker.host}:{broker.port}" for broker in client.list_topics(timeout=10).brokers.values())
    del client


@pytest.fixture
def config(mock, tmp_path, request):
    """Write a settings file with a topic of the test's own."""

    def make(**sections):
        settings = {
            "kafka": {"bootstrap.servers": mock},
            "topics": {"events": re.sub(r"\W+", "-", request.node.name)},
        }
        for name, values in sections.items():
            settings.setdefault(name, {}).update(values)
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return make


@pytest.fixture
def command(config, monkeypatch):
    """Run the command in this process."""

    def run(*options, **sections):
        path = config(**sections)
        monkeypatch.setattr(sys, "argv", ["replay", "--config", str(path), *map(str, options)])
        main()
        return load_settings(path)

    return run


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "events.csv"
    path.write_text("timestamp,block_id,event_id\n" + "".join(f"{1000 * n},{BLOCKS[n % 4]},E{n}\n" for n in range(30)))
    return path


def some(count):
    return [Event(1000 * number, BLOCKS[number % 4], f"E{number}") for number in range(count)]


def read(settings, topic=None):
    """Return the messages of a topic, each partition's in order."""
    topic = topic or settings.topics.events
    consumer = Consumer(
        settings.kafka.for_consumer(enable_partition_eof=True, enable_auto_commit=False) | {"log_level": 0}
    )
    partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
    consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in partitions])
    unread, messages = set(partitions), []
    while unread:
        message = consumer.poll(10)
        assert message is not None
        if message.error() is None:
            messages.append(message)
        else:
            assert message.error().code() == KafkaError._PARTITION_EOF
            unread.discard(message.partition())
    consumer.close()
    return sorted(messages, key=lambda message: (message.partition(), message.offset()))


# pace


def test_a_rate_spaces_events_evenly():
    assert Time().of(some(5), rate=4.0) == [0, 0.25, 0.5, 0.75, 1]


def test_speed_plays_the_gaps_between_timestamps():
    events = [Event(time, "A", "E") for time in (5000, 5000, 9000, 8000, 15_000)]
    assert Time().of(events, speed=2.0) == [0, 0, 2, 2, 5]


def test_without_a_pace_nothing_waits():
    time = Time()
    assert time.of(some(1000)) == [0.0] * 1000
    assert time.naps == 0


def test_a_late_event_does_not_delay_those_after_it():
    """What a slow broker costs is caught up: the rate holds on average."""
    time = Time()
    arrived = []
    for number, _ in enumerate(paced(iter(some(6)), rate=1.0, clock=time.clock, sleep=time.sleep)):
        arrived.append(time.now - 1000)
        if number == 1:
            time.now += 2.5
    assert arrived == [0, 1, 3.5, 3.5, 4, 5]


def test_a_high_rate_naps_rarely():
    """Sleeping has its own cost: events due within a millisecond go together."""
    time = Time()
    arrived = time.of(some(10_000), rate=100_000.0)
    assert time.naps <= 100
    assert arrived[-1] == pytest.approx(0.1, abs=0.002)


@given(events=events_of_any_kind, pace=st.sampled_from([{"rate": 7.5}, {"speed": 1e6}, {}]))
def test_pacing_changes_neither_events_nor_their_order(events, pace):
    time = Time()
    assert list(paced(iter(events), **pace, clock=time.clock, sleep=time.sleep)) == events


# messages


@given(event=st.builds(Event, st.integers(0, 253_402_300_799_999), ids, ids), names=names)
def test_the_consumer_understands_what_is_sent(event, names):
    fields = EventSettings(**dict(zip(("block_id", "event_id", "timestamp"), names, strict=True)))
    batch = EventBatch()
    Decoder(fields, {event.event_id: 7}).decode(event.block_id.encode(), encoder(fields)(event), 0, batch)
    assert (batch.blocks, batch.tokens, batch.times) == ([event.block_id], [7], [event.timestamp])


# the command


def test_a_file_goes_into_the_topic_in_order_with_keys(command, file, capsys):
    settings = command(file, events={"timestamp": "at"})
    messages = read(settings)
    for message in messages:
        assert message.key() == json.loads(message.value())["block_id"].encode()
    for block in BLOCKS:
        numbers = [json.loads(m.value()) for m in messages if m.key() == block.encode()]
        assert numbers == [
            {"block_id": block, "event_id": f"E{n}", "at": 1000 * n} for n in range(BLOCKS.index(block), 30, 4)
        ]
    said = capsys.readouterr().out
    assert re.search(
        r"30 events of 4 blocks into test_a_file\S* in \d+\.\d s \([\d,]+ events/s\)", re.sub(r"\s+", " ", said)
    )


def test_another_topic_can_be_named(command, file):
    settings = command(file, "--topic", "elsewhere")
    assert len(read(settings, "elsewhere")) == 30
    with pytest.raises(UserError, match="there is no topic"):
        require_topic(settings, settings.topics.events)


def test_unkeyed(command, file):
    messages = read(command(file, "--unkeyed"))
    assert [message.key() for message in messages] == [None] * 30


def test_a_tombstone_follows_each_blocks_last_event(command, file, capsys):
    messages = read(command(file, "--tombstones"))
    for block in BLOCKS:
        values = [message.value() for message in messages if message.key() == block.encode()]
        assert values.index(None) == len(values) - 1 == len(range(BLOCKS.index(block), 30, 4))
    assert "4 tombstones" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tombstones", "--unkeyed"], "--tombstones needs keys.*leave out --unkeyed"),
        (["--rate", "0"], "--rate 0: a number above zero is needed"),
        (["--speed", "-1"], "--speed -1: a number above zero"),
        (["--rate", "nan"], "--rate nan: a number above zero"),
    ],
)
def test_impossible_wishes_are_refused_before_anything_is_sent(command, file, options, said):
    with pytest.raises(UserError, match=said):
        command(file, *options, kafka={"bootstrap.servers": "127.0.0.1:1"})


def test_rate_and_speed_exclude_each_other(command, file, capsys):
    with pytest.raises(SystemExit):
        command(file, "--rate", "1", "--speed", "1")
    assert "not allowed with" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_sends_nothing(command, file):
    with file.open("a") as stream:
        stream.write("soon,A,E\n")
    with pytest.raises(UserError, match="line 32: 'soon' is no timestamp"):
        command(file)


# what goes wrong


def test_what_cannot_be_delivered_is_counted_and_the_rest_arrives(command, file, config):
    with file.open("a") as stream:
        stream.write(f"1,{'x' * 3000},E\n40000,A,last\n")
    with pytest.raises(UserError, match=r"1 messages were not delivered to test_what\S*: .*too large.*; see to that"):
        command(file, kafka={"message.max.bytes": 1000})
    messages = read(load_settings(config()))
    assert len(messages) == 31
    assert "last" in {json.loads(message.value())["event_id"] for message in messages}


def test_messages_that_nobody_takes_are_counted(config, monkeypatch):
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.2)
    settings = load_settings(config(kafka={"bootstrap.servers": "127.0.0.1:1", "log_level": 0}))
    done = replay(settings, iter(some(10)))
    assert (done.events, done.failed) == (10, 10)
    assert "no broker took them" in done.failure


def test_an_interrupted_replay_delivers_what_it_has_sent(config):
    def interrupted():
        yield from some(10)
        raise KeyboardInterrupt

    settings = load_settings(config())
    ensure_topics(settings, [TopicSpec(settings.topics.events)])
    with pytest.raises(KeyboardInterrupt):
        replay(settings, interrupted())
    assert len(read(settings)) == 10


def test_an_interrupted_replay_tells_its_losses(config, monkeypatch):
    def interrupted():
        yield from some(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.2)
    settings = load_settings(config(kafka={"bootstrap.servers": "127.0.0.1:1", "log_level": 0}))
    with pytest.raises(UserError, match="10 messages were not delivered"):
        replay(settings, interrupted())


def test_a_full_queue_waits_instead_of_dropping(config):
    settings = load_settings(config(kafka={"producer": {"queue.buffering.max.messages": 10}}))
    ensure_topics(settings, [TopicSpec(settings.topics.events)])
    done = replay(settings, iter(some(500)))
    assert done.failed == 0
    assert len(read(settings)) == 500


def test_progress_is_reported_as_time_passes_and_at_the_end(config, monkeypatch):
    monkeypatch.setattr(module, "REPORT_SECONDS", 0.05)
    settings = load_settings(config())
    ensure_topics(settings, [TopicSpec(settings.topics.events)])
    seen = []
    replay(settings, paced(iter(some(10)), rate=20.0), report=seen.append)
    assert len(seen) >= 4
    assert seen[-1] == 10
    assert all(first <= second for first, second in pairwise(seen))


def test_tombstones_count_what_was_promised_not_what_came(config):
    """A block whose promised last event never came is left open."""
    settings = load_settings(config())
    ensure_topics(settings, [TopicSpec(settings.topics.events)])
    done = replay(settings, iter(some(4)), last_events=Counter(dict(zip(BLOCKS, repeat(1), strict=False), A=2)))
    assert done.tombstones == 3
    assert {m.key().decode() for m in read(settings) if m.value() is None} == set(BLOCKS) - {"A"}


# topics


def test_missing_topics_are_created_once(config):
    settings = load_settings(config())
    specs = [TopicSpec("first"), TopicSpec("second")]
    assert ensure_topics(settings, specs) == ["first", "second"]
    assert ensure_topics(settings, specs) == []
    assert ensure_topics(settings, [*specs, TopicSpec("third")]) == ["third"]


def test_missing_topics_are_named_where_none_may_be_created(command, file):
    with pytest.raises(UserError, match=r"missing topics: test_missing\S*; create them, or set topics.create: true"):
        command(file, topics={"create": False})


def test_a_broker_that_is_not_there_is_one_sentence(command, file, monkeypatch, capfd):
    monkeypatch.setattr(topics, "_SECONDS", 1.0)
    with pytest.raises(UserError, match=r"no broker answers at kafka\.bootstrap\.servers 127\.0\.0\.1:1"):
        command(file, kafka={"bootstrap.servers": "127.0.0.1:1"})
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("kafka", "said"),
    [
        ({"no.such": 1}, r'kafka\.no\.such: No such configuration property: "no\.such"; mend'),
        ({"linger.ms": "soon"}, r"kafka\.linger\.ms: "),
        ({"security.protocol": "plain"}, r"kafka\.security\.protocol: "),
        ({"producer": {"linger.ms": -5}}, r"kafka\.producer\.linger\.ms: .* outside allowed range"),
        ({"producer": {"compression.type": "rar"}}, r"kafka\.producer\.compression\.type: "),
        ({"producer": {"acks": 1}}, "kafka: .*`acks` must be set"),
    ],
)
def test_a_wrong_librdkafka_setting_is_named_as_it_stands_in_the_file(command, file, kafka, said):
    with pytest.raises(UserError, match=said) as caught:
        command(file, kafka=kafka)
    assert "\n" not in str(caught.value)
