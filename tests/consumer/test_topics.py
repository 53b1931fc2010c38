"""Brokers that are slow or absent at the start, on librdkafka's mock brokers; tests/kafka has the real thing."""

import logging
import time

import pytest
from confluent_kafka.admin import AdminClient

from consumer.settings import Settings
from consumer.topics import require_topic
from model.errors import UserError


def settings_for(bootstrap, **kafka):
    return Settings.model_validate({"kafka": {"bootstrap.servers": bootstrap, **kafka}})


def test_a_slow_broker_is_waited_for_and_that_is_said(monkeypatch, caplog):
    brokers = AdminClient(
        {"bootstrap.servers": "mock", "test.mock.num.brokers": 1, "test.mock.broker.rtt": 300, "log_level": 0}
    )
    (broker,) = brokers.list_topics("logs", timeout=10).brokers.values()
    monkeypatch.setattr("consumer.topics._SAY_AFTER_SECONDS", 0.1)
    monkeypatch.setattr("consumer.topics._TRY_SECONDS", 0.1)
    with caplog.at_level(logging.WARNING, "consumer"):
        assert require_topic(settings_for(f"{broker.host}:{broker.port}"), "logs") > 0
    (said,) = caplog.messages
    assert said.startswith(f"no broker answers yet at {broker.host}:{broker.port}: waiting ")


def test_a_broker_that_does_not_come_is_given_up_in_the_time_that_a_connection_may_take(monkeypatch, caplog):
    monkeypatch.setattr("consumer.topics._SAY_AFTER_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"no broker answers at kafka\.bootstrap\.servers 127\.0\.0\.1:1 .*refused"):
        require_topic(settings_for("127.0.0.1:1", **{"socket.connection.setup.timeout.ms": 1500}), "logs")
    assert 1.5 <= time.monotonic() - began < 4
    assert len(caplog.messages) == 1
