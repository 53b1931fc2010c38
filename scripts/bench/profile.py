"""Where a second goes: samples of the real consumer's main thread at work, waiting included, taken from outside."""

import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from model.cli import console
from scripts.bench.stage import Stage, committed, settled, wait

_FRAME = re.compile(r"([\w.<>]+) \((?:.*/)?(?:consumer|model)/(\w+)\.py:\d+\)")
_SAMPLER = "py-spy"


def profile(stage: Stage, options: Namespace) -> dict[str, Any]:
    """Return the share of time in each of the project's modules, or that Kafka's client took when one called it."""
    sampler = shutil.which(_SAMPLER, path=Path(sys.executable).parent) or shutil.which(_SAMPLER)
    if sampler is None:
        console.print(f"{_SAMPLER} is not installed: no profile; pip install {_SAMPLER}")
        return {}
    trial = stage.trial(events_topic=stage.stream(options.events))
    output = trial.config.with_suffix(".stacks")
    with stage.consumer(trial) as process, committed(trial.settings) as watch:
        wait(lambda: watch.now > 0, "the first commit")
        command = [sampler, "record", "--rate", "200", "--threads", "--idle", "--format", "raw", "--duration", "3600"]
        with subprocess.Popen(
            [*command, "--output", str(output), "--pid", str(process.pid)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as sampling:
            settled(trial.settings, process)
            sampling.send_signal(signal.SIGINT)
            sampling.wait(timeout=60)
    shares = _shares(output.read_text().splitlines()) if output.exists() else {}
    if not shares:
        console.print(f"{_SAMPLER} took no samples: it may need leave to trace processes, or the topic was too short")
    return shares


def _shares(stacks: Iterable[str]) -> dict[str, float]:
    """Give each sample of the main thread to the innermost of the project's frames.

    A frame of the loop itself is told by its function: `service._read`, for one, is Kafka's client.
    """
    samples: Counter[str] = Counter()
    for line in stacks:
        stack, _, number = line.rpartition(" ")
        frames = _FRAME.findall(stack)
        if "MainThread" in stack and frames:
            function, module = frames[-1]
            samples[f"service.{function.rpartition('.')[2]}" if module == "service" else module] += int(number)
    total = samples.total()
    return {name: number / total for name, number in samples.most_common()}
