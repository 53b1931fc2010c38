"""Byte strings in bulk, and an index of them: block ids to slots, for a million blocks and more.

The index is a hash table in plain arrays with linear probing; deletion shifts back (Knuth, The Art of Computer
Programming, vol. 3, 6.4, algorithm R), so that names which come and go leave no trace. The table holds a slot and 32
bits of its name's hash; the names lie in one buffer, made anew when those of forgotten slots have filled it. Hashes are
seeded at random: nobody can choose block ids that collide. They are the same in all indices of a process, so that
names which are looked for in many of them are hashed once.
"""

import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.jit import njit

NONE = -1
"""No slot; the size of what is no string."""

_SLOTS, _NAME_BYTES = 1024, 32
"""To begin with."""

_SEED = secrets.randbits(63)
"""Of the hashes."""


@dataclass(frozen=True)
class Names:
    """Byte strings in one buffer: string i is `data[begin[i] : begin[i] + size[i]]`.

    Attributes:
        data: (B,) the bytes of these strings and maybe of others.
        begin, size: (N,) each.
    """

    data: NDArray[np.uint8]
    begin: NDArray[np.int64]
    size: NDArray[np.int32]

    @classmethod
    def of(cls, strings: Iterable[bytes | None]) -> "Names":
        """Lay strings side by side; one that is None has the size `NONE`."""
        strings = list(strings)
        data = np.frombuffer(msgspec.msgpack.encode(strings), np.uint8)  # len() of each takes far longer
        names = cls(data, np.empty(len(strings), np.int64), np.empty(len(strings), np.int32))
        _find_packed(data, names.begin, names.size)
        return names

    @classmethod
    def joined(cls, parts: "Sequence[Names]") -> "Names":
        """Lay all strings of some parts, one at least, into one buffer."""
        room = np.array([len(part.data) for part in parts], np.int64)
        shifts = np.repeat(np.cumsum(room) - room, [len(part) for part in parts])
        data, begin, size = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("data", "begin", "size")
        )
        return cls(data, begin + shifts, size)

    @cached_property
    def hashes(self) -> NDArray[np.int32]:
        """(N,) by which an index knows the strings; worked out once, so the strings must not change after that."""
        hashes = np.empty(len(self), np.int32)
        _hash(*self.columns(), _SEED, hashes)
        return hashes

    def __len__(self) -> int:
        return len(self.begin)

    def __getitem__(self, place: int) -> bytes:
        begin = int(self.begin[place])
        return self.data[begin : begin + int(self.size[place])].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        data, ends = self.data.data, self.begin + self.size
        return (data[begin:end].tobytes() for begin, end in zip(self.begin.tolist(), ends.tolist(), strict=True))

    def take(self, rows: "NDArray[np.int64] | NDArray[np.bool_] | slice") -> "Names":
        """Return some of the strings; the buffer is shared."""
        return Names(self.data, self.begin[rows], self.size[rows])

    def columns(self) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
        """Return data, begin and size, always of one type each, for which loops over names are compiled once."""
        data = self.data.view()
        data.flags.writeable = False
        return data, np.ascontiguousarray(self.begin, np.int64), np.ascontiguousarray(self.size, np.int64)


class _Table(NamedTuple):
    entries: NDArray[np.int32]  # (C, 2) a slot, or NONE; its name's hash, whose low bits say where it belongs
    places: NDArray[np.int64]  # (S, 2) where a slot's name begins in `data`; its size, 0: the slot is free
    free: NDArray[np.int32]  # (S,) a stack of the slots that were used before
    counts: NDArray[np.int64]  # (4,) by the names below
    data: NDArray[np.uint8]  # (B,)


_TAKEN, _STACKED, _USED, _FILLED = range(4)
"""Counts: slots that have a name, slots on the stack, slots ever used, bytes written."""


