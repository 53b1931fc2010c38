"""Session files: which events each block had, and whether it was healthy. The format is told by the content."""

import csv
import gzip
import heapq
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import BufferedReader, TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import IO, cast

import msgspec

from model.errors import UserError

FORMATS = (
    'session JSONL ({"block_id": …, "events": […]} a line), '
    "event CSV (columns timestamp, block_id, event_id), "
    "Loghub's Event_traces.csv (columns BlockId, Features)"
)
"""What can be read, for people."""

_LABEL_FILES = ("anomaly_label.csv", "labels.csv")
_ANOMALOUS = {"anomaly": True, "fail": True, "1": True, "normal": False, "success": False, "0": False}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_EVENT = 1_000_000_000_000  # 2001-09-09T01:46:40Z: when the events of files without timestamps begin


@dataclass(frozen=True, slots=True)
class Session:
    """The events of one block, in order. `anomalous` is None where the file does not say."""

    block_id: str
    events: tuple[str, ...]
    anomalous: bool | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """One log event; `timestamp` in milliseconds since 1970."""

    timestamp: int
    block_id: str
    event_id: str


@dataclass(frozen=True)
class SessionFile:
    """A file as it was understood. `labels` names the file beside it that the labels came from, if any."""

    path: Path
    format: str
    sessions: list[Session]
    labels: Path | None

    def __str__(self) -> str:
        labelled = f", labels from {self.labels.name}" if self.labels else ""
        return f"{self.path}: {self.format}, {len(self.sessions):,} sessions{labelled}"


@dataclass(frozen=True)
class NormalSessions:
    """The sessions of several files that no label calls anomalous; `files` describes what was read."""

    sessions: list[Session]
    left_out: int
    files: list[str]


class _Line(msgspec.Struct):
    block_id: str
    events: list[str]
    label: str | None = None


def read_sessions(path: Path) -> SessionFile:
    """Read the sessions of a file, plain or gzip.

    Raises:
        UserError: the file cannot be read or understood; the message names the line.
    """
    with _opened(path) as lines:
        first, rest = _begin(path, lines)
        if first.startswith("{"):
            sessions = [_session(path, number, line) for number, line in enumerate(rest, 1) if line.strip()]
            return _labelled(path, "session JSONL", sessions)
        header, rows = _table(path, rest)
        if {"BlockId", "Features"} <= set(header):
            return _labelled(path, "Event_traces CSV", list(_traces(path, header, rows)))
        events: dict[str, list[str]] = {}
        for event in _csv_events(path, header, rows):
            events.setdefault(event.block_id, []).append(event.event_id)
        return _labelled(path, "event CSV", [Session(block, tuple(ids)) for block, ids in events.items()])


def read_normal(paths: Sequence[Path]) -> NormalSessions:
    """Read several files and leave out what a label calls anomalous; sessions without label count as normal.

    Raises:
        UserError: as `read_sessions`.
    """
    normal: list[Session] = []
    files = []
    left_out = 0
    for path in paths:
        file = read_sessions(path)
        kept = [session for session in file.sessions if not session.anomalous]
        left_out += len(file.sessions) - len(kept)
        normal.extend(kept)
        files.append(str(file))
    return NormalSessions(normal, left_out, files)


def read_events(path: Path) -> Iterator[Event]:
    """Yield the events of a file in order, plain or gzip.

    Session files hold no times, so these are made: blocks begin a second apart, a block's events follow each
    other by a second, and all of them are merged in time order.

    Raises:
        UserError: as `read_sessions`.
    """
    with _opened(path) as lines:
        first, rest = _begin(path, lines)
        if not first.startswith("{"):
            header, rows = _table(path, rest)
            if not {"BlockId", "Features"} <= set(header):
                yield from _csv_events(path, header, rows)
                return
    sessions = read_sessions(path).sessions
    moments = heapq.merge(
        *([(start + step, start) for step in range(len(session.events))] for start, session in enumerate(sessions))
    )
    for second, start in moments:
        session = sessions[start]
        yield Event(_FIRST_EVENT + 1000 * second, session.block_id, session.events[second - start])


def read_templates(path: Path) -> dict[str, str]:
    """Read the text of each event id from a CSV with the columns event_id and template.

    Raises:
        UserError: the file cannot be read or lacks a column.
    """
    with _opened(path) as lines:
        header, rows = _table(path, _begin(path, lines)[1])
        event, template = (_column(path, header, name) for name in ("event_id", "template"))
        return {row[event]: row[template] for _, row in rows}


def read_labels(path: Path) -> dict[str, bool]:
    """Read which blocks are anomalous from a CSV with the columns BlockId and Label.

    Raises:
        UserError: the file cannot be read, lacks a column or uses an unknown label.
    """
    with _opened(path) as lines:
        header, rows = _table(path, _begin(path, lines)[1])
        block, label = (_column(path, header, name) for name in ("BlockId", "Label"))
        return {row[block]: _anomalous(path, number, row[label]) for number, row in rows}


