"""Figures on gradients as values: a row for each parameter, a report of all rows, two reports side by side."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ._arguments import bad
from ._json import to_json
from ._text import aligned
from .plots import plot_report


@dataclass(frozen=True)
class GradientRow:
    """One parameter's gradient in figures. A parameter without a gradient has None in all fields but name and shape.

    NaN or infinity in a gradient gives NaN or infinity in the figures; ``nonfinite_fraction`` is the fraction of such
    elements. ``ratio`` is |g|/|w| by L2 norms: infinite where w is all zeros, NaN where w and g both are.
    """

    name: str
    shape: tuple[int, ...]
    mean_abs: float | None = None
    l2: float | None = None
    max_abs: float | None = None
    zero_fraction: float | None = None
    nonfinite_fraction: float | None = None
    ratio: float | None = None


def _text_table(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = aligned([heading, *([_cell(value) for value in row] for row in rows)], left=1)
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4e}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class GradientComparison:
    """Two reports side by side, by parameter name. Each row is (name, first, second, second / first)."""

    labels: tuple[str, str]
    rows: tuple[tuple[str, float | None, float | None, float | None], ...]

    def __str__(self) -> str:
        return _text_table(["parameter", *self.labels, "ratio"], self.rows)

    def to_json(self) -> str:
        """``{"labels": [...], "rows": [{"name", "first", "second", "ratio"}]}``; null for NaN, infinity."""
        rows = [dict(zip(("name", "first", "second", "ratio"), row, strict=True)) for row in self.rows]
        return to_json({"labels": self.labels, "rows": rows})


@dataclass(frozen=True)
class GradientReport:
    """The loss and one `GradientRow` for each parameter; ``str()`` is a table in plain text."""

    loss: float
    rows: tuple[GradientRow, ...]

    def __str__(self) -> str:
        heading = ["parameter", "shape", "mean |g|", "L2", "max |g|", "zero", "non-finite", "|g|/|w|"]

        def percent(fraction: float | None) -> str | None:
            return None if fraction is None else f"{fraction:.1%}"

        def cells(row: GradientRow) -> list[object]:
            shape = "x".join(map(str, row.shape)) or "scalar"
            fractions = percent(row.zero_fraction), percent(row.nonfinite_fraction)
            return [row.name, shape, row.mean_abs, row.l2, row.max_abs, *fractions, row.ratio]

        return _text_table(heading, [cells(row) for row in self.rows])

    def to_json(self) -> str:
        """``{"loss": ..., "rows": [...]}``, always valid JSON.

        NaN and infinity become null; ``nonfinite_fraction`` tells how much of the gradient was not finite. For a
        parameter without a gradient all figures are null, ``nonfinite_fraction`` too.
        """
        return to_json({"loss": self.loss, "rows": [asdict(row) for row in self.rows]})

    def compare(self, other: GradientReport, labels: tuple[str, str] = ("first", "second")) -> GradientComparison:
        """Mean |gradient| here and in ``other`` by parameter name, and the other's mean divided by this one's.

        The models may differ: a parameter that only one model has shows "-" for the other model. Raises TypeError if
        ``other`` is not a `GradientReport`.
        """
        if not isinstance(other, GradientReport):
            raise bad(
                "other", f"a {type(other).__name__}", "a GradientReport", "make one with gradient_report", TypeError
            )
        mine = {row.name: row.mean_abs for row in self.rows}
        theirs = {row.name: row.mean_abs for row in other.rows}
        rows = []
        for name in {**mine, **theirs}:
            a, b = mine.get(name), theirs.get(name)
            ratio = None if a is None or b is None else b / a if a else math.inf if b > 0 else math.nan
            rows.append((name, a, b, ratio))
        return GradientComparison(labels, tuple(rows))

    def plot(self, path: str | os.PathLike[str], *, title: str = "Mean |gradient| by parameter") -> None:
        """Save log-scale bars of mean |gradient|, first layer on top, weights dark and other parameters pale.

        Zeros, missing gradients and non-finite values have no bar on a log scale; they are written out instead.

        Raises:
            ImportError: matplotlib is missing; the message has the command that installs it.
            OSError, ValueError: the picture cannot be written, or not in the format that ``path`` ends in.
        """
        plot_report(self, path, title=title)
