"""How long a partition has been silent, by what the brokers say and when."""

from hypothesis import given
from hypothesis import strategies as st

from consumer.silence import Silence


def test_it_is_over_once_the_brokers_have_said_for_the_timeout_that_nothing_is_there():
    silence = Silence(80.0, now=1000.0)
    assert not silence.is_doubtful(1009.9)
    assert silence.is_doubtful(1010.0)
    for moment in range(1010, 1081, 10):
        silence.confirm(float(moment))
        assert not silence.is_over
    silence.confirm(1081.0)
    assert silence.is_over
    silence.begin(1082.0)
    assert not silence.is_over


def test_a_gap_in_what_they_say_begins_it_anew():
    silence = Silence(80.0, now=0.0)
    for moment in (10.0, 20.0, 60.0, 90.0, 120.0, 140.0):
        silence.confirm(moment)
    assert not silence.is_over, "from 20 to 60 nobody knew"
    silence.confirm(141.0)
    assert silence.is_over


@given(st.lists(st.tuples(st.sampled_from(["came", "confirmed", "nothing"]), st.floats(0.01, 50)), max_size=60))
def test_it_is_never_over_sooner_than_the_timeout_after_something_came(steps):
    silence, now, came = Silence(60.0, now=0.0), 0.0, 0.0
    for what, seconds in steps:
        now += seconds
        if what == "came":
            silence.begin(now)
            came = now
        elif what == "confirmed":
            silence.confirm(now)
        assert not silence.is_over or now - came > 60.0
