"""Events a second: the ceiling, and the consumer with and without its cache, in instances, with many open blocks."""

import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from random import Random
from typing import Any

from consumer.clients import READ_AHEAD
from model.cli import console
from model.sessions import Event
from scripts.bench.stage import JOINED, Drain, Message, Stage, bare_loop, drained, send

_START = 1_704_067_200_000


def pipeline(stage: Stage, options: Namespace) -> dict[str, Any]:
    """Run the bare loop, then the consumer with both deliveries, from the same topic; the cache is empty at first.

    Warm is the second half of the topic. The ceiling is the better of two bare loops, before and after: a broker gets
    quicker with what it does.
    """
    before = _ceiling(stage, options.events)
    untuned = bare_loop(stage.trial(events_topic=stage.stream(options.events)).settings, {})
    drain = _drain(stage, options.events, delivery="exactly_once")
    exactly_once, warm = drain.rate(), drain.rate(options.events // 2)
    at_least_once = _drain(stage, options.events, delivery="at_least_once").rate()
    ceiling = stage.known["ceiling"] = max(before, _bare_loop(stage, options.events))
    stage.known["pipeline_eps"] = exactly_once
    return {
        "pipeline_ratio": exactly_once / ceiling,
        "pipeline_warm_ratio": warm / ceiling,
        "at_least_once_ratio": at_least_once / ceiling,
        "consume_ceiling_eps": ceiling,
        "consume_untuned_eps": untuned,
        "pipeline_eps": exactly_once,
        "pipeline_warm_eps": warm,
        "at_least_once_eps": at_least_once,
        "messages": options.events,
    }


def cold(stage: Stage, options: Namespace) -> dict[str, Any]:
    """Run the same without the cache of scores: whatever windows a batch has go through the network."""
    ceiling = _ceiling(stage, options.events)
    rate = _drain(stage, options.events, sections={"scoring": {"cache_windows": 1}}).rate()
    return {"ratio": rate / ceiling, "eps": rate}


def instances(stage: Stage, options: Namespace) -> dict[str, Any]:
    """Let several consumer processes share the topic; the second half of it counts, when all are at work."""
    found = {}
    for number in options.instances:
        trial = stage.trial(events_topic=stage.stream(options.events))
        with ExitStack() as running:
            processes = [running.enter_context(stage.consumer(trial)) for _ in range(number)]
            found[str(number)] = drained(trial.settings, processes[0]).rate(options.events // 2)
            joined = sum(JOINED in process.log.read_text() for process in processes)
        if joined < number:
            console.print(f"only {joined} of {number} instances had partitions: use more --events")
    numbers = list(found)
    return {"ratio": found[numbers[-1]] / found[numbers[0]], "eps": found}


def open_blocks(stage: Stage, options: Namespace) -> dict[str, Any]:
    """Send events to blocks that are open already, in no order: few of them, and many."""
    found = {}
    for blocks in sorted(options.open_blocks):
        trial = stage.trial()
        opening = 2 * blocks
        send(trial.settings, _scattered(stage, blocks, options.events), f"events of {blocks:,} open blocks")
        with stage.consumer(trial) as process:
            found[str(blocks)] = drained(trial.settings, process).rate(opening + options.events // 10)
    numbers = list(found)
    return {"ratio": found[numbers[-1]] / found[numbers[0]], "eps": found}


def hdfs_v1(stage: Stage, options: Namespace) -> dict[str, Any]:
    """Replay as much as Loghub's HDFS_v1 has, 11.2 million events, so close together that no block ever closes."""
    blocks = len({event.block_id for event in stage.traffic})
    turns = max(1, options.hdfs_blocks // blocks)
    trial = stage.trial(sections={"topics": {"partitions": 6}})
    send(trial.settings, _crowded(stage, turns), f"{turns * len(stage.traffic):,} messages")
    began = time.monotonic()
    with stage.consumer(trial) as process:
        rate = drained(trial.settings, process).rate()
        seconds = time.monotonic() - began
        resident = process.resident
    return {
        "seconds": seconds,
        "eps": rate,
        "events": turns * len(stage.traffic),
        "blocks": turns * blocks,
        "resident_mb": resident / 1e6,
    }


def _ceiling(stage: Stage, events: int) -> float:
    if "ceiling" not in stage.known:
        stage.known["ceiling"] = _bare_loop(stage, events)
    return float(stage.known["ceiling"])


def _bare_loop(stage: Stage, events: int) -> float:
    return bare_loop(stage.trial(events_topic=stage.stream(events)).settings, READ_AHEAD)


def _drain(stage: Stage, events: int, **changes: Any) -> Drain:
    trial = stage.trial(events_topic=stage.stream(events), **changes)
    with stage.consumer(trial) as process:
        return drained(trial.settings, process)


def _scattered(stage: Stage, blocks: int, events: int) -> Iterator[Message]:
    """Yield two events of each block, then `events` of random ones; one that is over makes room for another."""
    lives = sessions_of(stage)
    random = Random(1)
    at = bytearray(blocks)  # events so far
    names = list(range(blocks))  # which block is in a place

    def event(place: int) -> Event:
        life = lives[names[place] % len(lives)]
        at[place] += 1
        return Event(_START, f"open-{names[place]}", life[at[place] - 1])

    def more() -> Iterator[Message]:
        last = blocks - 1
        for _ in range(events):
            place = random.randrange(blocks)
            if at[place] == len(lives[names[place] % len(lives)]):
                yield f"open-{names[place]}".encode(), None
                last += 1
                names[place], at[place] = last, 0
            yield from stage.messages([event(place)])

    yield from stage.messages(event(place) for _ in range(2) for place in range(blocks))
    yield from more()


def _crowded(stage: Stage, turns: int) -> Iterator[Message]:
    """Yield the traffic `turns` times under fresh block ids, in its order, within an hour of event time."""
    first, last = stage.traffic[0].timestamp, stage.traffic[-1].timestamp
    squeeze = max(1, (last - first) // 3_600_000)
    for turn in range(turns):
        yield from stage.messages(
            Event(first + (event.timestamp - first) // squeeze, f"{event.block_id}.{turn}", event.event_id)
            for event in stage.traffic
        )


def sessions_of(stage: Stage) -> list[list[str]]:
    """Return the event ids of the blocks of the traffic, those of one event and the very longest left out."""
    lives: dict[str, list[str]] = {}
    for event in stage.traffic:
        lives.setdefault(event.block_id, []).append(event.event_id)
    return [life for life in lives.values() if 1 < len(life) < 256]
