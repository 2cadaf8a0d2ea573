"""Pictures of gradients. Needs matplotlib: ``pip install "fastlane_ext[plot]"``."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ._arguments import bad
from ._files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_gradients", "plot_report"]

_INK, _MUTED, _GRID = "#1a1a1a", "#6b6b6b", "#dddddd"
# Blue, orange, green, purple: colour-blind eyes can tell them apart too.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#7b5ea7")


class Row(Protocol):
    """The part of a parameter's row that a picture shows; `fastlane_ext.gradients.GradientRow` has it."""

    @property
    def name(self) -> str: ...

    @property
    def mean_abs(self) -> float | None: ...


class Report(Protocol):
    """The part of a report that a picture shows; `fastlane_ext.gradients.GradientReport` has it."""

    @property
    def rows(self) -> Sequence[Row]: ...


def plot_report(report: Report, path: str | os.PathLike[str], *, title: str) -> None:
    """The work of `GradientReport.plot`."""
    figure = _figure(7.5, 1.3 + 0.28 * len(report.rows))
    axes = figure.add_subplot()
    drawn = [row.mean_abs for row in report.rows if row.mean_abs and math.isfinite(row.mean_abs)]
    low = 10.0 ** math.floor(math.log10(min(drawn, default=1.0)) - 0.3)
    for place, row in enumerate(report.rows):
        value = row.mean_abs
        note = "no gradient" if value is None else "0" if value == 0 else f"{value:.1e}"
        if value and math.isfinite(value):
            colour = _COLOURS[0] if "weight" in row.name else "#9ecae1"
            axes.barh(place, value - low, left=low, height=0.7, color=colour)
        end = value if value and math.isfinite(value) else low
        axes.annotate(note, (end, place), (4, 0), textcoords="offset points", va="center", size=8, color=_MUTED)
    axes.set_xscale("log")
    high = max(drawn, default=1.0)
    axes.set_xlim(low, high * (high / low) ** 0.15)
    axes.set_yticks(range(len(report.rows)), [row.name for row in report.rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("mean |gradient| (log scale)", color=_MUTED)
    _finish(figure, axes, title, "x", path)


def plot_gradients(
    reports: Mapping[str, Report],
    path: str | os.PathLike[str],
    *,
    title: str = "Shortcuts keep gradients from vanishing",
    subtitle: str | None = None,
) -> None:
    """Save a picture, one line for each report: mean |gradient| of each layer's weight, log scale, input side first.

    Args:
        reports: label to report, e.g. ``{"without shortcuts": a, "with shortcuts": b}``. The layers are the weights
            that all reports have, in order; a projection that only one network has is left out.
        path: where to save; the ending picks the format.
        title: the picture's heading.
        subtitle: a line below the heading, such as which network it is.

    Raises:
        ImportError: matplotlib is missing; the message has the command that installs it.
        OSError, ValueError: the picture cannot be written; there is no report, or no weight that all reports have.
    """
    means = {
        label: {row.name: row.mean_abs for row in report.rows if "weight" in row.name}
        for label, report in reports.items()
    }
    first = next(iter(means.values()), {})
    names = [name for name in first if all(name in values for values in means.values())]
    if not names:
        raise ValueError(
            "reports: got no weight that all reports have, expected at least one; compare networks with the "
            "same layer names"
        )
    figure = _figure(7.5, 4.2)
    axes = figure.add_subplot()
    places = range(1, len(names) + 1)
    for (label, values), colour in zip(means.items(), _COLOURS * len(means), strict=False):
        # A zero or a missing gradient has no place on a log scale: the line has a gap there.
        heights = [values[name] or math.nan for name in names]
        axes.plot(places, heights, "o-", color=colour, linewidth=2, label=label)
    axes.set_yscale("log")
    axes.set_xticks(places[:: 1 + len(names) // 20])
    axes.set_xlabel("layer (1 is next to the input: the last one that gradients reach)", color=_MUTED)
    axes.set_ylabel("mean |gradient| (log scale)", color=_MUTED)
    axes.legend(frameon=False)
    start = [values[names[0]] for values in means.values()]
    if len(start) == 2 and all(value and math.isfinite(value) for value in start) and start[0] != start[1]:
        low, high = sorted(value for value in start if value)
        arrow = {"arrowstyle": "->", "color": _MUTED, "shrinkA": 6, "shrinkB": 6}
        axes.annotate("", (1, high), (1, low), arrowprops=arrow)
        middle = (1, math.sqrt(low * high))
        axes.annotate(f"{high / low:,.3g} times larger", middle, (8, 0), textcoords="offset points", color=_INK)
    lines = textwrap.wrap(subtitle or "", 100)
    axes.annotate(
        "\n".join(lines), (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", color=_MUTED, size=9
    )
    _finish(figure, axes, title, "y", path, pad=6 + 13 * len(lines))


def figure_class() -> type[Figure]:
    """matplotlib's ``Figure``. Raises ImportError, with the command that installs matplotlib, where it is missing.

    A notebook's MPLBACKEND may name a package that is not installed; importing matplotlib then fails. A bare Figure
    needs no backend, so the variable says ``agg`` during the import.
    """
    wanted = os.environ.get("MPLBACKEND")
    fresh = "matplotlib" not in sys.modules
    try:
        if wanted:
            os.environ["MPLBACKEND"] = "agg"
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "fastlane_ext[plot]"') from error
    finally:
        if wanted:
            os.environ["MPLBACKEND"] = wanted
    if wanted and fresh:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = wanted
    return Figure


def picture_format(path: str | os.PathLike[str]) -> str:
    """The format named by the ending of ``path``, PNG without an ending. Raises ValueError for an unknown format."""
    figure = figure_class()(figsize=(1, 1))
    known = sorted(figure.canvas.get_supported_filetypes())
    ending = os.path.splitext(os.fspath(path))[1][1:].lower() or "png"
    if ending not in known:
        raise bad("path", f"the ending .{ending}", f"one of {', '.join(known)}", "it picks the picture's format")
    return ending


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Save a picture whole, or raise OSError or ValueError and write nothing; ``path``'s ending picks the format."""
    picture = io.BytesIO()
    figure.savefig(picture, format=picture_format(path), dpi=150)
    write_whole(path, picture.getvalue())


def _figure(width: float, height: float) -> Figure:
    # A bare Figure draws without a display and leaves pyplot's global state alone.
    return figure_class()(figsize=(width, height), layout="constrained")


def _finish(figure: Figure, axes: Any, title: str, grid: str, path: str | os.PathLike[str], *, pad: float = 6) -> None:
    axes.set_title(title, loc="left", color=_INK, fontweight="bold", pad=pad)
    axes.grid(axis=grid, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)
