"""What many open blocks cost: a restart with them, memory for each, the end of all at once; and a flood of garbage."""

import re
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

from consumer.settings import milliseconds
from model.errors import UserError
from model.sessions import Event
from scripts.alerts import TopicReader
from scripts.bench.stage import JOINED, Message, Stage, Trial, committed, send, settled, wait
from scripts.bench.throughput import sessions_of

_START = 1_704_067_200_000
_UNKNOWN = "never seen before"
_FIRST_ALERT_SECONDS = 300.0
_MID_LIFE = 3
"""Events of a block that is in mid-life."""


def restore(stage: Stage, options: Namespace) -> dict[str, Any]:
    """Measure from kill -9 to the first new alert of another process, with that many blocks open."""
    blocks = options.restore_blocks
    trial = stage.trial(checkpoint={"interval": "5s"})
    event = stage.traffic[0].event_id
    opened = (Event(_START + number // 100, f"open-{number % blocks}", event) for number in range(2 * blocks))
    send(trial.settings, stage.messages(opened), f"events of {blocks:,} blocks")
    with stage.consumer(trial) as process:
        settled(trial.settings, process)
        time.sleep(20)  # a checkpoint or two
        resident = process.resident
        process.kill()
        process.wait()
    killed = time.monotonic()
    send(trial.settings, stage.messages([Event(_START + 1_000_000, "probe", _UNKNOWN)]), "a probe")
    with stage.consumer(trial) as process:
        first = _first_alert(trial, b"probe") - killed
        log = process.log.read_text()
    restored = re.findall(r"([\d,]+) open blocks restored in ([\d.]+) s \(([\d.]+) s in Kafka\)", log)
    total = sum(float(seconds) for _, seconds, _ in restored)
    return {
        "open_blocks": sum(int(number.replace(",", "")) for number, _, _ in restored),
        "seconds": total,
        "kafka_share": sum(float(inside) for _, _, inside in restored) / total if total else 0.0,
        "first_alert_after_kill_s": first,
        "session_timeout_s": 6.0,
        "resident_mb": resident / 1e6,
    }


def memory(stage: Stage, options: Namespace) -> dict[str, Any]:
    """Fill a process with open blocks: bytes for each, above what it had with a hundredth of them."""
    return {f"{events}_events": _memory(stage, options.memory_blocks, events) for events in options.memory_events}


def pause(stage: Stage, options: Namespace) -> dict[str, Any]:
    """Let the log go on after a pause that ends all open blocks in mid-life: seconds until all alerts are visible."""
    trial = stage.trial()
    settings, blocks = trial.settings, options.pause_blocks
    lives = [life for life in sessions_of(stage) if len(life) > _MID_LIFE]
    opened = (
        Event(_START, f"open-{block}", lives[block % len(lives)][place])
        for place in range(_MID_LIFE)
        for block in range(blocks)
    )
    late = _START + milliseconds(settings.windows.idle_timeout) + 1
    with stage.consumer(trial) as process, committed(settings) as watch:
        send(settings, stage.messages(opened), f"{_MID_LIFE} events of {blocks:,} blocks")
        settled(settings, process)
        before = peak = process.resident
        send(settings, stage.messages(Event(late, f"late-{n}", lives[0][0]) for n in range(100)), "what comes later")
        total, began = watch.total, time.monotonic()

        def over() -> bool:
            nonlocal peak
            peak = max(peak, process.resident)
            return watch.now >= total

        wait(over, "the end of all blocks")
        seconds = time.monotonic() - began
    alerted = Counter(message.key() for message in _all(trial, settings.topics.alerts))
    return {
        "seconds": seconds,
        "open_blocks": blocks,
        "alerted_blocks": sum(key.startswith(b"open-") for key in alerted),
        "alerts": alerted.total(),
        "resident_mb_before": before / 1e6,
        "resident_mb_at_most": peak / 1e6,
    }


def garbage(stage: Stage, options: Namespace) -> dict[str, Any]:
    """Bury short good blocks in bad messages: all judged, all bad ones in the dead letters, memory flat."""
    trial = stage.trial()
    settings = trial.settings
    good = options.garbage // 10
    random = Random(1)

    def messages(begin: int, end: int) -> Iterator[Message]:
        for number in range(begin, end):
            for _ in range(10):
                yield _junk(random)
            block = f"good-{number}".encode()
            yield block, stage.encode(Event(_START, block.decode(), _UNKNOWN))
            yield block, None  # closes it: what memory then still grows by is a leak

    with stage.consumer(trial) as process:
        wait(lambda: process.said(JOINED), "joining the group")
        send(settings, messages(0, good // 2), "the first half of the flood")
        settled(settings, process)
        before = process.resident
        send(settings, messages(good // 2, good), "the second half")
        settled(settings, process)
        after = process.resident
    alerted = {message.key() for message in _all(trial, settings.topics.alerts)}
    return {
        "bad": 10 * good,
        "good": good,
        "good_alerted": len(alerted),
        "dead_letters": sum(1 for _ in _all(trial, settings.topics.dead_letters)),
        "resident_mb_half_way": before / 1e6,
        "resident_mb_at_end": after / 1e6,
    }


def _memory(stage: Stage, blocks: int, events: int) -> dict[str, float]:
    lives = sessions_of(stage)
    trial = stage.trial()

    def opened(begin: int, end: int) -> Iterator[Event]:
        for number in range(events):
            for block in range(begin, end):
                life = lives[block % len(lives)]
                yield Event(_START, f"open-{block}", life[number % len(life)])

    few = max(1, blocks // 100)
    with stage.consumer(trial) as process:
        send(trial.settings, stage.messages(opened(0, few)), f"{events} events of {few:,} blocks")
        settled(trial.settings, process)
        empty = process.resident
        send(trial.settings, stage.messages(opened(few, blocks)), f"{events} events of {blocks - few:,} more")
        settled(trial.settings, process)
        full = process.resident
    return {
        "bytes_per_block": (full - empty) / (blocks - few),
        "above_empty_mb": (full - empty) / 1e6,
        "empty_mb": empty / 1e6,
        "open_blocks": float(blocks),
    }


def _first_alert(trial: Trial, key: bytes) -> float:
    deadline = time.monotonic() + _FIRST_ALERT_SECONDS
    reader = TopicReader(trial.settings, trial.settings.topics.alerts)
    try:
        while time.monotonic() < deadline:
            message = reader.poll(1)
            if message is not None and message.key() == key:
                return time.monotonic()
    finally:
        reader.close()
    raise UserError(f"no alert within {_FIRST_ALERT_SECONDS:.0f} s of the restart")


def _junk(random: Random) -> Message:
    kind = random.randrange(6)
    if kind == 0:
        return None, random.randbytes(random.randint(0, 300))
    if kind == 1:
        return b"k", b"[" * random.randint(1, 3000)
    if kind == 2:
        return b"k", b'{"block_id":"k","event_id":"e","timestamp":4000000000000}'
    if kind == 3:
        return b"other", b'{"block_id":"k","event_id":"e","timestamp":1}'
    if kind == 4:
        return b"k", b'{"block_id":"","event_id":"e","timestamp":NaN}'
    return None, None


def _all(trial: Trial, topic: str) -> Iterator[Any]:
    reader = TopicReader(trial.settings, topic)
    try:
        while not reader.at_end:
            message = reader.poll(0.5)
            if message is not None:
                yield message
    finally:
        reader.close()
