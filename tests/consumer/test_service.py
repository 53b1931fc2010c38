"""The order of the service's steps, with Kafka's part played by hand: what no real broker does on demand."""

import json
import time
from datetime import timedelta
from urllib.error import HTTPError
from urllib.request import urlopen

import msgspec
import numpy as np
import pytest
from confluent_kafka import KafkaError, TopicPartition

from consumer.artifacts import Artifacts
from consumer.checkpoint import Replay, recover
from consumer.delivery import TransactionAborted
from consumer.patience import Patience
from consumer.records import BLOCK, VOCABULARY, SessionState, vocabulary_id
from consumer.restore import Start
from consumer.service import Service
from consumer.settings import CommitSettings, Settings
from consumer.web import WebServer
from model.errors import UserError


class Message:
    def __init__(self, partition, offset, block):
        self._place = partition, offset
        self._block = block

    def error(self):
        return None

    def partition(self):
        return self._place[0]

    def offset(self):
        return self._place[1]

    def key(self):
        return self._block.encode()

    def value(self):
        return json.dumps({"block_id": self._block, "event_id": "never seen", "timestamp": 1000}).encode()

    def timestamp(self):
        return 1, 2000


class Astray(Message):
    """What librdkafka hands out when the next offset is no longer in the topic."""

    def error(self):
        return KafkaError(KafkaError._AUTO_OFFSET_RESET, "offset out of range")


class Garbage(Message):
    def value(self):
        return b"no event"

    def topic(self):
        return "log-events"

    def headers(self):
        return None


class Delivery:
    """A transaction in memory; the next commit fails if told to."""

    def __init__(self):
        self.pending, self.visible, self.committed = [], [], {}
        self.fails = False

    def send(self, topic, _, key, __, ___=-1):
        self.pending.append((topic, key))

    def poll(self):
        pass

    def abort(self):
        self.pending.clear()

    def commit(self, _, offsets, records):
        list(records)
        sent, self.pending = self.pending, []
        if self.fails:
            self.fails = False
            raise TransactionAborted("fenced")
        self.visible += sent
        self.committed |= {place.partition: place.offset for place in offsets}


class Script:
    """A group's consumer: each call of consume plays the next scene."""

    def __init__(self, *scenes):
        self._scenes = iter(scenes)
        self.sought = []

    def consume(self, *_):
        return next(self._scenes)() or []

    def incremental_assign(self, _):
        pass

    def incremental_unassign(self, _):
        pass

    def get_watermark_offsets(self, *_, **__):
        return 0, 10

    def seek(self, place):
        self.sought.append((place.partition, place.offset))


