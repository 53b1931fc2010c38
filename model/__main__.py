"""`python -m model`: learns what normal looks like and writes the model bundle."""

import time
from argparse import Namespace
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from model import training
from model.bundle import Bundle
from model.cli import argument_parser, console, milliseconds_of, run
from model.config import TrainingJob, load
from model.device import choose
from model.errors import UserError
from model.lines import LineFormat, LineRules
from model.mining import mine
from model.rawlog import is_raw
from model.sessions import Session, read_normal, read_templates
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
        help="of events: CSV with event_id,template for the alerts (default: templates.csv beside the first, if any)",
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="of raw logs: CSV with BlockId,Label: which blocks to leave out (default: labels.csv beside each)",
    )
    parser.add_argument(
        "--from", dest="begin", metavar="TIME", help="of raw logs: take blocks that begin at or after it"
    )
    parser.add_argument("--to", dest="end", metavar="TIME", help="of raw logs: take blocks that are over before it")
    arguments = parser.parse_args()
    settings = load(arguments.config, TrainingJob)
    device = choose(settings.device)
    out = arguments.out or settings.model.path
    Bundle.check_place(out)

    sessions, templates, lines = _read(arguments, LineRules.of(settings.events))
    vocabulary = Vocabulary.of((session.events for session in sessions), templates)
    sequences = [vocabulary.encode(session.events) for session in sessions]
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
    bundle = Bundle(network, vocabulary, facts, lines)
    bundle.save(out)
    console.print(
        f"{network.parameter_count:,} parameters, {time.monotonic() - started:.0f} s, "
        f"{last[0].restored:.1%} of replaced events given back right"
    )
    console.print(f"{bundle} written to {out}; next: python -m calibration --normal FILE")


def _read(arguments: Namespace, rules: LineRules) -> tuple[list[Session], dict[str, str], LineFormat | None]:
    """Return the normal sessions, texts of their event ids, and, from raw logs, what the model is to know of lines."""
    begin, end = (
        milliseconds_of(option, text) for option, text in (("--from", arguments.begin), ("--to", arguments.end))
    )
    raw = [path for path in arguments.normal if is_raw(path, rules)]
    if raw and len(raw) < len(arguments.normal):
        raise UserError("raw log lines and files of events cannot be trained on together: their event ids differ")
    if raw:
        if arguments.templates:
            raise UserError("--templates belongs to files of events; the templates of raw log lines are found in them")
        mined = mine(raw, rules, labels=arguments.labels, begin=begin, end=end)
        for note in mined.notes:
            console.print(note)
        outside = f", {mined.outside:,} not as a whole in the time range" if mined.outside else ""
        console.print(f"{len(mined.sessions):,} normal blocks, {mined.left_out:,} anomalous ones left out{outside}")
        return mined.sessions, mined.texts, mined.lines
    if arguments.labels or begin is not None or end is not None:
        raise UserError(
            "--labels, --from and --to belong to raw log lines, and events.block_pattern finds no block here"
        )
    normal = read_normal(arguments.normal)
    for line in normal.files:
        console.print(line)
    console.print(f"{len(normal.sessions):,} normal sessions, {normal.left_out:,} anomalous ones left out")
    if not normal.sessions:
        raise UserError("no normal session is left to train on; give files with healthy sessions")
    return normal.sessions, _templates(arguments.templates, arguments.normal[0]), None


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
