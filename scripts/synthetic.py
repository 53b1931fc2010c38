"""Failures made from healthy sessions: what a model can be chosen by where nobody has labels.

Each kind breaks a session as systems break it. What comes out equal to a known healthy session is drawn again: no
model could tell it apart.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from model.sessions import Session

Events = tuple[str, ...]

_TRIES = 1000


@dataclass(frozen=True)
class _Chance:
    """What a failure is drawn from: luck, other healthy sessions, and the known event ids."""

    random: Random
    sessions: Sequence[Events]
    events: Sequence[str]


def _truncated(events: Events, chance: _Chance) -> Events:
    """The session stops anywhere before its end."""
    return events[: chance.random.randrange(1, max(2, len(events)))]


def _run_missing(events: Events, chance: _Chance) -> Events:
    """Two to five events in a row are missing."""
    length = chance.random.randint(2, 5)
    begin = chance.random.randrange(max(1, len(events) - length))
    return events[:begin] + events[begin + length :]


def _kind_missing(events: Events, chance: _Chance) -> Events:
    """Every event of one kind is missing: a step that never happened."""
    gone = chance.random.choice(events)
    return tuple(event for event in events if event != gone)


def _misplaced(events: Events, chance: _Chance) -> Events:
    """One to three known events stand where they have no business."""
    for _ in range(chance.random.randint(1, 3)):
        at = chance.random.randint(0, len(events))
        events = (*events[:at], chance.random.choice(chance.events), *events[at:])
    return events


def _storm(events: Events, chance: _Chance) -> Events:
    """One to three events in a row are repeated three to six times: something is tried again and again."""
    length = chance.random.randint(1, 3)
    begin = chance.random.randrange(max(1, len(events) - length))
    run = events[begin : begin + length]
    return events[:begin] + run * chance.random.randint(3, 6) + events[begin + length :]


def _spliced(events: Events, chance: _Chance) -> Events:
    """The session goes on as another one: a wrong turn."""
    other = chance.random.choice(chance.sessions)
    return events[: chance.random.randrange(1, max(2, len(events)))] + other[chance.random.randrange(len(other)) :]


KINDS: Mapping[str, Callable[[Events, _Chance], Events]] = {
    "truncated": _truncated,
    "run missing": _run_missing,
    "kind missing": _kind_missing,
    "misplaced": _misplaced,
    "storm": _storm,
    "spliced": _spliced,
}
"""What breaks a session, by the name of the failure."""


def broken(
    sessions: Sequence[Session], known: Collection[Events], *, count: int, seed: int
) -> dict[str, list[Session]]:
    """Return up to `count` failures of each kind, made from `sessions`; none equals one of the `known` healthy ones.

    The same seed gives the same failures.
    """
    healthy = [session.events for session in sessions]
    chance = _Chance(Random(seed), healthy, sorted({event for events in known for event in events}))
    made: dict[str, list[Session]] = {kind: [] for kind in KINDS}
    for kind, apply in KINDS.items():
        for _ in range(count + _TRIES):
            failure = apply(chance.random.choice(healthy), chance)
            if failure and failure not in known and len(made[kind]) < count:
                made[kind].append(Session(f"{kind} {len(made[kind])}", failure, anomalous=True))
    return made
