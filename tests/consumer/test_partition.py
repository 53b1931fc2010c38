"""What a process knows of a partition that it owns, step by step."""

from types import SimpleNamespace

import numpy as np
import pytest

from consumer.checkpoint import Replay, recover
from consumer.detector import Detector
from consumer.events import EventBatch
from consumer.partition import Partition
from consumer.records import BLOCK, CHECKPOINT, DRIFT
from consumer.restore import Start
from consumer.settings import Settings

NUMBER = 3


@pytest.fixture
def detector(quick_scorer, make_threshold):
    return Detector(quick_scorer, make_threshold(3.0), topic="log-events", cache_windows=100)


@pytest.fixture
def take_over(bundle, detector):
    def take_over(offset, replay=None, *leftovers, chosen=False):
        start = Start(
            offset, recover({}, bundle.vocabulary), replay or Replay(offset, offset), list(leftovers), chosen=chosen
        )
        return Partition(Settings(), detector, NUMBER, start)

    return take_over


def read(partition, *offsets):
    return partition.advance(np.array(offsets))


def test_messages_are_known_published_or_new_by_their_offsets(take_over):
    partition = take_over(10, Replay(13, 14))
    assert (partition.position, partition.catch_up, partition.touched) == (10, 3, False)
    assert read(partition, 8, 9) == (2, 2), "all of them read before: nothing happens"
    assert (partition.position, partition.touched) == (10, False)
    assert read(partition, 9, 10, 11) == (1, 3), "a predecessor published what came of them"
    assert (partition.position, partition.catch_up, partition.touched) == (12, 1, True)
    assert read(partition, 11, 12, 13, 15) == (1, 2), "and not of these two"
    assert (partition.position, partition.catch_up) == (16, 0)
    partition.end_replay()
    assert read(partition, 17) == (0, 0)


def test_it_is_silent_once_its_replay_is_over_until_none_of_its_sessions_is_open(take_over, detector, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=100.0)
    monkeypatch.setattr("consumer.partition.time", clock)

    def pass_by(end):
        for _ in range(730):  # two minutes each, a day in all
            clock.now += 120.0
            partition.ends_at(end, clock.now)

    partition = take_over(0, Replay(1, 2))
    read(partition, 0)
    detector.process({NUMBER: EventBatch.of(["x"], [4], [1000], [0])})
    pass_by(1)
    assert not partition.is_silent, "a replay goes on"
    read(partition, 1)
    partition.end_replay()
    pass_by(3)
    assert not partition.is_silent, "there is more to be read"
    clock.now += 61.0
    assert partition.is_doubtful
    pass_by(2)
    assert partition.is_silent
    assert not partition.is_doubtful

    partition.committed()
    partition.closed_some()
    assert partition.touched
    assert partition.is_silent, "there is more to be closed"
    detector.close(NUMBER)
    partition.closed_some()
    assert not partition.is_silent
    clock.now += 3600.0
    assert not partition.is_doubtful, "nothing is open"


def test_records_of_transactions_at_the_end_are_nothing_to_wait_for(take_over):
    """Offsets that were set to the end by hand lie behind them."""
    partition = take_over(5, Replay(9, 9))
    read(partition, 5, 6)
    assert partition.catch_up == 2
    partition.reach(8)
    assert (partition.position, partition.catch_up) == (8, 1)
    partition.reach(12)
    partition.end_replay()
    assert (partition.position, partition.catch_up) == (9, 0), "what comes next was not read by a predecessor"
    assert read(partition, 12) == (0, 0)


def test_a_commit_deletes_leftovers_once_and_a_checkpoint_stores_what_no_replay_will_tell(take_over, detector):
    partition = take_over(5, Replay(5, 5), BLOCK + b"old", chosen=True)
    assert partition.touched, "others are to begin here, too"
    first = list(partition.records(begin=False))
    assert first[0] == (NUMBER, BLOCK + b"old", None)
    assert [key for _, key, _ in first[1:]] == [CHECKPOINT, DRIFT]
    partition.committed()
    assert not partition.touched

    read(partition, 5)
    detector.process({NUMBER: EventBatch.of(["x"], [4], [1000], [5])})
    assert list(partition.records(begin=False)) == []
    stored = list(partition.records(begin=True))
    assert [(number, key) for number, key, _ in stored][-1] == (NUMBER, CHECKPOINT)
    assert (NUMBER, BLOCK + b"x") in [(number, key) for number, key, _ in stored]
