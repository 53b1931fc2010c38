"""How far a threshold can be trusted: the interval in which its true false-alarm rate lies."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

from calibration.quantile import Quantile
from consumer.threshold import Certificate

CONFIDENCE = 0.95


def certify(limit: Quantile, q: float) -> Certificate:
    """Return the certificate of the conformal `q`-quantile `limit`."""
    low, high = interval(limit.n, limit.rank, limit.above)
    return Certificate(limit.n, q, limit.bound, CONFIDENCE, (float(low), float(high)))


def interval(n: int, rank: ArrayLike, above: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return low and high: p = P(new score > t) lies between them in 95 % of all calibrations or more.

    t is the `rank`-th smallest of n independent scores, `above` of which are greater than t; arrays broadcast.
    Blocks that come in waves are not independent: the interval is too narrow for them.

    `bound` holds on average over calibrations; this holds for the one at hand. With continuous scores, p given the
    calibration is distributed as Beta(n + 1 - rank, rank), whatever the scores' distribution (Vovk, Conditional
    validity of inductive conformal predictors, 2012, proposition 2b). Scores come in atoms, though:

    - high is the 97.5 % point of that Beta. Ties broken at random make the scores continuous and only add to p.
    - low is the 2.5 % point of Beta(above, n + 1 - above), the limit of Clopper & Pearson (1934) for `above` of n. It
      is valid although t is picked by the data: let s be the smallest value that, were it t, could make low exceed p
      at all. Being t, a value has at most n - rank scores above it. If t is s, then low exceeds p only when s has too
      many scores above it; if t is greater, more than n - rank are above s, again too many. So whatever t is, it takes
      too many scores above one fixed value, which has a probability of at most 2.5 %.
    """
    rank, above = np.asarray(rank), np.asarray(above)
    tail = (1 - CONFIDENCE) / 2
    low = np.where(above > 0, beta.ppf(tail, np.maximum(above, 1), n + 1 - above), 0.0)
    return low, np.asarray(beta.ppf(1 - tail, n + 1 - rank, rank))
