"""Breaks the package in many small ways and shows that the tests notice each: `make mutants`.

    python tests/mutation/run.py                 all mutants, on the AVX2 kernels
    python tests/mutation/run.py --only dW       those with "dW" in their names
    python tests/mutation/run.py --list
    python tests/mutation/run.py --isa neon      those of the kernels, compiled for 64-bit Arm, by the emulated sweep

The sources are copied to build/mutation with every mutant behind a switch, and compiled once. The variable
FASTLANE_MUTANT then chooses a mutant. The exit status is 1 if a mutant survives.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "build" / "mutation"
SWEEP = (COPY / "build/aarch64/sweep", COPY / "build/aarch64/checker/sweep")
COPIED = ["Makefile", "csrc", "fastlane_ext", "tests", "setup.py", "build_support.py", "pyproject.toml", "README.md"]
SWITCH = """// Which mutant is the chosen one.
#pragma once
#include <cstdlib>
inline const int fastlane_mutant = std::getenv("FASTLANE_MUTANT") ? std::atoi(std::getenv("FASTLANE_MUTANT")) : 0;
"""
# The same for the Python half: a constant of a module, which torch.compile can trace.
PYTHON_SWITCH = """\"\"\"Which mutant is the chosen one.\"\"\"

import os

NUMBER = int(os.environ.get("FASTLANE_MUTANT", "0"))
"""
PYTHON_IMPORT = "from fastlane_ext import _mutant\n"
# After the nearest file, these in order: what is fast and catches much comes first.
TEST_FILES = [
    "test_layer_accuracy.py",
    "test_layer_gradients.py",
    "test_mlp.py",
    "test_stack.py",
    "test_layer_hostile.py",
    "test_layer_saved.py",
    "test_gelu.py",
    "test_layer_process.py",
    "test_guarded.py",
    "test_layer_transforms.py",
    "test_fuse.py",
]
# As test_layer_path.py runs them on the other path. The nearest file also runs what is slow.
MARKERS = {"fused": "not slow", "library": "not slow and not own_product"}
MARKERS_OF_THE_NEAREST = {"fused": "", "library": "not own_product"}
# Cases of the sweep of NEON, until one notices the mutant: a few, then ten times as many.
SWEEPS = ("0 99999 170", "0 99999 17")
# A mutant that makes a test wait for ever is noticed by that.
TIME_LIMIT_S = 900
NO_TESTS = 5  # pytest's exit status where all were deselected


def mutated_sources():
    """The text of every file that has mutants, by its path."""
    texts = {}
    for number, mutant in enumerate(MUTANTS, start=1):
        text = texts.get(mutant.file) or (ROOT / mutant.file).read_text()
        found = text.count(mutant.text)
        if found != 1:
            sys.exit(f"{mutant.file}: mutant {mutant.name!r}: its text is there {found} times, expected 1; adapt it")
        text = text.replace(mutant.text, mutant.broken.replace("MUTANT", mutant.switch(number)))
        if mutant.file.endswith(".py") and PYTHON_IMPORT not in text:
            text = re.sub(r"^(?=import |from (?!__future__))", PYTHON_IMPORT, text, count=1, flags=re.MULTILINE)
        texts[mutant.file] = text
    return texts


def write_if_changed(path, content):
    """Writes a file if its content changes: a file that keeps its time is not compiled again."""
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def copy_sources():
    mutated = mutated_sources()
    for name in COPIED:
        for source in [ROOT / name] if (ROOT / name).is_file() else sorted((ROOT / name).rglob("*")):
            relative = source.relative_to(ROOT)
            if source.is_dir() or source.suffix in {".so", ".pyc"}:
                continue
            text = mutated.get(relative.as_posix())
            write_if_changed(COPY / relative, text.encode() if text is not None else source.read_bytes())
    write_if_changed(COPY / "mutant.h", SWITCH.encode())
    write_if_changed(COPY / "fastlane_ext" / "_mutant.py", PYTHON_SWITCH.encode())


def build():
    flags = f"{os.environ.get('CFLAGS', '')} -include {COPY / 'mutant.h'}"
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=COPY, env=os.environ | {"CFLAGS": flags, "FASTLANE_CUDA": "0"}, check=True)


def build_sweep():
    """The kernels' sweep for 64-bit Arm, and the program of this machine that checks its results."""
    include = f"-include {COPY / 'mutant.h'}"
    compilers = [
        f"AARCH64_CXX={os.environ.get('AARCH64_CXX', 'aarch64-linux-gnu-g++')} {include}",
        f"CXX={os.environ.get('CXX', 'c++')} {include}",
    ]
    subprocess.run(
        ["make", "-s", "-j2", *compilers, *(str(path.relative_to(COPY)) for path in SWEEP)], cwd=COPY, check=True
    )


