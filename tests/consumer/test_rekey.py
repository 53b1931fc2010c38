"""The re-keyer between a consumer and a delivery that are made up: what it sends, commits, and waits for."""

import dataclasses
import subprocess

import pytest
from confluent_kafka import KafkaError, TopicPartition
from prometheus_client import generate_latest

from consumer.delivery import TransactionAborted
from consumer.patience import Patience
from consumer.reading import Reading
from consumer.rekey import Rekeyer
from consumer.settings import EventSettings, Settings
from model.bundle import Bundle
from model.lines import LineFormat, LineRules
from model.network import Autoencoder, Shape
from model.templates import event_id
from model.vocabulary import Vocabulary


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

    def send(self, topic, _, key, __):
        if self.refuse:
            raise TransactionAborted("refused")
        self.sent.append((topic, key and key.decode()))

    def commit(self, _, offsets, __):
        self.committed |= {place.partition: place.offset for place in offsets}

    def abort(self):
        self.sent.append(("abort", None))


class Places:
    """Every partition begins at 0, or where it was committed."""

    def __init__(self, delivery):
        self.delivery = delivery

    def starts(self, partitions):
        return [TopicPartition("log-lines", number, self.delivery.committed.get(number, 0)) for number in partitions]


def model(*templates):
    vocabulary = Vocabulary(tuple(map(event_id, templates)))
    lines = LineFormat(LineRules.of(EventSettings()), templates)
    return Bundle(Autoencoder(Shape(len(vocabulary), 6, 16, 2, 1, 16)).eval(), vocabulary, {}, lines)


@pytest.fixture
def rekeyer(tmp_path, monkeypatch):
    monkeypatch.setattr("consumer.reading._SETTLED_SECONDS", 0.0)  # what these consumers hand out is all there is
    model("start <BLOCK>").save(tmp_path / "model")
    artifacts = {"model": {"path": tmp_path / "model"}, "calibration": {"path": tmp_path / "threshold.json"}}
    made = Rekeyer(Settings.model_validate(artifacts), Patience())
    made._consumer, made._delivery = Consumer(), Delivery()
    made._reading = Reading("log-lines", made._consumer, made._merge)
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
    assert rekeyer.status().counts == {"lines": 2, "events": 2, "unmatched_lines": 0, "skipped_lines": 0}
    turn(rekeyer, end(1, 1))
    assert rekeyer._delivery.sent[2:] == [("log-events", "blk_8"), ("log-anomaly-dead-letters", None)]
    rekeyer._commit()
    assert rekeyer._delivery.committed == {0: 4, 1: 1}
    assert rekeyer.status().counts == {"lines": 5, "events": 3, "unmatched_lines": 0, "skipped_lines": 1}
    assert rekeyer.status().dead_letters == {"bad_id": 1}
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
        rekeyer._reading._give_up_on_silence(0.4)
    turn(rekeyer, line(0, 1, 6))
    assert blocks(rekeyer) == ["blk_5", "blk_6"]
    (said,) = caplog.messages
    assert said.startswith("log-lines/1: no line for 5 s, though it is not at its end: the other partitions go on")
    turn(rekeyer, line(1, 0, 3), end(0, 2))
    assert blocks(rekeyer)[2:] == ["blk_3"]
    for _ in range(20):
        turn(rekeyer, line(0, rekeyer._merge.unsent(0), 9), line(1, rekeyer._merge.unsent(1), 8))
        rekeyer._reading._give_up_on_silence(0.4)
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


def test_a_new_model_is_taken_once_its_threshold_is_there_and_what_is_pending_is_cut_by_it(
    rekeyer, tmp_path, make_threshold, caplog
):
    caplog.set_level("INFO")
    threshold = tmp_path / "threshold.json"

    def look():
        for _ in range(3):
            rekeyer._reload()
        return rekeyer.status().reloads

    dataclasses.replace(make_threshold(1.0), model=rekeyer._watcher.in_use.fingerprint).save(threshold)
    assert look() == {}, "a threshold is nothing to it"
    turn(rekeyer, line(0, 0, 5, "stop blk_{}"), line(0, 1, 7, "stop blk_{}"), line(1, 0, 6, "stop blk_{}"))
    new = model("start <BLOCK>", "stop <BLOCK>")
    new.save(tmp_path / "model")
    assert look() == {"waiting": 1}
    (tmp_path / "model" / "model.json").write_text("{}")
    assert look() == {"waiting": 1, "refused": 1}
    new.save(tmp_path / "model")
    dataclasses.replace(make_threshold(1.0), model=new.fingerprint).save(threshold)
    assert look() == {"waiting": 1, "refused": 1, "taken": 1}
    assert rekeyer._delivery.committed == {0: 1, 1: 1}
    rekeyer._recover()
    turn(rekeyer, line(0, 1, 7, "stop blk_{}"), end(0, 2), end(1, 1))
    status = rekeyer.status()
    assert status.model == new.fingerprint
    assert status.counts["lines"] == 3
    assert status.counts["unmatched_lines"] == 2
    assert [text for text in caplog.messages if "model" in text][-1] == f"now model {new.fingerprint[:12]}"


def test_without_a_threshold_a_new_model_is_taken_at_once(rekeyer, tmp_path):
    model("stop <BLOCK>").save(tmp_path / "model")
    for _ in range(2):
        rekeyer._reload()
    assert rekeyer.status().reloads == {"taken": 1}


def test_what_is_scraped_is_the_last_status(rekeyer, prometheus):
    turn(rekeyer, line(0, 0, 5), line(0, 1, 8), line(1, 0, 6, "no block"), line(1, 1, 6, "stop blk_{}"), Message(1, 2))
    rekeyer._commit()
    rekeyer._metrics.status = rekeyer.status()
    scraped = generate_latest(rekeyer._metrics.registry).decode()
    lint = subprocess.run(
        [prometheus / "promtool", "check", "metrics"], input=scraped, capture_output=True, text=True, check=False
    )
    assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")
    found = dict(text.rsplit(" ", 1) for text in scraped.splitlines() if not text.startswith("#"))
    for name, value in {
        "lines_total": 4, "events_total": 2, "unmatched_lines_total": 1, "skipped_lines_total": 1,
        'dead_letters_total{reason="bad_tombstone"}': 1, 'reloads_total{outcome="taken"}': 0, "ready": 1,
        'pending_lines{partition="0"}': 1, 'pending_lines{partition="1"}': 0, "commit_seconds_count": 1,
        f'artifacts_info{{model="{rekeyer._watcher.in_use.fingerprint}"}}': 1,
    }.items():  # fmt: skip
        assert float(found[f"log_anomaly_rekey_{name}"]) == value, name
    assert 'log_anomaly_rekey_lag_messages{partition="0"}' not in found, "what is not known is not made up"
    assert str(rekeyer.status()) == "4 lines, 1 of them of no template, 1 without a block; 2 events, 1 dead letters"
