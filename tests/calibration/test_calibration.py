import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.block_scores import block_scores
from calibration.calibrate import calibrate, usable_levels
from calibration.quantile import blocks_needed, conformal_quantile
from consumer.threshold import Threshold
from model.bundle import Bundle
from model.errors import UserError
from model.network import Autoencoder, Shape
from model.scoring import Scorer
from model.sessions import Session
from model.vocabulary import BOS, END, PAD, Vocabulary

scores = st.lists(st.integers(0, 12).map(float), min_size=1, max_size=60).map(np.array)
quantiles = st.sampled_from([0.05, 0.5, 0.8, 0.9, 0.95, 0.99])


@given(scores, quantiles)
def test_the_quantile_is_the_ranked_score_of_its_definition(values, q):
    exact = Fraction(str(q))
    rank = next(k for k in range(1, len(values) + 2) if k >= (len(values) + 1) * exact)
    if rank > len(values):
        with pytest.raises(UserError, match=f"{blocks_needed(q):,}"):
            conformal_quantile(values, q)
    else:
        found = conformal_quantile(values, q)
        assert found.value == sorted(values)[rank - 1]
        assert found.above == sum(values > found.value)


@given(scores.filter(lambda values: len(values) > 1), quantiles)
def test_the_promise_holds_for_exchangeable_scores(values, q):
    """Each of n + 1 scores in turn is the new one: the share that alerts is at most the bound, ties or not."""
    if len(values) - 1 < blocks_needed(q):
        return
    alerts = 0
    for place, new in enumerate(values):
        limit = conformal_quantile(np.delete(values, place), q)
        alerts += new > limit.value
    assert alerts / len(values) <= limit.bound <= 1 - q + 1e-12


@pytest.mark.parametrize(("q", "needed"), [(0.5, 1), (0.95, 19), (0.99, 99), (0.999, 999), (0.9995, 1999)])
def test_the_blocks_needed_are_the_fewest_that_do(q, needed):
    assert blocks_needed(q) == needed
    conformal_quantile(np.arange(float(needed)), q)
    with pytest.raises(UserError, match=f"{needed:,}"):
        conformal_quantile(np.arange(float(needed - 1)) if needed > 1 else np.array([]), q)


@pytest.fixture(scope="module")
def scorer():
    torch.manual_seed(5)
    vocabulary = Vocabulary(tuple("abc"))
    return Scorer(Bundle(Autoencoder(Shape(len(vocabulary), 4, 16, 2, 1, 16)).eval(), vocabulary))


