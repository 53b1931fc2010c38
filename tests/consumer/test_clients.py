"""How clients of Kafka are made: what users set wins over a default."""

from unittest.mock import Mock

import pytest

from consumer import clients, delivery, service
from consumer.artifacts import Artifacts
from consumer.clients import READ_AHEAD, member
from consumer.delivery import AtLeastOnce
from consumer.patience import Patience
from consumer.settings import Settings
from model.errors import UserError

WHERE = {"bootstrap.servers": "127.0.0.1:1"}


class MadeError(Exception):
    """Ends the service as soon as it asks for its consumer."""


@pytest.fixture
def client(monkeypatch):
    """Stands for the function that makes clients."""
    made = Mock()
    for module in (clients, delivery):
        monkeypatch.setattr(module, "client", made)
    return made


def config(client):
    """Return the librdkafka settings of the client that was made."""
    return client.call_args.args[2]


@pytest.mark.parametrize(
    "given",
    [{}, *({where: {name: 7}} for where in ("common", "consumer") for name in READ_AHEAD)],
    ids=str,
)
def test_read_ahead_is_short_and_what_users_set_wins(client, given):
    kafka = WHERE | given.get("common", {}) | {"consumer": given.get("consumer", {})}
    member(Settings(kafka=kafka), Patience(), defaults=READ_AHEAD)
    expected = {**READ_AHEAD, **given.get("common", {}), **given.get("consumer", {})}
    assert {name: config(client)[name] for name in READ_AHEAD} == expected


def test_librdkafka_knows_the_settings():
    patience = Patience()
    member(Settings(kafka=WHERE), patience, defaults=READ_AHEAD).close()
    wrong = Settings(kafka=WHERE | {"consumer": {"fetch.queue.backoff.ms": "soon"}})
    with pytest.raises(UserError, match=r"kafka\.consumer\.fetch\.queue\.backoff\.ms"):
        member(wrong, patience, defaults=READ_AHEAD)


def test_service_reads_a_little_ahead(monkeypatch, bundle, make_threshold):
    asked = Mock(side_effect=MadeError)
    for name, stand_in in (("member", asked), ("rehearse", Mock()), ("delivery_for", Mock())):
        monkeypatch.setattr(service, name, stand_in)
    detecting = service.Service(Settings(kafka=WHERE), Artifacts(bundle, make_threshold(3.0)), Patience())
    with pytest.raises(MadeError):
        detecting.run()
    assert asked.call_args.kwargs["defaults"] == READ_AHEAD


@pytest.mark.parametrize(("given", "queue"), [({}, 20_000), ({"queue.buffering.max.messages": 7}, 7)])
def test_queue_of_the_producer_is_short_and_what_users_set_wins(client, given, queue):
    AtLeastOnce(Settings(kafka=WHERE | {"producer": given}), Patience())
    assert config(client)["queue.buffering.max.messages"] == queue
