"""Turn benchmark JSON into a markdown table and pictures; no number in them is typed by hand.

    python benchmarks/report.py bench.json                          # the table, to standard output
    python benchmarks/report.py bench.json --plot docs/bench.png    # and a picture
    python benchmarks/report.py bench.json --readme PAGE.md         # rewrite the table between its markers

Reads the JSON of ``fastlane bench --json``, and the JSON of pytest-benchmark for the files beside this one. Several
files are merged; a row that several files measured becomes the median of its runs. Losing rows stay in. ``--threads``
and ``--suite`` choose rows by the case, never by the result. ``--suite networks``, ``--suite models`` and the JSON of
``bench_gelu.py`` have markers of their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlane_ext._text import seconds, size

START, END = "<!-- benchmark table start -->", "<!-- benchmark table end -->"
NETWORKS_START, NETWORKS_END = "<!-- networks table start -->", "<!-- networks table end -->"
MODELS_START, MODELS_END = "<!-- models table start -->", "<!-- models table end -->"
GELU_START, GELU_END = "<!-- GELU table start -->", "<!-- GELU table end -->"
GELU_KIND = "fastlane-bench-gelu"
LABELS = {
    "eager": "eager",
    "compile": "torch.compile",
    "linear": "F.linear alone",
    "onednn_linear": "oneDNN linear alone",
    "onednn": "oneDNN",
    "onnxruntime": "ONNX Runtime",
}
RIVALS = tuple(LABELS)
COLOURS = {
    "eager": "#0072b2",
    "compile": "#009e73",
    "linear": "#7b5ea7",
    "onednn_linear": "#e6a117",
    "onednn": "#d55e00",
    "onnxruntime": "#8c8c00",
}
TICKS = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32)
FACTS = ("cpu", "cores", "isa", "torch", "fastlane_ext", "commit", "date", "quiet_cores")

ROW_KEYS = ("suite", "case", "dtype", "threads", "mode")

Document = dict[str, Any]


class ReportError(Exception):
    """Input that cannot be reported; one line."""


def _read(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read as JSON: {error}") from error


def _median_of_runs(rows: Sequence[Document]) -> Document:
    """One row for a case that several runs measured: medians over the runs, of ratios taken within each run."""

    def medians(tables: Sequence[Document]) -> Document:
        return {key: statistics.median(t[key] for t in tables) for key in tables[0] if all(key in t for t in tables)}

    results = {}
    for name, first in rows[0]["results"].items():
        runs = [row["results"].get(name, {}) for row in rows]
        results[name] = medians(runs) if all("median_s" in run for run in runs) else first
    # The limit of the case is the best limit that any run measured.
    limit = dict(rows[0]["limit"])
    for key in ("flops_per_s", "bytes_per_s"):
        limit[key] = max(row["limit"][key] for row in rows)
    bounds = {
        "multiply-adds": limit["flops"] / limit["flops_per_s"],
        "copy bandwidth": limit["bytes"] / limit["bytes_per_s"],
    }
    limit["bound_by"] = max(bounds, key=lambda name: bounds[name])
    limit["seconds"] = bounds[limit["bound_by"]]
    shares = [row["mlp_share"] for row in rows if "mlp_share" in row]
    return {
        **rows[0],
        **({"mlp_share": statistics.median(shares)} if shares else {}),
        "results": results,
        "over_fused": medians([row["over_fused"] for row in rows]),
        "limit": limit,
        "part_of_limit": {
            name: limit["seconds"] / result["median_s"] for name, result in results.items() if "median_s" in result
        },
        "busy_cores": max(row["busy_cores"] or 0 for row in rows),
        "runs": len(rows),
    }


def load(paths: Sequence[str | Path]) -> Document:
    """Rows and machine facts of one or several result files. Raises ReportError if a file holds no benchmark results,
    or if the files come from different machines or versions.
    """
    merged: Document = {"rows": []}
    runs: dict[tuple[Any, ...], list[Document]] = {}
    for path in paths:
        found = _read(path)
        if isinstance(found, dict) and "benchmarks" in found:
            rows = [entry["extra_info"]["row"] for entry in found["benchmarks"] if "row" in entry["extra_info"]]
            facts = found["machine_info"].get("fastlane", {})
        elif isinstance(found, dict) and found.get("kind") == "fastlane-bench":
            rows, facts = found["rows"], found
        else:
            raise ReportError(f"{path}: neither from `fastlane bench --json` nor from pytest-benchmark")
        for name in FACTS:
            new = facts.get(name)
            if name in merged and name != "date" and merged[name] != new:
                raise ReportError(f"{path}: {name} is {new}, but {merged[name]} in the files before it")
            merged[name] = new
        for row in rows:
            runs.setdefault(tuple(row[key] for key in ROW_KEYS), []).append(row)
    if not runs:
        raise ReportError("no rows in " + ", ".join(map(str, paths)))
    merged["rows"] = [rows[0] if len(rows) == 1 else _median_of_runs(rows) for rows in runs.values()]
    return merged


def choose(document: Document, suite: str | None, threads: Sequence[int] | None) -> Document:
    """The rows of one suite and of the given numbers of threads."""
    rows = [
        row for row in document["rows"] if suite in (None, row["suite"]) and (not threads or row["threads"] in threads)
    ]
    if not rows:
        raise ReportError("no row is left of what --suite and --threads ask for")
    return {**document, "rows": rows}


def _ratio(row: Document, name: str) -> str:
    value = row["over_fused"].get(name)
    if value is None:
        return "–"
    text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
    return f"**{text}**" if value < 1 else text


def _part_of_limit(row: Document) -> str:
    """The fraction of the limit that bounds the case, and always the fraction of the multiply-add peak."""
    took = row["results"]["fused"].get("median_s")
    if took is None:
        return "–"
    limit = row["limit"]
    of_peak = f"{limit['flops'] / limit['flops_per_s'] / took:.0%} of FMA peak"
    if limit["bound_by"] == "multiply-adds":
        return of_peak
    return f"{limit['seconds'] / took:.0%} of {limit['bound_by']}, {of_peak}"


def _version(document: Document) -> str:
    commit = f" at {document['commit']}" if document.get("commit") else ""
    return f"fastlane_ext {document['fastlane_ext']}{commit}"


def _rivals_in(rows: Sequence[Document]) -> list[str]:
    """The rivals that these results know: ONNX Runtime came later than the others."""
    return [name for name in RIVALS if any(name in row["results"] for row in rows)]


def markdown(document: Document) -> str:
    """The table: for each case and mode every rival's time over the fused time, bold where a rival takes less."""
    facts = f"{document['cpu']}, {document['cores']} cores, {document['isa']}; torch {document['torch']}, "
    facts += _version(document)
    quiet = document["quiet_cores"]
    noisy = [row["busy_cores"] for row in document["rows"] if (row["busy_cores"] or 0) > quiet]
    if noisy:
        rows = f"{len(noisy)} of {len(document['rows'])} rows"
        facts += f"; NOT a quiet machine: in {rows} something else kept up to {max(noisy):.1f} cores busy"
    counts = [row.get("runs", 1) for row in document["rows"]]
    fewest, most = min(counts), max(counts)
    runs = f", and of {most if fewest == most else f'{fewest} to {most}'} runs" if most > 1 else ""
    rivals = _rivals_in(document["rows"])
    lines = [
        f"{facts}; {str(document['date'])[:10]}. Times of the fused op; for the others, how many times that "
        "long they take (bold: less than once, the fused op loses). Medians of interleaved "
        f"samples{runs}.",
        "",
        "| case | dtype | threads | mode | fused | "
        + " | ".join(LABELS[name] for name in rivals)
        + " | part of the limit | peak memory, eager → fused |",
        "|---|---|---|---|" + "---:|" * (len(rivals) + 3),
    ]
    for row in document["rows"]:
        fused = row["results"]["fused"]
        peaks = [row["peak_bytes"].get(name) for name in ("eager", "fused")]
        cells = [
            row["case"],
            row["dtype"],
            str(row["threads"]),
            row["mode"],
            seconds(fused["median_s"]) if "median_s" in fused else "–",
            *(_ratio(row, name) for name in rivals),
            _part_of_limit(row),
            " → ".join("–" if peak is None else size(peak) for peak in peaks),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines + _facts(document["rows"]) + _absences(document["rows"])) + "\n"


