"""`python -m scripts.lines`: how the settings cut a raw log, before a model is trained on it; and how fast.

With the event ids of the same lines from elsewhere it says how templates and ids correspond, and whether a model finds
as much by the one as by the other.
"""

import csv
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from drain3 import TemplateMiner
from drain3.masking import MaskingInstruction
from drain3.template_miner_config import TemplateMinerConfig
from rich.table import Table
from rich.text import Text

from calibration.block_scores import block_scores
from calibration.calibrate import calibrate
from consumer.settings import Settings, load_settings, milliseconds
from consumer.text import TextDecoder
from model.bundle import Bundle
from model.cli import argument_parser, console, progress_bar, run
from model.device import choose
from model.errors import UserError
from model.lines import BLOCK, LineCutter, LineFormat, LineReader, LineRules
from model.mining import mine
from model.rawlog import is_raw, texts
from model.scoring import Scorer
from model.sessions import Session, read_sessions
from model.templates import event_id
from model.training import train
from model.vocabulary import Vocabulary
from scripts.evaluate import evaluate
from scripts.output import check_file, write_json

UNMATCHED = "no template"

_BATCH = 10_000
_DRAIN_LINES = 20_000  # enough to time plain Drain3 at its pace
_TRAINING, _CALIBRATION = 0.4, 0.25  # shares of the healthy blocks, by first event; the rest is for the test


@dataclass(frozen=True)
class Correspondence:
    """How templates and given event ids correspond, event by event.

    Attributes:
        pairs: events by given id and template (or `UNMATCHED`).
        blocks: sessions compared.
        different: those of them that have another number of events.
    """

    pairs: Counter[tuple[str, str]]
    blocks: int
    different: int

    @property
    def split(self) -> dict[str, list[str]]:
        """Given ids whose events have several templates, or a template at one time and none at another."""
        return _several((event, template) for event, template in self.pairs)

    @property
    def merged(self) -> dict[str, list[str]]:
        """Templates that several given ids have become."""
        return _several((template, event) for event, template in self.pairs if template != UNMATCHED)

    @property
    def unmatched(self) -> list[str]:
        """Given ids of whose events no template matches one."""
        matched = {event for event, template in self.pairs if template != UNMATCHED}
        return sorted({event for event, _ in self.pairs} - matched)

    @property
    def is_renaming(self) -> bool:
        """Whether the sessions are equal but for names, where all that no template matches has one name."""
        return not (self.different or self.split or self.merged)


def main() -> None:
    """Say how the file is cut; with options, more."""
    parser = argument_parser("scripts.lines", "Show how the settings cut a raw log, and how fast.")
    parser.add_argument("file", type=Path, metavar="FILE", help="raw log lines; labels.csv beside it is used")
    parser.add_argument(
        "--events", type=Path, metavar="FILE", help="events of the same lines: compare templates with ids"
    )
    parser.add_argument("--benchmark", action="store_true", help="lines a second, beside plain Drain3")
    parser.add_argument("--quality", action="store_true", help="with --events: what a model finds by each")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the results as JSON")
    arguments = parser.parse_args()
    check_file("--json", arguments.json)
    settings = load_settings(arguments.config)
    rules = LineRules.of(settings.events)
    if not is_raw(arguments.file, rules):
        raise UserError(f"{arguments.file}: events.block_pattern finds no block in the first lines; mend the pattern")
    if arguments.quality and not arguments.events:
        raise UserError("--quality compares with event ids: name their file with --events")
    lines = mine([arguments.file], rules).lines
    result: dict[str, Any] = {"survey": survey(arguments.file, lines)}
    _show_survey(result["survey"])
    if arguments.events:
        found = correspondence(arguments.file, arguments.events, lines)
        result["correspondence"] = _facts(found)
        _show_correspondence(found)
    if arguments.benchmark:
        result["benchmark"] = benchmark(arguments.file, lines)
        console.print_json(data=result["benchmark"])
    if arguments.quality:
        result["quality"] = quality(arguments.file, arguments.events, settings)
        _show_quality(result["quality"])
    write_json(arguments.json, result)


def survey(path: Path, lines: LineFormat) -> dict[str, Any]:
    """Return how many lines of a file are of which template, and how many name no block, no time, or match nothing."""
    read = LineReader(lines).read
    templates = {event_id(template): template for template in lines.templates}
    counts: Counter[str] = Counter()
    examples: list[str] = []
    for text in texts(path):
        blocks, event, when = read(text)
        counts["lines"] += 1
        if not blocks:
            counts["no_block"] += 1
            continue
        counts["no_time"] += when is None
        if event in templates:
            counts[templates[event]] += 1
        else:
            counts["no_template"] += 1
            if len(examples) < 5:
                examples.append(event)
    return {
        **{name: counts[name] for name in ("lines", "no_block", "no_time", "no_template")},
        "templates": {template: counts[template] for template in lines.templates},
        "examples_of_no_template": examples,
    }


