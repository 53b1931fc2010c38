"""`python -m model`: learns what normal looks like and writes the model bundle."""

import time
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from model import training
from model.bundle import Bundle
from model.cli import argument_parser, console, run
from model.config import TrainingJob, load
from model.device import choose
from model.errors import UserError
from model.sessions import read_normal, read_templates
from model.vocabulary import Vocabulary


def main() -> None:
    """Train and save."""
    parser = argument_parser("model", "Train the autoencoder on normal sessions.")
    parser.add_argument("--normal", type=Path, nargs="+", required=True, metavar="FILE", help="normal sessions")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="the bundle (default: model.path of the settings)")
    parser.add_argument(
        "--templates",
        type=Path,
        metavar="FILE",
        help="CSV with event_id,template: texts for the alerts (default: templates.csv beside the first file, if any)",
    )
    arguments = parser.parse_args()
    settings = load(arguments.config, TrainingJob)
    device = choose(settings.device)
    out = arguments.out or settings.model.path

    normal = read_normal(arguments.normal)
    for line in normal.files:
        console.print(line)
    console.print(f"{len(normal.sessions):,} normal sessions, {normal.left_out:,} anomalous ones left out")
    if not normal.sessions:
        raise UserError("no normal session is left to train on; give files with healthy sessions")
    templates = _templates(arguments.templates, arguments.normal[0])
    vocabulary = Vocabulary.of((session.events for session in normal.sessions), templates)
    sequences = [vocabulary.encode(session.events) for session in normal.sessions]
    described = len(vocabulary.templates.keys() & set(vocabulary.events))
    console.print(
        f"{len(vocabulary.events)} event ids ({described} with a template), "
        f"{len(set(map(tuple, sequences))):,} distinct sequences, longest {max(map(len, sequences)):,} events"
    )

    started = time.monotonic()
    with Progress(
        TextColumn("training on " + str(device)),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TextColumn("surprisal {task.fields[loss]:.4f} nats, restored {task.fields[restored]:.1%}"),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("", total=None, loss=float("nan"), restored=0.0)
        last: list[training.Progress] = []

        def report(progress: training.Progress) -> None:
            last[:] = [progress]
            bar.update(
                task, completed=progress.step, total=progress.steps, loss=progress.loss, restored=progress.restored
            )

        network = training.train(sequences, len(vocabulary), settings.model, settings.training, device, report)
    facts = {
        "sessions": len(sequences),
        "distinct_sequences": len(set(map(tuple, sequences))),
        "loss": round(last[0].loss, 6),
        "restored": round(last[0].restored, 6),
        "settings": settings.training.model_dump(),
    }
    bundle = Bundle(network, vocabulary, facts)
    bundle.save(out)
    console.print(
        f"{network.parameter_count:,} parameters, {time.monotonic() - started:.0f} s, "
        f"{last[0].restored:.1%} of replaced events given back right"
    )
    console.print(f"model {bundle.fingerprint[:12]} written to {out}; next: python -m calibration --normal FILE")


def _templates(named: Path | None, first: Path) -> dict[str, str]:
    beside = first.with_name("templates.csv")
    path = named or (beside if beside.is_file() else None)
    if path is None:
        return {}
    templates = read_templates(path)
    console.print(f"{path}: texts of {len(templates)} templates")
    return templates


if __name__ == "__main__":
    run(main)
