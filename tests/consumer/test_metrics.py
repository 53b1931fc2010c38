"""What the consumer serves: the numbers, read by Prometheus itself where it can be had, and the probes."""

import json
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from consumer import metrics
from consumer.board import Board
from consumer.events import Decoder, Messages
from consumer.letters import KINDS, kind
from consumer.metrics import Metrics, PartitionStatus, Status
from consumer.settings import EventSettings, Settings
from consumer.web import WebServer
from model.errors import UserError
from scripts.local_kafka import free_port

STATUS = Status(
    ready=True,
    counts={"messages": 12, "events": 11, "looks": 11, "cache_hits": 6, "windows_scored": 5, "evicted_blocks": 0},
    alerts={"minor": 2, "major": 0},
    dead_letters={"not_an_event": 1, "other": 0},
    reloads={"taken": 1},
    levels={"minor": 0.25, "major": 1.5},
    artifacts={"model": "ab" * 32, "strategy": "max", "calibration_quantile": "0.95"},
    partitions={
        3: PartitionStatus(7, 1_700_000_000_500, 4, 9, {"tail": 0.5, "body": 1.2}, "body"),
        4: PartitionStatus(0, None, None, 0, {"tail": 0.0, "body": 0.0}, None),
    },
)


@pytest.fixture
def served():
    measured = Metrics()
    server = WebServer(measured, Board(Settings()), "127.0.0.1:0")
    yield measured, server.address
    server.close()


def get(address, path):
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_what_is_scraped_is_the_last_status(served):
    measured, address = served
    measured.status = STATUS
    measured.commit_seconds.observe(0.02)
    code, text = get(address, "/metrics")
    assert code == 200
    families = list(text_string_to_metric_families(text))
    found = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value
             for family in families for sample in family.samples}  # fmt: skip

    def value(name, **labels):
        return found[f"log_anomaly_{name}", tuple(sorted(labels.items()))]

    assert value("messages_total") == 12
    assert value("events_total") == 11
    assert value("cache_hits_total") == 6
    assert value("windows_scored_total") == 5
    assert value("alerts_total", severity="minor") == 2
    assert value("dead_letters_total", reason="not_an_event") == 1
    assert value("ready") == 1
    assert value("reloads_total", outcome="taken") == 1
    assert value("reloads_total", outcome="refused") == 0
    assert value("threshold_nats", severity="minor") == 0.25
    assert value("artifacts_info", model="ab" * 32, strategy="max", calibration_quantile="0.95") == 1
    assert value("open_blocks", partition="3") == 7
    assert value("lag_messages", partition="3") == 4
    assert value("watermark_timestamp_seconds", partition="3") == 1_700_000_000.5
    assert value("watermark_delay_seconds", partition="3") == pytest.approx(time.time() - 1_700_000_000.5, abs=60)
    assert value("catch_up_messages", partition="3") == 9
    assert value("drift_alarm", partition="3", question="body") == 1
    assert value("drift_alarm", partition="3", question="tail") == 0
    assert value("drift_evidence_ratio", partition="3", question="body") == 1.2
    assert value("commit_seconds_count") == 1
    assert ("log_anomaly_lag_messages", (("partition", "4"),)) not in found, "what is not known is not made up"
    assert all(family.name.startswith("log_anomaly_") and family.documentation for family in families)
    assert {label for family in families for sample in family.samples for label in sample.labels} <= {
        "partition", "question", "outcome", "severity", "reason", "model", "strategy", "calibration_quantile", "le",
    }, "labels of a bounded number of values: no block ids"  # fmt: skip


def test_a_partition_that_is_given_back_is_gone(served):
    measured, address = served
    measured.status = STATUS
    assert 'log_anomaly_open_blocks{partition="3"}' in get(address, "/metrics")[1]
    measured.status = Status()
    assert "log_anomaly_open_blocks{" not in get(address, "/metrics")[1]