def _session(path: Path, number: int, line: str) -> Session:
    try:
        item = msgspec.json.decode(line, type=_Line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not a session ({error}); mend or remove the line") from None
    if not item.events or not item.block_id:
        raise UserError(f"{path}, line {number}: a session needs a block_id and at least one event; remove the line")
    return Session(
        item.block_id, tuple(item.events), None if item.label is None else _anomalous(path, number, item.label)
    )


def _traces(path: Path, header: list[str], rows: Iterator[tuple[int, list[str]]]) -> Iterator[Session]:
    block, features = header.index("BlockId"), header.index("Features")
    label = header.index("Label") if "Label" in header else None
    for number, row in rows:
        text = row[features].strip()
        events = tuple(part.strip().strip("'\"") for part in text.strip("[]").split(",")) if text else ()
        if not all(events) or not events or not row[block]:
            raise UserError(f"{path}, line {number}: BlockId or an event of Features is empty; mend or remove the line")
        yield Session(row[block], events, None if label is None else _anomalous(path, number, row[label]))


def _csv_events(path: Path, header: list[str], rows: Iterator[tuple[int, list[str]]]) -> Iterator[Event]:
    columns = [header.index(name) for name in ("timestamp", "block_id", "event_id") if name in header]
    if len(columns) < 3:
        raise UserError(f"{path}: unknown columns {', '.join(header[:6])}; understood are {FORMATS}")
    when, block, event = columns
    known: tuple[str, int] = ("", 0)  # neighbouring lines mostly share their second
    for number, row in rows:
        if row[when] != known[0]:
            known = row[when], _milliseconds(path, number, row[when])
        if not row[block] or not row[event]:
            raise UserError(f"{path}, line {number}: block_id or event_id is empty; mend or remove the line")
        yield Event(known[1], row[block], row[event])


def _milliseconds(path: Path, number: int, text: str) -> int:
    try:
        if text.isdecimal():
            return int(text)
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(
            f"{path}, line {number}: {text[:40]!r} is no timestamp; write ISO 8601 or milliseconds since 1970"
        ) from None
    return (moment.replace(tzinfo=moment.tzinfo or UTC) - _EPOCH) // timedelta(milliseconds=1)


def _labelled(path: Path, kind: str, sessions: list[Session]) -> SessionFile:
    """Take missing labels from a label file beside the sessions, if there is one that knows these blocks."""
    if not sessions:
        raise UserError(f"{path}: holds no session")
    if kind == "session JSONL" or any(session.anomalous is not None for session in sessions):
        return SessionFile(path, kind, sessions, None)
    for name in _LABEL_FILES:
        beside = path.with_name(name)
        if beside.is_file() and beside != path:
            labels = read_labels(beside)
            known = Counter(session.block_id in labels for session in sessions)
            if not known[True]:
                raise UserError(f"{beside}: labels none of the {len(sessions):,} blocks of {path.name}; move it away "
                                "or give the right one")  # fmt: skip
            labelled = [Session(item.block_id, item.events, labels.get(item.block_id)) for item in sessions]
            return SessionFile(path, kind, labelled, beside)
    return SessionFile(path, kind, sessions, None)


def _anomalous(path: Path, number: int, label: str) -> bool:
    try:
        return _ANOMALOUS[label.strip().lower()]
    except KeyError:
        raise UserError(
            f"{path}, line {number}: unknown label {label[:40]!r}; write Normal or Anomaly (or Success or Fail)"
        ) from None


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """Open a text file, unpacked if it is gzip, and turn every way in which reading fails into a sentence."""
    try:
        with path.open("rb") as raw:
            packed = raw.peek(2)[:2] == b"\x1f\x8b"
            binary = cast("BufferedReader", gzip.GzipFile(fileobj=raw) if packed else raw)
            yield TextIOWrapper(binary, encoding="utf-8-sig", newline="")
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise UserError(f"{path}: the gzip file is damaged or cut short; fetch it again") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; understood are {FORMATS}") from None
    except csv.Error as error:
        raise UserError(f"{path}: is not a CSV file ({error}); understood are {FORMATS}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _begin(path: Path, lines: IO[str]) -> tuple[str, Iterator[str]]:
    """Return the first line and an iterator over all lines."""
    first = lines.readline(1 << 20)
    if not first.strip():
        raise UserError(f"{path}: the file is empty; understood are {FORMATS}")
    return first, chain([first], lines)


def _table(path: Path, lines: Iterator[str]) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Return the header of a CSV and its rows with their line numbers."""
    reader = csv.reader(lines)
    header = [name.strip() for name in next(reader)]

    def rows() -> Iterator[tuple[int, list[str]]]:
        for row in reader:
            if len(row) != len(header):
                if not row:
                    continue
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(row)} columns, but the header has {len(header)}; mend it"
                )
            yield reader.line_num, row

    return header, rows()


def _column(path: Path, header: list[str], name: str) -> int:
    if name not in header:
        raise UserError(f"{path}: the column {name} is missing; the header has {', '.join(header[:6])}")
    return header.index(name)
