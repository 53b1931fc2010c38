"""What is published when a block looks wrong. The shape is fixed by alert.schema.json."""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import msgspec

from consumer.records import Question
from model.tally import Tallied
from model.vocabulary import OTHER_NAME, Vocabulary

SCHEMA_VERSION = 3

Reason = Literal["event", "truncated", "counts"]
"""What is wrong: an event where it stands, that the block ended where it did, or how often its events came."""

_NAMES_BYTES = 400_000
"""Of the event ids in an alert's window at most, so that with all else it stays below half of what brokers take."""

_ESCAPED = 6  # bytes of JSON that one character, or one byte of UTF-8, becomes at most: \u0001
_CUT = "…"


class Expected(msgspec.Struct, frozen=True):
    """What the model would have taken for normal at the offender's place."""

    event_id: str
    template: str | None
    probability: float

    @classmethod
    def of(cls, token: int, probability: float, vocabulary: Vocabulary) -> "Expected":
        """Name a token."""
        event = vocabulary.name(token)
        return cls(event, vocabulary.template(event), probability)


class Counted(msgspec.Struct, frozen=True):
    """How often a kind of event came in the window of a block that ended. `<OTHER>`: all that are not counted apart."""

    event_id: str
    template: str | None
    count: int
    usual: int
    surprisal: float

    @classmethod
    def of(cls, kind: Tallied, vocabulary: Vocabulary) -> "Counted":
        """Name a kind."""
        event = OTHER_NAME if kind.token is None else vocabulary.name(kind.token)
        return cls(event, vocabulary.template(event), kind.count, kind.usual, kind.surprisal)


class Offender(msgspec.Struct, frozen=True):
    """The event with the highest surprisal. `<END>` as event_id: it is the end of the block; `reason` says why."""

    position: int
    event_id: str
    template: str | None
    surprisal: float
    expected: tuple[Expected, ...]
    offset: int
    timestamp: str
    counts: tuple[Counted, ...] = ()


class WindowEvent(msgspec.Struct, frozen=True):
    """One event of the window with its surprisal in nats."""

    event_id: str
    surprisal: float


class Source(msgspec.Struct, frozen=True):
    """Where the session's events lie: both offsets inclusive."""

    topic: str
    partition: int
    first_offset: int
    last_offset: int


class Alert(msgspec.Struct, frozen=True):
    """A block whose look scored above the threshold. Holds nothing that depends on when it was computed."""

    schema_version: int
    alert_id: str
    revision: int
    block_id: str
    reason: Reason
    severity: str
    score: float
    threshold: float
    strategy: str
    p_value: float
    offender: Offender
    window: tuple[WindowEvent, ...]
    events_seen: int
    first_event_time: str
    last_event_time: str
    source: Source
    model: str
    drift: Question | None

    def encode(self) -> bytes:
        """Return the alert as JSON, the same bytes for the same alert."""
        return _encode(self)


_encode = msgspec.json.Encoder().encode


def fitting(names: Sequence[str]) -> Sequence[str]:
    """Return the event ids of a window, the long ones cut to one length if together they are too large for an alert."""
    if _ESCAPED * sum(map(len, names)) <= _NAMES_BYTES or len(msgspec.json.encode(names)) <= _NAMES_BYTES:
        return names
    limit = _NAMES_BYTES // len(names) // _ESCAPED - len(_CUT.encode())
    return [_cut(name, limit) for name in names]


def _cut(name: str, limit: int) -> str:
    encoded = name.encode()
    return name if len(encoded) <= limit else encoded[:limit].decode("utf-8", "ignore") + _CUT


def alert_id(topic: str, partition: int, first_offset: int, block_id: str) -> str:
    """Return the id that all revisions of a session's alert share: 32 hexadecimal digits."""
    name = f"{topic}\0{partition}\0{first_offset}\0{block_id}"
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@cache
def schema() -> dict[str, Any]:
    """Return the JSON Schema of an alert."""
    text = files("consumer").joinpath("alert.schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded
