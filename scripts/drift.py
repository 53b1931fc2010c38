"""`python -m scripts.drift`: does the test for drift stay silent while nothing changes, and how soon does it speak?

Held-out normal sessions run through it whole, in the order of the file and in many others. Then a new version of the
software takes over half-way: part of the blocks get events that it writes and the old one did not. `--events` sends a
stream of events, failing blocks and all, through the detector's core, each block closed after its last event, spread
over as many partitions as the topic has.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from calibration.block_scores import block_scores
from consumer.artifacts import Artifacts
from consumer.detector import Detector
from consumer.drift import Drift, DriftTest, draws, judge_id, levels
from consumer.events import TOMBSTONE, EventBatch
from consumer.names import Names
from consumer.records import DriftState
from consumer.settings import Settings, load_settings
from model.cli import argument_parser, console, progress_bar, run
from model.device import choose
from model.errors import UserError
from model.scoring import Scorer
from model.sessions import Session, read_events
from model.vocabulary import UNK
from scripts.inputs import read_healthy
from scripts.output import check_file, write_json

AFTER = 20_000
"""Blocks after the change at most, drawn from those of the file again and again."""

SHARES = (1.0, 0.3, 0.1)
"""Of the blocks after the change, those that the new version writes."""

_BATCH = 10_000

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Quiet:
    """What came of a stream in which nothing changed; `evidence` is the highest, an alarm comes at 1."""

    stream: str
    runs: int
    blocks: int
    alerting: int
    alarms: int
    evidence: float


@dataclass(frozen=True)
class Change:
    """How many blocks after a change the alarm came, over all runs; None where it never did."""

    change: str
    share: float
    alerting: float
    runs: int
    found: int
    median: float | None
    most: int | None
    question: str | None


def main() -> int:
    """Measure and print; the exit status is 0 only if all was silent while nothing changed."""
    parser = argument_parser("scripts.drift", "Measure the test for drift.")
    parser.add_argument("--normal", type=Path, nargs="+", required=True, metavar="FILE", help="held-out sessions")
    parser.add_argument("--events", type=Path, metavar="FILE", help="a stream of events, failing blocks and all")
    parser.add_argument("--orders", type=int, default=20, metavar="N", help="shuffled orders to try (default: 20)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result as JSON")
    arguments = parser.parse_args()
    check_file("--json", arguments.json)
    settings = load_settings(arguments.config)
    if not settings.drift.enabled:
        raise UserError("drift.enabled is false in the settings: there is nothing to measure")
    if arguments.orders < 1:
        raise UserError(f"--orders {arguments.orders}: at least one is needed")
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed}: zero or a number above it is needed")
    artifacts = Artifacts.load(settings)
    sessions = read_healthy("--normal", arguments.normal, least=2)  # one before the change, one after it
    quiet, changes = measure(settings, artifacts, sessions, orders=arguments.orders, seed=arguments.seed)
    if arguments.events:
        quiet.append(streamed(settings, artifacts, arguments.events))
    _show(quiet, changes)
    write_json(arguments.json, {"quiet": [asdict(row) for row in quiet], "changes": [asdict(row) for row in changes]})
    return int(any(row.alarms for row in quiet))


def measure(
    settings: Settings, artifacts: Artifacts, sessions: list[Session], *, orders: int, seed: int
) -> tuple[list[Quiet], list[Change]]:
    """Run normal sessions through the test, unchanged and changed half-way."""
    threshold = artifacts.threshold
    scorer = Scorer(artifacts.bundle, threshold.strategy, choose(settings.device))
    random = Random(seed)
    with progress_bar("scoring sessions", (1 + len(_VERSIONS)) * len(sessions)) as advance:

        def scored(version: Callable[[Random, list[str]], list[str]]) -> Scores:
            changed = [Session(item.block_id, tuple(version(random, list(item.events)))) for item in sessions]
            return block_scores(changed, scorer, every=threshold.every, report=advance).blocks

        now = scored(lambda _, events: events)
        versions = {name: scored(version) for name, version in _VERSIONS.items()}
    quietly = versions["neighbours exchanged"]
    if len(silent := quietly[quietly <= threshold.threshold]):
        versions["the same, silent blocks only"] = silent
    trial = _Trial(settings, artifacts)
    shuffles = [np.random.default_rng(seed + number) for number in range(orders)]
    quiet = [
        trial.quiet("in the order of the file", [now]),
        trial.quiet("in other orders", [shuffle.permutation(now) for shuffle in shuffles]),
    ]
    changes = []
    for name, new in versions.items():
        for share in SHARES:
            streams = []
            for shuffle in shuffles:
                before, after = np.array_split(shuffle.permutation(now), 2)
                is_new = shuffle.random(AFTER) < share
                streams.append((before, np.where(is_new, shuffle.choice(new, AFTER), shuffle.choice(after, AFTER))))
            changes.append(trial.change(name, share, float((new > threshold.threshold).mean()), streams))
    return quiet, changes


def streamed(settings: Settings, artifacts: Artifacts, path: Path) -> Quiet:
    """Send a file's events through the detector, spread over `topics.partitions` by the hash of their block."""
    detector, tokens = artifacts.detector(settings), artifacts.bundle.vocabulary.tokens
    numbers = range(settings.topics.partitions)
    for number in numbers:
        detector.assign(number)
    left = Counter(event.block_id for event in read_events(path))
    evidence: float = 0.0
    pending: dict[int, list[tuple[str, int, int, int]]] = {number: [] for number in numbers}
    names: dict[int, dict[int, str]] = {number: {} for number in numbers}
    with progress_bar(f"streaming {path.name}", left.total()) as advance:
        for offset, event in enumerate(read_events(path)):
            number = crc32(event.block_id.encode()) % len(numbers)
            token = tokens.get(event.event_id, UNK)
            if token == UNK:
                names[number][len(pending[number])] = event.event_id
            left[event.block_id] -= 1
            for what in (token,) if left[event.block_id] else (token, TOMBSTONE):
                pending[number].append((event.block_id, what, event.timestamp, 2 * offset + (what == TOMBSTONE)))
            if (offset + 1) % _BATCH == 0 or not left.total():
                detector.process({number: _batch(rows, names[number]) for number, rows in pending.items()})
                evidence = max(ratio for number in numbers for ratio in (evidence, *_evidence(detector, number)))
                advance((offset % _BATCH) + 1)
                for number in numbers:
                    pending[number].clear()
                    names[number].clear()
    states = [detector.drift(number).state for number in numbers]
    return Quiet(
        f"{path.name}, {len(numbers)} partitions",
        1,
        sum(state.blocks for state in states),
        sum(state.alerting for state in states),
        sum(state.alarm is not None for state in states),
        evidence,
    )


