"""What every peer does with an event: the window of its block, the network's score, more than the threshold or not."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from consumer.artifacts import Artifacts
from consumer.settings import Settings, load_settings
from model.cli import argument_parser
from model.device import choose
from model.scoring import Scorer
from model.vocabulary import BOS, PAD, UNK


class Job:
    """The same network, scored with the same code as the consumer's.

    Args:
        settings: name the model, the threshold and the device.
        remember: keep the scores of windows seen, as the consumer does. Whoever writes such a loop first does not.
    """

    def __init__(self, settings: Settings, *, remember: bool) -> None:
        artifacts = Artifacts.load(settings)
        self.window = artifacts.bundle.window
        self.tokens = artifacts.bundle.vocabulary.tokens
        self._threshold = artifacts.threshold.threshold
        self._scorer = Scorer(artifacts.bundle, artifacts.threshold.strategy, choose(settings.device))
        self._known: dict[tuple[int, ...], float] | None = {} if remember else None

    def token(self, event_id: str) -> int:
        """Return the event's number in the vocabulary."""
        return self.tokens.get(event_id, UNK)

    def score(self, window: Sequence[int]) -> float | None:
        """Return the score of a block's newest events if it is above the threshold, None if not."""
        if self._known is None:
            score = self._score(window)
        else:
            key = tuple(window)
            found = self._known.get(key)
            score = self._known[key] = self._score(window) if found is None else found
        return score if score > self._threshold else None

    def _score(self, window: Sequence[int]) -> float:
        row = np.full((1, self.window + 2), PAD, np.uint16)
        row[0, 0] = BOS
        row[0, 1 : 1 + len(window)] = window
        return float(self._scorer.screen(row)[0])


def prepared(name: str, description: str) -> tuple[Settings, Job, Path]:
    """Read a peer's command line: its settings, the job, and a folder for its state."""
    parser = argument_parser(name, description)
    parser.add_argument("--remember", action="store_true", help="keep the scores of windows seen")
    arguments = parser.parse_args()
    settings = load_settings(arguments.config)
    return settings, Job(settings, remember=arguments.remember), arguments.config.with_suffix(".state")
