"""The order of the service's steps, with Kafka's part played by hand: what no real broker does on demand."""

import json
import re
import time
from datetime import timedelta
from urllib.error import HTTPError
from urllib.request import urlopen

import msgspec
import numpy as np
import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from consumer.artifacts import Artifacts
from consumer.checkpoint import Replay, recover
from consumer.delivery import TransactionAborted
from consumer.detector import Detector
from consumer.events import EventBatch
from consumer.patience import Patience
from consumer.records import BLOCK, VOCABULARY, SessionState, vocabulary_id
from consumer.restore import Start
from consumer.service import Service
from consumer.settings import CommitSettings, MetricsSettings, ReloadSettings, Settings, WindowSettings
from model.errors import UserError

TOPICS = Settings().topics


class Message:
    def __init__(self, partition, offset, block, event="never seen", time=1000):
        self._place = partition, offset
        self._block = block
        self._event = event
        self._time = time

    def error(self):
        return None

    def partition(self):
        return self._place[0]

    def offset(self):
        return self._place[1]

    def key(self):
        return self._block.encode()

    def value(self):
        return json.dumps({"block_id": self._block, "event_id": self._event, "timestamp": self._time}).encode()

    def timestamp(self):
        return 1, self._time + 1000


class Trouble(Message):
    """What librdkafka hands out in the place of a message."""

    def __init__(self, partition, code):
        super().__init__(partition, -1, "")
        self._code = code

    def error(self):
        return KafkaError(self._code, "as a test wants it")


class End(Message):
    """Nothing more to read."""

    def __init__(self, partition, offset):
        super().__init__(partition, offset, "")

    def error(self):
        return KafkaError(KafkaError._PARTITION_EOF)


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
        self.commits = []
        self.fails = False

    def send(self, topic, _, key, __, ___=-1):
        self.pending.append((topic, key))

    def poll(self):
        pass

    def abort(self):
        self.pending.clear()

    def commit(self, _, offsets, records):
        sent, self.pending = self.pending, []
        blocks = [key.decode()[1:] for _, key, value in records if key[:1] == BLOCK and value is not None]
        if self.fails:
            self.fails = False
            raise TransactionAborted("fenced")
        self.visible += sent
        self.committed |= {place.partition: place.offset for place in offsets}
        self.commits.append((dict(self.committed), [key for _, key in sent], blocks))

    def close(self):
        pass

    @property
    def alerted(self):
        return [key for topic, key in self.visible if topic == TOPICS.alerts]


class Patient(Patience):
    """Patience that ends when told to."""

    stop_asked = False


class Member:
    """A member of a group: each call of consume plays the next scene, in which partitions come and go."""

    def __init__(self):
        self.sought, self.owned = [], set()

    def subscribe(self, _, *, on_assign, on_revoke, on_lost):
        self.callbacks = {"assign": on_assign, "revoke": on_revoke, "lose": on_lost}

    def rebalance(self, what, *numbers):
        self.callbacks[what](self, [TopicPartition("log-events", number) for number in numbers])

    def consume(self, *_):
        scene = self.scenes.pop(0)
        self.patience.stop_asked = not self.scenes
        return scene() or []

    def incremental_assign(self, places):
        self.owned |= {place.partition for place in places}

    def incremental_unassign(self, places):
        self.owned -= {place.partition for place in places}

    def get_watermark_offsets(self, *_, **__):
        return 0, 10

    def seek(self, place):
        self.sought.append((place.partition, place.offset))

    def close(self):
        self.rebalance("revoke", *self.owned)


class Restorer:
    """Nothing is stored but the offsets."""

    def __init__(self, delivery):
        self._delivery = delivery

    def starts(self, partitions, vocabulary):
        for partition in partitions:
            offset = self._delivery.committed.get(partition, 0)
            empty = recover({}, vocabulary)
            yield Start(offset, empty, Replay(offset, offset), [], chosen=not self._delivery.committed)


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
    for module in ("service", "assignment", "partition"):
        monkeypatch.setattr(f"consumer.{module}.time", made)
    return made


@pytest.fixture
def delivery():
    return Delivery()


@pytest.fixture
def restorer(delivery):
    return Restorer(delivery)


@pytest.fixture
def member():
    return Member()


