"""Where long commands write: whether that can be done is asked before the work begins."""

import json
from pathlib import Path
from typing import Any

from model.errors import UserError


def check_file(option: str, path: Path | None) -> None:
    """Make sure that the file that an option names can be written; what is in it stays.

    Raises:
        UserError: it cannot.
    """
    if path is None:
        return
    try:
        is_new = not path.exists()
        path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror}); name another file") from None


def write_json(path: Path | None, result: Any) -> None:
    """Write a result to the file that --json names, if it does.

    Raises:
        UserError: it can no longer be written.
    """
    if path is None:
        return
    try:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path}: cannot write the results ({error.strerror})") from None
