"""Session files: which events each block had, and whether it was healthy. The format is told by the content."""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from math import inf
from pathlib import Path
from sys import intern
from typing import IO

import msgspec

from model import rawlog
from model.errors import UserError
from model.files import FORMATS, check_distinct, opened
from model.lines import LineFormat, LineReader
from model.stamps import EARLY, LATEST, time_of

_JSONL = "session JSONL"
_LABEL_FILES = ("anomaly_label.csv", "labels.csv")
_ANOMALOUS = {"anomaly": True, "fail": True, "1": True, "normal": False, "success": False, "0": False}
_TRACE_COLUMNS = ("BlockId", "Features")
_EVENT_COLUMNS = ("timestamp", "block_id", "event_id")
_CELL_CHARACTERS = 64_000_000  # all events of a session may stand in one; what is longer is taken for an open quote
_FIRST_EVENT = 1_000_000_000_000  # 2001-09-09T01:46:40Z: when the events of files without timestamps begin


@dataclass(frozen=True, slots=True)
class Session:
    """The events of one block, in order.

    Attributes:
        anomalous: None where the file does not say.
        times: of each event, in milliseconds since 1970; None where a line tells none. Empty: the file holds no times.
    """

    block_id: str
    events: tuple[str, ...]
    anomalous: bool | None = None
    times: tuple[int | None, ...] = field(default=(), compare=False)

    @property
    def lived(self) -> tuple[int, int] | None:
        """First and last event time in milliseconds since 1970; None where no event has one."""
        times = [time for time in self.times if time is not None]
        return (min(times), max(times)) if times else None

    def cut(self, idle_timeout: float) -> Iterator["Session"]:
        """Yield the sessions that the stream makes of it, where a block silent for more milliseconds than this is over.

        What has no times stays whole.
        """
        begin, last = 0, None
        for place, time in enumerate(self.times):
            if time is None:
                continue
            if last is not None and time - last > idle_timeout:
                yield replace(self, events=self.events[begin:place], times=self.times[begin:place])
                begin, last = place, None
            last = time if last is None else max(last, time)
        yield replace(self, events=self.events[begin:], times=self.times[begin:])


@dataclass(frozen=True, slots=True)
class Event:
    """One log event; `timestamp` in milliseconds since 1970."""

    timestamp: int
    block_id: str
    event_id: str


@dataclass(frozen=True)
class SessionFile:
    """A file as it was understood.

    Attributes:
        labels: the file beside it that the labels came from, if any.
    """

    path: Path
    format: str
    sessions: list[Session]
    labels: Path | None

    @property
    def span(self) -> tuple[int, int] | None:
        """First and last event time in milliseconds since 1970; None where the file holds no times."""
        lives = [session.lived for session in self.sessions if session.lived]
        return (min(first for first, _ in lives), max(last for _, last in lives)) if lives else None

    def __str__(self) -> str:
        summary = f"{self.path}: {self.format}, {len(self.sessions):,} sessions"
        if self.labels:
            summary += f", labels from {self.labels.name}"
            if unlabelled := sum(session.anomalous is None for session in self.sessions):
                summary += f" (which lacks {unlabelled:,} of the blocks)"
        span = self.span
        if span and 0 < span[1] < EARLY:
            summary += (
                f"; its newest timestamp, {span[1]}, is taken as milliseconds since 1970: write seconds as "
                "milliseconds or as ISO 8601"
            )
        return summary


@dataclass(frozen=True)
class NormalSessions:
    """The sessions of several files that no label calls anomalous.

    Attributes:
        left_out: how many are called so.
        outside: how many others are not as a whole in the time range that was asked for.
        begun: how many begin in it, those that are not as a whole in it included.
        files: describes what was read.
        spans: those of the files within the range; None where one of them holds no times.
        latest: the last event time of all files, in milliseconds since 1970; None where none holds times.
    """

    sessions: list[Session]
    left_out: int
    outside: int
    begun: int
    files: list[str]
    spans: list[tuple[int, int]] | None
    latest: int | None


class _Line(msgspec.Struct, gc=False):
    block_id: str
    events: list[str]
    label: str | None = None


_decode = msgspec.json.Decoder(_Line).decode


