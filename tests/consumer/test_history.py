"""Reading a topic again, on librdkafka's mock brokers; tests/kafka has the real thing."""

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from consumer.history import TopicHistory
from consumer.settings import Settings
from model.errors import UserError


def test_brokers_that_are_gone_end_the_reading_with_a_sentence():
    brokers = AdminClient({"bootstrap.servers": "mock", "test.mock.num.brokers": 1, "log_level": 0})
    (broker,) = brokers.list_topics("logs", timeout=10).brokers.values()
    settings = Settings.model_validate({"kafka": {"bootstrap.servers": f"{broker.host}:{broker.port}"}})
    producer = Producer({"bootstrap.servers": settings.kafka.bootstrap, "log_level": 0})
    producer.produce("logs", b"x", partition=0)
    assert producer.flush(10) == 0
    del producer
    with TopicHistory(settings, "logs", patience=1.0) as history:
        (messages,) = history.read(0, 0, 1)
        assert [message.value() for message in messages] == [b"x"]
        del brokers, broker
        with pytest.raises(UserError, match="logs: no broker has answered for 1 s"):
            list(history.read(0, 0, 2))
