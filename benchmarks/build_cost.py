"""What the build costs: the processor time of each source file, as times an empty file that includes torch's headers.

    make build-cost
    python benchmarks/build_cost.py --top 5

The compile commands are those of the last build in build/. Each source is compiled once more, into a temporary folder.
The empty file includes torch/library.h and ATen/core/Tensor.h, as every file that defines an operator has to.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EMPTY = "#include <ATen/core/Tensor.h>\n#include <torch/library.h>\n"
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime)
"""


def commands():
    """The compiler's arguments of each source of the last build, without the file's own name and output."""
    built = sorted(ROOT.glob("build/temp.*/build.ninja"), key=lambda path: path.stat().st_mtime)
    if not built:
        sys.exit("build_cost.py: build/ holds no build, expected one by setup.py build_ext; run make first")
    listed = subprocess.run(
        ["ninja", "-C", str(built[-1].parent), "-t", "compdb"], check=True, capture_output=True, text=True
    ).stdout
    found = {}
    for entry in json.loads(listed):
        source = Path(entry["file"])
        if source.suffix == ".cpp":
            arguments = shlex.split(entry["command"])
            named = {place + step for flag in ("-o", "-MF") for place in [arguments.index(flag)] for step in (0, 1)}
            found[source] = [
                a for i, a in enumerate(arguments) if i not in named and a not in ("-c", "-MMD", entry["file"])
            ]
    return found


def seconds(arguments, source, folder):
    """The processor time of one compilation, in seconds."""
    output = Path(folder) / f"{abs(hash(source))}.o"
    command = [*arguments, "-c", str(source), "-o", str(output)]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *command], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    return float(result.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--top", type=int, default=10, help="how many files to list (default: 10)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at one time")
    options = parser.parse_args()
    sources = commands()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        empty = Path(folder) / "empty.cpp"
        empty.write_text(EMPTY)
        unit = min(seconds(next(iter(sources.values())), empty, folder) for _ in range(3))
        spent = dict(zip(sources, pool.map(lambda s: seconds(sources[s], s, folder), sources), strict=True))
    for source, time in sorted(spent.items(), key=lambda item: -item[1])[: options.top]:
        print(f"{time:7.1f} s {time / unit:6.1f}  {source.relative_to(ROOT)}")
    total = sum(spent.values())
    print(
        f"{total:7.1f} s {total / unit:6.1f}  {len(spent)} files; an empty file with torch's headers takes {unit:.1f} s"
    )


if __name__ == "__main__":
    main()
