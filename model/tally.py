"""How likely it is that a session ends with so many events of each kind.

Order tells which event does not belong where it stands; that a block was copied, and never read, shows in no single
event. So when a session closes, its events are counted by kind, and the chain rule gives the probability of the counts:
that of the commonest kind, that of the next one given the first, and so on. Each step is a small network, as in NADE
(Larochelle and Murray, 2011). The sum of the surprisals is what END adds to its own. Given the commoner kinds only, a
rare event bears all that it is worth; given all others, the events that come with it would vouch for it.

Several such chains, which differ by their first weights only, are averaged in the logarithm: where training has seen
little, each of them extrapolates in its own way, and a score should rest on what they agree on.

Only windows that hold the whole session are tallied: of a longer one nobody knows what has left the window.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.vocabulary import END, SPECIAL, UNK

MOST = 15
"""A kind is counted up to this; more is as much."""

STEPS = 3000
"""Of training, at most."""

_CHAINS, _WIDTH, _HIDDEN = 4, 8, 16
_BATCH = 256
_CELLS_CPU, _CELLS_ACCELERATOR = 2**14, 2**19
"""Counts that are judged at a time: some 40 MB, twice as much in float64; elsewhere starting takes longer than that."""

_ROOT = 4
"""Distinct counts are learnt in proportion to the fourth root of their frequency: rare ones are what it is about."""

_FREE = 0.99
"""Share of the training sessions whose counts add nothing. There END's surprisal is its own, so that open windows,
which have no counts, are not outdone by every closed one."""

_TELLING = 0.25
"""Of the highest surprisal: what makes less of a window's is not worth telling."""


@dataclass(frozen=True)
class Tallied:
    """How often a kind of event came in a window that closed.

    Attributes:
        token: the event; None for all that are not counted on their own.
        count: how often.
        usual: the likeliest count, given those of the commoner kinds.
        surprisal: of `count`, in nats.
    """

    token: int | None
    count: int
    usual: int
    surprisal: float


