"""The tally against plain counting and the chain rule written out; and what it learns of normal counts."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.tally import MOST, STEPS, Tally, teach
from model.vocabulary import BOS, END, PAD, SPECIAL, UNK

A, B, C, D = range(SPECIAL, SPECIAL + 4)
VOCABULARY = SPECIAL + 4


def randomly(tally, seed=0):
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in tally.parameters():
            weight.normal_(generator=random)
    return tally.double()


def window(*events, length=24):
    return torch.tensor([[BOS, *events, END] + [PAD] * (length - len(events))])


@pytest.fixture(scope="module")
def chains():
    """Two kinds of their own, A and C, in this order, and all others."""
    tally = randomly(Tally(VOCABULARY, 2, 24))
    tally.column[[A, C, B, D, UNK]] = torch.tensor([0, 1, 2, 2, 2])
    return tally


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([UNK, A, B, C, D]), min_size=1, max_size=22))
def test_events_are_counted_by_kind(chains, events):
    often = Counter(events)
    expected = [often[A], often[C], often[B] + often[D] + often[UNK]]
    counts = chains.counts(window(*events))
    assert counts.tolist() == [expected]
    assert torch.equal(chains.surprisals(counts), chains.surprisals(counts.clamp(max=MOST))), "more is as much"


def test_each_chain_is_a_distribution_over_all_counts(chains):
    every = torch.tensor([*itertools.product(range(MOST + 1), repeat=3)])
    logp = chains(every).gather(3, every[None, :, :, None].expand(4, -1, -1, 1))[..., 0].sum(2)  # (chains, all)
    assert logp.exp().sum(1).tolist() == pytest.approx([1.0] * 4)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, MOST), min_size=3, max_size=3))
def test_a_surprisal_is_that_of_the_count_given_the_commoner_kinds(chains, counts):
    """Oracle: one kind and one chain at a time, in numpy; the mean over chains."""
    weights = {name: weight.detach().numpy() for name, weight in chains.named_parameters()}
    erf = np.vectorize(math.erf)
    for kind, found in enumerate(chains.surprisals(torch.tensor([counts]))[0].tolist()):
        surprisals = []
        for chain in range(4):
            own = {name: weight[chain] for name, weight in weights.items()}
            before = own["start"][kind] + sum(own["count"][other, counts[other]] for other in range(kind))
            inner = before @ own["up"] + own["up_bias"].ravel()
            inner = inner * (1 + erf(inner / math.sqrt(2))) / 2
            known = before + inner @ own["down"] + own["down_bias"].ravel()
            logits = own["count"][kind] @ known + own["bias"][kind]
            surprisals.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[counts[kind]])
        assert found == pytest.approx(np.mean(surprisals))


def test_what_is_usual_adds_nothing_and_what_is_above_adds_what_it_is_above(chains):
    windows = torch.cat([window(A), window(A, C, C), window(*[B] * 20), window(UNK, D)])
    surprisals = chains.surprisals(chains.counts(windows)).sum(1)
    chains.allowance.fill_(surprisals.sort().values[1:3].mean())
    excess = chains.excess(windows)
    assert sorted(excess > 0) == [False, False, True, True]
    assert excess.tolist() == pytest.approx([max(0, value - chains.allowance.item()) for value in surprisals.tolist()])
    assert Tally(VOCABULARY, 2, 24).excess(windows).tolist() == [0] * 4, "untaught"


def test_many_windows_do_not_fill_the_memory(chains):
    passes = []
    hook = chains.register_forward_hook(lambda *arguments: passes.append(arguments[-1].numel()))
    excess = chains.excess(window(A, C).repeat(60_000, 1))
    hook.remove()
    assert len(passes) > 1
    assert max(passes) <= 4 * 2**14 * (MOST + 1)
    assert len(excess) == 60_000


# Of D there are one to three; B comes with C, twice in three sessions; nothing else varies.
NORMAL = [[A, *[D] * times, *both] for times in (1, 2, 3) for both in ([], [B, C], [C, B])] * 20


@pytest.fixture(scope="module")
def taught():
    tally, steps = Tally(VOCABULARY, 3, 24), []
    teach(tally, NORMAL, 1, report=steps.append)
    assert len(steps) == STEPS
    return tally


def test_it_learns_which_counts_belong_together(taught):
    assert taught.column.tolist() == [4, 4, 4, 3, 0, 2, 3, 1], "A and D in all sessions, B and C in as many, B first"
    normal = torch.cat([window(*session) for session in NORMAL])
    assert not taught.excess(normal).any()
    for strange in ([A, D, B], [A, D, C], [A], [A, A, D], [A, D, D, D, D], [A, D, B, C, C], [A, D, UNK], [D, B, C]):
        assert taught.excess(window(*strange)) > 1, strange
    assert taught.excess(window(A, D, B)) < taught.excess(window(A, A, D, B)), "two faults are worse than one"


def test_it_says_which_counts_are_unusual(taught):
    kind, *_ = taught.worst(window(A, D, D, B, B, C), 3)
    assert (kind.token, kind.count, kind.usual) == (B, 2, 1)
    other, *_ = taught.worst(window(A, D, D, B), 3)
    assert (other.token, other.count, other.usual) == (None, 0, 1), "C is not counted on its own"
    total = taught.surprisals(taught.counts(window(A, D, D, B))).sum().item()
    assert total - 3 < other.surprisal < total
    assert [(kind.token, kind.count) for kind in taught.worst(window(*[A] * 20, D, D, D, D), 1)] == [(A, 20)]
    assert [kind.token for kind in taught.worst(window(A, A, D), 3)] == [A], "no B is not worth telling beside two A"


def test_a_session_that_does_not_fit_into_the_window_is_not_tallied():
    sessions = [[A, B], [A, B, B]] * 10
    tally, other = Tally(VOCABULARY, 4, 5), Tally(VOCABULARY, 4, 5)
    teach(tally, [*sessions, [*[C] * 40, A, A]], 1, 1000)
    teach(other, sessions, 1, 1000)
    assert torch.equal(tally.count, other.count)
    assert tally.excess(window(A, C, C, C)) > 2
    assert tally.excess(window(A, C, C, C, C)) == 0, "nobody knows what was before"
    untaught = Tally(VOCABULARY, 4, 2)
    teach(untaught, sessions, 1)
    assert untaught.excess(window(D)) == 0, "no session was short enough to learn from"


def test_more_distinct_counts_than_fit_into_a_step_are_learnt_too():
    random = np.random.default_rng(0)
    sessions = [np.repeat([A, B, C], [*random.integers(0, 12, 2), 5]).tolist() for _ in range(2000)]
    tally = Tally(VOCABULARY, 4, 40)
    teach(tally, sessions, 1, 1000)
    assert tally.excess(torch.cat([window(*session, length=40) for session in sessions])).median() == 0
    assert tally.excess(window(*[C] * 4)) > 2
    assert tally.excess(window(*[C] * 5, D)) > 2


def test_the_same_seed_teaches_the_same():
    def weights(seed):
        tally = Tally(VOCABULARY, 3, 24)
        teach(tally, NORMAL[:9], seed, 100)
        return torch.cat([weight.flatten() for weight in tally.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
