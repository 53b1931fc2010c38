"""The network's forward pass on CPU cores, without filler and without leaving their caches.

It computes what `Autoencoder.forward` computes, in float32, from the same weights. Many windows go through together
as (feature, token) arrays, so that a linear layer is one matrix product for all of them. Windows of one length lie
side by side, token by token: the key that is r places further on is then, for all their tokens, the column a fixed
distance away, and attention is long plain loops, too. The first layer's queries, keys and values depend on a token
and its place only, and come from a table. Only the tally of the few windows that are closed is torch's.
"""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.linalg.cython_blas  # noqa: F401 - what numba multiplies with: loaded before it is told to use one thread
import torch
from numba import config
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from model.folded import Folded, folded
from model.jit import njit
from model.network import Autoencoder
from model.vocabulary import BOS, END

Floats = NDArray[np.float32]

_TILE = 768
"""Tokens in one matrix product: enough to keep a core busy, few enough for its cache. In rows of a power of two the
numbers of a column would compete for the same places there."""

_STRIP = 256
"""Tokens whose attention is worked out at a time, in the innermost cache."""

_LOGITS = 2**22
"""Numbers in a tile's output: a large vocabulary makes smaller tiles, not larger memory."""

_ENTRIES = 2**14
"""Pairs of a token and a place up to which the first layer's queries, keys and values are looked up in a table."""

_ALIGNED = 8
"""Windows of a large group are a multiple of this, so that its columns begin where vector registers load fastest."""

_SHARE = 16
"""Windows that are worth another thread."""

_F, _U = np.float32, np.uint64
_ZERO, _HALF, _ONE, _LOWEST, _EPSILON = _F(0), _F(0.5), _F(1), _F(-1e30), _F(1e-5)
_LOG2_E, _LN2_HIGH, _LN2_LOW, _TINY = _F(1.44269504), _F(0.693359375), _F(-2.12194440e-4), _F(-87)
_E2, _E3, _E4, _E5 = _F(0.49999232), _F(0.16667114), _F(0.04189012), _F(0.00831253)
_ROOT_HALF, _P = _F(0.70710678), _F(0.3275911)
_A1, _A2, _A3, _A4, _A5 = _F(0.254829592), _F(-0.284496736), _F(1.421413741), _F(-1.453152027), _F(1.061405429)
_EXPONENT, _MANTISSA = np.int32(127), np.int32(23)

# Sums may be reordered and nothing checks for division by zero: either would keep loops from becoming vector code.
_compile = njit(fastmath=True, error_model="numpy", nogil=True, cache=True)
_inline = njit(fastmath=True, error_model="numpy", inline="always")


