"""The merge against plain sorting, and what it must not do: hold back, lose, or send twice."""

import heapq
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer import merge
from consumer.merge import Merge

TIMES = st.one_of(st.none(), st.integers(0, 20), st.sampled_from([-(10**12), 10**12]))
TOPICS = st.lists(st.lists(st.tuples(TIMES, st.integers(-1, 5)), max_size=12), min_size=1, max_size=4)
"""Time and Kafka timestamp of each line, by partition."""


def ages(partition):
    """How old each line of a partition is: never younger than one after it."""
    latest, age = float("-inf"), (float("-inf"), -1)
    for time, sent in partition:
        latest = latest if time is None else max(latest, time)
        age = max(age, (latest, sent))
        yield age


def oracle(topic):
    """What a reader who has all of it would send."""
    ways = [[(age, number, offset) for offset, age in enumerate(ages(lines))] for number, lines in enumerate(topic)]
    return [(number, offset) for _, number, offset in heapq.merge(*ways)]


class Reader:
    """Feeds a merge from a topic, any number of lines of any partition in a turn."""

    def __init__(self, topic):
        self.topic = topic
        self.ends = {}
        self.merge = Merge()
        self.sent = []
        for number in range(len(topic)):
            self.merge.assign(number, 0)

    def turn(self, reads, *, at_end=True):
        """Read so many lines of each partition; a partition read to its end says so, if `at_end`."""
        self.merge.turn(self.ends)
        for number, count in enumerate(reads):
            place = self.place(number)
            for offset, (time, sent) in list(enumerate(self.topic[number]))[place : place + count]:
                assert self.merge.wants(number, offset)
                self.merge.add(number, offset, time, sent, 100, (number, offset))
            if at_end and count and place + count >= len(self.topic[number]):
                self.merge.rest(number)
        self.release()

    def place(self, number):
        return next(offset for offset in itertools.count() if self.merge.wants(number, offset))

    def release(self):
        for line in self.merge.release():
            self.sent.append(line)
            number = line[0]
            assert self.merge.unsent(number) == sum(sent == number for sent, _ in self.sent)

    def finish(self):
        while any(self.place(number) < len(lines) for number, lines in enumerate(self.topic)):
            self.turn([3] * len(self.topic))
        self.turn([1] * len(self.topic))


@given(TOPICS, st.booleans(), st.data())
def test_a_backlog_comes_out_in_order_however_it_is_fetched(topic, ends_known, data):
    reader = Reader(topic)
    for _ in range(data.draw(st.integers(0, 40))):
        if ends_known:
            reader.ends = dict(enumerate(map(len, topic)))
        reads = [data.draw(st.integers(0, 4)) for _ in topic]
        reader.turn(reads, at_end=data.draw(st.booleans()) or not ends_known)
        assert reader.sent == oracle(topic)[: len(reader.sent)]
    reader.finish()
    assert reader.sent == oracle(topic)


@given(TOPICS, st.data())
def test_while_producers_write_nothing_is_lost_or_twice_and_each_partition_keeps_its_order(topic, data):
    """Partitions grow, ends are known late, some are given up, some are given back with what is pending."""
    reader = Reader(topic)
    for _ in range(data.draw(st.integers(0, 40))):
        number = data.draw(st.integers(0, len(topic) - 1))
        match data.draw(st.integers(0, 3)):
            case 0:
                topic[number].append((data.draw(TIMES), data.draw(st.integers(-1, 5))))
            case 1:
                reader.merge.rest(number)
            case 2:
                known = data.draw(st.integers(reader.ends.get(number, 0), len(topic[number])))
                reader.ends[number] = known
            case 3:
                reader.merge.assign(number, reader.merge.unsent(number))
        reader.turn([data.draw(st.integers(0, 2)) for _ in topic], at_end=data.draw(st.booleans()))
    reader.finish()
    assert sorted(reader.sent) == [
        (number, offset) for number, lines in enumerate(topic) for offset in range(len(lines))
    ]
    for number, lines in enumerate(topic):
        assert [offset for sent, offset in reader.sent if sent == number] == list(range(len(lines)))
        assert reader.merge.unsent(number) == len(lines)
    assert not any(map(reader.merge.pending, reader.merge.partitions))


def test_a_line_waits_for_a_partition_that_may_hold_an_older_one_and_for_no_other():
    reader = Reader([[(5, 0)], [(3, 0)], []])
    reader.turn([1, 0, 0])
    assert reader.sent == []
    assert reader.merge.awaited() == [1, 2]
    reader.turn([0, 0, 1])  # at its end
    assert reader.merge.awaited() == [1]
    reader.turn([0, 1, 0])
    assert reader.sent == [(1, 0), (0, 0)], "all are at their ends"
    assert reader.merge.awaited() == []


def test_lines_of_one_time_go_by_kafkas_timestamp_then_by_partition():
    reader = Reader([[(5, 30), (5, 50)], [(5, 20), (5, 50)], [(5, 40), (None, -1)]])
    reader.turn([3, 3, 3])
    assert reader.sent == [(1, 0), (0, 0), (2, 0), (2, 1), (0, 1), (1, 1)]


