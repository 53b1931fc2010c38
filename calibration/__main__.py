"""`python -m calibration`: finds the threshold on held-out normal sessions and writes it."""

import time
from pathlib import Path

from calibration.block_scores import block_scores
from calibration.calibrate import calibrate
from calibration.quantile import blocks_needed
from consumer.settings import load_settings, milliseconds
from model.bundle import Bundle
from model.cli import argument_parser, console, progress_bar, run
from model.device import choose
from model.errors import UserError
from model.scoring import Scorer
from model.sessions import read_normal


def main() -> None:
    """Score, rank, write, and say what the threshold means."""
    parser = argument_parser("calibration", "Find the alert threshold on held-out normal sessions.")
    parser.add_argument(
        "--normal",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="normal sessions not used in training",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="threshold.json (default: calibration.path of the settings)"
    )
    arguments = parser.parse_args()
    settings = load_settings(arguments.config)
    out = arguments.out or settings.calibration.path
    quantile = settings.calibration.quantile
    bundle = Bundle.load(settings.model.path)

    normal = read_normal(arguments.normal)
    for line in normal.files:
        console.print(line)
    console.print(f"{len(normal.sessions):,} normal sessions, {normal.left_out:,} anomalous ones left out")
    if len(normal.sessions) < blocks_needed(quantile):
        raise UserError(
            f"{len(normal.sessions):,} normal sessions are too few for calibration.quantile {quantile:g}: it takes at "
            f"least {blocks_needed(quantile):,}; give more sessions or lower the quantile"
        )
    started = time.monotonic()
    scorer = Scorer(bundle, settings.calibration.strategy, choose(settings.device))
    with progress_bar("scoring sessions", len(normal.sessions)) as advance:
        scores = block_scores(normal.sessions, scorer, every=settings.scoring.every, report=advance)
    console.print(
        f"{sum(map(len, scores.looks)):,} looks, {scores.distinct:,} distinct windows, "
        f"{time.monotonic() - started:.0f} s"
    )
    threshold = calibrate(
        scores.blocks,
        scorer,
        quantile=quantile,
        every=settings.scoring.every,
        idle_timeout_ms=milliseconds(settings.windows.idle_timeout),
    )
    threshold.save(out)
    console.print(
        f"threshold {threshold.threshold:g} nats ({threshold.strategy}): the {quantile:g} quantile of "
        f"{threshold.blocks:,} normal blocks"
    )
    console.print(
        f"of a million normal blocks about {threshold.expected_alerts_per_million:,} will alert, "
        f"on average at most {1e6 * threshold.bound:,.0f}"
    )
    console.print(f"written to {out}, with anomaly_threshold.txt and anomaly_strategy.txt beside it")


if __name__ == "__main__":
    run(main)
