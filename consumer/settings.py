"""The whole of config.yaml as typed values."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from model.config import Device, Duration, ModelSettings, Section, Strategy, TrainingSettings, load
from model.config import EventSettings as EventSettings  # noqa: PLC0414 - of these settings, too

OURS = {
    "enable.auto.commit": "offsets are committed only after their alerts",
    "enable.auto.offset.store": "offsets are committed only after their alerts",
    "enable.partition.eof": "the consumer decides",
    "isolation.level": "recovery needs to know what is committed",
    "transactional.id": "every process has its own",
    "enable.idempotence": "delivery needs it",
    "partition.assignment.strategy": "the consumer needs cooperative-sticky",
}
"""librdkafka settings that the consumer's promises rest on, and why they cannot be changed."""

Scalar = str | int | float | bool


class KafkaSettings(Section):
    """`kafka:` — librdkafka settings: at this level for every client, below `consumer`/`producer` for one."""

    common: dict[str, Scalar] = Field(default={}, repr=False)
    consumer: dict[str, Scalar] = Field(default={}, repr=False)
    producer: dict[str, Scalar] = Field(default={}, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        consumer, producer = (value.get(part) or {} for part in ("consumer", "producer"))
        common = {key: item for key, item in value.items() if key not in ("consumer", "producer")}
        for section in (common, consumer, producer):
            if not isinstance(section, dict):
                raise ValueError("consumer and producer should be mappings of librdkafka settings")  # noqa: TRY004
            for key, item in section.items():
                if not isinstance(item, Scalar):
                    raise ValueError(f"{key} should be text, a number or true/false")  # noqa: TRY004
        group = {"group.id": common.pop("group.id", "log-anomaly-transformer")}  # only consumers have one
        return {
            "common": {"bootstrap.servers": "localhost:9092"} | common,
            "consumer": group | consumer,
            "producer": producer,
        }

    @model_validator(mode="after")
    def _checked(self) -> "KafkaSettings":
        for section in (self.common, self.consumer, self.producer):
            for key, why in OURS.items():
                if key in section:
                    raise ValueError(f"{key} cannot be set: {why}; remove it")
        if not self.common.get("bootstrap.servers"):
            raise ValueError("bootstrap.servers is missing: name a broker such as localhost:9092")
        if not self.group:
            raise ValueError("consumer.group.id is missing: name the consumer group")
        return self

    @property
    def bootstrap(self) -> str:
        """The brokers' addresses."""
        return str(self.common["bootstrap.servers"])

    @property
    def group(self) -> str:
        """The consumer group's id."""
        return str(self.consumer.get("group.id", ""))

    @property
    def begins_at_end(self) -> bool:
        """Whether a group without offsets begins at the end of a topic."""
        return str(self.for_consumer().get("auto.offset.reset", "earliest")) in {"latest", "largest", "end"}

    def for_consumer(self, **own: Scalar) -> dict[str, Scalar]:
        """Return a consumer's configuration; `own` (with _ for .) comes last."""
        return {**self.common, **self.consumer, **_dotted(own)}

    def for_producer(self, **own: Scalar) -> dict[str, Scalar]:
        """Return a producer's configuration; `own` (with _ for .) comes last."""
        return {**self.common, **self.producer, **_dotted(own)}

    def for_admin(self) -> dict[str, Scalar]:
        """Return an admin client's configuration."""
        return dict(self.common)


def _dotted(own: dict[str, Scalar]) -> dict[str, Scalar]:
    return {key.replace("_", "."): value for key, value in own.items()}


TopicName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9._-]{1,249}$")]


class TopicSettings(Section):
    """`topics:` — where lines and events come from and where alerts go."""

    lines: TopicName = "log-lines"
    events: TopicName = "log-events"
    alerts: TopicName = "log-anomaly-alerts"
    dead_letters: TopicName = "log-anomaly-dead-letters"
    state: TopicName = "log-anomaly-state"
    create: bool = True
    partitions: int = Field(default=6, ge=1, le=10_000)
    replication_factor: int = Field(default=1, ge=1, le=32)

    @model_validator(mode="after")
    def _distinct(self) -> "TopicSettings":
        if len({self.lines, self.events, self.alerts, self.dead_letters, self.state}) < 5:
            raise ValueError("lines, events, alerts, dead_letters and state should be five different topics")
        return self


