import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from consumer import metrics
from consumer.metrics import Metrics, MetricsServer, PartitionStatus, Status
from model.errors import UserError

STATUS = Status(
    ready=True,
    counts={"messages": 12, "looks": 11, "windows_scored": 5, "alerts": 2, "dead_letters": 1, "evicted_blocks": 0},
    reloads={"taken": 1},
    threshold=0.25,
    artifacts={"model": "ab" * 32, "strategy": "max", "quantile": "0.95"},
    partitions={
        3: PartitionStatus(7, 1_700_000_000_500, 4, {"tail": 0.5, "body": 1.2}, "body"),
        4: PartitionStatus(0, None, None, {"tail": 0.0, "body": 0.0}, None),
    },
)


@pytest.fixture
def served():
    measured = Metrics()
    server = MetricsServer(measured, "127.0.0.1:0")
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
    assert value("windows_scored_total") == 5
    assert value("reloads_total", outcome="taken") == 1
    assert value("reloads_total", outcome="refused") == 0
    assert value("threshold_nats") == 0.25
    assert value("artifacts_info", model="ab" * 32, strategy="max", quantile="0.95") == 1
    assert value("open_blocks", partition="3") == 7
    assert value("lag_messages", partition="3") == 4
    assert value("watermark_timestamp_seconds", partition="3") == 1_700_000_000.5
    assert value("drift_alarm", partition="3", question="body") == 1
    assert value("drift_alarm", partition="3", question="tail") == 0
    assert value("drift_evidence_ratio", partition="3", question="body") == 1.2
    assert value("commit_seconds_count") == 1
    assert ("log_anomaly_lag_messages", (("partition", "4"),)) not in found, "what is not known is not made up"
    assert all(family.name.startswith("log_anomaly_") and family.documentation for family in families)
    assert {label for family in families for sample in family.samples for label in sample.labels} <= {
        "partition", "question", "outcome", "model", "strategy", "quantile", "le",
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
    assert get(address, "/")[0] == 404


def test_a_port_that_is_taken_is_one_sentence(served):
    _, address = served
    with pytest.raises(UserError, match=r"metrics\.listen: .* name another port") as caught:
        MetricsServer(Metrics(), address)
    assert address in str(caught.value)
