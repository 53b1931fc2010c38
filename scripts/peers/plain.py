"""`python -m scripts.peers.plain`: the loop one writes first: poll, a deque for each block, a score for each event.

Nothing survives it: a crash loses every window, and repeats or loses alerts.
"""

import json
from collections import defaultdict, deque

from confluent_kafka import Consumer, Producer

from consumer.clients import READ_AHEAD
from model.cli import run
from scripts.peers.job import prepared


def main() -> None:
    """Work until told to stop."""
    settings, job, _ = prepared("scripts.peers.plain", "A plain poll loop on the same job.")
    windows: defaultdict[str, deque[int]] = defaultdict(lambda: deque(maxlen=job.window))
    own = {"auto.offset.reset": "earliest", "auto.commit.interval.ms": 1000}
    consumer = Consumer({**READ_AHEAD, **settings.kafka.for_consumer(), **own})  # it reads as fast as ours can
    producer = Producer(settings.kafka.for_producer())
    consumer.subscribe([settings.topics.events])
    fields = settings.events
    while True:
        message = consumer.poll(1.0)
        if message is None or message.error():
            continue
        event = json.loads(message.value())
        window = windows[event[fields.block_id]]
        window.append(job.token(event[fields.event_id]))
        score = job.score(window)
        if score is not None:
            alert = json.dumps({"block_id": event[fields.block_id], "score": score})
            producer.produce(settings.topics.alerts, alert, event[fields.block_id])
        producer.poll(0)


if __name__ == "__main__":
    run(main)
