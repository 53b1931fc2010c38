"""The model and its threshold as one thing: loaded together, checked together, replaced together."""

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from consumer.detector import Detector
from consumer.settings import Settings, milliseconds
from consumer.text import AnyDecoder, decoder_for, known_lines
from consumer.threshold import Threshold
from model.bundle import Bundle
from model.device import choose
from model.errors import UserError
from model.scoring import Scorer

log = logging.getLogger("consumer")

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
            f"model {self.bundle.fingerprint[:12]}, threshold {threshold.threshold:g} ({threshold.strategy}, "
            f"q = {threshold.quantile:g}: at most {threshold.bound:.2g} of normal blocks alert)"
        )


class _Files:
    """Notices that the files of the model or the threshold changed. Costs a look at three files each time."""

    def __init__(self, settings: Settings, judged: Facts) -> None:
        self._settings = settings
        self.judged = self._last = judged

    def changed(self) -> bool:
        """Whether they are others than those judged last, and no longer being written: the same at two looks."""
        facts, last = file_facts(self._settings), self._last
        self._last = facts
        if facts != last or facts == self.judged:
            return False
        self.judged = facts
        return True


class ArtifactWatcher:
    """Finds a new pair of model and threshold.

    `outcomes` counts what became of the changes: taken, waiting (a new model whose threshold is still to come),
    refused.
    """

    def __init__(self, settings: Settings, in_use: Artifacts) -> None:
        self._settings = settings
        self.in_use = in_use
        self._files = _Files(settings, in_use.facts)
        self.outcomes = Counter[str]()

    def poll(self) -> Artifacts | None:
        """Return the new pair if there is one that fits; say once why what is new is not taken."""
        if not self._files.changed():
            return None
        try:
            found = Artifacts.read(self._settings)
            if found.is_same(self.in_use):
                return None  # written again, the same
            if found.threshold == self.in_use.threshold and found.bundle.fingerprint != found.threshold.model:
                self.outcomes["waiting"] += 1
                _say_waiting(found.bundle, self.in_use.bundle)
                return None
            found.check(self._settings)
        except UserError as reason:
            self.outcomes["refused"] += 1
            log.warning("%s; going on with %s", reason, self.in_use)
            return None
        self.outcomes["taken"] += 1
        self._files.judged, self.in_use = found.facts, found
        return found


class ModelWatcher:
    """Finds a new model for a process that judges nothing. It takes one when consumers do: once its threshold is there.

    `outcomes` as of `ArtifactWatcher`. Where there is no threshold at all, none is waited for.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._files = _Files(settings, file_facts(settings))
        self.in_use = Bundle.load(settings.model.path)
        self.outcomes = Counter[str]()

    def poll(self) -> Bundle | None:
        """Return the new model if there is one that fits; say once why what is new is not taken."""
        if not self._files.changed():
            return None
        path = self._settings.calibration.path
        try:
            found = Bundle.load(self._settings.model.path)
            if found.fingerprint == self.in_use.fingerprint:
                return None
            known_lines(self._settings, found)
            if path.exists() and Threshold.load(path).model != found.fingerprint:
                self.outcomes["waiting"] += 1
                _say_waiting(found, self.in_use)
                return None
        except UserError as reason:
            self.outcomes["refused"] += 1
            log.warning("%s; going on with model %s", reason, self.in_use.fingerprint[:12])
            return None
        self.outcomes["taken"] += 1
        self.in_use = found
        return found


def _say_waiting(found: Bundle, in_use: Bundle) -> None:
    log.info(
        "a new model %s is there: going on with %s until python -m calibration has made its threshold",
        found.fingerprint[:12], in_use.fingerprint[:12],
    )  # fmt: skip


def file_facts(settings: Settings) -> Facts:
    """Return the facts of the files of model and threshold."""
    return tuple(map(_facts, (*Bundle.files(settings.model.path), settings.calibration.path)))


def _facts(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
