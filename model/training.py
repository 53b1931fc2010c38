"""Teaches the autoencoder what normal looks like."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from model.config import ModelSettings, TrainingSettings
from model.corruption import TrainingWindows, corrupt
from model.network import Autoencoder, Shape
from model.tally import STEPS, teach
from model.vocabulary import BOS, PAD

_PARTS_CPU = 4
"""There a step goes through the network in so many parts of windows of like length: less filler to compute."""


@dataclass(frozen=True)
class Progress:
    """Where training stands after a step.

    `loss` is the mean surprisal of the clean tokens in nats, `restored` the share of replaced tokens that the
    network gives back right; both are running means over about the last fifty steps.
    """

    step: int
    steps: int
    loss: float
    restored: float


def train(
    sessions: Sequence[Sequence[int]],
    vocabulary: int,
    model: ModelSettings,
    training: TrainingSettings,
    device: torch.device,
    report: Callable[[Progress], None] = lambda _: None,
) -> Autoencoder:
    """Train a network on the token sequences of normal sessions and return it, in eval mode, on the CPU.

    The same seed, sessions, device and number of threads give the same weights: sums of floats depend on how they are
    shared out. The weights returned are an exponential moving average over the steps, which forgets the last steps'
    noise. The last of the steps teach the tally.
    """
    torch.manual_seed(training.seed)
    random = np.random.default_rng(training.seed)
    windows = TrainingWindows(sessions, vocabulary=vocabulary, window=model.window, swaps=training.swaps)
    shape = Shape(vocabulary, model.window, model.width, model.heads, model.layers, model.feedforward, model.tallied)
    network = Autoencoder(shape, training.dropout).to(device).train()
    average = copy.deepcopy(network).eval()
    parts = min(_PARTS_CPU, training.batch_size) if device.type == "cpu" else 1
    steps = training.epochs * -(-len(sessions) // training.batch_size)
    tally_steps = 0 if average.tally is None else min(STEPS, 2 * steps)
    all_steps = steps + tally_steps
    optimizer = torch.optim.AdamW(network.parameters(), lr=training.learning_rate, weight_decay=0.01)
    planned = 11 if steps == 10 else max(steps, 2)  # a rise over a tenth of 10 would be no step long: divided by 0
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=training.learning_rate, total_steps=planned, pct_start=0.1
    )
    loss_mean = restored_mean = 0.0
    for step in range(1, steps + 1):
        drawn = windows.draw(training.batch_size, random)
        noisy_rows, wanted_rows = corrupt(drawn, training.corruption, vocabulary, random)
        lengths = (noisy_rows != PAD).sum(axis=1)
        tokens = int((lengths - 1).sum())  # BOS is not predicted
        loss = replaced = right = 0.0
        optimizer.zero_grad(set_to_none=True)
        for part in np.array_split(np.argsort(lengths, kind="stable"), parts):
            longest = int(lengths[part].max(initial=1))
            noisy = torch.from_numpy(noisy_rows[part, :longest]).to(device)  # (P, L)
            wanted = torch.from_numpy(wanted_rows[part, :longest]).to(device)  # (P, L)
            real = (noisy != PAD) & (noisy != BOS)  # (P, L)
            logits = network(noisy)[real]  # (N, V)
            part_loss = F.cross_entropy(logits, wanted[real], reduction="sum") / tokens
            part_loss.backward()
            changed = (noisy != wanted)[real]  # (N,)
            loss += part_loss.item()
            replaced += changed.sum().item()
            right += (logits.detach().argmax(-1) == wanted[real])[changed].sum().item()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        _move_average(average, network, min(training.averaging, (1 + step) / (10 + step)))

        memory = min(0.98, 1 - 1 / step)
        loss_mean = memory * loss_mean + (1 - memory) * loss
        restored_mean = memory * restored_mean + (1 - memory) * (right / replaced if replaced else 0.0)
        report(Progress(step, all_steps, loss_mean, restored_mean))
    average.cpu()
    if average.tally is not None:
        teach(
            average.tally, sessions, training.seed, tally_steps,
            lambda step: report(Progress(steps + step, all_steps, loss_mean, restored_mean)),
        )  # fmt: skip
    return average


@torch.no_grad()
def _move_average(average: Autoencoder, network: Autoencoder, decay: float) -> None:
    for kept, new in zip(average.parameters(), network.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)
