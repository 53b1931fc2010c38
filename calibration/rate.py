"""Alerts a day: what a share of blocks means where so many blocks begin a day."""

from collections.abc import Sequence
from decimal import ROUND_DOWN, Context, Decimal
from fractions import Fraction
from math import ceil

from model.errors import UserError

DAY = 86_400_000
"""Milliseconds."""

_DIGITS = 4


def blocks_per_day(blocks: int, spans: Sequence[tuple[int, int]]) -> float | None:
    """Return how many of `blocks` begin in a day, given the first and last event time of each source in milliseconds.

    Where spans overlap, the sources tell of the same time. None: they cover no time.
    """
    covered, end = 0, 0
    for first, last in sorted(spans):
        covered += max(0, last - max(first, end))
        end = max(end, last)
    return blocks * DAY / covered if covered else None


def quantile_for(alerts_per_day: float, per_day: float, blocks: int) -> float:
    """Return the smallest quantile (to four digits of 1 - q) at which normal blocks alert so often a day at most.

    That is the expectation over calibrations: blocks a day times the bound 1 - q.

    Raises:
        UserError: so many alerts cannot come, or `blocks` calibration blocks are too few to promise so few.
    """
    if alerts_per_day >= per_day:
        raise UserError(
            f"--target-alerts-per-day {alerts_per_day:g}: no more than {per_day:,.0f} normal blocks begin in a day of "
            "this traffic; give a smaller number"
        )
    share = Context(prec=_DIGITS, rounding=ROUND_DOWN).create_decimal(Decimal(alerts_per_day) / Decimal(per_day))
    needed = ceil(1 / Fraction(share)) - 1  # as `blocks_needed`, also where 1 - share is 1.0
    if blocks < needed:
        raise UserError(
            f"--target-alerts-per-day {alerts_per_day:g} of {per_day:,.0f} normal blocks a day takes at least "
            f"{needed:,} calibration blocks, and there are {blocks:,}; give more, or allow more alerts"
        )
    return float(1 - share)
