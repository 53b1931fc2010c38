"""The re-keyer between a consumer and a delivery that are made up: what it sends, commits, and waits for."""

import dataclasses
import subprocess
from contextlib import nullcontext

import pytest
from confluent_kafka import KafkaError, TopicPartition
from prometheus_client import generate_latest

from consumer.delivery import TransactionAborted
from consumer.patience import Patience
from consumer.places import Place
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
    """Hands over what the script of a test yields; the group's callbacks are called in between, as in life."""

    def __init__(self, delivery):
        self.calls, self.owned, self._delivery = [], set(), delivery

    def subscribe(self, _, *, on_assign, on_revoke, on_lost):
        self._callbacks = {"assign": on_assign, "revoke": on_revoke, "lose": on_lost}

    def rebalance(self, what, *numbers):
        self._callbacks[what](self, [TopicPartition("log-lines", number) for number in numbers])

    def play(self, script, patience):
        self._script, self._patience = script, patience

    def consume(self, _, __):
        messages = next(self._script, None)
        self._patience.stop_asked = messages is None
        return messages or []

    def get_watermark_offsets(self, _, cached):
        assert cached
        return -1001, -1001

    def incremental_assign(self, places):
        self._note("incremental_assign", places)
        self.owned |= {place.partition for place in places}

    def incremental_unassign(self, places):
        self._note("incremental_unassign", places)
        self.owned -= {place.partition for place in places}

    def pause(self, places):
        self._note("pause", places)

    def resume(self, places):
        self._note("resume", places)

    def close(self):
        self.rebalance("revoke", *self.owned)

    def _note(self, what, places):
        self.calls.append((what, [(place.partition, place.offset) for place in places]))


class Delivery:
    def __init__(self):
        self.sent = []
        self.committed = {}
        self.refuse = False

    def send(self, topic, _, key, __):
        if self.refuse:
            self.refuse = False
            raise TransactionAborted("refused")
        self.sent.append((topic, key and key.decode(errors="replace")))

    def poll(self):
        pass

    def commit(self, _, offsets, __):
        self.committed |= {place.partition: place.offset for place in offsets}

    def abort(self):
        self.sent.append(("abort", None))

    def close(self):
        pass

    @property
    def blocks(self):
        return [key for _, key in self.sent]


class Places:
    """Every partition begins at 0, or where it was committed."""

    def __init__(self, delivery):
        self.delivery = delivery

    def starts(self, partitions):
        committed = self.delivery.committed
        return [Place(number, committed.get(number, 0), number not in committed) for number in partitions]


class Patient(Patience):
    """Patience that ends when told to."""

    stop_asked = False


class Clock:
    """Time that passes when told to: after two seconds a commit is due, and a look for a new model."""

    now = 1000.0

    def monotonic(self):
        return self.now

    def pass_by(self):
        self.now += 2


def model(*templates):
    vocabulary = Vocabulary(tuple(map(event_id, templates)))
    lines = LineFormat(LineRules.of(EventSettings()), templates)
    return Bundle(Autoencoder(Shape(len(vocabulary), 6, 16, 2, 1, 16)).eval(), vocabulary, {}, lines)


@pytest.fixture
def delivery(monkeypatch):
    made = Delivery()
    monkeypatch.setattr("consumer.rekey.delivery_for", lambda *_: made)
    monkeypatch.setattr("consumer.rekey.Places", lambda *_: Places(made))
    return made


@pytest.fixture
def consumer(delivery, monkeypatch):
    made = Consumer(delivery)
    monkeypatch.setattr("consumer.rekey.lines_consumer", lambda *_: made)
    return made


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def rekeyer(consumer, clock, tmp_path, monkeypatch):
    monkeypatch.setattr("consumer.rekey.time", clock)
    monkeypatch.setattr("consumer.reading._SETTLED_SECONDS", 0.0)  # what these consumers hand out is all there is
    model("start <BLOCK>").save(tmp_path / "model")
    settings = {
        "model": {"path": tmp_path / "model"},
        "calibration": {"path": tmp_path / "threshold.json"},
        "reload": {"interval": "1s"},
    }
    patience = Patient()
    made = Rekeyer(Settings.model_validate(settings), patience)

    def play(script):
        """Run it: it owns two partitions, and reads what the script yields, turn by turn."""

        def all_of_it():
            consumer.rebalance("assign", 0, 1)
            consumer.calls.clear()
            yield from script

        consumer.play(all_of_it(), patience)
        made.run()

    made.play = play
    return made


def test_the_offset_of_the_first_line_that_was_not_sent_is_committed(rekeyer, delivery, clock):
    def script():
        unreadable = "start blk_" + "1" * 2000
        clock.pass_by()
        yield line(0, 0, 5), line(0, 1, 8), line(0, 2, 9, "no block"), line(0, 3, 9, unreadable), line(1, 0, 6)
        assert delivery.blocks == ["blk_5", "blk_6"]
        assert delivery.committed == {0: 1, 1: 1}
        assert rekeyer.status().counts == {"lines": 2, "events": 2, "unmatched_lines": 0, "skipped_lines": 0}
        clock.pass_by()
        yield (end(1, 1),)
        assert delivery.sent[2:] == [("log-events", "blk_8"), ("log-anomaly-dead-letters", None)]
        assert delivery.committed == {0: 4, 1: 1}

    rekeyer.play(script())
    assert rekeyer.status().counts == {"lines": 5, "events": 3, "unmatched_lines": 0, "skipped_lines": 1}
    assert rekeyer.status().dead_letters == {"bad_id": 1}