def correspondence(raw: Path, events: Path, lines: LineFormat) -> Correspondence:
    """Compare the sessions of raw lines with those of the same lines' given event ids.

    Raises:
        UserError: a file cannot be read.
    """
    templates = {event_id(template): template for template in lines.templates}
    given = {session.block_id: session.events for session in read_sessions(events).sessions}
    cut = {session.block_id: session.events for session in read_sessions(raw, lines).sessions}
    pairs: Counter[tuple[str, str]] = Counter()
    different = 0
    blocks = given.keys() | cut.keys()
    for block in blocks:
        left, right = given.get(block, ()), cut.get(block, ())
        different += len(left) != len(right)
        pairs.update(zip(left, (templates.get(event, UNMATCHED) for event in right), strict=False))
    return Correspondence(pairs, len(blocks), different)


def benchmark(path: Path, lines: LineFormat) -> dict[str, float]:
    """Return lines a second of one process: bytes to events by text mode, and bytes to templates by plain Drain3.

    Both know the templates already and use the same masks; Drain3 gets the block pattern as one more, and the text
    behind the header. `same_template` is the share of lines in which the two agree.
    """
    values = [text.encode() for text in texts(path)]
    batches = [values[start : start + _BATCH] for start in range(0, len(values), _BATCH)]
    few = values[:_DRAIN_LINES]
    match = _plain_drain(lines)

    def in_batches() -> None:
        decoder = TextDecoder(lines, {}, 2**62)
        for batch in batches:
            decoder.columns(batch, [0] * len(batch))

    def one_by_one() -> None:
        decoder = TextDecoder(lines, {}, 2**62)
        for value in values:
            decoder.rows(value, 0)

    def templates_only() -> None:
        cutter, known = LineCutter(lines.rules), dict[bytes, None]()
        for batch in batches:
            for start in range(0, len(batch), 512):
                lines_text = [value.decode("utf-8", "replace") for value in batch[start : start + 512]]
                known.update(dict.fromkeys(cutter.cut_all(lines_text)[1]))
        deque(map(cutter.masked, known), maxlen=0)

    text_mode = len(values) / _seconds(in_batches)
    plain = len(few) / _seconds(lambda: deque(map(match, few), maxlen=0))
    read = LineReader(lines).read
    ids = {event_id(template) for template in lines.templates}
    agree = 0
    for value in few:
        template, event = match(value), read(value.decode("utf-8", "replace"))[1]
        agree += event == event_id(template) if template is not None else event not in ids
    return {
        "lines": len(values),
        "text_mode_lines_per_s": round(text_mode),
        "text_mode_one_by_one_lines_per_s": round(len(values) / _seconds(one_by_one)),
        "templates_only_lines_per_s": round(len(values) / _seconds(templates_only)),
        "drain3_lines_per_s": round(plain),
        "text_mode_times_as_fast": round(text_mode / plain, 1),
        "same_template": agree / len(few),
    }


def _seconds(work: Callable[[], object]) -> float:
    """Return the processor time of the faster of two runs."""
    times = []
    for _ in range(2):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def _plain_drain(lines: LineFormat) -> Callable[[bytes], str | None]:
    config = TemplateMinerConfig()
    config.drain_sim_th = 1.0  # each template stays as it is
    config.masking_instructions = [
        MaskingInstruction(mask, name)
        for name, mask in ((BLOCK.strip("<>"), lines.rules.block_pattern), *lines.rules.masks)
    ]
    miner = TemplateMiner(config=config)
    for template in lines.templates:
        miner.drain.add_log_message(template)
    header = re.compile(lines.rules.message_pattern or "")

    def match(value: bytes) -> str | None:
        text = value.decode("utf-8", "replace")
        front = header.search(text)
        found = miner.match(text[front.end() :] if front else text)
        return None if found is None else found.get_template()

    return match


def quality(raw: Path, events: Path, settings: Settings) -> dict[str, Any]:
    """Return the measures of a model trained on raw lines and of one trained on given event ids, on the same blocks.

    The healthy blocks that begin first are for training, the next ones for calibration; the rest and all anomalous
    ones are the test.

    Raises:
        UserError: a file cannot be read, or has no labels.
    """
    given = read_sessions(events).sessions
    healthy = [session.block_id for session in given if session.anomalous is False]
    first, second = (round(share * len(healthy)) for share in (_TRAINING, _TRAINING + _CALIBRATION))
    parts = {
        "training": set(healthy[:first]),
        "calibration": set(healthy[first:second]),
        "normal": set(healthy[second:]),
    }
    if not all(parts.values()) or not any(session.anomalous for session in given):
        raise UserError(
            f"{events}: healthy and anomalous blocks are needed to compare detection; are its labels there?"
        )
    lines = _mined_from(raw, LineRules.of(settings.events), parts["training"])
    measures: dict[str, Any] = {name: len(blocks) for name, blocks in parts.items()}
    measures["anomalous"] = sum(bool(session.anomalous) for session in given)
    for name, sessions in (("lines", read_sessions(raw, lines).sessions), ("events", given)):
        measures["by_" + name] = _measured(sessions, parts, settings)
    return measures


