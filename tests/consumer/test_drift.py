"""The test for drift: silent as long as nothing changes, at the rate that it states, quick when something does."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.quantile import conformal_quantile
from consumer.drift import EDGES, Drift, DriftTest, deviation, draws, judge_id, levels
from consumer.events import EventBatch
from consumer.names import Names
from consumer.records import DriftState
from consumer.scores import LookScores
from consumer.settings import DriftSettings
from consumer.threshold import Certificate, Level
from consumer.windows import WindowStore
from model.scoring import GRID, SCREEN_NOISE

DEFAULTS = DriftSettings(batch=100)


@pytest.fixture(scope="module")
def promise(make_threshold):
    """Return a threshold, as calibration would make it of these scores."""

    def make(scores, q=0.9):
        limit = conformal_quantile(scores, q)
        values, counts = np.unique(scores, return_counts=True)
        certificate = Certificate(len(scores), q, limit.bound, 0.95, (0.0, 1.0))
        return dataclasses.replace(
            make_threshold(limit.value), levels=(Level("minor", q, limit.value, 0, certificate),), blocks=len(scores),
            scores=tuple(values.tolist()), counts=tuple(counts.tolist()),
        )  # fmt: skip

    return make


def scores_of(random, count):
    """Heavy-tailed scores in atoms, as real ones are."""
    return np.round(np.exp(random.normal(-3, 1, count).round(1)), 4)


def fresh(threshold, options=DEFAULTS):
    return Drift(DriftTest(threshold, options), DriftState(judge_id(threshold, options), 0))


def run(drift, scores, limit, salt=""):
    """Feed blocks; return after how many the alarm came, None if it did not."""
    before = drift.state.blocks
    alarmed = drift.take(levels(scores), scores > limit, drawn(len(scores), salt))
    return drift.state.blocks - before if alarmed else None


def drawn(count, salt=""):
    return draws(Names.of([salt.encode()] * count), np.arange(count))


def test_levels_part_the_grid_and_never_lie_on_it():
    assert (np.diff(EDGES) > 10 * GRID).all()
    assert np.allclose(EDGES / GRID % 1, 0.5)
    assert levels(np.array([0.0, 1.0, 1e9])).tolist() == [0, int((EDGES < 1).sum()), len(EDGES)]


def test_every_bet_is_fair(promise):
    """The mean over uniform p-values is 1, and over blocks that alert at the allowed rate; no factor is below 0."""
    test = DriftTest(promise(np.arange(1, 101) / 10), DEFAULTS)
    grid = (np.arange(10_000) + 0.5) / 10_000
    factors = np.array([test.body_bets(*deviation(p)) for p in grid])
    assert np.allclose(factors.mean(0), 1)
    assert (factors > 0).all()
    hit, miss = np.array(test.tail_bets(1)), np.array(test.tail_bets(0))
    assert np.allclose(test.rate * hit + (1 - test.rate) * miss, 1)
    assert np.allclose(test.tail_bets(test.rate), 1)
    assert (miss > 0).all()
    assert (hit > 1).all(), "at a lower rate than the allowed one the mean is less than 1"


def test_p_values_are_uniform_and_independent_as_long_as_nothing_changes(promise):
    values = []
    for seed in range(40):
        random = np.random.default_rng(seed)
        threshold = promise(scores_of(random, 60), 0.95)
        drift, sums = fresh(threshold, DriftSettings(batch=1000)), [0.0]
        scores = scores_of(random, 100)
        for score, draw in zip(scores[scores <= threshold.threshold], drawn(100, str(seed)), strict=False):
            drift.take(levels(np.array([score])), np.array([False]), np.array([draw]))
            sums.append(drift.state.batch_tilt)
        values.append(np.diff(sums) + 0.5)
    flat = np.concatenate(values)
    assert np.abs(np.histogram(flat, 10, (0, 1))[0] / len(flat) - 0.1).max() < 0.02
    pairs = np.array([pair for seen in values for pair in itertools.pairwise(seen)])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.05


@pytest.mark.parametrize("batch", [1, 5])
def test_false_alarms_are_as_rare_as_stated(promise, batch):
    """The mean time to an alarm, nothing changed, is at least `false_alarm_every`: here with the tightest null."""
    options = DriftSettings(failing_share=0, false_alarm_every=200, batch=batch)
    alarms = blocks = 0
    for seed in range(150):
        random = np.random.default_rng(seed)
        threshold = promise(scores_of(random, 400))
        drift = fresh(threshold, options)
        run(drift, scores_of(random, 600), threshold.threshold, salt=str(seed))
        alarms += drift.alarm is not None
        blocks += drift.state.blocks
    assert alarms > 40, "else this shows nothing"
    assert blocks / alarms > 200


def test_a_natural_share_of_failing_blocks_is_no_alarm_and_a_flood_is_one(promise):
    random = np.random.default_rng(5)
    threshold = promise(scores_of(random, 2000), 0.99)
    scores = scores_of(random, 20_000)
    scores[random.random(len(scores)) < 0.03] = 9.0
    drift = fresh(threshold)
    assert run(drift, scores, threshold.threshold) is None
    after = run(drift, np.full(1000, 9.0), threshold.threshold, salt="new")
    assert after <= 800
    assert drift.alarm == "tail"


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_silent_blocks_that_score_otherwise_are_an_alarm(promise, factor):
    random = np.random.default_rng(6)
    threshold = promise(scores_of(random, 2000), 0.99)
    drift = fresh(threshold)
    assert run(drift, scores_of(random, 5000), threshold.threshold) is None
    after = run(drift, np.minimum(scores_of(random, 5000) * factor, threshold.threshold), threshold.threshold, "new")
    assert after < 3000
    assert drift.alarm == "body"


def test_waves_of_like_blocks_are_no_change_unless_they_last(promise):
    """Blocks that look alike come together, a wave of these and then of those: all in all what calibration saw."""
    random = np.random.default_rng(9)
    threshold = promise(scores_of(random, 2000), 0.95)
    scores = np.concatenate([np.sort(scores_of(random, 200)) for _ in range(50)])
    hasty = DriftSettings(batch=1)
    assert run(fresh(threshold, hasty), scores, threshold.threshold) is not None
    assert run(fresh(threshold), scores, threshold.threshold) is None


def test_after_an_alarm_nothing_changes(promise):
    threshold = promise(scores_of(np.random.default_rng(7), 200))
    drift = fresh(threshold)
    run(drift, np.full(1000, 9.0), threshold.threshold)
    before = drift.state.pack()
    assert drift.evidence()["tail"] >= 1
    assert run(drift, np.full(100, 0.01), threshold.threshold) is None
    assert drift.state.pack() == before


@settings(max_examples=50, deadline=None)
@given(st.randoms(use_true_random=False), st.lists(st.integers(0, 300), max_size=8))
def test_a_stored_state_goes_on_as_if_nothing_had_happened(promise, random, cuts):
    """However the blocks are cut into calls, and whoever goes on: to the last bit as if they came one by one."""
    numbers = np.random.default_rng(random.randrange(2**32))
    threshold = promise(scores_of(numbers, 100))
    scores = scores_of(numbers, 300) * random.choice([1, 3])
    options = DriftSettings(false_alarm_every=1000, batch=10)
    columns = levels(scores), scores > threshold.threshold, numbers.random(300)
    test, plain = DriftTest(threshold, options), fresh(threshold, options).state
    record, alarms = plain.pack(), 0
    for begin, end in itertools.pairwise([0, *sorted(cuts), 300]):
        drift = Drift(test, DriftState.unpack(record))
        alarms += drift.take(*(column[begin:end] for column in columns))
        record = drift.state.pack()
    for block in zip(*(column.tolist() for column in columns), strict=True):
        take_plainly(test, plain, *block)
    assert record == plain.pack()
    assert alarms == (plain.alarm is not None)
    assert len(record) < 1000


def take_plainly(test, state, level, alerted, draw):
    """One block, in plain Python."""
    if state.alarm:
        return
    state.blocks += 1
    if alerted:
        state.alerting += 1
        state.batch_alerting += 1
    else:
        state.counts[level] += 1
        counts = [sum(pair) for pair in zip(test.reference.tolist(), state.counts, strict=True)]
        off = (sum(counts[level + 1 :]) + draw * counts[level]) / sum(counts) - 0.5
        state.batch_tilt += off
        state.batch_spread += 12 * off * off - 1
    if state.blocks % test.batch == 0:
        bets = test.tail_bets(state.batch_alerting / test.batch)
        state.tail = [(1 + before) * bet for before, bet in zip(state.tail, bets, strict=True)]
        silent = test.batch - state.batch_alerting
        if silent:
            bets = test.body_bets(state.batch_tilt / silent, state.batch_spread / silent)
            state.body = [(1 + before) * bet for before, bet in zip(state.body, bets, strict=True)]
        state.batch_alerting, state.batch_tilt, state.batch_spread = 0, 0.0, 0.0
        for question, gathered in (("body", state.body), ("tail", state.tail)):
            if sum(gathered) / len(gathered) / test.limit >= 1:
                state.alarm = question


PLACES = {
    "offsets that follow one another": lambda count: ([b"blk_1"] * count, np.arange(count)),
    "names that follow one another": lambda count: ([b"blk_%d" % number for number in range(count)], np.zeros(count)),
    "both": lambda count: ([b"blk_%d" % number for number in range(count)], 22 * np.arange(count)),
    "names that differ in one character": lambda count: (
        [b"%c%c-%07d" % (33 + number % 64, 33 + number // 64 % 64, number // 4096) for number in range(count)],
        np.full(count, 2**40),
    ),
}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_draws_are_uniform_and_independent(places):
    count = 200_000
    names, first_offsets = places(count)
    values = draws(Names.of(names), np.asarray(first_offsets, np.int64))
    assert ((values >= 0) & (values < 1)).all()
    assert len(np.unique(values)) == count
    cells = 16
    for lag in (1, 2, 64):
        pairs = np.histogram2d(values[:-lag], values[lag:], cells, ((0, 1), (0, 1)))[0]
        expected = (count - lag) / cells**2
        # A sum of 256 squares: 255 on average, with a deviation of 23.
        assert ((pairs - expected) ** 2 / expected).sum() < 255 + 4 * 23


def test_draws_are_the_same_in_every_process():
    names = Names.of([b"blk_-1608999687919862906", "Blöck".encode(), b"blk_-1608999687919862906"])
    numbers = draws(names, np.array([0, 2**40, 1])) * 2.0**53
    assert numbers.astype(int).tolist() == [6071391934917566, 7193325085199573, 4619068903974971]
    assert draws(names.take(slice(1, 2)), np.array([2**40])) * 2.0**53 == numbers[1]


def test_the_record_of_a_long_stream_is_small(promise):
    threshold = promise(scores_of(np.random.default_rng(7), 200))
    state = DriftState(b"12345678", 2**50, 2**40, 2**40, [2**40] * (len(EDGES) + 1))
    state = Drift(DriftTest(threshold, DEFAULTS), state).state
    assert len(state.pack()) < 1000


def test_the_judge_changes_with_model_threshold_and_settings(promise):
    threshold = promise(scores_of(np.random.default_rng(7), 200))
    others = [
        (dataclasses.replace(threshold, levels=(dataclasses.replace(threshold.levels[0], threshold=9.9),)), DEFAULTS),
        (dataclasses.replace(threshold, model="0" * 64), DEFAULTS),
        (threshold, DriftSettings(failing_share=0.1)),
        (threshold, DriftSettings(enabled=False)),
    ]
    ids = {judge_id(*pair) for pair in [*others, (threshold, DEFAULTS), (dataclasses.replace(threshold), DEFAULTS)]}
    assert len(ids) == 5
    assert {len(name) for name in ids} == {8}


def test_screened_scores_have_the_levels_of_exact_ones(varied_scorer):
    """Whatever float32 makes of a score next to an edge."""
    store = WindowStore(window=6, every=1, idle_timeout=10**9)
    random = np.random.default_rng(8)
    count = 3000
    batch = EventBatch.of(
        [f"b{random.integers(400)}" for _ in range(count)], random.integers(4, 8, count).tolist(),
        [0] * count, list(range(count)),
    )  # fmt: skip

    class Noisy:
        """As far off as is allowed for; half of the windows are worth just less than an edge, or just more."""

        screened = 0
        bundle = varied_scorer.bundle

        def exact(self, rows):
            scores, kind = varied_scorer.exact(rows), rows.sum(axis=1) % 4
            beside = EDGES[levels(scores)] + np.where(kind == 0, -5e-5, 5e-5)
            return np.where(kind < 2, beside, scores).round(4)

        def screen(self, rows):
            self.screened += len(rows)
            return self.exact(rows) + random.choice([-0.9, 0.9], len(rows)) * SCREEN_NOISE

        def judge(self, rows):
            yield SimpleNamespace(places=np.arange(len(rows)), scores=self.exact(rows))

    noisy = Noisy()
    scores = LookScores(noisy, 50.0, 10**6)
    for looks in store.apply(batch):
        assert (levels(scores.of(looks)) == levels(noisy.exact(looks.rows))).all()
    assert noisy.screened > 500
