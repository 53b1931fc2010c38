"""The threshold that the calibration job hands to the stream."""

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from os.path import realpath
from pathlib import Path

import msgspec

from consumer.settings import BASE_LEVEL
from model.bundle import Bundle
from model.config import Strategy
from model.errors import UserError

FORMAT = 2
"""Version of threshold.json."""


@dataclass(frozen=True)
class Certificate:
    """What a threshold promises about normal blocks, and how sure that is; see `calibration.certificate`.

    Attributes:
        n: calibration blocks.
        q: share of normal blocks that must stay silent.
        bound: upper bound on the probability that a normal block exceeds the threshold, over all calibrations.
        confidence: probability that `interval` is right.
        interval: lowest and highest probability that a normal block exceeds this very threshold.
    """

    n: int
    q: float
    bound: float
    confidence: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Level:
    """A severity: alerts whose score is strictly greater than `threshold`, in nats, have it or a higher one.

    Of a million normal blocks `expected_alerts_per_million` exceed it, by the calibration blocks above it.
    """

    name: str
    quantile: float
    threshold: float
    expected_alerts_per_million: int
    certificate: Certificate


@dataclass(frozen=True)
class Threshold:
    """Where normal ends, and under which conditions that was measured.

    Attributes:
        strategy: how a window's surprisals become its score.
        levels: severities, ascending; a look alerts when its score exceeds the first one, `BASE_LEVEL`.
        blocks: number of calibration blocks.
        blocks_per_day: normal blocks that began in a day of the calibration traffic; None where it has no times.
        window: events that a look shows.
        every: a look after every so many events.
        idle_timeout_ms: event time after which a silent block closes.
        model: fingerprint of the model that scored.
        score_quantiles: of the block scores, for people.
        scores: distinct block scores, ascending.
        counts: calibration blocks with each of `scores`.
    """

    strategy: Strategy
    levels: tuple[Level, ...]
    blocks: int
    blocks_per_day: float | None
    window: int
    every: int
    idle_timeout_ms: int
    model: str
    score_quantiles: Mapping[str, float]
    scores: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def threshold(self) -> float:
        """In nats; a look alerts when its score is strictly greater."""
        return self.levels[0].threshold

    @property
    def quantile(self) -> float:
        """Share of normal blocks that must stay silent."""
        return self.levels[0].quantile

    @property
    def bound(self) -> float:
        """Upper bound on the probability that a normal block alerts."""
        return self.certificate.bound

    @property
    def certificate(self) -> Certificate:
        """What is promised about normal blocks that alert at all."""
        return self.levels[0].certificate

    @property
    def expected_alerts_per_million(self) -> int:
        """Normal blocks, by the calibration blocks above the threshold."""
        return self.levels[0].expected_alerts_per_million

    @cached_property
    def _limits(self) -> list[float]:
        return [level.threshold for level in self.levels]

    def rank(self, score: float) -> int:
        """Return how many levels a score exceeds: 0 is no alert, above that `levels[rank - 1]` is its severity."""
        return bisect_left(self._limits, score)

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
        text = json.dumps({"format": FORMAT, **_base(self.levels[0]), **asdict(self)}, indent=2)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for target, content in (
                (path.with_name("anomaly_threshold.txt"), str(self.threshold)),
                (path.with_name("anomaly_strategy.txt"), self.strategy),
                (path, text),
            ):
                place = Path(realpath(target))  # a link stays one: what it leads to is replaced
                fresh = place.with_name(place.name + ".new")
                fresh.write_text(content + "\n", encoding="utf-8")
                fresh.replace(place)  # readers see the old file or the new one, never half of one
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
            raw = json.loads(path.read_text(encoding="utf-8"))
            understood = raw["format"] == FORMAT
            threshold = msgspec.convert(raw, cls)
        except FileNotFoundError:
            raise UserError(f"{path}: no threshold there; {again}") from None
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not a threshold file of this version; {again}") from None
        if not (understood and threshold.is_sound and raw.items() >= _base(threshold.levels[0]).items()):
            raise UserError(f"{path}: the threshold file is damaged or of another version; {again}")
        return threshold

    @property
    def is_sound(self) -> bool:
        """Whether the parts agree with each other."""
        return (
            bool(self.levels)
            and self.levels[0].name == BASE_LEVEL
            and all(low.quantile < high.quantile and low.threshold <= high.threshold
                    for low, high in pairwise(self.levels))
            and sum(self.counts) == self.blocks
            and len(self.scores) == len(self.counts)
        )  # fmt: skip


def _base(level: Level) -> dict[str, object]:
    """Return what the file repeats of the base level, for readers who want one threshold only."""
    return {
        "threshold": level.threshold,
        "quantile": level.quantile,
        "bound": level.certificate.bound,
        "expected_alerts_per_million": level.expected_alerts_per_million,
        "certificate": {**asdict(level.certificate), "interval": list(level.certificate.interval)},
    }
