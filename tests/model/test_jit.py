"""Compiled code that is kept on disk belongs to one state of the sources."""

from pathlib import Path

import pytest

from consumer import kernel
from model.jit import folder_for


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    for name, text in {"a.py": "PAGE = 8\n", "b.py": "from a import PAGE\n"}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_same_sources_find_what_was_kept(sources: Path) -> None:
    assert folder_for([sources], Path("kept")) == folder_for([sources], Path("kept"))


@pytest.mark.parametrize("change", [{"a.py": "PAGE = 9\n"}, {"c.py": ""}, {"b.py": "from a import PAGE \n"}])
def test_a_change_in_any_file_finds_nothing(sources: Path, change: dict[str, str]) -> None:
    before = folder_for([sources], Path("kept"))
    for name, text in change.items():
        (sources / name).write_text(text)
    assert folder_for([sources], Path("kept")) != before


def test_the_loops_are_kept_there() -> None:
    here = Path(kernel.__file__).parent
    kept = Path(kernel.advance.stats.cache_path).parent  # numba makes a folder for each package in it
    assert kept == folder_for([here.parent / "model", here], kept.parent)