class Brokers:
    """Say where partitions end, if they are there."""

    def __init__(self):
        self.ends, self.away, self._asked = {}, False, {}

    def ask(self, partitions, now):
        self._asked |= dict.fromkeys(partitions, now)

    def answers(self):
        asked, self._asked = self._asked, {}
        return [(number, now, self.ends[number]) for number, now in asked.items() if not self.away]


@pytest.fixture
def brokers():
    return Brokers()


@pytest.fixture
def play(bundle, make_threshold, delivery, restorer, member, brokers, monkeypatch):
    """Run a service through scenes."""
    monkeypatch.setattr("consumer.service.rehearse", lambda *_: None)
    monkeypatch.setattr("consumer.service.delivery_for", lambda *_: delivery)
    monkeypatch.setattr("consumer.service.member", lambda *_, **__: member)
    monkeypatch.setattr("consumer.service.Restorer", lambda *_: restorer)
    monkeypatch.setattr("consumer.service.Ends", lambda *_: brokers)

    def play(*scenes, **settings):
        member.scenes, member.patience = list(scenes), Patient()
        interval = CommitSettings(interval=timedelta(milliseconds=300))
        service = Service(
            Settings(commit=interval, **settings), Artifacts(bundle, make_threshold(3.0)), member.patience
        )
        service.run()
        return service

    return play


@pytest.mark.usefixtures("clock")
def test_a_stop_commits_what_is_done(play, delivery, member):
    def events():
        member.rebalance("assign", 0, 1)
        return [Message(0, 0, "x"), Garbage(1, 0, "g")]

    service = play(events)
    assert delivery.committed == {0: 1, 1: 1}
    assert delivery.visible == [(TOPICS.alerts, b"x"), (TOPICS.dead_letters, b"g")]
    assert service.summary().startswith(
        "2 messages, 1 looks, 1 windows scored, 1 alerts, 1 dead letters, 1 open blocks handed"
    )
    assert not member.owned


def test_a_commit_that_fails_in_a_revocation_loses_nothing_of_the_partitions_that_stay(play, delivery, member, clock):
    """What the failed commit was to publish is gone from memory: it is read again before anything is committed."""

    def events():
        member.rebalance("assign", 0, 1)
        return [Message(0, 0, "x"), Message(1, 0, "y")]

    def revoke():
        delivery.fails = True
        member.rebalance("revoke", 1)
        clock.sleep(0.4)  # the next commit falls due
        return [Message(0, 1, "x")]  # read ahead by the client: too early, since 0 has to come again

    def again():
        assert delivery.committed.get(0, 0) == 0
        return [Message(0, 0, "x")]

    play(events, revoke, again)
    assert member.sought == [(0, 0)]
    assert delivery.committed == {0: 1}
    assert delivery.alerted == [b"x"]


def test_a_place_lost_in_the_topic_costs_no_other_partition_its_alerts_twice(play, delivery, member):
    """All partitions go back to what is committed, so what the open transaction holds must not be committed."""

    def alert_and_lose_the_place():
        member.rebalance("assign", 0, 1)
        return [Message(1, 0, "y"), Trouble(0, KafkaError._AUTO_OFFSET_RESET)]

    def again():
        assert member.sought == [(1, 0)]
        return [Message(1, 0, "y")]

    play(alert_and_lose_the_place, again)
    assert delivery.alerted == [b"y"]


def test_a_lost_partition_takes_the_transaction_of_the_others_with_it(play, delivery, member):
    def events():
        member.rebalance("assign", 0, 1)
        return [Message(0, 0, "x"), Message(1, 0, "y")]

    def lose():
        member.rebalance("lose", 1)
        assert not delivery.pending

    def again():
        assert member.sought == [(0, 0)]
        return [Message(0, 0, "x"), Message(1, 1, "z")]  # of the other, read before

    play(events, lose, again)
    assert delivery.committed == {0: 1}
    assert delivery.alerted == [b"x"]


def test_what_a_lost_transaction_held_is_not_committed_by_giving_back_the_rest(play, delivery, member):
    """Both callbacks may come in one call: the alerts are gone, so whoever has the partition next is to judge again."""

    def events():
        member.rebalance("assign", 0, 1)
        return [Message(0, 0, "x"), Message(1, 0, "y")]

    def lose_and_give_back():
        member.rebalance("lose", 1)
        member.rebalance("revoke", 0)

    play(events, lose_and_give_back)
    assert not member.owned
    assert delivery.committed == {}
    assert delivery.visible == []


