"""The machine's measured limits, multiply-adds and copied bytes per second, and facts about the machine.

The multiply-add peak comes from a loop of independent FMAs, compiled on the spot with the machine's own C++ compiler
and without torch. Without a compiler the peak is the best GEMM seen, as its ``source`` says.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastlane_ext._cpu import cpu_model

_FMA_SOURCE = r"""
#ifdef BF16
#include <immintrin.h>
typedef __m512 V;
#define STEP(a) a = _mm512_dpbf16_ps(a, m, c)
#define OPERANDS __m512bh m = (__m512bh)_mm512_set1_epi16(0x3f00), c = m
#else
typedef T V __attribute__((vector_size(BYTES)));
#define STEP(a) a = a * m + c
#define OPERANDS V m = (V){} + T(0.5), c = (V){} + seed
#endif
extern "C" double fastlane_fma(long n, double s) {
  T seed = T(s);
  V a[CHAINS];
  OPERANDS;
  for (int i = 0; i < CHAINS; ++i) a[i] = (V){} + (seed + T(i));
  for (long k = 0; k < n; ++k)
    for (int i = 0; i < CHAINS; ++i) STEP(a[i]);
  V sum = (V){};
  for (int i = 0; i < CHAINS; ++i) sum = sum + a[i];
  double out = 0;
  for (unsigned i = 0; i < BYTES / sizeof(T); ++i) out += sum[i];
  return out;
}
"""
_CHAINS = 12
"""Enough for two FMA units of latency 4 or 5; with two operands they still fit the 16 registers of AVX2."""


@dataclass(frozen=True)
class Peak:
    """Floating-point operations per second (a multiply-add counts two), and how they were measured."""

    flops: float
    source: str

    def to_dict(self) -> dict[str, float | str]:
        return {"flops_per_s": self.flops, "source": self.source}


def _cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Inside, torch has ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fma_flavour(dtype: torch.dtype) -> tuple[str, list[str], int, int] | None:
    # (name, compiler flags, vector bytes, multiply-adds per vector instruction)
    flags = _cpu_flags()
    double = dtype == torch.float64
    scalar = ["-DT=double"] if double else ["-DT=float"]
    if dtype == torch.bfloat16 and {"avx512_bf16", "avx512f"} <= flags:
        return "AVX512-BF16 dot product", ["-mavx512f", "-mavx512bf16", "-DBF16", "-DT=float"], 64, 32
    # fp16 and bf16 without instructions of their own are computed in fp32.
    if "avx512f" in flags:
        return "AVX-512 FMA", ["-mavx512f", *scalar], 64, 8 if double else 16
    if {"avx2", "fma"} <= flags:
        return "AVX2 FMA", ["-mavx2", "-mfma", *scalar], 32, 4 if double else 8
    return None


@cache
def _fma_kernel(flags: tuple[str, ...], vector_bytes: int) -> Callable[[int, float], float] | None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "fma.cpp"), Path(folder, "fma.so")
        source.write_text(_FMA_SOURCE)
        command = [
            compiler,
            "-O3",
            "-ffp-contract=fast",
            "-shared",
            "-fPIC",
            f"-DBYTES={vector_bytes}",
            f"-DCHAINS={_CHAINS}",
        ]
        try:
            subprocess.run(
                [*command, *flags, str(source), "-o", str(library)],
                check=True,
                capture_output=True,
                timeout=60,
            )
            function = ctypes.CDLL(str(library)).fastlane_fma
        except (OSError, subprocess.SubprocessError, AttributeError):
            return None
    function.restype = ctypes.c_double
    function.argtypes = [ctypes.c_long, ctypes.c_double]
    return function


def _best_gemm(dtype: torch.dtype, samples: int) -> Peak:
    n = 1024
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    calls: dict[str, Callable[[], object]] = {"torch.mm": lambda: torch.mm(a, b)}
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(b, n)
        calls["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")
        calls["oneDNN"]()
    except (RuntimeError, AttributeError, NotImplementedError):
        calls.pop("oneDNN", None)
    best: dict[str, float] = {}
    with torch.no_grad():
        for name, call in calls.items():
            call()
            seconds = []
            for _ in range(samples):
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
            best[name] = 2 * n**3 / min(seconds)
    winner = max(best, key=lambda name: best[name])
    return Peak(best[winner], f"best GEMM seen ({winner}, {n}³)")


_peaks: dict[tuple[torch.dtype, int], Peak] = {}


def fma_peak(dtype: torch.dtype, threads: int) -> Peak:
    """The most operations per second that ``threads`` threads reach with multiply-adds in registers.

    The result is the best seen so far: a first call takes five samples, a later call adds one, since a machine has slow
    moments. fp16, and bf16 on a CPU without a bf16 dot product, are computed in fp32 and so measured in fp32.

    >>> fma_peak(torch.float32, 1).flops > 1e8
    True
    """
    key = (dtype, threads)
    known = _peaks.get(key)
    peak = _measured_peak(dtype, threads, samples=1 if known else 5)
    if known is None or peak.flops > known.flops:
        _peaks[key] = peak
    return _peaks[key]


def _measured_peak(dtype: torch.dtype, threads: int, samples: int) -> Peak:
    flavour = _fma_flavour(dtype)
    kernel = _fma_kernel(tuple(flavour[1]), flavour[2]) if flavour else None
    if flavour is None or kernel is None:
        with torch_threads(threads):
            return _best_gemm(dtype, samples)
    # About 20 ms per sample, so that the start of a thread does not matter.
    steps, best = 8_000_000, 0.0
    for _ in range(samples):
        # ctypes releases the interpreter lock, so plain Python threads are enough.
        workers = [threading.Thread(target=kernel, args=(steps, 1.0)) for _ in range(threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        done = 2 * flavour[3] * _CHAINS * steps * threads
        best = max(best, done / (time.perf_counter() - start))
    return Peak(best, flavour[0])


@cache
def _copy_bandwidth(bytes_moved: int, threads: int) -> float:
    with torch_threads(threads):
        source = torch.ones(max(1, bytes_moved // 8), dtype=torch.float32)
        target = torch.empty_like(source)
        inner = max(1, (1 << 24) // bytes_moved)
        best = float("inf")
        for _ in range(7):
            start = time.perf_counter()
            for _ in range(inner):
                target.copy_(source)
            best = min(best, (time.perf_counter() - start) / inner)
        return 2 * source.numel() * 4 / best


def copy_bandwidth(bytes_moved: int, threads: int) -> float:
    """Bytes per second, read and written together, of ``copy_`` on a working set of about ``bytes_moved`` bytes.

    The working set is rounded up to a power of two between 1 MiB and 256 MiB: a case that fits a cache is compared with
    a copy that fits the cache too.
    """
    size = 1 << max(20, min(28, (max(1, bytes_moved) - 1).bit_length()))
    return max(_copy_bandwidth(size, count) for count in {1, threads})


def _seconds_of_live_children() -> float:
    """The processor time of children that nobody has waited for yet; `os.times` counts the others."""
    ticks = 0
    children: list[str] = []
    for thread in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # the thread has just ended
            children += thread.read_text().split()
    for child in children:
        # The name, in parentheses, may hold anything; after it come the fields from the third on.
        with suppress(OSError):
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Neighbours:
    """A context manager that counts the cores kept busy by anything but this process and its children.

    On a busy machine, threads that wait for each other can lose a factor of a hundred. ``cores`` is None where the
    system does not tell. Time that a hypervisor takes away counts too.

    >>> with Neighbours() as others:
    ...     pass
    >>> others.cores is None or others.cores >= 0
    True
    """

    cores: float | None = None

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        # (seconds passed, seconds all cores were busy, seconds this process and its children were)
        try:
            first = Path("/proc/stat").read_text().split("\n", 1)[0]
            user, nice, system, _idle, _iowait, *rest = (int(part) for part in first.split()[1:9])
            busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            return None
        return time.monotonic(), busy, sum(os.times()[:4]) + _seconds_of_live_children()

    def __enter__(self) -> Neighbours:
        self._before = self._now()
        return self

    def __exit__(self, *exc: object) -> None:
        after = self._now()
        if self._before is None or after is None:
            return
        passed, busy, mine = (b - a for a, b in zip(self._before, after, strict=True))
        self.cores = max(0.0, (busy - mine) / max(passed, 1e-3))


def git_commit(folder: Path) -> str | None:
    """The commit that ``folder`` is checked out at, with ``+changes`` if files differ; None outside a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], check=True, capture_output=True, text=True, timeout=20
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return None
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def environment() -> dict[str, Any]:
    """The facts that a time needs to mean anything: machine, versions, threads, commit, date. JSON-able."""
    import fastlane_ext

    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "isa": fastlane_ext.cpu_isa(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "fastlane_ext": fastlane_ext.build_info()["version"],
        "threads_default": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": git_commit(Path(fastlane_ext.__file__).resolve().parent.parent),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
