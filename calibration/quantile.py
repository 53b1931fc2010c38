"""Split-conformal prediction: a threshold with a guarantee that holds for any model and any distribution."""

from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import ceil

import numpy as np
from numpy.typing import NDArray

from model.errors import UserError


@dataclass(frozen=True)
class Quantile:
    """The ⌈(n+1)·q⌉-th smallest of n calibration scores.

    A new score exchangeable with them is strictly greater with probability at most `bound`
    (Vovk, Gammerman & Shafer, Algorithmic Learning in a Random World, 2005; ties only lower it).
    """

    value: float
    n: int
    rank: int
    """`value` is the rank-th smallest."""
    above: int
    """Calibration scores strictly greater than `value`: n - rank, or fewer with ties."""

    @property
    def bound(self) -> float:
        """Largest probability of a greater score."""
        return float(Fraction(self.n + 1 - self.rank, self.n + 1))


def conformal_quantile(scores: NDArray[np.float64], q: float) -> Quantile:
    """Return the conformal `q`-quantile of `scores` (N,).

    Raises:
        UserError: there are too few scores for `q`; the message names the number needed.
    """
    exact = Fraction(Decimal(str(q)))  # 0.95 is meant as 95/100, not as its nearest binary fraction
    n = len(scores)
    rank = ceil((n + 1) * exact)
    if rank > n:
        raise UserError(
            f"{n:,} normal blocks are too few for the quantile {q:g}: it takes at least {blocks_needed(q):,}; "
            "give more normal sessions or lower calibration.quantile"
        )
    value = float(np.partition(scores, rank - 1)[rank - 1])
    return Quantile(value, n, rank, int((scores > value).sum()))


def blocks_needed(q: float) -> int:
    """Return the smallest number of scores that has a conformal `q`-quantile: ⌈q / (1 - q)⌉."""
    exact = Fraction(Decimal(str(q)))
    return ceil(exact / (1 - exact))
