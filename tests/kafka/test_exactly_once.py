"""Nothing lost, nothing twice, on a real Kafka: kills, restarts, resets, and a harness that can fail."""

import json
import signal
import time
from pathlib import Path
from random import Random
from threading import Event, Thread

import pytest
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic

from consumer.delivery import TransactionAborted, delivery_for
from consumer.patience import NOT_COMMITTED, Patience
from consumer.restore import Restorer
from consumer.settings import KafkaSettings
from consumer.topics import TopicSpec, ensure_topics
from model.bundle import Bundle
from model.errors import UserError
from scripts.local_kafka import QUICK_ABORTS, LocalKafka, free_port
from scripts.simulator import simulate
from scripts.verify import verify


def message(block, event, time):
    return block, json.dumps({"block_id": block, "event_id": event, "timestamp": time})


def stream(blocks, seed, share=0.2):
    live = simulate(blocks, share, seed)
    return [message(event.block_id, event.event_id, event.timestamp) for event in live.events]


def joined(line, process):
    line.wait_for(lambda: "assigned" in process.log.read_text(), what="joining")


def written(line, topic):
    """Return how many messages a topic has, those of open transactions included."""
    reader = Consumer({"bootstrap.servers": line.bootstrap, "group.id": "x", "isolation.level": "read_uncommitted"})
    numbers = reader.list_topics(topic, timeout=10).topics[topic].partitions
    bounds = [reader.get_watermark_offsets(TopicPartition(topic, number), timeout=10) for number in numbers]
    reader.close()
    return sum(high - low for low, high in bounds)


