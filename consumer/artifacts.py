"""The model and its threshold as one thing: loaded together, checked together, replaced together."""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from consumer.detector import Detector
from consumer.settings import Settings, milliseconds
from consumer.text import AnyDecoder, decoder_for, known_lines
from consumer.threshold import Threshold
from model.bundle import Bundle
from model.device import choose
from model.errors import UserError
from model.scoring import Scorer

log = logging.getLogger("consumer")

T = TypeVar("T")

Facts = tuple[tuple[int, int, int] | None, ...]
"""Inode, size and time of change of each file that the two are read from; None where there is none."""


@dataclass(frozen=True)
class Artifacts:
    """A model and a threshold. `facts` are those of their files just before they were read."""

    bundle: Bundle
    threshold: Threshold
    facts: Facts = ()

    @classmethod
    def load(cls, settings: Settings) -> "Artifacts":
        """Read the model and the threshold that the settings name, and make sure that they fit.

        Raises:
            UserError: one of them is missing or damaged, or they were not made for each other and these settings.
        """
        artifacts = cls.read(settings)
        artifacts.check(settings)
        return artifacts

    @classmethod
    def read(cls, settings: Settings) -> "Artifacts":
        """Read them without asking whether they fit.

        Raises:
            UserError: one of them is missing or damaged.
        """
        facts = file_facts(settings)
        return cls(Bundle.load(settings.model.path), Threshold.load(settings.calibration.path), facts)

    def check(self, settings: Settings) -> None:
        """Make sure that they fit each other and the settings.

        Raises:
            UserError: they do not.
        """
        self.threshold.check(
            self.bundle,
            every=settings.scoring.every,
            idle_timeout_ms=milliseconds(settings.windows.idle_timeout),
            path=settings.calibration.path,
        )
        decoder_for(settings, self.bundle)

    def is_same(self, other: "Artifacts") -> bool:
        """Whether no alert could tell the two apart."""
        return (self.bundle.fingerprint, self.bundle.vocabulary, self.threshold) == (
            other.bundle.fingerprint, other.bundle.vocabulary, other.threshold,
        )  # fmt: skip

    def detector(self, settings: Settings) -> Detector:
        """Return a detector that judges by them.

        Raises:
            UserError: the device asked for is not there.
        """
        return Detector(
            Scorer(self.bundle, self.threshold.strategy, choose(settings.device)),
            self.threshold,
            topic=settings.topics.events,
            cache_windows=settings.scoring.cache_windows,
            max_open_blocks=settings.windows.max_open_blocks,
            drift=settings.drift,
        )

    def decoder(self, settings: Settings) -> AnyDecoder:
        """Return a decoder into the model's vocabulary.

        Raises:
            UserError: as `decoder_for`.
        """
        return decoder_for(settings, self.bundle)

    def __str__(self) -> str:
        threshold = self.threshold
        return (
            f"{self.bundle}, threshold {threshold.threshold:g} ({threshold.strategy}, "
            f"q = {threshold.quantile:g}: at most {threshold.bound:.2g} of normal blocks alert)"
        )


class _Watcher(ABC, Generic[T]):
    """Finds what is new in the files of model and threshold. Costs a look at three files each time.

    `outcomes` counts what became of the changes: taken, waiting (a new model whose threshold is still to come),
    refused.
    """

    def __init__(self, settings: Settings, in_use: T, judged: Facts) -> None:
        self._settings = settings
        self.in_use = in_use
        self.outcomes = Counter[str]()
        self._judged = self._last = judged

    def poll(self) -> T | None:
        """Return what is new if it fits; say once why it is not taken."""
        if not self._changed():
            return None
        try:
            found = self._fitting()
        except UserError as reason:
            self.outcomes["refused"] += 1
            log.warning("%s; going on with %s", reason, self.in_use)
            return None
        if found is not None:
            self.outcomes["taken"] += 1
            self.in_use = found
        return found

    @abstractmethod
    def _fitting(self) -> T | None:
        """Return what the files hold, None if that is what is in use, or not whole yet.

        Raises:
            UserError: it does not fit.
        """

    def _changed(self) -> bool:
        """Whether the files are others than those judged last, and no longer being written: the same at two looks."""
        facts, last = file_facts(self._settings), self._last
        self._last = facts
        if facts != last or facts == self._judged:
            return False
        self._judged = facts
        return True

    def _wait(self, found: Bundle, in_use: Bundle) -> None:
        self.outcomes["waiting"] += 1
        log.info(
            "a new %s is there: going on with %s until python -m calibration has made its threshold", found, in_use
        )


class ArtifactWatcher(_Watcher[Artifacts]):
    """Finds a new pair of model and threshold."""

    def __init__(self, settings: Settings, in_use: Artifacts) -> None:
        super().__init__(settings, in_use, in_use.facts)

    def _fitting(self) -> Artifacts | None:
        found = Artifacts.read(self._settings)
        if found.is_same(self.in_use):
            return None  # written again, the same
        if found.threshold == self.in_use.threshold and found.bundle.fingerprint != found.threshold.model:
            self._wait(found.bundle, self.in_use.bundle)
            return None
        found.check(self._settings)
        self._judged = found.facts
        return found


class ModelWatcher(_Watcher[Bundle]):
    """Finds a new model for a process that judges nothing. It takes one when consumers do: once its threshold is there.

    Where there is no threshold at all, none is waited for.
    """

    def __init__(self, settings: Settings) -> None:
        facts = file_facts(settings)
        super().__init__(settings, Bundle.load(settings.model.path), facts)

    def _fitting(self) -> Bundle | None:
        found = Bundle.load(self._settings.model.path)
        if found.fingerprint == self.in_use.fingerprint:
            return None
        known_lines(self._settings, found)
        path = self._settings.calibration.path
        if path.exists() and Threshold.load(path).model != found.fingerprint:
            self._wait(found, self.in_use)
            return None
        return found


def file_facts(settings: Settings) -> Facts:
    """Return the facts of the files of model and threshold."""
    return tuple(map(_facts, (*Bundle.files(settings.model.path), settings.calibration.path)))


def _facts(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
