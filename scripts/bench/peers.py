"""The same job on other frameworks, on the same broker, data and cores; the code is in `scripts/peers/`."""

import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from model.cli import console
from scripts.bench.stage import Stage, drained


@dataclass(frozen=True)
class _Peer:
    """A module of `scripts/peers/`; what it needs, if anything: a module to import, and its name for people."""

    module: str
    needs: str = ""
    name: str = ""
    cached: int = 1
    """So many times as many events with the cache, where a few commits would be all otherwise."""


_PEERS = {
    "plain": _Peer("scripts.peers.plain", cached=4),
    "quix": _Peer("scripts.peers.quix", "quixstreams", "Quix Streams", cached=4),
    "faust": _Peer("scripts.peers.faust_streaming", "faust", "Faust"),
}


def peers(stage: Stage, options: Namespace) -> dict[str, Any]:
    """Run each peer over fewer events, since they are slow, and compare its rate with the consumer's in this run."""
    python = str(options.peers_python or sys.executable)
    present = {name: peer for name, peer in _PEERS.items() if _installed(python, peer)}
    ours = stage.known.get("pipeline_eps")
    if ours is None:
        ours = _rate(stage, options.events, [sys.executable, "-m", "consumer"])
    rates = {}
    for name, peer in present.items():
        command = [python, "-m", peer.module]
        rates[name] = _rate(stage, options.peer_events, command)
        # With the cache, a peer has the idea that makes most of the difference, too.
        rates[f"{name}_with_cache"] = _rate(stage, options.peer_events * peer.cached, [*command, "--remember"])
    return {"times_as_fast_as": {name: ours / rate for name, rate in rates.items()}, "ours_eps": ours, "eps": rates}


def _installed(python: str, peer: _Peer) -> bool:
    """Whether a peer can run; tell how to install it if not."""
    if not peer.needs:
        return True
    there = subprocess.run([python, "-c", f"import {peer.needs}"], capture_output=True, check=False).returncode == 0
    if not there:
        console.print(
            f"{peer.name} is not installed for the peers: pip install .[peers] into an environment of its own, "
            "since it wants older libraries, and name that one's Python with --peers-python"
        )
    return there


def _rate(stage: Stage, events: int, command: list[str]) -> float:
    trial = stage.trial(events_topic=stage.stream(events))
    with stage.process([*command, "--config", str(trial.config)]) as process:
        return drained(trial.settings, process).rate()