def read_sessions(path: Path, lines: LineFormat | None = None) -> SessionFile:
    """Read the sessions of a file, plain or gzip; raw log lines with what a model trained on such knows of them.

    Raises:
        UserError: the file cannot be read or understood; the message names the line.
    """
    kind, sessions = _parse(path, lines)
    return _labelled(path, kind, sessions)


def read_files(paths: Sequence[Path], lines: LineFormat | None = None) -> list[SessionFile]:
    """Read several files, as `read_sessions`.

    Raises:
        UserError: as `read_sessions`; or a file is given twice.
    """
    check_distinct(paths)
    return [read_sessions(path, lines) for path in paths]


def read_normal(
    paths: Sequence[Path],
    lines: LineFormat | None = None,
    *,
    begin: int | None = None,
    end: int | None = None,
    idle_timeout: float = inf,
) -> NormalSessions:
    """Read several files and leave out what a label calls anomalous; sessions without label count as normal.

    Args:
        paths: the files; those with times are one stream, in the order in which they are given.
        lines: as for `read_sessions`.
        begin: take only sessions all of whose events are from this time on, in milliseconds since 1970: half a session
            is not what a healthy one looks like.
        end: and from before this time.
        idle_timeout: a block that was silent for more milliseconds than this begins a new session, as in the stream.

    Raises:
        UserError: as `read_files`; or a range is asked for, and a file holds no times.
    """
    files = read_files(paths, lines)
    spans = []
    latest: int | None = None
    since, until = (0 if begin is None else begin), (LATEST + 1 if end is None else end)
    for file in files:
        span = file.span
        if span is None and (begin is not None or end is not None):
            raise UserError(f"{file.path}: {file.format} without times, so --from and --to cannot choose from it")
        if span:
            latest = max(latest or 0, span[1])
            spans.append((max(span[0], since), min(span[1], until - 1)))
    sessions = [part for session in as_one_stream(files) for part in session.cut(idle_timeout)]
    healthy = [session for session in sessions if not session.anomalous]
    lives = [session.lived for session in healthy]
    kept = [session for session, lived in zip(healthy, lives, strict=True) if lies_within(lived, begin, end)]
    return NormalSessions(
        sessions=kept,
        left_out=len(sessions) - len(healthy),
        outside=len(healthy) - len(kept),
        begun=sum(lies_within((lived[0], lived[0]) if lived else None, begin, end) for lived in lives),
        files=list(map(str, files)),
        spans=spans if len(spans) == len(files) else None,
        latest=latest,
    )


def read_anomalous(paths: Sequence[Path], lines: LineFormat | None = None) -> list[Session]:
    """Read several files and return what labels call anomalous; of a file without any label, all.

    Raises:
        UserError: as `read_files`; or there is no such session.
    """
    files = read_files(paths, lines)
    for file in files:
        if any(session.anomalous is not None for session in file.sessions):
            file.sessions[:] = [session for session in file.sessions if session.anomalous]
    sessions = list(as_one_stream(files))
    if not sessions:
        raise UserError(f"{', '.join(map(str, paths))}: no session is anomalous; check the labels")
    return sessions


def as_one_stream(files: Iterable[SessionFile]) -> Iterator[Session]:
    """Yield the sessions of files, one after the other: of those with times, a block goes on from file to file.

    It is anomalous if one of them says so.
    """
    blocks: dict[str | int, list[Session]] = {}
    for number, session in enumerate(chain.from_iterable(file.sessions for file in files)):
        blocks.setdefault(session.block_id if session.times else number, []).append(session)
    for parts in blocks.values():
        if len(parts) == 1:
            yield parts[0]
            continue
        yield Session(
            parts[0].block_id,
            tuple(chain.from_iterable(part.events for part in parts)),
            any(part.anomalous for part in parts) or parts[0].anomalous,
            tuple(chain.from_iterable(part.times for part in parts)),
        )


def lies_within(lived: tuple[float, float] | None, begin: int | None, end: int | None) -> bool:
    """Say whether a block whose first and last event are of these times is as a whole from `begin` on, before `end`.

    All times are in milliseconds since 1970; without a range every block is, without times none is in a range.
    """
    if begin is None and end is None:
        return True
    return lived is not None and (begin is None or begin <= lived[0]) and (end is None or lived[1] < end)


