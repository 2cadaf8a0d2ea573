"""GELU and GELU′ alone: elements a nanosecond from cached data, and the largest error over every float32.

    python benchmarks/bench_gelu.py                        # minutes: checks two thousand million values
    python benchmarks/bench_gelu.py --stride 1000          # seconds: one value in a thousand

Compiles ``gelu_throughput.cpp``, which includes the kernels' own vectors and formulas but no torch, with ``$CXX``
(default: g++).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report

from fastlane_ext.bench import machine, suites
from fastlane_ext.cli.errors import CommandError
from fastlane_ext.cli.files import writable, write_json
from fastlane_ext.cli.output import console, table

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "gelu_throughput.cpp"
RESULTS = HERE / "results" / "gelu.json"
SOURCES = (SOURCE, HERE / "gelu_avx2.cpp", HERE / "gelu_avx512.cpp")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-pthread")
ROUNDS = 101
SCHEMA = 1


def compile_program(folder: Path) -> tuple[Path, str]:
    """The compiled program, and the compiler's name and version. Raises CommandError if compiling fails."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(command[0]) is None:
        raise CommandError(f"{command[0]}: no such compiler; install g++, or set CXX to a C++17 compiler")
    program = folder / SOURCE.stem
    build = [*command, *FLAGS, f"-I{HERE.parent / 'csrc'}", *map(str, SOURCES), "-o", str(program)]
    built = subprocess.run(build, capture_output=True, text=True)
    if built.returncode != 0:
        errors = [line for line in built.stderr.splitlines() if "error" in line] or built.stderr.splitlines()
        reason = errors[0].strip() if errors else f"exit status {built.returncode}"
        raise CommandError(f"{command[0]} cannot compile {SOURCE.name}: {reason}")
    version = subprocess.run([*command, "--version"], capture_output=True, text=True)
    return program, (version.stdout.splitlines() or [command[0]])[0]


def _run(program: Path, *arguments: object) -> dict[str, Any]:
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        raise CommandError(f"{program.name} {arguments[0]} ended with status {done.returncode}: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(*, stride: int = 1, threads: int | None = None, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time the formulas, then check every ``stride``-th float32 on ``threads`` threads. Returns the JSON document."""
    with tempfile.TemporaryDirectory() as folder:
        program, compiler = compile_program(Path(folder))
        with machine.Neighbours() as neighbours:
            throughput = _run(program, "throughput", rounds)
        errors = _run(program, "errors", stride, threads or len(os.sched_getaffinity(0)))
    return {
        "kind": report.GELU_KIND,
        "schema": SCHEMA,
        **machine.environment(),
        "compiler": compiler,
        "flags": " ".join(FLAGS),
        "quiet_cores": suites.QUIET,
        "busy_cores": neighbours.cores,
        "throughput": throughput,
        "errors": errors,
    }


def render(document: dict[str, Any]) -> None:
    """Print the table, as markdown where rich is not installed."""
    try:
        out = console()
    except CommandError:
        print(report.gelu_markdown(document), end="")
        return
    grid = table("GELU alone", *report.GELU_COLUMNS, left=report.GELU_LEFT)
    for cells in report.gelu_rows(document):
        grid.add_row(*(cell.replace("**", "") for cell in cells))
    for line in report.gelu_facts(document):
        out.print(line, markup=False, highlight=False)
    out.print(grid)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", default=str(RESULTS), metavar="PATH", help="where to write the results")
    parser.add_argument("--stride", type=_positive, default=1, help="check every N-th float32 (default: each one)")
    parser.add_argument("--threads", type=_positive, help="threads of the check (default: all); timing takes one")
    parser.add_argument("--rounds", type=_positive, default=ROUNDS, help="samples of each contestant")
    args = parser.parse_args(argv)
    try:
        writable("--json", args.json)
        document = measure(stride=args.stride, threads=args.threads, rounds=args.rounds)
        write_json(document, args.json)
        if args.json != "-":
            render(document)
    except CommandError as error:
        print(f"bench_gelu.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
