"""``fastlane check``: measures the promises of fastlane_ext, on every instruction set of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fastlane_ext

from ..errors import CommandError
from ..output import Note, console, table
from ..promises import process
from ..promises.rows import Counter, died

_WORKER = "from fastlane_ext.cli.promises.process import worker; worker()"


def available() -> list[str]:
    """The compiled instruction sets that this machine runs, weakest first, and last the default if it is not one of
    them. If one is forced, only the forced one.
    """
    chosen = fastlane_ext.cpu_isa()
    if os.environ.get("FASTLANE_CPU_ISA"):
        return [chosen]
    supported = list(reversed(fastlane_ext.build_info()["supported_isas"]))
    return supported if chosen in supported else [*supported, chosen]


def steps(isas: Sequence[str]) -> int:
    """The number of progress steps of a check of ``isas``."""
    return sum(len(process.groups(Counter(), isa)) + 1 for isa in isas)


def _lines(isa: str) -> Iterator[dict[str, Any]]:
    # The instruction set is fixed when the library is loaded, so each needs a process of its own.
    package_parent = str(Path(fastlane_ext.__file__).resolve().parent.parent)
    paths = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    # The promises are those of our kernels, so the library's products stay out of the check.
    path = {} if isa == "none" or os.environ.get("FASTLANE_PATH") else {"FASTLANE_PATH": "fused"}
    environment = {**os.environ, **path, "FASTLANE_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield json.loads(line)
        finally:
            if process.poll() is None:
                process.stdout.close()
                process.terminate()
            status = process.wait()
        if status != 0:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            reason = f"signal {-status}" if status < 0 else f"exit status {status}"
            yield {"group": "end", "rows": [died(f"{reason}: {last}")]}


def compute(isas: Sequence[str] | None = None, note: Note = lambda done=0, text=None: None) -> dict[str, Any]:
    """Measure every promise on each of ``isas`` (default: all of this machine). The result is JSON-able.

    ``ok`` is False if one promise fails. ``worse_than_eager`` counts rows whose error is above eager's own but within
    the hard limit, a factor of 2. A process that dies is a failed row. Raises CommandError for an instruction set that
    is not available here.
    """
    here = available()
    isas = list(isas) if isas else here
    for isa in isas:
        if isa not in [*here, "none"]:
            raise CommandError(f"--isa: got {isa}, expected one that runs here: {', '.join(here)}")
    rows: list[dict[str, Any]] = []
    for isa in isas:
        note(0, isa)
        for line in _lines(isa):
            if "isa" in line:
                if line["isa"] != isa:
                    raise CommandError(f"check: asked for {isa}, but the library runs {line['isa']}")
                continue
            rows.extend({"isa": isa, **row} for row in line["rows"])
            note(1, f"{isa} {line['group']}")
    failed = [row for row in rows if not row["ok"]]
    worse = [row for row in rows if row["ok"] and _above_eager(row)]
    return {
        "isas": isas,
        "rows": rows,
        "failed": len(failed),
        "worse_than_eager": len(worse),
        "ok": not failed,
    }


def _above_eager(row: dict[str, Any]) -> bool:
    return row["promise"] == "error of a layer" and row["fused"] > row["eager"]


def _verdict(row: dict[str, Any]) -> str:
    if not row["ok"]:
        return "[red]FAIL[/red]"
    return "[yellow]pass, above eager[/yellow]" if _above_eager(row) else "[green]pass[/green]"


def render(result: dict[str, Any], *, full: bool = False) -> None:
    """Print the layer errors (only the output with the highest ratio of each group unless ``full``), then the rest."""
    out = console()
    layers = table(
        "Largest error of a layer against fp64 (fp64: against 40 digits), relative to the largest value",
        "ISA",
        "dtype",
        "activation",
        "output",
        "fused",
        "eager",
        "fused / eager",
        "verdict",
        left=4,
    )
    others = table(
        "Other promises",
        "ISA",
        "promise",
        "dtype",
        "activation",
        "what",
        "fused",
        "eager",
        "limit",
        "verdict",
        left=5,
    )
    grouped: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    notes = []
    for row in result["rows"]:
        if row["promise"] == "error of a layer":
            grouped.setdefault((row["isa"], row["dtype"], row["activation"]), []).append(row)
            continue
        eager = "" if row["eager"] is None else f"{row['eager']:.2g}"
        names = [row[key] for key in ("isa", "promise", "dtype", "activation", "what")]
        others.add_row(*names, f"{row['fused']:.2g}", eager, f"{row['limit']:.2g}", _verdict(row))
        if row.get("note") and not row["ok"]:
            notes.append(f"{row['isa']}, {row['promise']}: {row['note']}")
    for key, rows in grouped.items():
        # A failing row must come first: a passing row with a higher ratio must not hide it.
        rows = sorted(rows, key=lambda row: (row["ok"], -row["ratio"]))
        for row in rows if full else [rows[0], *(r for r in rows[1:] if not r["ok"])]:
            layers.add_row(
                *key,
                row["what"],
                f"{row['fused']:.2e}",
                f"{row['eager']:.2e}",
                f"{row['ratio']:.2f}",
                _verdict(row),
            )
    out.print(layers)
    out.print(others)
    out.print("inf: not a number, or infinite, where a finite value is due", style="dim")
    for line in notes:
        out.print(line, markup=False)
    total = len(result["rows"])
    verdict = "all promises hold" if result["ok"] else f"{result['failed']} of {total} promises FAIL"
    out.print(
        f"{verdict}; {total} rows on {', '.join(result['isas'])}; "
        f"{result['worse_than_eager']} within the limit but above eager's own error"
    )
