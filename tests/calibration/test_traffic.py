"""Sessions of a time range against a plain reading of the rules, and the scores against those of --normal."""

import itertools
import json
from contextlib import nullcontext
from datetime import timedelta

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.block_scores import CACHE, block_scores
from calibration.traffic import PartitionTraffic, Traffic, read_traffic
from consumer.events import Decoder, Messages
from consumer.scores import LookScores
from consumer.settings import EventSettings, Settings, WindowSettings
from model.bundle import Bundle
from model.network import Autoencoder, Shape
from model.scoring import Scorer
from model.sessions import Session, read_normal
from model.vocabulary import Vocabulary

IDLE = 1000
LATER = 10**12


@pytest.fixture(scope="module")
def scorer():
    torch.manual_seed(5)
    vocabulary = Vocabulary(tuple("abc"))
    return Scorer(Bundle(Autoencoder(Shape(len(vocabulary), 4, 16, 2, 1, 16)).eval(), vocabulary))


class Sent:
    """A message as the client hands it out."""

    def __init__(self, key, value, offset):
        self.key, self.value, self.offset = (lambda: key), (lambda: value), (lambda: offset)

    def timestamp(self):
        return 1, LATER


def records_of(stream, first_offset=0):
    """`stream`: (block, event, time); event None is a tombstone, block None garbage."""
    records = []
    for offset, (block, event, time) in enumerate(stream, first_offset):
        if block is None:
            records.append(Sent(None, b"garbage", offset))
        elif event is None:
            records.append(Sent(block.encode(), None, offset))
        else:
            value = json.dumps({"block_id": block, "event_id": event, "timestamp": time}).encode()
            records.append(Sent(block.encode(), value, offset))
    return records


def read(scorer, stream, *, begin=None, end=None, every=1, cut=False, cuts=(), first_offset=0):
    traffic = Traffic()
    part = PartitionTraffic(
        traffic, Decoder(EventSettings(), scorer.bundle.vocabulary.tokens), LookScores(scorer, None, CACHE),
        begin=begin, end=end, every=every, idle_timeout=IDLE, cut=cut,
    )  # fmt: skip
    records = records_of(stream, first_offset)
    edges = [0, *sorted({edge % (len(records) + 1) for edge in cuts}), len(records)]
    for start, stop in itertools.pairwise(edges):
        if not part.is_over:
            part.take(Messages.of(records[start:stop]))
    part.close()
    return traffic


class Plain:
    """The rules, read plainly: whole sessions' events, how many were open at the beginning and at the end."""

    def __init__(self, stream, *, begin, end, cut):
        self.opened, self.whole, self.already_open = {}, [], 0
        self.began = begin is None and not cut
        events = [item for item in stream if item[0] is not None]
        if cut:
            first = next((time for _, event, time in events if event is not None), 0)
            begin = max(begin or 0, first + IDLE + 1)
        watermark, over = -1, False
        for block, event, time in events:
            if event is None:
                self.finish(block)
                continue
            watermark = max(watermark, time)
            if end is not None and watermark >= end:
                over = True
                break
            if not self.began and watermark >= begin:
                self.expire(begin)
                self.already_open, self.began = len(self.opened), True
            self.expire(watermark)
            session = self.opened.setdefault(block, {"events": [], "inside": self.began})
            session["events"].append(event)
            session["seen"] = watermark
        if over and self.began:
            self.expire(end)
        self.still_open = sum(session["inside"] for session in self.opened.values())

    def expire(self, time):
        for block in [block for block, session in self.opened.items() if session["seen"] + IDLE < time]:
            self.finish(block)

    def finish(self, block):
        session = self.opened.pop(block, None)
        if session and session["inside"]:
            self.whole.append(session["events"])


