"""What commands have in common: text is printed as it is, times are read as in files."""

import pytest
from rich.table import Table

from model.cli import console, errors, milliseconds_of, progress_bar
from model.errors import UserError

HOSTILE = "/[prod]/x[/]:smile:{y}.log"


@pytest.mark.parametrize("where", [console, errors])
def test_text_is_printed_as_it_is(where, capsys):
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    where.print(HOSTILE)
    where.print(table)
    said = capsys.readouterr()
    assert (said.out + said.err).count(HOSTILE) == 4


def test_a_bar_says_what_it_is_of(capsys):
    with progress_bar(HOSTILE, 2) as advance:
        advance(2)
    assert HOSTILE in "".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("text", ["2008-11-09T20:35:30.0009", "2008-11-09 21:35:30+01:00", "1226262930000"])
def test_a_time_is_read_as_in_files(text):
    assert milliseconds_of("--from", text) == 1226262930000


@pytest.mark.parametrize(
    "text", ["20081110", "1226262930", "soon", "-1", "1960-01-01", "9" * 16, "9" * 5000, "9999-12-31T23:59:59-01:00"]
)
def test_what_is_no_time_is_one_sentence(text):
    with pytest.raises(UserError, match=r"^--from .*: write a time like"):
        milliseconds_of("--from", text)