class ScoringSettings(Section):
    """`scoring:` — when a block is looked at and how looks are batched."""

    every: int = Field(default=1, ge=1, le=1_000_000)
    cache_windows: int = Field(default=1_000_000, ge=1, le=1_000_000_000)
    max_batch: int = Field(default=10_000, ge=1, le=1_000_000)
    max_wait: Duration = timedelta(milliseconds=50)


class WindowSettings(Section):
    """`windows:` — when a block is over."""

    idle_timeout: Duration = timedelta(hours=24)
    max_open_blocks: int = Field(default=1_000_000, ge=1, le=2**31 - 1)
    max_ahead: Duration = timedelta(hours=1)


BASE_LEVEL = "minor"
"""Severity of a score above the threshold and above no further level."""

LevelName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,32}$")]


class CalibrationSettings(Section):
    """`calibration:` — where normal ends."""

    path: Annotated[Path, Field(strict=False)] = Path("artifacts/threshold.json")
    strategy: Strategy = "max"
    quantile: float = Field(default=0.95, gt=0, lt=1)
    levels: dict[LevelName, Annotated[float, Field(gt=0, lt=1)]] = Field(default={"major": 0.99, "critical": 0.999})

    @model_validator(mode="after")
    def _distinct(self) -> "CalibrationSettings":
        if BASE_LEVEL in self.levels:
            raise ValueError(f"{BASE_LEVEL} is the level of calibration.quantile; give this one another name")
        if len(set(self.levels.values())) < len(self.levels):
            raise ValueError("two levels have the same quantile; remove one of them")
        return self


class CommitSettings(Section):
    """`commit:` — how often work becomes durable."""

    interval: Duration = timedelta(milliseconds=100)


class CheckpointSettings(Section):
    """`checkpoint:` — how often open windows are stored."""

    interval: Duration = timedelta(seconds=30)


class DriftSettings(Section):
    """`drift:` — when the threshold no longer means what it says."""

    enabled: bool = True
    failing_share: float = Field(default=0.05, ge=0, lt=1)
    batch: int = Field(default=250, ge=1, le=1_000_000)
    false_alarm_every: int = Field(default=1_000_000, ge=100)


class MetricsSettings(Section):
    """`metrics:` — where Prometheus finds what the consumer does."""

    listen: Annotated[str, Field(pattern=r"^[^:\s]+:\d{1,5}$")] | None = None


class ReloadSettings(Section):
    """`reload:` — how often to look for a new model or threshold."""

    interval: Duration = timedelta(seconds=5)


TRANSACTION_MS = 10_000
"""Default of librdkafka's transaction.timeout.ms.

A successor waits until a dead process's transaction has timed out, so this bounds the pause after kill -9.
"""

Delivery = Literal["exactly_once", "at_least_once"]
"""Whether alerts, windows and input offsets go through one transaction."""


class Settings(Section):
    """Everything in config.yaml."""

    kafka: KafkaSettings = KafkaSettings()
    topics: TopicSettings = TopicSettings()
    events: EventSettings = EventSettings()
    device: Device = "auto"
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    scoring: ScoringSettings = ScoringSettings()
    windows: WindowSettings = WindowSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    delivery: Delivery = "exactly_once"
    commit: CommitSettings = CommitSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    drift: DriftSettings = DriftSettings()
    reload: ReloadSettings = ReloadSettings()
    metrics: MetricsSettings = MetricsSettings()

    @model_validator(mode="after")
    def _in_time(self) -> "Settings":
        if self.delivery == "exactly_once":
            timeout = self.kafka.for_producer().get("transaction.timeout.ms", TRANSACTION_MS)
            interval = milliseconds(self.commit.interval)
            if str(timeout).isdecimal() and 2 * interval > int(timeout):
                raise ValueError(
                    f"commit.interval is {interval:,} ms, but a transaction is over after {int(timeout):,}: make it "
                    "half of that at most, or set kafka.producer.transaction.timeout.ms"
                )
        return self


def milliseconds(duration: timedelta) -> int:
    """Return a duration in whole milliseconds."""
    return round(duration.total_seconds() * 1000)


def load_settings(path: Path) -> Settings:
    """Read config.yaml whole.

    Raises:
        UserError: as `model.config.load`.
    """
    return load(path, Settings)
