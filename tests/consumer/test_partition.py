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
    partition = take_over(0, Replay(1, 2))
    assert not partition.is_silent_since(101), "a replay goes on"
    clock.now = 200.0
    read(partition, 0, 1)
    detector.process({NUMBER: EventBatch.of(["x"], [4], [1000], [1])})
    partition.end_replay()
    assert partition.is_silent_since(201)
    assert not partition.is_silent_since(200)

    partition.committed()
    clock.now = 300.0
    partition.closed_some()
    assert partition.touched
    assert partition.is_silent_since(201), "there is more to be closed"
    detector.close(NUMBER)
    partition.closed_some()
    assert not partition.is_silent_since(300)


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
