"""From windows to surprisals to scores.

Two precisions, one meaning. `screen` runs on the device in float32, for speed (on the CPU through `model.compiled`, on
a CUDA device through `model.fused`); its result may move in the last digits with the batch it ran in. `exact`
runs in float64 on the CPU and rounds to `GRID`, which is far coarser than float64's noise: the same window has the
same exact score in every batch, on every machine. Whoever compares a score with a threshold uses the exact one;
screening only says which windows are far below it.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from model.bundle import Bundle
from model.compiled import CompiledNetwork
from model.config import Strategy
from model.network import Autoencoder
from model.tally import Tallied, Tally
from model.vocabulary import PAD

if TYPE_CHECKING:
    from model.fused import FusedNetwork

Rows = NDArray[np.uint16]
"""Looks as the network sees them: (N, window + 2) of BOS, events, END when closed, PAD."""

GRID = 1e-4
"""Exact scores are multiples of this many nats."""

SCREEN_MARGIN = 0.02
"""How far a screened score may be from the exact one, in nats; float32 stays a hundred times closer."""

TOPK = 3
"""Strategy topk is the mean of this many highest surprisals."""

SCREEN_NOISE = SCREEN_MARGIN / 40
"""How far a screened score really is from the exact one, five times over: for bounds that must not be missed by a
hair but lie so close that `SCREEN_MARGIN` would make every score an exact one."""

EXPECTED = 3
"""How many alternatives an explanation names."""

COUNTED = 3
"""How many counts it names."""

_PART = 2**16
"""Looks that are screened at a time: a device works on a part while the next one is made ready for it."""

_BUCKETS = (8, 12, 16, 20, 24, 32, 40)
_CELLS_CPU = 16_384
"""Tokens in one forward pass of torch: enough to keep a CPU's cores busy, small enough for its caches."""

_CELLS_ACCELERATOR = 262_144
"""There a pass must be large, or starting it takes longer than it does."""

_LOGITS = 2**26
"""Numbers in the output of one forward pass at most: a large vocabulary must not fill the memory."""


@dataclass(frozen=True)
class Explanation:
    """Why a look has its score. Everything is rounded to `GRID`, so that equal windows read equal.

    Attributes:
        score: the exact score.
        surprisals: of each token after BOS, in nats; the last one is END's when the look closes the session.
        offender: index into `surprisals` of the highest.
        expected: (token, probability) of the likeliest other tokens at the offender's place, the likeliest first.
            Empty where `counts` says more.
        counts: where END is the offender, though nothing else was as likely there: its least likely counts.
    """

    score: float
    surprisals: tuple[float, ...]
    offender: int
    expected: tuple[tuple[int, float], ...]
    counts: tuple[Tallied, ...] = ()