class Tally(nn.Module):
    """The chains. Untaught, they add nothing.

    Kinds are the commonest events, in order; the last one is all others together, events never seen among them.

    Args:
        vocabulary: number of tokens.
        kinds: how many events are counted on their own, at most.
        window: newest events of a session that the network sees. Windows of so many add nothing.
    """

    column: Tensor
    allowance: Tensor

    def __init__(self, vocabulary: int, kinds: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.kinds = min(kinds, vocabulary - SPECIAL) + 1  # T
        chain = (_CHAINS, self.kinds)
        self.count = nn.Parameter(torch.zeros(*chain, MOST + 1, _WIDTH))  # as it is seen, and as it is expected
        self.start = nn.Parameter(torch.zeros(*chain, _WIDTH))
        self.up = nn.Parameter(torch.zeros(_CHAINS, _WIDTH, _HIDDEN))
        self.up_bias = nn.Parameter(torch.zeros(_CHAINS, 1, 1, _HIDDEN))
        self.down = nn.Parameter(torch.zeros(_CHAINS, _HIDDEN, _WIDTH))
        self.down_bias = nn.Parameter(torch.zeros(_CHAINS, 1, 1, _WIDTH))
        self.bias = nn.Parameter(torch.zeros(*chain, MOST + 1))
        self.register_buffer("column", torch.full((vocabulary,), self.kinds))  # of each token; T: not counted
        self.register_buffer("allowance", torch.tensor(torch.inf))  # nats that counts may have for nothing

    def counts(self, tokens: Tensor) -> Tensor:
        """Count the events of windows (B, L) by kind: (B, T)."""
        counts = torch.zeros(len(tokens), self.kinds + 1, dtype=torch.int64, device=tokens.device)  # (B, T + 1)
        column = self.column[tokens]  # (B, L)
        return counts.scatter_add_(1, column, torch.ones_like(column))[:, :-1]

    def forward(self, counts: Tensor) -> Tensor:
        """Map counts (B, T) to the log-probabilities of each count of each kind: (chains, B, T, MOST + 1)."""
        kind = torch.arange(self.kinds, device=counts.device)
        seen = self.count[:, kind, counts.clamp(max=MOST)]  # (C, B, T, D)
        before = seen.cumsum(2) - seen + self.start[:, None]  # (C, B, T, D): of the kinds before
        hidden = F.gelu(torch.einsum("cbtd,cdh->cbth", before, self.up) + self.up_bias)  # (C, B, T, H)
        known = before + torch.einsum("cbth,chd->cbtd", hidden, self.down) + self.down_bias  # (C, B, T, D)
        return F.log_softmax(torch.einsum("cbtd,ctkd->cbtk", known, self.count) + self.bias[:, None], -1)

    def surprisals(self, counts: Tensor) -> Tensor:
        """Return the surprisal, in nats, of each kind's count given those of the commoner kinds: (B, T)."""
        return _surprisals(self(counts), counts)

    def closing(self, tokens: Tensor) -> Tensor:
        """Return what END has of `excess` in closed windows (B, L), in nats: (B, L), 0 elsewhere."""
        return self.excess(tokens)[:, None].masked_fill(tokens != END, 0)

    def excess(self, tokens: Tensor) -> Tensor:
        """Return by how much the counts of closed windows (B, L) are above their allowance, in nats: (B,)."""
        if not len(tokens):
            return torch.zeros(0, dtype=self.bias.dtype, device=tokens.device)
        cells = _CELLS_CPU if tokens.device.type == "cpu" else _CELLS_ACCELERATOR
        parts = self.counts(tokens).split(max(1, cells // self.kinds))
        surprisal = torch.cat([self.surprisals(part).sum(1) for part in parts])  # (B,)
        whole = (self.column[tokens] < self.kinds).sum(1) < self.window  # (B,)
        return (surprisal - self.allowance).clamp(min=0) * whole

    @torch.no_grad()
    def worst(self, tokens: Tensor, most: int) -> list[Tallied]:
        """Return the kinds, `most` at most, that make a closed window (1, L) unusual, the least likely count first."""
        counts = self.counts(tokens)  # (1, T)
        logp = self(counts)  # (C, 1, T, K)
        surprisal = _surprisals(logp, counts)[0]  # (T,)
        usual = logp.mean(0)[0].argmax(-1)  # (T,)
        telling = (counts[0].clamp(max=MOST) != usual) & (surprisal > _TELLING * surprisal.max())  # (T,)
        ascending = [kind for kind in surprisal.argsort().tolist() if telling[kind] or not telling.any()]
        return [
            Tallied(self._token(kind), int(counts[0, kind]), int(usual[kind]), float(surprisal[kind]))
            for kind in ascending[: -most - 1 : -1]
        ]

    def _token(self, kind: int) -> int | None:
        return None if kind == self.kinds - 1 else int((self.column == kind).nonzero()[0, 0])


def _surprisals(logp: Tensor, counts: Tensor) -> Tensor:
    """Return minus the log-probabilities, of `logp` (C, B, T, K), of counts (B, T), the mean over chains: (B, T)."""
    place = counts.clamp(max=MOST)[None, :, :, None].expand(len(logp), -1, -1, 1)
    return -logp.gather(3, place)[..., 0].mean(0)


def teach(
    tally: Tally,
    sessions: Iterable[Sequence[int]],
    seed: int,
    steps: int = STEPS,
    report: Callable[[int], None] = lambda _: None,
) -> None:
    """Teach the counts of normal sessions (token sequences); those that do not fit into the window are left out.

    The same seed and sessions give the same weights. `report` is told each of `steps`, from 1.
    """
    random = torch.Generator().manual_seed(seed)
    frequency = Counter(tuple(session) for session in sessions if len(session) < tally.window)
    if not frequency:
        return
    rows = nn.utils.rnn.pad_sequence([torch.tensor(session) for session in frequency], batch_first=True)  # (S, L)
    tally.column[:] = _columns(frequency, len(tally.column), tally.kinds)
    counts, of = torch.unique(tally.counts(rows), dim=0, return_inverse=True)  # (U, T)
    often = torch.zeros(len(counts), dtype=torch.int64).scatter_add_(0, of, torch.tensor([*frequency.values()]))  # (U,)
    weight = often.double() ** (1 / _ROOT)
    weight /= weight.sum()
    with torch.no_grad():
        for values in (tally.count, tally.start):
            values.normal_(0, 0.3, generator=random)
        for values in (tally.up, tally.down):
            values.uniform_(-1, 1, generator=random).mul_(values.shape[1] ** -0.5)
    # Strong decay: a weight stays only where many sessions speak for it.
    optimizer = torch.optim.AdamW(tally.parameters(), lr=0.003, weight_decay=1.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.003, max(steps, 2))
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        if len(counts) <= _BATCH:
            loss = tally.surprisals(counts).sum(1) @ weight.float()
        else:
            loss = tally.surprisals(counts[torch.multinomial(weight, _BATCH, True, generator=random)]).sum(1).mean()
        (_CHAINS * loss).backward()  # the chains' sum: each learns as if it were alone
        optimizer.step()
        schedule.step()
        report(step)
    with torch.no_grad():
        surprisal = torch.cat([tally.surprisals(some).sum(1) for some in counts.split(_BATCH)])  # (U,)
        ascending = surprisal.argsort()
        sessions_below = often[ascending].cumsum(0)
        tally.allowance.copy_(surprisal[ascending][(sessions_below >= _FREE * sessions_below[-1]).nonzero()[0, 0]])


def _columns(frequency: Mapping[tuple[int, ...], int], vocabulary: int, kinds: int) -> Tensor:
    """Return the kind of each token (V,): those in most sessions first, all after them together."""
    documents = np.zeros(vocabulary, np.int64)
    for session, times in frequency.items():
        documents[list(set(session))] += times
    order = np.argsort(-documents[SPECIAL:], kind="stable") + SPECIAL
    column = torch.full((vocabulary,), kinds)  # PAD, BOS, END
    column[[UNK, *order.tolist()]] = kinds - 1
    column[order[: kinds - 1].tolist()] = torch.arange(kinds - 1)
    return column