def test_where_a_group_without_offsets_begins_is_committed_before_anything_comes(play, delivery, member, clock):
    """With auto.offset.reset: latest, whoever comes after a crash would begin behind all that came meanwhile."""

    def assign():
        member.rebalance("assign", 0)
        clock.sleep(0.4)  # the next commit falls due

    def look():
        assert delivery.committed == {0: 0}

    play(assign, look)


def test_nothing_is_sent_before_all_of_a_batch_is_judged(play, delivery, member, monkeypatch):
    """What is sent first opens the transaction, and a storm of alerts takes long to judge: its time would run out."""
    sent_before = []
    process = Detector.process

    def judge(detector, batches):
        sent_before.extend(delivery.pending)
        return process(detector, batches)

    def events():
        member.rebalance("assign", 0, 1)
        return [Garbage(0, 0, "g"), Message(0, 1, "x"), Message(1, 0, "y"), Garbage(1, 1, "h")]

    monkeypatch.setattr(Detector, "process", judge)
    service = play(events)
    assert sent_before == []
    assert delivery.visible == [
        (TOPICS.alerts, b"x"),
        (TOPICS.alerts, b"y"),
        (TOPICS.dead_letters, b"g"),
        (TOPICS.dead_letters, b"h"),
    ]
    assert service.dead_letters.total() == 2


def test_a_checkpoint_that_takes_several_commits_is_finished_though_nothing_more_comes(
    play, delivery, member, clock, monkeypatch
):
    monkeypatch.setattr("consumer.checkpoint.PER_COMMIT", 2)

    def begin():
        member.rebalance("assign", 0)
        clock.sleep(31)  # a checkpoint is due
        return [Message(0, offset, f"x{offset}", "a") for offset in range(5)]

    def quiet():
        clock.sleep(0.4)

    def stop():
        assert [blocks for _, _, blocks in delivery.commits] == [["x0", "x1"], ["x2", "x3"], ["x4"]]

    play(begin, quiet, quiet, quiet, quiet, stop)


def test_partitions_share_what_checkpoints_may_write_with_one_commit(play, delivery, member, clock, monkeypatch):
    """Else a process that is left alone with many has transactions that outlast their time, again and again."""
    monkeypatch.setattr("consumer.checkpoint.PER_COMMIT", 4)

    def begin():
        member.rebalance("assign", 0, 1)
        clock.sleep(31)  # a checkpoint is due
        return [Message(partition, offset, f"{partition}{offset}", "a") for partition in (0, 1) for offset in range(5)]

    def quiet():
        clock.sleep(0.4)

    def stop():
        written = [blocks for _, _, blocks in delivery.commits]
        assert written == [["00", "01", "10", "11"], ["02", "03", "12", "13"], ["04", "14"]]

    play(begin, quiet, quiet, quiet, quiet, stop)


def test_what_is_done_is_committed_before_another_partition_is_taken_over(play, delivery, member, restorer):
    """That may last until a dead member's transaction has timed out, and so would this one's."""
    starts, committed = restorer.starts, []

    def watched(partitions, vocabulary):
        committed.append((list(partitions), dict(delivery.committed), len(delivery.pending)))
        return starts(partitions, vocabulary)

    restorer.starts = watched

    def begin():
        member.rebalance("assign", 0)
        return [Message(0, 0, "x")]

    def more():
        assert delivery.pending
        member.rebalance("assign", 1)

    play(begin, more)
    assert committed == [([0], {}, 0), ([1], {0: 1}, 0)]


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("fails", [False, True])
def test_an_event_that_ends_many_sessions_waits_until_they_are_closed_commit_by_commit(
    play, delivery, member, monkeypatch, fails
):
    """One transaction for all of them might take longer than it may last, and so would the next attempt."""
    monkeypatch.setattr("consumer.service.PER_COMMIT", 2)

    def begin():
        member.rebalance("assign", 0)
        return opening()

    def opening():
        return [Message(0, offset, f"x{offset}") for offset in range(5)]

    def goes_on():
        return [Garbage(0, 5, "g"), *rest()]

    def rest():
        delivery.fails = fails and (0, 0) not in member.sought
        return [Message(0, 6, "late", time=10**9), Garbage(0, 7, "h")]

    play(begin, goes_on, *([opening, goes_on] if fails else []), rest, rest)
    assert member.sought == [(0, 0), (0, 6), (0, 6)] if fails else [(0, 6), (0, 6)]
    offsets, sent, closed = zip(*delivery.commits, strict=True)
    assert offsets == ({0: 6}, {0: 6}, {0: 6}, {0: 6}, {0: 8})
    assert sent == ([b"x0", b"x1", b"x2", b"x3", b"x4", b"g"], [], [], [], [b"late", b"h"])
    assert closed[1] == ["x0", "x1"]
    assert closed[3] == ["x2", "x3"]
    assert closed[4] == ["late"]


