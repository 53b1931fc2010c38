"""Makes sure that the topics are there before anything is read from or written to them."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, ClusterMetadata, ConfigResource, NewTopic

from consumer.settings import Settings
from model.errors import UserError

log = logging.getLogger("consumer")

_SECONDS = 10.0


STATE_CONFIG = {"cleanup.policy": "compact", "min.cleanable.dirty.ratio": "0.2", "segment.ms": "600000"}
"""Of the state topic: small segments, so that outdated records go soon and restoring stays quick."""


@dataclass(frozen=True)
class TopicSpec:
    """A topic that must exist; `partitions` and `config` matter when it is created."""

    name: str
    partitions: int | None = None
    config: Mapping[str, str] = field(default_factory=dict)


def ensure_topics(settings: Settings, specs: Iterable[TopicSpec]) -> list[str]:
    """Create the topics that are missing and return their names; leave existing ones as they are.

    Raises:
        UserError: no broker answers, a topic is missing and `topics.create` is false, or Kafka refuses.
    """
    wanted = list(specs)
    cluster = _cluster(settings)
    missing = [spec for spec in wanted if spec.name not in cluster.topics]
    if not missing:
        return []
    names = ", ".join(spec.name for spec in missing)
    if not settings.topics.create:
        raise UserError(f"missing topics: {names}; create them, or set topics.create: true")
    admin = _admin(settings)  # must live until its futures are done
    if (cluster.cluster_id or "").startswith("mockCluster"):
        for spec in missing:  # librdkafka's mock knows no request to create a topic: it does so when asked about one
            admin.list_topics(spec.name, timeout=_SECONDS)
        return [spec.name for spec in missing]
    futures = admin.create_topics(
        [
            NewTopic(
                spec.name,
                spec.partitions or settings.topics.partitions,
                settings.topics.replication_factor,
                config=dict(spec.config),
            )
            for spec in missing
        ],
        operation_timeout=_SECONDS,
        request_timeout=_SECONDS,
    )
    created = []
    for name, future in futures.items():
        try:
            future.result()
            created.append(name)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:  # another instance was faster
                raise UserError(
                    f"topic {name} cannot be created: {error.args[0].str()}; see to the settings under topics"
                ) from None
    deadline = time.monotonic() + _SECONDS
    while any(spec.name not in _cluster(settings).topics for spec in missing) and time.monotonic() < deadline:
        time.sleep(0.1)  # a busy broker says that a topic is created before it tells of it
    return created


def require_topic(settings: Settings, name: str) -> int:
    """Return the number of partitions of a topic.

    Raises:
        UserError: no broker answers, or there is no such topic.
    """
    topics = _cluster(settings).topics
    if name not in topics:
        raise UserError(f"there is no topic {name} at {settings.kafka.bootstrap}; has the consumer been started?")
    return len(topics[name].partitions)


def setting_error(settings: Settings, error: KafkaException) -> UserError:
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


def _admin(settings: Settings, hear: Callable[[KafkaError], object] = lambda _: None) -> AdminClient:
    try:
        # Trouble is told once, by us, so librdkafka's own log is silenced.
        return AdminClient({**settings.kafka.for_admin(), "log_level": 0, "error_cb": hear})
    except KafkaException as error:
        raise setting_error(settings, error) from None


def _cluster(settings: Settings) -> ClusterMetadata:
    """Return what the brokers say of themselves and of every topic."""
    heard: list[KafkaError] = []
    admin = _admin(settings, heard.append)
    try:
        return admin.list_topics(timeout=_SECONDS)
    except KafkaException:
        reason = f" ({heard[-1].str()})" if heard else ""
        raise UserError(
            f"no broker answers at kafka.bootstrap.servers {settings.kafka.bootstrap}{reason}; "
            "start one with python -m scripts.local_kafka up, or name another"
        ) from None


def check_state_topic(settings: Settings) -> None:
    """Make sure that the state topic fits the event topic.

    Raises:
        UserError: its partitions are not as many, or it is not compacted.
    """
    events, state = settings.topics.events, settings.topics.state
    many, there = require_topic(settings, events), require_topic(settings, state)
    if many != there:
        raise UserError(
            f"topic {events} has {many} partitions and {state} has {there}: they must be as many, since the windows "
            f"of a partition are stored in the partition of the same number; add partitions to {state}, or name "
            "another one in topics.state to start with empty windows"
        )
    admin = _admin(settings)
    resource = ConfigResource(ConfigResource.Type.TOPIC, state)
    try:
        policy = admin.describe_configs([resource], request_timeout=_SECONDS)[resource].result()["cleanup.policy"].value
    except KafkaException as error:
        log.warning("cannot check that topic %s is compacted: %s", state, error.args[0].str())
        return
    if policy != "compact":
        raise UserError(
            f"topic {state} has cleanup.policy={policy}: windows of long-lived blocks would be lost; set it to compact"
        )