class CompiledNetwork:
    """The network on the CPU cores that numba may use; compiled when this is made, or read from a cache on disk."""

    def __init__(self, network: Autoencoder) -> None:
        self._weights, self._table = _laid_out(network)
        self._tally = copy.deepcopy(network.tally)
        self._heads = network.shape.heads
        self._tile = min(_TILE, _LOGITS // network.shape.vocabulary)
        self._threads = int(config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        self._pool = ThreadPoolExecutor(self._threads)
        self._blas = ThreadpoolController().select(user_api="blas")
        self.surprisals(np.ones((1, 1), np.uint16), np.ones(1, np.int64))

    def surprisals(self, rows: NDArray[np.uint16], lengths: NDArray[np.int64]) -> Floats:
        """Return the surprisal, in nats, of the first `lengths` (N,) tokens of `rows` (N, L).

        It is -inf behind them, and for BOS.
        """
        rows, order = np.ascontiguousarray(rows), np.argsort(lengths, kind="stable")
        threads = max(1, min(self._threads, len(rows) // _SHARE))
        found = np.full(rows.shape, -np.inf, np.float32)

        def forward(share: NDArray[np.int64]) -> None:
            if len(share):
                _forward(rows, lengths, share, self._weights, self._table, self._heads, self._tile, found)

        with self._blas.limit(limits=1):  # each of our threads multiplies on its own
            for _ in self._pool.map(forward, [order[first::threads].copy() for first in range(threads)]):
                pass
        if self._tally is not None:
            ended = np.flatnonzero((rows == END).any(axis=1))  # (E,)
            with torch.inference_mode():
                found[ended] += self._tally.closing(torch.from_numpy(rows[ended].astype(np.int64))).numpy()
        return found


def _laid_out(network: Autoencoder) -> tuple[Folded, Floats]:
    """Return the weights as the compiled loops want them, and the table of the first layer's queries, keys and values.

    The weights are in float32, `token` (D, V) and `position` (D, P). The table is (3 D, V P), or (3 D, 0) if it would
    be large.
    """
    weights = folded(network)
    width = network.shape.width
    table = np.empty((3 * width, 0))
    if len(weights.token) * len(weights.position) <= _ENTRIES:
        x = (weights.token[:, None] + weights.position).reshape(-1, width)  # (V P, D)
        x -= x.mean(axis=1, keepdims=True)
        table = weights.qkv[0] @ (x / np.sqrt(x.var(axis=1, keepdims=True) + float(_EPSILON))).T
    turned = weights._replace(token=weights.token.T, position=weights.position.T)
    return Folded._make(map(_contiguous, turned)), _contiguous(table)


def _contiguous(values: NDArray[np.floating]) -> Floats:
    return np.ascontiguousarray(values, np.float32)


@_inline
def _exp(x):
    """Return e^x for x ≤ 0, good to 1e-7: 2^n times a polynomial fitted to e^r for |r| ≤ ln(2)/2.

    A call of the C library would not become vector code.
    """
    x = max(x, _TINY)
    n = np.floor(x * _LOG2_E + _HALF)
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = (((_E5 * r + _E4) * r + _E3) * r + _E2) * r * r + r + _ONE
    return p * np.int32((np.int32(n) + _EXPONENT) << _MANTISSA).view(_F)


@_inline
def _gelu(x):
    """Return x Φ(x), with formula 7.1.26 of Abramowitz and Stegun for the tail of Φ: good to 1.5e-7."""
    z = abs(x) * _ROOT_HALF
    t = _ONE / (_ONE + _P * z)
    tail = ((((_A5 * t + _A4) * t + _A3) * t + _A2) * t + _A1) * t * _exp(-z * z)
    return max(x, _ZERO) - _HALF * abs(x) * tail


@_compile
def _lay_out(rows, lengths, share, begin, tokens, places, owners, groups):
    """Give the windows of `share` from `begin` on their columns, until all columns are taken.

    Token i of a group's k-th window is i · lanes + k columns behind the group's first. Returns the window to go on
    with, the number of columns and that of groups: (first column, length, lanes).
    """
    count = at = 0
    while begin < len(share):
        length, lanes = lengths[share[begin]], 0
        fit = min(len(share) - begin, (len(tokens) - at) // max(1, length))
        while lanes < fit and lengths[share[begin + lanes]] == length:
            lanes += 1
        if lanes == 0:
            break
        if lanes > _ALIGNED:  # the rest, fewer than this, becomes a group of its own
            lanes -= lanes % _ALIGNED
        groups[count] = at, length, lanes
        for i in range(length):
            for k in range(lanes):
                row = share[begin + k]
                tokens[at], places[at], owners[at] = rows[row, i], i, row
                at += 1
        begin += lanes
        count += 1
    return begin, at, count


@_compile
def _add_and_normalise(x, change, bias, y, mean, scale):
    """Add `change` and `bias` to `x`; `y` is `x` with mean 0 and variance 1 in each column. All (D, T)."""
    width, count = x.shape
    mean[:] = _ZERO
    scale[:] = _ZERO
    for d in range(width):
        for t in range(count):
            x[d, t] += change[d, t] + bias[d]
            mean[t] += x[d, t] / _F(width)
    for d in range(width):
        for t in range(count):
            scale[t] += (x[d, t] - mean[t]) ** 2 / _F(width)
    for t in range(count):
        scale[t] = _ONE / np.sqrt(scale[t] + _EPSILON)
    for d in range(width):
        for t in range(count):
            y[d, t] = (x[d, t] - mean[t]) * scale[t]


@_compile
def _look_up(table, tokens, places, positions, entries, qkv):
    """Fill `qkv` (3 D, T) from the table (3 D, V P): what stands there depends on a token and its place only."""
    rows, count = qkv.shape
    for t in range(count):
        entries[t] = tokens[t] * positions + places[t]
    for row in range(rows):
        for t in range(count):
            qkv[row, t] = table[row, entries[t]]


@_compile
def _attend(qkv, bias, group, heads, y, query, key, value, weight, highest, total):
    """Mix the values (3 D, T) of a group of windows, each token with those of its own window: y (D, T).

    Keys and values lie there twice in a row, so that r places further on is always r · lanes columns further on.
    """
    first, length, lanes = group
    width, count = len(y), _U(length * lanes)  # indices are unsigned: numba would test signed ones for less than zero
    head = width // heads
    for h in range(heads):
        for d in range(head):
            row = h * head + d
            for t in range(count):
                at = _U(first) + t
                query[d, t] = qkv[row, at] + bias[row]
                key[d, t] = key[d, count + t] = qkv[width + row, at]
                value[d, t] = value[d, count + t] = qkv[2 * width + row, at]
        for strip in range(0, length * lanes, _STRIP):
            here, size = _U(strip), min(_U(_STRIP), count - _U(strip))
            for t in range(size):
                highest[t], total[t] = _LOWEST, _ZERO
            for r in range(length):
                there = here + _U(r * lanes)
                for t in range(size):
                    weight[r, t] = _ZERO
                for d in range(head):
                    for t in range(size):
                        weight[r, t] += query[d, here + t] * key[d, there + t]
                for t in range(size):
                    highest[t] = max(highest[t], weight[r, t])
            for r in range(length):
                for t in range(size):
                    weight[r, t] = _exp(weight[r, t] - highest[t])
                    total[t] += weight[r, t]
            for d in range(head):
                row, out = h * head + d, _U(first) + here
                for t in range(size):
                    y[row, out + t] = _ZERO
                for r in range(length):
                    there = here + _U(r * lanes)
                    for t in range(size):
                        y[row, out + t] += weight[r, t] * value[d, there + t]
                for t in range(size):
                    y[row, out + t] /= total[t]


@_compile
def _activate(hidden, bias):
    for d in range(hidden.shape[0]):
        for t in range(hidden.shape[1]):
            hidden[d, t] = _gelu(hidden[d, t] + bias[d])


@_compile
def _surprise(logits, bias, tokens, highest, surprisal):
    """Compute -log softmax(logits + bias) of each column's token. `logits` (V, T)."""
    size, count = logits.shape
    highest[:] = _LOWEST
    surprisal[:] = _ZERO
    for v in range(size):
        for t in range(count):
            logits[v, t] += bias[v]
            highest[t] = max(highest[t], logits[v, t])
    for v in range(size):
        for t in range(count):
            surprisal[t] += _exp(logits[v, t] - highest[t])
    for t in range(count):
        surprisal[t] = np.log(surprisal[t]) + highest[t] - logits[tokens[t], t]


@_compile
def _forward(rows, lengths, share, weights, table, heads, tile, found):
    """Write the surprisals of a share of `rows` (N, L), given in order of its lengths, to `found` (N, L)."""
    layers, feedforward, width = weights.up.shape
    longest = lengths[share[-1]]
    room = max(longest, min(tile, longest * len(share)))
    tokens, places, owners = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
    groups, entries = np.empty((2 * longest, 3), np.int64), np.empty(room, np.uint32)
    space = np.empty((6 * width + feedforward + len(weights.logits)) * room, _F)
    mean, scale = np.empty(room, _F), np.empty(room, _F)
    wide = room + _ALIGNED - room % _ALIGNED
    query = np.empty((width // heads, wide), _F)
    key, value = np.empty((width // heads, 2 * wide), _F), np.empty((width // heads, 2 * wide), _F)
    weight, highest, total = np.empty((longest, _STRIP), _F), np.empty(_STRIP, _F), np.empty(_STRIP, _F)
    begin = 0
    while begin < len(share):
        begin, count, together = _lay_out(rows, lengths, share, begin, tokens, places, owners, groups)
        at = 0
        x = space[at : at + width * count].reshape(width, count)
        at += x.size
        y = space[at : at + width * count].reshape(width, count)
        at += y.size
        change = space[at : at + width * count].reshape(width, count)
        at += change.size
        qkv = space[at : at + 3 * width * count].reshape(3 * width, count)
        at += qkv.size
        hidden = space[at : at + feedforward * count].reshape(feedforward, count)
        at += hidden.size
        logits = space[at : at + len(weights.logits) * count].reshape(-1, count)
        bias = np.zeros(width, _F)
        for d in range(width):
            for t in range(count):
                x[d, t] = weights.token[d, tokens[t]]
                change[d, t] = weights.position[d, places[t]]
        for layer in range(layers):
            if layer == 0 and table.size:
                _look_up(table, tokens, places, weights.position.shape[1], entries, qkv)
                x += change
            else:
                _add_and_normalise(x, change, bias, y, mean[:count], scale[:count])
                np.dot(weights.qkv[layer], y, qkv)
            for group in groups[:together]:
                _attend(qkv, weights.query[layer], group, heads, y, query, key, value, weight, highest, total)
            np.dot(weights.out[layer], y, change)
            _add_and_normalise(x, change, weights.out_bias[layer], y, mean[:count], scale[:count])
            np.dot(weights.up[layer], y, hidden)
            _activate(hidden, weights.up_bias[layer])
            np.dot(weights.down[layer], hidden, change)
            bias = weights.down_bias[layer]
        _add_and_normalise(x, change, bias, y, mean[:count], scale[:count])
        np.dot(weights.logits, y, logits)
        _surprise(logits, weights.logits_bias, tokens, mean[:count], scale[:count])
        for t in range(count):
            if tokens[t] != BOS:
                found[owners[t], places[t]] = scale[t]
