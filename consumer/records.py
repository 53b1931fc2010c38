"""State records: what a session is on the state topic, byte by byte.

A state partition belongs to the input partition of the same number. It holds four kinds of records, told apart by
the first byte of the key:

    B<block id>     a session: its window, its counters, what its last alert said (`SessionState`)
    V<8 bytes>      the event ids of a vocabulary, in token order, so that windows outlive a change of model
    C               the checkpoint (`Checkpoint`)
    D               since when today's model and threshold judge, and the drift seen since (`DriftState`)

A session's record covers its events up to `last_offset`. No record: the session is closed, or all its events lie
behind the checkpoint. All integers are little-endian. A window's offsets are stored as distances back from
`last_offset` and its times as distances from `first_time`, in 4 bytes where they fit and in 8 where not.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from consumer.names import Names
from model.vocabulary import SPECIAL, UNK, Vocabulary

VERSION = 2

BLOCK, VOCABULARY, CHECKPOINT, DRIFT = b"B", b"V", b"C", b"D"

Question = Literal["tail", "body"]
"""What `consumer.drift` asks: do too many blocks alert, or do the silent ones score otherwise than they did?"""

HEAD = np.dtype(
    [
        ("version", "u1"),
        ("flags", "u1"),
        ("vocabulary", "u1", (8,)),
        ("count", "<i8"),
        ("seen", "<i8"),
        ("first_offset", "<i8"),
        ("first_time", "<i8"),
        ("last_offset", "<i8"),
        ("last_time", "<i8"),
        ("revision", "<u4"),
        ("score", "<f8"),
        ("position", "<i8"),
        ("level", "u1"),
        ("length", "<u2"),
    ]
)
"""What a session's record begins with; then come its tokens, offsets and times, and the names of unknown events."""

EVENT_BYTES = 10
"""Of a token, an offset and a time."""

_VOCABULARY = slice(2, 10)
_FACTS = ("count", "seen", "first_offset", "first_time", "last_offset", "last_time", "revision", "score", "position",
          "level")  # fmt: skip
_WIDE_OFFSETS, _WIDE_TIMES, _CLOSED = 1, 2, 4


class DamagedRecordError(ValueError):
    """A state record that this version did not write."""


@dataclass(frozen=True)
class SessionState:
    """A session as it is stored.

    Attributes:
        count: events so far; 0 with `closed`.
        seen: the watermark at the last event.
        first_offset, first_time, last_offset, last_time: of the session's events.
        tokens, offsets, times: (L,) the window, the oldest event first.
        unknown: event id, by offset, of the window's UNK tokens.
        revision, score, position: what the last alert said; revision 0: none.
        level: of the highest score of its looks so far (`consumer.drift.levels`).
        closed: the session was closed by the wall clock or to make room; events up to `last_offset` are done with.
    """

    count: int
    seen: int
    first_offset: int
    first_time: int
    last_offset: int
    last_time: int
    tokens: NDArray[np.uint16]
    offsets: NDArray[np.int64]
    times: NDArray[np.int64]
    unknown: Mapping[int, str] = field(default_factory=dict)
    revision: int = 0
    score: float = 0.0
    position: int = 0
    level: int = 0
    closed: bool = False

    def pack(self, vocabulary: bytes) -> bytes:
        """Return the record; `vocabulary` is the id of the tokens' vocabulary."""
        back = self.last_offset - self.offsets
        since = self.times - self.first_time
        wide_offsets = bool(len(back)) and int(back.max()) >= 1 << 32
        wide_times = bool(len(since)) and int(np.abs(since).max()) >= 1 << 31
        flags = _WIDE_OFFSETS * wide_offsets | _WIDE_TIMES * wide_times | _CLOSED * self.closed
        head = np.zeros(1, HEAD)
        head[0] = (
            VERSION, flags, np.frombuffer(vocabulary, np.uint8), self.count, self.seen, self.first_offset,
            self.first_time, self.last_offset, self.last_time, self.revision, self.score, self.position, self.level,
            len(self.tokens),
        )  # fmt: skip
        names = msgspec.msgpack.encode(dict(self.unknown)) if self.unknown else b""
        return b"".join(
            (
                head.tobytes(),
                self.tokens.astype("<u2").tobytes(),
                back.astype("<i8" if wide_offsets else "<u4").tobytes(),
                since.astype("<i8" if wide_times else "<i4").tobytes(),
                names,
            )
        )

    @classmethod
    def unpack(cls, record: bytes) -> tuple["SessionState", bytes]:
        """Return the session and the id of its tokens' vocabulary.

        Raises:
            DamagedRecordError: this is no record of this version.
        """
        try:
            head = dict(zip(HEAD.names or (), np.frombuffer(record, HEAD, 1)[0].item(), strict=True))
            if head["version"] != VERSION:
                raise DamagedRecordError(f"record version {head['version']}, but this program reads {VERSION}")
            at, flags, length = HEAD.itemsize, head["flags"], head["length"]
            columns = []
            for kind in (
                np.dtype("<u2"),
                np.dtype("<i8" if flags & _WIDE_OFFSETS else "<u4"),
                np.dtype("<i8" if flags & _WIDE_TIMES else "<i4"),
            ):
                columns.append(np.frombuffer(record, kind, length, at))
                at += length * kind.itemsize
            names = msgspec.msgpack.decode(record[at:], type=dict[int, str]) if len(record) > at else {}
        except (ValueError, msgspec.DecodeError) as error:
            raise DamagedRecordError(str(error)) from None
        tokens, back, since = columns
        facts = {name: head[name] for name in _FACTS}
        state = cls(
            **facts,
            tokens=tokens,
            offsets=facts["last_offset"] - back.astype(np.int64),
            times=facts["first_time"] + since.astype(np.int64),
            unknown=names,
            closed=bool(flags & _CLOSED),
        )
        return state, record[_VOCABULARY]


