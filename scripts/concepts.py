"""`python -m scripts.concepts`: draws docs/concepts.svg, one failing block as the detector sees it.

A small model is trained and calibrated on simulated healthy blocks; the numbers in the picture are its own.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from calibration.block_scores import block_scores
from calibration.quantile import conformal_quantile
from model.bundle import Bundle
from model.cli import console, run
from model.config import ModelSettings, TrainingSettings
from model.scoring import Explanation, Scorer
from model.sessions import Session
from model.training import train
from model.vocabulary import BOS, END, END_NAME, PAD, Vocabulary
from scripts.output import check_file
from scripts.simulator import Workload, simulate

PICTURE = Path(__file__).parents[1] / "docs" / "concepts.svg"

_QUANTILE = 0.99
_FAULT = "failed_delete"
_INK, _GREY, _PALE, _BAD = "#1d2939", "#667085", "#d0d5dd", "#a3332b"
_SURPRISE = LinearSegmentedColormap.from_list("surprise", ["#eef3f7", "#f5c9a8", _BAD])
_SCALE = Normalize(0, 6)
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "svg.hashsalt": "concepts",  # the same picture is the same file
    "svg.fonttype": "path",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
}


@dataclass(frozen=True)
class Story:
    """A failing block and what the model says of it: an explanation after each event, and one of its end."""

    session: Session
    looks: list[Explanation]
    threshold: float
    vocabulary: Vocabulary
    live: Workload

    @property
    def names(self) -> list[str]:
        """The events of the block, and END."""
        return [*self.session.events, END_NAME]

    @property
    def alert(self) -> int:
        """The first look above the threshold."""
        return next(number for number, look in enumerate(self.looks) if look.score > self.threshold)


def story() -> Story:
    """Train, calibrate, and follow the shortest block of a live stream that fails in the chosen way."""
    sessions = simulate(1000, 0.0, 1).sessions()
    vocabulary = Vocabulary.of(session.events for session in sessions)
    network = train(
        [vocabulary.encode(session.events) for session in sessions],
        len(vocabulary),
        ModelSettings(width=32, heads=2, feedforward=64),
        TrainingSettings(epochs=30, batch_size=128),
        torch.device("cpu"),
    )
    scorer = Scorer(Bundle(network, vocabulary))
    healthy = block_scores(simulate(1000, 0.0, 2).sessions(), scorer, every=1).blocks
    threshold = conformal_quantile(healthy, _QUANTILE).value
    live = simulate(60, 0.2, 21)
    failing = [session for session in live.sessions() if live.faults.get(session.block_id) == _FAULT]
    session = min(failing, key=lambda session: len(session.events))
    tokens = vocabulary.encode(session.events)
    looks = [tokens[: length + 1] for length in range(len(tokens))] + [[*tokens, END]]
    rows = np.full((len(looks), scorer.bundle.window + 2), PAD, np.uint16)
    rows[:, 0] = BOS
    for row, look in zip(rows, looks, strict=True):
        row[1 : 1 + len(look)] = look
    return Story(session, [scorer.explain(row) for row in rows], threshold, vocabulary, live)


def draw(told: Story) -> Figure:
    """Return the picture: the topic above, the block's window at the alert, and the score after each event."""
    figure = Figure(figsize=(14, 7))
    figure.set_layout_engine("constrained", h_pad=0.12)
    topic, window, score = figure.subplots(3, 1, height_ratios=[0.35, 1.2, 2])
    _topic(topic, told)
    _window(window, told)
    _score(score, told)
    return figure


def _topic(axes: Axes, told: Story) -> None:
    """Events as they come, of many blocks; those of one block stand out."""
    events = told.live.events
    born = next(number for number, event in enumerate(events) if event.block_id == told.session.block_id)
    shown = events[max(0, born - 8) : born + 52]
    blocks = list(dict.fromkeys(event.block_id for event in shown))
    for place, event in enumerate(shown):
        ours = event.block_id == told.session.block_id
        colour = _INK if ours else mpl.colormaps["tab20c"](4 * (blocks.index(event.block_id) % 5) + 3)
        axes.add_patch(FancyBboxPatch((place, 0), 0.62, 1, boxstyle="round,pad=0.06", fc=colour, ec="none"))
    axes.set_title("The topic: EVENTS of many BLOCKS as they happen; one block is dark", loc="left", weight="bold")
    axes.set(xlim=(-0.5, len(shown)), ylim=(-0.2, 1.2))
    axes.axis("off")


