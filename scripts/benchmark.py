"""`python -m scripts.benchmark`: how fast, on a real Kafka of its own, and beside what else one could use.

Everything is measured in one run on one machine, so the ratios mean something even where the machine is noisy. The
parts are in `scripts/bench/`; they drive the real consumer process from outside, as its users do.
"""

import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from consumer.settings import load_settings
from model.bundle import Bundle
from model.cli import argument_parser, console, run
from model.errors import UserError
from model.files import check_folder
from model.sessions import Event, read_events
from scripts.bench.latency import latency
from scripts.bench.peers import peers
from scripts.bench.pictures import draw
from scripts.bench.profile import profile
from scripts.bench.robustness import garbage, memory, pause, restore
from scripts.bench.scoring import scoring
from scripts.bench.stage import Stage
from scripts.bench.throughput import cold, hdfs_v1, instances, open_blocks, pipeline
from scripts.local_kafka import QUICK_ABORTS, LocalKafka, free_port
from scripts.output import check_file, write_json
from scripts.simulator import simulate

_Part = Callable[[Stage, Namespace], dict[str, Any]]
PARTS: dict[str, _Part] = {
    part.__name__: part
    for part in (
        scoring, pipeline, cold, instances, open_blocks, latency, restore, memory, pause, garbage, hdfs_v1, peers,
        profile,
    )
}  # fmt: skip
_ON_REQUEST = ("hdfs_v1",)  # needs two gigabytes of disk


def main() -> None:
    """Measure what was asked for, show it, write it, draw it."""
    arguments = _arguments()
    check_file("--json", arguments.json)
    check_folder("--pictures", arguments.pictures)
    given = load_settings(arguments.config)
    traffic = _traffic(arguments.file, Bundle.load(given.model.path))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        kafka = LocalKafka(Path(scratch) / "kafka", free_port(), properties=QUICK_ABORTS)
        if arguments.only != ["scoring"]:
            kafka.up()
        stage = Stage(given, kafka, Path(scratch), traffic)
        try:
            for name in arguments.only:
                console.print(Text.assemble((name, "bold"), f": {(PARTS[name].__doc__ or '').partition(chr(10))[0]}"))
                results[name] = PARTS[name](stage, arguments)
                console.print(_table(name, results[name]))
                _write(results, arguments.json)  # a part that fails later costs none of those before it
        finally:
            kafka.down(purge=True)
    if arguments.pictures:
        for path in draw(results, arguments.pictures):
            console.print(f"drawn: {path}")


def _arguments() -> Namespace:
    parser = argument_parser("scripts.benchmark", "Measure speed, latency, memory and robustness on a real Kafka.")
    usual = [name for name in PARTS if name not in _ON_REQUEST]
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="events to stream (default: simulated ones)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=usual, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--events", type=int, default=1_000_000, help="of each trial of throughput")
    parser.add_argument("--rates", type=float, nargs="+", default=[5000, 50_000], help="events/s of the latency part")
    parser.add_argument("--seconds", type=float, default=15, help="of the latency part, for each rate")
    parser.add_argument("--instances", type=int, nargs="+", default=[1, 2], help="consumer processes to compare")
    parser.add_argument("--open-blocks", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="to compare")
    parser.add_argument("--restore-blocks", type=int, default=1_000_000, help="open blocks of the restore part")
    parser.add_argument("--memory-blocks", type=int, default=1_000_000, help="open blocks of the memory part")
    parser.add_argument("--memory-events", type=int, nargs="+", default=[19, 2], help="events of each of them")
    parser.add_argument("--pause-blocks", type=int, default=1_000_000, help="open blocks of the pause part")
    parser.add_argument("--garbage", type=int, default=1_000_000, help="bad messages; a tenth as many good ones")
    parser.add_argument("--hdfs-blocks", type=int, default=575_061, help="blocks of the hdfs_v1 part")
    parser.add_argument("--peer-events", type=int, default=100_000, help="of the peers, which are slow")
    parser.add_argument("--peers-python", type=Path, metavar="PYTHON", help="interpreter that has the peers installed")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the results as JSON")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="also draw them")
    arguments = parser.parse_args()
    for name, value in vars(arguments).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not number > 0:
                raise UserError(f"--{name.replace('_', '-')} {number:g}: a number above zero is needed")
    if arguments.peers_python and shutil.which(arguments.peers_python) is None:
        raise UserError(f"--peers-python {arguments.peers_python}: no such program; name an interpreter of Python")
    return arguments


def _traffic(file: Path | None, bundle: Bundle) -> Sequence[Event]:
    """Return the events to stream; those of another system than the model's would be nothing but alerts.

    Raises:
        UserError: the model knows less than half of them.
    """
    events = list(read_events(file)) if file else simulate(4000, 0.03, 1).events
    known = sum(event.event_id in bundle.vocabulary.tokens for event in events)
    if 2 * known < len(events):
        raise UserError(
            f"the model knows {known:,} of {len(events):,} events of {file or 'the simulator'}: "
            "name a FILE of its own system, or train it on python -m scripts.simulator"
        )
    return events


def _write(results: dict[str, Any], path: Path | None) -> None:
    """Write results with the ratios first and what the pipeline part found on top, as whoever compares wants them."""
    parts = dict(results)
    ordered = {**parts.pop("pipeline", {}), **{"latency_ms" if n == "latency" else n: v for n, v in parts.items()}}
    ratios = {name: value for name, value in ordered.items() if name.endswith("_ratio")}
    for name, values in parts.items():
        for key in ("ratio", "times_as_fast_as"):
            if key in values:
                ratios[f"{name}_{key}"] = values[key]
    for device, values in results.get("scoring", {}).items():
        ratios[f"scoring_share_of_peak_{device}"] = values["share_of_peak"]
    write_json(path, {**ratios, "cores": os.cpu_count(), **ordered})


def _table(part: str, values: dict[str, Any]) -> Table:
    table = Table("", "", title=part)
    for name, value in _flat(values):
        small = isinstance(value, float) and abs(value) < 1000
        table.add_row(name, f"{value:,.3g}" if small else f"{value:,.0f}")
    return table


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield prefix + name, value


if __name__ == "__main__":
    run(main)
