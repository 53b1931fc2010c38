"""The transformer autoencoder: a window of tokens in, at every position a distribution over tokens out."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.tally import Tally
from model.vocabulary import BOS, END, PAD


@dataclass(frozen=True)
class Shape:
    """Hyper-parameters that fix the network's weights.

    `window` counts events; with BOS in front and END behind, the network sees up to `positions` tokens. `tallied` kinds
    of event are counted when a session ends.
    """

    vocabulary: int
    window: int
    width: int
    heads: int
    layers: int
    feedforward: int
    tallied: int = 0

    @property
    def positions(self) -> int:
        """Longest input in tokens: BOS + window + END."""
        return self.window + 2


class Attention(nn.Module):
    """Multi-head self-attention over the real tokens of a window, in both directions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Map (B, L, D) to (B, L, D); `real` (B, 1, 1, L) says which keys are no filler."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # 3 × (B, H, L, D/H)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=real)  # (B, H, L, D/H)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))  # (B, L, D)


class Layer(nn.Module):
    """Attention, then a feed-forward network, each on normalised input and added to the stream."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.norm_feedforward = nn.LayerNorm(shape.width)
        self.feedforward = nn.Sequential(
            nn.Linear(shape.width, shape.feedforward), nn.GELU(), nn.Linear(shape.feedforward, shape.width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Map (B, L, D) to (B, L, D)."""
        x = x + self.dropout(self.attention(self.norm_attention(x), real))
        return x + self.dropout(self.feedforward(self.norm_feedforward(x)))


class Autoencoder(nn.Module):
    """A transformer encoder whose output layer shares its weights with the token embedding.

    It is trained to undo random replacements (`model.training`); what it gives back at a position is the
    posterior over the event that belongs there, given the whole window and the event that was shown. Where the session
    ends, a `Tally` adds how likely its counts are.
    """

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.token = nn.Embedding(shape.vocabulary, shape.width)
        self.position = nn.Embedding(shape.positions, shape.width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.bias = nn.Parameter(torch.zeros(shape.vocabulary))
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=shape.width**-0.5)
        self.tally = Tally(shape.vocabulary, shape.tallied, shape.window) if shape.tallied else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, L), filled up with PAD, to logits (B, L, V)."""
        real = (tokens != PAD)[:, None, None, :]  # (B, 1, 1, L)
        x = self.dropout(self.token(tokens) + self.position.weight[: tokens.shape[1]])  # (B, L, D)
        for layer in self.layers:
            x = layer(x, real)
        return F.linear(self.norm(x), self.token.weight, self.bias)  # (B, L, V)

    def surprisals(self, tokens: Tensor) -> Tensor:
        """Return the surprisal of each token of windows (B, L), in nats: (B, L), -inf for BOS and PAD.

        That of END is with `closing`.
        """
        return self.surprisals_of(tokens, self.logp(tokens))

    def logp(self, tokens: Tensor) -> Tensor:
        """Return the log-probability of each token at each place of windows (B, L): (B, L, V)."""
        return F.log_softmax(self(tokens), -1)

    def surprisals_of(self, tokens: Tensor, logp: Tensor) -> Tensor:
        """Return `surprisals` of windows (B, L) whose `logp` (B, L, V) is known: (B, L)."""
        surprisal = -logp.gather(2, tokens[:, :, None])[:, :, 0] + self.closing(tokens)  # (B, L)
        return surprisal.masked_fill((tokens == BOS) | (tokens == PAD), -torch.inf)

    def closing(self, tokens: Tensor) -> Tensor:
        """Return what the counts of windows (B, L) add to END's surprisal, in nats: (B, L), 0 elsewhere."""
        added = torch.zeros(tokens.shape, dtype=self.bias.dtype, device=tokens.device)  # (B, L)
        if self.tally is not None:
            ended = (tokens == END).any(1).nonzero()[:, 0]  # (E,): few windows are closed
            added[ended] = self.tally.closing(tokens[ended])
        return added

    @property
    def parameter_count(self) -> int:
        """Number of trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())