def run_sweep(number, cases):
    """The first case that fails under emulation, or another reason for the run's end; None if all cases passed."""
    sweep, checker = SWEEP
    emulator, record = os.environ.get("QEMU_AARCH64", "qemu-aarch64"), COPY / "build" / "neon.record"
    broken = {"FASTLANE_CPU_ISA": "neon", "FASTLANE_MUTANT": str(number)}
    for command, environment in (
        ([emulator, sweep, "--write"], broken),
        ([checker, "--read"], {"FASTLANE_CPU_ISA": ""}),
    ):
        command += [record, *cases.split()]
        try:
            done = subprocess.run(
                command, env=os.environ | environment, capture_output=True, text=True, timeout=TIME_LIMIT_S
            )
        except subprocess.TimeoutExpired:
            return f"no end after {TIME_LIMIT_S} s"
        if done.returncode < 0:
            return f"signal {-done.returncode}"
        if done.returncode:
            return ((done.stdout + done.stderr).splitlines() or [f"status {done.returncode}"])[0]
    return None


def is_judged_on(mutant, isa):
    """Whether a mutant changes results of a kernel set, and shows where only the sweep looks."""
    in_sweep = mutant.file.startswith("csrc/kernels/") and mutant.shows_in_sweep
    return isa in (mutant.kernel_sets or (isa,)) and (isa != "neon" or in_sweep)


def run_tests(number, file, isa, path, markers=MARKERS_OF_THE_NEAREST):
    """The failing test, or another reason for the run's end; None if all tests passed."""
    environment = {"FASTLANE_CPU_ISA": isa, "FASTLANE_PATH": path, "FASTLANE_MUTANT": str(number)}
    environment = os.environ | environment | {"PYTHONPATH": str(COPY)}
    options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", "-m", markers[path]]
    command = [sys.executable, "-m", "pytest", *options, file]
    try:
        done = subprocess.run(
            command, cwd=COPY / "tests", env=environment, capture_output=True, text=True, timeout=TIME_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return f"no end after {TIME_LIMIT_S} s"
    if done.returncode in (0, NO_TESTS):
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if failed:
        return failed.group(1)
    if done.returncode == 1:
        return "a failing test"
    if done.returncode < 0:
        return f"signal {-done.returncode}"
    sys.exit(f"pytest ended with {done.returncode}, which says nothing of a mutant:\n{done.stdout}{done.stderr}")


def noticed_by(number, mutant, isa):
    if isa == "neon":
        return next(filter(None, (run_sweep(number, cases) for cases in SWEEPS)), None)
    for file in dict.fromkeys([mutant.near, *TEST_FILES]):
        markers = MARKERS_OF_THE_NEAREST if file == mutant.near else MARKERS
        found = run_tests(number, file, isa, mutant.path, markers)
        if found:
            return found
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="TEXT", help="mutants with this in their names (repeatable)")
    parser.add_argument("--isa", default="avx2", help="kernel set that is broken (default avx2)")
    parser.add_argument("--list", action="store_true", help="name the mutants and stop")
    parser.add_argument("--json", type=Path, help="write the results there")
    arguments = parser.parse_args()
    only = arguments.only or [""]
    chosen = [(i, m) for i, m in enumerate(MUTANTS, start=1) if any(text in m.name for text in only)]
    chosen = [(i, m) for i, m in chosen if is_judged_on(m, arguments.isa)]
    if not chosen:
        parser.error(f"--only: no mutant of {arguments.isa} has {' or '.join(map(repr, only))} in its name; see --list")
    if arguments.list:
        print("\n".join(f"{i:3} {m.name} ({m.file})" for i, m in chosen))
        return 0
    copy_sources()
    if arguments.isa == "neon":
        build_sweep()
        unbroken = [("the sweep", run_sweep(0, SWEEPS[-1]))]
    else:
        build()
        runs = sorted({(m.near, m.path) for _, m in chosen})
        unbroken = ((f"{file}, path {path}", run_tests(0, file, arguments.isa, path)) for file, path in runs)
    for what, found in unbroken:
        if found:
            sys.exit(f"{what} fails with no mutant chosen: {found}; mend that first")
    results = []
    for number, mutant in chosen:
        start = time.monotonic()
        found = noticed_by(number, mutant, arguments.isa)
        results.append({"number": number, "mutant": mutant.name, "file": mutant.file, "noticed_by": found})
        print(f"{number:3} {mutant.name}: {found or 'SURVIVED'} ({time.monotonic() - start:.0f} s)", flush=True)
    survivors = [r for r in results if not r["noticed_by"]]
    print(f"{len(results) - len(survivors)} of {len(results)} mutants noticed")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
