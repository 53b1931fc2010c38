"""What `python -m scripts.lines` says about a raw log of known templates."""

import csv
import json
import sys

import pytest

from model.errors import UserError
from scripts import lines

TEMPLATES = ("Receiving block {} src: /10.0.0.{}:50010", "Served block {} to /10.0.0.{}", "Deleting block {} number {}")
BLOCKS = 12


@pytest.fixture
def log(tmp_path):
    """Each block is received, served and deleted; the same as events by id, where serving has one of two ids."""
    raw, events = tmp_path / "raw.log", tmp_path / "events.csv"
    with events.open("w", newline="") as out:
        written = csv.writer(out)
        written.writerow(["timestamp", "block_id", "event_id"])
        text = []
        for number in range(BLOCKS):
            for kind, template in enumerate(TEMPLATES):
                second = 3 * number + kind
                text.append(f"081109 2035{second:02} 7 INFO dfs.Node: {template.format(f'blk_{number}', number)}")
                event = f"E{kind}" + ("b" if kind == 1 and number % 2 else "")
                written.writerow([f"2008-11-09T20:35:{second:02}Z", f"blk_{number}", event])
    raw.write_text("\n".join(text) + "\n")
    return raw, events


def said(monkeypatch, tmp_path, *arguments):
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["lines", *map(str, arguments), "--json", str(out)])
    lines.main()
    return json.loads(out.read_text())


def test_templates_are_counted_and_held_against_given_ids(log, tmp_path, monkeypatch):
    raw, events = log
    found = said(monkeypatch, tmp_path, raw, "--events", events, "--benchmark")
    assert found["survey"]["lines"] == BLOCKS * len(TEMPLATES)
    correspondence = found["correspondence"]
    assert correspondence["blocks"] == BLOCKS
    assert correspondence["different_length"] == 0
    assert not correspondence["split"]
    assert [sorted(ids) for ids in correspondence["merged"].values()] == [["E1", "E1b"]]
    assert found["benchmark"]


def test_a_file_without_blocks_is_refused(tmp_path, monkeypatch):
    (tmp_path / "raw.log").write_text("nothing of ours\n")
    with pytest.raises(UserError, match="block_pattern"):
        said(monkeypatch, tmp_path, tmp_path / "raw.log")