def _facts(rows: Sequence[Document]) -> list[str]:
    """Facts that some cases give beside their times."""
    lines = []
    for row in rows:
        place = f"{row['case']} {row['dtype']}, {row['threads']} thread{'' if row['threads'] == 1 else 's'}"
        if "mlp_share" in row:
            lines.append(f"- {place}: before, the MLPs had {row['mlp_share']:.0%} of the forward's time.")
        if "held_bytes" in row:
            eager, fused = row["held_bytes"]["eager"], row["held_bytes"]["fused"]
            held = f"{size(eager)} → {size(fused)}, {fused / eager:.2f} of it"
            lines.append(f"- {place}: held for backward, eager → fused: {held}.")
    return ["", *lines] if lines else []


def _absences(rows: Sequence[Document]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for name, result in row["results"].items():
            if "skipped" in result:
                key = f"{LABELS.get(name, name)}, {row['mode']}: {result['skipped']}"
                reasons.setdefault(key, []).append(f"{row['case']} {row['dtype']}")
    if not reasons:
        return []
    counted = (f"- {reason} ({len(dict.fromkeys(places))} cases)" for reason, places in reasons.items())
    return ["", "Not measured (–):", "", *counted]


GELU_COLUMNS = (
    "dtype",
    "activation",
    "function",
    "isa",
    "before, elements/ns",
    "now, elements/ns",
    "now over before",
    "now over libm",
    "largest error before",
    "largest error now",
)
GELU_LEFT = 4


def gelu_rows(document: Document) -> list[list[str]]:
    """The cells of GELU_COLUMNS, a row for each dtype, activation, function and instruction set."""

    def key(row: Document) -> tuple[str, ...]:
        return tuple(row[name] for name in ("dtype", "activation", "function", "formulas", "isa"))

    speeds = {key(row): row["elements_per_ns"] for row in document["throughput"]["rows"]}
    dtype = document["errors"]["dtype"]
    errors = {key({"dtype": dtype, **row}): row for row in document["errors"]["rows"]}

    def error(at: tuple[str, ...]) -> str:
        row = errors.get(at)
        if row is None:
            return "–"
        return "NaN" if row["largest_error"] is None else f"{row['largest_error']:.1e} at {row['at']:.3g}"

    rows = []
    for dtype, activation, function, formulas, isa in speeds:
        if formulas != "now":
            continue
        before, now = ((dtype, activation, function, name, isa) for name in ("before", "now"))
        libm = (dtype, activation, function, "libm", "baseline")
        over = speeds[now] / speeds[before]
        rows.append(
            [
                *(dtype, activation, "GELU" if function == "value" else "GELU′", isa),
                f"{speeds[before]:.2f}",
                f"{speeds[now]:.2f}",
                f"{over:.2f}" if over >= 1 else f"**{over:.2f}**",
                f"{speeds[now] / speeds[libm]:.3g}",
                error(before),
                error(now),
            ]
        )
    return rows


def gelu_facts(document: Document) -> list[str]:
    """Where and how the GELU table was measured, in sentences."""
    errors, throughput = document["errors"], document["throughput"]
    low, high = errors["range"]
    every = "every float32" if errors["exhaustive"] else f"one float32 in {errors['stride']:,}, NOT every one,"
    busy = document["busy_cores"]
    lines = [
        f"{document['cpu']}; {document['compiler']}, {document['flags']}; {_version(document)}; "
        f"{document['date'][:10]}.",
        f"One thread, {throughput['elements']:,} random normals in cache, medians of {throughput['rounds']} "
        f"interleaved rounds. libm: the textbook formula element by element.",
        f"Errors: {every} of [{low:g}, {high:g}], {errors['checked']:,} values, against fp64, relative to |GELU| and, "
        "for GELU′, to Φ(x) + |x|φ(x); the promise is 1e-5.",
    ]
    libm = [row["largest_error"] for row in errors["rows"] if row["formulas"] == "libm" and row["function"] == "value"]
    lines.append(f"The largest error of libm's formula is {max(libm):.1g}: 1 + erf has no digits left in the tail.")
    if busy is not None and busy > document["quiet_cores"]:
        lines.append(f"NOT a quiet machine: something else kept {busy:.1f} cores busy.")
    measured = {row["isa"] for row in throughput["rows"]}
    absent = [isa for isa in ("avx2", "avx512") if isa not in measured]
    if absent:
        lines.append(f"Not measured: {', '.join(absent)}, which this CPU does not have.")
    return lines


def gelu_markdown(document: Document) -> str:
    """The table of ``bench_gelu.py``: bold where today's formulas are slower than the earlier ones."""
    lines = [
        " ".join(gelu_facts(document)),
        "",
        "| " + " | ".join(GELU_COLUMNS) + " |",
        "|" + "---|" * GELU_LEFT + "---:|" * (len(GELU_COLUMNS) - GELU_LEFT),
        *("| " + " | ".join(cells) + " |" for cells in gelu_rows(document)),
    ]
    return "\n".join(lines) + "\n"


def rewrite(readme: Path, table: str, start: str = START, end: str = END) -> None:
    """Put ``table`` between the markers of ``readme``. Raises ReportError unless each is there once, in order."""
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{readme}: {error.strerror}") from error
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ReportError(f"{readme}: expected the lines {start} and {end}, once each, in this order")
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    readme.write_text(f"{before}{start}\n\n{table}\n{end}{after}", encoding="utf-8")


def plot(document: Document, path: Path) -> None:
    """Save bars of the rivals' times over the fused time, log scale, line at 1; a panel for each mode and number of
    threads.
    """
    try:
        from fastlane_ext import plots

        figure_class = plots.figure_class()
    except ImportError as error:
        raise ReportError('--plot needs fastlane_ext and matplotlib: pip install "fastlane_ext[plot]"') from error
    panels: dict[tuple[int, str], list[Document]] = {}
    for row in document["rows"]:
        panels.setdefault((row["threads"], row["mode"]), []).append(row)
    longest = max(len(rows) for rows in panels.values())
    figure = figure_class(figsize=(6.2 * len(panels), 1.6 + 0.62 * longest), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, ((threads, mode), rows) in zip(all_axes, panels.items(), strict=True):
        present = [name for name in RIVALS if any(name in row["over_fused"] for row in rows)]
        height = 0.8 / max(1, len(present))
        for offset, name in enumerate(present):
            places = [index + (offset - (len(present) - 1) / 2) * height for index in range(len(rows))]
            values = [row["over_fused"].get(name, float("nan")) for row in rows]
            widths = [value - 1 for value in values]
            axes.barh(places, widths, left=1, height=height * 0.9, color=COLOURS[name], label=LABELS[name])
            for place, value in zip(places, values, strict=True):
                if value == value:
                    side = 4 if value >= 1 else -4
                    axes.annotate(
                        f"{value:.2f}",
                        (value, place),
                        (side, 0),
                        textcoords="offset points",
                        ha="left" if value >= 1 else "right",
                        va="center",
                        size=7,
                        color="#6b6b6b",
                    )
        axes.set_xscale("log")
        axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS], fontsize=8)
        axes.minorticks_off()
        finite = [value for row in rows for value in row["over_fused"].values()]
        axes.set_xlim(min([0.5, *finite]) / 2.2, max([2.0, *finite]) * 1.8)
        axes.axvline(1, color="#1a1a1a", linewidth=1)
        axes.set_yticks(range(len(rows)), [f"{row['case']}\n{row['dtype']}" for row in rows], fontsize=8)
        axes.invert_yaxis()
        plural = "" if threads == 1 else "s"
        axes.set_title(f"{mode}, {threads} thread{plural}", loc="left", fontweight="bold", fontsize=10)
        axes.set_xlabel("time over the fused time (right of 1: fused is faster)", fontsize=8)
        axes.grid(axis="x", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {
        label: handle for axes in all_axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    try:
        plots.save(figure, path)
    except (OSError, ValueError) as error:
        raise ReportError(f"--plot: cannot write {path}: {error}") from error


def _gelu_document(paths: Sequence[str]) -> Document | None:
    found = _read(paths[0]) if len(paths) == 1 else None
    return found if isinstance(found, dict) and found.get("kind") == GELU_KIND else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "results", nargs="+", help="JSON from `fastlane bench --json`, pytest-benchmark or bench_gelu.py"
    )
    parser.add_argument("--readme", type=Path, metavar="PATH", help="rewrite the table between the markers of PATH")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="save a picture of the ratios")
    parser.add_argument("--suite", choices=("layer", "networks", "models"), help="only this suite")
    parser.add_argument("--threads", type=int, action="append", help="only this number of threads (repeatable)")
    args = parser.parse_args(argv)
    try:
        gelu = _gelu_document(args.results)
        if gelu is not None:
            if args.plot or args.suite or args.threads:
                raise ReportError(f"{args.results[0]}: --plot, --suite and --threads do not apply to the GELU table")
            table, markers = gelu_markdown(gelu), (GELU_START, GELU_END)
        else:
            document = choose(load(args.results), args.suite, args.threads)
            own_markers = {"networks": (NETWORKS_START, NETWORKS_END), "models": (MODELS_START, MODELS_END)}
            table, markers = markdown(document), own_markers.get(args.suite, (START, END))
            if args.plot:
                plot(document, args.plot)
        if args.readme:
            rewrite(args.readme, table, *markers)
        else:
            print(table, end="")
    except ReportError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
