import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.settings import EventSettings
from model.lines import LineRules
from model.sessions import Event
from scripts.replay import encoder, paced, read_lines


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self):
        self.now = 100.0

    def sleep(self, seconds):
        self.now += seconds


def times(events, **pace):
    clock = Clock()
    return [clock.now - 100 for _ in paced(iter(events), clock=lambda: clock.now, sleep=clock.sleep, **pace)]


def test_rate_spaces_events_evenly():
    assert times([Event(0, "b", "e")] * 5, rate=2) == pytest.approx([0, 0.5, 1, 1.5, 2])


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=20).map(sorted), st.sampled_from([0.5, 1, 10, 1000]))
def test_speed_keeps_the_distances_of_the_timestamps(stamps, speed):
    seen = times([Event(stamp, "b", "e") for stamp in stamps], speed=speed)
    for (before, after), (early, late) in zip(pairwise(stamps), pairwise(seen), strict=True):
        assert late - early == pytest.approx((after - before) / 1000 / speed, abs=0.003)


def test_lines_before_the_first_that_tells_a_time_wait_for_nothing(tmp_path):
    path = tmp_path / "raw.log"
    path.write_text("a banner\n081109 203615 blk_1 begins\n  a stack trace\n081109 203617 blk_1 ends\n")
    lines = list(read_lines(path, LineRules.of(EventSettings())))
    assert [line.timestamp for line in lines] == [None, *[1_226_262_975_000] * 2, 1_226_262_977_000]
    assert times(lines, speed=2) == pytest.approx([0, 0, 0, 1])


def test_without_a_pace_nobody_waits():
    assert times([Event(stamp, "b", "e") for stamp in (0, 10**9)]) == [0, 0]


def test_values_carry_the_configured_field_names():
    fields = EventSettings(block_id="trace", event_id="span", timestamp="at")
    assert json.loads(encoder(fields)(Event(5, "b", "e"))) == {"trace": "b", "span": "e", "at": 5}
