import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.bundle import Bundle
from model.config import ModelSettings, TrainingSettings
from model.corruption import TrainingWindows, corrupt
from model.network import Autoencoder, Shape
from model.scoring import Scorer
from model.training import train
from model.vocabulary import BOS, END, PAD, SPECIAL, UNK, Vocabulary

CPU = torch.device("cpu")
SMALL = ModelSettings(window=8, width=16, heads=2, layers=1, feedforward=32)
sequences = st.lists(st.lists(st.integers(4, 8), min_size=1, max_size=14), min_size=1, max_size=8)


def shown(row):
    return tuple(token for token in row.tolist() if token not in (BOS, PAD))


@settings(max_examples=50, deadline=None)
@given(sequences, st.integers(2, 9))
def test_training_windows_are_those_that_the_stream_cuts(sessions, window):
    """Oracle: every prefix's newest events, and every whole session's with END."""
    possible = {
        tuple(session[max(0, end - window) : end]) for session in sessions for end in range(1, len(session) + 1)
    }
    possible |= {(*session[-window:], END) for session in sessions}
    rows = TrainingWindows(sessions, vocabulary=9, window=window, swaps=0).draw(200, np.random.default_rng(0))
    assert rows.shape == (200, window + 2)
    assert (rows[:, 0] == BOS).all()
    assert {shown(row) for row in rows} <= possible


def test_all_windows_are_drawn_in_time():
    sessions = [[4, 5, 6, 7, 8, 4], [5, 5]]
    rows = TrainingWindows(sessions, vocabulary=9, window=4, swaps=0).draw(3000, np.random.default_rng(0))
    assert {shown(row) for row in rows} == {
        (4,), (4, 5), (4, 5, 6), (4, 5, 6, 7), (5, 6, 7, 8), (6, 7, 8, 4), (6, 7, 8, 4, END), (5,), (5, 5), (5, 5, END),
    }  # fmt: skip


def test_only_neighbours_seen_in_both_orders_change_places():
    sessions = [[4, 5, 6], [4, 6, 5]]
    rows = TrainingWindows(sessions * 3, vocabulary=9, window=3, swaps=1).draw(2000, np.random.default_rng(0))
    assert {shown(row)[:3] for row in rows if len(shown(row)) >= 3} == {(4, 5, 6), (4, 6, 5)}


def test_commuting_events_wander_and_what_must_follow_still_follows():
    """8 commutes with 5 and with 6, 5 always precedes 6: every place for 8, and nothing else, comes about."""
    sessions = [[4, 8, 5, 6], [4, 5, 8, 6], [4, 5, 6, 8]]
    rows = TrainingWindows(sessions[:1] * 50 + sessions, vocabulary=9, window=4, swaps=1).draw(
        4000, np.random.default_rng(0)
    )
    whole = {shown(row)[:4] for row in rows if len(shown(row)) == 5}
    assert whole == set(map(tuple, sessions))


def test_rare_sequences_are_drawn_by_the_root_of_their_frequency():
    sessions = [[4]] * 100 + [[5]]
    rows = TrainingWindows(sessions, vocabulary=9, window=3, swaps=0).draw(22_000, np.random.default_rng(0))
    assert (rows[:, 1] == 5).mean() == pytest.approx(1 / 11, abs=0.01)


@settings(max_examples=30, deadline=None)
@given(sequences, st.floats(0.001, 0.9))
def test_noise_leaves_a_window_a_window(sessions, share):
    random = np.random.default_rng(1)
    rows = TrainingWindows(sessions, vocabulary=9, window=6, swaps=0).draw(400, random)
    noisy, wanted = corrupt(rows, (share, share), 9, random)
    assert noisy.shape == wanted.shape == rows.shape
    assert ((noisy == PAD) == (wanted == PAD)).all()
    for row, after, belongs in zip(rows, noisy, wanted, strict=True):
        length = len(shown(after))
        assert after[0] == belongs[0] == BOS
        assert 1 <= length <= len(shown(row))
        assert (after[1 + length :] == PAD).all(), "no gap where something is missing"
        assert END not in after[1:length], "END stands nowhere but last"
        assert PAD < after[1 : 1 + length].min() <= after.max() < 9


def test_what_belongs_in_a_noisy_window_is_what_was_there_or_is_missing():
    """Oracle: without replacements, what is left is part of the window, and END asks for the first missing event."""
    random = np.random.default_rng(2)
    sessions = [list(range(4, 4 + length)) for length in (1, 2, 5, 9)]  # each event once
    rows = TrainingWindows(sessions, vocabulary=13, window=9, swaps=0).draw(6000, random)
    noisy, wanted = corrupt(rows, (1e-9, 1e-9), 13, random)
    incomplete = cut = 0
    for row, after, belongs in zip(rows, noisy, wanted, strict=True):
        before, now, then = shown(row), shown(after), shown(belongs)
        events = tuple(token for token in now if token != END)
        lost = [token for token in before if token not in (*events, END)]
        if before[-1] == END:
            assert then == (*events, lost[0] if lost else END)
            incomplete += bool(lost)
        elif now[-1] == END:
            assert then == (*events, before[-1]), "cut short: the event that stood there belongs there"
            cut += 1
        else:
            assert now == then
        assert events == tuple(token for token in before if token in events)
    assert incomplete > 150
    assert cut > 600


