"""The benchmark's results as pictures."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

_SMALLEST = 0.01


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what was measured; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    if results.get("profile"):
        drawn.append(_save(_second(results["profile"]), folder / "second.svg"))
    scaling: dict[str, dict[str, float]] = {
        name: results[name]["eps"] for name in ("open_blocks", "instances") if name in results
    }
    if scaling:
        drawn.append(_save(_scaling(scaling), folder / "scaling.svg"))
    return drawn


def _second(shares: dict[str, float]) -> Figure:
    """Stack the shares of a second, the largest first; what is below a hundredth is one piece."""
    large = {name: share for name, share in shares.items() if share >= _SMALLEST}
    rest = 1 - sum(large.values())
    pieces = {**large, "the rest": rest} if rest > _SMALLEST / 10 else large
    figure = Figure(figsize=(9, 2 + 0.09 * len(pieces)), layout="constrained")
    axes = figure.subplots()
    left = 0.0
    colours = mpl.colormaps["tab20"].colors  # type: ignore[attr-defined]
    for (name, share), colour in zip(pieces.items(), colours * 3, strict=False):
        axes.barh([0], [share], left=left, color=colour, label=f"{name}  {share:.0%}")
        left += share
    axes.set(xlim=(0, 1), yticks=[], xlabel="seconds of one second at work", title="Where a second goes")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def _scaling(curves: dict[str, dict[str, float]]) -> Figure:
    """Plot events a second against open blocks and against instances."""
    figure = Figure(figsize=(4.8 * len(curves), 3.4), layout="constrained")
    for axes, (name, curve) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        _curve(axes, name.replace("_", " "), {int(x): y for x, y in curve.items()})
    return figure


def _curve(axes: Axes, what: str, curve: dict[int, float]) -> None:
    axes.plot(list(curve), list(curve.values()), "o-")
    axes.set(xlabel=what, ylabel="events a second", ylim=(0, 1.15 * max(curve.values())))
    if max(curve) > 100:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xticks(list(curve))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path