@pytest.mark.parametrize("trouble", [None, "outage", "backlog", "stopped"])
def test_blocks_of_a_silent_partition_are_closed_only_where_brokers_say_that_nothing_is_there(
    play, member, brokers, clock, delivery, trouble
):
    """Else an outage, a process that stood still or a backlog would end all blocks in mid-life."""
    brokers.ends = {0: 1}

    def begin():
        member.rebalance("assign", 0)
        return [Message(0, 0, "x", "a")]

    def quiet():
        clock.sleep(60)

    def trouble_begins():
        if trouble == "outage":
            brokers.away = True
        elif trouble == "backlog":
            brokers.ends = {0: 7}
        elif trouble == "stopped":
            clock.sleep(4000)
        clock.sleep(60)

    def trouble_is_over():
        brokers.away, brokers.ends = False, {0: 1}
        clock.sleep(60)

    closing = {"idle_timeout": timedelta(hours=1)}
    service = play(
        begin,
        *[quiet] * 20,
        trouble_begins,
        *[quiet] * 20,
        trouble_is_over,
        *[quiet] * 30,
        windows=WindowSettings(**closing),
    )
    assert service.alerts.total() == (trouble is None)
    assert delivery.alerted == ([b"x"] if trouble is None else [])


def test_each_silent_partition_is_judged_while_no_transaction_is_open_and_committed_by_itself(
    play, member, brokers, clock, delivery, monkeypatch
):
    """All in one might take longer than it may last; and each attempt to do it again begins with another silence."""
    brokers.ends = {0: 1, 1: 1, 2: 1}
    pending, close = [], Detector.close

    def watched(self, *arguments):
        pending.append(len(delivery.pending))
        return close(self, *arguments)

    monkeypatch.setattr(Detector, "close", watched)

    def begin():
        member.rebalance("assign", 0, 1, 2)
        return [Message(number, 0, f"x{number}", "a") for number in range(3)]

    def quiet():
        clock.sleep(60)

    play(begin, *[quiet] * 70, windows=WindowSettings(idle_timeout=timedelta(hours=1)))
    assert pending == [0, 0, 0]
    assert [sent for _, sent, _ in delivery.commits if sent] == [[b"x0"], [b"x1"], [b"x2"]]


def test_where_a_topic_ends_is_told_by_the_client_and_is_no_message(play, member, brokers, clock, delivery):
    """In a topic of transactions the end lies behind the last message."""
    brokers.ends = {0: 2}

    def begin():
        member.rebalance("assign", 0)
        return [Message(0, 0, "x", "a"), End(0, 2)]

    def quiet():
        clock.sleep(1)

    service = play(begin, *[quiet] * 40, windows=WindowSettings(idle_timeout=timedelta(seconds=30)))
    assert delivery.alerted == [b"x"]
    assert service.messages == 1


def test_what_is_no_event_is_warned_of_with_its_reason_once_in_a_minute(play, member, clock, caplog):
    def begin():
        member.rebalance("assign", 0)
        return [Garbage(0, 0, "g"), Garbage(0, 1, "g")]

    def more():
        clock.sleep(30)
        return [Garbage(0, 2, "g")]

    def later():
        clock.sleep(31)
        return [Garbage(0, 3, "g")]

    play(begin, more, later)
    said = [message for message in caplog.messages if message.startswith("log-events/0: ")]
    assert [message.split(": ")[1] for message in said] == [
        f"offset {offset} is no event, but a dead letter" for offset in (0, 3)
    ]
    assert "JSON is malformed" in said[0]


def test_seconds_where_milliseconds_are_due_are_warned_of(play, member, caplog):
    """They are in January 1970: blocks that are over only after years of silence stay open."""

    class Today(Message):
        def timestamp(self):
            return 1, 1_800_000_000_000

    def begin():
        member.rebalance("assign", 0)
        return [Today(0, 0, "x", "a", time=1_800_000_000)]

    play(begin)
    assert "log-events/0: a timestamp of 1800000000 is taken as milliseconds since 1970" in caplog.text


