"""Killed anywhere, a detector restored from the state topic goes on as if nothing had happened. No Kafka: a
dictionary is the compacted topic, and a crash is forgetting everything else."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consumer import checkpoint
from consumer.checkpoint import Checkpointer, recover
from consumer.detector import Detector
from consumer.events import TOMBSTONE, EventBatch
from consumer.records import (
    BLOCK,
    DRIFT,
    Bounds,
    Checkpoint,
    DamagedRecordError,
    DriftState,
    SessionState,
    closed_marker,
)
from consumer.settings import DriftSettings
from model.vocabulary import UNK, Vocabulary

PARTITION, GROUP, TOPIC = 0, "group", "log-events"
TOUCHY = DriftSettings(failing_share=0, batch=3, false_alarm_every=100)


def batch_of(vocabulary, events, begin, end):
    """A block id with spaces stands for a line that names several blocks, as the decoder orders them."""
    some = [(block, *event, offset) for offset, (blocks, *event) in enumerate(events[begin:end], begin)
            for block in sorted(blocks.split())]  # fmt: skip
    tokens = [TOMBSTONE if name is None else vocabulary.tokens.get(name, UNK) for _, name, _, _ in some]
    unknown = {place: name for place, (_, name, _, _) in enumerate(some) if tokens[place] == UNK}
    blocks, _, times, offsets = zip(*some, strict=True) if some else ((),) * 4
    return EventBatch.of(blocks, tokens, times, offsets, unknown)


class Machine:
    """A consumer of one partition: `topic` and `committed` survive a crash, everything else does not."""

    def __init__(self, scorer, threshold, events, limit):
        self.scorer, self.threshold, self.events, self.limit = scorer, threshold, events, limit
        self.topic, self.committed, self.published = {}, 0, []
        self.boot()

    def boot(self):
        vocabulary = self.scorer.bundle.vocabulary
        found = recover(dict(self.topic), vocabulary)
        self.detector = Detector(
            self.scorer, self.threshold, topic="logs", cache_windows=1000, max_open_blocks=self.limit, drift=TOUCHY
        )
        start, watermark = (found.checkpoint.offset, found.checkpoint.watermark) if found.checkpoint else (0, None)
        self.detector.assign(
            PARTITION,
            found.sessions,
            watermark,
            start,
            drift=found.drift,
            since=max(self.committed, start),
            bounds=found.checkpoint.bounds if found.checkpoint else None,
        )
        for offset in range(start, self.committed):  # one by one: cuts must not matter here either
            self.detector.replay(PARTITION, batch_of(vocabulary, self.events, offset, offset + 1))
        if self.committed >= found.end:
            self.detector.store(PARTITION).end_replay()
        self.checkpointer = Checkpointer(self.detector, PARTITION, GROUP, TOPIC, found, start)
        self.position, self.pending = self.committed, []

    def read(self, count, portions=10**6):
        """As the service: an event that ends many sessions waits until these are closed, some with each commit.

        It is killed after so many `portions` of them.
        """
        vocabulary, end = self.scorer.bundle.vocabulary, min(len(self.events), self.position + count)
        while self.position < end:
            batch, store = batch_of(vocabulary, self.events, self.position, end), self.detector.store(PARTITION)
            row = store.flood(batch, checkpoint.PER_COMMIT)
            until = end if row is None else int(batch.offsets[row])
            self.pending += self.detector.process({PARTITION: batch_of(vocabulary, self.events, self.position, until)})
            self.position = until
            if row is not None:
                self.commit()
                self.pending += self.detector.close_ending(PARTITION, int(batch.times[row]), checkpoint.PER_COMMIT)
                self.commit()
                portions -= 1
                if not portions:
                    return self.boot()
        return None

    def silence(self):
        self.pending += self.detector.close(PARTITION)

    def hand_over(self):
        """Commit until a checkpoint is whole that was begun now."""
        for begin in (False, True):
            if begin:
                self.commit(begin=True)
            while self.checkpointer.is_under_way:
                self.commit()

    def commit(self, begin=False):
        for key, value in self.checkpointer.records(self.position, begin=begin):
            if value is None:
                self.topic.pop(key, None)
            else:
                self.topic[key] = value
        self.published += [alert.encode() for alert in self.pending]
        self.committed, self.pending = self.position, []


event = st.tuples(
    st.one_of(st.sampled_from("VWXYZ"), st.lists(st.sampled_from("VWXYZ"), min_size=2, unique=True).map(" ".join)),
    st.sampled_from(["a", "b", "c", "d", "never seen", None]),
    st.integers(0, 40),
)
action = st.one_of(
    st.tuples(st.just("read"), st.integers(1, 12)),
    st.tuples(st.just("read"), st.integers(1, 12), st.integers(1, 4)),
    st.sampled_from([("commit",), ("checkpoint",), ("hand over",), ("crash",), ("crash",), ("silence",)]),
)


def check(scorer, threshold, events, actions, room, per_commit):
    """Oracle: the same machine that is never killed. Silence closes all in both, at the same committed offset."""
    checkpoint.PER_COMMIT, before = per_commit, checkpoint.PER_COMMIT
    try:
        machine, silences = Machine(scorer, threshold, events, room), []
        for what, *count in [*actions, ("crash",), ("read", len(events)), ("commit",)]:
            if what == "read":
                machine.read(*count)
            elif what == "crash":
                machine.boot()
            elif what == "silence":
                machine.commit()
                machine.silence()
                machine.commit()
                silences.append(machine.position)
            elif what == "hand over":
                machine.hand_over()
            else:
                machine.commit(begin=what == "checkpoint")
    finally:
        checkpoint.PER_COMMIT = before
    calm = Machine(scorer, threshold, events, room)
    for position in silences:
        calm.read(position - calm.position)
        calm.silence()
    calm.read(len(events))
    calm.commit()
    assert by_block(machine.published) == by_block(calm.published)
    assert machine.topic[DRIFT] == calm.topic[DRIFT]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(event, min_size=1, max_size=80),
    st.lists(action, max_size=60),
    st.floats(0.5, 4),
    st.sampled_from([2, 3, 2**31 - 1]),
    st.sampled_from([1, 20_000]),
)
def test_a_crash_anywhere_changes_nothing(quick_scorer, make_threshold, events, actions, limit, room, per_commit):
    check(quick_scorer, make_threshold(limit, idle_timeout_ms=15), events, actions, room, per_commit)


@pytest.mark.parametrize("network", ["quick_scorer", "varied_scorer"])
@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([2, 3, 2**31 - 1]), st.sampled_from([1, 20_000]))
def test_many_crashes_in_a_long_history_change_nothing(request, make_threshold, network, random, room, per_commit):
    names, time, events = ["a", "a", "b", "c", "d", "never seen", None], 0, []
    for _ in range(random.choice([30, 120])):
        time += random.choice([0, 1, 2, 20])
        blocks = random.sample("VWXYZ", random.choice([1, 1, 2, 3]))
        events.append((" ".join(blocks), random.choice(names), time - random.choice([0, 0, 5])))
    actions = []
    for _ in range(random.choice([10, 60])):
        kinds = ["commit", "commit", "checkpoint", "hand over", "crash", "silence"]
        actions += [
            ("read", random.randint(1, 8), random.choice([1, 2, 10**6])),
            (random.choice(kinds),),
            (random.choice(kinds),),
        ]
    threshold = make_threshold(random.choice([1.0, 1.4, 2.5, 4.0, 7.3, 12.0]), idle_timeout_ms=15)
    check(request.getfixturevalue(network), threshold, events, actions, room, per_commit)


def by_block(published):
    blocks = {}
    for value in published:
        blocks.setdefault(json.loads(value)["block_id"], []).append(value)
    return blocks


def test_the_property_fails_when_state_records_are_skipped(scorer, make_threshold, monkeypatch):
    """A check of the check: a session that is marked as saved without a record is missed after a crash."""
    events = [("X", "a", 0), ("X", "b", 1), ("X", "never seen", 2)]
    monkeypatch.setattr(Checkpointer, "_sessions", lambda self, slots: self._store.mark_saved(slots) or [])
    machine = Machine(scorer, make_threshold(0.5), events, 100)
    machine.read(2)
    machine.hand_over()
    machine.boot()
    machine.read(1)
    machine.commit()
    calm = Machine(scorer, make_threshold(0.5), events, 100)
    calm.read(3)
    calm.commit()
    assert machine.published != calm.published


def test_after_a_handover_nothing_is_replayed(scorer, make_threshold):
    machine = Machine(scorer, make_threshold(0.5), [("X", "a", 0), ("Y", "a", 1), ("X", "b", 2)], 100)
    machine.read(3)
    machine.hand_over()
    assert recover(machine.topic, scorer.bundle.vocabulary).checkpoint == Checkpoint(
        3, 2, GROUP, topic=TOPIC, bounds=Bounds(1000, 100)
    )


def test_a_handover_writes_no_more_with_one_commit_than_any_other(scorer, make_threshold, monkeypatch):
    """Else a million blocks would have to fit into the transaction that a rebalance ends with."""
    monkeypatch.setattr(checkpoint, "PER_COMMIT", 3)
    events = [(f"b{number}", "a", 0) for number in range(10)] + [(f"b{number}", None, 0) for number in range(5)]
    machine = Machine(scorer, make_threshold(100.0), events, 100)
    machine.read(10)
    machine.commit(begin=True)  # three of ten
    machine.read(5)
    sizes, commit = [], machine.commit

    def measured(begin=False):
        before = dict(machine.topic)
        commit(begin)
        written = [key for key, value in machine.topic.items() if key[:1] == BLOCK and before.get(key) != value]
        sizes.append(max(len(written), len(before.keys() - machine.topic.keys())))

    monkeypatch.setattr(machine, "commit", measured)
    machine.hand_over()
    assert max(sizes) == 3
    found = recover(machine.topic, scorer.bundle.vocabulary)
    assert found.checkpoint.offset == 15
    assert sorted(found.sessions.states()) == [f"b{number}" for number in range(5, 10)]


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("stricter", [{"idle": 100}, {"limit": 1}], ids=["idle timeout", "max_open_blocks"])
def test_bounds_that_are_narrower_after_a_crash_close_nothing_in_silence(scorer, make_threshold, killed, stricter):
    """What a predecessor left open is open at the end of the replay; then today's bounds close it, and say so."""
    events = [("X", "a", 0), ("Y", "a", 1), ("Z", "a", 300), ("W", "a", 600), ("W", None, 600)]
    machine = Machine(scorer, make_threshold(0.0, idle_timeout_ms=1000, every=100), events, 100)
    machine.read(3)
    machine.commit()
    if not killed:
        machine.hand_over()
    machine.threshold = make_threshold(0.0, idle_timeout_ms=stricter.get("idle", 1000), every=100)
    machine.limit = stricter.get("limit", 100)
    machine.boot()
    assert machine.detector.open_blocks == 3
    machine.read(2)
    machine.commit()
    closed = {json.loads(alert)["block_id"] for alert in machine.published}
    assert closed == ({"X", "Y", "Z", "W"} if "idle" in stricter else {"X", "W"})


