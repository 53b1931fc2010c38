"""Reads alerts as they are published, each once: the loop to put your own work into.

    python examples/read_alerts.py --brokers localhost:9092

Brokers that are away are waited for; what waiting does not mend ends the program with status 2. Needs nothing of this
project, only confluent-kafka.
"""

import argparse
import json
import signal
import sys
import time
from contextlib import closing

from confluent_kafka import Consumer, KafkaError, KafkaException, Message

REMEMBERED = 100_000  # alerts; more than may come twice after any crash
SAY_SECONDS = 30.0  # between two lines about brokers that are away


def main() -> int:
    """Read until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(description="Read alerts as they are published.")
    parser.add_argument("--brokers", default="localhost:9092")
    parser.add_argument("--topic", default="log-anomaly-alerts")
    parser.add_argument("--group", default="alert-reader", help="who reads: each group gets every alert")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="for librdkafka")
    arguments = parser.parse_args()
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopped.append(number))

    try:
        read(arguments, stopped)
    except KafkaException as error:
        print(f"error: {reason(error.args[0], arguments)}", file=sys.stderr)
        return 2
    return 0


def read(arguments: argparse.Namespace, stopped: list[int]) -> None:
    """Handle alerts until told to stop.

    Raises:
        KafkaException: waiting would not mend it.
    """
    seen: dict[tuple[str, int], None] = {}
    with closing(member(arguments)) as consumer:
        consumer.subscribe([arguments.topic])
        while not stopped:
            message = consumer.poll(0.5)
            if message is None:
                continue
            if message.error():
                raise KafkaException(message.error())
            alert = json.loads(message.value())
            # With delivery: at_least_once an alert may come twice; these two fields tell. A higher revision of the
            # same alert_id is news: the block got worse.
            name = (alert["alert_id"], alert["revision"])
            if name not in seen:
                handle(alert)
                seen[name] = None
                if len(seen) > REMEMBERED:
                    del seen[next(iter(seen))]
            commit(consumer, message)


def handle(alert: dict) -> None:
    """Do what is to be done about an alert; here it is printed."""
    offender = alert["offender"]
    expected = ", ".join(f"{other['event_id']} {other['probability']:.0%}" for other in offender["expected"])
    what = f"did {offender['event_id']}"
    if alert["reason"] == "truncated":
        what = "ended too early"
    elif alert["reason"] == "counts":
        what = "ended with " + ", ".join(f"{kind['count']} {kind['event_id']}" for kind in offender["counts"])
        expected = ", ".join(f"{kind['usual']} {kind['event_id']}" for kind in offender["counts"])
    print(
        f"{alert['last_event_time']} {alert['severity']}: {alert['block_id']} {what}, expected {expected} "
        f"(score {alert['score']:.2f} > {alert['threshold']:.2f}, revision {alert['revision']})",
        flush=True,
    )


def member(arguments: argparse.Namespace) -> Consumer:
    """Return a member of the group; it says now and then that brokers are away, which librdkafka mends by itself."""
    quiet_until = 0.0

    def notice(error: KafkaError) -> None:
        nonlocal quiet_until
        if time.monotonic() >= quiet_until:
            quiet_until = time.monotonic() + SAY_SECONDS
            said = error.str().partition(" (after ")[0]
            print(f"kafka: {said}; trying again until it works", file=sys.stderr, flush=True)

    own = {
        "bootstrap.servers": arguments.brokers,
        "group.id": arguments.group,
        "auto.offset.reset": "earliest",
        "isolation.level": "read_committed",  # never what a transaction took back
        "enable.auto.commit": False,  # only what is done is committed
        "error_cb": notice,
    }
    return Consumer({"log_level": 2, **dict(arguments.set), **own})  # its log would be twenty lines a second


def reason(error: KafkaError, arguments: argparse.Namespace) -> str:
    """Return why there is no going on, and what to do."""
    if error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
        where = f"{arguments.topic} at {arguments.brokers}"
        return f"there is no topic {where}; the detector makes it: start that first, or see to --topic"
    if error.code() == KafkaError._INVALID_ARG:  # noqa: SLF001 - confluent-kafka names librdkafka's own errors so
        return f"--set: {error.str().strip()}; mend or remove it"
    return f"kafka: {error.str()}; mend that and start again"


def commit(consumer: Consumer, message: Message) -> None:
    """Commit an alert that is done."""
    try:
        consumer.commit(message, asynchronous=False)
    except KafkaException as error:  # the partition went to another member, which will read it once more
        print(f"not committed: {error.args[0].str()}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