def test_what_is_counted_goes_on_after_a_reload(play, member, monkeypatch, bundle, make_threshold):
    """A rate over a counter that falls would be one of events that never were."""

    class Lines:
        """Of text: most name no block."""

        skipped = 0

        def decode(self, messages):
            self.skipped += len(messages.offsets)
            return EventBatch.of([], [], [], []), []

    monkeypatch.setattr(Artifacts, "decoder", lambda *_: Lines())
    news = [Artifacts(bundle, make_threshold(5.0))]
    monkeypatch.setattr("consumer.service.ArtifactWatcher.poll", lambda _: news.pop() if news else None)

    def begin():
        member.rebalance("assign", 0)
        return [Message(0, 0, "x"), Message(0, 1, "x")]

    def more():
        return [Message(0, 2, "x")]

    service = play(begin, more, reload=ReloadSettings(interval=timedelta(0)))
    assert not news
    assert service.status().counts["skipped_lines"] == 3


def test_waiting_for_brokers_is_no_reason_to_be_called_dead(play, member, caplog, monkeypatch):
    caplog.set_level("INFO")

    def health():
        (address,) = re.findall(r"http://([\d.:]+)", caplog.text)
        try:
            with urlopen(f"http://{address}/healthz", timeout=10) as answer:
                return answer.status
        except HTTPError as error:
            return error.code

    def wait():
        assert health() == 200
        monkeypatch.setattr("consumer.metrics.HANGS_AFTER_SECONDS", 1.0)
        time.sleep(1)
        assert health() == 503  # the loop has not come by
        member.patience.retry(KafkaError(KafkaError._TIMED_OUT, "no broker answers"))
        assert health() == 200

    play(wait, metrics=MetricsSettings(listen="127.0.0.1:0"))


def test_a_process_that_ends_with_an_error_does_not_wait_for_brokers_to_abort(play, delivery, member):
    def never_returns():
        raise AssertionError("abort waits for brokers for as long as it takes")

    def hopeless():
        member.rebalance("assign", 0)
        delivery.abort = never_returns
        return [Trouble(0, KafkaError.UNKNOWN_TOPIC_OR_PART)]

    member.close = lambda: member.rebalance("lose", 0)
    with pytest.raises(UserError, match="log-events: as a test wants it"):
        play(hopeless)


def test_a_process_that_ends_with_an_error_commits_nothing_half_done(play, delivery, member):
    def fail():
        member.rebalance("assign", 0)
        delivery.send = lambda *_: {}["a bug"]
        return [Message(0, 0, "x")]

    with pytest.raises(KeyError, match="a bug"):
        play(fail)
    assert delivery.committed == {}
    assert not member.owned


@pytest.mark.usefixtures("clock")
def test_a_place_that_cannot_be_gone_back_to_ends_in_a_sentence(play, delivery, member):
    def refuse(_):
        raise KafkaException(KafkaError(KafkaError._STATE, "erroneous state"))

    def fail():
        member.rebalance("assign", 0)
        member.seek = refuse
        raise TransactionAborted("fenced")

    with pytest.raises(UserError, match=r"kafka: cannot go back to .*log-events.*: erroneous state"):
        play(fail, lambda: None)
    assert delivery.committed == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda records: {key: value for key, value in records.items() if key[:1] != VOCABULARY},
        lambda records: {key: value[:-4] if key[:1] == BLOCK else value for key, value in records.items()},
        lambda records: {key: value + b"?" if key[:1] == BLOCK else value for key, value in records.items()},
    ],
    ids=["no vocabulary", "cut off", "something behind its end"],
)
def test_a_damaged_record_ends_in_a_sentence(play, restorer, member, bundle, damage):
    """Records are read in bulk when they are restored, in a callback that must not raise."""
    state = SessionState(1, 0, 0, 0, 0, 0, np.array([4], np.uint16), np.array([0]), np.array([0]))
    name = vocabulary_id(bundle.vocabulary.events)
    records = {BLOCK + b"x": state.pack(name), VOCABULARY + name: msgspec.msgpack.encode(bundle.vocabulary.events)}

    def starts(partitions, vocabulary):
        for _ in partitions:
            yield Start(1, recover(damage(records), vocabulary), Replay(1, 1), [])

    restorer.starts = starts
    with pytest.raises(UserError, match=r"log-.*/0: the stored windows cannot be read \(.*\); delete the topic"):
        play(lambda: member.rebalance("assign", 0))