def _batch(rows: Sequence[tuple[str, int, int, int]], unknown: Mapping[int, str]) -> EventBatch:
    """Return rows of block, token, time and offset as columns."""
    blocks, tokens, times, offsets = zip(*rows, strict=True) if rows else ((), (), (), ())
    return EventBatch.of(blocks, tokens, times, offsets, unknown)


def _evidence(detector: Detector, partition: int) -> Iterable[float]:
    return detector.drift(partition).evidence().values()


class _Trial:
    """Runs block scores through the test, as one partition."""

    def __init__(self, settings: Settings, artifacts: Artifacts) -> None:
        self._limit = artifacts.threshold.threshold
        self._test = DriftTest(artifacts.threshold, settings.drift)
        self._judge = judge_id(artifacts.threshold, settings.drift)

    def quiet(self, name: str, streams: list[Scores]) -> Quiet:
        blocks = alerting = alarms = 0
        highest = 0.0
        for number, scores in enumerate(streams):
            drift = Drift(self._test, DriftState(self._judge, 0))
            highest = max(highest, self._feed(drift, scores, f"{number}"))
            blocks += drift.state.blocks
            alerting += drift.state.alerting
            alarms += drift.alarm is not None
        return Quiet(name, len(streams), blocks, alerting, alarms, highest)

    def change(self, name: str, share: float, alerting: float, streams: list[tuple[Scores, Scores]]) -> Change:
        delays, questions = [], Counter[str]()
        for number, (before, after) in enumerate(streams):
            drift = Drift(self._test, DriftState(self._judge, 0))
            if self._feed(drift, before, f"{number}") >= 1:
                continue  # a false alarm finds no change
            if self._feed(drift, after, f"{number} changed") >= 1:
                delays.append(drift.state.blocks - len(before))
                questions[str(drift.alarm)] += 1
        median, most = (float(np.median(delays)), max(delays)) if delays else (None, None)
        question = questions.most_common(1)[0][0] if questions else None
        return Change(name, share, alerting, len(streams), len(delays), median, most, question)

    def _feed(self, drift: Drift, scores: Scores, salt: str) -> float:
        """Take in blocks up to an alarm; return the highest evidence."""
        level, alerted = levels(scores), scores > self._limit
        drawn = draws(Names.of([salt.encode()] * len(scores)), np.arange(len(scores)))
        highest = 0.0
        for begin in range(0, len(scores), self._test.batch):  # evidence changes once in as many blocks
            some = slice(begin, begin + self._test.batch)
            drift.take(level[some], alerted[some], drawn[some])
            highest = max(highest, *drift.evidence().values())
        return highest


def _new_event(random: Random, events: list[str]) -> list[str]:
    events.insert(random.randint(1, len(events)), "an event of the new version")
    return events


def _renamed(_: Random, events: list[str]) -> list[str]:
    common = Counter(events).most_common(1)[0][0]
    return ["an event of the new version" if event == common else event for event in events]


def _exchanged(random: Random, events: list[str]) -> list[str]:
    if len(events) > 1:
        place = random.randrange(len(events) - 1)
        events[place : place + 2] = events[place + 1], events[place]
    return events


_VERSIONS: dict[str, Callable[[Random, list[str]], list[str]]] = {
    "a new event in each block": _new_event,
    "a common event renamed": _renamed,
    "neighbours exchanged": _exchanged,
}


def _show(quiet: list[Quiet], changes: list[Change]) -> None:
    table = Table("nothing changes", "runs", "blocks", "alerting", "alarms", "evidence (alarm at 1)")
    for row in quiet:
        share = f"{row.alerting / row.blocks:.2%}"
        table.add_row(row.stream, f"{row.runs}", f"{row.blocks:,}", share, f"{row.alarms}", f"{row.evidence:.3f}")
    console.print(table)
    table = Table("the new version writes", "share", "of these alert", "found", "blocks, median", "most", "by")
    for change in changes:
        delay = ("", "") if change.median is None else (f"{change.median:,.0f}", f"{change.most:,}")
        found = f"{change.found} of {change.runs}"
        table.add_row(
            change.change, f"{change.share:.0%}", f"{change.alerting:.1%}", found, *delay, change.question or ""
        )
    console.print(table)


if __name__ == "__main__":
    run(main)