class Translation(NamedTuple):
    """From the tokens of a stored vocabulary to today's.

    Attributes:
        events: the stored vocabulary's event ids in token order.
        table: (V,) today's token of each of its tokens; UNK where today's vocabulary lacks the event.
    """

    events: Sequence[str]
    table: NDArray[np.uint16]

    @classmethod
    def between(cls, events: Sequence[str], vocabulary: Vocabulary) -> "Translation":
        """Return the one from a vocabulary's events to another vocabulary."""
        return cls(events, np.array([*range(SPECIAL), *vocabulary.encode(events)], np.uint16))

    def translated(self, state: SessionState, vocabulary: Vocabulary) -> SessionState:
        """Say a session anew: events that are no longer known become UNK by name, and the other way round."""
        tokens = self.table[state.tokens]
        unknown = dict(state.unknown)
        for place, offset in enumerate(state.offsets.tolist()):
            if tokens[place] == UNK:
                name = unknown.get(offset) or self.events[state.tokens[place] - SPECIAL]
                tokens[place] = vocabulary.tokens.get(name, UNK)
                if tokens[place] == UNK:
                    unknown[offset] = name
                else:
                    unknown.pop(offset, None)
        return replace(state, tokens=tokens, unknown=unknown)


class StoredSessions:
    """Open sessions and markers, as a state partition holds them.

    Args:
        records: of blocks, by block id.
        translations: by the id of the vocabulary in which a record is written.
        vocabulary: today's.

    Attributes:
        names: (N,) block ids of the open sessions.
        records: (N,) their records.
        heads: (N,) of `HEAD`, what these begin with.
        markers: last offset by block id of those that were closed by the wall clock or to make room.

    Raises:
        DamagedRecordError: another version wrote them.
    """

    def __init__(
        self, records: Mapping[bytes, bytes], translations: Mapping[bytes, Translation], vocabulary: Vocabulary
    ) -> None:
        packed = Names.of(records.values())
        if (packed.size < HEAD.itemsize).any():
            raise DamagedRecordError("a session's record is cut off")
        heads = _heads(packed)
        if (heads["version"] != VERSION).any():
            raise DamagedRecordError(f"record version {heads['version'].max()}, but this program reads {VERSION}")
        self._translations = translations
        self._vocabulary = vocabulary
        names = Names.of(records)
        closed = (heads["flags"] & _CLOSED) > 0
        marked = np.flatnonzero(closed)
        self.markers = {names[place]: int(heads["last_offset"][place]) for place in marked.tolist()}
        self.names, self.records, self.heads = names.take(~closed), packed.take(~closed), heads[~closed]

    @classmethod
    def of(cls, sessions: Mapping[str, SessionState], vocabulary: Vocabulary) -> "StoredSessions":
        """Store sessions, by block id, that are in the tokens of `vocabulary`."""
        name = vocabulary_id(vocabulary.events)
        records = {block.encode(): state.pack(name) for block, state in sessions.items()}
        return cls(records, {name: Translation.between(vocabulary.events, vocabulary)}, vocabulary)

    def __len__(self) -> int:
        return len(self.names)

    def states(self) -> dict[str, SessionState]:
        """Return the open sessions by block id."""
        return {name.decode(): self.state(place) for place, name in enumerate(self.names)}

    def state(self, place: int) -> SessionState:
        """Return a session in today's vocabulary.

        Raises:
            DamagedRecordError: its record cannot be read, or is in a vocabulary that is not stored.
        """
        state, written_in = SessionState.unpack(self.records[place])
        if written_in not in self._translations:
            raise DamagedRecordError("a session's vocabulary is not stored")
        return self._translations[written_in].translated(state, self._vocabulary)

    def ordinary(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint16]]]:
        """Yield, by vocabulary, places of sessions that can be read in bulk, and the table of its `Translation`."""
        heads = self.heads
        plain = (heads["flags"] == 0) & (heads["revision"] == 0)
        plain &= self.records.size == HEAD.itemsize + EVENT_BYTES * heads["length"].astype(np.int64)
        written_in = np.ascontiguousarray(heads["vocabulary"]).view(np.uint64)[:, 0]
        for vocabulary in np.unique(written_in[plain]):
            translation = self._translations.get(vocabulary.tobytes())
            if translation is not None:
                yield np.flatnonzero(plain & (written_in == vocabulary)), translation.table


