"""Kafka refuses a connection, a login or a right: librdkafka says what is wrong, this adds what to do about it."""

import re
from collections.abc import Mapping

from confluent_kafka import KafkaError

_LOGIN = "see to sasl.mechanism, sasl.username and sasl.password under kafka"

_REMEDIES: Mapping[int, str] = {
    KafkaError._SSL: "see to security.protocol and ssl.ca.location under kafka",  # noqa: SLF001 - librdkafka's own
    KafkaError._AUTHENTICATION: _LOGIN,  # noqa: SLF001
    KafkaError.SASL_AUTHENTICATION_FAILED: _LOGIN,
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "give the user its rights on this topic (docs/security.md)",
    KafkaError.GROUP_AUTHORIZATION_FAILED: (
        "give the user Read on the group kafka.consumer.group.id, with -rekey at its end for --rekey (docs/security.md)"
    ),
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: (
        "give the user Write on transactional ids that begin with kafka.consumer.group.id, or set "
        "delivery: at_least_once (docs/security.md)"
    ),
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "give the user Create on the cluster, or set topics.create: false",
}

_STATE = re.compile(r" \(after \d+ ?ms[^)]*\)")  # of the connection: means nothing to whoever has to mend it


def with_remedy(error: KafkaError) -> str:
    """Return what is wrong and, where it is a refusal, what to do about it."""
    said = _STATE.sub("", error.str()).rstrip(". ")
    remedy = _REMEDIES.get(error.code())
    return f"{said}; {remedy}" if remedy else said
