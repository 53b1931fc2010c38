"""The window store against a plain oracle that reads like DESIGN: dictionaries, lists, no arrays."""

import itertools
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consumer.events import TOMBSTONE, EventBatch
from consumer.looks import MAX_LOOKS, LookRoom
from consumer.names import Names
from consumer.records import StoredSessions, vocabulary_id
from consumer.windows import WindowStore
from model.vocabulary import BOS, END, PAD, UNK, Vocabulary

WINDOW, IDLE = 5, 10


@dataclass
class OpenSession:
    seen: int
    events: list = field(default_factory=list)  # (token, offset, time)


def look(block, session, *, closing):
    shown = session.events[-WINDOW:]
    return {
        "block": block,
        "closing": closing,
        "count": len(session.events),
        "tokens": [BOS, *(token for token, _, _ in shown), *([END] if closing else [])],
        "offsets": [offset for _, offset, _ in shown],
        "times": [time for _, _, time in shown],
        "first": session.events[0][1:],
        "last": session.events[-1][1:],
    }


def oracle(events, every):
    """Apply the rules one event at a time."""
    sessions, watermark, looks = {}, None, []
    for offset, (block, token, time) in enumerate(events):
        if token == TOMBSTONE:
            if block in sessions:
                looks.append(look(block, sessions.pop(block), closing=True))
            continue
        watermark = time if watermark is None else max(watermark, time)
        expired = [(session.seen, session.events[-1][1], name) for name, session in sessions.items()
                   if session.seen + IDLE < watermark]  # fmt: skip
        looks.extend(look(name, sessions.pop(name), closing=True) for _, _, name in sorted(expired))
        session = sessions.setdefault(block, OpenSession(watermark))
        session.events.append((token, offset, time))
        session.seen = watermark
        if len(session.events) % every == 0:
            looks.append(look(block, session, closing=False))
    looks_at_end = {name: look(name, session, closing=True) for name, session in sessions.items()}
    return looks, looks_at_end


def seen(store, portions):
    looks = []
    for portion in portions:
        for fact, row, offsets, times in zip(
            portion.facts, portion.rows.tolist(), portion.offsets.tolist(), portion.times.tolist(), strict=True
        ):
            length = int(fact["length"])
            used = 1 + length + int(fact["closing"])
            assert set(row[used:]) <= {PAD}
            looks.append(
                {
                    "block": store.block(fact["slot"]),
                    "closing": bool(fact["closing"]),
                    "count": int(fact["count"]),
                    "tokens": row[:used],
                    "offsets": offsets[:length],
                    "times": times[:length],
                    "first": (int(fact["first_offset"]), int(fact["first_time"])),
                    "last": (int(fact["last_offset"]), int(fact["last_time"])),
                }
            )
    return looks


def batches(events, cuts):
    edges = [0, *sorted({cut % (len(events) + 1) for cut in cuts}), len(events)]
    for begin, end in itertools.pairwise(edges):
        some = events[begin:end]
        yield EventBatch.of(
            [block for block, _, _ in some],
            [token for _, token, _ in some],
            [time for _, _, time in some],
            range(begin, end),
            {place: f"name {begin + place}" for place, (_, token, _) in enumerate(some) if token == UNK},
        )


def stored(sessions):
    return StoredSessions.of(sessions, Vocabulary(tuple(f"event {number}" for number in range(20))))


event = st.tuples(
    st.sampled_from("ABCDE"),
    st.sampled_from([TOMBSTONE, UNK, 4, 5, 6, 7]),
    st.integers(0, 60) | st.just(500),
)


def in_time_order(events):
    times = sorted(time for _, _, time in events)
    return [(block, token, time) for (block, token, _), time in zip(events, times, strict=True)]


streams = st.lists(event, max_size=120)


@settings(max_examples=300, deadline=None)
@given(streams | streams.map(in_time_order), st.lists(st.integers(0, 200), max_size=8), st.integers(1, 4))
def test_any_interleaving_cut_anywhere_gives_the_looks_of_the_oracle(events, cuts, every):
    store = WindowStore(window=WINDOW, every=every, idle_timeout=IDLE)
    looks = [found for batch in batches(events, cuts) for found in seen(store, store.apply(batch))]
    expected, at_end = oracle(events, every)
    assert looks == expected
    assert store.open_blocks == len(at_end)
    last = {found["block"]: found for found in seen(store, store.close_all())}
    assert last == at_end
    assert store.open_blocks == 0


