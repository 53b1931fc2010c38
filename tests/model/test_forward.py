"""The fast forward passes against torch's, one window at a time, for networks and batches of many shapes.

Where there is no CUDA device, Triton's interpreter runs the kernel on the CPU, operation by operation.
"""

import copy
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from model.bundle import Bundle
from model.compiled import CompiledNetwork
from model.network import Autoencoder, Shape
from model.scoring import SCREEN_MARGIN, SCREEN_NOISE, Scorer
from model.vocabulary import BOS, END, PAD, Vocabulary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # looked at when the kernel is declared

try:
    from model.fused import FusedNetwork
except ImportError:  # torch brings Triton on Linux only
    FusedNetwork = None
needs_triton = pytest.mark.skipif(FusedNetwork is None, reason="there is no Triton")

# (vocabulary, window, width, heads, layers, feedforward, tallied): heads of 1 to 16 numbers, odd sizes, 1 to 3 layers
SHAPES = [
    (19, 50, 64, 4, 2, 128, 64), (7, 3, 6, 2, 1, 5, 0), (70, 9, 5, 5, 3, 4, 7), (5000, 12, 16, 1, 1, 8, 2),
    (12, 100, 12, 3, 1, 20, 3),
]  # fmt: skip


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
forms = {"compiled": {shape: CompiledNetwork(one) for shape, one in made.items()}}
if FusedNetwork is not None:
    forms["fused"] = {shape: FusedNetwork(one, DEVICE) for shape, one in made.items()}
exact = {shape: copy.deepcopy(one).double() for shape, one in made.items()}


@torch.no_grad()
def plain(shape, row):
    tokens = torch.from_numpy(row[row != PAD].astype(np.int64))
    own = -F.log_softmax(exact[shape](tokens[None])[0], -1).gather(1, tokens[:, None])[:, 0].numpy()
    if exact[shape].tally is not None:
        own[tokens.numpy() == END] += exact[shape].tally.excess(tokens[None]).item()
    own[tokens.numpy() == BOS] = -np.inf
    return own


def surprisals(network, rows, lengths):
    return torch.as_tensor(network.surprisals(rows, lengths)).cpu().numpy()


@pytest.mark.parametrize(("form", "most"), [("compiled", 80), pytest.param("fused", 12, marks=needs_triton)])
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_surprisals_are_those_of_torch_and_nothing_lies_behind_them(form, most, data):
    shape = data.draw(st.sampled_from(SHAPES))
    lengths = np.array(data.draw(st.lists(st.integers(1, shape[1] + 2), min_size=1, max_size=most)))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = random.integers(1, shape[0], (len(lengths), shape[1] + 2)).astype(np.uint16)
    rows[np.arange(rows.shape[1]) >= lengths[:, None]] = PAD
    found = surprisals(forms[form][shape], rows, lengths)
    for row, length, ours in zip(rows, lengths, found, strict=True):
        assert ours[:length] == pytest.approx(plain(shape, row), abs=5e-4, rel=1e-4)
        assert (ours[length:] == -np.inf).all()


@pytest.mark.parametrize("form", forms)
def test_no_window_no_surprisal(form):
    found = surprisals(forms[form][SHAPES[0]], np.empty((0, 52), np.uint16), np.empty(0, np.int64))
    assert found.shape == (0, 52)


@pytest.mark.parametrize(
    "make", [CompiledNetwork, pytest.param(lambda network: FusedNetwork(network, DEVICE), marks=needs_triton)]
)
def test_far_apart_logits_stay_finite(make):
    shape = SHAPES[1]
    loud = copy.deepcopy(made[shape])
    with torch.no_grad():
        for weight in loud.parameters():
            weight.mul_(30)
    row = np.array([[1, 2, 3, 4, 5]], np.uint16)
    found = surprisals(make(loud), row, np.array([5]))
    with torch.no_grad():
        tokens = torch.from_numpy(row.astype(np.int64))
        expected = -F.log_softmax(loud.double()(tokens)[0], -1).gather(1, tokens[0][:, None])[:, 0]
    assert found[0, 1:] == pytest.approx(expected[1:].numpy(), rel=1e-3, abs=1e-2)


@needs_triton
@pytest.mark.parametrize("off", [0.1, 2 * SCREEN_NOISE])
def test_a_kernel_that_computes_something_else_is_refused(monkeypatch, off):
    from model import fused  # noqa: PLC0415 - not everywhere

    def wrongly(network, device, laid_out=fused._laid_out):
        other = copy.deepcopy(network)
        other.bias.data[4] += off
        return laid_out(other, device)

    monkeypatch.setattr(fused, "_laid_out", wrongly)
    with pytest.raises(RuntimeError, match="something else"):
        FusedNetwork(made[SHAPES[1]], DEVICE)


@needs_triton
def test_a_window_that_does_not_fit_into_a_tile_does_not_fit():
    assert FusedNetwork.fits(Shape(*SHAPES[0]))
    assert not FusedNetwork.fits(Shape(19, 127, 64, 4, 2, 128))
    assert not FusedNetwork.fits(Shape(19, 50, 160, 4, 2, 128))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no CUDA device")
@pytest.mark.parametrize(("window", "strategy"), [(50, "max"), (50, "topk"), (100, "max"), (150, "mean")])
def test_a_cuda_device_screens_as_the_cpu_does(window, strategy):
    bundle = Bundle(network((19, window, 64, 4, 2, 128, 8)), Vocabulary(tuple("abcdefghijklmno")))
    random = np.random.default_rng(0)
    rows = np.full((70_000, window + 2), PAD, np.uint16)
    for row, length in zip(rows, random.integers(2, window + 3, len(rows)), strict=True):
        row[:length] = [BOS, *random.integers(3, 19, length - 1)]
        if random.random() < 0.2:
            row[length - 1] = END
    there, here = Scorer(bundle, strategy, DEVICE).screen(rows), Scorer(bundle, strategy).screen(rows)
    assert np.abs(there - here).max() < SCREEN_MARGIN / 40
