"""The certificate's interval holds the true false-alarm rate in 95 % of all calibrations or more, ties or not."""

import itertools
from math import ceil, factorial

import numpy as np
import pytest

from calibration.certificate import certify, interval
from calibration.quantile import conformal_quantile

CALIBRATIONS = 20_000


def misses(scores, q, exceeding):
    """Return how often the true rate is below and above the interval, over calibrations `scores` (R, N).

    `exceeding(t)`: the true probability of a greater score.
    """
    n = scores.shape[1]
    rank = ceil((n + 1) * q - 1e-9)
    limits = np.sort(scores, axis=1)[:, rank - 1]
    low, high = interval(n, rank, (scores > limits[:, None]).sum(axis=1))
    true = exceeding(limits)
    return (true < low).mean(), (true > high).mean()


@pytest.mark.parametrize(("n", "q"), [(100, 0.9), (100, 0.5), (99, 0.99), (300, 0.95)])
def test_coverage_of_continuous_scores(n, q):
    scores = np.random.default_rng(1).random((CALIBRATIONS, n))
    below, above = misses(scores, q, lambda limits: 1 - limits)
    assert above == pytest.approx(0.025, abs=0.004), "exact on this side"
    assert below <= 0.025 + 0.004
    assert below >= 0.005 or q == 0.99, "and wider than need be by one block on the other; at 0.99 it reaches 0"


@pytest.mark.parametrize("q", [0.5, 0.9, 0.97])
@pytest.mark.parametrize(
    "atoms",
    [[0.8, 0.12, 0.05, 0.02, 0.01], [0.5, 0.4, 0.1], [0.9, 0.1], [0.02] * 50, [0.88, 0.02, 0.02, 0.02, 0.06], [1.0]],
)
def test_coverage_of_tied_scores(atoms, q):
    atoms = np.array(atoms) / sum(atoms)
    scores = np.random.default_rng(2).choice(len(atoms), (CALIBRATIONS, 100), p=atoms)
    beyond = np.append(np.cumsum(atoms[::-1])[::-1][1:], 0.0)
    below, above = misses(scores, q, lambda limits: beyond[limits])
    assert below <= 0.025 + 0.004
    assert above <= 0.025 + 0.004


def test_coverage_of_three_atoms_by_counting_every_calibration():
    """No chance and no luck with one example: every outcome of n = 20, for a grid of all distributions."""
    n, rank = 20, 18
    outcomes = [(a, b, n - a - b) for a, b in itertools.product(range(n + 1), repeat=2) if a + b <= n]
    ways = np.array([factorial(n) // (factorial(a) * factorial(b) * factorial(c)) for a, b, c in outcomes], float)
    limits = np.array([0 if a >= rank else 1 if a + b >= rank else 2 for a, b, _ in outcomes])
    above = np.array([(b + c, c, 0)[limit] for (_, b, c), limit in zip(outcomes, limits, strict=True)])
    low, high = interval(n, rank, above)
    worst = 1.0
    for first, second in itertools.product(np.linspace(0.02, 0.96, 48), repeat=2):
        if first + second > 0.99:
            continue
        p = np.array([first, second, 1 - first - second])
        chance = ways * np.prod(p ** np.array(outcomes), axis=1)
        true = np.array([p[1] + p[2], p[2], 0.0])[limits]
        assert chance[true < low].sum() <= 0.025 + 1e-12
        assert chance[true > high].sum() <= 0.025 + 1e-12
        worst = min(worst, chance[(low <= true) & (true <= high)].sum())
    assert 0.95 <= worst < 0.98, "valid everywhere, and nowhere near empty words"


def test_a_certificate_says_what_it_rests_on():
    limit = conformal_quantile(np.arange(999.0), 0.99)
    found = certify(limit, 0.99)
    assert (found.n, found.q, found.confidence) == (999, 0.99, 0.95)
    assert found.bound == pytest.approx(0.01)
    low, high = found.interval
    assert 0 < low < 9 / 999 < found.bound < high < 0.02


def test_the_highest_score_as_threshold_may_never_be_exceeded():
    low, high = certify(conformal_quantile(np.arange(19.0), 0.95), 0.95).interval
    assert low == 0
    assert high == pytest.approx(1 - 0.025 ** (1 / 19)), "1 - high = the rate at which 19 in 19 stay below by 2.5 %"


def test_more_blocks_make_the_interval_narrower():
    widths = [np.ptp(certify(conformal_quantile(np.arange(float(n)), 0.9), 0.9).interval) for n in (99, 999, 9999)]
    assert widths[0] > 2 * widths[1] > 4 * widths[2]