@settings(max_examples=100, deadline=None)
@given(streams, st.lists(st.integers(0, 200), max_size=8))
def test_the_names_of_unknown_events_in_the_window_are_known(events, cuts):
    store = WindowStore(window=WINDOW, every=1, idle_timeout=IDLE)
    for batch in batches(events, cuts):
        for looks in store.apply(batch):
            for place, fact in enumerate(looks.facts):
                names = store.unknown(int(fact["slot"]))
                for token, offset in zip(looks.rows[place, 1:], looks.offsets[place, : fact["length"]], strict=False):
                    assert token != UNK or names[int(offset)] == f"name {offset}"
    for slot in store.unsaved().tolist():
        assert len(store.unknown(slot)) <= WINDOW, "names of events that left the window are forgotten"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("XYZ"), st.sampled_from([4, 5, TOMBSTONE]), st.none() | st.integers(0, 60)),
        max_size=60,
    ),
    st.lists(st.integers(0, 60), max_size=6),
)
def test_an_event_that_tells_no_time_is_as_old_as_the_newest_before_it(events, cuts):
    sent, told, watermark = 40, [], None
    for block, token, time in events:
        if token != TOMBSTONE:
            newest = sent if watermark is None else watermark
            told.append((block, token, newest if time is None else time))
            watermark = max(told[-1][-1], newest if watermark is not None else told[-1][-1])
        else:
            told.append((block, token, time))
    store = WindowStore(window=WINDOW, every=1, idle_timeout=IDLE)
    looks = []
    for begin, end in itertools.pairwise([0, *sorted(min(cut, len(events)) for cut in cuts), len(events)]):
        blocks, tokens, times = zip(*events[begin:end], strict=True) if begin < end else ((), (), ())
        untimed = np.array([time is None for time in times], np.bool_)
        batch = EventBatch.of(blocks, tokens, [sent if time is None else time for time in times], range(begin, end))
        looks += seen(store, store.apply(replace(batch, untimed=untimed)))
    assert looks == oracle(told, 1)[0]


def test_blocks_share_the_text_of_an_unknown_event():
    """A new version of the sender may bring one to each of a million blocks."""
    store = WindowStore(window=WINDOW, every=1, idle_timeout=IDLE)
    for offset, block in enumerate("xy"):
        list(store.apply(EventBatch.of([block], [UNK], [0], [offset], {0: str(b"new", "ascii")})))
    (one,), (other,) = (store.unknown(slot).values() for slot in store.unsaved().tolist())
    assert one == "new"
    assert one is other


def test_blocks_that_opened_are_told():
    store = WindowStore(window=WINDOW, every=2, idle_timeout=IDLE)

    def opened(blocks, tokens, begin):
        for _ in store.apply(EventBatch.of(blocks, tokens, [0] * len(blocks), range(begin, begin + len(blocks)))):
            pass
        return list(store.opened)

    assert opened("ABA", [4, 4, 4], 0) == [b"A", b"B"]
    assert opened("ACCA", [4, 4, TOMBSTONE, TOMBSTONE], 3) == [], "C is over already"
    assert opened("AB", [4, 4], 7) == [b"A"]
    assert store.are_open(Names.of([b"A", b"B", b"C", b"D"])).tolist() == [True, True, False, False]


@settings(max_examples=100, deadline=None)
@given(streams)
def test_equal_windows_have_equal_hashes_and_different_ones_different(events):
    store = WindowStore(window=WINDOW, every=1, idle_timeout=IDLE)
    hashes = {}
    for batch in batches(events, []):
        for looks in store.apply(batch):
            for row, digest in zip(looks.rows.tolist(), looks.facts["hash"].tolist(), strict=True):
                assert hashes.setdefault(tuple(row), digest) == digest
    assert len(set(hashes.values())) == len(hashes)


def test_a_jump_of_the_watermark_closes_more_sessions_than_fit_into_one_portion():
    store = WindowStore(window=WINDOW, every=1, idle_timeout=IDLE)
    count = 2 * MAX_LOOKS + 17
    many = EventBatch.of([f"b{n}" for n in range(count)], [4] * count, [0] * count, list(range(count)))
    assert sum(map(len, store.apply(many))) == count
    jump = EventBatch.of(["late"], [5], [IDLE + 1], [count])
    portions = [(len(looks), int(looks.facts["closing"].sum())) for looks in store.apply(jump)]
    assert sum(size for size, _ in portions) == count + 1
    assert sum(closing for _, closing in portions) == count
    assert max(size for size, _ in portions) <= MAX_LOOKS
    assert store.open_blocks == 1


