import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.quantile import blocks_needed, conformal_quantile
from calibration.rate import DAY, blocks_per_day, quantile_for
from model.errors import UserError


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(0, DAY)], 100),
        ([(0, DAY // 2)], 200),
        ([(5 * DAY, 6 * DAY), (0, DAY)], 50),  # two days with a gap between them
        ([(0, DAY), (0, DAY)], 100),  # the same day in two files
        ([(0, DAY), (DAY // 2, 2 * DAY), (DAY, DAY + 1)], 50),
        ([(7, 7)], None),
    ],
)
def test_blocks_a_day_by_the_time_covered(spans, expected):
    assert blocks_per_day(100, spans) == expected


@given(st.floats(0.01, 1e5), st.floats(1, 1e6), st.integers(0, 200_000))
def test_the_quantile_keeps_to_the_target_and_not_much_below_it(target, per_day, blocks):
    try:
        q = quantile_for(target, per_day, blocks)
    except UserError as error:
        assert target >= per_day or blocks < (per_day / target) * 1.002
        assert ("smaller number" in str(error)) == (target >= per_day)  # noqa: PT017
        return
    limit = conformal_quantile(np.arange(float(blocks)), q)
    assert limit.bound * per_day <= target * (1 + 1e-9)
    assert (1 - q) * per_day >= target * 0.998


def test_too_few_blocks_are_told_how_many_it_takes():
    with pytest.raises(UserError) as caught:
        quantile_for(1, 10_000, 500)
    assert f"at least {blocks_needed(0.9999):,} calibration blocks" in str(caught.value)
    assert quantile_for(1, 10_000, blocks_needed(0.9999)) == 0.9999


@pytest.mark.parametrize("target", [1e-10, 1e-12, 1e-300])
def test_a_target_next_to_nothing_takes_more_blocks_than_there_are(target):
    with pytest.raises(UserError, match=r"takes at least [0-9,]{21,} calibration blocks, and there are 1,000,000;"):
        quantile_for(target, 1e6, 10**6)
