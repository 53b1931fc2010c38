"""Scores against a plain oracle: one window at a time, float64, no padding, numpy pooling."""

import copy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.bundle import Bundle
from model.network import Autoencoder, Shape
from model.scoring import GRID, SCREEN_MARGIN, Scorer
from model.vocabulary import BOS, END, PAD, UNK, Vocabulary

WINDOW = 12


@pytest.fixture(scope="module")
def bundle():
    torch.manual_seed(11)
    vocabulary = Vocabulary(tuple("abcdef"))
    network = Autoencoder(Shape(len(vocabulary), WINDOW, 16, 4, 2, 32, tallied=4)).eval()
    with torch.no_grad():  # counts that are sometimes usual, sometimes not
        for weight in network.tally.parameters():
            weight.normal_(0, 0.3)
    network.tally.column[UNK:] = torch.tensor([4, 2, 4, 0, 4, 1, 3])
    network.tally.allowance.fill_(13.9)
    return Bundle(network, vocabulary)


looks = st.tuples(st.lists(st.integers(3, 9), min_size=1, max_size=WINDOW), st.booleans())


def rows_of(some):
    rows = np.full((len(some), WINDOW + 2), PAD, np.uint16)
    for row, (tokens, closing) in zip(rows, some, strict=True):
        shown = [BOS, *tokens, *([END] if closing else [])]
        row[: len(shown)] = shown
    return rows


def told(bundle, row):
    """The log-probabilities of each token after BOS (L, V), and what the counts add to each one shown (L,)."""
    tokens = torch.tensor(row[row != PAD].astype(np.int64))[None]
    network = copy.deepcopy(bundle.network).double()
    with torch.no_grad():
        logits = network(tokens)[0, 1:].numpy()
        excess = network.tally.excess(tokens).item()
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), excess * (tokens[0, 1:].numpy() == END)


def surprisals(bundle, row):
    logp, added = told(bundle, row)
    return added - logp[np.arange(len(logp)), row[1 : 1 + len(logp)]]


POOL = {"max": np.max, "mean": np.mean, "topk": lambda values: np.sort(values)[-3:].mean()}


@settings(max_examples=30, deadline=None)
@given(st.lists(looks, min_size=1, max_size=20), st.sampled_from(["max", "mean", "topk"]))
def test_scores_are_those_of_the_oracle(bundle, some, strategy):
    scorer, rows = Scorer(bundle, strategy), rows_of(some)
    expected = np.array([POOL[strategy](surprisals(bundle, row)) for row in rows])
    assert np.abs(scorer.exact(rows) - expected).max() <= GRID / 2 + 1e-9
    assert np.abs(scorer.screen(rows) - expected).max() < SCREEN_MARGIN / 100


@settings(max_examples=30, deadline=None)
@given(st.lists(looks, min_size=2, max_size=40), st.randoms())
def test_an_exact_score_depends_on_nothing_but_its_window(bundle, some, random):
    scorer, rows = Scorer(bundle), rows_of(some)
    alone = np.array([scorer.exact(row[None])[0] for row in rows])
    order = list(range(len(rows)))
    random.shuffle(order)
    assert np.array_equal(scorer.exact(rows)[order], scorer.exact(rows[order]))
    assert np.array_equal(scorer.exact(rows), alone)
    assert np.array_equal(np.round(alone / GRID), np.round(alone / GRID, 0))


@pytest.fixture(scope="module")
def even(bundle):
    """Where events stand means nothing, and four of them are one: what they are worth differs by noise only."""
    network = copy.deepcopy(bundle.network)
    with torch.no_grad():
        network.position.weight.zero_()
        network.token.weight[5:9] = network.token.weight[4]
    return Bundle(network, bundle.vocabulary)


def plainly(bundle, row, strategy):
    """Score, surprisals, offender, expected tokens with their shares, and whether the counts say more."""
    logp, added = told(bundle, row)
    own = -logp[np.arange(len(logp)), row[1 : 1 + len(logp)]]
    high = (own + added).round(9)
    offender = max(range(len(high)), key=lambda place: (high[place], -place))
    shown = row[1 + offender]
    falling = sorted(range(logp.shape[1]), key=lambda token: (-logp[offender, token].round(9), token))
    by_counts = falling[0] == shown and added[offender] > own[offender]
    expected = [token for token in falling if token != shown][:3]
    shares = [] if by_counts else np.exp(logp[offender, expected]).round(4).tolist()
    score = POOL[strategy](own + added).round(4)
    return score, tuple((own + added).round(4)), offender, tuple(zip(expected, shares, strict=False)), by_counts


