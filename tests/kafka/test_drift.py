"""Drift on a real Kafka: said once, carried by the alerts, measured, and the same after a kill -9."""

import json
import re
import signal
import urllib.error
import urllib.request

from scripts.verify import verify


def failing(first, count):
    """Blocks of which each begins with something new and is over."""
    for number in range(first, first + count):
        block = f"b{number}"
        yield block, json.dumps({"block_id": block, "event_id": "never seen", "timestamp": number}), 0
        yield block, None, 0


def test_drift_is_said_carried_measured_and_survives_a_kill(line):
    made = line(drift={"batch": 5, "false_alarm_every": 10_000}, metrics={"listen": "127.0.0.1:0"})
    process = made.start_consumer()
    made.wait_for(lambda: "assigned" in process.log.read_text(), what="joining")
    address = re.search(r"metrics are at http://(\S+)/metrics", process.log.read_text())[1]

    def get(path):
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
            return answer.read().decode()

    def is_ready():
        try:
            return get("/readyz") == "OK\n"
        except urllib.error.HTTPError:
            return False

    def scraped(sample):
        found = re.search(rf"^log_anomaly_{re.escape(sample)} (\S+)$", get("/metrics"), re.MULTILINE)
        return found and float(found[1])  # a partition shows with the first status after it was assigned

    made.produce(failing(0, 12))
    made.wait_for(lambda: made.lag() == 0, what="committing the first blocks")
    made.wait_for(is_ready, what="being ready")
    assert get("/healthz") == "OK\n"
    made.wait_for(lambda: scraped("messages_total") == 24, what="counting")
    severities = re.findall(r"^log_anomaly_alerts_total{severity=.*} (.+)$", get("/metrics"), re.MULTILINE)
    assert sum(map(float, severities)) >= 12
    assert scraped("batch_messages_sum") == 24
    assert scraped("scoring_seconds_count") >= 1
    assert "<title>" in get("/")
    board = json.loads(get("/status.json"))
    assert {shown["alert"]["block_id"] for shown in board["alerts"]} == {f"b{number}" for number in range(12)}
    assert sum(board["status"]["scores"]) == board["status"]["counts"]["looks"] == 24
    assert scraped('drift_alarm{partition="0",question="tail"}') == 0
    assert 0 < scraped('drift_evidence_ratio{partition="0",question="tail"}') < 1
    assert scraped('lag_messages{partition="0"}') == 0
    assert scraped("commit_seconds_count") >= 1
    assert scraped("restore_seconds_count") == 3
    assert scraped('catch_up_messages{partition="0"}') == 0
    made.stop(process, signal.SIGKILL)

    process = made.start_consumer()
    made.produce(failing(12, 60))
    made.wait_for(lambda: made.lag() == 0, what="committing all blocks")
    address = re.search(r"metrics are at http://(\S+)/metrics", process.log.read_text())[1]
    made.wait_for(lambda: scraped('drift_alarm{partition="0",question="tail"}') == 1, what="the alarm")
    assert scraped("restored_records_total") >= 1
    assert made.stop(process)[0] == 0
    said = process.log.read_text()
    (blocks,) = re.findall(rf"{made.settings.topics.events}/0: drift \(tail\) after (\d+) blocks", said)
    assert "calibrate again on recent traffic" in said
    assert int(blocks) > 12, "those before the kill count, once"
    alerts = [json.loads(message.value()) for message in made.read(made.settings.topics.alerts)]
    alerts.sort(key=lambda alert: alert["source"]["first_offset"])
    drift = [alert["drift"] for alert in alerts if alert["revision"] == 1]
    assert drift == [None] * int(blocks) + ["tail"] * (72 - int(blocks))
    assert verify(made.settings).is_exact


def test_a_port_for_metrics_that_is_taken_is_one_sentence(line):
    listen = line().bootstrap  # where the broker listens
    done = line(metrics={"listen": listen}).run("consumer", check=False)
    assert done.returncode == 2
    assert f"metrics.listen: {listen} cannot be had" in done.stderr
    assert "Traceback" not in done.stderr
