import subprocess
import sys

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from scripts.local_kafka import LocalKafka, free_port

pytestmark = pytest.mark.kafka


@pytest.fixture
def own_kafka(tmp_path):
    """A broker that the test may stop and change as it likes."""
    broker = LocalKafka(tmp_path / "kafka", free_port())
    yield broker
    broker.down(purge=True)


def create(topic, kafka):
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(10)


def commit(topic, value, **settings):
    """Write one message in a transaction."""
    producer = Producer({"transactional.id": topic, **settings})
    producer.init_transactions(20)
    producer.begin_transaction()
    producer.produce(topic, value)
    producer.commit_transaction(20)


def committed(topic, count, **settings):
    """Read the topic's first messages."""
    consumer = Consumer({"group.id": topic, "isolation.level": "read_committed", **settings})
    consumer.assign([TopicPartition(topic, 0, 0)])
    messages = consumer.consume(count, timeout=10)
    consumer.close()
    return [message.value() for message in messages]


def command(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "scripts.local_kafka", *arguments], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_transactions_work(kafka, topic_name):
    create(topic_name, kafka)
    commit(topic_name, b"hello", **{"bootstrap.servers": kafka.bootstrap})
    assert committed(topic_name, 1, **{"bootstrap.servers": kafka.bootstrap}) == [b"hello"]


def test_topics_are_not_made_by_accident(kafka, topic_name):
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    assert admin.list_topics(topic_name, timeout=10).topics[topic_name].error is not None


def test_what_was_written_survives_a_kill_and_a_stop(own_kafka, topic_name):
    assert own_kafka.up()
    client = {"bootstrap.servers": own_kafka.bootstrap}
    create(topic_name, own_kafka)
    commit(topic_name, b"1", **client)
    own_kafka.kill()
    assert not own_kafka.is_up()
    assert own_kafka.up()
    commit(topic_name, b"2", **client)
    assert own_kafka.down()
    assert not own_kafka.is_up()
    assert own_kafka.up()
    assert committed(topic_name, 2, **client) == [b"1", b"2"]


def test_the_command_starts_shows_and_stops(tmp_path):
    folder, port = tmp_path / "kafka", free_port()
    where = ("--dir", str(folder))
    try:
        status, said = command("up", *where, "--port", str(port))
        assert status == 0, said
        assert said.startswith("Kafka is up after")
        assert command("up", *where, "--port", str(port)) == (0, f"Kafka is up already at 127.0.0.1:{port}\n")
        assert command("status", *where) == (0, f"Kafka is up at 127.0.0.1:{port}\n")
        for action in ("up", "status", "down"):
            status, said = command(action, *where, "--port", str(free_port()))
            assert (status, said.count("\n")) == (2, 1)
            assert f"is up on another port, {port}; use that port" in said
    finally:
        assert command("down", *where) == (0, "Kafka is down\n")
    assert command("status", *where) == (1, "Kafka is down\n")
    assert (folder / "data").is_dir()
    assert command("down", "--purge", *where) == (0, "Kafka was not running\n")
    assert not folder.exists()


def test_secured_listeners_can_be_added(own_kafka, topic_name):
    port = free_port()
    own_kafka.properties = {
        "listeners": f"SECURED://127.0.0.1:{port}",
        "listener.security.protocol.map": "SECURED:SASL_PLAINTEXT",
        "listener.name.secured.sasl.enabled.mechanisms": "PLAIN",
        "listener.name.secured.plain.sasl.jaas.config": (
            'org.apache.kafka.common.security.plain.PlainLoginModule required user_ann="secret";'
        ),
    }
    own_kafka.up()
    create(topic_name, own_kafka)
    client = {
        "bootstrap.servers": f"127.0.0.1:{port}",
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "PLAIN",
        "sasl.username": "ann",
        "sasl.password": "secret",
    }
    commit(topic_name, b"hello", **client)
    assert committed(topic_name, 1, **client) == [b"hello"]
