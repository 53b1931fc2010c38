"""Opens the files that people give, plain or gzip, and asks whether what they want can be written, before the work."""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader, TextIOWrapper
from os.path import realpath
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, cast

from model.errors import UserError

FORMATS = (
    'session JSONL ({"block_id": …, "events": […]} a line), '
    "event CSV (columns timestamp, block_id, event_id), "
    "Loghub's Event_traces.csv (columns BlockId, Features), raw log lines for a model trained on such"
)
"""What can be read, for people."""


@contextmanager
def opened(path: Path, errors: str = "strict") -> Iterator[IO[str]]:
    """Open a text file, unpacked if it is gzip, and turn every way in which reading fails into a sentence.

    `errors` says what is done about bytes that are not UTF-8, as for `open`.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.peek(2)[:2] == b"\x1f\x8b"
            binary = cast("BufferedReader", gzip.GzipFile(fileobj=raw) if packed else raw)
            yield TextIOWrapper(binary, encoding="utf-8-sig", errors=errors, newline="")
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise UserError(f"{path}: the gzip file is damaged or cut short; fetch it again") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; understood are {FORMATS}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check its name") from None


def check_distinct(paths: Iterable[Path]) -> None:
    """Make sure that no file is given twice: its blocks would count twice, or go on where they began.

    Raises:
        UserError: one is.
    """
    seen: set[str] = set()
    for path in paths:
        place = realpath(path)
        if place in seen:
            raise UserError(f"{path}: the same file is given twice; name it once")
        seen.add(place)


def check_place(option: str, path: Path) -> None:
    """Make sure that a file can be put where an option says, and that its folder is there; an older file stays.

    Raises:
        UserError: it cannot.
    """
    try:
        is_folder = not path.name or path.is_dir()
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror}); name another file") from None
    if is_folder:
        raise UserError(f"{option} {path}: is a folder; name a file")
    check_folder(option, path.parent)


def check_folder(option: str, path: Path | None) -> None:
    """Make sure that the folder that an option names is there and that files can be written into it.

    Raises:
        UserError: they cannot.
    """
    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written to ({error.strerror}); name another folder") from None
