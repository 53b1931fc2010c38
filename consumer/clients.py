"""Makes clients of Kafka: a setting that librdkafka refuses is named in a sentence."""

from collections.abc import Mapping
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaException, Producer
from confluent_kafka.admin import AdminClient

from consumer.settings import Settings
from model.errors import UserError

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
