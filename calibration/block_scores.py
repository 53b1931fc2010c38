"""Block scores of whole sessions, through the very windows and scores of the stream."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from consumer.events import TOMBSTONE, EventBatch
from consumer.scores import LookScores
from consumer.windows import WindowStore
from model.scoring import Scorer
from model.sessions import Session

_CACHE = 4_000_000
_SESSIONS_AT_A_TIME = 512
_NEVER = 2**62


@dataclass(frozen=True)
class BlockScores:
    """Scores of N sessions in their order.

    Attributes:
        blocks: (N,) the highest score over all looks of the session.
        looks: one (L,) array a session: the scores of its looks in order; the last one is the closing look.
        lengths: (N,) events of the session.
        distinct: distinct windows among all looks.
    """

    blocks: NDArray[np.float64]
    looks: list[NDArray[np.float64]]
    lengths: NDArray[np.int64]
    distinct: int


def block_scores(
    sessions: Sequence[Session], scorer: Scorer, *, every: int, report: Callable[[int], None] = lambda _: None
) -> BlockScores:
    """Score whole sessions exactly, each one closed by a tombstone as the stream would.

    `report` is told, now and then, how many more sessions are done.
    """
    store = WindowStore(window=scorer.bundle.window, every=every, idle_timeout=_NEVER)
    scores = LookScores(scorer, None, _CACHE)
    looks: list[NDArray[np.float64]] = []
    for first in range(0, len(sessions), _SESSIONS_AT_A_TIME):
        some = sessions[first : first + _SESSIONS_AT_A_TIME]
        parts = [(portion.facts["first_offset"].copy(), scores.of(portion))
                 for portion in store.apply(_events(some, scorer))]  # fmt: skip
        owner, value = (np.concatenate(column) for column in zip(*parts, strict=True))
        cuts = np.flatnonzero(np.diff(owner)) + 1
        looks.extend(np.split(value, cuts))
        report(len(some))
    return BlockScores(
        blocks=np.array([session.max() for session in looks]),
        looks=looks,
        lengths=np.array([len(session.events) for session in sessions]),
        distinct=scores.scored,
    )


def _events(sessions: Sequence[Session], scorer: Scorer) -> EventBatch:
    """Lay sessions end to end. Blocks are numbered afresh: two sessions may bear one name."""
    batch = EventBatch()
    for number, session in enumerate(sessions):
        tokens = [*scorer.bundle.vocabulary.encode(session.events), TOMBSTONE]
        batch.blocks.extend([str(number)] * len(tokens))
        batch.tokens.extend(tokens)
    batch.times = [0] * len(batch.blocks)
    batch.offsets = list(range(len(batch.blocks)))
    return batch
