"""`python -m scripts.bench.load`: sends prepared messages at a steady rate, from a process of its own.

It prints `ready`, waits for a line on standard input, sends, and prints the rate that it kept.
"""

import sys
import time
from pathlib import Path

import msgspec
from confluent_kafka import Producer

from consumer.settings import load_settings
from model.cli import argument_parser, run

_SLICE_SECONDS = 0.005


def main() -> None:
    """Send what the file holds."""
    parser = argument_parser("scripts.bench.load", "Send prepared messages at a steady rate.")
    parser.add_argument("file", type=Path, help="MessagePack: a list of pairs of key and value")
    parser.add_argument("--rate", type=float, required=True, help="messages a second")
    arguments = parser.parse_args()
    settings = load_settings(arguments.config)
    topic = settings.topics.events
    messages = msgspec.msgpack.decode(arguments.file.read_bytes(), type=list[tuple[bytes, bytes]])
    producer = Producer(
        settings.kafka.for_producer()
        | {"linger.ms": 5, "queue.buffering.max.messages": 1_000_000, "delivery.report.only.error": True}
    )
    produce = producer.produce
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.monotonic()
    sent = 0
    while sent < len(messages):
        due = min(len(messages), int((time.monotonic() - started + _SLICE_SECONDS) * arguments.rate))
        for key, value in messages[sent:due]:
            produce(topic, value, key)
        sent = max(sent, due)
        producer.poll(0)
        time.sleep(_SLICE_SECONDS)
    seconds = time.monotonic() - started
    producer.flush(60)
    print(f"{sent / seconds:.0f}", flush=True)


if __name__ == "__main__":
    run(main)
