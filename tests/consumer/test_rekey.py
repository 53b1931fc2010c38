"""The re-keyer between a consumer and a delivery that are made up: what it sends, commits, and waits for."""

import pytest
from confluent_kafka import KafkaError, TopicPartition

from consumer.delivery import TransactionAborted
from consumer.patience import Patience
from consumer.rekey import Rekeyer
from consumer.settings import EventSettings, Settings
from model.bundle import Bundle
from model.lines import LineFormat, LineRules
from model.network import Autoencoder, Shape
from model.templates import event_id
from model.vocabulary import Vocabulary

LINES = LineFormat(LineRules.of(EventSettings()), ("start <BLOCK>",))


class Message:
    def __init__(self, partition, offset, value=None, error=None, key=None):
        self.parts = (partition, offset, value, error, key)

    def partition(self):
        return self.parts[0]

    def offset(self):
        return self.parts[1]

    def value(self):
        return self.parts[2]

    def error(self):
        return self.parts[3]

    def key(self):
        return self.parts[4]

    def topic(self):
        return "log-lines"

    def timestamp(self):
        return 1, 1_226_262_900_000

    def headers(self):
        return None

    def __len__(self):
        return len(self.value() or b"")


def line(partition, offset, second, text="start blk_{}"):
    return Message(partition, offset, f"081109 2035{second:02} 7 INFO dfs.X: {text.format(second)}".encode())


def end(partition, offset):
    return Message(partition, offset, error=KafkaError(KafkaError._PARTITION_EOF))


class Consumer:
    """Hands over what a test lays ready; calls of the group's callbacks happen in between, as in life."""

    def __init__(self):
        self.ready = []
        self.calls = []

    def consume(self, _, __):
        messages, self.ready = self.ready, []
        return [message for message in messages if not (callable(message) and message() is None)]

    def get_watermark_offsets(self, _, cached):
        assert cached
        return -1001, -1001

    def __getattr__(self, name):
        return lambda where: self.calls.append((name, [(place.partition, place.offset) for place in where]))


class Delivery:
    def __init__(self):
        self.sent = []
        self.committed = {}
        self.refuse = False

    def send(self, topic, value, key, headers):
        if self.refuse:
            raise TransactionAborted("refused")
        self.sent.append((topic, key and key.decode()))

    def commit(self, _, offsets, records):
        self.committed |= {place.partition: place.offset for place in offsets}

    def abort(self):
        self.sent.append(("abort", None))


class Places:
    """Every partition begins at 0, or where it was committed."""

    def __init__(self, delivery):
        self.delivery = delivery

    def starts(self, partitions):
        return [TopicPartition("log-lines", number, self.delivery.committed.get(number, 0)) for number in partitions]


@pytest.fixture
def rekeyer():
    vocabulary = Vocabulary((event_id("start <BLOCK>"),))
    bundle = Bundle(Autoencoder(Shape(len(vocabulary), 6, 16, 2, 1, 16)).eval(), vocabulary, {}, LINES)
    made = Rekeyer(Settings(), bundle, Patience())
    made._consumer, made._delivery = Consumer(), Delivery()
    made._places = Places(made._delivery)
    made._on_assign(made._consumer, [TopicPartition("log-lines", number) for number in (0, 1)])
    made._consumer.calls.clear()
    return made


def turn(rekeyer, *messages):
    rekeyer._consumer.ready = list(messages)
    rekeyer._read(0.0)


def blocks(rekeyer):
    return [key for _, key in rekeyer._delivery.sent]


def test_the_offset_of_the_first_line_that_was_not_sent_is_committed(rekeyer):
    unreadable = "start blk_" + "1" * 2000
    turn(rekeyer, line(0, 0, 5), line(0, 1, 8), line(0, 2, 9, "no block"), line(0, 3, 9, unreadable), line(1, 0, 6))
    assert blocks(rekeyer) == ["blk_5", "blk_6"]
    rekeyer._commit()
    assert rekeyer._delivery.committed == {0: 1, 1: 1}
    assert rekeyer.counts == {"lines": 2, "events": 2, "unmatched_lines": 0}
    turn(rekeyer, end(1, 1))
    assert rekeyer._delivery.sent[2:] == [("log-events", "blk_8"), ("log-anomaly-dead-letters", None)]
    rekeyer._commit()
    assert rekeyer._delivery.committed == {0: 4, 1: 1}
    assert rekeyer.counts == {"lines": 5, "events": 3, "unmatched_lines": 0, "skipped_lines": 1}
    assert rekeyer.dead_letters == {"bad_id": 1}
    assert rekeyer._patience.uncommitted == 0


