"""Alerts: what is said, when it is said again, and that batches, partitions and caches change nothing."""

import dataclasses
import itertools
import json

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consumer.alerts import fitting, schema
from consumer.detector import Detector
from consumer.drift import Drift, draws, levels
from consumer.events import TOMBSTONE, EventBatch
from consumer.names import Names
from consumer.records import DriftState, StoredSessions
from consumer.settings import DriftSettings
from model.bundle import Bundle
from model.network import Autoencoder, Shape
from model.scoring import Scorer
from model.tally import teach
from model.vocabulary import BOS, END, PAD, UNK, Vocabulary

TOUCHY = DriftSettings(failing_share=0, batch=3, false_alarm_every=100)
"""So that drift shows within a short stream."""

NAMES = ["a", "b", "c", "d", "never seen"]


def validate(alert):
    jsonschema.validate(
        json.loads(alert.encode()),
        schema(),
        cls=jsonschema.Draft202012Validator,
        format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
    )


def batch_of(bundle, events, first_offset=0):
    """`events`: (block, event id or None for a tombstone, time)."""
    tokens = [TOMBSTONE if name is None else bundle.vocabulary.tokens.get(name, UNK) for _, name, _ in events]
    unknown = {place: name for place, (_, name, _) in enumerate(events) if tokens[place] == UNK}
    offsets = range(first_offset, first_offset + len(events))
    return EventBatch.of([block for block, _, _ in events], tokens, [time for _, _, time in events], offsets, unknown)


def run(scorer, threshold, events, *, cuts=(), partition=3, cache_windows=1000, close=False):
    detector = Detector(scorer, threshold, topic="logs", cache_windows=cache_windows, drift=TOUCHY)
    detector.assign(partition)
    edges = [0, *sorted({cut % (len(events) + 1) for cut in cuts}), len(events)]
    alerts = []
    for begin, end in itertools.pairwise(edges):
        alerts += detector.process({partition: batch_of(scorer.bundle, events[begin:end], begin)})
    return alerts + (detector.close(partition) if close else [])


def by_block(alerts):
    blocks = {}
    for alert in alerts:
        blocks.setdefault(alert.block_id, []).append(alert.encode())
    return blocks


stream = st.lists(
    st.tuples(st.sampled_from("XYZ"), st.sampled_from([*NAMES, None]), st.integers(0, 3000)), min_size=1, max_size=60
)


@settings(max_examples=60, deadline=None)
@given(stream, st.lists(st.integers(0, 100), max_size=6), st.floats(0, 3))
def test_batch_cuts_and_cache_size_change_no_byte_of_any_alert(scorer, make_threshold, events, cuts, limit):
    threshold = make_threshold(limit)
    whole = run(scorer, threshold, events, close=True)
    cut = run(scorer, threshold, events, cuts=cuts, cache_windows=2, close=True)
    assert by_block(cut) == by_block(whole)


@settings(max_examples=60, deadline=None)
@given(stream, st.floats(0, 3), st.floats(0, 1), st.floats(0, 1))
def test_alerts_are_those_of_a_plain_reading_of_the_rules(scorer, make_threshold, events, limit, major, critical):
    levels = {"minor": limit, "major": limit + major, "critical": limit + major + critical}
    threshold = make_threshold(levels["minor"], idle_timeout_ms=10**6, **dict(list(levels.items())[1:]))
    assert_read_plainly(scorer, threshold, events)


@pytest.mark.parametrize(("limit", "drift_at"), [(1.5, np.inf), (3.0, np.inf), (1.5, 50.0), (2.0, 300.0)])
def test_drift_is_that_of_one_closed_block_after_the_other(varied_scorer, make_threshold, limit, drift_at):
    """Wherever alerts come between them; a block's next sessions are among them, and many that never alert."""
    random = np.random.default_rng(3)
    events = [(f"b{random.integers(4)}", NAMES[min(4, random.geometric(0.5) - 1)] if random.random() < 0.8 else None, 0)
              for _ in range(1000)]  # fmt: skip
    drift = assert_read_plainly(varied_scorer, make_threshold(limit, idle_timeout_ms=10**6), events, drift_at)
    assert (drift.alarm is None) == np.isinf(drift_at)
    assert 10 < drift.state.alerting < drift.state.blocks - 10


