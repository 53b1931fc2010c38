"""Training windows as the stream cuts them, and the noise that the autoencoder learns to undo.

A network that sees its clean input learns to copy it. So some tokens are replaced by random others and the
network must say what was there; what it learns is "given this neighbourhood, is the event I was shown the right
one?", which is the question the detector asks. Other events are left out, and where a session ends without them the
network must say what it ends without.

How much is wrong differs from window to window by orders of magnitude. So the network has to infer how
trustworthy a window is: one odd event in a window that is otherwise in order is probably just rare, the same event
among other odd ones is probably wrong. The highest surprisal of a window thereby weighs all of its evidence.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from model.vocabulary import BOS, END, PAD, SPECIAL, UNK

Tokens = NDArray[np.int64]

CLOSED_SHARE = 0.5
"""Half of the training windows are whole sessions with END, half are prefixes without: sessions still open."""

CUT_SHARE = 0.3
"""Share of the open windows whose last event becomes END: a session cut short must look wrong."""

RUN_SHARE = 0.1
"""Share of the windows in which a run of events is missing."""

REORDERINGS = 30
"""Passes over a window, at most, in which commuting neighbours change places: an event can wander far."""

_MARGIN = 2 * REORDERINGS
"""Events before and behind a window that may come into it: a pass moves an event by two places at most."""


class TrainingWindows:
    """Draws clean training windows from normal sessions.

    A few sequences cause most traffic, so distinct sequences are drawn in proportion to the square root of their
    frequency: rare ones are seen often enough to be learned, common ones still lead.

    Args:
        sessions: token sequences, none of them empty.
        window: newest events of a session that the network sees.
        swaps: share of windows in which commuting neighbours are reordered.
    """

    def __init__(self, sessions: Iterable[Sequence[int]], *, vocabulary: int, window: int, swaps: float) -> None:
        frequency = Counter(map(tuple, sessions))
        sequences = sorted(frequency)
        self.distinct = len(sequences)
        self._window = window
        self._swaps = swaps
        weight = np.sqrt([frequency[sequence] for sequence in sequences])
        self._cumulative = np.cumsum(weight / weight.sum())
        self._length = np.array([len(sequence) for sequence in sequences])
        self._start = np.concatenate([[0], np.cumsum(self._length)[:-1]])
        self._flat = np.concatenate([np.asarray(sequence, np.int64) for sequence in sequences])
        self._commute = _commuting(sequences, vocabulary)

    def draw(self, size: int, random: np.random.Generator) -> Tokens:
        """Return (size, window + 2) rows: BOS, events, END where the session is over, PAD."""
        chosen = np.searchsorted(self._cumulative, random.random(size) * self._cumulative[-1], side="right")
        chosen = np.minimum(chosen, self.distinct - 1)
        length = self._length[chosen]
        closed = random.random(size) < CLOSED_SHARE
        end = np.where(closed, length, 1 + (random.random(size) * length).astype(np.int64))  # of the window
        count = np.minimum(end, self._window)
        begin = np.maximum(end - count - _MARGIN, 0)  # of what is reordered
        pieces = self._slice(chosen, begin, np.minimum(end + _MARGIN, length))
        self._reorder(pieces, random)  # before the cut: what comes into a window early or late is chance, too
        column = np.arange(self._window)
        inside = column < count[:, None]  # (B, W)
        place = np.where(inside, (end - count - begin)[:, None] + column, 0)
        rows = np.full((size, self._window + 2), PAD, np.int64)  # (B, W + 2)
        rows[:, 0] = BOS
        rows[:, 1:-1] = np.where(inside, np.take_along_axis(pieces, place, axis=1), PAD)
        rows[np.flatnonzero(closed), 1 + count[closed]] = END
        return rows

    def _slice(self, chosen: Tokens, begin: Tokens, end: Tokens) -> Tokens:
        """Return (B, longest): from each chosen sequence the events from `begin` up to `end`, then PAD."""
        column = np.arange(int((end - begin).max()))
        inside = column < (end - begin)[:, None]
        source = (self._start[chosen] + begin)[:, None] + column
        return np.where(inside, self._flat[np.where(inside, source, 0)], PAD)

    def _reorder(self, events: Tokens, random: np.random.Generator) -> None:
        """Swap neighbours that training saw in both orders, again and again, in a share of the windows (B, W).

        Sequences that differ by such swaps only are one Mazurkiewicz trace: the same work, done concurrently.
        """
        chosen = random.random(len(events)) < self._swaps
        passes = np.where(chosen, random.integers(1, REORDERINGS + 1, len(events)), 0)  # (B,)
        for number in range(REORDERINGS):
            going_on = (passes > number)[:, None]
            for first in (0, 1):  # even pairs, then odd pairs: no event is in two swaps at a time
                left, right = events[:, first:-1:2], events[:, first + 1 :: 2]
                swap = self._commute[left, right] & going_on & (random.random(left.shape) < 0.5)
                events[:, first:-1:2], events[:, first + 1 :: 2] = (
                    np.where(swap, right, left),
                    np.where(swap, left, right),
                )


def corrupt(
    rows: Tokens, shares: tuple[float, float], vocabulary: int, random: np.random.Generator
) -> tuple[Tokens, Tokens]:
    """Return noisy `rows` (B, W + 2), and what belongs at each of their places (B, W + 2).

    A share of the tokens is replaced by random other ones, half as many events are missing without a gap. The share
    is drawn for each window, log-uniformly between the two `shares`. Some windows lack a whole run of events besides.
    Replacements are events, UNK and, at a window's last place only, END. Where END stands although events are
    missing, the first of those belongs there.
    """
    real = (rows != PAD) & (rows != BOS)
    event = real & (rows != END)
    low, high = shares
    share = (low * (high / low) ** random.random(len(rows)))[:, None]  # (B, 1)
    missing = (event & (random.random(rows.shape) < share / 2)) | _run(event, random)
    missing &= (event & ~missing).any(axis=1, keepdims=True)  # something must be left
    replaced = real & ~missing & (random.random(rows.shape) < share)
    noisy = np.where(replaced, random.integers(UNK, vocabulary, rows.shape), rows)
    wanted = rows.copy()
    line = np.arange(len(rows))
    last = real.sum(axis=1)  # BOS is column 0, so this is the last real column
    closed = rows[line, last] == END
    early = closed & missing.any(axis=1)
    wanted[line[early], last[early]] = rows[line[early], missing[early].argmax(axis=1)]
    cut = ~closed & (random.random(len(rows)) < CUT_SHARE)
    noisy[line[cut], last[cut]] = END
    missing[line[cut], last[cut]] = False
    gone = missing | (rows == PAD)
    order = np.argsort(gone, axis=1, kind="stable")  # what is left moves together, filler goes behind it
    left = ~np.take_along_axis(gone, order, axis=1)
    return (
        np.where(left, np.take_along_axis(noisy, order, axis=1), PAD),
        np.where(left, np.take_along_axis(wanted, order, axis=1), PAD),
    )


def _run(event: NDArray[np.bool_], random: np.random.Generator) -> NDArray[np.bool_]:
    """Return (B, W + 2): in some windows a run of up to half of their events."""
    count = event.sum(axis=1)  # (B,)
    length = 1 + (random.random(len(event)) * (count // 2)).astype(np.int64)
    first = 1 + (random.random(len(event)) * (count - length + 1)).astype(np.int64)  # BOS is column 0
    first = np.where(random.random(len(event)) < RUN_SHARE, first, event.shape[1])
    column = np.arange(event.shape[1])
    return event & (column >= first[:, None]) & (column < (first + length)[:, None])


def _commuting(sequences: Iterable[Sequence[int]], vocabulary: int) -> NDArray[np.bool_]:
    """Return (V, V): whether training saw the two events next to each other in both orders."""
    seen = np.zeros((vocabulary, vocabulary), bool)
    for sequence in sequences:
        seen[list(sequence[:-1]), list(sequence[1:])] = True
    seen[:SPECIAL] = seen[:, :SPECIAL] = False
    return seen & seen.T
