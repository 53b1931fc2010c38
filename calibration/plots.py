"""The pictures of the calibration report, as PNG. Matplotlib's objects only: no window, no global state."""

import warnings
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from calibration.certificate import interval
from calibration.gallery import Exhibit
from consumer.threshold import Level, Threshold

_NORMAL, _FAILING, _GREY = "#3f6688", "#a3332b", "#667085"
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.grid": True,
    "grid.color": "#e4e7ec",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 13,
    "legend.frameon": False,
}
_DPI = 150
_STEP = 15
_CELLS = 20
_QUANTILE_TICKS = (0.5, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9995, 0.9999, 0.99995, 0.99999)

SURPRISE = LinearSegmentedColormap.from_list("surprise", ["#f2f4f7", "#fbd48a", "#e9763c", "#a3332b"])
"""From what the model took for granted to what it did not expect at all."""

_SEVERITY = LinearSegmentedColormap.from_list("severity", ["#c98a00", "#d4531c", "#8c1d18"])

Scores = NDArray[np.float64]


def level_colours(levels: Sequence[Level]) -> list[str]:
    """Return a colour for each level, the graver the darker."""
    return [mpl.colors.to_hex(_SEVERITY(place / max(1, len(levels) - 1))) for place in range(len(levels))]


def distribution(threshold: Threshold, normal: Scores, failing: Scores | None) -> bytes:
    """Draw how many blocks have which score, and where the levels begin. Scores are (N,), in nats."""
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(9.6, 4.4)
        top = max(normal.max(), threshold.levels[-1].threshold, 0.0 if failing is None else failing.max())
        bins = np.linspace(0, float(top) or 1.0, 81).tolist()
        axes.hist(normal, bins, color=_NORMAL, label=f"normal, calibration ({len(normal):,} blocks)")
        if failing is not None:
            axes.hist(
                failing,
                bins,
                histtype="step",
                color=_FAILING,
                linewidth=1.6,
                label=f"failing ({len(failing):,} blocks)",
            )
        axes.set_yscale("log")
        axes.set_ylim(0.7, None)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
        axes.set_xlabel("block score: highest surprisal of an event, nats")
        axes.set_ylabel("blocks (logarithmic)")
        axes.set_xlim(-0.01 * bins[-1], bins[-1])
        axes.set_title("Block scores, and where the levels begin", pad=12 + _STEP * _label_levels(axes, threshold))
        figure.legend(loc="outside lower center", ncols=2)
        return _png(figure)