class NameIndex:
    """Gives each name a slot, a small number, as long as it is not forgotten; free slots are given again."""

    def __init__(self) -> None:
        self._table = _Table(
            np.full((2 * _SLOTS, 2), NONE, np.int32),
            np.zeros((_SLOTS, 2), np.int64),
            np.zeros(_SLOTS, np.int32),
            np.zeros(4, np.int64),
            np.zeros(_SLOTS * _NAME_BYTES, np.uint8),
        )

    def __len__(self) -> int:
        return int(self._table.counts[_TAKEN])

    @property
    def capacity(self) -> int:
        """Slots are smaller than this; it only grows."""
        return len(self._table.places)

    def find(self, names: Names) -> NDArray[np.int32]:
        """Return the slot of each name (N,), `NONE` where it has none."""
        return self._located(names, np.zeros(len(names), np.bool_))

    def locate(self, names: Names, add: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Return the slot of each name (N,); one that has none is given one where `add` (N,) says so."""
        self._make_room(int(np.count_nonzero(add)), int(names.size[add].sum()))
        return self._located(names, add)

    def name(self, slot: int) -> bytes:
        """Return the name of a slot that has one."""
        begin, size = self._table.places[slot].tolist()
        return self._table.data[begin : begin + size].tobytes()

    def names(self, slots: NDArray[np.int32]) -> Names:
        """Return the names of slots (N,): views, valid until the next name is added."""
        return Names(self._table.data, *self._table.places[slots].T)

    def forget(self, slots: NDArray[np.int32]) -> None:
        """Take the names of these slots (N,) away."""
        _forget(self._table, slots, self.names(slots).hashes)

    def _located(self, names: Names, add: NDArray[np.bool_]) -> NDArray[np.int32]:
        slots = np.empty(len(names), np.int32)
        _locate(self._table, *names.columns(), names.hashes, add, slots)
        return slots

    def _make_room(self, names: int, size: int) -> None:
        """Grow before the compiled loop begins, so that it never has to."""
        table = self._table
        capacity, data = self.capacity, table.data
        while len(self) + names > capacity:
            capacity *= 2
        if capacity > self.capacity:
            entries = np.full((2 * capacity, 2), NONE, np.int32)
            _rehash(table.entries, entries)
            self._table = _Table(
                entries, grown(table.places, capacity), grown(table.free, capacity), table.counts, data
            )
        if table.counts[_FILLED] + size > len(data):
            live, room = int(self._table.places[:, 1].sum()), len(data)
            while 2 * (live + size) > room:
                room *= 2
            self._table = self._table._replace(data=grown(data[:0], room))
            _move_names(self._table, data)


def grown(array: NDArray[Any], length: int) -> NDArray[Any]:
    """Return a longer array with the same rows, then zeros; these take no memory before they are written.

    Its memory is its own: what a shorter array leaves behind would else stay with the process, in pieces.
    """
    shape = (length, *array.shape[1:])
    own = mmap(-1, max(1, prod(shape) * array.dtype.itemsize), flags=MAP_PRIVATE | MAP_ANONYMOUS)
    larger: NDArray[Any] = np.ndarray(shape, array.dtype, own)
    larger[: len(array)] = array
    return larger


@njit(cache=True)
def _find_packed(data, begins, sizes):
    """Find the byte strings and nils of an array in MessagePack, whose sizes have 8, 16 or 32 bits.

    The format: https://github.com/msgpack/msgpack/blob/master/spec.md
    """
    at = 1 if len(begins) < 16 else 3 if len(begins) < 1 << 16 else 5  # the array says how many there are
    for i in range(len(begins)):
        kind, size = data[at], 0
        at += 1
        if kind == 0xC0:
            begins[i], sizes[i] = at, NONE
            continue
        for _ in range(1 << (kind - 0xC4)):
            size = size << 8 | data[at]
            at += 1
        begins[i], sizes[i] = at, size
        at += size


@njit(cache=True)
def _locate(table, data, begins, sizes, tags, add, out):
    mask = len(table.entries) - 1
    for i in range(len(begins)):
        begin, size, tag = begins[i], sizes[i], tags[i]
        at = np.int64(tag) & mask
        while table.entries[at, 0] != NONE:
            if table.entries[at, 1] == tag and _is_name(table, table.entries[at, 0], data, begin, size):
                break
            at = (at + 1) & mask
        if table.entries[at, 0] == NONE and add[i]:
            slot = _take_slot(table)
            filled = table.counts[_FILLED]
            table.data[filled : filled + size] = data[begin : begin + size]
            table.places[slot, 0] = filled
            table.places[slot, 1] = size
            table.counts[_FILLED] += size
            table.entries[at, 0] = slot
            table.entries[at, 1] = tag
        out[i] = table.entries[at, 0]


@njit(cache=True)
def _take_slot(table):
    counts = table.counts
    counts[_TAKEN] += 1
    if counts[_STACKED] > 0:
        counts[_STACKED] -= 1
        return table.free[counts[_STACKED]]
    counts[_USED] += 1
    return np.int32(counts[_USED] - 1)


@njit(cache=True)
def _is_name(table, slot, data, begin, size):
    if table.places[slot, 1] != size:
        return False
    own = table.places[slot, 0]
    for k in range(size):
        if table.data[own + k] != data[begin + k]:
            return False
    return True


@njit(cache=True)
def _forget(table, slots, tags):
    mask = len(table.entries) - 1
    counts, entries = table.counts, table.entries
    for i in range(len(slots)):
        slot, hole = slots[i], np.int64(tags[i]) & mask
        while entries[hole, 0] != slot:
            hole = (hole + 1) & mask
        at = (hole + 1) & mask
        while entries[at, 0] != NONE:  # close the gap with names that belong at it or before it
            home = np.int64(entries[at, 1]) & mask
            if (at - home) & mask >= (at - hole) & mask:
                entries[hole] = entries[at]
                hole = at
            at = (at + 1) & mask
        entries[hole, 0] = NONE
        table.places[slot, 1] = 0
        table.free[counts[_STACKED]] = slot
        counts[_STACKED] += 1
        counts[_TAKEN] -= 1


@njit(cache=True)
def _rehash(old, entries):
    mask = len(entries) - 1
    for i in range(len(old)):
        if old[i, 0] != NONE:
            at = np.int64(old[i, 1]) & mask
            while entries[at, 0] != NONE:
                at = (at + 1) & mask
            entries[at] = old[i]


@njit(cache=True)
def _move_names(table, old):
    filled = 0
    for slot in range(len(table.places)):
        begin, size = table.places[slot]
        if size > 0:
            table.data[filled : filled + size] = old[begin : begin + size]
            table.places[slot, 0] = filled
            filled += size
    table.counts[_FILLED] = filled


@njit(cache=True)
def _hash(data, begins, sizes, seed, out):
    for i in range(len(begins)):
        out[i] = np.int32(digest_of(data, begins[i], sizes[i], seed) & np.uint64(0xFFFFFFFF))


@njit(cache=True)
def digest_of(data, begin, size, seed):
    """Hash a string to 64 bits, eight bytes a round."""
    digest = np.uint64(seed) ^ np.uint64(size)
    word = np.uint64(0)
    for k in range(size):
        word = (word << np.uint64(8)) | np.uint64(data[begin + k])
        if k & 7 == 7 or k == size - 1:
            digest = mix(digest, word)
            word = np.uint64(0)
    return digest


@njit(cache=True, inline="always")
def mix(digest, word):
    """One round of a 64-bit hash (the finaliser of splitmix64)."""
    digest = digest ^ (np.uint64(word) + np.uint64(0x9E3779B97F4A7C15))
    digest = (digest ^ (digest >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    digest = (digest ^ (digest >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return digest ^ (digest >> np.uint64(31))
