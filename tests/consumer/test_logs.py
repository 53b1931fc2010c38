"""What the consumer says while it runs."""

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

from consumer.logs import changed, minute
from consumer.metrics import PartitionStatus, Status
from consumer.settings import KafkaSettings, ScoringSettings, Settings, WindowSettings

ROOT = Path(__file__).parents[2]


def status(messages, lag, **changes):
    partitions = {number: PartitionStatus(5, None, lag, 0, {}, None) for number in (0, 1)}
    return Status(counts={"messages": messages}, partitions=partitions, **changes)


def test_a_minute_is_one_line_of_what_happened_in_it():
    before = status(1000, 0, alerts={"minor": 2, "major": 1}, dead_letters={"bad_id": 4, "other": 0})
    now = status(13_000, 3, alerts={"minor": 2, "major": 3}, dead_letters={"bad_id": 4, "other": 5})
    line, numbers = minute(before, now, 60.0)
    assert line == (
        "12,000 messages (200/s), 2 alerts (2 major), 5 dead letters (5 other), lag 6, 10 open blocks in 2 partitions"
    )
    assert numbers["messages"] == 12_000
    assert numbers["lag"] == 6
    assert minute(now, now, 60.0)[0] == "0 messages (0/s), 0 alerts, lag 6, 10 open blocks in 2 partitions"


def test_settings_are_named_where_they_are_not_the_defaults_and_secrets_never():
    settings = Settings(
        kafka=KafkaSettings.model_validate({"sasl.password": "s3cret"}),
        windows=WindowSettings(idle_timeout=timedelta(hours=1)),
        scoring=ScoringSettings(every=2),
    )
    assert changed(settings) == "scoring.every 2, windows.idle_timeout 1:00:00"
    assert changed(Settings()) == "none"


def test_with_json_a_mistake_is_one_object_too(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "consumer", "--config", tmp_path / "none.yaml", "--log-format", "json"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert json.loads(line)["level"] == "CRITICAL"
    assert "none.yaml" in json.loads(line)["message"]