sessions = st.lists(
    st.lists(st.sampled_from(["a", "b", "c", "new"]), min_size=1, max_size=9).map(
        lambda events: Session("same name", tuple(events))
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(sessions, st.integers(1, 3))
def test_block_scores_are_the_highest_look_of_each_session(scorer, some, every):
    found = block_scores(some, scorer, every=every)
    for session, looks, block, length in zip(some, found.looks, found.blocks, found.lengths, strict=True):
        tokens = scorer.bundle.vocabulary.encode(session.events)
        windows = [[BOS, *tokens[max(0, end - 4) : end]] for end in range(every, len(tokens) + 1, every)]
        windows.append([BOS, *tokens[-4:], END])
        plain = [scorer.explain(np.array(row + [PAD] * (6 - len(row)), np.uint16)).score for row in windows]
        assert looks.tolist() == plain
        assert block == max(plain)
        assert length == len(tokens)


@pytest.fixture(scope="module")
def threshold(scorer):
    values = np.array([0.5, 1.0, 1.0, 2.0, 3.0])
    return calibrate(values, scorer, quantile=0.8, every=2, idle_timeout_ms=1000)


def test_levels_are_thresholds_of_their_own(scorer):
    values = np.arange(1000.0)
    found = calibrate(
        values, scorer, quantile=0.9, every=1, idle_timeout_ms=1, levels={"critical": 0.999, "major": 0.99}
    )
    assert [(level.name, level.threshold) for level in found.levels] == [
        ("minor", conformal_quantile(values, 0.9).value),
        ("major", conformal_quantile(values, 0.99).value),
        ("critical", conformal_quantile(values, 0.999).value),
    ]
    assert [level.certificate.q for level in found.levels] == [0.9, 0.99, 0.999]
    assert [level.expected_alerts_per_million for level in found.levels] == [99_000, 9_000, 0]
    minor, major, critical = (level.threshold for level in found.levels)
    ranks = [(minor, 0), (minor + 0.1, 1), (major, 1), (major + 0.1, 2), (critical, 2), (critical + 0.1, 3)]
    assert [found.rank(score) for score, _ in ranks] == [rank for _, rank in ranks]


def test_levels_without_enough_blocks_or_below_the_quantile_are_left_out_and_named():
    usable, reasons = usable_levels({"low": 0.95, "major": 0.99, "critical": 0.999}, 0.95, 200)
    assert usable == {"major": 0.99}
    assert "low" in reasons[0]
    assert "not above 0.95" in reasons[0]
    assert "critical" in reasons[1]
    assert "999" in reasons[1]


def test_a_threshold_says_what_it_rests_on(threshold, scorer):
    assert threshold.threshold == 3.0
    assert (threshold.blocks, threshold.window, threshold.every) == (5, 4, 2)
    assert threshold.model == scorer.bundle.fingerprint
    assert threshold.bound == threshold.certificate.bound == pytest.approx(1 / 6)
    assert threshold.expected_alerts_per_million == 0
    assert (threshold.scores, threshold.counts) == ((0.5, 1.0, 2.0, 3.0), (1, 2, 1, 1))


@pytest.mark.parametrize(("score", "as_high"), [(0.1, 5), (0.5, 5), (0.7, 4), (1.0, 4), (1.5, 2), (3.0, 1), (9.0, 0)])
def test_p_values_count_the_blocks_that_score_as_high(threshold, score, as_high):
    assert threshold.p_value(score) == (1 + as_high) / 6


def test_a_threshold_comes_back_as_it_was_with_its_plain_files(threshold, tmp_path):
    path = tmp_path / "deep" / "threshold.json"
    threshold.save(path)
    assert Threshold.load(path) == threshold
    assert float((path.parent / "anomaly_threshold.txt").read_text()) == 3.0
    assert (path.parent / "anomaly_strategy.txt").read_text() == "max\n"
    assert len(list(path.parent.iterdir())) == 3
    link = tmp_path / "current.json"
    link.symlink_to(path)
    path.write_text("{}")
    threshold.save(link)
    assert link.is_symlink()
    assert Threshold.load(path) == threshold


@pytest.mark.parametrize(
    ("every", "idle", "said"), [(1, 1000, "scoring.every 2, but it is 1"), (2, 5, "windows.idle_timeout 1000 ms")]
)
def test_a_threshold_made_under_other_settings_is_refused(threshold, scorer, tmp_path, every, idle, said):
    with pytest.raises(UserError, match=said) as caught:
        threshold.check(scorer.bundle, every=every, idle_timeout_ms=idle, path=tmp_path / "threshold.json")
    assert "python -m calibration" in str(caught.value)
    threshold.check(scorer.bundle, every=2, idle_timeout_ms=1000, path=tmp_path)


def test_a_file_of_format_1_is_refused_in_a_sentence(threshold, tmp_path):
    path = tmp_path / "threshold.json"
    threshold.save(path)
    old = json.loads(path.read_text()) | {"format": 1}
    for name in ("levels", "certificate", "blocks_per_day"):
        del old[name]
    path.write_text(json.dumps(old))
    with pytest.raises(UserError, match="not a threshold file of this version; make one with: python -m calibration"):
        Threshold.load(path)


def test_the_file_repeats_the_base_level_for_simple_readers(threshold, tmp_path):
    path = tmp_path / "threshold.json"
    threshold.save(path)
    raw = json.loads(path.read_text())
    (minor,) = raw["levels"]
    assert minor["name"] == "minor"
    for name in ("threshold", "quantile", "certificate", "expected_alerts_per_million"):
        assert raw[name] == minor[name]
    assert set(raw["certificate"]) == {"n", "q", "bound", "confidence", "interval"}
    assert raw["bound"] == raw["certificate"]["bound"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 9}', '"x"'])
def test_what_is_no_threshold_file_is_refused(tmp_path, text):
    path = tmp_path / "threshold.json"
    path.write_text(text)
    with pytest.raises(UserError, match="python -m calibration"):
        Threshold.load(path)


def test_a_changed_threshold_file_is_refused(threshold, tmp_path):
    path = tmp_path / "threshold.json"
    threshold.save(path)
    whole = json.loads(path.read_text())
    for change in ({"counts": [1, 1, 1, 1]}, {"threshold": 2.0}, {"levels": []}, {"certificate": None}):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match="damaged"):
            Threshold.load(path)
    with pytest.raises(UserError, match="no threshold there"):
        Threshold.load(tmp_path / "none.json")