def test_windows_differ_in_how_much_of_them_is_noise():
    random = np.random.default_rng(2)
    rows = TrainingWindows([[4, 5, 6, 7] * 10], vocabulary=1000, window=40, swaps=0).draw(6000, random)
    noisy, wanted = corrupt(rows[(rows == END).any(axis=1)], (0.001, 0.5), 1000, random)
    event = (noisy != PAD) & (noisy != BOS) & (noisy != END)
    replaced = ((noisy != wanted) & event).sum(axis=1) / event.sum(axis=1)  # a share a window
    assert (replaced == 0).mean() > 0.25
    assert (replaced > 0.25).mean() > 0.08
    for share in (0.001, 0.01, 0.3):
        noisy, wanted = corrupt(rows, (share, share), 1000, random)
        event = (noisy != PAD) & (noisy != BOS) & (noisy != END)
        assert ((noisy != wanted) & event).sum() / event.sum() == pytest.approx(share, rel=0.15)


@pytest.mark.parametrize(("events", "parameters"), [(15, 82_483), (45, 94_769)])
def test_the_default_network_has_at_most_100_thousand_parameters(events, parameters):
    default = ModelSettings().model_dump(exclude={"path"})
    assert Autoencoder(Shape(SPECIAL + events, **default)).parameter_count == parameters


def test_padding_changes_no_logit():
    torch.manual_seed(0)
    network = Autoencoder(Shape(9, 8, 16, 2, 2, 32)).eval().double()
    tokens = torch.tensor([[BOS, 4, 5, 6]])
    padded = torch.cat([tokens, torch.full((1, 6), PAD)], dim=1)
    with torch.no_grad():
        assert torch.allclose(network(tokens), network(padded)[:, :4], atol=1e-12)


GRAMMAR = [list("abcd") * turns + ["z"] for turns in (1, 2, 3)] * 40


@pytest.fixture(scope="module")
def taught():
    vocabulary = Vocabulary.of(GRAMMAR)
    losses = []
    network = train(
        [vocabulary.encode(session) for session in GRAMMAR], len(vocabulary), SMALL,
        TrainingSettings(epochs=400, batch_size=64), CPU, losses.append,
    )  # fmt: skip
    return Bundle(network, vocabulary), losses


def score(bundle, events, *, closed):
    rows = np.full((len(events), SMALL.window + 2), PAD, np.uint16)
    for end, row in enumerate(rows, 1):
        tokens = bundle.vocabulary.encode(events[:end])[-SMALL.window :]
        tokens = [BOS, *tokens, *([END] if closed and end == len(events) else [])]
        row[: len(tokens)] = tokens
    return Scorer(bundle).exact(rows).max()


def test_training_teaches_what_is_normal(taught):
    bundle, progress = taught
    assert progress[-1].step == progress[-1].steps == len(progress)
    assert progress[-1].loss < 0.5 * progress[0].loss
    assert progress[-1].restored > max(0.25, 2 * progress[5].restored)  # where most is replaced, nobody could
    normal = max(score(bundle, session, closed=True) for session in GRAMMAR[:3])
    for strange in ("abdcabcdz", "abcdaabcdz", "abzdabcdz"):
        assert score(bundle, list(strange), closed=True) > normal
    assert score(bundle, list("abcdab"), closed=True) > normal, "cut short"
    assert score(bundle, list("abcdab"), closed=False) <= normal, "still open"
    assert score(bundle, ["a", "b", "never seen", "d"], closed=False) > normal


def test_the_same_seed_gives_the_same_model():
    vocabulary = Vocabulary.of(GRAMMAR)
    tokens = [vocabulary.encode(session) for session in GRAMMAR]

    def fingerprint(seed):
        settings = TrainingSettings(epochs=3, batch_size=64, seed=seed)
        return Bundle(train(tokens, len(vocabulary), SMALL, settings, CPU), vocabulary).fingerprint

    assert fingerprint(1) == fingerprint(1) != fingerprint(2)


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 20])
def test_training_may_be_of_any_number_of_steps(steps):
    taken = []
    tiny = ModelSettings(window=4, width=4, heads=1, layers=1, feedforward=4, tallied=0)
    train([[4, 5]], 6, tiny, TrainingSettings(epochs=steps, batch_size=4), CPU, taken.append)
    assert len(taken) == steps


def test_the_vocabulary_does_not_depend_on_the_order_of_sessions():
    assert Vocabulary.of([["b", "a"], ["c"]]) == Vocabulary.of([["c"], ["a", "b"]])
    vocabulary = Vocabulary.of([["b", "a"]], {"a": "text", "other": "text"})
    assert vocabulary.encode(["a", "b", "x"]) == [SPECIAL, SPECIAL + 1, UNK]
    assert [vocabulary.name(token) for token in (END, UNK, SPECIAL)] == ["<END>", "<UNK>", "a"]
    assert (vocabulary.template("a"), vocabulary.template("b")) == ("text", None)
