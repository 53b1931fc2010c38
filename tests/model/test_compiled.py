"""The compiled forward pass against torch's, one window at a time, for networks and batches of many shapes."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from model.compiled import CompiledNetwork
from model.network import Autoencoder, Shape
from model.vocabulary import END, PAD

# (vocabulary, window, width, heads, layers, feedforward, tallied): heads of 1 to 16 numbers, odd sizes, 1 to 3 layers
SHAPES = [(19, 50, 64, 4, 2, 128, 64), (7, 3, 6, 2, 1, 5, 0), (70, 9, 5, 5, 3, 4, 7), (5000, 12, 16, 1, 1, 8, 2)]


def network(shape):
    """Untrained weights that matter: gains, shifts and biases that are not 1 and 0."""
    torch.manual_seed(3)
    made = Autoencoder(Shape(*shape)).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
        if made.tally is not None:
            made.tally.column[3:] = torch.arange(shape[0] - 3).clamp(max=made.tally.kinds - 1)
            made.tally.allowance.fill_(5)
    return made


made = {shape: network(shape) for shape in SHAPES}
compiled = {shape: CompiledNetwork(one) for shape, one in made.items()}
exact = {shape: copy.deepcopy(one).double() for shape, one in made.items()}


@torch.no_grad()
def plain(shape, row):
    tokens = torch.from_numpy(row[row != PAD].astype(np.int64))
    own = -F.log_softmax(exact[shape](tokens[None])[0], -1).gather(1, tokens[:, None])[:, 0].numpy()
    if exact[shape].tally is not None:
        own[tokens.numpy() == END] += exact[shape].tally.excess(tokens[None]).item()
    return own


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_surprisals_are_those_of_torch_and_nothing_lies_behind_them(data):
    shape = data.draw(st.sampled_from(SHAPES))
    lengths = np.array(data.draw(st.lists(st.integers(1, shape[1] + 2), min_size=1, max_size=80)))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = random.integers(1, shape[0], (len(lengths), shape[1] + 2)).astype(np.uint16)
    rows[np.arange(rows.shape[1]) >= lengths[:, None]] = PAD
    found = compiled[shape].surprisals(rows, lengths)
    assert not found[rows == PAD].any()
    for row, length, ours in zip(rows, lengths, found, strict=True):
        assert ours[:length] == pytest.approx(plain(shape, row), abs=5e-4, rel=1e-4)


def test_no_window_no_surprisal():
    assert compiled[SHAPES[0]].surprisals(np.empty((0, 52), np.uint16), np.empty(0, np.int64)).shape == (0, 52)


def test_far_apart_logits_stay_finite():
    shape = SHAPES[1]
    loud = copy.deepcopy(made[shape])
    with torch.no_grad():
        for weight in loud.parameters():
            weight.mul_(30)
    row = np.array([[1, 2, 3, 4, 5]], np.uint16)
    found = CompiledNetwork(loud).surprisals(row, np.array([5]))
    with torch.no_grad():
        tokens = torch.from_numpy(row.astype(np.int64))
        expected = -F.log_softmax(loud.double()(tokens)[0], -1).gather(1, tokens[0][:, None])[:, 0]
    assert found[0] == pytest.approx(expected.numpy(), rel=1e-3, abs=1e-2)
