"""`python -m scripts.evaluate`: how well the model and its calibration tell failing blocks from healthy ones.

Labelled sessions go through the detector's windows and scores, without Kafka. Test files seldom hold the natural
share of anomalies, so precision, F1 and average precision weigh each class to `--prior`.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from sklearn.metrics import average_precision_score, classification_report, precision_recall_curve, roc_auc_score

from calibration.block_scores import BlockScores, block_scores
from calibration.quantile import blocks_needed, conformal_quantile
from consumer.artifacts import Artifacts
from consumer.settings import load_settings
from consumer.threshold import Threshold
from model.cli import argument_parser, console, progress_bar, run
from model.config import Strategy
from model.device import choose
from model.errors import UserError
from model.scoring import Scorer
from model.sessions import Session, read_anomalous
from scripts.baselines import CountVectors, NewEvents
from scripts.inputs import read_healthy
from scripts.output import check_file, write_json

QUANTILES = (0.95, 0.99, 0.995, 0.999, 0.9995)


@dataclass(frozen=True)
class OperatingPoint:
    """What happens at one quantile. Rates are shares of their class; None where calibration has too few blocks."""

    q: float
    threshold: float | None
    bound: float | None
    false_alarm_rate: float | None
    recall: float | None
    precision: float | None
    f1: float | None
    true_positives: int | None
    false_positives: int | None
    true_negatives: int | None
    false_negatives: int | None


def main() -> None:
    """Evaluate and print; with --json also write."""
    parser = argument_parser("scripts.evaluate", "Measure detection on labelled sessions.")
    parser.add_argument("--normal", type=Path, nargs="+", required=True, metavar="FILE", help="normal test sessions")
    parser.add_argument(
        "--anomalous", type=Path, nargs="+", required=True, metavar="FILE", help="anomalous test sessions"
    )
    parser.add_argument(
        "--prior",
        type=float,
        default=0.0293,
        help="share of anomalous blocks in nature (default: HDFS_v1's 0.0293)",
    )
    parser.add_argument(
        "--training", type=Path, nargs="+", metavar="FILE", help="the model's training sessions: adds the baselines"
    )
    parser.add_argument(
        "--calibration", type=Path, nargs="+", metavar="FILE", help="the calibration sessions, for the baselines"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the results as JSON")
    arguments = parser.parse_args()
    check_file("--json", arguments.json)
    if not 0 < arguments.prior < 1:
        raise UserError(f"--prior {arguments.prior:g}: a share between 0 and 1 is needed, such as 0.03")
    if bool(arguments.training) != bool(arguments.calibration):
        raise UserError("--training and --calibration go together: the baselines need both")
    started = time.monotonic()
    settings = load_settings(arguments.config)
    artifacts = Artifacts.load(settings)
    bundle, threshold = artifacts.bundle, artifacts.threshold
    normal = read_healthy("--normal", arguments.normal, bundle.lines)
    anomalous = read_anomalous(arguments.anomalous, bundle.lines)
    training, held_out = (
        read_healthy(option, files, bundle.lines) if files else []
        for option, files in (("--training", arguments.training), ("--calibration", arguments.calibration))
    )

    scorer = Scorer(bundle, threshold.strategy, choose(settings.device))
    result = evaluate(normal, anomalous, scorer, threshold, arguments.prior)
    if arguments.training:
        result["delay"]["limit"] = delay_limit([*training, *held_out, *normal], anomalous)
        result["baseline"] = baselines(training, held_out, normal, anomalous, arguments.prior)
        result["strategies"] = strategies(held_out, normal, anomalous, scorer, threshold.every, arguments.prior)
    _show(result, threshold)
    console.print(f"{time.monotonic() - started:.0f} s in all")
    write_json(arguments.json, result)


def evaluate(
    normal: list[Session], anomalous: list[Session], scorer: Scorer, threshold: Threshold, prior: float
) -> dict[str, Any]:
    """Return the measures of a model and its calibration on labelled sessions; see the README for the keys."""
    with progress_bar("scoring sessions", len(normal) + len(anomalous)) as advance:
        healthy = block_scores(normal, scorer, every=threshold.every, report=advance)
        failing = block_scores(anomalous, scorer, every=threshold.every, report=advance)
    truth, weights = _truth(healthy.blocks, failing.blocks, prior)
    scores = np.concatenate([healthy.blocks, failing.blocks])
    calibration = np.repeat(threshold.scores, threshold.counts)
    measures = _measures(calibration, healthy.blocks, failing.blocks, prior)
    for at in measures["at"]:
        at["delay"] = None if at["threshold"] is None else _delay(failing, at["threshold"], threshold.every)
    return {
        "n_normal": len(normal),
        "n_anomalous": len(anomalous),
        "prior": prior,
        **measures,
        "delay": _delay(failing, threshold.threshold, threshold.every),
        "classification_report": classification_report(
            truth,
            (scores > threshold.threshold).astype(int),
            target_names=["normal", "anomalous"],
            sample_weight=weights * len(truth),
            output_dict=True,
            zero_division=0.0,
        ),
        "strategy": threshold.strategy,
        "model": threshold.model,
    }


def baselines(
    training: list[Session], calibration: list[Session], normal: list[Session], anomalous: list[Session], prior: float
) -> dict[str, Any]:
    """Return the measures of the rules of `scripts.baselines` on the same sessions, under the same keys."""
    rules: dict[str, CountVectors | NewEvents] = {
        "count_vector": CountVectors(training),
        "new_event": NewEvents(training),
    }
    return {
        name: _measures(rule.scores(calibration), rule.scores(normal), rule.scores(anomalous), prior)
        for name, rule in rules.items()
    }


def _measures(
    calibration: NDArray[np.float64], normal: NDArray[np.float64], anomalous: NDArray[np.float64], prior: float
) -> dict[str, Any]:
    truth, weights = _truth(normal, anomalous, prior)
    scores = np.concatenate([normal, anomalous])
    precision, recall, _ = precision_recall_curve(truth, scores, sample_weight=weights)
    return {
        "auc": float(roc_auc_score(truth, scores)),
        "average_precision": float(average_precision_score(truth, scores, sample_weight=weights)),
        "best_f1": float(_f1(precision, recall).max()),
        "at": [asdict(_at(q, calibration, normal, anomalous, prior)) for q in QUANTILES],
    }


def _truth(
    normal: NDArray[np.float64], anomalous: NDArray[np.float64], prior: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return labels and the weights that give each class its share in nature, normal blocks first."""
    truth = np.repeat([0, 1], [len(normal), len(anomalous)])
    return truth, np.where(truth == 1, prior / len(anomalous), (1 - prior) / len(normal))


