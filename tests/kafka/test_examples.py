"""The examples that read alerts, on a real Kafka: what was taken back is not seen, what was seen is not lost."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from scripts.local_kafka import free_port

ROOT = Path(__file__).parents[2]


def alert(number, revision=1, severity="major"):
    return {
        "alert_id": f"{number:032x}",
        "revision": revision,
        "block_id": f"block-{number}",
        "severity": severity,
        "reason": "event",
        "score": 5.4,
        "threshold": 0.7,
        "last_event_time": "2024-01-01T00:00:00Z",
        "offender": {"event_id": "delete_error", "expected": [{"event_id": "deleted", "probability": 0.78}]},
    }


@pytest.fixture
def alerts_topic(kafka, topic_name):
    """A topic with alerts 1, 2 (twice, as at_least_once may), 2 again but worse, and 3; 99 was taken back."""
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    admin.create_topics([NewTopic(topic_name, 1, 1)])[topic_name].result(10)
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "transactional.id": topic_name})
    producer.init_transactions(20)
    minor = alert(3, severity="minor") | {"reason": "counts"}
    minor["offender"] = {"event_id": "<END>", "expected": [], "counts": [{"event_id": "read", "count": 9, "usual": 1}]}
    for published, finish in (
        ([alert(99)], producer.abort_transaction),
        ([alert(1), alert(2), alert(2), alert(2, revision=2), minor], producer.commit_transaction),
    ):
        producer.begin_transaction()
        for one in published:
            producer.produce(topic_name, json.dumps(one), one["block_id"])
        producer.flush(20)
        finish(20)
    return topic_name


@pytest.fixture
def start(kafka, alerts_topic):
    started = []

    def run(example, *options):
        process = subprocess.Popen(
            [
                sys.executable, "-u", ROOT / "examples" / example, "--brokers", kafka.bootstrap, "--topic",
                alerts_topic, "--group", alerts_topic, "--set", "session.timeout.ms", "6000", *options,
            ],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def stop(process):
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)
    assert process.returncode == 0, said
    return said


def test_the_python_reader_sees_each_alert_once_and_goes_on_where_it_was(start):
    process = start("read_alerts.py")
    lines = [process.stdout.readline() for _ in range(4)]
    assert [re.search(r"block-(\d+) .*revision (\d)", line).groups() for line in lines] == [
        ("1", "1"),
        ("2", "1"),
        ("2", "2"),
        ("3", "1"),
    ]
    assert "major: block-1 did delete_error, expected deleted 78% (score 5.40 > 0.70, revision 1)" in lines[0]
    assert "minor: block-3 ended with 9 read, expected 1 read (score" in lines[3]
    time.sleep(0.5)  # the last one's commit
    assert stop(process) == ("", "")
    again = start("read_alerts.py")
    time.sleep(4)
    assert stop(again)[0] == "", "committed alerts came again"


class Receiver:
    """A web server that answers each post with the next of `answers`, and with the last one from then on."""

    def __init__(self, *answers):
        self.got, self.logins = [], set()
        outer, left = self, list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status = left.pop(0) if len(left) > 1 else left[0]
                outer.got.append((status, self.headers["Idempotency-Key"], body["block_id"]))
                outer.logins.add(self.headers["Authorization"])
                self.send_response(status)
                self.send_header("Location", outer.url)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/alerts"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def taken(self):
        return [(key, block) for status, key, block in self.got if status == 200]

    def wait_for(self, condition):
        deadline = time.monotonic() + 40
        while not condition():
            assert time.monotonic() < deadline, self.got
            time.sleep(0.05)

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver():
    made = []

    def make(*answers):
        made.append(Receiver(*answers))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_the_webhook_loses_no_alert_though_the_receiver_is_away_and_it_is_killed(start, receiver, monkeypatch):
    monkeypatch.setenv("WEBHOOK_TOKEN", "secret\n")
    away = receiver(503)
    process = start("webhook.py", "--url", away.url, "--severity", "major", "critical")
    away.wait_for(lambda: len(away.got) >= 2)
    process.kill()
    assert "503" in process.communicate()[1]

    back = receiver(429, 200)
    process = start("webhook.py", "--url", back.url, "--severity", "major", "critical")
    back.wait_for(lambda: len(back.taken()) >= 4)
    stop(process)
    assert back.got[0][0] == 429
    assert {block for _, block in back.taken()} == {"block-1", "block-2"}
    assert {key for key, _ in back.taken()} == {f"{1:032x}.1", f"{2:032x}.1", f"{2:032x}.2"}
    assert back.logins == {"Bearer secret"}


def test_the_webhook_loses_no_alert_that_is_handed_over_while_it_waits(kafka, start, receiver, topic_name):
    topic = f"{topic_name}-two"
    brokers = {"bootstrap.servers": kafka.bootstrap}
    admin, producer = AdminClient(brokers), Producer(brokers)
    admin.create_topics([NewTopic(topic, 2, 1)])[topic].result(10)
    for number in range(6):
        producer.produce(topic, json.dumps(alert(number)), partition=number % 2)
    producer.flush(20)
    other = Consumer(brokers | {"group.id": topic_name, "session.timeout.ms": 6000, "enable.auto.commit": False})
    other.subscribe([topic])

    def holds(partitions):
        other.poll(0.1)
        return len(other.assignment()) == partitions

    away = receiver(503, 503, 503, 503, 200)
    away.wait_for(lambda: holds(2))
    start("webhook.py", "--url", away.url, "--topic", topic, "--set", "heartbeat.interval.ms", "500")
    away.wait_for(lambda: holds(1) and len(away.got) == 4)  # it waits for five seconds now
    other.close()
    away.wait_for(lambda: len({block for _, block in away.taken()}) == 6)


@pytest.mark.parametrize("status", [404, 302])
def test_a_receiver_that_refuses_or_redirects_ends_the_webhook(start, receiver, status):
    process = start("webhook.py", "--url", receiver(status).url)
    _, said = process.communicate(timeout=40)
    assert process.returncode == 2
    assert re.fullmatch(rf"error: the receiver refuses: {status} .*; mend that and start again\n", said)


def example(name, *options):
    return subprocess.run(
        [sys.executable, ROOT / "examples" / name, *options],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip


EXAMPLES = pytest.mark.parametrize("command", [("read_alerts.py",), ("webhook.py", "--url", "http://127.0.0.1:9/x")])


@EXAMPLES
def test_a_reader_that_comes_before_its_topic_says_so(kafka, command):
    done = example(*command, "--brokers", kafka.bootstrap, "--topic", "not-yet")
    assert done.returncode == 2
    assert re.fullmatch(r"error: there is no topic not-yet at 127.*start that first.*\n", done.stderr)


@EXAMPLES
def test_a_wrong_setting_is_one_sentence(command):
    done = example(*command, "--set", "foo", "bar")
    assert done.returncode == 2
    assert re.fullmatch(r'error: --set: .*"foo"; mend or remove it\n', done.stderr)


@pytest.mark.parametrize("url", ["example.org/x", "ftp://example.org/x", "http:///x", "http://a:b/x", "http://a/b c"])
def test_a_url_that_nothing_can_be_posted_to_is_one_sentence(url):
    done = example("webhook.py", "--url", url)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: --url {url} is no address to post to; .*\n", done.stderr)


@pytest.mark.parametrize(("login", "token"), [("me:secret@", ""), ("", "secret\nsecret"), ("", "secr€t")])
def test_a_login_that_cannot_be_sent_is_one_sentence_that_does_not_tell_it(monkeypatch, login, token):
    monkeypatch.setenv("WEBHOOK_TOKEN", token)
    done = example("webhook.py", "--url", f"http://{login}127.0.0.1:9/x")
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*WEBHOOK_TOKEN.*\n", done.stderr)
    assert "secr" not in done.stderr


@EXAMPLES
def test_while_no_broker_answers_one_line_says_so(command):
    process = subprocess.Popen(
        [sys.executable, ROOT / "examples" / command[0], *command[1:], "--brokers", f"127.0.0.1:{free_port()}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        said = process.stderr.readline()
        assert re.fullmatch(r"kafka: 127.*Connection refused; trying again until it works\n", said)
        time.sleep(1)
        assert stop(process) == ("", "")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(shutil.which("kcat") is None, reason="kcat is not installed")
def test_kcat_reads_them(kafka, alerts_topic):
    commands = re.findall(r"^kcat .*$", (ROOT / "docs" / "alerts.md").read_text(), re.MULTILINE)
    names = {"localhost:9092": kafka.bootstrap, "log-anomaly-alerts": alerts_topic}
    whole, blocks = (
        subprocess.run(
            [names.get(word, word) for word in shlex.split(command)],
            capture_output=True, text=True, check=True, timeout=30,
        ).stdout.splitlines()
        for command in commands
    )  # fmt: skip
    assert [json.loads(line)["block_id"] for line in whole] == blocks
    assert blocks == ["block-1", "block-2", "block-2", "block-2", "block-3"]