def test_closed_sessions_leave_no_records(scorer, make_threshold):
    events = [(f"b{number % 7}", "a", number * 100) for number in range(50)] + [("last", "a", 10**6)]
    machine = Machine(scorer, make_threshold(0.5, idle_timeout_ms=300), events, 3)
    for _ in range(len(events)):
        machine.read(1)
        machine.commit(begin=True)
    machine.hand_over()
    assert [key for key in machine.topic if key[:1] == BLOCK] == [b"Blast"]


def test_windows_outlive_a_change_of_vocabulary(scorer, make_threshold):
    events = [("X", "a", 0), ("X", "never seen", 1), ("X", "b", 2)]
    machine = Machine(scorer, make_threshold(100.0), events, 100)
    machine.read(3)
    machine.hand_over()
    other = Vocabulary(("b", "never seen", "z"))
    state = recover(machine.topic, other).sessions.states()["X"]
    assert [other.name(token) for token in state.tokens.tolist()] == ["<UNK>", "never seen", "b"]
    assert state.unknown == {0: "a"}


sessions = st.integers(0, 60).flatmap(
    lambda length: st.builds(
        SessionState,
        count=st.integers(1, 2**40),
        seen=st.integers(-(2**40), 2**45),
        first_offset=st.integers(0, 2**40),
        first_time=st.integers(0, 2**42),
        last_offset=st.integers(2**41, 2**42),
        last_time=st.integers(0, 2**42),
        tokens=st.lists(st.integers(0, 65535), min_size=length, max_size=length).map(
            lambda items: np.array(items, np.uint16)
        ),
        offsets=st.lists(st.integers(0, 2**41), min_size=length, max_size=length).map(
            lambda items: np.array(items, np.int64)
        ),
        times=st.lists(st.integers(-(2**40), 2**42), min_size=length, max_size=length).map(
            lambda items: np.array(items, np.int64)
        ),
        unknown=st.dictionaries(st.integers(0, 2**40), st.text(max_size=5), max_size=3),
        revision=st.integers(0, 2**31),
        score=st.floats(0, 100),
        position=st.integers(0, 2**40),
        level=st.integers(0, 255),
    )
)


