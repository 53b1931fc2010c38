"""What every command shares: the --config option, plain error messages, one console."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from model.errors import UserError
from model.stamps import EARLY, time_of

console = Console(highlight=False, markup=False, emoji=False)
"""Standard output for people: tables, progress bars, results. Text is printed as it is: paths may hold [brackets]."""

errors = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
"""Standard error: what went wrong."""


def argument_parser(command: str, description: str) -> argparse.ArgumentParser:
    """Return a parser for `python -m <command>` that already knows --config."""
    parser = argparse.ArgumentParser(prog=f"python -m {command}", description=description)
    parser.add_argument("--config", type=Path, default=Path("config.yaml"), help="settings file (default: config.yaml)")
    return parser


def run(main: Callable[[], int | None]) -> None:
    """Run a command and end the process with its exit status.

    A `UserError` becomes one sentence on standard error and status 2; Ctrl-C becomes status 130.
    """
    try:
        status = main() or 0
    except UserError as error:
        errors.print(f"error: {error}")
        status = 2
    except KeyboardInterrupt:
        errors.print("interrupted")
        status = 130
    sys.exit(status)


@contextmanager
def progress_bar(what: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Show a bar while the block runs; call what it gives with the number of further things done."""
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        task = progress.add_task(what, total=total)
        yield lambda steps: progress.advance(task, steps)


def milliseconds_of(option: str, text: str | None) -> int | None:
    """Return the time that an option names in milliseconds since 1970, None if it was not given.

    Raises:
        UserError: the text is no time, or a date or seconds taken for milliseconds.
    """
    if text is None:
        return None
    time = time_of(text)
    if time is None or (text.isdecimal() and time < EARLY):
        raise UserError(f"{option} {text}: write a time like 2008-11-10T06:00 (UTC) or milliseconds since 1970")
    return time
