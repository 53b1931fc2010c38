"""Files of raw log lines: whether a file is one, and what its lines say."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from model.files import opened
from model.lines import LineCutter, LineRules

KIND = "raw log lines"
"""What such a file is, for people."""

_SNIFF_LINES = 1000
_COLUMNS = {"BlockId", "Features", "timestamp", "block_id", "event_id"}  # of the tables among the other formats

Event = TypeVar("Event", str, bytes)  # as its name, or as its shape

Read = Callable[[str], tuple[Sequence[str], Event, int | None]]
"""Returns the blocks, the event and the time of a line, as `LineReader.read`."""


def is_raw(path: Path, rules: LineRules) -> bool:
    """Say whether a file is none of the other formats and one of its first lines names a block.

    Raises:
        UserError: the file cannot be read.
    """
    cutter = LineCutter(rules)
    with opened(path, "replace") as lines:
        first = list(islice((line for line in lines if line.strip()), _SNIFF_LINES))
    if (
        not first
        or first[0].lstrip().startswith("{")
        or _COLUMNS & {cell.strip(' "\r\n') for cell in first[0].split(",")}
    ):
        return False
    return any(cutter.cut(line)[0] for line in first)


def texts(path: Path) -> Iterator[str]:
    """Yield the lines of a file without their ends; bytes that are not UTF-8 become U+FFFD, as in the stream.

    Raises:
        UserError: the file cannot be read.
    """
    with opened(path, "replace") as lines:
        for line in lines:
            yield line.rstrip("\r\n")


def read(path: Path, read_line: Read[Event]) -> Iterator[tuple[int | None, str, Event]]:
    """Yield time, block and event of each line for each block that it names.

    The time is that of the last line that had one: a line of a stack trace is as old as what it belongs to. It is
    None before the first.

    Raises:
        UserError: the file cannot be read.
    """
    last: int | None = None
    for text in texts(path):
        blocks, event, time = read_line(text)
        if time is not None:
            last = time
        for block in blocks:
            yield last, block, event


def sessions(
    events: Iterable[tuple[int | None, str, Event]],
) -> dict[str, tuple[list[Event], list[int | None]]]:
    """Return the events of each block, in order, and the time of each."""
    found: dict[str, tuple[list[Event], list[int | None]]] = {}
    for time, block, event in events:
        life = found.get(block)
        if life is None:
            life = found[block] = ([], [])
        life[0].append(event)
        life[1].append(time)
    return found