def test_where_a_group_without_offsets_begins_is_committed_before_a_line_is_sent(rekeyer, delivery, clock):
    """With auto.offset.reset: latest, whoever comes after a crash would begin behind all that came meanwhile."""

    def script():
        clock.pass_by()
        yield (line(0, 0, 5), line(0, 1, 5))
        assert delivery.blocks == []
        assert delivery.committed == {0: 0, 1: 0}

    rekeyer.play(script())


def test_all_that_may_go_at_once_goes_with_several_commits(rekeyer, delivery, clock, monkeypatch):
    """One transaction for all of it might take longer than it may last."""
    monkeypatch.setattr("consumer.rekey._PER_COMMIT", 2)
    commits, commit = [], delivery.commit

    def noted(consumer, offsets, records):
        commits.append((len(delivery.sent), offsets[0].offset))
        commit(consumer, offsets, records)

    monkeypatch.setattr(delivery, "commit", noted)

    def script():
        clock.pass_by()
        yield [*(line(0, offset, 5, "start blk_{} blk_2") for offset in range(5)), end(0, 5), end(1, 0)]

    rekeyer.play(script())
    assert commits == [(4, 2), (8, 4), (10, 5)]


def test_a_tombstone_whose_key_is_no_block_id_is_a_dead_letter(rekeyer, delivery, clock):
    """No producer would take the largest of them: each owner of the partition would stop there in turn."""

    def script():
        clock.pass_by()
        keys = (b"blk_1", b"k" * 1_040_000, b"caf\xe9", b"", None)
        yield [*(Message(0, offset, key=key) for offset, key in enumerate(keys)), end(0, 5), end(1, 0)]

    rekeyer.play(script())
    assert delivery.sent[0] == ("log-events", "blk_1")
    assert [topic for topic, _ in delivery.sent[1:]] == ["log-anomaly-dead-letters"] * 4
    assert rekeyer.status().dead_letters == {"bad_id": 2, "bad_tombstone": 2}


def test_what_is_pending_is_read_again_after_a_partition_was_given_back_or_a_transaction_aborted(
    rekeyer, consumer, delivery
):
    def script():
        yield line(0, 0, 5), line(1, 0, 6), line(0, 1, 7)
        assert delivery.blocks == ["blk_5", "blk_6"]
        consumer.rebalance("revoke", 0)
        assert delivery.committed == {0: 1, 1: 1}
        yield line(0, 2, 8), end(1, 1)
        assert delivery.blocks == ["blk_5", "blk_6"], "of a partition that is another's"
        consumer.rebalance("assign", 0)
        yield line(0, 1, 7), line(0, 2, 8), end(0, 3)
        assert delivery.blocks[2:] == ["blk_7", "blk_8"]

        delivery.refuse = True
        yield (line(1, 1, 9),)
        assert consumer.calls[-2:] == [("incremental_unassign", [(0, 1)]), ("incremental_assign", [(0, 1)])]
        yield line(1, 1, 9), end(1, 2), line(0, 1, 7), line(0, 2, 8), end(0, 3)
        assert delivery.blocks[4:] == [None, "blk_7", "blk_8", "blk_9"], "all since the last commit, again"

    rekeyer.play(script())
    assert delivery.committed == {0: 3, 1: 2}


def test_messages_that_were_read_before_a_rebalance_are_not_taken_for_those_after_what_was_pending(
    rekeyer, consumer, delivery
):
    """Both callbacks and lines that went on from the pending ones come with one call."""

    def script():
        yield line(0, 0, 5), line(0, 1, 6)
        consumer.rebalance("revoke", 0)
        consumer.rebalance("assign", 0)
        yield (line(0, 2, 7),)
        yield line(0, 0, 5), line(0, 1, 6), line(0, 2, 7), end(0, 3), end(1, 0)
        assert delivery.sent == [("abort", None), *(("log-events", f"blk_{second}") for second in (5, 6, 7))]

    rekeyer.play(script())


def test_a_partition_that_is_silent_though_not_at_its_end_is_given_up_and_said_so_once(
    rekeyer, delivery, caplog, monkeypatch
):
    wall = Clock()  # each turn takes two seconds, of which a read waits no longer than it is told
    monkeypatch.setattr("consumer.reading.time", wall)

    def lasting(messages):
        wall.pass_by()
        return messages

    def script():
        yield lasting((line(0, 0, 5),))
        offset = 1
        while not delivery.blocks and offset < 1000:
            yield lasting((line(0, offset, 5),))
            offset += 1
        (said,) = caplog.messages
        assert said.startswith("log-lines/1: no line for 5 s, though it is not at its end: the other partitions go on")
        waited = offset
        yield lasting((line(1, 0, 3), end(0, offset)))
        assert delivery.blocks == ["blk_5"] * waited + ["blk_3"]
        for _ in range(2 * waited):
            yield lasting((line(0, offset, 9), line(1, offset - waited + 1, 8)))
            offset += 1
        assert len(caplog.records) == 1, "it delivers"

    rekeyer.play(script())