def read_events(path: Path) -> Iterator[Event]:
    """Yield the events of a file in order, plain or gzip.

    Session files hold no times, so these are made: blocks begin a second apart, a block's events follow each
    other by a second, and all of them are merged in time order.

    Raises:
        UserError: as `read_sessions`.
    """
    with opened(path) as lines:
        first, rest = _begin(path, lines)
        if not first.startswith("{"):
            header, rows = _table(path, rest)
            if not _is_traces(path, header):
                for event in _csv_events(path, header, rows):
                    yield Event(*event)
                return
    yield from _interleaved(_parse(path, None)[1])


def read_templates(path: Path) -> dict[str, str]:
    """Read the text of each event id from a CSV with the columns event_id and template.

    Raises:
        UserError: the file cannot be read or lacks a column.
    """
    with opened(path) as lines:
        header, rows = _table(path, _begin(path, lines)[1])
        event, template = (_column(path, header, name) for name in ("event_id", "template"))
        return {row[event]: row[template] for _, row in rows}


def read_labels(path: Path) -> dict[str, bool]:
    """Read which blocks are anomalous from a CSV with the columns BlockId and Label.

    Raises:
        UserError: the file cannot be read, lacks a column or uses an unknown label.
    """
    with opened(path) as lines:
        header, rows = _table(path, _begin(path, lines)[1])
        block, label = (_column(path, header, name) for name in ("BlockId", "Label"))
        return {row[block]: _anomalous(path, number, row[label]) for number, row in rows}


def _parse(path: Path, lines_format: LineFormat | None) -> tuple[str, list[Session]]:
    """Return what the file is, for people, and the sessions as it tells them."""
    if lines_format is not None and rawlog.is_raw(path, lines_format.rules):
        reader = LineReader(lines_format)
        return rawlog.KIND, _timed(rawlog.read(path, reader.read))
    with opened(path) as lines:
        first, rest = _begin(path, lines)
        if first.startswith("{"):
            return _JSONL, [_session(path, number, line) for number, line in enumerate(rest, 1) if line.strip()]
        header, rows = _table(path, rest)
        if _is_traces(path, header):
            return "Event_traces CSV", list(_traces(path, header, rows))
        return "event CSV", _timed(_csv_events(path, header, rows))


def _timed(events: Iterable[tuple[int | None, str, str]]) -> list[Session]:
    found = rawlog.sessions(events)
    return [Session(block, tuple(map(intern, ids)), times=tuple(times)) for block, (ids, times) in found.items()]


def labels_beside(path: Path) -> Path | None:
    """Return the label file in a file's folder, if there is one."""
    named = (path.with_name(name) for name in _LABEL_FILES)
    return next((beside for beside in named if beside.is_file() and beside != path), None)


def _session(path: Path, number: int, line: str) -> Session:
    try:
        item = _decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not a session ({error}); mend or remove the line") from None
    if not item.block_id or not item.events or not all(item.events):
        raise UserError(
            f"{path}, line {number}: block_id, events or one of the events is empty; mend or remove the line"
        )
    label = None if item.label is None else _anomalous(path, number, item.label)
    return Session(item.block_id, tuple(map(intern, item.events)), label)


def _traces(path: Path, header: list[str], rows: Iterator[tuple[int, list[str]]]) -> Iterator[Session]:
    block, features = header.index("BlockId"), header.index("Features")
    label = header.index("Label") if "Label" in header else None
    for number, row in rows:
        events = tuple(intern(part.strip(" '\"")) for part in row[features].strip(" []").split(","))
        if not row[block] or not all(events):
            raise UserError(f"{path}, line {number}: BlockId or an event of Features is empty; mend or remove the line")
        yield Session(row[block], events, None if label is None else _anomalous(path, number, row[label]))


def _csv_events(path: Path, header: list[str], rows: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, str, str]]:
    """Yield timestamp, block id and event id of each row: tuples, since millions of `Event` take twice as long."""
    when, block, event = (header.index(name) for name in _EVENT_COLUMNS)
    text, time = None, 0
    for number, row in rows:
        if row[when] != text:  # neighbouring lines mostly share their second
            text, time = row[when], _milliseconds(path, number, row[when])
        if not row[block] or not row[event]:
            raise UserError(f"{path}, line {number}: block_id or event_id is empty; mend or remove the line")
        yield time, row[block], intern(row[event])


