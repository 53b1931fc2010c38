"""The bar that a network has to clear: two rules without one, on the finished block.

Both learn from the same normal sessions as the model and take their thresholds from the same calibration blocks.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import pairwise_distances_argmin_min

from model.sessions import Session


class CountVectors:
    """Distance of a block's event counts to the nearest ones in training.

    Counts are weighed by inverse document frequency, ln((1 + N) / (1 + n)) + 1 for an event in n of N training
    sessions, so that a rare event too many costs more than a common one; the distance is L1.
    """

    def __init__(self, training: Sequence[Session]) -> None:
        self._columns = {event: place for place, event in enumerate(sorted({*_all_events(training)}))}
        counts = self._counts(training)
        documents = np.append((counts[:, :-1] > 0).sum(axis=0), 0)
        self._weights = np.log((1 + len(training)) / (1 + documents)) + 1
        self._known = np.unique(counts, axis=0) * self._weights

    def scores(self, sessions: Sequence[Session]) -> NDArray[np.float64]:
        """Return the distance of each session: (N,)."""
        distinct, back = np.unique(self._counts(sessions), axis=0, return_inverse=True)
        _, distance = pairwise_distances_argmin_min(distinct * self._weights, self._known, metric="manhattan")
        return np.asarray(distance, np.float64).round(9)[back.ravel()]

    def _counts(self, sessions: Sequence[Session]) -> NDArray[np.int64]:
        """Return (N, E + 1) counts; the last column is for events that training never saw."""
        unknown = len(self._columns)
        counts = np.zeros((len(sessions), unknown + 1), np.int64)
        for row, session in zip(counts, sessions, strict=True):
            np.add.at(row, [self._columns.get(event, unknown) for event in session.events], 1)
        return counts


class NewEvents:
    """Number of events whose id training never saw."""

    def __init__(self, training: Sequence[Session]) -> None:
        self._known = _all_events(training)

    def scores(self, sessions: Sequence[Session]) -> NDArray[np.float64]:
        """Return the number for each session: (N,)."""
        return np.array([sum(event not in self._known for event in session.events) for session in sessions], float)


def _all_events(sessions: Sequence[Session]) -> set[str]:
    return {event for session in sessions for event in session.events}
