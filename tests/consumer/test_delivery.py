"""What a delivery makes of a producer that meets its end where no call is made for an answer: in a pause."""

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from consumer.delivery import AtLeastOnce, ExactlyOnce, TransactionAborted
from consumer.patience import Patience
from consumer.settings import Settings
from model.errors import UserError

BUSY = KafkaException(KafkaError(KafkaError._TIMED_OUT, "busy", False, True))
FENCED = KafkaException(KafkaError(KafkaError._FENCED, "fenced by a newer one", True))
OUT_OF_ORDER = KafkaException(KafkaError(KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, "a gap", True))
OFFSETS = [TopicPartition("log-events", 0, 5)]


class Producer:
    """Each call that waits for brokers fails as busy; with the next poll comes its end, which every call tells then."""

    def __init__(self, end=None):
        self.end, self.ended, self.is_open = end, False, False

    def init_transactions(self, _):
        pass

    def begin_transaction(self):
        self.is_open = True

    def produce(self, *_, **__):
        pass

    def poll(self, _):
        if self.end:
            self.ended = True
            raise self.end

    def flush(self, _):
        if self.end:
            raise self.end
        return 0

    def _wait(self, *_):
        if self.end:
            raise self.end if self.ended else BUSY

    send_offsets_to_transaction = commit_transaction = abort_transaction = _wait

    def purge(self):
        pass


class Consumer:
    def consumer_group_metadata(self):
        return b""

    def commit(self, **_):
        raise BUSY


@pytest.fixture
def made(monkeypatch):
    """Return a delivery of some kind whose first producer meets such an end; and all producers."""

    def make(kind, end):
        producers = [Producer(end), Producer()]
        left = list(producers)
        monkeypatch.setattr("consumer.delivery.client", lambda *_, **__: left.pop(0))
        return kind(Settings(), Patience()), producers

    return make


def test_a_producer_that_is_fenced_in_a_pause_of_a_commit_is_replaced(made):
    delivery, producers = made(ExactlyOnce, FENCED)
    with pytest.raises(TransactionAborted, match="fenced"):
        delivery.commit(Consumer(), OFFSETS, [])
    delivery.commit(Consumer(), OFFSETS, [])
    assert producers[1].is_open


def test_a_producer_that_is_fenced_in_a_pause_of_an_abort_is_replaced(made):
    delivery, producers = made(ExactlyOnce, FENCED)
    delivery.send("log-alerts", b"", b"", [])
    delivery.abort()
    delivery.commit(Consumer(), OFFSETS, [])
    assert producers[1].is_open


@pytest.mark.parametrize("call", ["poll", "commit"])
def test_the_end_of_a_producer_without_transactions_is_told_in_a_sentence(made, call):
    delivery, _ = made(AtLeastOnce, OUT_OF_ORDER)
    with pytest.raises(UserError, match="has to be started again"):
        delivery.poll() if call == "poll" else delivery.commit(Consumer(), OFFSETS, [])


def test_a_wrong_clock_ends_in_a_sentence_since_every_other_try_would_be_refused_as_well(made):
    delivery, producers = made(ExactlyOnce, KafkaException(KafkaError(KafkaError.INVALID_TIMESTAMP, "not acceptable")))
    producers[0].abort_transaction = lambda _: None
    with pytest.raises(UserError, match="clock"):
        delivery.commit(Consumer(), OFFSETS, [])
