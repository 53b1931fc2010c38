"""The network's forward pass on a CUDA device, as one kernel.

The network is small: as a sequence of operations it would carry each intermediate result to the device's memory and
back, and spend more time on starting operations than in them. Here a program of the kernel takes a tile of tokens,
some windows of like length side by side, all the way from token to surprisal; what lies between never leaves the chip.
Attention looks at the whole tile and masks the other windows, since matrix units like whole tiles.

Products are tf32x3: three products on the matrix units that together are as good as one in float32.
"""

import copy
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from model.folded import folded
from model.network import Autoencoder, Shape
from model.scoring import SCREEN_NOISE
from model.vocabulary import BOS, END, PAD

WIDEST = 128
"""Longest windows in tokens, and widest networks, that fit into a tile."""

_TILE = 64
"""Tokens of a tile, at least."""

_BLOCK = 64
"""Inner features of the feed-forward network, and tokens of the vocabulary, that are worked out at a time."""

_LEAST = 16
"""Rows and columns that a product on the matrix units has at least."""

_WARPS, _STAGES = 4, 1
"""The quickest on an H200. (Eight warps: Triton 3.6 makes a kernel that reads where nothing is.)"""

_LOWEST = tl.constexpr(-1e30)

_CHECKED, _TOLERANCE = 12, SCREEN_NOISE / 2
"""Windows of different lengths in which the kernel must not be further than this, in nats, from the exact surprisals:
half of what the scores may be, since so few do not show its furthest error."""

_HIGHEST = 64
"""Surprisals above this many nats, with which no score level ends any more, may be off in proportion, as float32 is."""


class _Weights(NamedTuple):
    """What the kernel is given, in its order: inputs by outputs, filled up with zeros to powers of two."""

    token: Tensor  # (V, D)
    position: Tensor  # (P, D)
    qkv: Tensor  # (layers, heads, 3, D, K)
    query: Tensor  # (layers, heads, K)
    out: Tensor  # (layers, heads, K, D)
    out_bias: Tensor  # (layers, D)
    up: Tensor  # (layers, blocks, D, F)
    up_bias: Tensor  # (layers, blocks, F)
    down: Tensor  # (layers, blocks, F, D)
    down_bias: Tensor  # (layers, D)
    logits: Tensor  # (blocks, D, B)
    logits_bias: Tensor  # (blocks, B)


class FusedNetwork:
    """The network on a CUDA device; its kernel is compiled when this is made, or read from a cache on disk.

    Raises:
        RuntimeError: what was compiled computes something else.
    """

    def __init__(self, network: Autoencoder, device: torch.device) -> None:
        self._shape = network.shape
        self._device = device
        self._weights = _laid_out(network, device)
        self._tally = copy.deepcopy(network.tally).to(device) if network.tally is not None else None
        self._tile = max(_TILE, triton.next_power_of_2(network.shape.positions))
        self._check(network)

    @staticmethod
    def fits(shape: Shape) -> bool:
        """Whether such a network is small enough."""
        return max(shape.positions, shape.width) <= WIDEST

    @torch.inference_mode()
    def surprisals(self, rows: NDArray[np.uint16], lengths: NDArray[np.int64]) -> Tensor:
        """Return the surprisal, in nats, of the first `lengths` (N,) tokens of `rows` (N, L).

        It is -inf behind them, and for BOS.
        """
        weights, shape = self._weights, self._shape
        tokens = self._sent(rows.view(np.int16))  # (N, L)
        found = torch.full(rows.shape, -torch.inf, device=self._device)  # (N, L)
        order, tiles = _tiles(lengths, self._tile)
        if len(tiles):
            with torch.cuda.device_of(tokens):  # Triton starts kernels on the current device, which may be another
                _forward[(len(tiles),)](
                    tokens,
                    self._sent(order),
                    self._sent(tiles),
                    found,
                    *weights,
                    rows.shape[1],
                    BOS=BOS,
                    PAD=PAD,
                    T=self._tile,
                    WIDTH=shape.width,
                    D=weights.token.shape[1],
                    K=weights.query.shape[2],
                    F=weights.up_bias.shape[2],
                    B=weights.logits_bias.shape[1],
                    LAYERS=shape.layers,
                    HEADS=shape.heads,
                    UPS=weights.up_bias.shape[1],
                    LOGITS=weights.logits_bias.shape[0],
                    num_warps=_WARPS,
                    num_stages=_STAGES,
                )
        ended = np.flatnonzero((rows == END).any(axis=1))  # (E,)
        if self._tally is not None and len(ended):
            of = self._sent(ended)
            found[of] += self._tally.closing(tokens[of].long() & 0xFFFF)
        return found

    def _check(self, network: Autoencoder) -> None:
        """Compare windows of random tokens with torch's: compilers of kernels have bugs, and these would be silent."""
        random, positions = np.random.default_rng(0), self._shape.positions
        lengths = np.linspace(1, positions, _CHECKED).astype(np.int64)
        rows = random.integers(END, self._shape.vocabulary, (len(lengths), positions)).astype(np.uint16)
        rows[np.arange(positions) >= lengths[:, None]] = PAD
        with torch.inference_mode():
            exact = copy.deepcopy(network).double().surprisals(torch.from_numpy(rows.astype(np.int64)))
        found = self.surprisals(rows, lengths).cpu()
        there = torch.from_numpy(rows != PAD)
        off = float(((found - exact)[there].abs() / (exact[there] / _HIGHEST).clamp(min=1)).max())
        if not off < _TOLERANCE:
            raise RuntimeError(f"it computes something else, {off:.2g} nats off")

    def _sent(self, values: NDArray[np.integer]) -> Tensor:
        """Copy to the device; from pinned memory that overlaps with what it does."""
        here = torch.from_numpy(np.ascontiguousarray(values))
        return here.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else here


