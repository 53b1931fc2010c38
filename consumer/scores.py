"""Scores of looks: each distinct window is scored once."""

import numpy as np
from numpy.typing import NDArray

from consumer.drift import levels
from consumer.windows import Looks
from model.scoring import SCREEN_MARGIN, SCREEN_NOISE, Explanation, Rows, Scorer


class LookScores:
    """Scores looks through a bounded cache.

    Far below `threshold` a score is the screened one, good to `SCREEN_MARGIN`; from just below it upwards it is
    exact. So every comparison with the threshold is exact, and nearly every window costs the fast pass only.
    Without a threshold every score is exact. Either way the score's level (`consumer.drift.levels`) is the exact one's.

    Args:
        scorer: scores windows.
        capacity: distinct windows remembered; the older half is forgotten when they are reached.
    """

    def __init__(self, scorer: Scorer, threshold: float | None, capacity: int) -> None:
        self.scorer = scorer
        self._threshold = threshold
        self._half = max(1, capacity // 2)
        self._new: dict[int, float] = {}
        self._old: dict[int, float] = {}
        self._explained: dict[int, Explanation] = {}
        self.scored = 0
        """Windows that went through the network so far."""

    def of(self, looks: Looks) -> NDArray[np.float64]:
        """Return the scores of `looks`: (N,) in nats."""
        distinct, first, back = np.unique(looks.facts["hash"], return_index=True, return_inverse=True)
        hashes = distinct.tolist()
        known = [self._recall(key) for key in hashes]
        missing = [place for place, score in enumerate(known) if score is None]
        if missing:
            fresh = self._score(looks.rows[first[missing]])
            for place, score in zip(missing, fresh.tolist(), strict=True):
                known[place] = score
                self._remember(hashes[place], score)
        return np.array(known, np.float64)[back]

    def explain(self, looks: Looks, place: int) -> Explanation:
        """Explain the look at `place`."""
        key = int(looks.facts["hash"][place])
        explanation = self._explained.get(key)
        if explanation is None:
            if len(self._explained) >= self._half:
                self._explained.clear()
            explanation = self._explained[key] = self.scorer.explain(looks.rows[place])
        return explanation

    def _score(self, rows: Rows) -> NDArray[np.float64]:
        self.scored += len(rows)
        if self._threshold is None:
            return self.scorer.exact(rows)
        scores = self.scorer.screen(rows)
        close = scores > self._threshold - SCREEN_MARGIN
        close |= levels(scores - SCREEN_NOISE) != levels(scores + SCREEN_NOISE)
        if close.any():
            scores[close] = self.scorer.exact(rows[close])
        return scores

    def _recall(self, key: int) -> float | None:
        score = self._new.get(key)
        if score is None:
            score = self._old.pop(key, None)
            if score is not None:
                self._remember(key, score)
        return score

    def _remember(self, key: int, score: float) -> None:
        if len(self._new) >= self._half:
            self._old, self._new = self._new, {}
        self._new[key] = score
