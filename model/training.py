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
from model.vocabulary import BOS, PAD


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

    The same seed, sessions and device give the same weights. The weights returned are an exponential moving
    average over the steps, which forgets the last steps' noise.
    """
    torch.manual_seed(training.seed)
    random = np.random.default_rng(training.seed)
    windows = TrainingWindows(sessions, vocabulary=vocabulary, window=model.window, swaps=training.swaps)
    shape = Shape(vocabulary, model.window, model.width, model.heads, model.layers, model.feedforward)
    network = Autoencoder(shape, training.dropout).to(device).train()
    average = copy.deepcopy(network).eval()
    steps = training.epochs * -(-len(sessions) // training.batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=training.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=training.learning_rate, total_steps=max(steps, 2), pct_start=0.1
    )
    loss_mean = restored_mean = 0.0
    for step in range(1, steps + 1):
        clean_rows = windows.draw(training.batch_size, random)
        longest = int((clean_rows != PAD).sum(axis=1).max())
        clean_rows = clean_rows[:, :longest]
        noisy_rows = corrupt(clean_rows, training.corruption, vocabulary, random)
        clean = torch.from_numpy(clean_rows).to(device)  # (B, L)
        noisy = torch.from_numpy(noisy_rows).to(device)  # (B, L)
        real = (clean != PAD) & (clean != BOS)  # (B, L)
        logits = network(noisy)[real]  # (N, V)
        loss = F.cross_entropy(logits, clean[real])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        _move_average(average, network, min(training.averaging, (1 + step) / (10 + step)))

        replaced = (noisy != clean)[real]
        right = (logits.detach().argmax(-1) == clean[real])[replaced].float().mean().nan_to_num()
        memory = min(0.98, 1 - 1 / step)
        loss_mean = memory * loss_mean + (1 - memory) * loss.item()
        restored_mean = memory * restored_mean + (1 - memory) * right.item()
        report(Progress(step, steps, loss_mean, restored_mean))
    return average.cpu()


@torch.no_grad()
def _move_average(average: Autoencoder, network: Autoencoder, decay: float) -> None:
    for kept, new in zip(average.parameters(), network.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)
