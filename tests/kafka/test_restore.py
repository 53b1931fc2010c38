"""Where a successor begins, on a real Kafka: what it waits for, and what it gets over."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from consumer.patience import Patience, is_passing
from consumer.records import CHECKPOINT, Checkpoint
from consumer.restore import Restorer
from consumer.settings import KafkaSettings
from consumer.topics import TopicSpec, ensure_topics
from model.errors import UserError
from model.vocabulary import Vocabulary

VOCABULARY = Vocabulary(("a",))


class Predecessor:
    """Writes checkpoints to the state partitions, in transactions of its own."""

    def __init__(self, made):
        self._made = made
        topics = made.settings.topics
        ensure_topics(made.settings, [TopicSpec(topics.events, 3), TopicSpec(topics.state, 3)])
        self._producer = Producer(
            {"bootstrap.servers": made.bootstrap, "transactional.id": made.name, "transaction.timeout.ms": 60_000}
        )
        self._producer.init_transactions(10)

    def checkpoint(self, partition, offset, topic=""):
        """Write a checkpoint; the transaction stays open until `end`."""
        self._producer.begin_transaction()
        record = Checkpoint(offset, 1000, self._made.name, topic=topic).pack()
        self._producer.produce(self._made.settings.topics.state, record, CHECKPOINT, partition=partition)
        assert self._producer.flush(10) == 0

    def end(self, how="commit"):
        getattr(self._producer, f"{how}_transaction")(10)


def commits(consumer, offsets):
    """Commit; say whether that worked: a broker that has just started has no coordinator yet."""
    try:
        return consumer.commit(offsets=offsets, asynchronous=False)
    except KafkaException as error:
        if not is_passing(error.args[0]):
            raise
        return False


@pytest.fixture
def group(line):
    """A consumer group that has committed offset 5 in all partitions; yields its line and a consumer of it."""
    made = line()
    made.predecessor = Predecessor(made)
    made.produce([("A", b"{}", partition) for partition in range(3) for _ in range(9)])
    consumer = Consumer({"bootstrap.servers": made.bootstrap, "group.id": made.name, "log_level": 0})
    topic = made.settings.topics.events
    offsets = [TopicPartition(topic, partition, 5) for partition in range(3)]
    made.wait_for(lambda: commits(consumer, offsets), what="a coordinator")
    yield made, consumer
    consumer.close()


@pytest.mark.parametrize(("how", "offset"), [("commit", 4), ("abort", 2)])
def test_a_transaction_that_the_state_partition_has_not_seen_the_end_of_is_waited_for(group, how, offset):
    """On several brokers the group's offset may be settled before the state partition hears of it."""
    made, consumer = group
    made.predecessor.checkpoint(0, 2)
    made.predecessor.end()
    made.predecessor.checkpoint(0, 4)
    restorer = Restorer(made.settings, consumer, Patience())
    with ThreadPoolExecutor() as pool:
        restoring = pool.submit(lambda: next(restorer.starts([0], VOCABULARY)))
        time.sleep(2)
        waited = not restoring.done()
        made.predecessor.end(how)
        start = restoring.result(timeout=20)
    assert waited
    assert start.recovered.checkpoint.offset == offset
    assert (start.offset, start.replay.until) == (offset, 5)


def test_what_is_read_while_the_brokers_fail_to_tell_an_end_is_not_lost(group, monkeypatch):
    made, consumer = group
    made.predecessor.checkpoint(0, 2)
    made.predecessor.end()
    made.predecessor.checkpoint(0, 4)
    failures = []

    class Faltering(AdminClient):
        def list_offsets(self, *places, **options):
            if len(failures) < 3:
                if not failures:
                    made.predecessor.end()
                    time.sleep(1)  # its records arrive
                failures.append(KafkaException(KafkaError(KafkaError._TIMED_OUT)))
                raise failures[-1]
            return super().list_offsets(*places, **options)

    monkeypatch.setattr("consumer.restore.AdminClient", Faltering)
    (start,) = Restorer(made.settings, consumer, Patience()).starts([0], VOCABULARY)
    assert len(failures) == 3
    assert start.recovered.checkpoint.offset == 4


def test_windows_of_another_topic_are_left_alone(group):
    """As by a copy of the settings in which only topics.events is another."""
    made, consumer = group
    made.predecessor.checkpoint(0, 2, topic="others")
    made.predecessor.end()
    with pytest.raises(UserError, match=r"holds the windows of others; give the windows of .* a topic of their own"):
        next(Restorer(made.settings, consumer, Patience()).starts([0], VOCABULARY))


@pytest.mark.parametrize(("policy", "offset"), [("earliest", 0), ("latest", 9)])
def test_a_group_without_offsets_begins_where_it_is_told_and_says_that_it_chose(group, policy, offset):
    made, _ = group
    kafka = {"bootstrap.servers": made.bootstrap, "consumer": {"group.id": "new", "auto.offset.reset": policy}}
    settings = made.settings.model_copy(update={"kafka": KafkaSettings.model_validate(kafka)})
    nobody = Consumer({"bootstrap.servers": made.bootstrap, "group.id": f"{made.name}-new", "log_level": 0})
    restorer = Restorer(settings, nobody, Patience())
    for _ in range(2):  # as when the first commit failed: it begins at the same place, whatever came meanwhile
        (start,) = restorer.starts([0], VOCABULARY)
        assert (start.offset, start.chosen) == (offset, True)
        made.produce([("A", b"{}", 0)])
    nobody.close()


@pytest.mark.parametrize(
    ("delivery", "offset", "until", "said"),
    [("exactly_once", 5, 5, "set back to 5: windows start empty"),
     ("at_least_once", 8, 8, "ahead of the group's offset 5, as after a crash: going on at 8")],
)  # fmt: skip
def test_windows_that_are_ahead_of_the_groups_offset_are_of_a_crash_or_of_offsets_set_back(
    group, caplog, delivery, offset, until, said
):
    made, consumer = group
    made.predecessor.checkpoint(0, 8)
    made.predecessor.end()
    settings = made.settings.model_copy(update={"delivery": delivery})
    (start,) = Restorer(settings, consumer, Patience()).starts([0], VOCABULARY)
    assert (start.offset, start.replay.until) == (offset, until)
    assert (start.leftovers == [CHECKPOINT]) == (delivery == "exactly_once")
    assert said in caplog.text


def test_partitions_are_restored_one_after_the_other_from_their_own_records(group):
    made, consumer = group
    for partition in range(3):
        made.predecessor.checkpoint(partition, partition + 1)
        made.predecessor.end()
    restorer = Restorer(made.settings, consumer, Patience())
    for order in ([2, 0, 1], [1]):
        assert [start.offset for start in restorer.starts(order, VOCABULARY)] == [number + 1 for number in order]


def test_a_request_whose_connection_was_given_up_is_made_again(group):
    """An outage may end so for librdkafka; it is no reason to stop."""
    made, consumer = group

    class Reconnecting:
        troubles = [KafkaError(KafkaError._DESTROY)]  # noqa: RUF012

        def committed(self, *places, **options):
            while self.troubles:
                raise KafkaException(self.troubles.pop())
            return consumer.committed(*places, **options)

    (start,) = Restorer(made.settings, Reconnecting(), Patience()).starts([0], VOCABULARY)
    assert (start.offset, start.chosen) == (5, False)
    assert Reconnecting.troubles == []