def assert_read_plainly(scorer, threshold, events, drift_at=3.0):
    """Compare with one look at a time, scored alone: nothing shared but the network and the test for drift.

    That raises the alarm at so much evidence; return it.
    """
    detector = Detector(scorer, threshold, topic="logs", cache_windows=1000, drift=TOUCHY)
    detector._drift.limit = drift_at
    detector.assign(3)
    found = [(alert.block_id, alert.revision, alert.offender.position, alert.score, alert.severity, alert.reason,
              alert.drift) for alert in detector.process({3: batch_of(scorer.bundle, events)})]  # fmt: skip
    vocabulary, window = scorer.bundle.vocabulary, scorer.bundle.window
    drift = Drift(detector._drift, DriftState(detector.judge, 0))
    sessions, said, expected = {}, {}, []
    for offset, (block, name, _) in enumerate(events):
        if name is None and block not in sessions:
            continue
        first, tokens, scores = sessions.setdefault(block, (offset, [], []))
        if name is not None:
            tokens.append(vocabulary.tokens.get(name, UNK))
        shown = tokens[-window:]
        why = scorer.explain(_row(shown, window, closing=name is None))
        scores.append(why.score)
        position = len(tokens) - len(shown) + why.offender + 1
        exceeded = [level.name for level in threshold.levels if why.score > level.threshold]
        revision, score, where, gravity = said.get(block, (0, threshold.threshold, None, 0))
        if why.score > score and (position != where or len(exceeded) > gravity):
            said[block] = (revision + 1, why.score, position, len(exceeded))
            ended = name is None and why.offender == len(shown)
            reason = ("counts" if why.counts else "truncated") if ended else "event"
            expected.append((block, revision + 1, position, why.score, exceeded[-1], reason, drift.alarm))
        if name is None:
            sessions.pop(block)
            alerted = said.pop(block, None) is not None
            draw = draws(Names.of([block.encode()]), np.array([first]))
            drift.take(levels(np.array([max(scores)])), np.array([alerted]), draw)
    assert found == expected
    assert detector.drift(3).state.pack() == drift.state.pack()
    assert [state.pack() for _, state in detector.alarms] == ([drift.state.pack()] if drift.alarm else [])
    return drift


def _row(tokens, window, *, closing):
    row = [BOS, *tokens, *([END] if closing else [])]
    return np.array(row + [PAD] * (window + 2 - len(row)), np.uint16)


@settings(max_examples=40, deadline=None)
@given(stream.filter(lambda events: any(name for _, name, _ in events)))
def test_every_alert_is_valid_against_the_shipped_schema(scorer, make_threshold, events):
    alerts = run(scorer, make_threshold(0.0), events, close=True)
    assert alerts
    for alert in alerts:
        validate(alert)


def test_the_schema_refuses_what_is_no_alert(scorer, make_threshold):
    (alert, *_) = run(scorer, make_threshold(0.0), [("X", "a", 0)])
    wrong = json.loads(alert.encode()) | {"reason": "because"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema(), cls=jsonschema.Draft202012Validator)


def test_an_alert_says_what_happened_where(scorer, make_threshold):
    events = [("X", "a", 1000), ("Y", "b", 1500), ("X", "never seen", 2000)]
    alert = next(item for item in run(scorer, make_threshold(0.0, idle_timeout_ms=10**6), events)
                 if item.block_id == "X" and item.events_seen == 2)  # fmt: skip
    assert [event.event_id for event in alert.window] == ["a", "never seen"]
    assert alert.offender.event_id == "never seen"
    assert alert.offender.position == 2
    assert alert.offender.surprisal == max(event.surprisal for event in alert.window) == alert.score
    assert alert.offender.offset == 2
    assert alert.offender.event_id not in {other.event_id for other in alert.offender.expected}
    assert (alert.source.topic, alert.source.partition) == ("logs", 3)
    assert (alert.source.first_offset, alert.source.last_offset) == (0, 2)
    assert (alert.first_event_time, alert.last_event_time) == ("1970-01-01T00:00:01.000Z", "1970-01-01T00:00:02.000Z")
    assert alert.score > 2.0
    assert alert.p_value == 0.2, "none of the four calibration blocks scores as high: 1 / 5"


