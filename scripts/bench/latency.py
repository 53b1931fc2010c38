"""Milliseconds from producing an event to reading its alert with read_committed, under other traffic."""

import subprocess
import sys
import time
from argparse import Namespace
from itertools import islice
from typing import IO, Any, cast

import msgspec
import numpy as np
from confluent_kafka import Producer

from consumer.settings import Settings
from model.errors import UserError
from model.sessions import Event
from scripts.alerts import TopicReader
from scripts.bench.stage import JOINED, Stage, wait
from scripts.replay import endless

_WARM_SECONDS = 3.0
_PAUSE_SECONDS = 0.02
_MEET_SECONDS = 2.0  # in which the clients of the measurement itself come to know their brokers


def latency(stage: Stage, options: Namespace) -> dict[str, Any]:
    """Measure exactly-once delivery at every rate, at-least-once at the lowest."""
    found = {f"{rate:g}": _latency(stage, "exactly_once", rate, options.seconds) for rate in sorted(options.rates)}
    lowest = min(options.rates)
    return {
        "exactly_once": found,
        "at_least_once": {f"{lowest:g}": _latency(stage, "at_least_once", lowest, options.seconds)},
    }


def _latency(stage: Stage, delivery: str, rate: float, seconds: float) -> dict[str, float]:
    trial = stage.trial(delivery=delivery)
    messages = list(stage.messages(islice(endless(stage.traffic), int(rate * (seconds + _WARM_SECONDS)))))
    prepared = trial.config.with_suffix(".messages")
    prepared.write_bytes(msgspec.msgpack.encode(messages))
    command = [sys.executable, "-m", "scripts.bench.load", str(prepared), "--rate", str(rate)]
    command += ["--config", str(trial.config)]
    with (
        stage.consumer(trial) as consumer,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as load,
    ):
        begin, said = cast("IO[bytes]", load.stdin), cast("IO[bytes]", load.stdout)
        said.readline()
        wait(lambda: consumer.said(JOINED), "joining the group")
        begin.write(b"go\n")
        begin.flush()
        time.sleep(_WARM_SECONDS)
        delays = _probe(stage, trial.settings, load)
        kept = float(said.readline())
    prepared.unlink()
    quantiles = {f"p{q:g}": float(np.percentile(delays, q)) for q in (50, 99, 99.9)}
    return {**quantiles, "kept_rate_eps": kept, "probes": float(len(delays))}


def _probe(stage: Stage, settings: Settings, load: subprocess.Popen[bytes]) -> np.ndarray[Any, Any]:
    """Send events that surely alert while the load lasts; return how long their alerts took, in milliseconds."""
    producer = Producer(settings.kafka.for_producer() | {"linger.ms": 0})
    reader = TopicReader(settings, settings.topics.alerts)
    sent: dict[str, float] = {}
    taken: dict[str, float] = {}
    while (lasts := load.poll() is None) or len(taken) < len(sent):
        if lasts:
            probe = Event(stage.traffic[0].timestamp, f"probe-{len(sent)}", "never seen before")
            sent[probe.block_id] = time.monotonic()
            producer.produce(settings.topics.events, stage.encode(probe), probe.block_id)
            producer.poll(0)
        until = time.monotonic() + _PAUSE_SECONDS
        while (left := until - time.monotonic()) > 0:
            message = reader.poll(left)
            if message is not None and (block := message.key().decode()) in sent:
                taken.setdefault(block, time.monotonic())
        if not lasts and time.monotonic() - max(sent.values()) > 60:
            raise UserError(f"{len(sent) - len(taken)} alerts did not come")
    reader.close()
    begin = min(sent.values(), default=0.0) + _MEET_SECONDS
    delays = [taken[block] - at for block, at in sent.items() if at >= begin]
    if not delays:
        raise UserError("the load was over before there was anything to measure; give more --seconds")
    return 1000 * np.array(delays)
