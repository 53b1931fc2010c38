"""What the consumer says while it runs: lines for people, or JSON objects for whatever collects them."""

import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pythonjsonlogger.json import JsonFormatter

from consumer.metrics import Status
from consumer.settings import Settings

LogFormat = Literal["text", "json"]
FORMATS: tuple[LogFormat, ...] = ("text", "json")

log = logging.getLogger("consumer")


def set_up(form: LogFormat) -> None:
    """Send all log lines to standard error: librdkafka's, too, and as JSON also warnings and the last traceback."""
    formatter = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    if form == "json":
        formatter = JsonFormatter(
            "{levelname}{name}{message}",
            style="{",
            rename_fields={"levelname": "level", "name": "logger"},
            timestamp=True,
        )
        logging.captureWarnings(capture=True)
        sys.excepthook = lambda *what: log.critical("ended by a mistake of its own", exc_info=what)
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def printable(text: str) -> str:
    """Return what anyone may have written so that no terminal takes it for more than text, and no log for a line."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def changed(settings: Settings) -> str:
    """Return the settings that are not the defaults, but for those of Kafka's clients, which may be secrets."""
    ours, defaults = (dict(_flat(one.model_dump(exclude={"kafka"}))) for one in (settings, Settings()))
    return ", ".join(f"{name} {value}" for name, value in ours.items() if defaults.get(name) != value) or "none"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def minute(before: Status, now: Status, seconds: float) -> tuple[str, dict[str, float]]:
    """Return what happened between two statuses, `seconds` apart, as a line for people and as numbers."""
    messages = now.counts["messages"] - before.counts.get("messages", 0)
    alerts = _risen(before.alerts, now.alerts)
    dead = _risen(before.dead_letters, now.dead_letters)
    lag = sum(partition.lag or 0 for partition in now.partitions.values())
    catch_up = sum(partition.catch_up for partition in now.partitions.values())
    open_blocks = sum(partition.open_blocks for partition in now.partitions.values())
    parts = [
        f"{messages:,} messages ({messages / seconds:,.0f}/s)",
        f"{sum(alerts.values()):,} alerts{_named(alerts)}",
        *([f"{sum(dead.values()):,} dead letters{_named(dead)}"] if dead else []),
        f"lag {lag:,}",
        *([f"{catch_up:,} to catch up"] if catch_up else []),
        f"{open_blocks:,} open blocks in {len(now.partitions)} partitions",
    ]
    numbers = {
        "messages": messages,
        "messages_per_second": round(messages / seconds, 1),
        "alerts": sum(alerts.values()),
        "dead_letters": sum(dead.values()),
        "lag": lag,
        "catch_up": catch_up,
        "open_blocks": open_blocks,
        "partitions": len(now.partitions),
    }
    return ", ".join(parts), numbers


def _risen(before: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    return {name: count - before.get(name, 0) for name, count in now.items() if count > before.get(name, 0)}


def _named(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{count:,} {name}' for name, count in counts.items())})" if counts else ""