@settings(max_examples=50, deadline=None)
@given(
    st.lists(looks, min_size=2, max_size=40),
    st.sampled_from(["bundle", "even"]),
    st.sampled_from(["max", "mean", "topk"]),
    st.randoms(),
)
def test_explanations_are_those_of_the_oracle_whatever_else_is_judged(request, some, name, strategy, random):
    bundle = request.getfixturevalue(name)
    scorer, rows = Scorer(bundle, strategy), rows_of(some)
    alone = [scorer.explain(row) for row in rows]
    order = list(range(len(rows)))
    random.shuffle(order)
    together = [None] * len(rows)
    for judged in scorer.judge(rows[order]):
        for index, place in enumerate(judged.places):
            together[order[place]] = judged.why(index)
            assert judged.scores[index] == together[order[place]].score
    assert together == alone
    for row, why in zip(rows, alone, strict=True):
        counts = bool(why.counts)
        assert (why.score, why.surprisals, why.offender, why.expected, counts) == plainly(bundle, row, strategy)


def test_of_two_events_that_noise_alone_tells_apart_the_first_one_offends(even):
    """In another batch the noise is another."""

    class Noisy(Autoencoder):
        def surprisals_of(self, tokens, logp):
            return super().surprisals_of(tokens, logp) + 1e-13 * torch.arange(tokens.shape[1])

    network = copy.deepcopy(even.network)
    network.__class__ = Noisy
    row = rows_of([([4, 5, 6, 7, 8, 4], False)])[0]
    why = Scorer(Bundle(network, even.vocabulary)).explain(row)
    assert len(set(why.surprisals)) == 1
    assert why.offender == 0


def test_an_explanation_names_the_counts_when_they_make_the_end_what_it_is(bundle):
    network = copy.deepcopy(bundle.network)
    network.tally.allowance.fill_(0)  # now every count is news
    network.bias.data[END] = 3  # and to end here is in order
    counts = network.tally.counts(torch.tensor([[BOS, 6, 6, 6, 4, END]]))
    assert counts.tolist() == [[3, 0, 1, 0, 0]]
    row = rows_of([([6, 6, 6, 4], True)])[0]
    why = Scorer(Bundle(network, bundle.vocabulary)).explain(row)
    assert why.offender == 4
    assert why.expected == ()
    assert 1 <= len(why.counts) <= 3
    assert {kind.token: kind.count for kind in why.counts}.items() <= {6: 3, 8: 0, 4: 1, 9: 0, None: 0}.items()
    assert [kind.surprisal for kind in why.counts] == sorted((kind.surprisal for kind in why.counts), reverse=True)
    open_row = rows_of([([6, 6, 6, 4], False)])[0]
    assert Scorer(bundle).explain(open_row).counts == ()
    network.bias.data[END] = -1  # something else was likelier here: the block should have gone on
    why = Scorer(Bundle(network, bundle.vocabulary)).explain(row)
    assert (why.offender, why.counts, len(why.expected)) == (4, (), 3)


def test_many_windows_of_all_lengths_come_back_in_their_places(bundle):
    random = np.random.default_rng(0)
    some = [
        (random.integers(3, 10, random.integers(1, WINDOW + 1)).tolist(), bool(random.integers(2))) for _ in range(5000)
    ]
    scorer, rows = Scorer(bundle), rows_of(some)
    scores = scorer.screen(rows)
    for place in random.integers(0, 5000, 50):
        assert scores[place] == pytest.approx(surprisals(bundle, rows[place]).max(), abs=1e-3)


def test_a_large_vocabulary_makes_smaller_passes_not_larger_memory():
    vocabulary = Vocabulary(tuple(f"e{number}" for number in range(30_000)))
    network = Autoencoder(Shape(len(vocabulary), WINDOW, 4, 1, 1, 4)).eval()
    passes = []
    network.register_forward_hook(lambda *arguments: passes.append(arguments[-1].numel()))
    rows = np.tile(rows_of([([4, 5, 6], False)]), (300, 1))
    scorer = Scorer(Bundle(network, vocabulary))
    scores = scorer.exact(rows)
    assert len(passes) > 1
    assert max(passes) <= 2**26
    assert np.ptp(scores) == 0
    assert np.abs(scorer.screen(rows) - scores).max() < SCREEN_MARGIN / 100


def test_where_the_kernel_cannot_be_compiled_torch_scores(bundle, monkeypatch, caplog):
    """As in a container without a C compiler; the device is a CPU that says it is none."""

    class Fused:
        fits = staticmethod(lambda _: True)

        def __init__(self, *_):
            raise RuntimeError("Failed to find C compiler")

    class Elsewhere:
        type = "cuda"

    monkeypatch.setitem(sys.modules, "model.fused", SimpleNamespace(FusedNetwork=Fused))
    monkeypatch.setattr(Autoencoder, "to", lambda network, _: network)
    scorer, rows = Scorer(bundle, device=Elsewhere()), rows_of([([4, 5, 6], True), ([4, 5, 9, 9, 7], False)])
    assert np.abs(scorer.screen(rows) - scorer.exact(rows)).max() < SCREEN_MARGIN / 100
    assert "Failed to find C compiler" in caplog.text