def _window(axes: Axes, told: Story) -> None:
    """The window at the first look that alerts: each event with its surprisal."""
    look = told.looks[told.alert]
    shown = told.names[: told.alert + 1]
    for place, (name, surprisal) in enumerate(zip(shown, look.surprisals, strict=True)):
        offends = place == look.offender
        box = FancyBboxPatch(
            (place - 0.41, 0), 0.82, 1, boxstyle="round,pad=0.03", fc=_SURPRISE(_SCALE(surprisal)),
            ec=_BAD if offends else _PALE, lw=2 if offends else 1,
        )  # fmt: skip
        axes.add_patch(box)
        ink = "white" if surprisal > 4 else _INK
        axes.text(place, 0.5, name.replace("_", "\n"), ha="center", va="center", fontsize=6.5, color=ink)
        axes.text(place, -0.3, f"{surprisal:.2f}", ha="center", va="center", fontsize=8, color=_INK)
    instead = ", ".join(f"{told.vocabulary.name(token)} {probability:.0%}" for token, probability in look.expected[:2])
    axes.annotate(
        f"most surprising: {max(look.surprisals):.2f} nats is the SCORE\nexpected instead: {instead}",
        (look.offender, 1.05), (look.offender - 1.5, 1.75), color=_BAD, fontsize=9, va="center", ha="right",
        arrowprops={"arrowstyle": "->", "color": _BAD},
    )  # fmt: skip
    axes.set_title(
        "One look: the block's WINDOW of newest events, and the SURPRISAL of each (nats)", loc="left", weight="bold"
    )
    axes.set(xlim=(-0.8, len(told.names) - 0.2), ylim=(-0.6, 2.3))
    axes.axis("off")


def _score(axes: Axes, told: Story) -> None:
    """The score of each look, against the threshold."""
    scores = [look.score for look in told.looks]
    axes.axhspan(told.threshold, max(scores) * 1.25, color=_BAD, alpha=0.06, lw=0)
    axes.plot(range(len(scores)), scores, "o-", color=_INK, lw=1.2, ms=5)
    axes.axhline(told.threshold, color=_BAD, ls="--", lw=1.2)
    axes.text(-0.7, told.threshold, f"THRESHOLD {told.threshold:.2f}  ", color=_BAD, va="bottom", fontsize=9)
    axes.plot(told.alert, scores[told.alert], "o", ms=15, mfc="none", mec=_BAD, mew=2)
    axes.annotate(
        "ALERT", (told.alert, scores[told.alert]), (told.alert - 1.6, scores[told.alert]), color=_BAD, weight="bold",
        va="center", arrowprops={"arrowstyle": "->", "color": _BAD},
    )  # fmt: skip
    axes.set_title(
        "Every LOOK, one after each event and one at the block's END: its score against the THRESHOLD",
        loc="left",
        weight="bold",
    )
    axes.set(xlim=(-0.8, len(scores) - 0.2), ylim=(0, max(scores) * 1.25), ylabel="score (nats)")
    axes.set_xticks(range(len(scores)), [name.replace("_", "\n") for name in told.names], fontsize=6.5)


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(prog="python -m scripts.concepts", description="Draw docs/concepts.svg.")
    parser.add_argument(
        "--out", type=Path, default=PICTURE, help="where to (default: docs/concepts.svg); .png works too"
    )
    out = parser.parse_args().out
    check_file("--out", out)
    with console.status("training a small model"):
        told = story()
    with mpl.rc_context(_STYLE):
        svg = out.suffix == ".svg"
        draw(told).savefig(out, dpi=130, facecolor="white", metadata={"Date": None} if svg else None)
    console.print(f"written to {out}")


if __name__ == "__main__":
    run(main)
