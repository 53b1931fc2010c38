"""Scores of looks: each distinct window is scored once."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from consumer.drift import levels
from consumer.looks import Looks
from model.jit import njit
from model.scoring import SCREEN_MARGIN, SCREEN_NOISE, Explanation, Rows, Scorer

_NOWHERE, _NEW, _OLD = range(3)
"""Where a score is found."""

_EXPLAINED_EVENTS = 1_000_000
"""Events in remembered explanations at most, at some 40 bytes each: 20,000 windows of 50 events, which is more than are
scored at a time, so that none goes before it is asked for."""


class _Generation(NamedTuple):
    """Scores by the hash of their window, with linear probing; a hash of 0 is a free place."""

    hashes: NDArray[np.uint64]  # (C,)
    scores: NDArray[np.float64]  # (C,)
    used: NDArray[np.int64]  # (1,) how many


class LookScores:
    """Scores looks through a bounded cache.

    Far below `threshold` a score is the screened one, good to `SCREEN_MARGIN`; from just below it upwards it is
    exact. So every comparison with the threshold is exact, and nearly every window costs the fast pass only. The exact
    pass of a window above the threshold explains it as well, before an alert asks.
    Without a threshold every score is exact. Either way the score's level (`consumer.drift.levels`) is the exact one's.

    Args:
        scorer: scores windows.
        capacity: distinct windows whose score is remembered; the older half is forgotten when they are reached.
            Explanations, which are larger, have a bound of their own.
    """

    def __init__(self, scorer: Scorer, threshold: float | None, capacity: int) -> None:
        self.scorer = scorer
        self._threshold = threshold
        self._half = max(1, capacity // 2)
        self._most_explained = max(1, _EXPLAINED_EVENTS // scorer.bundle.window)
        self._new = self._old = _generation(0)
        self._explained: OrderedDict[int, Explanation] = OrderedDict()
        self.scored = 0
        """Windows that went through the network so far."""

    def of(self, *portions: Looks) -> NDArray[np.float64]:
        """Return the scores of the looks of all `portions`, one after the other: (N,) in nats."""
        hashes = np.concatenate([looks.facts["hash"] for looks in portions])
        hashes[hashes == 0] = 1
        scores = np.empty(len(hashes))
        found = _recall(self._new, self._old, hashes, scores)
        missing = np.flatnonzero(found == _NOWHERE)
        if len(missing):
            distinct, first, back = np.unique(hashes[missing], return_index=True, return_inverse=True)
            fresh = self._score(distinct, _rows(portions, missing[first]))
            scores[missing] = fresh[back]
            self._remember(distinct, fresh)
        if (again := found == _OLD).any():
            self._remember(hashes[again], scores[again])
        return scores

    def explain(self, looks: Looks, place: int) -> Explanation:
        """Explain the look at `place`."""
        key = int(looks.facts["hash"][place]) or 1
        explanation = self._explained.get(key)
        if explanation is None:
            explanation = self.scorer.explain(looks.rows[place])
            self._keep(key, explanation)
        return explanation

    def _score(self, hashes: NDArray[np.uint64], rows: Rows) -> NDArray[np.float64]:
        self.scored += len(rows)
        if self._threshold is None:
            return self.scorer.exact(rows)
        scores = self.scorer.screen(rows)
        close = scores > self._threshold - SCREEN_MARGIN
        close |= levels(scores - SCREEN_NOISE) != levels(scores + SCREEN_NOISE)
        near = np.flatnonzero(close)
        for judged in self.scorer.judge(rows[near]):
            places = near[judged.places]
            scores[places] = judged.scores
            for index in np.flatnonzero(judged.scores > self._threshold).tolist():
                self._keep(int(hashes[places[index]]), judged.why(index))
        return scores

    def _keep(self, key: int, explanation: Explanation) -> None:
        """Remember an explanation; the oldest goes when there are too many."""
        self._explained[key] = explanation
        if len(self._explained) > self._most_explained:
            self._explained.popitem(last=False)

    def _remember(self, hashes: NDArray[np.uint64], scores: NDArray[np.float64]) -> None:
        """Take in windows; what was not asked for since the last turn of the generations goes with the next one."""
        for begin in range(0, len(hashes), self._half):
            some = slice(begin, begin + self._half)
            count = int(self._new.used[0]) + len(hashes[some])
            if count > self._half:
                self._old, self._new, count = self._new, _generation(0), len(hashes[some])
            if 2 * count > len(self._new.hashes):
                larger = _generation(2 * count)
                _add(larger, self._new.hashes, self._new.scores)
                self._new = larger
            _add(self._new, hashes[some], scores[some])


def _rows(portions: Sequence[Looks], places: NDArray[np.int64]) -> Rows:
    """Return the rows at `places`, counted through all portions."""
    rows, begin = np.empty((len(places), portions[0].rows.shape[1]), np.uint16), 0
    for looks in portions:
        here = (begin <= places) & (places < begin + len(looks))
        rows[here] = looks.rows[places[here] - begin]
        begin += len(looks)
    return rows


def _generation(windows: int) -> _Generation:
    size = 1 << max(10, (2 * windows - 1).bit_length())
    return _Generation(np.zeros(size, np.uint64), np.zeros(size), np.zeros(1, np.int64))


@njit(cache=True)
def _place(generation, key):
    """Return where a hash is, or would be."""
    mask = len(generation.hashes) - 1
    at = np.int64(key) & mask
    while generation.hashes[at] != 0 and generation.hashes[at] != key:
        at = (at + 1) & mask
    return at


@njit(cache=True)
def _recall(new, old, hashes, scores):
    """Write the scores that are known; return where each was found (N,)."""
    found = np.full(len(hashes), _NOWHERE, np.uint8)
    for i in range(len(hashes)):
        at = _place(new, hashes[i])
        if new.hashes[at] != 0:
            scores[i] = new.scores[at]
            found[i] = _NEW
            continue
        at = _place(old, hashes[i])
        if old.hashes[at] != 0:
            scores[i] = old.scores[at]
            found[i] = _OLD
    return found


@njit(cache=True)
def _add(generation, hashes, scores):
    for i in range(len(hashes)):
        if hashes[i] != 0:
            at = _place(generation, hashes[i])
            generation.used[0] += generation.hashes[at] == 0
            generation.hashes[at] = hashes[i]
            generation.scores[at] = scores[i]