class Clock:
    """Time that passes when told to."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr("consumer.service.time", made)
    return made


@pytest.fixture
def service(bundle, make_threshold):
    settings = Settings(commit=CommitSettings(interval=timedelta(milliseconds=300)))
    made = Service(settings, Artifacts(bundle, make_threshold(3.0)), Patience())
    made._delivery = Delivery()

    class Restorer:
        @staticmethod
        def starts(partitions, vocabulary):
            for partition in partitions:
                offset = made._delivery.committed.get(partition, 0)
                empty = recover({}, vocabulary)
                yield Start(offset, empty, Replay(offset, offset), [], chosen=not made._delivery.committed)

    made._restorer = Restorer
    return made


def test_a_commit_that_fails_in_a_revocation_loses_nothing_of_the_partitions_that_stay(service, clock):
    """What the failed commit was to publish is gone from memory: it is read again before anything is committed."""
    delivery = service._delivery
    places = [TopicPartition("log-events", number) for number in (0, 1)]

    def assign():
        service._on_assign(consumer, places)

    def events():
        return [Message(0, 0, "x"), Message(1, 0, "y")]

    def revoke():
        delivery.fails = True
        service._on_revoke(consumer, places[1:])
        clock.sleep(0.4)  # the next commit falls due
        return [Message(0, 1, "x")]  # read ahead by the client: too early, since 0 has to come again

    def again():
        assert delivery.committed.get(0, 0) == 0
        return [Message(0, 0, "x")]

    def commit():
        service._commit()
        service._patience._stop.set()

    consumer = service._consumer = Script(assign, events, revoke, again, commit)
    service._loop()
    assert consumer.sought == [(0, 0)]
    assert delivery.committed == {0: 1}
    assert [key for topic, key in delivery.visible if topic == service._settings.topics.alerts] == [b"x"]


def test_a_place_lost_in_the_topic_costs_no_other_partition_its_alerts_twice(service):
    """All partitions go back to what is committed, so what the open transaction holds must not be committed."""
    places = [TopicPartition("log-events", number) for number in (0, 1)]

    def assign():
        service._on_assign(consumer, places)

    def alert_and_lose_the_place():
        return [Message(1, 0, "y"), Astray(0, 0, "x")]

    def again():
        assert consumer.sought == [(1, 0)]
        return [Message(1, 0, "y")]

    def commit():
        service._commit()
        service._patience._stop.set()

    consumer = service._consumer = Script(assign, alert_and_lose_the_place, again, commit)
    service._loop()
    alerts = [key for topic, key in service._delivery.visible if topic == service._settings.topics.alerts]
    assert alerts == [b"y"]


def test_where_a_group_without_offsets_begins_is_committed_before_anything_comes(service, clock):
    """With auto.offset.reset: latest, whoever comes after a crash would begin behind all that came meanwhile."""

    def assign():
        service._on_assign(consumer, [TopicPartition("log-events", 0)])
        clock.sleep(0.4)  # the next commit falls due

    consumer = service._consumer = Script(assign, service._patience._stop.set)
    service._loop()
    assert service._delivery.committed == {0: 0}


def test_nothing_is_sent_before_all_of_a_batch_is_judged(service, monkeypatch):
    """What is sent first opens the transaction, and a storm of alerts takes long to judge: its time would run out."""
    sent_before = []
    process = service._detector.process

    def judge(batches):
        sent_before.extend(service._delivery.pending)
        return process(batches)

    monkeypatch.setattr(service._detector, "process", judge)
    service._consumer = Script()
    service._on_assign(service._consumer, [TopicPartition("log-events", number) for number in (0, 1)])
    service._take([Garbage(0, 0, "g"), Message(0, 1, "x"), Message(1, 0, "y"), Garbage(1, 1, "h")])
    assert sent_before == []
    topics = service._settings.topics
    assert service._delivery.pending == [
        (topics.alerts, b"x"),
        (topics.alerts, b"y"),
        (topics.dead_letters, b"g"),
        (topics.dead_letters, b"h"),
    ]
    assert service.dead_letters.total() == 2


def test_waiting_for_brokers_is_no_reason_to_be_called_dead(service, monkeypatch):
    server = WebServer(service._metrics, service._board, "127.0.0.1:0")

    def health():
        try:
            with urlopen(f"http://{server.address}/healthz", timeout=10) as answer:
                return answer.status
        except HTTPError as error:
            return error.code

    try:
        assert health() == 200
        monkeypatch.setattr("consumer.metrics.HANGS_AFTER_SECONDS", 1.0)
        time.sleep(1)
        assert health() == 503  # the loop has not come by
        service._patience.retry(KafkaError(KafkaError._TIMED_OUT, "no broker answers"))
        assert health() == 200
    finally:
        server.close()


def test_a_process_that_ends_with_an_error_does_not_wait_for_brokers_to_abort(service):
    def never_returns():
        raise AssertionError("abort waits for brokers for as long as it takes")

    service._on_assign(Script(), [TopicPartition("log-events", 0)])
    service._failure = "the topic was deleted"
    service._delivery.abort = never_returns
    service._on_lost(Script(), [TopicPartition("log-events", 0)])
    with pytest.raises(UserError, match="the topic was deleted"):
        service._raise_failure()


@pytest.mark.parametrize(
    "damage",
    [
        lambda records: {key: value for key, value in records.items() if key[:1] != VOCABULARY},
        lambda records: {key: value[:-4] if key[:1] == BLOCK else value for key, value in records.items()},
        lambda records: {key: value + b"?" if key[:1] == BLOCK else value for key, value in records.items()},
    ],
    ids=["no vocabulary", "cut off", "something behind its end"],
)
def test_a_damaged_record_ends_in_a_sentence(service, bundle, damage):
    """Records are read in bulk when they are restored, in a callback that must not raise."""
    state = SessionState(1, 0, 0, 0, 0, 0, np.array([4], np.uint16), np.array([0]), np.array([0]))
    name = vocabulary_id(bundle.vocabulary.events)
    records = {BLOCK + b"x": state.pack(name), VOCABULARY + name: msgspec.msgpack.encode(bundle.vocabulary.events)}

    class Restorer:
        @staticmethod
        def starts(partitions, vocabulary):
            for _ in partitions:
                yield Start(1, recover(damage(records), vocabulary), Replay(1, 1), [])

    service._restorer = Restorer
    service._on_assign(Script(), [TopicPartition("log-events", 0)])
    with pytest.raises(UserError, match=r"log-.*/0: the stored windows cannot be read \(.*\); delete the topic"):
        service._raise_failure()
