"""The calibration report: one HTML file that needs nothing else, and its pictures beside it."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from matplotlib.colors import to_hex
from numpy import float64
from numpy.typing import NDArray

from calibration import plots
from calibration.block_scores import Block
from calibration.gallery import exhibits
from consumer.threshold import Threshold
from model.errors import UserError
from model.scoring import Scorer


@dataclass(frozen=True)
class Findings:
    """What the report shows.

    Attributes:
        threshold: made from `normal`.
        source: where the blocks come from, a line each.
        normal: (N,) block scores of the calibration blocks.
        highest: the highest of these blocks.
        failing: (M,) block scores of blocks known to fail; None: there are none.
        prior: share of failing blocks in nature.
    """

    threshold: Threshold
    source: Sequence[str]
    normal: NDArray[float64]
    highest: Sequence[Block]
    failing: NDArray[float64] | None
    prior: float


@dataclass(frozen=True)
class _Chip:
    """An event of a window as the page shows it."""

    event: str
    surprisal: float
    colour: str
    is_dark: bool
    offends: bool


def write_report(findings: Findings, scorer: Scorer, path: Path) -> Path:
    """Write the report to `path` and its pictures into a folder of the same name; return that folder.

    Raises:
        UserError: these cannot be written.
    """
    threshold = findings.threshold
    shown = exhibits(findings.highest, scorer, threshold)
    pictures = {
        "distribution": plots.distribution(threshold, findings.normal, findings.failing),
        "alerts_against_quantile": plots.alerts_against_quantile(threshold, findings.normal),
        "highest_blocks": plots.highest(shown),
    }
    if findings.failing is not None:
        pictures["detection"] = plots.detection(threshold, findings.normal, findings.failing, findings.prior)
    scale = plots.surprise_scale(shown)
    chips = []
    for exhibit in shown:
        colours = [plots.SURPRISE(scale(surprisal)) for surprisal in exhibit.surprisals]
        chips.append(
            [
                _Chip(event, surprisal, to_hex(colour), plots.is_dark(colour), place == exhibit.offender)
                for place, (event, surprisal, colour) in enumerate(
                    zip(exhibit.events, exhibit.surprisals, colours, strict=True)
                )
            ]
        )
    page = _template().render(
        threshold=threshold,
        levels=list(zip(threshold.levels, plots.level_colours(threshold.levels), strict=True)),
        source=findings.source,
        pictures={name: b64encode(picture).decode() for name, picture in pictures.items()},
        exhibits=list(zip(shown, chips, strict=True)),
        legend=[to_hex(plots.SURPRISE(step / 10)) for step in range(11)],
        most=scale.vmax,
        failing=None if findings.failing is None else len(findings.failing),
        prior=findings.prior,
    )
    folder = path.with_suffix("")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            (folder / f"{name}.png").write_bytes(picture)
        path.write_bytes(page.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"{path}: cannot write the report ({error.strerror or error})") from None
    return folder


def _template() -> Template:
    source = files("calibration").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"share": _share, "number": _number}
    return environment.from_string(source)


def _share(value: float) -> str:
    """Return a probability as a percentage of three significant digits."""
    return f"{100 * value:.3g} %"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
