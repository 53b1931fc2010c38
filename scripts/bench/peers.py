"""The same job on other frameworks, on the same broker, data and cores; the code is in `scripts/peers/`."""

import subprocess
import sys
from argparse import Namespace
from typing import Any

from model.cli import console
from scripts.bench.stage import Stage, drained

_PEERS = {
    "plain": ["scripts.peers.plain"],
    "plain_with_cache": ["scripts.peers.plain", "--remember"],
    "quix": ["scripts.peers.quix"],
    "quix_with_cache": ["scripts.peers.quix", "--remember"],
}
"""With the cache, a peer has the idea that makes most of the difference, too."""

_CACHED = 4
"""So many times as many events for those, which are faster: Quix Streams commits every five seconds."""


def peers(stage: Stage, options: Namespace) -> dict[str, Any]:
    """Run each peer over fewer events, since they are slow, and compare its rate with the consumer's in this run."""
    python = str(options.peers_python or sys.executable)
    missing = subprocess.run([python, "-c", "import quixstreams"], capture_output=True, check=False).returncode != 0
    if missing:
        console.print(
            "Quix Streams is not installed for the peers: pip install .[peers] into an environment of its own, "
            "since it wants older libraries, and name that one's Python with --peers-python"
        )
    ours = stage.known.get("pipeline_eps")
    if ours is None:
        ours = _rate(stage, options.events, [sys.executable, "-m", "consumer"])
    rates = {
        name: _rate(stage, options.peer_events * (_CACHED if name.endswith("cache") else 1), [python, "-m", *command])
        for name, command in _PEERS.items()
        if not (missing and name.startswith("quix"))
    }
    return {"times_as_fast_as": {name: ours / rate for name, rate in rates.items()}, "ours_eps": ours, "eps": rates}


def _rate(stage: Stage, events: int, command: list[str]) -> float:
    trial = stage.trial(events_topic=stage.stream(events))
    with stage.process([*command, "--config", str(trial.config)]) as process:
        return drained(trial.settings, process)