streams = st.lists(
    st.tuples(st.sampled_from(["X", "Y", "Z", None]), st.sampled_from(["a", "b", "new", None]), st.integers(0, 6000)),
    max_size=60,
).map(lambda items: sorted(items, key=lambda item: item[2] // 800))  # out of order, but not wildly so
times = st.none() | st.integers(0, 6000)


@settings(max_examples=150, deadline=None)
@given(streams, times, times, st.booleans(), st.integers(1, 3), st.lists(st.integers(0, 60), max_size=4))
def test_a_range_holds_the_sessions_that_a_plain_reading_finds_whole(scorer, stream, begin, end, cut, every, cuts):
    found = read(scorer, stream, begin=begin, end=end, every=every, cut=cut, cuts=cuts)
    plain = Plain(stream, begin=begin, end=end, cut=cut)
    expected = block_scores([Session("s", tuple(events)) for events in plain.whole], scorer, every=every)
    assert sorted(found.scores) == sorted(expected.blocks.tolist()), "exactly those of --normal"
    assert (found.already_open, found.still_open) == (plain.already_open, plain.still_open)
    assert found.begun == len(plain.whole) + plain.still_open
    if end is None:
        spoken = [event for block, event, _ in stream if None not in (block, event)]
        assert (found.events, found.unknown) == (len(spoken), spoken.count("new"))
    assert [block.score for block in found.highest] == sorted(found.scores, reverse=True)[:10]


@settings(max_examples=80, deadline=None)
@given(streams, times, st.integers(1, 3))
def test_a_file_is_cut_into_the_sessions_of_the_topic(scorer, tmp_path_factory, stream, begin, every):
    spoken = sorted((item for item in stream if None not in item), key=lambda item: item[2])
    path = tmp_path_factory.getbasetemp() / "spoken.csv"
    rows = [f"{time},{block},{event}\n" for block, event, time in [*spoken, ("last", "a", 99_000)]]
    path.write_text("".join(["timestamp,block_id,event_id\n", *rows]))
    normal = read_normal([path], begin=begin, end=10_000, idle_timeout=IDLE)
    # Its sessions are over by the end of the range, which the topic tells by the event behind it.
    topic = read(scorer, [*spoken, ("last", "a", 99_000)], begin=begin, end=10_000, every=every)
    scores = block_scores(normal.sessions, scorer, every=every)
    assert sorted(scores.blocks.tolist()) == sorted(topic.scores)
    assert normal.begun == topic.begun


def test_dead_letters_are_counted_where_they_lie_in_the_range(scorer):
    garbage = (None, "a", 0)
    stream = [garbage, ("X", "a", 0), garbage, ("X", "b", 2000), garbage, ("Y", "a", 2500), garbage, ("X", "c", 5000),
              garbage]  # fmt: skip
    assert (read(scorer, stream).dead_letters, read(scorer, stream).messages) == (5, 9)
    part = read(scorer, stream, begin=1500, end=4000)
    assert (part.dead_letters, part.messages) == (2, 4)


def test_the_time_covered_is_the_range_where_there_is_traffic_around_it(scorer):
    stream = [("X", "a", 500), ("X", "b", 3000), ("Y", "a", 4000), ("Y", "b", 9000)]
    assert (read(scorer, stream).first, read(scorer, stream).last) == (500, 9000)
    inside = read(scorer, stream, begin=2000, end=8000)
    assert (inside.first, inside.last) == (2000, 8000)
    outside = read(scorer, stream, begin=100, end=20_000)
    assert (outside.first, outside.last) == (500, 9000), "before and after, the topic says nothing"
    assert read(scorer, stream, begin=50_000).first is None


def test_a_session_is_known_to_be_open_though_its_event_was_stamped_ahead_of_its_message(scorer, monkeypatch):
    """Where to begin to read is found by the times of messages, which may be earlier by windows.max_ahead."""
    begin, ahead = 100_000, 10_000
    sent = [("X", "a", begin - IDLE, begin - IDLE - ahead), ("X", "b", begin, begin), ("X", None, 0, begin)]
    records = records_of([item[:3] for item in sent])
    for record, (*_, moment) in zip(records, sent, strict=True):
        record.timestamp = lambda moment=moment: (1, moment)

    class History:
        partitions = range(1)
        bounds = staticmethod(lambda _: (0, len(records)))

        def offset_at(self, _, time):
            return next((record.offset() for record in records if record.timestamp()[1] >= time), None)

        def read(self, _, start, end):
            yield records[start:end]

    monkeypatch.setattr("calibration.traffic.TopicHistory", lambda *_: nullcontext(History()))
    windows = WindowSettings(idle_timeout=timedelta(milliseconds=IDLE), max_ahead=timedelta(milliseconds=ahead))
    found = read_traffic(
        Settings(windows=windows), "logs", scorer, begin=begin, progress=lambda _: nullcontext(lambda _: None)
    )
    assert (found.already_open, found.scores) == (1, [])


def test_the_highest_block_can_be_explained(scorer):
    stream = [("X", "a", 0), ("X", "never seen", 1), ("X", "b", 2), ("X", None, 2)]
    (block,) = read(scorer, stream).highest
    why = scorer.explain(block.row)
    assert why.score == block.score
    assert block.name == "X"
    assert "never seen" in block.events(scorer.bundle.vocabulary)
    assert block.count == 3
    assert np.count_nonzero(block.row) == 1 + block.seen + ("<END>" in block.events(scorer.bundle.vocabulary))


def test_looks_are_counted_and_not_kept_since_some_blocks_never_end(scorer):
    traffic = read(scorer, [("x", "a", 0)] * 50 + [("x", None, 0)] + [("y", "b", 0)] * 50)
    assert traffic.looks == 51
    assert traffic.highest[0].looked == 51
    assert traffic.highest[0].looks == []
    (score,) = block_scores([Session("x", ("a",) * 50)], scorer, every=1).blocks
    assert traffic.scores == [score]


def test_a_block_silent_for_the_idle_timeout_is_not_open_when_the_range_begins(scorer):
    stream = [("X", "a", 0), ("Y", "a", 900), ("Y", "b", 1800), ("X", "b", 1800), ("X", None, 0)]
    found = read(scorer, stream, begin=1500)
    assert (found.already_open, len(found.scores), found.still_open) == (1, 1, 0), "Y goes on, X has begun anew"