def _interleaved(sessions: list[Session]) -> Iterator[Event]:
    """Let each session begin a second after the one before it and speak once a second."""
    speaking: list[int] = []  # places of the sessions that have begun and are not over
    for second in range(max(start + len(session.events) for start, session in enumerate(sessions))):
        if second < len(sessions):
            speaking.append(second)
        for start in speaking:
            session = sessions[start]
            yield Event(_FIRST_EVENT + 1000 * second, session.block_id, session.events[second - start])
        speaking = [start for start in speaking if second + 1 - start < len(sessions[start].events)]


def _milliseconds(path: Path, number: int, text: str) -> int:
    time = time_of(text)
    if time is None:
        raise UserError(
            f"{path}, line {number}: {text[:40]!r} is no timestamp between the years 1970 and 9999; "
            "write ISO 8601 or milliseconds since 1970"
        )
    return time


def _labelled(path: Path, kind: str, sessions: list[Session]) -> SessionFile:
    """Take missing labels from a label file beside the sessions, if there is one that knows these blocks."""
    if kind == _JSONL or any(session.anomalous is not None for session in sessions):
        return SessionFile(path, kind, sessions, None)
    beside = labels_beside(path)
    if beside is None:
        return SessionFile(path, kind, sessions, None)
    labels = read_labels(beside)
    known = Counter(session.block_id in labels for session in sessions)
    if not known[True]:
        raise UserError(f"{beside}: labels none of the {len(sessions):,} blocks of {path.name}; move it away "
                        "or give the right one")  # fmt: skip
    labelled = [replace(item, anomalous=labels.get(item.block_id)) for item in sessions]
    return SessionFile(path, kind, labelled, beside)


def _anomalous(path: Path, number: int, label: str) -> bool:
    try:
        return _ANOMALOUS[label.strip().lower()]
    except KeyError:
        raise UserError(
            f"{path}, line {number}: unknown label {label[:40]!r}; write Normal or Anomaly (or Success or Fail)"
        ) from None


def _begin(path: Path, lines: IO[str]) -> tuple[str, Iterator[str]]:
    """Return the first line that is not blank and an iterator over all lines."""
    seen = []
    for line in lines:
        seen.append(line)
        if line.strip():
            return line.lstrip(), chain(seen, lines)
    raise UserError(f"{path}: the file is empty; understood are {FORMATS}")


def _table(path: Path, lines: Iterator[str]) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Return the header of a CSV and its rows with their line numbers; no row at all is an error, too."""
    rows = _rows(path, lines)
    return [name.strip() for name in next(rows)[1]], rows


def _rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(_CELL_CHARACTERS)
    reader = csv.reader(lines, skipinitialspace=True, strict=True)  # strict: an open quote is told at the file's end
    width = count = last = 0
    try:
        for row in reader:
            last = reader.line_num
            if not row:
                continue
            width = width or len(row)
            if len(row) != width:
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(row)} columns, but the header has {width}; mend the line"
                )
            yield reader.line_num, row
            count += 1
    except csv.Error as error:
        raise UserError(f"{path}, line {last + 1}: not CSV ({error}); is a quote left open?") from None
    if count < 2:
        raise UserError(f"{path}: holds a header and nothing else; give a file with rows")


def _is_traces(path: Path, header: list[str]) -> bool:
    """Tell Event_traces.csv from an event CSV, and both from anything else."""
    for columns in (_TRACE_COLUMNS, _EVENT_COLUMNS):
        if set(columns) & set(header):
            for name in columns:
                _column(path, header, name)
            return columns == _TRACE_COLUMNS
    raise UserError(f"{path}: unknown format (begins with {','.join(header)[:60]!r}); understood are {FORMATS}")


def _column(path: Path, header: list[str], name: str) -> int:
    if name not in header:
        raise UserError(f"{path}: the column {name} is missing; the header has {', '.join(header[:6])}")
    return header.index(name)