def test_faults_small_and_seeded(line, tmp_path):
    """Two minutes of what `scripts.faults` does for as long as one likes."""
    made = line()
    out = tmp_path / "faults.json"
    done = made.run(
        "scripts.faults", "--events", 25_000, "--kills", 6, "--broker-restarts", 1, "--joins", 1, "--fencings", 1,
        "--aborts", 1, "--seed", 7, "--json", out, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["alerts_missing"] == result["alerts_duplicated"] == result["alerts_different"] == 0
    assert result["events"] >= 25_000
    assert result["alerts_expected"] > 100
    assert result["kills"] >= 6
    assert result["broker_restarts"] == 1
    assert result["rebalances"] > 2
    assert result["fenced"] >= 1


@pytest.mark.parametrize(("delivery", "doubled"), [("exactly_once", False), ("at_least_once", True)])
def test_without_the_transaction_alerts_come_twice_and_verify_sees_it(line, delivery, doubled):
    """Killed after the alerts are sent and before the offsets are committed."""
    made = line(delivery=delivery, commit={"interval": "1s"})
    first = made.start_consumer("before_commit:2")  # the first may say no more than where the group begins
    joined(made, first)
    events = stream(150, 41)
    made.produce(events[: len(events) // 2])
    made.wait_for(lambda: made.lag() == 0 or first.poll() is not None, what="committing the first half")
    made.produce(events[len(events) // 2 :])
    made.wait_for(lambda: first.poll() is not None, what="dying before the commit")
    assert first.returncode == -signal.SIGKILL
    made.consume_all()
    result = verify(made.settings)
    assert result.alerts_missing == result.alerts_different == result.alerts_extra == 0
    assert result.alerts_expected > 20
    assert (result.alerts_duplicated > 0) == doubled


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_blocks_in_mid_life_survive_a_restart(line, number):
    """Cut everywhere: the second process takes up windows that the first one began."""
    made = line(checkpoint={"interval": "500ms"})
    events = stream(100, 43)
    random = Random(5)
    begin = 0
    while begin < len(events):
        end = begin + random.randint(300, 900)
        process = made.start_consumer()
        joined(made, process)
        made.produce(events[begin:end])
        made.wait_for(lambda: made.lag() < 100, what="committing most input")
        made.stop(process, number)
        begin = end
    made.consume_all()
    result = verify(made.settings)
    assert result.is_exact, result
    assert result.alerts_expected > 10


def test_a_rebalance_hands_windows_over(line):
    made = line()
    events = stream(120, 47)
    first = made.start_consumer()
    joined(made, first)
    made.produce(events[: len(events) // 2])
    made.wait_for(lambda: made.lag() == 0, what="committing the first half")
    second = made.start_consumer()
    joined(made, second)
    made.produce(events[len(events) // 2 :])
    made.wait_for(lambda: made.lag() == 0, what="committing the second half")
    assert "open blocks restored" in second.log.read_text()
    for process in (second, first):
        assert made.stop(process)[0] == 0
    assert verify(made.settings).is_exact


def test_callbacks_after_a_rebalance_find_the_client_intact(line):
    """A call of the group's client within its own callback can leave it unable to make the next callback."""
    made = line(kafka={"debug": "cgrp,consumer,fetch", "log_level": 7})  # a callback for each line that it logs
    process = made.start_consumer()
    joined(made, process)
    made.produce(stream(50, 61))
    made.wait_for(lambda: made.lag() == 0, what="committing all input")
    assert made.stop(process)[0] == 0
    result = verify(made.settings)
    assert result.is_exact
    assert result.events > 500


def test_a_state_topic_that_does_not_fit_is_refused(line):
    made = line()
    admin = AdminClient({"bootstrap.servers": made.bootstrap, "log_level": 0})
    topics = made.settings.topics

    def create(name, partitions, **config):
        for future in admin.create_topics([NewTopic(name, partitions, 1, config=config)]).values():
            future.result()

    create(topics.events, 3)
    create(topics.state, 2, **{"cleanup.policy": "compact"})
    done = made.run("consumer", check=False)
    assert done.returncode == 2
    assert f"topic {topics.events} has 3 partitions and {topics.state} has 2" in done.stderr
    for future in admin.create_partitions([NewPartitions(topics.state, 3)]).values():
        future.result()
    process = made.start_consumer()
    joined(made, process)
    made.stop(process)

    other = line(topics={"events": topics.events, "state": f"{made.name}-delete"})
    create(other.settings.topics.state, 3)
    done = other.run("consumer", check=False)
    assert done.returncode == 2
    assert "cleanup.policy=delete" in done.stderr


def test_added_partitions_are_noticed_while_running_and_said(line):
    made = line(kafka={"topic.metadata.refresh.interval.ms": 1000})
    process = made.start_consumer()
    joined(made, process)
    admin = AdminClient({"bootstrap.servers": made.bootstrap, "log_level": 0})

    def grow(topic):
        for future in admin.create_partitions([NewPartitions(topic, 4)]).values():
            future.result()

    grow(made.settings.topics.events)
    assert process.wait(timeout=60) == 2
    said = process.log.read_text()
    assert f"topic {made.settings.topics.events} has 4 partitions and {made.settings.topics.state} has 3" in said
    assert "Traceback" not in said
    made.processes.clear()
    grow(made.settings.topics.state)
    made.produce([(*message("A", "x", 1), 3)])
    made.consume_all()


def test_brokers_away_for_longer_than_a_group_or_a_transaction_lives(line, tmp_path):
    """One consumer waits and goes on by itself. One that is told to stop ends in time and says what it left undone.

    A recovery that is under way goes on, too. Nothing is lost or comes twice.
    """
    own = LocalKafka(
        tmp_path / "kafka",
        free_port(),
        properties=QUICK_ABORTS,
    )
    own.up()
    try:
        waiting = line(broker=own, kafka={"max.poll.interval.ms": 10_000}, commit={"interval": "2s"})
        long = {"transaction.timeout.ms": 90_000}
        stopping = line(broker=own, commit={"interval": "45s"}, kafka={"producer": long})
        waits, stops = waiting.start_consumer(), stopping.start_consumer()
        joined(waiting, waits)
        joined(stopping, stops)
        group = Consumer({"bootstrap.servers": own.bootstrap, "group.id": waiting.name, "log_level": 0})
        restorer = Restorer(waiting.settings, group, Patience())
        vocabulary = Bundle.load(waiting.settings.model.path).vocabulary
        next(restorer.starts([0], vocabulary))
        events = stream(200, 51)
        stopping.produce(events)
        stopping.wait_for(lambda: written(stopping, stopping.settings.topics.alerts), what="reading")
        waiting.produce(events[: len(events) // 2])
        waiting.wait_for(lambda: written(waiting, waiting.settings.topics.alerts), what="reading")
        own.kill()
        began = time.monotonic()
        recovery = Thread(target=lambda: next(restorer.starts([0], vocabulary)), daemon=True)
        recovery.start()
        time.sleep(3)
        status, seconds = stopping.stop(stops)
        said = stops.log.read_text()
        assert (status, seconds < 10) == (NOT_COMMITTED, True), said
        assert "no broker has answered" in said
        assert "events were read that no commit is known to cover" in said
        time.sleep(began + 40 - time.monotonic())
        assert waits.poll() is None, waits.log.read_text()
        assert 1 <= waits.log.read_text().count("WARNING kafka: ") < 12, waits.log.read_text()
        assert recovery.is_alive()
        own.up()
        recovery.join(60)
        assert not recovery.is_alive()
        group.close()
        waiting.produce(events[len(events) // 2 :])
        waiting.wait_for(lambda: waiting.lag() == 0, seconds=120, what="going on")
        assert waiting.stop(waits)[0] == 0
        stopping.processes.clear()
        stopping.config.write_text(stopping.config.read_text().replace("45s", "100ms"))
        stopping.consume_all()
        for result in (verify(waiting.settings), verify(stopping.settings)):
            assert result.is_exact
            assert result.alerts_expected > 20
    finally:
        own.down(purge=True)


def create_topics(made):
    ensure_topics(made.settings, map(TopicSpec, (made.settings.topics.events, made.settings.topics.alerts)))


def test_whoever_is_out_of_the_group_commits_nothing(line):
    made = line()
    create_topics(made)
    alerts, events = made.settings.topics.alerts, made.settings.topics.events
    gone = Consumer({"bootstrap.servers": made.bootstrap, "group.id": made.name, "log_level": 0})
    gone.close()
    delivery = delivery_for(made.settings, Patience())
    delivery.send(alerts, b"not to be seen", b"A", [])
    with pytest.raises(TransactionAborted):
        delivery.commit(gone, [TopicPartition(events, 0, 0)], [])
    delivery.close()
    assert made.read(alerts) == []


class ProducerOf:
    """A producer with one call played by hand."""

    def __init__(self, producer):
        self.producer = producer

    def __getattr__(self, name):
        return getattr(self.producer, name)


def commit_fails_then_works(made, hand_played):
    """The first transaction ends as `hand_played` has it, and the delivery goes on with another."""
    alerts, events = made.settings.topics.alerts, made.settings.topics.events
    group = Consumer({"bootstrap.servers": made.bootstrap, "group.id": made.name, "log_level": 0})
    delivery = delivery_for(made.settings, Patience())
    offsets = [TopicPartition(events, 0, 0)]
    delivery._producer = hand_played(delivery._producer)
    delivery.send(alerts, b"not to be seen", b"A", [])
    with pytest.raises(TransactionAborted):
        delivery.commit(group, offsets, [])
    delivery.send(alerts, b"seen", b"A", [])
    delivery.commit(group, offsets, [])
    delivery.close()
    group.close()


@pytest.mark.parametrize("code", [KafkaError.INVALID_TXN_STATE, KafkaError.PRODUCER_FENCED])
def test_a_transaction_that_the_brokers_ended_costs_the_producer_only(line, code):
    class Ended(ProducerOf):
        def commit_transaction(self, *_):
            self.producer.abort_transaction(10)
            raise KafkaException(KafkaError(code, "too late", fatal=True))

    made = line()
    create_topics(made)
    commit_fails_then_works(made, Ended)
    assert [found.value() for found in made.read(made.settings.topics.alerts)] == [b"seen"]


def test_a_call_that_never_returns_costs_the_producer_and_its_transaction_only(line, monkeypatch):
    """librdkafka's issue 5511: after some restarts of brokers it waits for a coordinator that it has forgotten."""

    class Lost(ProducerOf):
        def send_offsets_to_transaction(self, *_):
            forever.wait()

    made, forever = line(), Event()
    create_topics(made)
    monkeypatch.setattr("consumer.delivery._LOST_SECONDS", 1)
    commit_fails_then_works(made, Lost)
    forever.set()
    # At once: the transaction that was left open would hide it until it timed out.
    assert [found.value() for found in made.read(made.settings.topics.alerts)] == [b"seen"]


def test_a_call_that_fails_in_an_unexpected_way_does_not_pass_for_done(line):
    class Broken(ProducerOf):
        def send_offsets_to_transaction(self, *_):
            raise ValueError("unexpected")

    made = line()
    create_topics(made)
    with pytest.raises(ValueError, match="unexpected"):
        commit_fails_then_works(made, Broken)
    assert made.read(made.settings.topics.alerts) == []


def test_a_message_that_is_refused_for_good_ends_the_process_with_a_sentence(line):
    """It would be refused again by whoever tries again."""
    made = line()
    ensure_topics(made.settings, [TopicSpec(made.settings.topics.alerts, 1, {"max.message.bytes": "300"})])
    process = made.start_consumer()
    joined(made, process)
    made.processes.clear()
    made.produce([message("A", "never seen", 1000)])
    assert process.wait(timeout=60) == 2
    said = process.log.read_text()
    assert "a message is refused" in said
    assert "see to the user's rights, to max.message.bytes" in said
    assert said.count("recovering") == 0
    assert "Traceback" not in said


def test_a_state_topic_of_another_group_is_refused(line):
    made = line()
    process = made.start_consumer()
    joined(made, process)
    made.produce([message("A", "x", 0)] * 3)
    made.wait_for(lambda: made.lag() == 0, what="committing")
    made.stop(process)
    other = line(topics={"events": made.settings.topics.events, "state": made.settings.topics.state})
    done = other.run("consumer", check=False)
    assert done.returncode == 2
    assert f"belongs to the consumer group {made.name}" in done.stderr
    assert "Traceback" not in done.stderr


def test_offsets_set_back_by_hand_are_noticed_and_start_with_empty_windows(line):
    made = line()
    process = made.start_consumer()
    joined(made, process)
    made.produce([(*message("A", "x", number), 0) for number in range(20)])
    made.wait_for(lambda: made.lag() == 0, what="committing")
    made.stop(process)
    consumer = Consumer({"bootstrap.servers": made.bootstrap, "group.id": made.name, "log_level": 0})
    consumer.commit(offsets=[TopicPartition(made.settings.topics.events, 0, 5)], asynchronous=False)
    consumer.close()
    process = made.consume_all()
    assert "offsets were set back to 5: windows start empty" in process.log.read_text()

    kafka = {"bootstrap.servers": made.bootstrap, "consumer": {"group.id": "nobody"}}
    with pytest.raises(UserError, match=r"the group nobody has committed nothing of .*: nothing to verify"):
        verify(made.settings.model_copy(update={"kafka": KafkaSettings.model_validate(kafka)}))


def test_a_backlog_is_skipped_by_setting_the_offsets_forward_and_deleting_the_state_topic(line):
    """The recipe of docs/operations.md."""
    made = line()
    process = made.start_consumer()
    joined(made, process)
    made.produce([(*message("A", "x", number), 0) for number in range(20)])
    made.wait_for(lambda: made.lag() == 0, what="committing")
    made.stop(process)
    made.produce([(*message("skipped", "x", 20), 0) for _ in range(5)])
    admin = AdminClient({"bootstrap.servers": made.bootstrap, "log_level": 0})
    ahead = ConsumerGroupTopicPartitions(made.name, [TopicPartition(made.settings.topics.events, 0, 25)])
    admin.alter_consumer_group_offsets([ahead])[made.name].result()
    for future in admin.delete_topics([made.settings.topics.state], operation_timeout=10).values():
        future.result()
    made.produce([(*message("B", "x", 21), 0)])
    process = made.consume_all()
    assert "no windows are stored (was the state topic deleted?)" in process.log.read_text()
    assert {alert.key() for alert in made.read(made.settings.topics.alerts)} == {b"A", b"B"}


def test_events_deleted_before_they_were_needed_are_noticed(line):
    made = line(checkpoint={"interval": "1h"})
    first = made.start_consumer()
    joined(made, first)
    made.produce([(*message("A", "x", number), 0) for number in range(20)])
    made.wait_for(lambda: made.lag() == 0, what="committing")
    made.stop(first)  # hands over with a checkpoint at 20
    second = made.start_consumer()
    joined(made, second)
    made.produce([(*message("B", "x", 20), 0) for _ in range(20)])
    made.wait_for(lambda: made.lag() == 0, what="committing")
    made.stop(second, signal.SIGKILL)  # committed at 40
    topic = made.settings.topics.events
    admin = AdminClient({"bootstrap.servers": made.bootstrap, "log_level": 0})

    def delete_up_to(offset):
        for future in admin.delete_records([TopicPartition(topic, 0, offset)]).values():
            future.result()

    delete_up_to(30)
    made.produce([(*message("B", "x", 20), 0)])  # when this one is committed, all is caught up, and a stop checkpoints
    process = made.consume_all()
    said = process.log.read_text()
    assert f"{topic}/0: events 20 to 29 are gone from the topic: windows may lack them" in said
    assert "cannot be judged" not in said

    made.produce([(*message("C", "x", 40), 0) for _ in range(20)])
    delete_up_to(50)
    process = made.consume_all()
    said = process.log.read_text()
    assert f"{topic}/0: events 41 to 49 were deleted before they were read and cannot be judged" in said
    assert "windows may lack them" not in said
    alerts = [json.loads(found.value()) for found in made.read(made.settings.topics.alerts)]
    assert {alert["source"]["first_offset"] for alert in alerts if alert["block_id"] == "C"} == {50}

    process = made.start_consumer()
    joined(made, process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1)  # longer than brokers hold a request: none is under way
    made.produce([(*message("D", "x", 60), 0) for _ in range(20)])
    delete_up_to(70)
    process.send_signal(signal.SIGCONT)
    made.wait_for(lambda: made.lag() == 0, what="going on behind the gap")
    made.stop(process)
    assert f"{topic}/0: events 61 to 69 were deleted before they were read" in process.log.read_text()


def test_garbage_costs_neither_the_good_events_nor_memory(line):
    made = line(windows={"max_open_blocks": 2000}, topics={"partitions": 1})
    random = Random(3)
    kinds = [
        lambda: (None, random.randbytes(random.randint(0, 300))),
        lambda: ("k", b"[" * random.randint(1, 5000)),
        lambda: ("k", json.dumps({"block_id": "k", "event_id": "e", "timestamp": 10**17})),
        lambda: ("k", json.dumps({"block_id": "k", "event_id": "e", "timestamp": 4 * 10**12})),
        lambda: ("other", json.dumps({"block_id": "k", "event_id": "e", "timestamp": 1})),
        lambda: (None, None),
        lambda: ("k", b"x" * 900_000) if random.random() < 0.001 else ("k", b"\xff\xfe"),
    ]
    process = made.start_consumer()
    joined(made, process)
    good = 5000

    def mixed(number):
        return [random.choice(kinds)() for _ in range(10)] + [message(f"good-{number}", "never seen", 1000)]

    def resident():
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    made.produce(item for number in range(good // 2) for item in mixed(number))
    made.wait_for(lambda: made.lag() == 0, what="committing the first half")
    before = resident()
    made.produce(item for number in range(good // 2, good) for item in mixed(number))
    made.wait_for(lambda: made.lag() == 0, what="committing the second half")
    assert resident() < before + 60
    assert made.stop(process)[0] == 0
    assert f"{good - 2000:,} closed early to make room" in process.log.read_text()
    alerted = {json.loads(found.value())["block_id"] for found in made.read(made.settings.topics.alerts)}
    assert len(alerted) == good
    letters = made.read(made.settings.topics.dead_letters)
    assert len(letters) == 10 * good
    assert all(dict(letter.headers())["dead_letter.reason"] for letter in letters)
    reasons = " ".join({dict(letter.headers())["dead_letter.reason"].decode() for letter in letters})
    assert "windows.max_ahead" in reasons
