"""Makes sure that the topics are there before anything is read from or written to them."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AclOperation, AdminClient, ClusterMetadata, ConfigResource, NewTopic

from consumer.clients import client
from consumer.patience import HOPELESS
from consumer.refusals import with_remedy
from consumer.settings import Settings, milliseconds
from model.errors import UserError

log = logging.getLogger("consumer")

_SECONDS = 10.0
_TRY_SECONDS = 1.0
_SAY_AFTER_SECONDS = 3.0
_CONNECT = "socket.connection.setup.timeout.ms"

_REFUSED = HOPELESS | {KafkaError._SSL}  # noqa: SLF001 - librdkafka's own
"""Not worth another try by a process that has not started yet. One that runs waits until a certificate is renewed."""


READ, WRITE = AclOperation.READ, AclOperation.WRITE

STATE_CONFIG = {"cleanup.policy": "compact", "min.cleanable.dirty.ratio": "0.2", "segment.ms": "600000"}
"""Of the state topic: small segments, so that outdated records go soon and restoring stays quick."""

_STAMPS = "message.timestamp.type"

SOURCE_CONFIG = {_STAMPS: "LogAppendTime"}
"""Of the topic of events: the brokers stamp messages, since `windows.max_ahead` tells a bad clock by the message's own
time, which its sender would have from the same clock. Lines that are re-keyed keep their senders' stamps, which put
those of one second in order; their events are stamped anew."""


@dataclass(frozen=True)
class TopicSpec:
    """A topic that must exist; `partitions` and `config` matter when it is created.

    Without a `config` it is made as its part under `topics` wants it.
    """

    name: str
    partitions: int | None = None
    config: Mapping[str, str] | None = None


def ensure_topics(settings: Settings, specs: Iterable[TopicSpec], *, then: Iterable[str] = ()) -> list[str]:
    """Create the topics that are missing and return their names; leave existing ones as they are.

    `then` are those that will be wanted next: where none may be created, all that are missing are named at once.

    Raises:
        UserError: no broker answers, a topic is missing and `topics.create` is false, or Kafka refuses.
    """
    wanted = list(specs)
    cluster = _cluster(settings)
    missing = [spec for spec in wanted if spec.name not in cluster.topics]
    absent = [name for name in (*(spec.name for spec in wanted), *then) if name not in cluster.topics]
    if absent and not settings.topics.create:
        raise UserError(
            f"missing topics: {', '.join(absent)}; create them, or set topics.create: true; if they are there, "
            "the user may not see them (docs/security.md)"
        )
    if not missing:
        return []
    admin = _admin(settings)  # must live until its futures are done
    if _is_mock(cluster):
        for spec in missing:  # librdkafka's mock knows no request to create a topic: it does so when asked about one
            admin.list_topics(spec.name, timeout=_SECONDS)
        return [spec.name for spec in missing]
    futures = admin.create_topics(
        [
            NewTopic(
                spec.name,
                spec.partitions or settings.topics.partitions,
                settings.topics.replication_factor,
                config=dict(_wanted(settings, spec.name) if spec.config is None else spec.config),
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
            code = error.args[0].code()
            if code == KafkaError.TOPIC_AUTHORIZATION_FAILED:  # brokers hide topics from those who may not see them
                raise UserError(
                    f"the user may neither see nor create topic {name}; create it and give the user its rights on it "
                    "(docs/security.md)"
                ) from None
            if code != KafkaError.TOPIC_ALREADY_EXISTS:  # another instance was faster
                raise UserError(
                    f"topic {name} cannot be created: {error.args[0].str()}; see to the settings under topics"
                ) from None
    deadline = time.monotonic() + _patience(settings)
    while any(spec.name not in _cluster(settings).topics for spec in missing) and time.monotonic() < deadline:
        time.sleep(0.1)  # a busy broker says that a topic is created before it tells of it
    return created


def _wanted(settings: Settings, name: str) -> Mapping[str, str]:
    return {settings.topics.events: SOURCE_CONFIG, settings.topics.state: STATE_CONFIG}.get(name, {})


def require_topic(settings: Settings, name: str) -> int:
    """Return the number of partitions of a topic.

    Raises:
        UserError: no broker answers, or there is no such topic.
    """
    topics = _cluster(settings).topics
    if name not in topics:
        raise UserError(f"there is no topic {name} at {settings.kafka.bootstrap}; has the consumer been started?")
    return len(topics[name].partitions)


def _is_mock(cluster: ClusterMetadata) -> bool:
    return (cluster.cluster_id or "").startswith("mockCluster")


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
    began, patience = time.monotonic(), _patience(settings)
    seconds, waited, said = _TRY_SECONDS, 0.0, False
    while waited < patience:
        with suppress(KafkaException):
            return admin.list_topics(timeout=min(seconds, patience - waited))
        seconds *= 2  # a broker may be slower than one try, but a refusal is to be heard soon
        admin.poll(0.1)  # a pause in which the client tells its troubles
        for error in heard:
            if error.code() in _REFUSED:
                raise UserError(f"kafka: {with_remedy(error)}")
        waited = time.monotonic() - began
        if _SAY_AFTER_SECONDS < waited < patience and not said:
            said = True
            where = settings.kafka.bootstrap
            log.warning("no broker answers yet at %s: waiting %.0f s more", where, patience - waited)
    reasons = [error.str() for error in heard if error.code() != KafkaError._ALL_BROKERS_DOWN]  # noqa: SLF001
    reason = f" ({reasons[-1]})" if reasons else ""
    raise UserError(
        f"no broker answers at kafka.bootstrap.servers {settings.kafka.bootstrap}{reason}; start one with "
        "python -m scripts.local_kafka up, name another, or see to kafka.security.protocol"
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


def warn_of_senders_clocks(settings: Settings, name: str) -> None:
    """Warn of a topic whose messages may be stamped with any time by their senders; silent where that cannot be asked.

    Brokers may also refuse what is stamped from the future, as Kafka does by default since 4.0.
    """
    if _is_mock(_cluster(settings)):
        return  # it knows no such question
    resource = ConfigResource(ConfigResource.Type.TOPIC, name)
    admin = _admin(settings)
    try:
        config = admin.describe_configs([resource], request_timeout=_SECONDS)[resource].result()
    except KafkaException:
        return
    stamps, ahead = config.get(_STAMPS), config.get("message.timestamp.after.max.ms")
    refuses = ahead is not None and int(ahead.value) <= milliseconds(settings.windows.max_ahead)
    if stamps is not None and stamps.value != SOURCE_CONFIG[_STAMPS] and not refuses:
        log.warning(
            "topic %s has %s=%s: a sender whose clock is wrong stamps its messages wrong, too, so windows.max_ahead "
            "does not see it, and one event from the future closes every open block of its partition; let the brokers "
            "stamp them: kafka-configs.sh --bootstrap-server %s --alter --topic %s --add-config %s=%s",
            name, _STAMPS, stamps.value, settings.kafka.bootstrap, name, _STAMPS, SOURCE_CONFIG[_STAMPS],
        )  # fmt: skip


def check_rights(settings: Settings, needed: Mapping[str, set[AclOperation]]) -> None:
    """Make sure that the user may do with each topic what the process will do, before it is in the middle of it.

    Raises:
        UserError: rights are missing; the message names all of them.
    """
    if _is_mock(_cluster(settings)):
        return  # it knows no such question
    admin = _admin(settings)
    asked = admin.describe_topics(
        TopicCollection(list(needed)), include_authorized_operations=True, request_timeout=_SECONDS
    )
    missing = []
    for name, future in asked.items():
        try:
            allowed = future.result().authorized_operations
        except KafkaException as error:
            log.warning("cannot check the rights on topic %s: %s", name, error.args[0].str())
            continue
        if allowed:  # a broker that knows of no rights says nothing
            lacking = sorted(operation.name.capitalize() for operation in needed[name] - set(allowed))
            missing += [f"{operation} on {name}" for operation in lacking]
    if missing:
        raise UserError(f"the user lacks rights on topics: {', '.join(missing)}; grant them (docs/security.md)")
