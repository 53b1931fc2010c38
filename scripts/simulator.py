"""Simulates a system's log: many blocks living at once, a few of them failing, and the truth about which.

Same seed, same workload. What lives and how it fails is in `scripts.systems`.

    python -m scripts.simulator --blocks 20000 --faults 0.03 --seed 1 --out artifacts/simulated
"""

import argparse
import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle
from operator import itemgetter
from pathlib import Path
from random import Random

from rich.table import Table

from model import cli
from model.errors import UserError
from model.files import check_folder
from model.sessions import Event, Session
from scripts.systems import HDFS, SYSTEMS, System

TEMPLATES: dict[str, str] = {
    event_id: template for system in SYSTEMS.values() for event_id, template in system.templates.items()
}
"""The text of every event of every system, by event id."""

BIRTH = 1_704_067_200_000
"""When every workload begins: 2024-01-01T00:00:00Z, in milliseconds."""


@dataclass(frozen=True)
class Workload:
    """A simulated log and the truth about it.

    `events` are in the order of time, `blocks` in the order of birth; `faults` names the kind of fault of each
    faulty block and holds no other block.
    """

    events: list[Event]
    faults: dict[str, str]
    blocks: list[str]

    def sessions(self) -> list[Session]:
        """Return each block's whole life, labelled, in the order of birth."""
        lives: dict[str, list[str]] = {block: [] for block in self.blocks}
        for event in self.events:
            lives[event.block_id].append(event.event_id)
        return [Session(block, tuple(life), block in self.faults) for block, life in lives.items()]


def simulate(
    blocks: int,
    fault_share: float,
    seed: int,
    *,
    blocks_per_second: float = 4.0,
    prefix: str | None = None,
    system: System = HDFS,
) -> Workload:
    """Return the log of `blocks` blocks, of which the nearest whole number to `fault_share` fail.

    Blocks are born at random moments, `blocks_per_second` of them on average (4 in the real HDFS logs), and then
    live for hours, so that most live at once. The kinds of fault take turns. Block ids are random numbers behind
    the prefix (the system's own when None): workloads of different seeds share none of them.
    """
    if blocks < 1:
        raise UserError(f"a workload needs at least 1 block, not {blocks}")
    if not 0 <= fault_share <= 1:
        raise UserError(f"the share of faulty blocks should be between 0 and 1, not {fault_share}")
    if not blocks_per_second > 0:
        raise UserError(f"blocks per second should be more than 0, not {blocks_per_second}")
    random = Random(seed)
    prefix = system.prefix if prefix is None else prefix
    names = [f"{prefix}{number}" for number in random.sample(range(10**18), blocks)]
    faulty = random.sample(names, round(blocks * fault_share))
    faults = dict(zip(faulty, cycle(system.faults), strict=False))
    lines: list[tuple[int, str, str]] = []
    birth = 0.0
    for name in names:
        birth += random.expovariate(blocks_per_second)
        draw = system.faults[faults[name]] if name in faults else system.life
        lines += [(BIRTH + round(1000 * (birth + age)), name, event_id) for age, event_id in sorted(draw(random))]
    lines.sort(key=itemgetter(0))  # stable: what shares a millisecond stays in the order of its block's life
    return Workload([Event(*line) for line in lines], faults, names)


def write(workload: Workload, system: System, folder: Path) -> None:
    """Write `events.csv.gz`, `labels.csv`, `sessions.jsonl` and `templates.csv` into the folder.

    The same workload gives the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # gzip's header would hold the time of writing, and its default level takes longer than the simulation.
    with (
        gzip.GzipFile(folder / "events.csv.gz", "wb", compresslevel=3, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="") as file,
    ):
        file.write("timestamp,block_id,event_id\n")
        file.writelines(f"{event.timestamp},{event.block_id},{event.event_id}\n" for event in workload.events)
    labels = {block: "Anomaly" if block in workload.faults else "Normal" for block in workload.blocks}
    _write_csv(folder / "labels.csv", ("BlockId", "Label"), labels.items())
    _write_csv(folder / "templates.csv", ("event_id", "template"), system.templates.items())
    with (folder / "sessions.jsonl").open("w", encoding="utf-8") as file:
        for session in workload.sessions():
            block = session.block_id
            line = {"block_id": block, "events": session.events, "label": labels[block]}
            file.write(json.dumps(line) + "\n")


def _write_csv(path: Path, header: tuple[str, str], rows: Iterable[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _summary(workload: Workload) -> Table:
    sessions = workload.sessions()
    normal = [session.events for session in sessions if not session.anomalous]
    table = Table("workload", "", show_header=False)
    table.columns[1].justify = "right"
    table.add_row("blocks", f"{len(sessions):,}")
    table.add_row("events", f"{len(workload.events):,}")
    table.add_row("events per block", f"{len(workload.events) / len(sessions):.1f}")
    table.add_row("distinct sequences", f"{len({session.events for session in sessions}):,}")
    if normal:
        top = sum(count for _, count in Counter(normal).most_common(10))
        table.add_row("normal blocks with one of the 10 commonest", f"{top / len(normal):.0%}")
    for kind, count in sorted(Counter(workload.faults.values()).items()):
        table.add_row(f"fault: {kind}", f"{count:,}")
    return table


def main() -> None:
    """Simulate a workload, write its files and show what it is made of."""
    parser = argparse.ArgumentParser(prog="python -m scripts.simulator", description="Simulate a system's log.")
    parser.add_argument("--blocks", type=int, default=20_000, help="how many blocks live (default: 20000)")
    parser.add_argument("--faults", type=float, default=0.03, help="share of them that fail (default: 0.03)")
    parser.add_argument("--seed", type=int, default=1, help="same seed, same workload (default: 1)")
    parser.add_argument("--system", choices=SYSTEMS, default=HDFS.name, help="what lives (default: hdfs)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--name", default="", help="put them into this subfolder: one of several workloads")
    arguments = parser.parse_args()
    folder = arguments.out / arguments.name
    check_folder("--out", folder)
    system = SYSTEMS[arguments.system]
    workload = simulate(arguments.blocks, arguments.faults, arguments.seed, system=system)
    try:
        write(workload, system, folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --out") from None
    cli.console.print(_summary(workload))
    cli.console.print(f"written to {folder}")


if __name__ == "__main__":
    cli.run(main)