def test_a_p_value_is_never_rounded_to_zero(scorer, make_threshold):
    threshold = dataclasses.replace(make_threshold(0.0), blocks=2_000_001, counts=(1, 2, 1_999_998))
    (alert,) = run(scorer, threshold, [("X", "never seen", 0)])
    assert alert.p_value == pytest.approx(1 / 2_000_002)
    validate(alert)


@pytest.fixture(scope="module")
def long_windows():
    vocabulary = Vocabulary(("a", "b"))
    return Scorer(Bundle(Autoencoder(Shape(len(vocabulary), 512, 8, 2, 1, 8)).eval(), vocabulary))


@pytest.mark.parametrize("character", ["\x01", '"', "ü", "€", "x"])
def test_no_alert_is_larger_than_brokers_take(long_windows, make_threshold, character):
    """Which would end the process, and each successor, at the same event."""
    name = character * (1024 // len(character.encode()))
    threshold = dataclasses.replace(make_threshold(0.0), window=512, every=512)
    names = ["a", *(f"{name[3:]}{number}" for number in range(1, 512))]
    (alert,) = run(long_windows, threshold, [("\x01" * 1024, name, 0) for name in names])
    validate(alert)
    assert len(alert.encode()) < 500_000
    assert alert.offender.event_id in names
    for event, whole in zip(alert.window, names, strict=True):
        cut = event.event_id.removesuffix("…")
        assert event.event_id == whole == "a" or (event.event_id != cut and whole.startswith(cut) and len(cut) > 40)


def test_what_fits_into_an_alert_is_not_cut():
    whole = ["x" * 1024, "\x01" * 1024] * 25
    assert fitting(whole) == whole
    assert fitting(["x" * 800] * 400) == ["x" * 800] * 400
    names = fitting(["x" * 1024] * 512)
    assert names == ["x" * (400_000 // 512 // 6 - 3) + "…"] * 512


def test_a_block_cut_short_is_truncated(scorer, make_threshold):
    limit = scorer.explain(_row([4], 6, closing=False)).score
    alerts = run(scorer, make_threshold(limit), [("X", "a", 0), ("X", None, 0)])
    (alert,) = (item for item in alerts if item.reason == "truncated")
    assert alert.offender.event_id == "<END>"
    assert alert.offender.position == 2
    assert alert.offender.offset == 0
    assert [event.event_id for event in alert.window] == ["a", "<END>"]


def test_a_block_of_unusual_counts_says_which(scorer, make_threshold):
    network = Autoencoder(dataclasses.replace(scorer.bundle.network.shape, tallied=3)).eval()
    network.load_state_dict(scorer.bundle.network.state_dict(), strict=False)
    network.bias.data[END] = 3  # it may end anywhere: what is left are the counts
    tokens = scorer.bundle.vocabulary.encode("aab")
    teach(network.tally, [tokens] * 30, 1, 500)
    bundle = Bundle(network, Vocabulary(scorer.bundle.vocabulary.events, {"b": "template of b"}))
    events = [("X", "a", 0), ("X", "a", 1), ("X", "b", 2), ("X", "b", 3), ("X", "b", 4), ("X", None, 5)]
    *_, alert = run(Scorer(bundle), make_threshold(0.0), events)
    validate(alert)
    assert (alert.reason, alert.offender.event_id, alert.offender.position) == ("counts", "<END>", 6)
    assert alert.score == alert.offender.surprisal == alert.window[-1].surprisal > alert.offender.counts[0].surprisal
    (kind,) = alert.offender.counts
    assert (kind.event_id, kind.template, kind.count, kind.usual) == ("b", "template of b", 3, 1)
    *_, other = run(Scorer(bundle), make_threshold(0.0), [("X", name, 0) for name in ("a", "a", "b", "d", "d", None)])
    assert [(kind.event_id, kind.count, kind.usual) for kind in other.offender.counts] == [("<OTHER>", 2, 0)]


def test_the_same_event_alerts_again_only_when_it_becomes_graver(scorer, make_threshold):
    """Later events may make an earlier one more surprising: that is news when it crosses a level."""

    def scores_of(tokens):
        looks = [scorer.explain(_row([UNK, *tokens][:seen], 6, closing=False)) for seen in range(1, 5)]
        return [why.score for why in looks] if not any(why.offender for why in looks) else [0.0]

    tokens = max(
        itertools.product((4, 5, 6), repeat=3), key=lambda tokens: max(scores_of(tokens)) - scores_of(tokens)[0]
    )
    events = [("X", name, 0) for name in ("never seen", *("abc"[token - 4] for token in tokens))]
    scores = scores_of(tokens)
    graver = max(range(1, 4), key=scores.__getitem__)
    assert scores[graver] > scores[0], "the example has to rise"
    between = (scores[0] + scores[graver]) / 2
    assert [alert.severity for alert in run(scorer, make_threshold(0.0), events)] == ["minor"]
    first, *others = run(scorer, make_threshold(0.0, major=between, critical=100.0), events)
    (second,) = others
    assert (first.severity, second.severity) == ("minor", "major")
    assert (first.revision, second.revision) == (1, 2)
    assert first.offender.position == second.offender.position == 1


def test_equal_thresholds_give_the_highest_severity(scorer, make_threshold):
    (alert,) = run(scorer, make_threshold(0.0, major=0.0), [("X", "a", 0)])
    assert alert.severity == "major"


def test_a_new_session_of_a_block_has_an_alert_of_its_own(scorer, make_threshold):
    alerts = run(scorer, make_threshold(0.0), [("X", "a", 0), ("X", None, 0), ("X", "a", 0)])
    assert len({alert.alert_id for alert in alerts}) == 2
    assert [alert.revision for alert in alerts if alert.source.first_offset == 2] == [1]


def test_equal_to_the_threshold_is_silent(scorer, make_threshold):
    score = scorer.explain(_row([4], 6, closing=False)).score
    assert run(scorer, make_threshold(score), [("X", "a", 0)]) == []
    assert len(run(scorer, make_threshold(score - 1e-4), [("X", "a", 0)])) == 1


def failing(count, first=0):
    """Blocks that begin and fail at once, one after the other."""
    return [line for number in range(first, first + count)
            for line in ((f"f{number}", "never seen", 0), (f"f{number}", None, 0))]  # fmt: skip


def test_alerts_say_from_their_own_place_on_that_there_is_drift(scorer, make_threshold):
    drift = DriftSettings(batch=5)
    detector = Detector(scorer, make_threshold(3.0), topic="logs", cache_windows=1000, drift=drift)
    detector.assign(0)
    alerts = [alert for alert in detector.process({0: batch_of(scorer.bundle, failing(200))}) if alert.revision == 1]
    ((partition, state),) = detector.alarms
    assert (partition, state.alarm, state.alerting) == (0, "tail", state.blocks)
    assert 100 < state.blocks < 190
    assert [alert.drift for alert in alerts] == [None] * state.blocks + ["tail"] * (200 - state.blocks)
    for alert in alerts[-5:]:
        validate(alert)


def test_blocks_that_others_judged_as_well_do_not_count(scorer, make_threshold):
    """Under a new threshold drift begins anew, with the sessions that begin from then on."""
    old = Detector(scorer, make_threshold(3.0), topic="logs", cache_windows=1000)
    old.assign(0)
    events = [("early", "a", 0), *failing(5), ("early", None, 0), *failing(2, 5)]
    old.process({0: batch_of(scorer.bundle, events[:11])})
    stored = old.take_drift(0)
    assert (stored.blocks, stored.since) == (5, 0)
    assert old.take_drift(0) is None, "nothing changed"
    for limit, blocks, since in ((3.0, 8, 0), (3.1, 2, 11)):
        new = Detector(scorer, make_threshold(limit), topic="logs", cache_windows=1000)
        (early,) = old.store(0).unsaved()
        state = old.store(0).snapshot(early)
        sessions = StoredSessions.of({"early": state}, scorer.bundle.vocabulary)
        new.assign(0, sessions, 0, 11, drift=DriftState.unpack(stored.pack()), since=11)
        new.process({0: batch_of(scorer.bundle, events[11:], 11)})
        assert (new.drift(0).state.blocks, new.drift(0).state.since) == (blocks, since)


def test_without_drift_nothing_is_counted(scorer, make_threshold):
    settings = DriftSettings(enabled=False)
    detector = Detector(scorer, make_threshold(3.0), topic="logs", cache_windows=1000, drift=settings)
    detector.assign(0)
    alerts = detector.process({0: batch_of(scorer.bundle, failing(60))})
    assert {alert.drift for alert in alerts} == {None}
    assert detector.take_drift(0).blocks == 0
    assert detector.alarms == []


def test_each_distinct_window_is_scored_once(scorer, make_threshold):
    detector = Detector(scorer, make_threshold(100.0), topic="logs", cache_windows=1000)
    detector.assign(0)
    events = [(f"b{number}", name, 0) for number in range(50) for name in ("a", "b")]
    detector.process({0: batch_of(scorer.bundle, events)})
    assert detector.looks == 100
    assert detector.scored == 2
    assert detector.open_blocks == 50


def test_explanations_are_bounded_by_themselves(scorer, make_threshold, monkeypatch):
    """They take sixty times the memory of a score, so `cache_windows` says nothing of them."""
    monkeypatch.setattr("consumer.scores._EXPLAINED_EVENTS", 5 * scorer.bundle.window)
    detector = Detector(scorer, make_threshold(0.0), topic="logs", cache_windows=1_000_000)
    detector.assign(0)
    held, total = [], 0
    for first in range(0, 256, 4):
        names = [NAMES[first >> 2 * place & 3] for place in range(4)]
        total += len(detector.process({0: batch_of(scorer.bundle, [(f"b{first}", name, 0) for name in names], first)}))
        held.append(len(detector._scores._explained))
    assert total > 50
    assert max(held) == 5


def test_what_scored_a_window_has_explained_it(bundle, make_threshold, monkeypatch):
    """The network is asked again, and says the same, only where the explanation has been forgotten."""

    class Counting(Scorer):
        alone = 0

        def explain(self, row):
            self.alone += 1
            return super().explain(row)

    scorer = Counting(bundle)
    events = [(f"{turn}{''.join(names)}", name, 0)
              for turn in range(2) for names in itertools.product(NAMES[1:], repeat=3) for name in names]  # fmt: skip
    alerts = run(scorer, make_threshold(0.0), events, cuts=[len(events) // 2])
    assert (len(alerts) > 128, scorer.alone) == (True, 0)
    monkeypatch.setattr("consumer.scores._EXPLAINED_EVENTS", 5 * bundle.window)
    assert run(scorer, make_threshold(0.0), events, cuts=[len(events) // 2]) == alerts
    assert scorer.alone > 50


def test_partitions_are_independent_and_go_with_their_sessions(scorer, make_threshold):
    detector = Detector(scorer, make_threshold(0.0, idle_timeout_ms=10**6), topic="logs", cache_windows=1000)
    for partition in (0, 1):
        detector.assign(partition)
    event = batch_of(scorer.bundle, [("X", "a", 0)])
    alerts = detector.process({0: event, 1: event})
    assert sorted(alert.source.partition for alert in alerts) == [0, 1]
    assert len({alert.alert_id for alert in alerts}) == 2
    detector.revoke(0)
    assert detector.open_blocks == 1


def test_partitions_one_after_the_other_hand_out_looks_in_the_same_memory(scorer, make_threshold):
    """Each its own would be 16 MB a partition, and ten times that with the longest windows."""
    detector = Detector(scorer, make_threshold(0.0), topic="logs", cache_windows=1000)
    found = []
    for partition in (0, 1):
        detector.assign(partition)
        found += detector.store(partition).apply(batch_of(scorer.bundle, [("X", "a", 0)]))
    assert np.shares_memory(found[0].rows, found[1].rows)
