import copy
import dataclasses

import numpy as np
import pytest
import torch

from consumer.alerts import SCHEMA_VERSION, Alert, Expected, Offender, Source, WindowEvent
from consumer.threshold import Certificate, Level, Threshold
from model.bundle import Bundle
from model.network import Autoencoder, Shape
from model.scoring import Scorer
from model.vocabulary import END, SPECIAL, UNK, Vocabulary

WINDOW = 6


@pytest.fixture(scope="session")
def bundle():
    """An untrained network that finds END and UNK surprising; its scores are as exact as a trained one's."""
    torch.manual_seed(7)
    vocabulary = Vocabulary(("a", "b", "c", "d"), {"a": "template of a"})
    network = Autoencoder(Shape(len(vocabulary), WINDOW, 16, 2, 1, 16)).eval()
    with torch.no_grad():
        network.bias[[END, UNK]] = -8  # as after training: rarely expected
    return Bundle(network, vocabulary)


@pytest.fixture(scope="session")
def scorer(bundle):
    return Scorer(bundle)


class RememberingScorer(Scorer):
    """Scores each row once, however often a test begins anew."""

    def __init__(self, bundle):
        super().__init__(bundle)
        self._known = {}

    def _once(self, kind, rows):
        for row in rows:
            if (kind, row.tobytes()) not in self._known:
                (self._known[kind, row.tobytes()],) = getattr(super(), kind)(row[None])
        return [self._known[kind, row.tobytes()] for row in rows]

    def screen(self, rows):
        return np.array(self._once("screen", rows))

    def exact(self, rows):
        return np.array(self._once("exact", rows))

    def judge(self, rows):
        for place, judged in enumerate(self._once("judge", rows)):
            yield dataclasses.replace(judged, places=np.array([place]))


@pytest.fixture(scope="session")
def quick_scorer(bundle):
    return RememberingScorer(bundle)


@pytest.fixture(scope="session")
def varied_scorer(bundle):
    """Here blocks may end in peace, and events differ: many never alert, and their highest look is not their last."""
    network = copy.deepcopy(bundle.network)
    with torch.no_grad():
        network.bias[[END, UNK, *range(SPECIAL, len(bundle.vocabulary))]] = torch.tensor([6.0, -4, 6, 5, 3, 2])
    return RememberingScorer(Bundle(network, bundle.vocabulary))


@pytest.fixture(scope="session")
def make_threshold(bundle):
    def make(value, *, every=1, idle_timeout_ms=1000, **above):
        """`above`: the thresholds of further levels by name, ascending."""
        quantiles = [0.5 + 0.1 * place for place in range(1 + len(above))]
        return Threshold(
            strategy="max",
            levels=tuple(
                Level(name, q, limit, 500_000, Certificate(4, q, 1 - q, 0.95, (0.1, 0.9)))
                for q, (name, limit) in zip(quantiles, {"minor": value, **above}.items(), strict=True)
            ),
            blocks=4, blocks_per_day=None, window=WINDOW, every=every, idle_timeout_ms=idle_timeout_ms,
            model=bundle.fingerprint, score_quantiles={}, scores=(0.5, 1.0, 2.0), counts=(1, 2, 1),
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def make_alert():
    def make(number, *, block="blk_1", event="E7", template=None, revision=1):
        """An alert about the second of three events; `number` makes it another session's."""
        moment = "2008-11-09T20:35:30.000Z"
        return Alert(
            SCHEMA_VERSION, f"{number:032x}", revision, block, "event", "minor", 5.25, 1.5, "max", 0.01,
            Offender(2, event, template, 5.25, (Expected("E9", "expected of <*>", 0.9),), 7, moment),
            (WindowEvent("E5", 0.1), WindowEvent(event, 5.25), WindowEvent("E5", 0.02)),
            3, moment, moment, Source("log-events", 4, 3, 9), "ab" * 32, None,
        )  # fmt: skip

    return make
