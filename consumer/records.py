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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from struct import Struct
from struct import error as StructError
from typing import Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

VERSION = 2

BLOCK, VOCABULARY, CHECKPOINT, DRIFT = b"B", b"V", b"C", b"D"

Question = Literal["tail", "body"]
"""What `consumer.drift` asks: do too many blocks alert, or do the silent ones score otherwise than they did?"""

_HEAD = Struct("<BB8sqqqqqqIdqBH")
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
        head = _HEAD.pack(
            VERSION, flags, vocabulary, self.count, self.seen, self.first_offset, self.first_time, self.last_offset,
            self.last_time, self.revision, self.score, self.position, self.level, len(self.tokens),
        )  # fmt: skip
        names = msgspec.msgpack.encode(dict(self.unknown)) if self.unknown else b""
        return b"".join(
            (
                head,
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
            version, flags, vocabulary, count, seen, first_offset, first_time, last_offset, last_time, \
                revision, score, position, level, length = _HEAD.unpack_from(record)  # fmt: skip
            if version != VERSION:
                raise DamagedRecordError(f"record version {version}, but this program reads {VERSION}")
            at = _HEAD.size
            columns = []
            for kind in (
                np.dtype("<u2"),
                np.dtype("<i8" if flags & _WIDE_OFFSETS else "<u4"),
                np.dtype("<i8" if flags & _WIDE_TIMES else "<i4"),
            ):
                columns.append(np.frombuffer(record, kind, length, at))
                at += length * kind.itemsize
            names = msgspec.msgpack.decode(record[at:], type=dict[int, str]) if len(record) > at else {}
        except (StructError, ValueError, msgspec.DecodeError) as error:
            raise DamagedRecordError(str(error)) from None
        tokens, back, since = columns
        return (
            cls(
                count, seen, first_offset, first_time, last_offset, last_time,
                tokens, last_offset - back.astype(np.int64), first_time + since.astype(np.int64), names,
                revision, score, position, level, bool(flags & _CLOSED),
            ),
            vocabulary,
        )  # fmt: skip


class Checkpoint(msgspec.Struct, frozen=True):
    """Every open session with an event before `offset` has a record. `watermark` is the one at `offset`."""

    offset: int
    watermark: int
    group: str
    version: int = VERSION

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