@given(sessions, st.binary(min_size=8, max_size=8))
def test_a_record_reads_back_as_it_was(state, vocabulary):
    again, written_in = SessionState.unpack(state.pack(vocabulary))
    assert written_in == vocabulary
    for name, value in vars(state).items():
        assert np.array_equal(getattr(again, name), value), name


def test_a_typical_record_is_small():
    offsets = np.arange(20) * 1000
    tokens = np.full(20, 5, np.uint16)
    assert len(SessionState(20, 0, 0, 0, 19_000, 0, tokens, offsets, offsets).pack(b"12345678")) < 300


@given(st.binary(max_size=200))
def test_what_is_no_record_is_refused(record):
    for read in (SessionState.unpack, Checkpoint.unpack, DriftState.unpack):
        with pytest.raises(DamagedRecordError):
            read(b"\x63" + record)


def test_markers_cover_what_was_closed_from_outside(scorer):
    found = recover({b"BX": closed_marker(17).pack(b"12345678")}, scorer.bundle.vocabulary)
    assert found.sessions.markers == {b"X": 17}
    assert len(found.sessions) == 0
    assert found.end == 18


def test_deletions_are_spread_over_commits_and_a_checkpoint_waits_for_them(scorer, make_threshold, monkeypatch):
    """Else all that a batch of tombstones closes would have to fit into one transaction."""
    monkeypatch.setattr(checkpoint, "PER_COMMIT", 3)
    events = [(f"b{number}", name, 0) for name in ("a", None) for number in range(10)]
    machine = Machine(scorer, make_threshold(100.0, idle_timeout_ms=300), events, 100)
    machine.read(10)
    machine.hand_over()
    assert len([key for key in machine.topic if key[:1] == BLOCK]) == 10
    machine.read(10)  # closes them all
    left, complete = [], []
    for _ in range(5):
        machine.commit(begin=True)
        left.append(len([key for key in machine.topic if key[:1] == BLOCK]))
        complete.append(recover(machine.topic, scorer.bundle.vocabulary).checkpoint.offset == 20)
    assert left == [7, 4, 1, 0, 0]
    assert complete == [False, False, False, True, True]


