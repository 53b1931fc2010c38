"""How an alert reads on a terminal, and what is said while no broker is there to read from."""

import io
import re
import time
import weakref
from contextlib import closing

import msgspec
import pytest
from confluent_kafka.admin import AdminClient
from rich.console import Console

from consumer.alerts import Alert, Counted
from consumer.settings import Settings, load_settings
from scripts import alerts
from scripts.alerts import TopicReader, columns, found, one_line
from scripts.live import LiveAlerts

ALERT = msgspec.convert(
    {
        "schema_version": 3, "alert_id": "0" * 32, "revision": 1, "block_id": "blk_[red]1", "reason": "event",
        "severity": "minor", "drift": None, "score": 5.25, "threshold": 1.5, "strategy": "max", "p_value": 0.01,
        "offender": {
            "position": 2, "event_id": "E7", "template": "disk [bold]full", "surprisal": 5.25,
            "expected": [{"event_id": "E9", "template": None, "probability": 0.9}],
            "counts": [], "offset": 7, "timestamp": "2008-11-09T20:35:30.000Z",
        },
        "window": [{"event_id": "E5", "surprisal": 0.1}, {"event_id": "E7", "surprisal": 5.25}], "events_seen": 2,
        "first_event_time": "2008-11-09T20:35:30.000Z", "last_event_time": "2008-11-09T20:35:30.000Z",
        "source": {"topic": "t", "partition": 0, "first_offset": 1, "last_offset": 7}, "model": "0" * 64,
    },
    Alert,
)  # fmt: skip


def test_a_line_says_everything_and_no_name_is_taken_for_markup():
    text = one_line(ALERT).plain
    assert "2008-11-09 20:35:30  minor  blk_[red]1  5.25 > 1.50" in text
    assert "event 2 is E7: disk [bold]full  expected E9 90%" in text
    hostile = one_line(msgspec.structs.replace(ALERT, block_id="a\x1b[2J\nb\u202e")).plain
    assert "  a\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}  " in hostile


def test_a_line_says_which_counts_are_unusual():
    counts = (Counted("E20", "deletion failed", 1, 0, 8.9), Counted("<OTHER>", None, 2, 0, 4.5))
    offender = msgspec.structs.replace(ALERT.offender, event_id="<END>", counts=counts)
    text = one_line(msgspec.structs.replace(ALERT, reason="counts", offender=offender)).plain
    assert "ended with 1 E20, 2 <OTHER>  expected 0 E20, 0 <OTHER>" in text


@pytest.mark.parametrize(
    ("severity", "style"), [("minor", "yellow"), ("critical", "bold red"), ("own-name", "magenta")]
)
def test_severity_has_its_colour(severity, style):
    line = one_line(msgspec.structs.replace(ALERT, severity=severity))
    styles = {line.plain[span.start : span.end]: str(span.style) for span in line.spans}
    assert styles[severity] == style


def drawn(view, width=140, height=20):
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    with console.capture() as picture:
        console.print(view)
    return picture.get()


def test_the_live_view_shows_the_newest_first_and_fits_the_terminal():
    now = 1000.0
    view = LiveAlerts("alerts", columns, clock=lambda: now)
    for number in range(300):
        block = "[red]\x1b[31m" if number == 299 else f"blk_{number}"
        severity = "critical" if number % 3 == 0 else "minor"
        changes = {"alert_id": f"{number:032x}", "block_id": block, "severity": severity}
        view.take(msgspec.structs.replace(ALERT, **changes), now - 300 + number)
    picture = drawn(view)
    title, *lines = picture.splitlines()
    assert title.startswith("alerts  300 alerts, 60 in the last minute  200 minor  100 critical")
    assert len(lines) < 20
    assert "[red]" in lines[3]
    assert "\x1b[31m" not in picture
    assert "blk_298" in lines[4]
    assert "blk_0 " not in picture
    now = 1040.0
    assert ", 20 in the last minute" in drawn(view)
    assert len(drawn(view, height=3).splitlines()) < 8, "a terminal that small still shows the newest"


def test_a_revision_takes_the_place_of_what_it_revises():
    view = LiveAlerts("alerts", columns)
    for alert_id, block, revision in (("a", "first", 1), ("b", "second", 1), ("a", "first", 2)):
        view.take(msgspec.structs.replace(ALERT, alert_id=alert_id, block_id=block, revision=revision), 0.0)
    rows = [line for line in drawn(view).splitlines() if "minor" in line and "│" in line]
    assert len(rows) == 2
    assert "first (revision 2)" in rows[0]
    assert "second" in rows[1]


@pytest.mark.parametrize("most", [0, 2, 3, 99])
def test_the_table_shows_what_was_published_last_and_holds_no_more(monkeypatch, capsys, most):
    class Message:
        def __init__(self, number, published):
            self.number, self.published = number, published
            held.add(self)

        def timestamp(self):
            return 1, self.published

        def value(self):
            return msgspec.json.encode(msgspec.structs.replace(ALERT, block_id=f"blk_{self.number}"))

    def read_messages(_):
        for number, published in enumerate((5, 9, 7, 7, 8, 7)):
            yield Message(number, published)
            assert len(held) <= most + 1

    held = weakref.WeakSet()
    monkeypatch.setattr(alerts, "read_messages", read_messages)
    alerts._print_newest(Settings(), most)
    said = capsys.readouterr()
    assert "6 alerts in log-anomaly-alerts" in said.out
    shown = [int(number) for number in re.findall(r"blk_(\d)", said.out)]
    assert shown == [0, 2, 3, 5, 4, 1][max(0, 6 - most) :]
    assert said.err == (
        "" if most > 6 else f"the last {most} to be published are shown; --last N shows more, --json all\n"
    )


def test_labelled_blocks_are_counted_once_by_their_gravest_alert():
    said = [
        ("a", "minor", 2.0),
        ("a", "critical", 9.0),
        ("b", "minor", 3.0),
        ("c", "minor", 2.5),
        ("unlabelled", "minor", 9.9),
    ]
    alerts = [msgspec.structs.replace(ALERT, block_id=block, severity=name, score=score) for block, name, score in said]
    table = found({"a": True, "b": False, "c": True, "d": True, "e": False}, alerts)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [("critical", "1", "0"), ("minor", "1", "1"), ("any alert", "2 of 3", "1 of 2")]


def test_a_reader_whose_broker_went_away_says_so_once_and_waits(tmp_path, caplog, capfd):
    brokers = AdminClient({"bootstrap.servers": "mock", "test.mock.num.brokers": 1, "log_level": 0})
    (broker,) = brokers.list_topics("log-anomaly-alerts", timeout=10).brokers.values()
    config = tmp_path / "config.yaml"
    config.write_text(f"kafka: {{bootstrap.servers: '{broker.host}:{broker.port}'}}\n")
    with closing(TopicReader(load_settings(config), "log-anomaly-alerts")) as reader:
        while not reader.at_end:
            reader.poll(0.1)
        del brokers
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            assert reader.poll(0.1) is None
    (said,) = caplog.messages
    assert "Connect to" in said
    assert capfd.readouterr().err == ""