def test_health_is_the_loop_and_readiness_is_the_partitions(served, monkeypatch):
    measured, address = served
    assert get(address, "/healthz") == (200, "OK\n")
    assert get(address, "/readyz") == (503, "Service Unavailable\n")
    measured.status = STATUS
    assert get(address, "/readyz") == (200, "OK\n")
    monkeypatch.setattr(metrics, "HANGS_AFTER_SECONDS", -1.0)
    assert get(address, "/healthz") == get(address, "/readyz") == (503, "Service Unavailable\n")
    assert get(address, "/nothing")[0] == 404


def test_a_port_that_is_taken_is_one_sentence(served):
    _, address = served
    with pytest.raises(UserError, match=r"metrics\.listen: .* name another port") as caught:
        WebServer(Metrics(), Board(Settings()), address)
    assert address in str(caught.value)


def test_prometheus_scrapes_them_and_its_linter_finds_no_fault(served, prometheus, tmp_path):
    measured, address = served
    measured.status = STATUS
    measured.batch_messages.observe(12)
    lint = subprocess.run(
        [prometheus / "promtool", "check", "metrics"], input=get(address, "/metrics")[1],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")

    config = tmp_path / "prometheus.yml"
    target = {"job_name": "consumer", "scrape_interval": "200ms", "static_configs": [{"targets": [address]}]}
    config.write_text(json.dumps({"scrape_configs": [target | {"scrape_timeout": "200ms"}]}))
    own = f"127.0.0.1:{free_port()}"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                prometheus / "prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address={own}",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        found = {}
        deadline = time.monotonic() + 60
        while not found:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
            try:
                found = series(own, '{__name__=~"log_anomaly_.*"}')
            except (urllib.error.URLError, ConnectionError):
                continue  # not up yet
        assert found["log_anomaly_messages_total"] == 12
        assert found['log_anomaly_alerts_total severity="minor"'] == 2
        assert found['log_anomaly_lag_messages partition="3"'] == 4
        assert found['log_anomaly_batch_messages_bucket le="100.0"'] == 1
        assert series(own, "up")["up"] == 1
    finally:
        process.terminate()
        process.wait(timeout=20)


def series(address, query):
    """Ask Prometheus; return values by name and by those labels that are not about the target."""
    code, text = get(address, f"/api/v1/query?query={urllib.parse.quote(query)}")
    if code != 200:
        return {}
    values = {}
    for one in json.loads(text)["data"]["result"]:
        labels = {name: label for name, label in one["metric"].items() if name not in ("__name__", "instance", "job")}
        name = " ".join([one["metric"]["__name__"], *(f'{name}="{label}"' for name, label in sorted(labels.items()))])
        values[name] = float(one["value"][1])
    return values


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (None, b"\xff", "not_an_event"),
        (None, b"[1]", "not_an_event"),
        (b"other", b'{"block_id": "b", "event_id": "a", "timestamp": 1}', "foreign_key"),
        (None, b'{"block_id": "", "event_id": "a", "timestamp": 1}', "bad_id"),
        (None, b'{"block_id": "b", "event_id": "", "timestamp": 1}', "bad_id"),
        (None, b'{"block_id": "b", "event_id": "a", "timestamp": 2e9}', "far_future"),
        (None, b'{"block_id": "b", "event_id": "a", "timestamp": -1}', "bad_timestamp"),
        (None, b'{"block_id": "b", "event_id": "a", "timestamp": "0001-01-01T00:00:00+01:00"}', "bad_timestamp"),
        (None, b'{"block_id": "b", "event_id": "a", "timestamp": "9999-12-31T23:59:59-01:00"}', "bad_timestamp"),
        (None, None, "bad_tombstone"),
        (b"\xff", None, "bad_tombstone"),
    ],
)
def test_reasons_of_dead_letters_are_counted_by_one_of_a_few_kinds(key, value, expected):
    messages = Messages([key], [value], np.zeros(1, np.int64), np.ones(1, np.int64))
    _, (refused,) = Decoder(EventSettings(), {"a": 5}, max_ahead=1000).decode(messages)
    assert kind(refused.reason) == expected
    assert expected in KINDS


def test_a_reason_of_no_known_kind_still_counts():
    assert kind("<script>") == "other" == KINDS[-1]