def _at(
    q: float,
    calibration: NDArray[np.float64],
    normal: NDArray[np.float64],
    anomalous: NDArray[np.float64],
    prior: float,
) -> OperatingPoint:
    if len(calibration) < blocks_needed(q):
        return OperatingPoint(q, *[None] * 10)
    limit = conformal_quantile(calibration, q)
    false_positives, true_positives = int((normal > limit.value).sum()), int((anomalous > limit.value).sum())
    alarms, recall = false_positives / len(normal), true_positives / len(anomalous)
    flagged = prior * recall + (1 - prior) * alarms
    precision = prior * recall / flagged if flagged else 0.0
    return OperatingPoint(
        q=q,
        threshold=limit.value,
        bound=limit.bound,
        false_alarm_rate=alarms,
        recall=recall,
        precision=precision,
        f1=float(_f1(np.array(precision), np.array(recall))),
        true_positives=true_positives,
        false_positives=false_positives,
        true_negatives=len(normal) - false_positives,
        false_negatives=len(anomalous) - true_positives,
    )


def _f1(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> NDArray[np.float64]:
    both = precision + recall
    return np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)


def strategies(
    calibration: list[Session],
    normal: list[Session],
    anomalous: list[Session],
    scorer: Scorer,
    every: int,
    prior: float,
) -> dict[str, Any]:
    """Return the measures of each way to pool a window's surprisals, calibrated on the same sessions."""
    found = {}
    with progress_bar("comparing strategies", 3 * len(get_args(Strategy))) as advance:
        for strategy in get_args(Strategy):
            pooled = Scorer(scorer.bundle, strategy, scorer.device)

            def blocks(sessions: list[Session], pooled: Scorer = pooled) -> NDArray[np.float64]:
                advance(1)
                return block_scores(sessions, pooled, every=every).blocks

            found[strategy] = _measures(blocks(calibration), blocks(normal), blocks(anomalous), prior)
    return found


def _delay(failing: BlockScores, threshold: float, every: int) -> dict[str, float | None]:
    """Return when detected anomalous blocks are first flagged at a threshold.

    The closing look counts as the whole block: `median_fraction` 1 means that it took the end to know.
    """
    events, fractions, closing = [], [], 0
    for looks, length in zip(failing.looks, failing.lengths.tolist(), strict=True):
        over = looks > threshold
        if over.any():
            first = int(over.argmax())
            closing += first == len(looks) - 1
            seen = min((first + 1) * every, length)
            events.append(seen)
            fractions.append(seen / length)
    if not events:
        return {"median_events": None, "median_fraction": None, "only_at_close": None}
    return {
        "median_events": float(np.median(events)),
        "median_fraction": float(np.median(fractions)),
        "only_at_close": closing / len(events),
    }


