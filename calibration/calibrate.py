"""From block scores to the thresholds that the stream uses."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from calibration.certificate import certify
from calibration.quantile import blocks_needed, conformal_quantile
from consumer.settings import BASE_LEVEL
from consumer.threshold import Level, Threshold
from model.scoring import Scorer

_SHOWN_QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.995, 0.999, 1.0)


def calibrate(
    scores: NDArray[np.float64],
    scorer: Scorer,
    *,
    quantile: float,
    every: int,
    idle_timeout_ms: int,
    levels: Mapping[str, float] | None = None,
    blocks_per_day: float | None = None,
) -> Threshold:
    """Return the threshold for the exact block scores (N,) of normal sessions.

    `levels` are further severities by quantile, each above `quantile`: see `usable_levels`.

    Raises:
        UserError: there are too few blocks for a quantile.
    """
    values, counts = np.unique(scores, return_counts=True)
    severities = [(BASE_LEVEL, quantile), *sorted((levels or {}).items(), key=lambda level: level[1])]
    return Threshold(
        strategy=scorer.strategy,
        levels=tuple(_level(scores, name, q) for name, q in severities),
        blocks=len(scores),
        blocks_per_day=blocks_per_day,
        window=scorer.bundle.window,
        every=every,
        idle_timeout_ms=idle_timeout_ms,
        model=scorer.bundle.fingerprint,
        score_quantiles={f"{q:g}": float(np.quantile(scores, q, method="inverted_cdf")) for q in _SHOWN_QUANTILES},
        scores=tuple(values.tolist()),
        counts=tuple(counts.tolist()),
    )


def usable_levels(levels: Mapping[str, float], quantile: float, blocks: int) -> tuple[dict[str, float], list[str]]:
    """Return the levels above `quantile` that `blocks` calibration blocks suffice for, and why each other is not."""
    usable, reasons = {}, []
    for name, q in levels.items():
        if q <= quantile:
            reasons.append(f"level {name} is left out: its quantile {q:g} is not above {quantile:g}")
        elif blocks < blocks_needed(q):
            reasons.append(f"level {name} is left out: {q:g} takes at least {blocks_needed(q):,} normal blocks")
        else:
            usable[name] = q
    return usable, reasons


def _level(scores: NDArray[np.float64], name: str, q: float) -> Level:
    limit = conformal_quantile(scores, q)
    return Level(name, q, limit.value, round(1e6 * limit.above / limit.n), certify(limit, q))
