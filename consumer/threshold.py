"""The threshold that the calibration job hands to the stream."""

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args

from model.bundle import Bundle
from model.config import Strategy
from model.errors import UserError

FORMAT = 1
"""Version of threshold.json."""


@dataclass(frozen=True)
class Threshold:
    """Where normal ends, and under which conditions that was measured.

    Attributes:
        threshold: in nats; a look alerts when its score is strictly greater.
        strategy: how a window's surprisals become its score.
        quantile: share of normal blocks that must stay silent.
        bound: upper bound on the probability that a normal block alerts.
        blocks: number of calibration blocks.
        expected_alerts_per_million: normal blocks, by the calibration blocks above the threshold.
        window: events that a look shows.
        every: a look after every so many events.
        idle_timeout_ms: event time after which a silent block closes.
        model: fingerprint of the model that scored.
        score_quantiles: of the block scores, for people.
        scores: distinct block scores, ascending.
        counts: calibration blocks with each of `scores`.
    """

    threshold: float
    strategy: Strategy
    quantile: float
    bound: float
    blocks: int
    expected_alerts_per_million: int
    window: int
    every: int
    idle_timeout_ms: int
    model: str
    score_quantiles: Mapping[str, float]
    scores: tuple[float, ...]
    counts: tuple[int, ...]

    @cached_property
    def _at_most(self) -> list[int]:
        return [0, *accumulate(self.counts)]

    def p_value(self, score: float) -> float:
        """Return the conformal p-value of a block score: (1 + calibration blocks scoring as high) / (n + 1)."""
        as_high = self.blocks - self._at_most[bisect_left(self.scores, score)]
        return (1 + as_high) / (self.blocks + 1)

    def check(self, bundle: Bundle, *, every: int, idle_timeout_ms: int, path: Path) -> None:
        """Make sure that this threshold means something for what the consumer is about to do.

        Raises:
            UserError: it was made with another model or under other settings.
        """
        again = "run python -m calibration again"
        if self.model != bundle.fingerprint:
            raise UserError(
                f"{path}: made for model {self.model[:12]}, but the model here is {bundle.fingerprint[:12]}; {again}"
            )
        for key, here, there in (
            ("model.window", bundle.window, self.window),
            ("scoring.every", every, self.every),
            ("windows.idle_timeout", idle_timeout_ms, self.idle_timeout_ms),
        ):
            if here != there:
                unit = " ms" if key.endswith("timeout") else ""
                raise UserError(f"{path}: made with {key} {there}{unit}, but it is {here}{unit} here; {again}")

    def save(self, path: Path) -> None:
        """Write threshold.json to `path`, and beside it anomaly_threshold.txt and anomaly_strategy.txt.

        Raises:
            UserError: the folder cannot be written.
        """
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for target, content in (
                (path.with_name("anomaly_threshold.txt"), str(self.threshold)),
                (path.with_name("anomaly_strategy.txt"), self.strategy),
                (path, text),
            ):
                fresh = target.with_name(target.name + ".new")
                fresh.write_text(content + "\n", encoding="utf-8")
                fresh.replace(target)  # readers see the old file or the new one, never half of one
        except OSError as error:
            raise UserError(f"{path}: cannot write the threshold ({error.strerror or error})") from None

    @classmethod
    def load(cls, path: Path) -> "Threshold":
        """Read threshold.json.

        Raises:
            UserError: it is missing, damaged or of another version.
        """
        again = f"make one with: python -m calibration --normal FILE --out {path}"
        try:
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            understood = raw.pop("format") == FORMAT and raw["strategy"] in get_args(Strategy)
            threshold = cls(**{**raw, "scores": tuple(raw["scores"]), "counts": tuple(raw["counts"])})
            intact = (
                understood
                and sum(threshold.counts) == threshold.blocks
                and len(threshold.scores) == len(threshold.counts)
            )
        except FileNotFoundError:
            raise UserError(f"{path}: no threshold there; {again}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: not a threshold file of this version; {again}") from None
        if not intact:
            raise UserError(f"{path}: the threshold file is damaged or of another version; {again}")
        return threshold
