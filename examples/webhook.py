"""Posts each alert to a URL, and commits it once the receiver has taken it.

So no alert is lost, whatever is killed; one may come twice, under the same Idempotency-Key.

    python examples/webhook.py --brokers localhost:9092 --url https://example.org/hooks/alerts --severity major critical

A receiver that is away or busy is tried again, for as long as it takes. One that refuses (400, 401, 404 …) or is
elsewhere now (301, 302 …) ends the program with status 2: that takes a person. Brokers that are away are waited for,
too. Needs nothing of this project, only confluent-kafka.
"""

import argparse
import json
import os
import signal
import sys
import time
from contextlib import closing
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

SECONDS = 10.0  # that an answer may take
PAUSES = (0.5, 1, 2, 5, 10, 30)  # between tries; the last one from then on
BUSY = {408, 425, 429}  # client errors that pass
SAY_SECONDS = 30.0  # between two lines about brokers that are away


class NoRedirects(HTTPRedirectHandler):
    """Followed, a redirect would get the token, and a GET instead of the alert: it counts as a refusal."""

    def redirect_request(self, *_: object) -> None:
        """Go nowhere."""


opener = build_opener(NoRedirects)


def main() -> int:
    """Deliver until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(description="Post each alert to a URL.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--brokers", default="localhost:9092")
    parser.add_argument("--topic", default="log-anomaly-alerts")
    parser.add_argument("--group", default="alert-webhook")
    parser.add_argument("--severity", nargs="+", help="only alerts of these severities")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="for librdkafka")
    arguments = parser.parse_args()
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopped.append(number))

    try:
        check(arguments.url)
        read(arguments, stopped)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KafkaException as error:
        print(f"error: {reason(error.args[0], arguments)}", file=sys.stderr)
        return 2
    except PermissionError as refusal:
        print(f"error: the receiver refuses: {refusal}; mend that and start again", file=sys.stderr)
        return 2
    return 0


def token() -> str:
    """Return the bearer token, without the end of line that a file puts behind it; empty if there is none."""
    return os.environ.get("WEBHOOK_TOKEN", "").strip()


def check(url: str) -> None:
    """Make sure that something can be posted there.

    Raises:
        ValueError: it is no address, or the token is none.
    """
    try:
        parts = urlsplit(url)
        whole = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port, for one
        whole = False
    if not whole or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"--url {url} is no address to post to; write it as https://example.org/hooks/alerts")
    if parts.username is not None:
        raise ValueError("--url holds a login, which is not sent; put a token into WEBHOOK_TOKEN instead")
    if not token().isascii() or not token().isprintable():
        raise ValueError("WEBHOOK_TOKEN holds what no header may; write only the token into it, on one line")


def read(arguments: argparse.Namespace, stopped: list[int]) -> None:
    """Deliver alerts until told to stop.

    Raises:
        KafkaException: waiting would not mend it.
        PermissionError: the receiver refuses.
    """
    with closing(member(arguments)) as consumer:
        consumer.subscribe([arguments.topic])
        while not stopped:
            message = consumer.poll(0.5)
            if message is None:
                continue
            if message.error():
                raise KafkaException(message.error())
            alert = json.loads(message.value())
            wanted = not arguments.severity or alert["severity"] in arguments.severity
            if not wanted or deliver(consumer, arguments.url, alert, message.value(), stopped):
                commit(consumer, message)


def deliver(consumer: Consumer, url: str, alert: dict, body: bytes, stopped: list[int]) -> bool:
    """Post an alert until it is taken; return False if told to stop before."""
    tries = 0
    while not stopped:
        trouble = post(url, body, f"{alert['alert_id']}.{alert['revision']}")
        if trouble is None:
            return True
        print(f"{alert['block_id']}: {trouble}; trying again", file=sys.stderr, flush=True)
        wait(consumer, PAUSES[min(tries, len(PAUSES) - 1)], stopped)
        tries += 1
    return False


def post(url: str, body: bytes, key: str) -> str | None:
    """Post an alert; return None when it was taken, and otherwise why it should be tried again.

    Raises:
        PermissionError: it would be refused again.
    """
    headers = {"Content-Type": "application/json", "Idempotency-Key": key}
    if token():
        headers["Authorization"] = f"Bearer {token()}"
    try:
        with opener.open(Request(url, body, headers), timeout=SECONDS):
            return None
    except HTTPError as error:
        if error.code < 500 and error.code not in BUSY:
            raise PermissionError(f"{error.code} {error.reason}") from None
        return f"{error.code} {error.reason}"
    except (OSError, HTTPException) as error:
        return str(error)


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
    except KafkaException as error:  # the partition went to another member, which will deliver it once more
        print(f"not committed: {error.args[0].str()}", file=sys.stderr, flush=True)


def wait(consumer: Consumer, seconds: float, stopped: list[int]) -> None:
    """Wait as a member of the group: one that does not poll for five minutes is put out of it.

    Raises:
        KafkaException: waiting would not mend it.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end and not stopped:
        consumer.pause(consumer.assignment())  # each time: what a member that leaves hands over is not paused
        message = consumer.poll(0.1)
        if message is None:
            continue
        if message.error():
            raise KafkaException(message.error())
        consumer.seek(TopicPartition(message.topic(), message.partition(), message.offset()))  # its turn comes later
    consumer.resume(consumer.assignment())


if __name__ == "__main__":
    sys.exit(main())
