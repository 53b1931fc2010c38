"""From block scores to the threshold that the stream uses."""

import numpy as np
from numpy.typing import NDArray

from calibration.quantile import conformal_quantile
from consumer.threshold import Threshold
from model.scoring import Scorer

_SHOWN_QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.995, 0.999, 1.0)


def calibrate(
    scores: NDArray[np.float64], scorer: Scorer, *, quantile: float, every: int, idle_timeout_ms: int
) -> Threshold:
    """Return the threshold for the exact block scores (N,) of normal sessions.

    Raises:
        UserError: there are too few blocks for `quantile`.
    """
    limit = conformal_quantile(scores, quantile)
    values, counts = np.unique(scores, return_counts=True)
    return Threshold(
        threshold=limit.value,
        strategy=scorer.strategy,
        quantile=quantile,
        bound=limit.bound,
        blocks=len(scores),
        expected_alerts_per_million=round(1e6 * limit.above / len(scores)),
        window=scorer.bundle.window,
        every=every,
        idle_timeout_ms=idle_timeout_ms,
        model=scorer.bundle.fingerprint,
        score_quantiles={f"{q:g}": float(np.quantile(scores, q, method="inverted_cdf")) for q in _SHOWN_QUANTILES},
        scores=tuple(values.tolist()),
        counts=tuple(counts.tolist()),
    )
