"""Does the threshold still mean what it says? A test for change, fed with the blocks of one partition as they close.

Two questions, one sequential test each:

    tail  do more blocks alert than were promised, plus the share that may fail in nature?
    body  do the blocks that stay silent still score like the calibration blocks that would have stayed silent?

`body` bets against conformal p-values: where a block's score stands among the calibration scores and those of all
blocks before it. As long as nothing changes these are independent and uniform, however long the stream (Vovk,
Gammerman & Shafer, Algorithmic Learning in a Random World, 2005, theorem 8.2), so a bet whose mean over uniform
p-values is 1 gains nothing on average. `tail` bets on "the block alerts" at odds that are fair, or worse, as long as
the rate is the allowed one, or lower.

Real blocks come in waves: those of one job close together and look alike. So a bet is on the mean over a batch of
blocks, which is one observation however alike they are. It is as fair as a bet on each, and slower.

Evidence is gathered by Shiryaev-Roberts, R = (1 + R) · bet after every batch: R grows by at most 1 a batch on average
as long as nothing changes, so to wait for R ≥ c is to wait for c batches, at least, on average (Vovk, Petej,
Nouretdinov et al., Retrain or not retrain: conformal test martingales for change-point detection, 2021). A long quiet
time does not make it slow. A mean over several fixed bets is such an R as well.

No clock and no chance: ties are broken by a hash of the block's place, so the answer is a function of the partition's
events, whatever batches, instances and restarts. For the same reason sums are added up block by block.
"""

import hashlib
import json
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from consumer.names import Names, digest_of, mix
from consumer.records import DriftState, Question
from consumer.settings import DriftSettings
from consumer.threshold import Threshold
from model.jit import njit

EDGES: NDArray[np.float64] = np.round(2.0 ** (np.arange(-24, 25) / 4), 4) + 5e-5
"""Where one score level ends and the next begins, in nats: quarter octaves from 1/64 to 64, half-way between the grid
points on which exact scores lie. Fixed, since levels chosen by the data would not be exchangeable."""

MEANING: dict[Question, str] = {
    "tail": "more of them alert than the threshold promises and drift.failing_share allows",
    "body": "those that stay silent no longer score like the calibration blocks",
}
"""What an alarm says, for people."""

_TILTS = (-2.0, -1.0, 1.0, 2.0)
"""Bets 1 + e·(p - 1/2), p averaged, on scores that are higher (e < 0) or lower than they were."""

_SPREADS = (-0.45, 0.45)
"""Bets 1 + e·(12·(p - 1/2)² - 1), averaged, on scores that crowd in the middle (e < 0) or at both ends."""

_STAKES = (0.03, 0.1, 0.3, 0.6)
"""Bets 1 + s·(x / rate - 1), x the share of blocks that alert: from a little too many alerts to a flood."""


