"""Reads a build log with the output of ptxas -v for each kernel; fails on a spilled register or serialized wgmma.

python tests/support/ptxas_report.py BUILD_LOG
"""

import re
import sys
from pathlib import Path

# "Potential Performance Loss: wgmma.mma_async instructions are serialized"
SERIALIZED_WGMMA = "C7510"


def problems(log: str) -> list[str]:
    """The problems, one line for each; a log without any kernel is a problem too."""
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads",
        log,
        re.DOTALL,
    )
    found = [] if kernels else ["no kernel in the log; was it built from scratch, with NVCC_APPEND_FLAGS=-Xptxas=-v?"]
    found += [
        f"spills {stores} + {loads} bytes: {name} ({arch})"
        for name, arch, stores, loads in kernels
        if stores + loads != "00"
    ]
    found += [line.strip() for line in log.splitlines() if SERIALIZED_WGMMA in line]
    return found


def main() -> int:
    log = Path(sys.argv[1]).read_text(errors="replace")
    found = problems(log)
    print(*found, sep="\n", end="\n" if found else "")
    print(f"ptxas: {log.count('Compiling entry function')} kernels, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