class Scorer:
    """Scores looks with a bundle's network on a device, with one strategy."""

    def __init__(self, bundle: Bundle, strategy: Strategy = "max", device: torch.device | None = None) -> None:
        self.bundle = bundle
        self.strategy = strategy
        self.device = device or torch.device("cpu")
        self._fast = _fast(bundle.network, self.device)
        self._exact = copy.deepcopy(bundle.network).double().eval()

    def screen(self, rows: Rows) -> NDArray[np.float64]:
        """Return the scores of `rows` to within `SCREEN_MARGIN`: (N,) in nats."""
        if isinstance(self._fast, Autoencoder):
            return self._scores(self._fast, rows)
        scores = []
        for first in range(0, len(rows), _PART):
            part = rows[first : first + _PART]
            surprisal = torch.as_tensor(self._fast.surprisals(part, (part != PAD).sum(axis=1)))  # (N, L)
            scores.append(_pool(surprisal, self.strategy))
        return torch.cat(scores).double().cpu().numpy() if scores else np.empty(0)  # the only wait for the device

    def exact(self, rows: Rows) -> NDArray[np.float64]:
        """Return the exact scores of `rows`: (N,) in nats, on the grid."""
        return on_grid(self._scores(self._exact, rows))

    @torch.inference_mode()
    def explain(self, row: Rows) -> Explanation:
        """Explain the look `row` (window + 2,)."""
        tokens = torch.from_numpy(row[row != PAD].astype(np.int64))[None]  # (1, L)
        logp = F.log_softmax(self._exact(tokens), -1)[0]  # (L, V)
        own = -logp.gather(1, tokens[0][:, None])[1:, 0]  # (L - 1,)
        closing = self._exact.closing(tokens)[0, 1:]  # (L - 1,)
        surprisal = own + closing
        offender = int(surprisal.argmax())
        score = _pool(surprisal[None], self.strategy)
        tally = self._exact.tally
        there = logp[1 + offender].argmax() == tokens[0, 1 + offender]
        by_counts = tally is not None and bool(there) and closing[offender] > own[offender]
        return Explanation(
            score=float(on_grid(score.numpy())[0]),
            surprisals=tuple(on_grid(surprisal.numpy()).tolist()),
            offender=offender,
            expected=() if by_counts else _likeliest(logp[1 + offender], int(tokens[0, 1 + offender])),
            counts=_counts(tally, tokens) if tally is not None and by_counts else (),
        )

    @torch.inference_mode()
    def _scores(self, network: Autoencoder, rows: Rows) -> NDArray[np.float64]:
        device = next(network.parameters()).device
        cells = _CELLS_CPU if device.type == "cpu" else _CELLS_ACCELERATOR
        cells = min(cells, _LOGITS // self.bundle.network.shape.vocabulary)
        scores = torch.empty(len(rows), dtype=torch.float64)
        for chosen, length in _batches(rows, cells):
            tokens = torch.from_numpy(rows[chosen, :length].astype(np.int64)).to(device)  # (B, L)
            scores[chosen] = _pool(network.surprisals(tokens), self.strategy).double().cpu()
        return scores.numpy()


def _fast(network: Autoencoder, device: torch.device) -> "CompiledNetwork | FusedNetwork | Autoencoder":
    """Return the quickest form of the network that there is for the device."""
    if device.type == "cpu":
        return CompiledNetwork(network)
    if device.type == "cuda":
        from model.fused import FusedNetwork  # noqa: PLC0415 - Triton comes with torch for CUDA only

        if FusedNetwork.fits(network.shape):
            return FusedNetwork(network, device)
    return copy.deepcopy(network).to(device).eval()


def on_grid(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Round to multiples of `GRID`; the result prints with four decimals."""
    return np.asarray(np.round(values, 4), np.float64)


def _likeliest(logp: Tensor, besides: int) -> tuple[tuple[int, float], ...]:
    """Return the likeliest tokens, `besides` left out, and their probabilities, of log-probabilities (V,)."""
    probability, token = logp.exp().index_fill(0, torch.tensor([besides]), 0).topk(min(EXPECTED, len(logp)))
    return tuple(zip(token.tolist(), on_grid(probability.numpy()).tolist(), strict=True))


def _counts(tally: Tally, tokens: Tensor) -> tuple[Tallied, ...]:
    return tuple(
        replace(kind, surprisal=float(on_grid(np.array(kind.surprisal)))) for kind in tally.worst(tokens, COUNTED)
    )


def _pool(surprisal: Tensor, strategy: Strategy) -> Tensor:
    """Turn surprisals (B, L), -inf where there are none, into scores (B,)."""
    if strategy == "max":
        return surprisal.amax(1)
    best = surprisal if strategy == "mean" else surprisal.topk(min(TOPK, surprisal.shape[1]), dim=1).values  # (B, K)
    there = best > -torch.inf  # (B, K)
    return best.masked_fill(~there, 0).sum(1) / there.sum(1)


def _batches(rows: Rows, cells: int) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Yield (indices, length): rows of like length together, filled up to a bucket's length, not to the longest."""
    lengths = (rows != PAD).sum(axis=1)
    buckets = np.array([size for size in _BUCKETS if size < rows.shape[1]] + [rows.shape[1]])
    bucket = np.searchsorted(buckets, lengths)
    for index, length in enumerate(buckets.tolist()):
        members = np.flatnonzero(bucket == index)
        step = max(1, cells // length)
        for first in range(0, len(members), step):
            yield members[first : first + step], length
