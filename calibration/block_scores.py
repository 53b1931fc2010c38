"""Block scores, through the very windows and scores of the stream."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from consumer.events import TOMBSTONE, EventBatch
from consumer.looks import Looks
from consumer.scores import LookScores
from consumer.windows import WindowStore
from model.scoring import Scorer
from model.sessions import Session
from model.vocabulary import BOS, PAD, UNK, Vocabulary

CACHE = 4_000_000
"""Distinct windows whose exact score is remembered."""

HIGHEST = 10
"""How many of the highest blocks are kept whole, to be shown to people."""

_SESSIONS_AT_A_TIME = 512
_NEVER = 2**62


@dataclass(frozen=True)
class Block:
    """A session that is over.

    Attributes:
        name: block id.
        score: the highest over all looks: the block score.
        looked: how many looks there were.
        looks: their scores in order, the last one that of the closing look; none where they are not kept.
        row: (window + 2,) the look with the highest score, as the network sees it; the first of them.
        unknown: event ids of the UNK tokens in `row`, by place.
        seen: events of the session up to that look.
        count: events of the session.
        first_offset: of the session.
    """

    name: str
    score: float
    looked: int
    looks: list[float]
    row: NDArray[np.uint16]
    unknown: Mapping[int, str]
    seen: int
    count: int
    first_offset: int

    def events(self, vocabulary: Vocabulary) -> list[str]:
        """Return the event ids of `row`, as an alert would name them."""
        tokens = self.row[(self.row != PAD) & (self.row != BOS)].tolist()
        return [self.unknown.get(place, vocabulary.name(token)) for place, token in enumerate(tokens, 1)]


@dataclass
class _Open:
    """The same of a session that is not over."""

    score: float = -np.inf
    looked: int = 0
    looks: list[float] = field(default_factory=list)
    row: NDArray[np.uint16] = field(default_factory=lambda: np.empty(0, np.uint16))
    unknown: Mapping[int, str] = field(default_factory=dict)
    seen: int = 0


class SessionScores:
    """Exact scores of one partition's sessions, each handed out when it closes.

    Args:
        scores: of the model, without a threshold.
        every, idle_timeout: as `WindowStore`. No session is closed to make room: what is not whole says nothing.
        keep_looks: whether blocks bring the scores of all looks; in a stream some may never end.
    """

    def __init__(self, scores: LookScores, *, every: int, idle_timeout: int = _NEVER, keep_looks: bool = False) -> None:
        self._keep_looks = keep_looks
        self._scores = scores
        self._store = WindowStore(window=scores.scorer.bundle.window, every=every, idle_timeout=idle_timeout)
        self._open: dict[int, _Open] = {}

    def take(self, batch: EventBatch) -> Iterator[Block]:
        """Take in events and yield the sessions that closed; the iterator must be exhausted."""
        for looks in self._store.apply(batch):
            facts, scores = looks.facts, self._scores.of(looks)
            unknown = (looks.rows == UNK).any(axis=1)
            columns = (facts["slot"], facts["closing"], unknown, scores)
            for place, (slot, closing, has_unknown, score) in enumerate(
                zip(*(c.tolist() for c in columns), strict=True)
            ):
                session = self._open.setdefault(slot, _Open())
                session.looked += 1
                if self._keep_looks:
                    session.looks.append(score)
                if score > session.score:
                    session.score, session.row = score, looks.rows[place].copy()
                    session.seen = int(facts["count"][place])
                    session.unknown = self._names(looks, place) if has_unknown else {}
                if closing:
                    del self._open[slot]
                    yield Block(
                        name=self._store.block(slot),
                        score=session.score,
                        looked=session.looked,
                        looks=session.looks,
                        row=session.row,
                        unknown=session.unknown,
                        seen=session.seen,
                        count=int(facts["count"][place]),
                        first_offset=int(facts["first_offset"][place]),
                    )

    @property
    def open_blocks(self) -> int:
        """Number of sessions that are not over."""
        return self._store.open_blocks

    def open_since(self) -> list[int]:
        """Return the first offset of each session that is still open."""
        return self._store.first_offsets().tolist()

    def _names(self, looks: Looks, place: int) -> dict[int, str]:
        names = self._store.unknown(int(looks.facts["slot"][place]))
        places = np.flatnonzero(looks.rows[place] == UNK).tolist()
        return {at: names[int(looks.offsets[place, at - 1])] for at in places}


@dataclass(frozen=True)
class BlockScores:
    """Scores of N sessions in their order.

    Attributes:
        blocks: (N,) the highest score over all looks of the session.
        looks: one (L,) array a session: the scores of its looks in order; the last one is the closing look.
        lengths: (N,) events of the session.
        distinct: distinct windows among all looks.
        highest: the `HIGHEST` sessions with the highest scores, descending.
    """

    blocks: NDArray[np.float64]
    looks: list[NDArray[np.float64]]
    lengths: NDArray[np.int64]
    distinct: int
    highest: list[Block]


def block_scores(
    sessions: Sequence[Session], scorer: Scorer, *, every: int, report: Callable[[int], None] = lambda _: None
) -> BlockScores:
    """Score whole sessions exactly, each one closed by a tombstone as the stream would.

    `report` is told, now and then, how many more sessions are done.
    """
    scores = LookScores(scorer, None, CACHE)
    judge = SessionScores(scores, every=every, keep_looks=True)
    looks: list[NDArray[np.float64]] = []
    highest: list[Block] = []
    for first in range(0, len(sessions), _SESSIONS_AT_A_TIME):
        some = sessions[first : first + _SESSIONS_AT_A_TIME]
        for session, block in zip(some, judge.take(_events(some, scorer.bundle.vocabulary)), strict=True):
            looks.append(np.array(block.looks))
            keep_highest(highest, replace(block, name=session.block_id))
        report(len(some))
    return BlockScores(
        blocks=np.array([session.max() for session in looks]),
        looks=looks,
        lengths=np.array([len(session.events) for session in sessions]),
        distinct=scores.scored,
        highest=highest,
    )


def keep_highest(highest: list[Block], block: Block) -> None:
    """Put `block` into its place among the highest, if it belongs there; of equals the first ones stay."""
    if len(highest) < HIGHEST or block.score > highest[-1].score:
        highest.append(block)
        highest.sort(key=lambda item: -item.score)
        del highest[HIGHEST:]


def _events(sessions: Sequence[Session], vocabulary: Vocabulary) -> EventBatch:
    """Lay sessions end to end. Blocks are numbered afresh: two sessions may bear one name."""
    blocks: list[str] = []
    tokens: list[int] = []
    unknown: dict[int, str] = {}
    for number, session in enumerate(sessions):
        encoded = vocabulary.encode(session.events)
        unknown |= {
            len(tokens) + place: event
            for place, (event, token) in enumerate(zip(session.events, encoded, strict=True))
            if token == UNK
        }
        tokens += [*encoded, TOMBSTONE]
        blocks += [str(number)] * (len(encoded) + 1)
    return EventBatch.of(blocks, tokens, [0] * len(tokens), range(len(tokens)), unknown)
