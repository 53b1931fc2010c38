"""`python -m calibration`: finds the thresholds on held-out normal traffic, writes them, and says what they mean."""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from calibration.block_scores import Block, block_scores
from calibration.calibrate import calibrate, usable_levels
from calibration.quantile import blocks_needed
from calibration.rate import blocks_per_day, quantile_for
from calibration.traffic import Traffic, read_traffic
from consumer.settings import Settings, load_settings, milliseconds
from consumer.threshold import Threshold
from model.bundle import Bundle
from model.cli import argument_parser, console, milliseconds_of, progress_bar, run
from model.device import choose
from model.errors import UserError
from model.files import check_place
from model.scoring import Scorer
from model.sessions import read_anomalous, read_normal
from model.stamps import iso

_FROM_SETTINGS = ""
_FEW = 0.03  # share of events that the model may not know without a warning


@dataclass(frozen=True)
class Observed:
    """Normal traffic: block scores (N,), the highest blocks, blocks a day if times are known, and what was read.

    `young` of the blocks spoke so lately that they may not be over.
    """

    scores: NDArray[np.float64]
    highest: list[Block]
    per_day: float | None
    source: list[str]
    young: int = 0


def main() -> None:
    """Score, rank, write, and say what the thresholds mean."""
    arguments = _parser().parse_args()
    begin, end = (
        milliseconds_of(option, text) for option, text in (("--from", arguments.begin), ("--to", arguments.end))
    )
    _check(arguments, begin, end)
    settings = load_settings(arguments.config)
    out = arguments.out or settings.calibration.path
    scorer = Scorer(Bundle.load(settings.model.path), settings.calibration.strategy, choose(settings.device))
    check_place("--out" if arguments.out else "calibration.path", out)
    failing_sessions = read_anomalous(arguments.anomalous, scorer.bundle.lines) if arguments.anomalous else []

    if arguments.topic is None:
        observed = _from_files(arguments, settings, scorer, begin, end)
    else:
        observed = _from_topic(arguments.topic or settings.topics.events, settings, scorer, begin, end)
    quantile = settings.calibration.quantile
    if arguments.target_alerts_per_day is not None:
        if observed.per_day is None:
            raise UserError(
                "--target-alerts-per-day needs to know how many blocks begin in a day, and this traffic covers no time "
                "that is known: give an event CSV with its timestamps, or --topic"
            )
        quantile = quantile_for(arguments.target_alerts_per_day, observed.per_day, len(observed.scores))
        console.print(f"quantile {quantile:g}, for at most {arguments.target_alerts_per_day:g} false alerts a day")
    levels, reasons = usable_levels(settings.calibration.levels, quantile, len(observed.scores))
    if warning := _too_young(observed, max([quantile, *levels.values()])):
        console.print(warning, style="yellow")
    threshold = calibrate(
        observed.scores,
        scorer,
        quantile=quantile,
        every=settings.scoring.every,
        idle_timeout_ms=milliseconds(settings.windows.idle_timeout),
        levels=levels,
        blocks_per_day=observed.per_day,
    )
    failing = None
    if failing_sessions:
        with progress_bar("scoring failing sessions", len(failing_sessions)) as advance:
            failing = block_scores(failing_sessions, scorer, every=settings.scoring.every, report=advance).blocks
    threshold.save(out)
    _say(threshold, reasons)
    console.print(f"written to {out}, with anomaly_threshold.txt and anomaly_strategy.txt beside it")
    if arguments.report:
        from calibration.report import Findings, write_report  # noqa: PLC0415 - importing matplotlib takes a second

        page = out.with_name("calibration_report.html")
        findings = Findings(threshold, observed.source, observed.scores, observed.highest, failing, arguments.prior)
        folder = write_report(findings, scorer, page)
        console.print(f"report in {page}, its pictures in {folder}")