def _tiles(lengths: NDArray[np.int64], tile: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Share windows out to tiles, as many to a tile as the longest of them allows.

    Returns (N,) windows in the order of the tiles, and for each tile (first place in that order, windows, tokens that
    each of them has room for).
    """
    together = tile // np.maximum(lengths, 1)  # (N,)
    order = np.argsort(together, kind="stable").astype(np.int32)
    tiles, begin = [], 0
    for many, members in zip(*np.unique(together, return_counts=True), strict=True):
        first = np.arange(begin, begin + members, many)
        begin += members
        tiles.append(np.stack([first, np.minimum(many, begin - first), np.full(len(first), tile // many)], axis=1))
    return order, np.concatenate(tiles).astype(np.int32) if tiles else np.empty((0, 3), np.int32)


def _laid_out(network: Autoencoder, device: torch.device) -> _Weights:
    shape, weights = network.shape, folded(network)
    width, heads, layers = shape.width, shape.heads, shape.layers
    d, k = _power(width), _power(width // heads)
    ups, logits = -(-shape.feedforward // _BLOCK), -(-shape.vocabulary // _BLOCK)

    def filled(values: NDArray[np.floating], *sizes: int, by: float = 0) -> Tensor:
        sizes = values.shape[: values.ndim - len(sizes)] + sizes
        extra = [(0, size - there) for size, there in zip(sizes, values.shape, strict=True)]
        return torch.from_numpy(np.pad(values, extra, constant_values=by)).float().contiguous().to(device)

    by_head = (layers, 3, heads, width // heads, width)
    up = np.pad(weights.up, ((0, 0), (0, ups * _BLOCK - shape.feedforward), (0, 0))).reshape(layers, ups, _BLOCK, width)
    spare = logits * _BLOCK - shape.vocabulary
    return _Weights(
        token=filled(weights.token, d),
        position=filled(weights.position, d),
        qkv=filled(weights.qkv.reshape(by_head).transpose(0, 2, 1, 4, 3), d, k),
        query=filled(weights.query.reshape(layers, heads, -1), k),
        out=filled(weights.out.reshape(layers, width, heads, -1).transpose(0, 2, 3, 1), k, d),
        out_bias=filled(weights.out_bias, d),
        up=filled(up.transpose(0, 1, 3, 2), d, _BLOCK),
        up_bias=filled(weights.up_bias, ups * _BLOCK).view(layers, ups, _BLOCK),
        down=filled(weights.down.transpose(0, 2, 1), ups * _BLOCK, d).view(layers, ups, _BLOCK, d),
        down_bias=filled(weights.down_bias, d),
        logits=filled(
            np.pad(weights.logits, ((0, spare), (0, 0))).reshape(logits, _BLOCK, width).transpose(0, 2, 1), d, _BLOCK
        ),
        logits_bias=filled(weights.logits_bias, logits * _BLOCK, by=_LOWEST.value).view(logits, _BLOCK),
    )


def _power(size: int) -> int:
    return max(_LEAST, triton.next_power_of_2(size))


@triton.jit
def _normalised(x, inside, WIDTH):
    """Return `x` (T, D) with mean 0 and variance 1 in each row, its filler, outside of the width, left out."""
    centred = tl.where(inside, x - tl.sum(x, 1)[:, None] / WIDTH, 0.0)
    return centred / tl.sqrt_rn(tl.sum(centred * centred, 1)[:, None] / WIDTH + 1e-5)


@triton.jit
def _product(one, other):
    return tl.dot(one, other, input_precision="tf32x3")


@triton.jit
def _forward(
    rows, order, tiles, found,
    token, position, qkv, query, out, out_bias, up, up_bias, down, down_bias, logits, logits_bias,
    length,
    BOS: tl.constexpr, PAD: tl.constexpr, T: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    F: tl.constexpr, B: tl.constexpr, LAYERS: tl.constexpr, HEADS: tl.constexpr, UPS: tl.constexpr,
    LOGITS: tl.constexpr,
):  # fmt: skip
    """Write the surprisals of the windows of a tile, of `rows` (N, length), to `found` (N, length)."""
    tile = tl.program_id(0)
    first, many, room = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    t, d, k, f, b = tl.arange(0, T), tl.arange(0, D), tl.arange(0, K), tl.arange(0, F), tl.arange(0, B)
    dk, kd = d[:, None] * K + k[None, :], k[:, None] * D + d[None, :]
    df, fd = d[:, None] * F + f[None, :], f[:, None] * D + d[None, :]
    owner, place = t // room, t % room  # (T,): the window of each token
    there = (owner < many) & (place < length)
    at = tl.load(order + first + owner, mask=there, other=0) * length + place  # (T,)
    shown = tl.load(rows + at, mask=there, other=PAD).to(tl.int32) & 0xFFFF  # (T,)
    real = shown != PAD
    inside = (d < WIDTH)[None, :]
    mine = (owner[:, None] == owner[None, :]) & real[None, :]  # (T, T): keys that a query may see
    x = tl.load(token + shown[:, None] * D + d[None, :])
    x += tl.load(position + place[:, None] * D + d[None, :], mask=there[:, None], other=0.0)  # (T, D)
    for layer in range(LAYERS):
        y = _normalised(x, inside, WIDTH)  # (T, D)
        for head in range(HEADS):
            which = layer * HEADS + head
            q = _product(y, tl.load(qkv + 3 * which * D * K + dk)) + tl.load(query + which * K + k)[None, :]  # (T, K)
            key = _product(y, tl.load(qkv + (3 * which + 1) * D * K + dk))  # (T, K)
            value = _product(y, tl.load(qkv + (3 * which + 2) * D * K + dk))  # (T, K)
            weight = tl.where(mine, _product(q, tl.trans(key)), _LOWEST)  # (T, T)
            weight = tl.exp(weight - tl.max(weight, 1)[:, None])
            mixed = _product(weight, value) / tl.sum(weight, 1)[:, None]  # (T, K)
            x += _product(mixed, tl.load(out + which * K * D + kd))
        x += tl.load(out_bias + layer * D + d)[None, :]
        y = _normalised(x, inside, WIDTH)
        for block in range(UPS):
            which = layer * UPS + block
            hidden = _product(y, tl.load(up + which * D * F + df)) + tl.load(up_bias + which * F + f)[None, :]  # (T, F)
            hidden *= 0.5 + 0.5 * tl.erf(hidden * 0.7071067811865476)  # gelu
            x += _product(hidden, tl.load(down + which * F * D + fd))
        x += tl.load(down_bias + layer * D + d)[None, :]
    y = _normalised(x, inside, WIDTH)
    own = tl.zeros((T,), tl.float32)
    highest = tl.full((T,), _LOWEST, tl.float32)
    total = tl.zeros((T,), tl.float32)
    for block in range(LOGITS):
        some = _product(y, tl.load(logits + block * D * B + d[:, None] * B + b[None, :]))  # (T, B)
        some += tl.load(logits_bias + block * B + b)[None, :]
        own += tl.sum(tl.where(shown[:, None] == block * B + b[None, :], some, 0.0), 1)
        higher = tl.maximum(highest, tl.max(some, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(some - higher[:, None]), 1)
        highest = higher
    tl.store(found + at, tl.log(total) + highest - own, mask=there & real & (shown != BOS))
