"""Makes sure that the topics are there before anything is read from or written to them."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, ClusterMetadata, ConfigResource, NewTopic

from consumer.clients import client
from consumer.patience import HOPELESS
from consumer.settings import Settings
from model.errors import UserError

log = logging.getLogger("consumer")

_SECONDS = 10.0
_SAY_AFTER_SECONDS = 3.0
_CONNECT = "socket.connection.setup.timeout.ms"

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
        operation_timeout=_patience(settings),
        request_timeout=_patience(settings),
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
    deadline = time.monotonic() + _patience(settings)
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


def _admin(settings: Settings, hear: Callable[[KafkaError], object] = lambda _: None) -> AdminClient:
    # Trouble is told once, by us, so librdkafka's own log is silenced.
    return client(AdminClient, settings, {**settings.kafka.for_admin(), "log_level": 0, "error_cb": hear})


def _patience(settings: Settings) -> float:
    """Return for how many seconds a broker may be slow before it counts as absent: as long as a connection may take."""
    return float(settings.kafka.for_admin().get(_CONNECT, 30_000)) / 1000


def _cluster(settings: Settings) -> ClusterMetadata:
    """Return what the brokers say of themselves and of every topic; a broker that is starting or slow is waited for."""
    heard: list[KafkaError] = []
    admin = _admin(settings, heard.append)
    left = _patience(settings)
    deadline = time.monotonic() + left
    seconds = _SAY_AFTER_SECONDS
    while left > 0 and not any(error.code() in HOPELESS for error in heard):
        with suppress(KafkaException):
            return admin.list_topics(timeout=min(seconds, left))
        admin.poll(0.1)  # a pause in which the client tells its troubles
        left = deadline - time.monotonic()
        if seconds < left:
            log.warning("no broker answers yet at %s: waiting %.0f s more", settings.kafka.bootstrap, left)
        seconds = left
    reason = f" ({heard[-1].str()})" if heard else ""
    raise UserError(
        f"no broker answers at kafka.bootstrap.servers {settings.kafka.bootstrap}{reason}; "
        "start one with python -m scripts.local_kafka up, or name another"
    )


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