def _parser() -> ArgumentParser:
    parser = argument_parser("calibration", "Find the alert thresholds on held-out normal traffic.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--normal", type=Path, nargs="+", metavar="FILE", help="normal sessions not used in training")
    source.add_argument(
        "--topic",
        nargs="?",
        const=_FROM_SETTINGS,
        metavar="TOPIC",
        help="normal traffic from this event topic (default: topics.events of the settings)",
    )
    parser.add_argument(
        "--from",
        dest="begin",
        metavar="TIME",
        help="event time at which to begin; of files: take blocks that begin from then on",
    )
    parser.add_argument(
        "--to",
        dest="end",
        metavar="TIME",
        help="event time before which to end; of files: take blocks that are over by then",
    )
    parser.add_argument(
        "--target-alerts-per-day",
        type=float,
        metavar="N",
        help="choose the quantile so that normal traffic like this causes at most N alerts a day",
    )
    parser.add_argument(
        "--anomalous", type=Path, nargs="+", metavar="FILE", help="failing sessions, for the report's ROC curves"
    )
    parser.add_argument(
        "--prior",
        type=float,
        default=0.0293,
        help="share of failing blocks in nature, for the report (default: HDFS_v1's 0.0293)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="threshold.json (default: calibration.path of the settings)"
    )
    parser.add_argument("--no-report", dest="report", action="store_false", help="write no calibration_report.html")
    return parser


def _check(arguments: Namespace, begin: int | None, end: int | None) -> None:
    if begin is not None and end is not None and begin >= end:
        raise UserError("--from should be earlier than --to")
    if arguments.target_alerts_per_day is not None and not 0 < arguments.target_alerts_per_day < np.inf:
        raise UserError("--target-alerts-per-day should be greater than 0; a fraction is fine: 0.2 is one in five days")
    if not 0 < arguments.prior < 1:
        raise UserError(f"--prior {arguments.prior:g}: a share between 0 and 1 is needed, such as 0.03")


def _from_files(
    arguments: Namespace, settings: Settings, scorer: Scorer, begin: int | None, end: int | None
) -> Observed:
    idle_timeout = milliseconds(settings.windows.idle_timeout)
    normal = read_normal(arguments.normal, scorer.bundle.lines, begin=begin, end=end, idle_timeout=idle_timeout)
    counts = f"{len(normal.sessions):,} normal sessions, {normal.left_out:,} anomalous ones left out"
    outside = f", {normal.outside:,} not as a whole in the time range" if normal.outside else ""
    source = [*normal.files, counts + outside]
    for line in source:
        console.print(line)
    quantile = settings.calibration.quantile
    if len(normal.sessions) < blocks_needed(quantile) and arguments.target_alerts_per_day is None:
        raise UserError(
            f"{len(normal.sessions):,} normal sessions are too few for calibration.quantile {quantile:g}: it takes at "
            f"least {blocks_needed(quantile):,}; give more sessions or lower the quantile"
        )
    known = scorer.bundle.vocabulary.tokens
    unknown = sum(event not in known for session in normal.sessions for event in session.events)
    _check_known(unknown, sum(len(session.events) for session in normal.sessions))
    started = time.monotonic()
    with progress_bar("scoring sessions", len(normal.sessions)) as advance:
        scores = block_scores(normal.sessions, scorer, every=settings.scoring.every, report=advance)
    console.print(
        f"{sum(map(len, scores.looks)):,} looks, {scores.distinct:,} distinct windows, "
        f"{time.monotonic() - started:.0f} s"
    )
    per_day = blocks_per_day(normal.begun, normal.spans) if normal.spans else None
    lasts = [lived[1] for session in normal.sessions if (lived := session.lived)]
    young = sum(last > (normal.latest or 0) - idle_timeout for last in lasts)
    return Observed(scores.blocks, scores.highest, per_day, source, young)


def _check_known(unknown: int, events: int) -> None:
    """Warn of events that the model has not seen in training, where they are many: the threshold would be theirs.

    Raises:
        UserError: they are most of the events.
    """
    if unknown <= _FEW * events:
        return
    said = f"the model has never seen {unknown:,} of these {events:,} events ({unknown / events:.0%})"
    if 2 * unknown > events:
        raise UserError(f"{said}; give logs of the system that it was trained on, or train it on this one first")
    console.print(f"{said}: the threshold will lie high; train it on what is normal here first", style="yellow")


def _too_young(observed: Observed, quantile: float) -> str | None:
    """Return a warning if more blocks than may alert at the highest quantile may not be over."""
    if observed.young <= (1 - quantile) * len(observed.scores):
        return None
    return (
        f"{observed.young:,} of these blocks spoke less than windows.idle_timeout before their log ends, more than may "
        f"alert at q = {quantile:g}: they may not be over, and are calibrated on as if they were; --to TIME leaves out "
        "what is not over by then"
    )


