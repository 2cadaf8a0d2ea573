"""``fastlane bench``: the layer and the networks against eager, ``torch.compile``, ``F.linear`` and oneDNN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastlane_ext._text import seconds, size
from fastlane_ext.bench import suites
from fastlane_ext.bench.contestants import NAMES

from ..errors import CommandError
from ..output import Note, console, table

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
REPEATS, QUICK_REPEATS = 15, 5
BUDGET, QUICK_BUDGET = 20.0, 3.0


def jobs(
    suite: str, threads: Sequence[int] | None, *, dtype: str | None = None, quick: bool = False
) -> list[suites.Job]:
    """The jobs to measure. Raises CommandError for a value out of range."""
    try:
        if quick and threads is None:
            threads = [torch.get_num_threads()]
        return suites.plan(suite, threads, dtype=DTYPES[dtype] if dtype else None, quick=quick)
    except ValueError as error:
        raise CommandError(f"--{error}") from error


def compute(
    planned: Sequence[suites.Job],
    *,
    repeats: int | None = None,
    quick: bool = False,
    compiled: bool = True,
    note: Note = lambda done=0, text=None: None,
) -> dict[str, Any]:
    """Measure the ``planned`` jobs, see :func:`jobs`. Returns the JSON document of the run.

    ``ok`` is False if a fused contestant could not run or gave a wrong answer.
    """
    repeats = repeats or (QUICK_REPEATS if quick else REPEATS)
    budget = QUICK_BUDGET if quick else BUDGET

    def told_of(job: suites.Job) -> Callable[[str], None]:
        return lambda text: note(0, f"{job}, {text}")

    rows: list[dict[str, Any]] = []
    for job in planned:
        rows += suites.run_job(
            job,
            repeats=repeats,
            budget=budget,
            compiled=compiled,
            note=told_of(job),
        )
        note(1)
    settings = {"repeats": repeats, "budget_s": budget, "quick": quick, "compiled": compiled}
    document = suites.document(rows, **settings)
    return {**document, "ok": all("skipped" not in row["results"]["fused"] for row in rows)}


def times(value: float) -> str:
    """A ratio with the digits that matter."""
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _cell(row: dict[str, Any], name: str) -> str:
    result = row["results"].get(name)
    if result is None or "skipped" in result:
        return "-"
    text = seconds(result["median_s"])
    if name == "fused":
        return f"[bold]{text}[/bold]"
    over = row["over_fused"].get(name)
    if over is None:
        return text
    return f"{text} [{'green' if over >= 1 else 'red'}]{times(over)}×[/]"


def render(result: dict[str, Any]) -> None:
    """Print a table for each suite, number of threads and mode; then the missing contestants and the reasons."""
    out = console()
    out.print(
        f"{result['cpu']}, {result['cores']} cores, {result['isa']}, torch {result['torch']}; medians; "
        "N× is how many times the fused time that is"
    )
    noisy = [row["busy_cores"] for row in result["rows"] if (row["busy_cores"] or 0) > suites.QUIET]
    if noisy:
        out.print(
            f"[red]Not a quiet machine: in {len(noisy)} of {len(result['rows'])} rows something else "
            f"kept up to {max(noisy):.1f} cores busy.[/red]"
        )
    tables: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        tables.setdefault((row["suite"], row["threads"], row["mode"]), []).append(row)
    for (suite, threads, mode), rows in tables.items():
        plural = "" if threads == 1 else "s"
        title = f"{suite}, {mode}, {threads} thread{plural}"
        grid = table(title, "case", "dtype", *NAMES, "fused: part of limit", "peak memory, eager → fused", left=2)
        for row in rows:
            part, peaks = row["part_of_limit"].get("fused"), row["peak_bytes"]
            memory = " → ".join(size(peaks[name]) if name in peaks else "-" for name in ("eager", "fused"))
            limit = f"{part:.0%} of {row['limit']['bound_by']}" if part is not None else "-"
            grid.add_row(row["case"], row["dtype"], *(_cell(row, name) for name in NAMES), limit, memory)
        out.print(grid)
    for line in absences(result["rows"]):
        out.print(line, markup=False)


def absences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each reason why a contestant is missing or the fused one left its path."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        place = f"{row['case']} {row['dtype']}"
        for name, result in row["results"].items():
            if "skipped" in result:
                reasons.setdefault(f"{name}, {row['mode']}: {result['skipped']}", []).append(place)
        for reason in row["path"].get("fallback", {}):
            reasons.setdefault(f"fused fell back, {row['mode']}: {reason}", []).append(place)
    lines = []
    for reason, places in reasons.items():
        unique = list(dict.fromkeys(places))
        rest = f" and {len(unique) - 3} more" if len(unique) > 3 else ""
        lines.append(f"{reason} ({'; '.join(unique[:3])}{rest})")
    return lines
