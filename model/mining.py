"""Training on raw log lines: which blocks are healthy, and the templates of their lines."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import cast

from model import rawlog
from model.errors import UserError
from model.files import check_distinct
from model.lines import LineCutter, LineFormat, LineRules
from model.sessions import Session, labels_beside, lies_within, read_labels
from model.templates import Matcher, event_id, learn


@dataclass(frozen=True)
class Mined:
    """What the lines of healthy blocks are.

    Attributes:
        lines: the rules and the templates.
        sessions: the healthy blocks.
        texts: template of each event id.
        left_out: blocks that a label calls anomalous.
        outside: blocks that do not lie within the range of time as a whole.
        notes: what was read, for people.
    """

    lines: LineFormat
    sessions: list[Session]
    texts: dict[str, str]
    left_out: int
    outside: int
    notes: list[str]


@dataclass
class _Block:
    """Of a block that no line tells a time of, the first one is greater than the last."""

    shapes: list[int] = field(default_factory=list)
    first: float = inf
    last: float = -inf

    @property
    def lived(self) -> tuple[float, float] | None:
        return (self.first, self.last) if self.first <= self.last else None


def mine(
    paths: Sequence[Path],
    rules: LineRules,
    *,
    labels: Path | None = None,
    begin: int | None = None,
    end: int | None = None,
) -> Mined:
    """Read raw logs, one after the other as one stream, and learn the templates of their healthy blocks' lines.

    Args:
        paths: the files.
        rules: how lines are cut.
        labels: which blocks are anomalous; the label file beside each log if None. Others count as healthy.
        begin: take only blocks of which no line is from before this time, in milliseconds since 1970: half a block
            is not what a healthy block looks like.
        end: and none from then on.

    Raises:
        UserError: a file cannot be read or is given twice, or no healthy block is left.
    """
    check_distinct(paths)
    cutter = LineCutter(rules)
    numbers: dict[bytes, int] = {}
    anomalous: dict[str, bool] = {}
    blocks: dict[str, _Block] = {}
    notes = []
    for path in paths:
        count = 0

        def number(text: str) -> tuple[Sequence[str], bytes, int | None]:
            named, shape = cutter.cut(text)
            return named, shape, cutter.time(text) if named else None

        for time, name, shape in rawlog.read(path, number):
            block = blocks.get(name)
            if block is None:
                block = blocks[name] = _Block()
            if time is not None:
                block.first, block.last = min(block.first, time), max(block.last, time)
            block.shapes.append(numbers.setdefault(shape, len(numbers)))
            count += 1
        beside = labels or labels_beside(path)
        if beside is not None:
            anomalous |= read_labels(beside)
        notes.append(f"{path}: {rawlog.KIND}, {count:,} events" + (f", labels from {beside.name}" if beside else ""))
    if anomalous and not anomalous.keys() & blocks.keys():
        raise UserError(f"the labels name none of the {len(blocks):,} blocks of the log; give the right ones")

    healthy = {name: block for name, block in blocks.items() if not anomalous.get(name)}
    kept = {name: block for name, block in healthy.items() if lies_within(block.lived, begin, end)}
    if not kept:
        raise UserError("no healthy block is left to train on; give a longer log, other labels or a longer range")
    seen = {number for block in kept.values() for number in block.shapes}
    masked = {number: cutter.masked(shape) for shape, number in numbers.items() if number in seen}
    templates = learn(masked.values())
    match = Matcher(templates).match  # finds one for each line that it was learned from
    ids = {number: cast("str", match(line)) for number, line in masked.items()}
    return Mined(
        LineFormat(rules, templates),
        [Session(name, tuple(ids[number] for number in block.shapes)) for name, block in kept.items()],
        {event_id(template): template for template in templates},
        len(blocks) - len(healthy),
        len(healthy) - len(kept),
        notes,
    )