def test_stores_side_by_side_have_looks_of_their_own_and_one_after_the_other_the_same_memory():
    room, count = LookRoom(WINDOW), 3000

    def stream(block):
        store = WindowStore(window=WINDOW, every=1, idle_timeout=IDLE, room=room)
        return store.apply(EventBatch.of([block] * count, [4] * count, [0] * count, range(count)))

    def side_by_side():
        streams = [stream(block) for block in "xyz"]
        found = [next(one) for one in streams]
        for looks in found:
            assert looks.facts["count"].tolist() == list(range(1, count + 1))
        for one, other in itertools.combinations(found, 2):
            assert not np.shares_memory(one.rows, other.rows)
        assert [list(one) for one in streams] == [[]] * 3
        return found

    side_by_side()  # makes the room
    before = side_by_side()
    for block in "xyz":
        (looks,) = stream(block)
        for name in ("facts", "rows", "offsets", "times"):
            assert np.shares_memory(getattr(looks, name), getattr(before[0], name))
            assert not np.shares_memory(getattr(looks, name), getattr(before[1], name))
    for looks, same in zip(side_by_side(), before, strict=True):
        assert np.shares_memory(looks.rows, same.rows)


def test_a_stream_that_is_given_up_gives_its_memory_back():
    """As when the device fails in the middle of a batch."""
    room = LookRoom(WINDOW)
    one, other = (WindowStore(window=WINDOW, every=1, idle_timeout=IDLE, room=room) for _ in range(2))
    stream = one.apply(EventBatch.of("x", [4], [0], [0]))
    first = next(stream)
    stream.close()
    (second,) = other.apply(EventBatch.of("y", [4], [0], [0]))
    assert np.shares_memory(first.rows, second.rows)


def test_a_full_store_closes_the_longest_silent_block_first():
    store = WindowStore(window=WINDOW, every=10, idle_timeout=10**6, limit=3)
    batch = EventBatch.of([*"ABCADE"], [4, 5, 6, 7, 4, 4], list(range(6)), list(range(6)))
    evicted = [
        (store.block(fact["slot"]), row[: fact["length"] + 2].tolist())
        for looks in store.apply(batch)
        for fact, row in zip(looks.facts, looks.rows, strict=True)
        if fact["evicted"]
    ]
    assert evicted == [("B", [BOS, 5, END]), ("C", [BOS, 6, END])], "A has spoken since"
    assert store.open_blocks == 3


def test_a_million_junk_blocks_cost_the_memory_of_the_limit():
    limit, batch = 1000, 10_000
    store = WindowStore(window=WINDOW, every=10, idle_timeout=10**6, limit=limit)
    closed = rows = 0
    for begin in range(0, 1_000_000, batch):
        offsets = list(range(begin, begin + batch))
        for looks in store.apply(EventBatch.of([f"junk {n}" for n in offsets], [4] * batch, [0] * batch, offsets)):
            closed += int(looks.facts["evicted"].sum())
        assert store.open_blocks == limit
        assert len(store.take_departed()) == batch - (limit if begin == 0 else 0)
        rows = max(rows, store._index.capacity)
    assert closed == 1_000_000 - limit
    assert rows <= 2 * (limit + batch)


def test_rows_are_used_again():
    store = WindowStore(window=WINDOW, every=1, idle_timeout=IDLE)
    for number in range(5000):
        some = EventBatch.of([f"b{number}"] * 2, [4, TOMBSTONE], [number, 0], [2 * number, 2 * number + 1])
        assert sum(map(len, store.apply(some))) == 2
    assert store._index.capacity == 1024
    assert len(store._sessions.pages.links) == 1024
    assert len(store._index._table.data) == 1024 * 32


@pytest.mark.parametrize("lateness", [0, 5])
def test_a_session_lives_its_idle_timeout_after_its_last_event_arrived(lateness):
    store = WindowStore(window=WINDOW, every=1, idle_timeout=IDLE)
    batch = EventBatch.of(["A", "B", "A", "A"], [4] * 4, [100, 100, 100 - lateness, 100 + IDLE], list(range(4)))
    closing = np.concatenate([looks.facts["closing"] for looks in store.apply(batch)])
    assert not closing.any()
    assert store.open_blocks == 2
    assert store.watermark == 110


def test_a_larger_window_than_was_stored_shows_what_there_is():
    """A new model may look further back; the events that only it would have kept are gone."""
    small, large = (WindowStore(window=window, every=1, idle_timeout=IDLE) for window in (3, 6))
    tokens = [4, 5, 6, 7, 8]
    batch = EventBatch.of(["A"] * 5, tokens, [0] * 5, list(range(5)))
    for _ in small.apply(batch):
        pass
    (slot,) = small.unsaved()
    large.restore(stored({"A": small.snapshot(slot)}), 0, 5)
    more = EventBatch.of(["A"] * 5, [9, 10, 11, 12, 13], [0] * 5, list(range(5, 10)))
    shown = [item["tokens"][1:] for item in seen(large, large.apply(more))]
    everything = [*tokens, 9, 10, 11, 12, 13]
    assert shown == [everything[max(2, end - 6) : end] for end in range(6, 11)]
    (slot,) = large.unsaved()
    assert large.snapshot(slot).tokens.tolist() == everything[-6:]


