"""The sessions that a command measures with: files that hold too few of them are told before the work begins."""

from collections.abc import Sequence
from pathlib import Path

from model.errors import UserError
from model.lines import LineFormat
from model.sessions import Session, read_normal


def read_healthy(
    option: str, paths: Sequence[Path], lines: LineFormat | None = None, *, least: int = 1
) -> list[Session]:
    """Return the sessions of the files of an option that no label calls anomalous.

    Raises:
        UserError: as `read_normal`; or they are fewer than `least`.
    """
    sessions = read_normal(paths, lines).sessions
    if len(sessions) < least:
        raise UserError(
            f"{option}: {len(sessions):,} normal sessions are too few, it takes at least {least:,}; give more files or "
            "check their labels"
        )
    return sessions