def _heads(records: Names) -> NDArray[np.void]:
    """Return the heads (N,) of records, some at a time: what says where their bytes are is larger than they."""
    heads = np.empty(len(records), HEAD)
    rows = heads.view(np.uint8).reshape(len(records), HEAD.itemsize)
    for begin in range(0, len(records), 10_000):
        some = slice(begin, begin + 10_000)
        rows[some] = records.data[records.begin[some, None] + np.arange(HEAD.itemsize)]
    return heads


class Bounds(NamedTuple):
    """What ends sessions, beside tombstones.

    Attributes:
        idle_timeout: milliseconds of event time after which a silent session closes.
        limit: open sessions at most; a further one closes the longest silent of them.
    """

    idle_timeout: int
    limit: int


class Checkpoint(msgspec.Struct, frozen=True):
    """Every open session with an event before `offset` has a record. `watermark` is the one at `offset`.

    `group` and `topic` are the consumer group and the event topic, `bounds` what ended sessions then; earlier versions
    noted neither topic nor bounds.
    """

    offset: int
    watermark: int
    group: str
    version: int = VERSION
    topic: str = ""
    bounds: Bounds | None = None

    def pack(self) -> bytes:
        """Return the record."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def unpack(cls, record: bytes) -> "Checkpoint":
        """Read the record.

        Raises:
            DamagedRecordError: this is no checkpoint of this version.
        """
        return _unpacked(record, cls)


class DriftState(msgspec.Struct):
    """What `consumer.drift` knows of a partition.

    Attributes:
        judge: names the model, threshold and drift settings that it was seen with (`consumer.drift.judge_id`).
        since: the input offset from which on these are in force. Sessions begun before it were judged by others, too.
        blocks: sessions begun since then that closed.
        alerting: those of them that alerted.
        counts: those of them that did not, by the level of their highest score.
        batch_alerting, batch_tilt, batch_spread: sums over the blocks of the unfinished batch.
        tail, body: evidence of the two questions, one number for each bet.
        alarm: the question that was answered with no, after `blocks` blocks.
    """

    judge: bytes
    since: int
    blocks: int = 0
    alerting: int = 0
    counts: list[int] = []
    batch_alerting: int = 0
    batch_tilt: float = 0.0
    batch_spread: float = 0.0
    tail: list[float] = []
    body: list[float] = []
    alarm: Question | None = None
    version: int = VERSION

    def pack(self) -> bytes:
        """Return the record."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def unpack(cls, record: bytes) -> "DriftState":
        """Read the record.

        Raises:
            DamagedRecordError: this is no such record of this version.
        """
        return _unpacked(record, cls)


_StateT = TypeVar("_StateT", Checkpoint, DriftState)


def _unpacked(record: bytes, kind: type[_StateT]) -> _StateT:
    try:
        state = msgspec.msgpack.decode(record, type=kind)
    except msgspec.DecodeError as error:
        raise DamagedRecordError(str(error)) from None
    if state.version != VERSION:
        raise DamagedRecordError(f"record version {state.version}, but this program reads {VERSION}")
    return state


def vocabulary_id(events: Sequence[str]) -> bytes:
    """Return the 8 bytes that name a vocabulary in session records."""
    return hashlib.blake2b(json.dumps(list(events)).encode(), digest_size=8).digest()


def closed_marker(last_offset: int) -> SessionState:
    """Return what stands for a session that was closed by the wall clock or to make room, up to `last_offset`."""
    nothing = np.empty(0, np.int64)
    return SessionState(0, 0, 0, 0, last_offset, 0, nothing.astype(np.uint16), nothing, nothing, closed=True)