def test_a_limit_below_what_was_stored_lets_nothing_more_in():
    before = WindowStore(window=WINDOW, every=1, idle_timeout=IDLE)
    names = [f"b{number}" for number in range(10)]
    for _ in before.apply(EventBatch.of(names, [4] * 10, [0] * 10, list(range(10)))):
        pass
    after = WindowStore(window=WINDOW, every=1, idle_timeout=IDLE, limit=3)
    after.restore(stored({before.block(slot): before.snapshot(slot) for slot in before.unsaved()}), 0, 10)
    for _ in after.apply(
        EventBatch.of([f"n{number}" for number in range(20)], [4] * 20, [0] * 20, list(range(10, 30)))
    ):
        pass
    assert after.open_blocks <= 10


def closing_order(store, portions):
    return [shown["block"] for shown in seen(store, portions) if shown["closing"]]


def test_blocks_of_one_line_keep_their_order_over_a_restart():
    """Whatever the order of their records: else another one would be closed to make room."""
    names = [f"b{number}" for number in range(40)]
    before = WindowStore(window=WINDOW, every=1, idle_timeout=IDLE)
    for _ in before.apply(EventBatch.of(names, [4] * 40, [0] * 40, [7] * 20 + [8] * 20)):
        pass  # two lines
    lines = [*sorted(names[:20]), *sorted(names[20:])]
    states = {before.block(slot): before.snapshot(slot) for slot in before.unsaved()}
    after = WindowStore(window=WINDOW, every=1, idle_timeout=IDLE, limit=40)
    after.restore(stored(dict(reversed(states.items()))), 0, 9)
    junk = EventBatch.of([f"n{number}" for number in range(10)], [4] * 10, [0] * 10, range(9, 19))
    assert closing_order(after, after.apply(junk)) == lines[:10]
    assert closing_order(after, after.close_all(30)) == lines[10:]
    assert closing_order(before, before.close_all()) == lines


def test_a_restored_session_whose_last_event_does_not_come_by_expires_all_the_same():
    """A smaller windows.max_ahead refuses events that were taken in before."""
    before = WindowStore(window=WINDOW, every=1, idle_timeout=IDLE)
    for _ in before.apply(EventBatch.of("YXZXV", [4] * 5, [0, 0, 0, 1, 1], range(5))):
        pass
    states = {before.block(slot): before.snapshot(slot) for slot in before.unsaved()}
    after = WindowStore(window=WINDOW, every=1, idle_timeout=IDLE, limit=4)
    after.restore(stored(states), 0, 1)
    replayed = EventBatch.of("XZV", [4] * 3, [0, 0, 1], [1, 2, 4])  # not X's last event, at 3
    assert closing_order(after, after.apply(replayed)) == []
    after.end_replay()
    more = EventBatch.of(["n", "late"], [4, 4], [1, 100], [5, 6])
    assert closing_order(after, after.apply(more)) == ["Y", "Z", "X", "V", "n"]
    assert after.open_blocks == 1


far_events = st.lists(
    st.tuples(
        st.sampled_from("ABC"),
        st.integers(4, 9),
        st.integers(0, 60) | st.integers(0, 2**42),
        st.integers(1, 9) | st.just(2**33),
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(far_events)
def test_records_in_bulk_are_those_of_the_plain_description(events):
    """Written one by one and in bulk they are the same bytes, and either way they are read as what they were."""
    store = WindowStore(window=WINDOW, every=1, idle_timeout=2**50)
    offsets = list(itertools.accumulate(step for *_, step in events))
    batch = EventBatch.of(*([row[column] for row in events] for column in range(3)), offsets)
    for _ in store.apply(batch):
        pass
    slots = store.unsaved()
    vocabulary = Vocabulary(tuple(f"event {number}" for number in range(20)))
    name = vocabulary_id(vocabulary.events)
    states = {store.block(slot): store.snapshot(slot) for slot in slots.tolist()}
    for record, state in zip(store.packed(slots, name), states.values(), strict=True):
        assert record in (None, state.pack(name))
        assert record is not None or max(offsets) > 2**32 or max(batch.times) >= 2**31
    again = WindowStore(window=WINDOW, every=1, idle_timeout=2**50)
    again.restore(StoredSessions.of(states, vocabulary), store.watermark, offsets[-1] + 1)
    found = {again.block(slot): again.snapshot(slot) for slot in range(again.open_blocks)}
    assert found.keys() == states.keys()
    for block, state in states.items():
        for fact, value in vars(state).items():
            assert np.array_equal(getattr(found[block], fact), value), fact
