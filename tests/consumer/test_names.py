"""The index against a dictionary."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consumer.names import NONE, NameIndex, Names

names = st.integers(0, 3000).map(lambda number: f"name {number}".encode()) | st.binary(min_size=1, max_size=40)
steps = st.lists(
    st.tuples(st.lists(st.tuples(names, st.booleans()), max_size=200), st.randoms(use_true_random=False)), max_size=12
)


@settings(max_examples=150, deadline=None)
@given(steps)
def test_an_index_is_a_dictionary(history):
    index, known = NameIndex(), {}
    for asked, random in history:
        slots = index.locate(Names.of(name for name, _ in asked), np.array([add for _, add in asked], np.bool_))
        for (name, add), slot in zip(asked, slots.tolist(), strict=True):
            if name not in known and add:
                known[name] = slot
            assert slot == known.get(name, NONE)
        assert len(index) == len(known) == len(set(known.values()))
        gone = [name for name in known if random.random() < 0.4]
        index.forget(np.array([known.pop(name) for name in gone], np.int32))
        assert index.find(Names.of(gone)).tolist() == [NONE] * len(gone)
        assert index.find(Names.of(known)).tolist() == list(known.values())
        assert list(index.names(np.array(list(known.values()), np.int32))) == list(known)


def back(found):
    return [None if size == NONE else found[place] for place, size in enumerate(found.size.tolist())]


sizes = st.sampled_from([0, 1, 31, 255, 256, 65_535, 65_536]) | st.integers(0, 70_000)


@settings(max_examples=60, deadline=None)
@given(st.lists(sizes.map(lambda size: b"\xc0" * size) | st.none(), max_size=20))
def test_strings_of_any_size_lie_side_by_side(strings):
    assert back(Names.of(strings)) == strings


@pytest.mark.parametrize("count", [0, 1, 15, 16, 65_535, 65_536])
def test_any_number_of_strings_lies_side_by_side(count):
    strings = [None if place % 7 == 5 else b"%d" % place for place in range(count)]
    assert back(Names.of(strings)) == strings


def test_names_that_come_and_go_leave_no_trace():
    index = NameIndex()
    for begin in range(0, 200_000, 500):
        some = Names.of(f"a name of some length {number}".encode() for number in range(begin, begin + 500))
        index.forget(index.locate(some, np.ones(500, np.bool_)))
    assert len(index) == 0
    assert index.capacity == 1024
    assert len(index._table.data) <= 1 << 16


def test_names_of_many_buffers_are_found_together_in_any_index():
    parts = [Names.of([b"one", b"two", b"three"]).take(slice(1, 3)), Names.of([]), Names.of([b"", b"four"])]
    together = Names.joined(parts)
    assert list(together) == [b"two", b"three", b"", b"four"]
    for known in ([b"three", b"four"], [b"four", b"two", b"three"]):
        index = NameIndex()
        index.locate(Names.of(known), np.ones(len(known), np.bool_))
        assert [known[slot] for slot in index.find(together).tolist() if slot != NONE] == [
            name for name in together if name in known
        ]
