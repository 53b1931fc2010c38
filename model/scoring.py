"""From windows to surprisals to scores.

Two precisions, one meaning. `screen` runs on the device in float32, for speed (on the CPU through `model.compiled`, on
a CUDA device through `model.fused`); its result may move in the last digits with the batch it ran in. `exact`
runs in float64 on the CPU and rounds to `GRID`, which is far coarser than float64's noise: the same window has the
same exact score in every batch, on every machine. Whoever compares a score with a threshold uses the exact one;
screening only says which windows are far below it. `judge` is `exact` that can also explain.
"""

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.bundle import Bundle
from model.compiled import CompiledNetwork
from model.config import Strategy
from model.network import Autoencoder
from model.tally import Tallied, Tally
from model.vocabulary import PAD

if TYPE_CHECKING:
    from model.fused import FusedNetwork

log = logging.getLogger("model")

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

_APART = 9
"""Decimals in which numbers must differ for one to be the higher: float64's noise, which moves with the batch, must not
decide which of two events offends. Of equals it is the first."""

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


@dataclass(frozen=True)
class Judged:
    """Exact scores of some looks, and all that it takes to explain each of them without the network.

    Attributes:
        places: (B,) of the looks among those that were asked about.
        scores: (B,) in nats, on the grid.
    """

    places: NDArray[np.int64]
    scores: NDArray[np.float64]
    _tokens: Tensor  # (B, L)
    _surprisals: NDArray[np.float64]  # (B, L - 1), of the tokens after BOS; -inf for PAD
    _offenders: NDArray[np.int64]  # (B,) indices into the surprisals
    _expected: NDArray[np.int64]  # (B, EXPECTED) tokens
    _shares: NDArray[np.float64]  # (B, EXPECTED)
    _by_counts: NDArray[np.bool_]  # (B,)
    _tally: Tally | None

    def why(self, index: int) -> Explanation:
        """Explain the look at `index` of this batch."""
        surprisals = self._surprisals[index]
        expected: tuple[tuple[int, float], ...] = ()
        counts: tuple[Tallied, ...] = ()
        if self._tally is not None and self._by_counts[index]:
            counts = _counts(self._tally, self._tokens[index, None])
        else:
            expected = tuple(zip(self._expected[index].tolist(), self._shares[index].tolist(), strict=True))
        return Explanation(
            score=float(self.scores[index]),
            surprisals=tuple(surprisals[surprisals > -np.inf].tolist()),
            offender=int(self._offenders[index]),
            expected=expected,
            counts=counts,
        )


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
        return torch.cat(scores).cpu().double().numpy() if scores else np.empty(0)  # the only wait for the device

    def exact(self, rows: Rows) -> NDArray[np.float64]:
        """Return the exact scores of `rows`: (N,) in nats, on the grid."""
        return on_grid(self._scores(self._exact, rows))

    def explain(self, row: Rows) -> Explanation:
        """Explain the look `row` (window + 2,)."""
        (judged,) = self.judge(row[None])
        return judged.why(0)

    def judge(self, rows: Rows) -> Iterator[Judged]:
        """Yield the exact scores of `rows`, some at a time, with what explains them."""
        for chosen, tokens in _passes(self._exact, rows):
            yield self._judge(chosen, tokens)

    @torch.inference_mode()
    def _judge(self, places: NDArray[np.int64], tokens: Tensor) -> Judged:
        logp = self._exact.logp(tokens)  # (B, L, V)
        surprisal = self._exact.surprisals_of(tokens, logp)  # (B, L)
        offender = surprisal.round(decimals=_APART).argmax(1, keepdim=True)  # (B, 1)
        there = logp[torch.arange(len(tokens)), offender[:, 0]]  # (B, V)
        shown = tokens.gather(1, offender)  # (B, 1)
        own = -there.gather(1, shown)  # (B, 1)
        added = surprisal.gather(1, offender) - own  # (B, 1), by the counts
        apart = there.round(decimals=_APART)  # (B, V)
        by_counts = (apart.argmax(1, keepdim=True) == shown) & (added > own)  # (B, 1)
        others = apart.scatter(1, shown, -torch.inf)  # (B, V)
        expected = others.argsort(dim=1, descending=True, stable=True)[:, :EXPECTED]  # (B, EXPECTED)
        return Judged(
            places,
            on_grid(_pool(surprisal, self.strategy).numpy()),
            tokens,
            on_grid(surprisal[:, 1:].numpy()),
            offender[:, 0].numpy() - 1,
            expected.numpy(),
            on_grid(there.gather(1, expected).exp().numpy()),
            by_counts[:, 0].numpy(),
            self._exact.tally,
        )

    @torch.inference_mode()
    def _scores(self, network: Autoencoder, rows: Rows) -> NDArray[np.float64]:
        scores = torch.empty(len(rows), dtype=torch.float64)
        for chosen, tokens in _passes(network, rows):
            scores[chosen] = _pool(network.surprisals(tokens), self.strategy).cpu().double()
        return scores.numpy()


def _fast(network: Autoencoder, device: torch.device) -> "CompiledNetwork | FusedNetwork | Autoencoder":
    """Return the quickest form of the network that there is for the device."""
    if device.type == "cpu":
        return CompiledNetwork(network)
    if device.type == "cuda":
        try:
            from model.fused import FusedNetwork  # noqa: PLC0415 - Triton comes with torch for CUDA only

            if FusedNetwork.fits(network.shape):
                return FusedNetwork(network, device)
        except Exception as error:  # noqa: BLE001 - no C compiler, too old a device: Triton says so in many ways
            log.warning(
                "the network cannot be one kernel (%s): scoring operation by operation, a few times slower", error
            )
    return copy.deepcopy(network).to(device).eval()


def on_grid(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Round to multiples of `GRID`; the result prints with four decimals."""
    return np.asarray(np.round(values, 4), np.float64)


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


def _passes(network: Autoencoder, rows: Rows) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Yield what `network` takes at a time: places in `rows` (B,) and the tokens there (B, L), on its device."""
    device = network.bias.device
    cells = _CELLS_CPU if device.type == "cpu" else _CELLS_ACCELERATOR
    for chosen, length in _batches(rows, min(cells, _LOGITS // network.shape.vocabulary)):
        yield chosen, torch.from_numpy(rows[chosen, :length].astype(np.int64)).to(device)


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