def alerts_against_quantile(threshold: Threshold, normal: Scores) -> bytes:
    """Draw how many normal blocks alert if another q is chosen, with the certificate's band."""
    n = len(normal)
    ascending = np.sort(normal)
    most = min(1.0, max(0.2, 2 * (1 - threshold.quantile)))  # as far to the left as is of interest
    exceeding = np.unique(np.geomspace(1, max(1, most * n), 400).astype(int)) - 1  # n - rank
    ranks = n - exceeding
    above = n - np.searchsorted(ascending, ascending[ranks - 1], side="right")
    low, high = interval(n, ranks, above)
    share = (exceeding + 1) / (n + 1)
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(9.6, 4.4)
        floor = 0.2e6 / n
        axes.fill_between(share, np.maximum(1e6 * low, floor), 1e6 * high, color=_NORMAL, alpha=0.2, linewidth=0,
                          label="95 % confidence")  # fmt: skip
        axes.plot(share, np.maximum(1e6 * above / n, floor), color=_NORMAL, linewidth=2, label="expected")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(max(share[-1], 2 * share[0]), share[0])
        axes.set_ylim(floor, None)
        ticks = [q for q in _QUANTILE_TICKS if share[0] <= 1 - q + 1e-12 <= share[-1] + 1e-12]
        axes.set_xticks([1 - q for q in ticks], [f"{q:g}" for q in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
        axes.set_xlabel("quantile q: share of normal blocks that must stay silent")
        axes.set_ylabel("alerts per million normal blocks")
        for level, colour in zip(threshold.levels, level_colours(threshold.levels), strict=True):
            at, expected = 1 - level.quantile, max(float(level.expected_alerts_per_million), floor)
            axes.plot([at, at], [1e6 * edge or floor for edge in level.certificate.interval], color=colour, linewidth=2)
            axes.plot([at], [expected], "o", color=colour, markersize=7)
            axes.annotate(
                f"{level.name}\n{level.expected_alerts_per_million:,}", (at, expected), (9, 2),
                textcoords="offset points", color=colour, fontweight="bold",
            )  # fmt: skip
        if threshold.blocks_per_day:
            scale = threshold.blocks_per_day / 1e6
            right = axes.secondary_yaxis(
                "right", functions=(partial(np.multiply, scale), partial(np.multiply, 1 / scale))
            )
            right.set_ylabel("alerts a day from normal blocks")
            right.yaxis.set_major_formatter(FuncFormatter(_thousands))
            right.yaxis.set_minor_locator(NullLocator())
        axes.set_title("Alerts from normal blocks, whatever quantile is chosen")
        axes.legend(loc="lower left")
        return _png(figure)


def highest(shown: Sequence[Exhibit]) -> bytes:
    """Draw the windows of blocks as rows of cells, coloured by surprisal; long ones go on in the next row."""
    scale = surprise_scale(shown)
    columns = min(_CELLS, max(len(exhibit.events) for exhibit in shown))
    widest = max(len(_shortened(event)) for exhibit in shown for event in exhibit.events)
    tops: list[float] = [0.0]
    for exhibit in shown:
        tops.append(tops[-1] + -(-len(exhibit.events) // _CELLS) + 0.35)
    with mpl.rc_context(_STYLE | {"axes.grid": False}):
        figure, axes = _canvas(3.6 + max(0.5, 0.12 * widest) * columns, 0.9 + 0.34 * tops[-1])
        for top, exhibit in zip(tops, shown, strict=False):
            for place, (event, surprisal) in enumerate(zip(exhibit.events, exhibit.surprisals, strict=True)):
                x, y = place % _CELLS, top + place // _CELLS
                colour = SURPRISE(scale(surprisal))
                offends = place == exhibit.offender
                axes.add_patch(
                    Rectangle(
                        (x + 0.03, y + 0.06), 0.94, 0.88, facecolor=colour, edgecolor="black",
                        linewidth=2 if offends else 0, zorder=2,
                    )
                )  # fmt: skip
                axes.text(x + 0.5, y + 0.5, _shortened(event), ha="center", va="center_baseline", fontsize=9,
                          color="white" if is_dark(colour) else "#1d2939", parse_math=False)  # fmt: skip
        axes.set_xlim(0, columns)
        axes.set_ylim(tops[-1], 0)
        axes.set_yticks([top + 0.5 for top in tops[:-1]])
        axes.set_yticklabels([f"{_shortened(item.name, 26)}   {item.score:.2f}" for item in shown], parse_math=False)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title("The highest normal blocks: score, events, and in a frame the most surprising one")
        bar = figure.colorbar(mpl.cm.ScalarMappable(scale, SURPRISE), ax=axes, aspect=25, pad=0.01)
        bar.set_label("surprisal, nats")
        bar.outline.set_visible(False)
        return _png(figure)


def detection(threshold: Threshold, normal: Scores, failing: Scores, prior: float) -> bytes:
    """Draw ROC and precision-recall curves; precision is at the share `prior` of failing blocks."""
    truth = np.repeat([0, 1], [len(normal), len(failing)])
    scores = np.concatenate([normal, failing])
    weights = np.where(truth == 1, prior / len(failing), (1 - prior) / len(normal))
    alarms, hits, _ = roc_curve(truth, scores)
    precision, recall, _ = precision_recall_curve(truth, scores, sample_weight=weights)
    floor = 0.5 / len(normal)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 4.4), dpi=_DPI, layout="constrained")
        left, right = figure.subplots(1, 2)
        left.step(np.maximum(alarms, floor), hits, where="post", color=_NORMAL, linewidth=2)
        left.set_xscale("log")
        left.set_xlim(floor, 1)
        left.set_xlabel("false alarms: share of normal blocks that alert")
        left.set_ylabel("recall: share of failing blocks that alert")
        left.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.4%}".rstrip("0%").rstrip(".") + " %"))
        left.set_title("ROC")
        right.step(recall, precision, where="post", color=_NORMAL, linewidth=2)
        right.set_xlim(0, 1.02)
        right.set_xlabel("recall: share of failing blocks that alert")
        right.set_ylabel("precision: share of alerting blocks that fail")
        right.set_title(f"Precision-recall, {prior:.3g} of blocks failing")
        for level, colour in zip(threshold.levels, level_colours(threshold.levels), strict=True):
            false, true = float((normal > level.threshold).mean()), float((failing > level.threshold).mean())
            flagged = prior * true + (1 - prior) * false
            left.plot([max(false, floor)], [true], "o", color=colour, markersize=8, label=level.name)
            right.plot([true], [prior * true / flagged if flagged else 1.0], "o", color=colour, markersize=8)
        for axes in (left, right):
            axes.set_ylim(0, 1.02)
        left.legend(loc="lower right")
        return _png(figure)


def surprise_scale(shown: Sequence[Exhibit]) -> Normalize:
    """Return what turns surprisals into places on `SURPRISE`: from 0 to the highest shown."""
    return Normalize(0, max(1.0, *(max(exhibit.surprisals) for exhibit in shown)), clip=True)


def is_dark(colour: tuple[float, float, float, float]) -> bool:
    """Say whether writing on an RGBA colour should be white (ITU-R BT.601 luma)."""
    red, green, blue, _ = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.55


def _label_levels(axes: Axes, threshold: Threshold) -> int:
    """Draw the levels as named lines, each name a step above one that is too near; return the number of steps."""
    step, steps, before = 0, 0, -np.inf
    left, right = axes.get_xlim()
    for level, colour in zip(threshold.levels, level_colours(threshold.levels), strict=True):
        step = step + 1 if level.threshold - before < 0.25 * (right - left) else 1
        steps, before = max(step, steps), level.threshold
        axes.axvline(level.threshold, color=colour, linewidth=1.8)
        axes.annotate(
            f"{level.name} > {level.threshold:.4g}", (level.threshold, 1), (4, 4 + _STEP * (step - 1)),
            xycoords=("data", "axes fraction"), textcoords="offset points", color=colour, fontweight="bold",
        )  # fmt: skip
    return steps


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    return figure, figure.subplots()


def _png(figure: Figure) -> bytes:
    picture = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks is drawn as boxes
        figure.savefig(picture, format="png", metadata={"Software": None})  # equal data, equal bytes
    return picture.getvalue()


def _thousands(number: float, _: object) -> str:
    return f"{number:,.0f}" if number >= 1 else f"{number:g}"


def _shortened(text: str, length: int = 12) -> str:
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    return text if len(text) <= length else text[: length - 1] + "…"