def delay_limit(normal: Iterable[Session], anomalous: Sequence[Session]) -> dict[str, float]:
    """Return how early anything could tell that failing blocks fail, without flagging a known normal one as well.

    A block that has so far been what some normal block was at that point is no failure yet, to whoever sees only
    its events. `median_fraction` is the share of a block up to its first event after which no normal session among
    `normal` was like it; `only_at_close` the share of blocks that are such a beginning to their end.
    """
    longer: dict[tuple[int, str], int] = {}  # by the number of a beginning and one more event, that of the longer one
    for events in {session.events for session in normal}:
        beginning = 0
        for event in events:
            beginning = longer.setdefault((beginning, event), len(longer) + 1)
    fractions, closing = [], 0
    for session in anomalous:
        beginning = 0
        for end, event in enumerate(session.events, 1):
            beginning = longer.get((beginning, event), -1)
            if beginning < 0:
                fractions.append(end / len(session.events))
                break
        else:
            fractions.append(1.0)
            closing += 1
    return {"median_fraction": float(np.median(fractions)), "only_at_close": closing / len(fractions)}


def _show(result: dict[str, Any], threshold: Threshold) -> None:
    table = Table(title=f"{result['n_normal']:,} normal and {result['n_anomalous']:,} anomalous blocks, "
                  f"{result['prior']:.2%} of blocks anomalous in nature")  # fmt: skip
    for heading in ("q", "threshold", "false alarms", "bound", "recall", "precision", "F1", "first flagged at"):
        table.add_column(heading, justify="right")
    counts = Table("q", "failing, flagged", "failing, missed", "normal, flagged", "normal, silent", title="confusion")
    for at in result["at"]:
        if at["threshold"] is None:
            table.add_row(f"{at['q']:g}", f"needs {blocks_needed(at['q']):,} calibration blocks")
            continue
        table.add_row(
            f"{at['q']:g}", f"{at['threshold']:.4f}", f"{at['false_alarm_rate']:.3%}", f"{at['bound']:.3%}",
            *(f"{at[key]:.4f}" for key in ("recall", "precision", "f1")),
            "" if at["delay"]["median_fraction"] is None else f"{at['delay']['median_fraction']:.0%} of the block",
        )  # fmt: skip
        cells = ("true_positives", "false_negatives", "false_positives", "true_negatives")
        counts.add_row(f"{at['q']:g}", *(f"{at[key]:,}" for key in cells))
    console.print(table)
    console.print(counts)
    console.print(
        f"ROC-AUC {result['auc']:.5f}, average precision {result['average_precision']:.4f}, "
        f"best possible F1 {result['best_f1']:.4f}"
    )
    if "baseline" in result:
        _show_beside(
            "beside rules without a network, which need the finished block", {"the model": result, **result["baseline"]}
        )
        _show_beside("how a window's surprisals become its score", result["strategies"])
    delay = result["delay"]
    if delay["median_events"] is not None:
        console.print(
            f"at q = {threshold.quantile:g} a failing block is first flagged after {delay['median_events']:g} events, "
            f"{delay['median_fraction']:.0%} of its length (medians); {delay['only_at_close']:.1%} only when they close"
        )
    if "limit" in delay:
        console.print(
            f"until {delay['limit']['median_fraction']:.0%} of its length (median) a failing block is what some normal "
            f"block was, {delay['limit']['only_at_close']:.1%} are to their end: alerts before that would be false too"
        )
    console.print(f"classification report at q = {threshold.quantile:g}, weighted to nature:")
    rows = Table("", "precision", "recall", "f1-score")
    for name in ("normal", "anomalous", "macro avg", "weighted avg"):
        row = result["classification_report"][name]
        rows.add_row(name, *(f"{row[key]:.4f}" for key in ("precision", "recall", "f1-score")))
    console.print(rows)


def _show_beside(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("", "ROC-AUC", "best F1", title=title)
    for q in QUANTILES:
        table.add_column(f"F1 at {q:g}", justify="right")
    for name, measures in rows.items():
        points = ("" if at["f1"] is None else f"{at['f1']:.4f}" for at in measures["at"])
        table.add_row(name.replace("_", " "), f"{measures['auc']:.5f}", f"{measures['best_f1']:.4f}", *points)
    console.print(table)


if __name__ == "__main__":
    run(main)
