"""Windows a second through the network, without Kafka, beside the matrix products that the device can do at best."""

import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.bundle import Bundle
from model.device import choose
from model.network import Shape
from model.scoring import Rows, Scorer
from model.vocabulary import BOS, END, PAD, UNK
from scripts.bench.stage import Stage

_EDGES = (8, 16, 24, 32, 52)
_REPEATS = 5
_MANY = 2**18
"""Windows that an accelerator is given: as many as there are would be over before it is busy."""

_BATCH = 10_000
"""Windows of a batch, at most, with the default scoring.max_batch."""

_ORDER = 2048
"""Of the square matrices whose product is the peak."""


def scoring(stage: Stage, _: Namespace) -> dict[str, Any]:
    """Screen every distinct window of the traffic, the cache left out, on the CPU and on the device of the settings."""
    bundle = Bundle.load(stage.given.model.path)
    rows = _windows(stage, bundle)
    devices = {device.type: device for device in (torch.device("cpu"), choose(stage.given.device))}
    return {name: _on(device, bundle, rows) for name, device in devices.items()}


def _on(device: torch.device, bundle: Bundle, distinct: Rows) -> dict[str, Any]:
    scorer = Scorer(bundle, device=device)
    rows = distinct if device.type == "cpu" else np.tile(distinct, (-(-_MANY // len(distinct)), 1))
    batch = rows[:_BATCH]
    peak = _peak(device)
    lengths = (rows != PAD).sum(axis=1)
    seconds = _best(lambda: scorer.screen(rows))
    found: dict[str, Any] = {
        "share_of_peak": _operations(bundle.network.shape, lengths) / seconds / peak,
        "windows_per_s": len(rows) / seconds,
        "windows_per_s_in_batches": len(batch) / _best(lambda: scorer.screen(batch)),
        "peak_gflops": peak / 1e9,
        "distinct_windows": len(distinct),
        "furthest_from_exact": float(np.abs(scorer.screen(distinct) - scorer.exact(distinct)).max()),
        "windows_per_s_by_length": {},
    }
    for low, high in zip((0, *_EDGES), _EDGES, strict=False):
        some = rows[(lengths > low) & (lengths <= high)]
        if len(some):
            rate = len(some) / _best(lambda some=some: scorer.screen(some))  # type: ignore[misc]
            found["windows_per_s_by_length"][f"{low + 1}-{high}"] = rate
    return found


def _windows(stage: Stage, bundle: Bundle) -> Rows:
    """Return the distinct windows of the traffic as the network sees them, each block's last one also with END."""
    window, tokens = bundle.window, bundle.vocabulary.tokens
    lives: dict[str, list[int]] = {}
    shown: dict[tuple[int, ...], None] = {}
    for event in stage.traffic:
        life = lives.setdefault(event.block_id, [])
        life.append(tokens.get(event.event_id, UNK))
        shown[BOS, *life[-window:]] = None
    for life in lives.values():
        shown[BOS, *life[-window:], END] = None
    rows = np.full((len(shown), window + 2), PAD, np.uint16)
    for row, look in zip(rows, shown, strict=True):
        row[: len(look)] = look
    return rows


def _operations(shape: Shape, lengths: NDArray[np.int64]) -> float:
    """Return the floating-point operations of the matrix products for windows of these lengths, filler left out."""
    width = shape.width
    dense = shape.layers * (4 * width * width + 2 * width * shape.feedforward) + width * shape.vocabulary
    attention = shape.layers * 2 * width
    return float(2 * (dense * lengths + attention * lengths**2).sum())


def _peak(device: torch.device) -> float:
    """Return the operations a second of one large product in float32, by the better of the libraries at hand."""
    one, other = torch.randn(2, _ORDER, _ORDER, device=device)

    def product() -> None:
        one @ other
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds = [_best(product)]
    if device.type == "cpu":
        here, there = one.numpy(), other.numpy()
        seconds.append(_best(lambda: here @ there))
    return 2 * _ORDER**3 / min(seconds)


def _best(action: Callable[[], Any]) -> float:
    """Return the seconds of the quickest of several runs, after one that does not count."""
    action()
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return min(times)
