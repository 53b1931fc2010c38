"""Reads alerts as they are published, each once: the loop to put your own work into.

    python examples/read_alerts.py --brokers localhost:9092

Needs nothing of this project, only confluent-kafka.
"""

import argparse
import json
import signal

from confluent_kafka import Consumer, KafkaException

REMEMBERED = 100_000  # alerts; more than may come twice after any crash


def main() -> None:
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

    consumer = Consumer(
        dict(arguments.set)
        | {
            "bootstrap.servers": arguments.brokers,
            "group.id": arguments.group,
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",  # never what a transaction took back
            "enable.auto.commit": False,  # only what is done is committed
        }
    )
    consumer.subscribe([arguments.topic])
    seen: dict[tuple[str, int], None] = {}
    try:
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
            consumer.commit(message, asynchronous=False)
    finally:
        consumer.close()


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


if __name__ == "__main__":
    main()
