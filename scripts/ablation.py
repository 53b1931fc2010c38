"""`python -m scripts.ablation`: what each ingredient of the model is worth, without a single label.

Trains the configured model, and it again with one ingredient changed at a time, each with several seeds. Failures
made from held-out healthy sessions (`scripts.synthetic`) are then scored at the thresholds that the held-out
sessions themselves give. The same table tells on your own logs which settings to keep.
"""

import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.table import Table

from calibration.block_scores import block_scores
from calibration.quantile import blocks_needed, conformal_quantile
from consumer.settings import Settings, load_settings
from model.bundle import Bundle
from model.cli import argument_parser, console, progress_bar, run
from model.config import Strategy
from model.device import choose
from model.errors import UserError
from model.scoring import Scorer
from model.sessions import Session
from model.training import train
from model.vocabulary import Vocabulary
from scripts.inputs import read_healthy
from scripts.output import check_file, write_json
from scripts.synthetic import broken

QUANTILES = (0.99, 0.995, 0.999)

VARIANTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "as configured": {},
    "same noise in every window": {"training": {"corruption": (0.1, 0.1)}},
    "no reordering": {"training": {"swaps": 0.0}},
    "no average of weights": {"training": {"averaging": 0.0}},
    "no dropout": {"training": {"dropout": 0.0}},
    "one layer": {"model": {"layers": 1}},
    "no tally": {"model": {"tallied": 0}},
}
"""Settings that differ, by variant."""

_FAILURES = 300
_FAILURES_SEED = 5


def main() -> None:
    """Train, score, print; with --json also write."""
    parser = argument_parser("scripts.ablation", "Measure what each ingredient of the model is worth.")
    parser.add_argument("--normal", type=Path, nargs="+", required=True, metavar="FILE", help="sessions to train on")
    parser.add_argument("--held-out", type=Path, nargs="+", required=True, metavar="FILE", help="other normal sessions")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each variant (default: 3)")
    parser.add_argument("--epochs", type=int, help="passes over the sessions (default: training.epochs)")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the results as JSON")
    arguments = parser.parse_args()
    check_file("--json", arguments.json)
    settings = load_settings(arguments.config)
    for option in ("seeds", "epochs"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} {value}: at least one is needed")
    training = read_healthy("--normal", arguments.normal)
    held_out = read_healthy("--held-out", arguments.held_out, least=blocks_needed(QUANTILES[0]))
    results: list[dict[str, Any]] = []
    for measured in _Trials(settings, training, held_out, arguments).run():
        results += measured
        write_json(arguments.json, results)  # after each training: it takes long, and what is measured is measured
    _show(results)


class _Trials:
    """Trains each variant with each seed and scores the same failures with all of them."""

    def __init__(
        self, settings: Settings, training: Sequence[Session], held_out: Sequence[Session], arguments: Namespace
    ) -> None:
        self._settings = settings
        self._arguments = arguments
        self._vocabulary = Vocabulary.of(session.events for session in training)
        self._sequences = [self._vocabulary.encode(session.events) for session in training]
        self._held_out = held_out
        known = {session.events for session in (*training, *held_out)}
        made = broken(held_out, known, count=_FAILURES, seed=_FAILURES_SEED)
        self._failures = {kind: some for kind, some in made.items() if some}
        if unlike := made.keys() - self._failures.keys():
            console.print(f"failures that cannot be made from these sessions: {', '.join(sorted(unlike))}")

    def run(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the measures of each training, one item a strategy; all variants with one seed, then with the next."""
        for seed in range(1, self._arguments.seeds + 1):
            for name in self._arguments.only:
                bundle, seconds = self._train(name, seed)
                strategies: Sequence[Strategy] = get_args(Strategy) if name == "as configured" else ("max",)
                yield [
                    {"variant": name, "strategy": strategy, "seed": seed, "training_seconds": round(seconds, 1),
                     **self._measure(bundle, strategy)}
                    for strategy in strategies
                ]  # fmt: skip

    def _train(self, name: str, seed: int) -> tuple[Bundle, float]:
        change = {section: dict(values) for section, values in VARIANTS[name].items()}
        training = {"seed": seed, **change.get("training", {})}
        if self._arguments.epochs:
            training["epochs"] = self._arguments.epochs
        model = self._settings.model.model_copy(update=change.get("model", {}))
        started = time.monotonic()
        with progress_bar(f"{name}, seed {seed}", 1, "trained") as advance:
            done = 0.0

            def report(progress: Any) -> None:
                nonlocal done
                advance(progress.step / progress.steps - done)
                done = progress.step / progress.steps

            network = train(
                self._sequences, len(self._vocabulary), model, self._settings.training.model_copy(update=training),
                choose(self._settings.device), report,
            )  # fmt: skip
        return Bundle(network, self._vocabulary), time.monotonic() - started

    def _measure(self, bundle: Bundle, strategy: Strategy) -> dict[str, Any]:
        scorer = Scorer(bundle, strategy, torch.device("cpu"))
        every = self._settings.scoring.every
        normal = block_scores(self._held_out, scorer, every=every).blocks
        failing = {kind: block_scores(some, scorer, every=every).blocks for kind, some in self._failures.items()}
        at = []
        for q in QUANTILES:
            if len(normal) >= blocks_needed(q):
                threshold = conformal_quantile(normal, q).value
                recall = {kind: float((scores > threshold).mean()) for kind, scores in failing.items()}
                at.append({"q": q, "threshold": threshold, "recall": float(np.mean([*recall.values()])), **recall})
        return {"at": at}


def _show(results: Sequence[Mapping[str, Any]]) -> None:
    """Print a row a variant: the mean over seeds, and the range of the overall recall."""
    table = Table(title="recall of failures made from held-out sessions: mean over seeds (lowest to highest)")
    table.add_column("variant")
    last = results[0]["at"][-1]
    kinds = [kind for kind in last if kind not in {"q", "threshold", "recall"}]
    for at in results[0]["at"]:
        table.add_column(f"q = {at['q']:g}", justify="right")
    for kind in kinds:
        table.add_column(f"{kind}, {last['q']:g}", justify="right")
    for variant, strategy in dict.fromkeys((row["variant"], row["strategy"]) for row in results):
        rows = [row["at"] for row in results if (row["variant"], row["strategy"]) == (variant, strategy)]
        cells = []
        for place in range(len(rows[0])):
            values = [at[place]["recall"] for at in rows]
            cells.append(f"{np.mean(values):.3f} ({min(values):.2f} to {max(values):.2f})")
        cells += [f"{np.mean([at[-1][kind] for at in rows]):.2f}" for kind in kinds]
        table.add_row(variant if strategy == "max" else f"{variant}, {strategy}", *cells)
    console.print(table)


if __name__ == "__main__":
    run(main)
