"""The picture of the concepts is drawn of a model that is trained for it."""

import re
import sys
from xml.etree import ElementTree as ET

from scripts import concepts


def test_the_picture_shows_the_event_that_decides(tmp_path, monkeypatch):
    out = tmp_path / "concepts.svg"
    monkeypatch.setattr(sys, "argv", ["concepts", "--out", str(out)])
    concepts.main()
    drawn = ET.parse(out).getroot()  # noqa: S314 - written a moment ago
    assert drawn.tag.endswith("svg")
    assert len(list(drawn.iter())) > 100
    words = re.findall(r"<!-- (.*?) -->", out.read_text())
    assert words[0].startswith("The topic: EVENTS of many BLOCKS")
    assert {"delete", "error"} <= set(words)  # the events of the block, the failed delete among them