def _mined_from(raw: Path, rules: LineRules, training: set[str]) -> LineFormat:
    """Return the templates of the lines of some blocks alone."""
    with TemporaryDirectory() as folder:
        labels = Path(folder) / "labels.csv"
        blocks = {block for text in texts(raw) for block in re.findall(rules.block_pattern, text)}
        with labels.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["BlockId", "Label"])
            rows.writerows([block, "Normal" if block in training else "Anomaly"] for block in sorted(blocks))
        return mine([raw], rules, labels=labels).lines


def _measured(sessions: list[Session], parts: Mapping[str, set[str]], settings: Settings) -> dict[str, Any]:
    """Train, calibrate and evaluate; return the measures that matter for the comparison."""
    part = {name: [item for item in sessions if item.block_id in blocks] for name, blocks in parts.items()}
    vocabulary = Vocabulary.of(session.events for session in part["training"])
    device = choose(settings.device)
    with console.status(f"training on {len(part['training']):,} sessions of {len(vocabulary.events)} event ids"):
        network = train(
            [vocabulary.encode(session.events) for session in part["training"]],
            len(vocabulary), settings.model, settings.training, device,
        )  # fmt: skip
    scorer = Scorer(Bundle(network, vocabulary), settings.calibration.strategy, device)
    every = settings.scoring.every
    with progress_bar("calibrating", len(part["calibration"])) as advance:
        scores = block_scores(part["calibration"], scorer, every=every, report=advance).blocks
    idle = milliseconds(settings.windows.idle_timeout)
    quantile = settings.calibration.quantile
    threshold = calibrate(scores, scorer, quantile=quantile, every=every, idle_timeout_ms=idle)
    failing = [session for session in sessions if session.anomalous]
    found = evaluate(part["normal"], failing, scorer, threshold, len(failing) / len(sessions))
    return {
        "event_ids": len(vocabulary.events),
        **{name: found[name] for name in ("auc", "average_precision", "best_f1")},
        "at": [
            {name: at[name] for name in ("q", "recall", "false_alarm_rate", "f1")}
            for at in found["at"]
            if at["threshold"]
        ],
    }


def _several(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return what is paired with more than one thing, and with what."""
    found: dict[str, set[str]] = {}
    for left, right in pairs:
        found.setdefault(left, set()).add(right)
    return {left: sorted(rights) for left, rights in sorted(found.items()) if len(rights) > 1}


def _facts(found: Correspondence) -> dict[str, Any]:
    return {
        "blocks": found.blocks,
        "different_length": found.different,
        "split": found.split,
        "merged": found.merged,
        "no_template": found.unmatched,
        "is_renaming": found.is_renaming,
        "pairs": [[event, template, count] for (event, template), count in sorted(found.pairs.items())],
    }


def _show_survey(found: dict[str, Any]) -> None:
    table = Table("lines", "template", title=f"{found['lines']:,} lines")
    for template, count in sorted(found["templates"].items(), key=lambda item: -item[1]):
        table.add_row(f"{count:,}", Text(template))
    table.add_row(f"{found['no_template']:,}", "no template, since only failing blocks have such lines")
    table.add_row(f"{found['no_block']:,}", "no block: skipped")
    console.print(table)
    if found["no_time"]:
        console.print(f"{found['no_time']:,} lines tell no time: see events.timestamp_pattern and timestamp_format")
    for example in found["examples_of_no_template"]:
        console.print(Text(f"no template: {example[:200]}"))


def _show_correspondence(found: Correspondence) -> None:
    table = Table("event id", "events", "template", title=f"{found.blocks:,} blocks")
    for (event, template), count in sorted(found.pairs.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(event, f"{count:,}", Text(template))
    console.print(table)
    for what, several in (("is split", found.split), ("is several ids", found.merged)):
        for name, others in several.items():
            console.print(Text(f"{name} {what}: {'; '.join(others)}"))
    if found.different:
        console.print(f"{found.different:,} blocks have another number of events")
    console.print("the sessions are equal but for names" if found.is_renaming else "the sessions are not equal")


def _show_quality(found: dict[str, Any]) -> None:
    table = Table(
        "", "by raw lines", "by event ids", title="what a model finds, trained and calibrated on the same blocks"
    )
    sides = found["by_lines"], found["by_events"]
    for name, form in (("event_ids", ""), ("auc", ".5f"), ("average_precision", ".4f"), ("best_f1", ".4f")):
        table.add_row(name.replace("_", " "), *(format(side[name], form) for side in sides))
    for points in zip(*(side["at"] for side in sides), strict=True):
        for name in ("recall", "false_alarm_rate", "f1"):
            label = f"{name.replace('_', ' ')} at q = {points[0]['q']:g}"
            table.add_row(label, *(f"{point[name]:.4f}" for point in points))
    console.print(table)


if __name__ == "__main__":
    run(main)