def _from_topic(topic: str, settings: Settings, scorer: Scorer, begin: int | None, end: int | None) -> Observed:
    started = time.monotonic()
    traffic = read_traffic(
        settings, topic, scorer, begin=begin, end=end, progress=lambda total: progress_bar(f"reading {topic}", total)
    )
    span = f", {iso(traffic.first)} to {iso(traffic.last)}" if traffic.first is not None and traffic.last else ""
    source = [
        f"topic {topic}: {traffic.messages:,} messages{span}",
        f"{traffic.dead_letters:,} of them are no events: the consumer makes them dead letters",
        f"{len(traffic.scores):,} whole blocks",
        f"left out: {traffic.already_open:,} blocks open when the range began, {traffic.still_open:,} when it ended",
    ]
    for line in source:
        console.print(line)
    console.print(f"{traffic.looks:,} looks, {traffic.distinct:,} distinct windows, {time.monotonic() - started:.0f} s")
    if not traffic.scores:
        raise UserError(f"topic {topic}: {_why_none(traffic)}")
    _check_known(traffic.unknown, traffic.events)
    per_day = None
    if traffic.first is not None and traffic.last is not None:
        per_day = blocks_per_day(traffic.begun, [(traffic.first, traffic.last)])
    return Observed(traffic.blocks, traffic.highest, per_day, source)


def _why_none(traffic: Traffic) -> str:
    """Return why there is no block to calibrate on, and what to do."""
    if not traffic.read:
        return "there are no messages in the range; see to --from and --to, or name another topic: --topic TOPIC"
    if traffic.refused == traffic.read:
        return (
            f"none of the {traffic.read:,} messages is an event (of the first, {traffic.why}); see to events in the "
            "settings, which says what an event looks like, or name another topic: --topic TOPIC"
        )
    if traffic.skipped + traffic.refused == traffic.read:
        return f"none of the {traffic.skipped:,} lines names a block; see to events.block_pattern in the settings"
    if not traffic.messages and traffic.earliest is not None and traffic.latest is not None:
        times = f"those that were read are from {iso(traffic.earliest)} to {iso(traffic.latest)}"
        if traffic.cut:
            times += ", and the first windows.idle_timeout does not count, since events before it have been deleted"
        return f"no event lies in the range: {times}; choose --from and --to by the time that events tell"
    return (
        "no block begins and closes in the range; blocks close with a tombstone or after windows.idle_timeout of "
        "silence, so take a longer range, or wait until more of them have closed"
    )


def _say(threshold: Threshold, left_out: Sequence[str]) -> None:
    low, high = threshold.certificate.interval
    console.print(
        f"threshold {threshold.threshold:g} nats ({threshold.strategy}): the {threshold.quantile:g} quantile of "
        f"{threshold.blocks:,} normal blocks"
    )
    console.print(
        f"of a million normal blocks about {threshold.expected_alerts_per_million:,} will alert, "
        f"on average at most {1e6 * threshold.bound:,.0f}; with {threshold.certificate.confidence:.0%} confidence "
        f"{1e6 * low:,.0f} to {1e6 * high:,.0f}"
    )
    table = Table(title="alerts from normal blocks")
    confidence = f"with {threshold.certificate.confidence:.0%} confidence"
    for heading in ("level", "q", "threshold", "per million", confidence):
        table.add_column(heading, justify="left" if heading == "level" else "right", no_wrap=True)
    if threshold.blocks_per_day:
        console.print(f"{threshold.blocks_per_day:,.0f} normal blocks begin in a day")
        table.add_column("a day", justify="right", no_wrap=True)
    for level in threshold.levels:
        low, high = (1e6 * edge for edge in level.certificate.interval)
        cells = [level.name, f"{level.quantile:g}", f"{level.threshold:.4f}",
                 f"{level.expected_alerts_per_million:,}", f"{low:,.0f} to {high:,.0f}"]  # fmt: skip
        if threshold.blocks_per_day:
            cells.append(f"{level.expected_alerts_per_million * threshold.blocks_per_day / 1e6:,.1f}")
        table.add_row(*cells)
    console.print(table)
    for reason in left_out:
        console.print(reason)


if __name__ == "__main__":
    run(main)