def test_a_checkpoint_does_not_wait_for_a_deletion_that_a_new_session_made_needless(
    scorer, make_threshold, monkeypatch
):
    monkeypatch.setattr(checkpoint, "PER_COMMIT", 1)
    events = [(name, "a", 0) for name in "XYZ"] + [(name, None, 0) for name in "XYZ"] + [("Z", "never seen", 0)]
    machine = Machine(scorer, make_threshold(0.5), events, 100)
    machine.read(3)
    machine.hand_over()
    machine.read(3)
    machine.commit(begin=True)  # deletes X only
    machine.read(1)
    machine.commit()  # deletes Y, and writes Z, which has alerted, anew
    machine.commit()
    found = recover(machine.topic, scorer.bundle.vocabulary)
    assert found.checkpoint.offset == 6
    assert list(found.sessions.states()) == ["Z"]


def test_markers_that_are_outdated_all_at_once_are_deleted_over_commits(scorer, make_threshold, monkeypatch):
    """Else a flood of new ids would have to fit into the transaction that ends the next checkpoint."""
    monkeypatch.setattr(checkpoint, "PER_COMMIT", 3)
    events = [(f"b{number}", "a", 0) for number in range(12)] + [("b9", "never seen", 0), ("b9", "a", 0)]
    machine = Machine(scorer, make_threshold(0.5), events, 2)

    def markers():
        return len(recover(machine.topic, scorer.bundle.vocabulary).sessions.markers)

    machine.read(12)
    machine.commit()
    left, complete = [markers()], []
    for _ in range(3):
        machine.commit(begin=True)
        left.append(markers())
        complete.append(recover(machine.topic, scorer.bundle.vocabulary).checkpoint.offset)
    machine.read(2)  # b9, whose marker is the last one, opens anew
    machine.commit()
    assert left == [10, 10, 7, 4]
    assert complete == [12, 12, 12]
    machine.commit()
    found = recover(machine.topic, scorer.bundle.vocabulary)
    assert list(found.sessions.markers) == [b"b10"]
    assert sorted(found.sessions.states()) == ["b11", "b9"]
