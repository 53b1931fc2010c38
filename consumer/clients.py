"""Makes clients of Kafka: a setting that librdkafka refuses is named in a sentence."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from consumer.patience import Patience
from consumer.settings import Settings
from model.errors import UserError

log = logging.getLogger("consumer")

CALL_SECONDS = 10.0
"""How long a broker may take to answer a question."""

READ_AHEAD: Mapping[str, Any] = {
    "queued.min.messages": 20_000,  # two batches; 100,000 by default, which take some 450 bytes each beside their own
    "queued.max.messages.kbytes": 16_384,  # if they are long; 64 MB by default
    "fetch.queue.backoff.ms": 20,  # a full queue is left alone for so long; by default a second, and it runs empty
}
"""librdkafka settings, which users may change, of a consumer of events.

On two cores 120,000 events a second became 185,000, by the shorter pause, and memory fell by 30 MB, by the shorter
queue; that alone left 66,000.
"""

Client = TypeVar("Client", Consumer, Producer, AdminClient)


def client(kind: type[Client], settings: Settings, config: Mapping[str, Any], **options: Any) -> Client:
    """Make a client.

    Args:
        kind: its class.
        settings: where a wrong setting in `config` may have come from.
        config: librdkafka's properties.
        options: further arguments of `kind`.

    Raises:
        UserError: librdkafka refuses a setting.
    """
    try:
        return kind(dict(config), **options)
    except KafkaException as error:
        raise _setting_error(settings, error) from None


def member(settings: Settings, patience: Patience, *, defaults: Mapping[str, Any], **own: Any) -> Consumer:
    """Make a member of a consumer group that decides by itself where to read on, and commits in its own way.

    Args:
        settings: where librdkafka's settings of users are.
        patience: hears of trouble.
        defaults: settings that users may change.
        own: settings that they may not, with _ for .

    Raises:
        UserError: librdkafka refuses a setting.
    """
    fixed = {
        "auto.offset.reset": "error",  # never jump in silence
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "isolation.level": "read_committed",
        "partition.assignment.strategy": "cooperative-sticky",
        "error_cb": patience.notice,
    }
    config = {"log_level": 2, **defaults, **settings.kafka.for_consumer(**own), **fixed}
    return client(Consumer, settings, config, logger=log)


def committed_offsets(consumer: Consumer, wanted: Sequence[TopicPartition]) -> list[TopicPartition]:
    """Return the offsets that the group of a consumer has committed.

    Raises:
        KafkaException: no broker tells, of one partition at least.
    """
    found: list[TopicPartition] = consumer.committed(list(wanted), timeout=CALL_SECONDS)
    for place in found:
        if place.error is not None:
            raise KafkaException(place.error)
    return found


def listed(partitions: Iterable[TopicPartition]) -> str:
    """Return the numbers of partitions for people."""
    return ", ".join(str(number) for number in sorted(partition.partition for partition in partitions)) or "none"


def _setting_error(settings: Settings, error: KafkaException) -> UserError:
    """Name the setting for which librdkafka refused to make a client."""
    kafka = settings.kafka
    reason = error.args[0].str().strip()
    for path, section in (
        ("kafka", kafka.common),
        ("kafka.producer", kafka.producer),
        ("kafka.consumer", kafka.consumer),
    ):
        for key, value in section.items():
            try:  # librdkafka may name another property than the user did: linger.ms is an alias to it
                AdminClient({key: value, "log_level": 0})
            except KafkaException as alone:
                if alone.args[0].str().strip() == reason:
                    return UserError(f"{path}.{key}: {reason}; mend or remove this setting")
    return UserError(f"kafka: {reason}; mend this librdkafka setting")