def levels(scores: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the level of each score (N,): the number of `EDGES` below it."""
    return np.searchsorted(EDGES, scores).astype(np.uint8)


class DriftTest:
    """What is asked, the same of every partition.

    Args:
        threshold: whose promise is tested; brings the calibration scores.
        settings: which share of blocks may fail in nature, and how rarely to be wrong.
    """

    def __init__(self, threshold: Threshold, settings: DriftSettings) -> None:
        scores = np.array(threshold.scores)
        silent = scores <= threshold.threshold
        reference = np.bincount(levels(scores[silent]), np.array(threshold.counts)[silent], len(EDGES) + 1)
        # The threshold is the highest of them by its making, so that one is no draw like the others.
        reference[levels(np.array([threshold.threshold]))] -= 1
        self.reference = np.maximum(reference, 0).astype(np.int64)
        self.rate = min(1.0, threshold.bound + settings.failing_share)
        self.batch = settings.batch
        self.limit = 2.0 * settings.false_alarm_every / settings.batch  # 2: so that both questions keep the promise

    def tail_bets(self, share: float) -> list[float]:
        """Return the factors with which a batch, of whose blocks `share` alerted, multiplies each R of `tail`."""
        return [1 + stake * (share / self.rate - 1) for stake in _STAKES]

    @staticmethod
    def body_bets(tilt: float, spread: float) -> list[float]:
        """Return the factors with which a batch multiplies each R of `body`, by its mean deviations."""
        return [1 + factor * tilt for factor in _TILTS] + [1 + factor * spread for factor in _SPREADS]


class Drift:
    """The test of one partition. `state` is all that it knows, and is what a successor goes on with."""

    def __init__(self, test: DriftTest, state: DriftState) -> None:
        self._test = test
        self.state = state
        state.counts = state.counts or [0] * len(test.reference)
        state.tail = state.tail or [0.0] * len(_STAKES)
        state.body = state.body or [0.0] * (len(_TILTS) + len(_SPREADS))
        self._counts = test.reference + np.array(state.counts, np.int64)

    @property
    def alarm(self) -> Question | None:
        """The question that was answered with no, from then on; None as long as the threshold means what it says."""
        return self.state.alarm

    def evidence(self) -> dict[Question, float]:
        """Return how far each question is on its way to an alarm, which comes at 1."""
        return {"tail": self._mean(self.state.tail), "body": self._mean(self.state.body)}

    def take(self, levels: NDArray[np.uint8], alerted: NDArray[np.bool_], draws: NDArray[np.float64]) -> bool:
        """Take in blocks that closed; say whether one raised the alarm. After an alarm nothing changes any more.

        Args:
            levels: (N,) of the highest score of each, in the order in which they closed.
            alerted: (N,) whether it ever alerted.
            draws: (N,) in [0, 1), which break ties; see `draws`.
        """
        state, size = self.state, self._test.batch
        begin = 0
        while begin < len(levels) and state.alarm is None:
            end = min(len(levels), begin + size - state.blocks % size)
            part = slice(begin, end)
            state.batch_tilt, state.batch_spread = _count_in(
                self._counts, levels[part], alerted[part], draws[part], state.batch_tilt, state.batch_spread
            )
            alerting = int(np.count_nonzero(alerted[part]))
            state.blocks += end - begin
            state.alerting += alerting
            state.batch_alerting += alerting
            if state.blocks % size == 0:
                self._end_batch()
            begin = end
        state.counts = (self._counts - self._test.reference).tolist()
        return begin > 0 and state.alarm is not None

    def _end_batch(self) -> None:
        state, size = self.state, self._test.batch
        state.tail = _gathered(state.tail, self._test.tail_bets(state.batch_alerting / size))
        silent = size - state.batch_alerting
        if silent:
            state.body = _gathered(
                state.body, self._test.body_bets(state.batch_tilt / silent, state.batch_spread / silent)
            )
        state.batch_alerting, state.batch_tilt, state.batch_spread = 0, 0.0, 0.0
        evidence = self.evidence()
        state.alarm = next((question for question in evidence if evidence[question] >= 1), None)

    def _mean(self, gathered: list[float]) -> float:
        return sum(gathered) / len(gathered) / self._test.limit


def _gathered(evidence: list[float], bets: list[float]) -> list[float]:
    return [(1 + before) * bet for before, bet in zip(evidence, bets, strict=True)]


def draws(blocks: Names, first_offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return for each block (N,), of that name and first offset, a number in [0, 1).

    As good as random, and always the same. Nothing secret is in it, unlike in the hashes of an index.
    """
    drawn = np.empty(len(blocks))
    _draw(*blocks.columns(), first_offsets, drawn)
    return drawn


@njit(cache=True)
def _draw(data, begins, sizes, first_offsets, drawn):
    for i in range(len(begins)):
        digest = mix(digest_of(data, begins[i], sizes[i], 0), first_offsets[i])
        drawn[i] = np.float64(digest >> np.uint64(11)) / 2.0**53


@njit(cache=True)
def _count_in(counts, levels, alerted, draws, tilt, spread):
    """Count silent blocks in, one by one, and add the deviations of their p-values to the sums; return these."""
    for i in range(len(levels)):
        if not alerted[i]:
            level = levels[i]
            counts[level] += 1
            # The smoothed conformal p-value.
            aside, apart = deviation((counts[level + 1 :].sum() + draws[i] * counts[level]) / counts.sum())
            tilt += aside
            spread += apart
    return tilt, spread


@njit(cache=True)
def deviation(p_value):
    """Return how far a p-value is to one side, and how far from the middle; both are 0 on average if uniform."""
    off = p_value - 0.5
    return off, 12 * off * off - 1


def judge_id(threshold: Threshold, settings: DriftSettings) -> bytes:
    """Return the 8 bytes that name what alerts depend on beside the events: model, threshold, drift settings."""
    test = [len(EDGES), _TILTS, _SPREADS, _STAKES]
    facts = [asdict(threshold), settings.model_dump(mode="json"), test]  # the threshold names its model
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).digest()
