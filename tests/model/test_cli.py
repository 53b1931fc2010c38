"""What commands print is the text itself, whatever is in it."""

import pytest
from rich.table import Table

from model.cli import console, errors, progress_bar

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