def test_a_partition_with_much_pending_is_paused_and_comes_back_unpaused(rekeyer, consumer, delivery, monkeypatch):
    monkeypatch.setattr("consumer.merge.LINES", 4)

    def script():
        yield [line(0, offset, 9) for offset in range(5)]
        assert consumer.calls == [("pause", [(0, -1001)])]
        yield line(1, 0, 10), end(1, 1)
        assert len(delivery.blocks) == 5
        assert consumer.calls[1:] == [("resume", [(0, -1001)])]
        consumer.calls.clear()
        yield line(1, 1, 11), *(line(0, offset, 12) for offset in range(5, 10)), line(1, 2, 11)
        assert consumer.calls == [("pause", [(0, -1001)])]
        consumer.rebalance("lose", 0)
        assert consumer.calls[1:] == [("resume", [(0, -1001)]), ("incremental_unassign", [(0, -1001)])]
        yield ()

    rekeyer.play(script())


def test_a_new_model_is_taken_once_its_threshold_is_there_and_what_is_pending_is_cut_by_it(
    rekeyer, delivery, clock, tmp_path, make_threshold, caplog
):
    caplog.set_level("INFO")
    threshold = tmp_path / "threshold.json"

    def looks():
        for _ in range(3):
            clock.pass_by()
            yield ()

    def script():
        in_use = rekeyer.status().model
        dataclasses.replace(make_threshold(1.0), model=in_use).save(threshold)
        yield from looks()
        assert rekeyer.status().reloads == {}, "a threshold is nothing to it"
        yield line(0, 0, 5, "stop blk_{}"), line(0, 1, 7, "stop blk_{}"), line(1, 0, 6, "stop blk_{}")
        new = model("start <BLOCK>", "stop <BLOCK>")
        new.save(tmp_path / "model")
        yield from looks()
        assert rekeyer.status().reloads == {"waiting": 1}
        (tmp_path / "model" / "model.json").write_text("{}")
        yield from looks()
        assert rekeyer.status().reloads == {"waiting": 1, "refused": 1}
        new.save(tmp_path / "model")
        dataclasses.replace(make_threshold(1.0), model=new.fingerprint).save(threshold)
        yield from looks()
        assert rekeyer.status().reloads == {"waiting": 1, "refused": 1, "taken": 1}
        assert delivery.committed == {0: 1, 1: 1}
        yield line(0, 1, 7, "stop blk_{}"), end(0, 2), end(1, 1)
        status = rekeyer.status()
        assert status.model == new.fingerprint
        assert status.counts["lines"] == 3
        assert status.counts["unmatched_lines"] == 2
        assert [text for text in caplog.messages if "model" in text][-1] == f"now model {new.fingerprint[:12]}"

    rekeyer.play(script())


def test_without_a_threshold_a_new_model_is_taken_at_once(rekeyer, clock, tmp_path):
    def script():
        model("stop <BLOCK>").save(tmp_path / "model")
        for _ in range(2):
            clock.pass_by()
            yield ()

    rekeyer.play(script())
    assert rekeyer.status().reloads == {"taken": 1}


def test_what_is_scraped_is_the_last_status(rekeyer, clock, prometheus, monkeypatch):
    seen = {}

    def serving(metrics, *_):
        seen["metrics"] = metrics
        return nullcontext()

    monkeypatch.setattr("consumer.rekey.serving", serving)

    def script():
        clock.pass_by()
        yield line(0, 0, 5), line(0, 1, 8), line(1, 0, 6, "no block"), line(1, 1, 6, "stop blk_{}"), Message(1, 2)
        seen["scraped"] = generate_latest(seen["metrics"].registry).decode()
        seen["model"] = rekeyer.status().model
        assert str(rekeyer.status()) == "4 lines, 1 of them of no template, 1 without a block; 2 events, 1 dead letters"

    rekeyer.play(script())
    scraped = seen["scraped"]
    lint = subprocess.run(
        [prometheus / "promtool", "check", "metrics"], input=scraped, capture_output=True, text=True, check=False
    )
    assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")
    found = dict(text.rsplit(" ", 1) for text in scraped.splitlines() if not text.startswith("#"))
    for name, value in {
        "lines_total": 4, "events_total": 2, "unmatched_lines_total": 1, "skipped_lines_total": 1,
        'dead_letters_total{reason="bad_tombstone"}': 1, 'reloads_total{outcome="taken"}': 0, "ready": 1,
        'pending_lines{partition="0"}': 1, 'pending_lines{partition="1"}': 0, "commit_seconds_count": 1,
        f'artifacts_info{{model="{seen["model"]}"}}': 1,
    }.items():  # fmt: skip
        assert float(found[f"log_anomaly_rekey_{name}"]) == value, name
    assert 'log_anomaly_rekey_lag_messages{partition="0"}' not in found, "what is not known is not made up"
