"""How an alert reads on a terminal."""

import msgspec
import pytest
from rich.text import Text

from consumer.alerts import Alert
from scripts.alerts import one_line

ALERT = msgspec.convert(
    {
        "schema_version": 2, "alert_id": "0" * 32, "revision": 1, "block_id": "blk_[red]1", "reason": "event",
        "severity": "minor", "drift": None, "score": 5.25, "threshold": 1.5, "strategy": "max", "p_value": 0.01,
        "offender": {
            "position": 2, "event_id": "E7", "template": "disk [bold]full", "surprisal": 5.25,
            "expected": [{"event_id": "E9", "template": None, "probability": 0.9}],
            "offset": 7, "timestamp": "2008-11-09T20:35:30.000Z",
        },
        "window": [{"event_id": "E5", "surprisal": 0.1}, {"event_id": "E7", "surprisal": 5.25}], "events_seen": 2,
        "first_event_time": "2008-11-09T20:35:30.000Z", "last_event_time": "2008-11-09T20:35:30.000Z",
        "source": {"topic": "t", "partition": 0, "first_offset": 1, "last_offset": 7}, "model": "0" * 64,
    },
    Alert,
)  # fmt: skip


def test_a_line_says_everything_and_no_name_is_taken_for_markup():
    text = Text.from_markup(one_line(ALERT)).plain
    assert "2008-11-09 20:35:30  minor  blk_[red]1  5.25 > 1.50" in text
    assert "event 2 is E7: disk [bold]full  expected E9 90%" in text


@pytest.mark.parametrize(
    ("severity", "style"), [("minor", "yellow"), ("critical", "bold red"), ("own-name", "magenta")]
)
def test_severity_has_its_colour(severity, style):
    line = Text.from_markup(one_line(msgspec.structs.replace(ALERT, severity=severity)))
    styles = {line.plain[span.start : span.end]: str(span.style) for span in line.spans}
    assert styles[severity] == style
