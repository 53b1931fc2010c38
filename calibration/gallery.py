"""The highest normal blocks, explained as an alert would explain them: what the threshold is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

from calibration.block_scores import Block
from consumer.alerts import Counted, Expected
from consumer.threshold import Threshold
from model.scoring import Scorer
from model.vocabulary import END_NAME

_NEGLIGIBLE = 0.001
"""An event that was less likely than this was not expected."""


@dataclass(frozen=True)
class Exhibit:
    """A block's most surprising look.

    Attributes:
        name: block id.
        score: in nats.
        severity: that it would alert with; None if it would not.
        seen: events of the block up to this look.
        count: events of the whole block.
        events: event ids of the window, the oldest first; `END_NAME` last in a closing look.
        surprisals: of each of `events`, in nats.
        offender: index of the highest surprisal.
        template: text of the offending event; None where it is not known.
        expected: what was expected in its place, the likeliest first.
        counts: of a block whose counts are the most surprising thing: the least likely of them.
    """

    name: str
    score: float
    severity: str | None
    seen: int
    count: int
    events: tuple[str, ...]
    surprisals: tuple[float, ...]
    offender: int
    template: str | None
    expected: tuple[Expected, ...]
    counts: tuple[Counted, ...]

    @property
    def is_closing(self) -> bool:
        """Whether the block had ended."""
        return self.events[-1] == END_NAME

    @property
    def is_truncated(self) -> bool:
        """Whether the most surprising thing is that the block ended."""
        return self.events[self.offender] == END_NAME


def exhibits(blocks: Sequence[Block], scorer: Scorer, threshold: Threshold) -> list[Exhibit]:
    """Explain `blocks`, whose scores are of `scorer`."""
    vocabulary = scorer.bundle.vocabulary
    shown = []
    for block in blocks:
        why = scorer.explain(block.row)
        events = tuple(block.events(vocabulary))
        rank = threshold.rank(block.score)
        shown.append(
            Exhibit(
                name=block.name,
                score=block.score,
                severity=threshold.levels[rank - 1].name if rank else None,
                seen=block.seen,
                count=block.count,
                events=events,
                surprisals=why.surprisals,
                offender=why.offender,
                template=vocabulary.template(events[why.offender]),
                expected=tuple(
                    Expected.of(token, share, vocabulary) for token, share in why.expected if share >= _NEGLIGIBLE
                ),
                counts=tuple(Counted.of(kind, vocabulary) for kind in why.counts),
            )
        )
    return shown
