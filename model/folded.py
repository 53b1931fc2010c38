"""The network's weights as whoever writes its forward pass by hand wants them: what training needs is gone.

Gains and shifts of the normalisations and the scale of attention are folded into the weights behind them, the keys'
bias cancels in the softmax, and the values' bias passes through it into that of the output.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.network import Autoencoder

Array = NDArray[np.floating]


class Folded(NamedTuple):
    """The weights; those of the layers are stacked. A linear layer's are (out, in)."""

    token: Array  # (V, D)
    position: Array  # (P, D)
    qkv: Array  # (layers, 3 D, D)
    query: Array  # (layers, D), the bias
    out: Array  # (layers, D, D)
    out_bias: Array  # (layers, D)
    up: Array  # (layers, FF, D)
    up_bias: Array  # (layers, FF)
    down: Array  # (layers, D, FF)
    down_bias: Array  # (layers, D)
    logits: Array  # (V, D)
    logits_bias: Array  # (V,)


def folded(network: Autoencoder) -> Folded:
    """Fold what is constant after training into the matrices next to it; all in float64."""
    state = {name: weight.detach().cpu().double().numpy() for name, weight in network.state_dict().items()}
    width, heads = network.shape.width, network.shape.heads
    layers = []
    for layer in range(network.shape.layers):
        own = {name.removeprefix(f"layers.{layer}."): weight for name, weight in state.items()}
        qkv = own["attention.qkv.weight"] * own["norm_attention.weight"]
        bias = own["attention.qkv.bias"] + own["attention.qkv.weight"] @ own["norm_attention.bias"]
        scale = (width // heads) ** -0.5
        qkv[:width] *= scale
        out, up = own["attention.out.weight"], own["feedforward.0.weight"]
        out_bias = own["attention.out.bias"] + out @ bias[2 * width :]
        up_bias = own["feedforward.0.bias"] + up @ own["norm_feedforward.bias"]
        up = up * own["norm_feedforward.weight"]
        down, down_bias = own["feedforward.2.weight"], own["feedforward.2.bias"]
        layers.append((qkv, bias[:width] * scale, out, out_bias, up, up_bias, down, down_bias))
    token = state["token.weight"]
    logits = token * state["norm.weight"], state["bias"] + token @ state["norm.bias"]
    stacked = map(np.stack, zip(*layers, strict=True))
    return Folded._make([token, state["position.weight"], *stacked, *logits])
