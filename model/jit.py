"""numba's `njit`, whose code is kept on disk for the next process, apart for each state of the sources.

numba keeps a compiled function for as long as the file that it stands in is the same. But the function holds what it
calls, and the constants that it names, from other files too: after an upgrade of one of those, code kept would go on
with yesterday's sizes and write out of bounds.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from numba import config, njit

__all__ = ["folder_for", "njit"]

_HERE = Path(__file__).parent
_SOURCES = (_HERE, _HERE.parent / "consumer")


def folder_for(sources: Iterable[Path], kept: Path) -> Path:
    """Return where under `kept` code compiled from the Python files in the folders `sources` belongs."""
    state = hashlib.sha256()
    for path in sorted(path for folder in sources for path in folder.glob("*.py")):
        state.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return kept / f"compiled-{state.hexdigest()[:16]}"


def _kept() -> Path:
    """Return the folder that the environment names, else one beside the sources, else the user's own."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    if given:
        return Path(given)
    beside = _HERE / "__pycache__"
    return beside if os.access(beside if beside.exists() else _HERE, os.W_OK) else Path.home() / ".cache" / "numba"


# Read where a function is declared, so before any is.
config.CACHE_DIR = str(folder_for(_SOURCES, _kept()))  # type: ignore[attr-defined]
