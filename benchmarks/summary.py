"""Six rows of the results, and a sentence for each kind of vectors, for the README; no number is typed by hand.

    python benchmarks/summary.py                        # to standard output
    python benchmarks/summary.py --readme README.md     # between its markers

`ROWS` chooses rows by the case, never by the result; docs/performance.md has all rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import report

from fastlane_ext._text import seconds

START, END = "<!-- summary table start -->", "<!-- summary table end -->"
RESULTS = Path(__file__).resolve().parent / "results"
RIVALS = ("eager", "compile", "onednn")
MACHINES = {"Zen 5": "", "Zen 4": "zen4-", "Zen 3": "zen3-"}
"""The CPUs, and the prefixes of their result files. `make bench` writes files without a prefix."""
WITHOUT_PREFIX = {"AMD EPYC", "AMD EPYC (family 26, model 2)"}
"""What the committed results without a prefix call their CPU."""


class Row(NamedTuple):
    machine: str
    suite: str
    case: str
    dtype: str
    mode: str


ROWS = (
    Row("Zen 5", "layer", "1024×1024→1024", "float32", "forward"),
    Row("Zen 5", "layer", "1024×1024→1024", "bfloat16", "forward"),
    Row("Zen 5", "networks", "8 layers of 64, 65,536 rows", "float32", "forward+backward"),
    Row("Zen 5", "models", "GPT-2 small, 256 tokens", "float32", "forward+backward"),
    Row("Zen 4", "layer", "1024×1024→1024", "float32", "forward"),
    Row("Zen 3", "layer", "1024×1024→1024", "float32", "forward"),
)
WHAT = {"layer": "layer ", "networks": "", "models": ""}


def load(machine: str, suite: str) -> report.Document:
    """The rows of one suite on one machine with all its threads; times are medians over the runs."""
    paths = sorted(RESULTS.glob(f"{MACHINES[machine]}{suite}-[0-9].json"))
    document = report.load(paths)
    return report.choose(document, suite, [document["cores"]])


def label(machine: str) -> str:
    """The machine, or what the results call their CPU if `make bench` replaced the committed ones on another CPU."""
    cpu = str(load(machine, "layer")["cpu"])
    return machine if MACHINES[machine] or cpu in WITHOUT_PREFIX else cpu


def table() -> Iterator[str]:
    """The six rows, with the rivals' times over the fused time."""
    yield "| CPU | case | mode | fused | " + " | ".join(report.LABELS[name] for name in RIVALS) + " |"
    yield "|---|---|---|" + "---:|" * (1 + len(RIVALS))
    for row in ROWS:
        (found,) = (
            r for r in load(row.machine, row.suite)["rows"] if tuple(r[key] for key in Row._fields[2:]) == row[2:]
        )
        fused = seconds(found["results"]["fused"]["median_s"])
        ratios = (report._ratio(found, name) for name in RIVALS)
        cells = (label(row.machine), f"{WHAT[row.suite]}{row.case}, {row.dtype}", row.mode, fused, *ratios)
        yield "| " + " | ".join(cells) + " |"


def _ranges(machines: Sequence[str], dtype: str, name: str) -> str:
    parts = []
    for machine in machines:
        rows = load(machine, "layer")["rows"]
        values = [row["over_fused"][name] for row in rows if row["dtype"] == dtype and name in row["over_fused"]]
        parts.append(f"{min(values):.2f} to {max(values):.2f} on {label(machine)}")
    return ", ".join(parts)


def _sentence(subject: str, dtype: str, machines: Sequence[str]) -> str:
    eager, onednn = (_ranges(machines, dtype, name) for name in ("eager", "onednn"))
    return f"- **{subject}**: eager {eager}; oneDNN {onednn}."


def sentences() -> Iterator[str]:
    """One sentence each for AVX-512, AVX2 and bf16: the ranges over all measured layers."""
    isas = {machine: load(machine, "layer")["isa"] for machine in MACHINES}
    avx512 = [machine for machine, isa in isas.items() if isa.startswith("avx512")]
    avx2 = [machine for machine, isa in isas.items() if isa == "avx2"]
    yield _sentence("AVX-512, float32", "float32", avx512)
    if avx2:
        yield _sentence("AVX2, float32", "float32", avx2)
    else:
        yield "- **AVX2**: not measured yet. With the extra `demo` installed, `fastlane bench` measures your CPU."
    yield _sentence("AVX-512, bfloat16", "bfloat16", avx512)


LEAST_AND_MOST = "The least and the most over all measured layers, forward and with backward:"


def text() -> str:
    """The text between the markers."""
    return "\n".join([*table(), "", LEAST_AND_MOST, "", *sentences()]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readme", type=Path, metavar="PATH", help="rewrite the text between the markers of PATH")
    args = parser.parse_args(argv)
    try:
        if args.readme:
            report.rewrite(args.readme, text(), START, END)
        else:
            print(text(), end="")
    except report.ReportError as error:
        print(f"summary.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