def test_what_is_pending_is_read_again_after_a_partition_was_given_back_or_a_transaction_aborted(rekeyer):
    turn(rekeyer, line(0, 0, 5), line(1, 0, 6), line(0, 1, 7))
    assert blocks(rekeyer) == ["blk_5", "blk_6"]
    rekeyer._on_revoke(rekeyer._consumer, [TopicPartition("log-lines", 0)])
    assert rekeyer._delivery.committed == {0: 1, 1: 1}
    turn(rekeyer, line(0, 2, 8), end(1, 1))
    assert blocks(rekeyer) == ["blk_5", "blk_6"], "of a partition that is another's"
    rekeyer._on_assign(rekeyer._consumer, [TopicPartition("log-lines", 0)])
    turn(rekeyer, line(0, 1, 7), line(0, 2, 8), end(0, 3))
    assert blocks(rekeyer)[2:] == ["blk_7", "blk_8"]

    rekeyer._delivery.refuse = True
    with pytest.raises(TransactionAborted):
        turn(rekeyer, line(1, 1, 9))
    rekeyer._delivery.refuse = False
    rekeyer._recover()
    assert rekeyer._consumer.calls[-2:] == [("incremental_unassign", [(0, 1)]), ("incremental_assign", [(0, 1)])]
    turn(rekeyer, line(1, 1, 9), end(1, 2), line(0, 1, 7), line(0, 2, 8), end(0, 3))
    assert blocks(rekeyer)[5:] == ["blk_7", "blk_8", "blk_9"], "all since the last commit, again"


def test_messages_that_were_read_before_a_rebalance_are_not_taken_for_those_after_what_was_pending(rekeyer):
    """Both callbacks and lines that went on from the pending ones come with one call."""
    turn(rekeyer, line(0, 0, 5), line(0, 1, 6))
    again = [TopicPartition("log-lines", 0)]
    turn(
        rekeyer,
        lambda: rekeyer._on_revoke(rekeyer._consumer, again),
        lambda: rekeyer._on_assign(rekeyer._consumer, again),
        line(0, 2, 7),
    )
    assert rekeyer._recovery_due
    rekeyer._recover()
    turn(rekeyer, line(0, 0, 5), line(0, 1, 6), line(0, 2, 7), end(0, 3), end(1, 0))
    assert rekeyer._delivery.sent == [("abort", None), *(("log-events", f"blk_{second}") for second in (5, 6, 7))]


def test_a_partition_that_is_silent_though_not_at_its_end_is_given_up_and_said_so_once(rekeyer, caplog):
    turn(rekeyer, line(0, 0, 5))
    for _ in range(20):
        rekeyer._give_up_on_silence(0.4)
    turn(rekeyer, line(0, 1, 6))
    assert blocks(rekeyer) == ["blk_5", "blk_6"]
    assert [record.message for record in caplog.records if "no line for 5 s" in record.message] == [
        "log-lines/1: no line for 5 s, though it is not at its end: the other partitions go on without it, and its "
        "lines will come out of their order"
    ]
    turn(rekeyer, line(1, 0, 3), end(0, 2))
    assert blocks(rekeyer)[2:] == ["blk_3"]
    for _ in range(20):
        turn(rekeyer, line(0, rekeyer._merge.unsent(0), 9), line(1, rekeyer._merge.unsent(1), 8))
        rekeyer._give_up_on_silence(0.4)
    assert len(caplog.records) == 1, "it delivers"


def test_a_partition_with_much_pending_is_paused_and_comes_back_unpaused(rekeyer, monkeypatch):
    monkeypatch.setattr("consumer.merge.LINES", 4)
    turn(rekeyer, *(line(0, offset, 9) for offset in range(5)))
    assert rekeyer._consumer.calls == [("pause", [(0, -1001)])]
    turn(rekeyer, line(1, 0, 10), end(1, 1))
    assert len(blocks(rekeyer)) == 5
    assert rekeyer._consumer.calls[1:] == [("resume", [(0, -1001)])]
    rekeyer._consumer.calls.clear()
    turn(rekeyer, line(1, 1, 11), *(line(0, offset, 12) for offset in range(5, 10)), line(1, 2, 11))
    assert rekeyer._consumer.calls == [("pause", [(0, -1001)])]
    rekeyer._on_lost(rekeyer._consumer, [TopicPartition("log-lines", 0)])
    assert rekeyer._consumer.calls[1:] == [("resume", [(0, -1001)]), ("incremental_unassign", [(0, -1001)])]