def test_whoever_is_given_up_joins_in_again():
    reader = Reader([[(1, 0), (2, 0), (7, 0)], [(3, 0), (5, 0)]])
    reader.turn([0, 1])
    reader.merge.rest(0)
    reader.turn([0, 1])
    assert reader.sent == [(1, 0), (1, 1)]
    reader.turn([1, 0])
    assert reader.sent[2:] == [(0, 0)], "late, and at once"
    topic = reader.topic
    topic[1].append((6, 0))
    reader.turn([1, 1], at_end=False)
    assert reader.sent[3:] == [(0, 1)]
    assert reader.merge.awaited() == [0]
    reader.turn([1, 1])
    assert reader.sent[4:] == [(1, 2), (0, 2)]


@pytest.mark.parametrize("clock", [-(10**12), 10**12, 0])
def test_no_clock_that_is_wrong_holds_back_a_partition_though_none_ever_comes_to_its_end(clock):
    """Each turn reads one line of each partition, and one more is there by then: busy producers."""
    reader = Reader([[], [], []])
    for moment in range(1000):
        for number, lines in enumerate(reader.topic):
            lines.append((moment + (clock if number == 1 else 0), moment))
        reader.ends = {number: len(lines) for number, lines in enumerate(reader.topic)}
        if moment:
            reader.turn([1, 1, 1], at_end=False)
        for number in reader.merge.partitions:
            assert reader.merge.pending(number) <= 25
    for number in (0, 2):
        assert [offset for sent, offset in reader.sent if sent == number] == list(range(reader.merge.unsent(number)))


def test_the_end_that_was_known_before_a_partition_was_assigned_counts_for_nothing():
    reader = Reader([[(1, 0)] * 10, [(2, 0)] * 10])
    reader.merge.assign(0, 5)
    reader.ends = {0: 5, 1: 10}
    reader.turn([0, 5])
    assert reader.sent == []
    assert reader.merge.awaited() == [0]


def test_much_that_is_pending_is_not_added_to(monkeypatch):
    monkeypatch.setattr(merge, "LINES", 4)
    reader = Reader([[(1, 0)], [(2, 0)] * 10])
    reader.turn([0, 4])
    assert reader.merge.balance() == ([], [])
    reader.turn([0, 2])  # already on its way when the partition was paused
    assert reader.merge.balance() == ([1], [])
    reader.turn([0, 1])
    assert reader.merge.balance() == ([], [])
    reader.turn([1, 0])
    assert reader.merge.pending(1) == 0
    assert reader.merge.balance() == ([], [1])
    monkeypatch.setattr(merge, "BYTES", 2000)
    reader = Reader([[], [(2, 0)] * 10])
    reader.turn([0, 2])
    assert reader.merge.balance() == ([1], []), "two lines are more than half of it"


def test_what_is_given_back_or_was_read_before_is_not_wanted():
    merged = Merge()
    assert not merged.wants(0, 7)
    merged.assign(0, 7)
    assert not merged.wants(0, 6)
    merged.turn({})
    merged.add(0, 9, 1, 1, 10, "a")  # offsets may lack
    assert not merged.wants(0, 9)
    assert merged.unsent(0) == 9
    assert list(merged.release()) == ["a"]
    assert merged.unsent(0) == 10
    merged.drop(0)
    assert merged.partitions == []
    assert not merged.wants(0, 10)


def test_a_line_waits_for_what_was_at_kafka_when_it_was_read_and_has_not_been_read_yet():
    lines = Merge[str]()
    for partition in (0, 1):
        lines.assign(partition, 0)
        lines.rest(partition)
    lines.turn({}, settled=0)
    lines.add(0, 0, 20, 0, 1, "later")
    assert list(lines.release()) == []
    assert lines.awaited() == []  # nothing is wrong
    lines.turn({}, settled=0)
    lines.add(1, 0, 10, 0, 1, "earlier")
    assert list(lines.release()) == ["earlier"]
    lines.rest(1)
    assert list(lines.release()) == []
    lines.turn({}, settled=1)
    assert list(lines.release()) == ["later"]


def test_a_line_waits_no_less_once_what_was_older_has_been_sent():
    lines = Merge[str]()
    for partition in (0, 1):
        lines.assign(partition, 0)
    lines.turn({}, settled=0)
    lines.add(0, 0, 10, 0, 1, "first")
    lines.add(1, 0, 20, 0, 1, "second")
    lines.rest(0)
    lines.rest(1)
    assert list(lines.release()) == ["first"], "what is between them may have come to the first one's partition since"
    lines.turn({}, settled=1)
    assert list(lines.release()) == ["second"]


def test_the_only_partition_waits_for_nothing():
    lines = Merge[str]()
    lines.assign(0, 0)
    lines.turn({}, settled=0)
    lines.add(0, 0, 20, 0, 1, "alone")
    assert list(lines.release()) == ["alone"]
