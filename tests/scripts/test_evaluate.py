"""The reported measures against plain arithmetic on the same block scores."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibration.block_scores import block_scores
from calibration.calibrate import calibrate
from model.bundle import Bundle
from model.network import Autoencoder, Shape
from model.scoring import Scorer
from model.sessions import Session
from model.vocabulary import Vocabulary
from scripts.baselines import CountVectors, NewEvents
from scripts.evaluate import baselines, delay_limit, evaluate, strategies


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(3)
    random = np.random.default_rng(3)
    vocabulary = Vocabulary(("a", "b", "c"))
    scorer = Scorer(Bundle(Autoencoder(Shape(len(vocabulary), 5, 16, 2, 1, 16)).eval(), vocabulary))

    def sessions(count, events, anomalous):
        return [
            Session(f"s{number}", tuple(random.choice(events, random.integers(1, 9))), anomalous)
            for number in range(count)
        ]

    held_out, normal = sessions(300, ["a", "b"], None), sessions(80, ["a", "b"], False)
    anomalous = sessions(60, ["a", "b", "c", "new"], True)
    scores = block_scores(held_out, scorer, every=1).blocks
    threshold = calibrate(scores, scorer, quantile=0.95, every=1, idle_timeout_ms=1)
    return normal, anomalous, scorer, threshold, scores


def test_measures_at_each_quantile(parts):
    normal, anomalous, scorer, threshold, calibration = parts
    prior = 0.1
    result = evaluate(normal, anomalous, scorer, threshold, prior)
    healthy = block_scores(normal, scorer, every=1).blocks
    failing = block_scores(anomalous, scorer, every=1).blocks
    pairs = (failing[:, None] > healthy).mean() + 0.5 * (failing[:, None] == healthy).mean()
    assert result["auc"] == pytest.approx(pairs)
    for at in result["at"]:
        rank = int(np.ceil(301 * at["q"] - 1e-9))
        if rank > 300:
            assert at["threshold"] is None
            continue
        limit = np.sort(calibration)[rank - 1]
        assert at["threshold"] == limit
        alarms, recall = (healthy > limit).mean(), (failing > limit).mean()
        precision = prior * recall / (prior * recall + (1 - prior) * alarms)
        assert at["false_alarm_rate"] == pytest.approx(alarms)
        assert at["recall"] == pytest.approx(recall)
        assert at["precision"] == pytest.approx(precision)
        assert at["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
        assert at["true_positives"] + at["false_negatives"] == 60
    assert result["best_f1"] >= max(at["f1"] for at in result["at"] if at["f1"] is not None)
    assert 0.95 in {at["q"] for at in result["at"] if at["threshold"] is not None}


def test_the_delay_counts_events_up_to_the_first_alert(parts):
    normal, anomalous, scorer, threshold, _ = parts
    result = evaluate(normal, anomalous, scorer, threshold, 0.1)
    delay = result["delay"]
    assert next(at["delay"] for at in result["at"] if at["q"] == threshold.quantile) == delay
    shares_by_q = [at["delay"]["median_fraction"] for at in result["at"] if at["delay"] and at["true_positives"]]
    assert len(shares_by_q) > 1
    assert all(0 < share <= 1 for share in shares_by_q)
    events, shares = [], []
    for session in anomalous:
        tokens = scorer.bundle.vocabulary.encode(session.events)
        looks = [(tokens[max(0, end - 5) : end], False, end) for end in range(1, len(tokens) + 1)]
        looks.append((tokens[-5:], True, len(tokens)))
        for shown, closing, seen in looks:
            row = [1, *shown, *([2] if closing else [])]
            if scorer.explain(np.array(row + [0] * (7 - len(row)), np.uint16)).score > threshold.threshold:
                events.append(seen)
                shares.append(seen / len(tokens))
                break
    assert delay["median_events"] == np.median(events)
    assert delay["median_fraction"] == pytest.approx(np.median(shares))


def test_baselines_against_plain_arithmetic():
    training = sessions("aab", "aab", "abb", "a")
    weight = {"a": np.log(5 / 5) + 1, "b": np.log(5 / 4) + 1, "?": np.log(5) + 1}
    known = [{"a": 2, "b": 1}, {"a": 1, "b": 2}, {"a": 1, "b": 0}]

    def nearest(text):
        counts = {"a": text.count("a"), "b": text.count("b")}
        new = len(text) - sum(counts.values())
        return new * weight["?"] + min(sum(weight[e] * abs(counts[e] - row[e]) for e in "ab") for row in known)

    texts = ["aab", "aba", "aabb", "bbbb", "aabz", "zy", "a", "ab"]
    assert CountVectors(training).scores(sessions(*texts)) == pytest.approx([nearest(text) for text in texts])
    assert NewEvents(training).scores(sessions("ab", "azb", "zzy")).tolist() == [0, 1, 3]


def test_baselines_report_what_the_model_reports(parts):
    normal, anomalous, scorer, threshold, _ = parts
    model = evaluate(normal, anomalous, scorer, threshold, 0.1)
    for measures in baselines(normal[:40], normal[40:], normal, anomalous, 0.1).values():
        assert measures.keys() <= model.keys()
        assert measures["auc"] > 0.5
        assert [at["q"] for at in measures["at"]] == [at["q"] for at in model["at"]]


def test_strategies_are_compared_under_the_same_sessions(parts):
    normal, anomalous, scorer, threshold, _ = parts
    found = strategies(normal[:40], normal[40:], anomalous, scorer, threshold.every, 0.1)
    assert found.keys() == {"max", "mean", "topk"}
    for strategy, measures in found.items():
        pooled = Scorer(scorer.bundle, strategy)
        healthy, failing = (block_scores(some, pooled, every=1).blocks for some in (normal[40:], anomalous))
        pairs = (failing[:, None] > healthy).mean() + 0.5 * (failing[:, None] == healthy).mean()
        assert measures["auc"] == pytest.approx(pairs)


def sessions(*texts):
    return [Session(text, tuple(text), None) for text in texts]


def test_the_delay_limit_is_where_a_block_first_parts_from_all_normal_ones():
    normal = sessions("abcd", "abdd")
    limit = delay_limit(normal, sessions("abxx", "ab", "abddd", "xa"))  # at 3 of 4, at the close, 5 of 5, 1 of 2
    assert limit == {"median_fraction": pytest.approx((0.75 + 1) / 2), "only_at_close": 0.25}


_TEXTS = st.lists(st.text("abc", min_size=1, max_size=8), min_size=1, max_size=8)


@given(_TEXTS, _TEXTS)
def test_the_delay_limit_against_all_beginnings(normal, anomalous):
    beginnings = {text[:end] for text in normal for end in range(len(text) + 1)}
    parted = [
        next((end for end in range(1, len(text) + 1) if text[:end] not in beginnings), None) for text in anomalous
    ]
    fractions = [1.0 if end is None else end / len(text) for end, text in zip(parted, anomalous, strict=True)]
    assert delay_limit(sessions(*normal), sessions(*anomalous)) == {
        "median_fraction": np.median(fractions),
        "only_at_close": parted.count(None) / len(parted),
    }


def test_the_delay_limit_of_long_sessions_needs_memory_for_each_event_once():
    tracemalloc.start()
    long = sessions("ab" * 2000)
    assert delay_limit(long, long) == {"median_fraction": 1.0, "only_at_close": 1.0}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000
