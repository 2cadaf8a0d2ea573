"""The cases that ``fastlane bench`` runs, and the rows that come out.

``cases`` has the kinds of cases. A ``Job`` is one case at one number of threads. ``prepare`` makes a ``Prepared`` job,
which gives a JSON-able row for each mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

import fastlane_ext

from . import contestants, machine, model_contestants, protocol
from .cases import FORWARD, MODES, STEP, Case, Layer, Mlp, Model, Network
from .contestants import Contestant

__all__ = [
    "FORWARD",
    "LAYERS",
    "MAX_THREADS",
    "MLPS",
    "MODELS",
    "MODES",
    "NETWORKS",
    "QUIET",
    "SCHEMA",
    "STEP",
    "SUITES",
    "Case",
    "Job",
    "Layer",
    "Mlp",
    "Model",
    "Network",
    "Prepared",
    "document",
    "dtype_name",
    "plan",
    "prepare",
    "run_job",
]

SCHEMA = 1
QUIET = 0.2
"""A row carries a warning if anything else keeps more than this many cores busy."""
MAX_THREADS = 1024

LAYERS: tuple[Layer, ...] = (
    Layer(1024, 1024, 1024, quick=True),
    Layer(2048, 768, 3072),
    Layer(2048, 3072, 768),
    Layer(512, 4096, 4096),
    Layer(4096, 256, 256),
    Layer(16384, 64, 64, quick=True),
    Layer(1, 1024, 1024),
    Layer(8, 1024, 1024),
    Layer(32, 1024, 1024),
    Layer(1, 64, 64, quick=True),
    Layer(1024, 1024, 1024, torch.bfloat16),
    Layer(16384, 64, 64, torch.bfloat16),
    Layer(512, 4096, 4096, torch.bfloat16),
    Layer(512, 512, 512, torch.float64),
)
NETWORKS: tuple[Network, ...] = (
    Network("[1, 64, 64, 64, 64, 1], 1 row", (1, 64, 64, 64, 64, 1), (1, 1), quick=True),
    Network("[3, 3, 3, 3, 3, 1], 1 row", (3, 3, 3, 3, 3, 1), (1, 3)),
    Network("[25, 25, 43, 43, 54, 54], (2, 3, 25)", (25, 25, 43, 43, 54, 54), (2, 3, 25)),
    Network("8 layers of 64, 65,536 rows", (64,) * 9, (65536, 64), quick=True),
    Network("8 layers of 128, 16,384 rows", (128,) * 9, (16384, 128)),
    Network("100 layers of 64, 64 rows", (64,) * 101, (64, 64)),
    Network(
        "[128, 64, 32, 16, 8, 1], projections, 10 rows",
        (128, 64, 32, 16, 8, 1),
        (10, 128),
        "projection",
        quick=True,
    ),
    Network("12 layers concat, growth 32 from 64, 4,096 rows", (64, *(32,) * 12), (4096, 64), "concat"),
    Network("4 layers of 1024, 512 rows", (1024,) * 5, (512, 1024)),
    Network("8 layers of 64, 65,536 rows", (64,) * 9, (65536, 64), dtype=torch.bfloat16),
)
_GPT2 = Model("GPT-2 small, 256 tokens", model_contestants.GPT2_SMALL, 1, 256, width=768, layers=12, other_weights=0)
_GPT2_WITH_HEAD = replace(
    _GPT2,
    label="GPT-2 small with its head, 256 tokens",
    architecture=model_contestants.GPT2_SMALL_WITH_HEAD,
    other_weights=768 * 50257,
)
_VIT = Model("ViT-small, 4 images", model_contestants.VIT_SMALL, 4, 197, width=384, layers=12, other_weights=384 * 768)
MLPS: tuple[Mlp, ...] = (
    Mlp(1024, 768, 3072, quick=True),
    Mlp(256, 768, 3072),
    Mlp(8, 768, 3072),
    Mlp(1024, 768, 3072, torch.bfloat16),
)
MODELS: tuple[Mlp | Model, ...] = (
    *MLPS,
    _GPT2,
    replace(_GPT2, linears=True),
    _GPT2_WITH_HEAD,
    replace(_GPT2_WITH_HEAD, linears=True),
    _VIT,
    replace(_VIT, linears=True),
)
SUITES: dict[str, tuple[Case, ...]] = {
    "layer": LAYERS,
    "networks": NETWORKS,
    "mlps": MLPS,
    "models": MODELS,
    "all": (*LAYERS, *NETWORKS, *MODELS),
}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Job:
    """One case at one number of threads."""

    case: Case
    threads: int

    def __str__(self) -> str:
        plural = "" if self.threads == 1 else "s"
        return f"{self.case.title} {dtype_name(self.case.dtype)}, {self.threads} thread{plural}"


def plan(
    suite: str = "all",
    threads: Sequence[int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    quick: bool = False,
) -> list[Job]:
    """The jobs of a suite, a key of ``SUITES``: each case at each number of threads.

    Without transformers, ``"all"`` leaves its models out.

    ``threads`` defaults to one and all. ``dtype`` runs every shape in this dtype instead of the listed ones; ``quick``
    keeps a few cases. Raises ValueError for an unknown suite or a number of threads out of range.

    >>> len(plan("layer", [1], quick=True))
    3
    """
    if suite not in SUITES:
        raise ValueError(f"suite: got {suite!r}, expected one of {', '.join(map(repr, SUITES))}")
    counts = dict.fromkeys(threads if threads is not None else (1, torch.get_num_threads()))
    for count in counts:
        # If the operating system refuses a thread, the process ends, not only the call.
        if not 1 <= count <= MAX_THREADS:
            raise ValueError(f"threads: got {count}, expected 1 to {MAX_THREADS}")
    cases = [case for case in SUITES[suite] if case.quick or not quick]
    if suite == "all" and not model_contestants.has_transformers():
        cases = [case for case in cases if not isinstance(case, Model)]
    if dtype is not None:
        cases = list(dict.fromkeys(replace(case, dtype=dtype, quick=False) for case in cases))
    return [Job(case, count) for count in counts for case in cases]


class Prepared:
    """A job with its contestants built and their answers compared; only valid within :func:`prepare`."""

    def __init__(self, job: Job, field: list[Contestant]) -> None:
        self.job = job
        self.contestants = field

    def calls(self, mode: str) -> dict[str, protocol.Call]:
        """The call of each contestant in ``mode``, without contestants that do not take part."""
        chosen = {c.name: c.forward if mode == FORWARD else c.step for c in self.contestants}
        return {name: call for name, call in chosen.items() if not isinstance(call, protocol.Skipped)}

    def absent(self, mode: str) -> dict[str, protocol.Skipped]:
        """The contestants that do not take part in ``mode``, and why."""
        chosen = {c.name: c.forward if mode == FORWARD else c.step for c in self.contestants}
        return {name: call for name, call in chosen.items() if isinstance(call, protocol.Skipped)}

    def peak_bytes(self, mode: str) -> dict[str, int]:
        """Peak memory of one call of each contestant, in bytes; see :func:`protocol.peak_memory`."""
        peaks = {}
        for contestant in self.contestants:
            call = contestant.forward if mode == FORWARD else contestant.step
            if isinstance(call, protocol.Skipped | protocol.TimesItself):
                continue
            with torch.set_grad_enabled(mode == STEP):
                peaks[contestant.name] = protocol.peak_memory(call)
        return peaks

    def path(self, mode: str) -> dict[str, Any]:
        """The path of one fused call, from ``fastlane_ext.stats()``."""
        call = self.calls(mode).get("fused")
        if call is None:
            return {}
        before = fastlane_ext.stats()
        with torch.set_grad_enabled(mode == STEP):
            call()
        return contestants.stats_since(before)

    def row(
        self,
        mode: str,
        results: dict[str, protocol.Timing | protocol.Skipped],
        busy_cores: float | None = None,
    ) -> dict[str, Any]:
        """One JSON-able row: the results, each time over the fused time, and the limit.

        ``busy_cores`` is the number that :class:`machine.Neighbours` counted during the measurement.
        """
        case, threads = self.job.case, self.job.threads
        results = {name: r for name in contestants.NAMES for r in [{**results, **self.absent(mode)}.get(name)] if r}
        times = {name: r.median for name, r in results.items() if isinstance(r, protocol.Timing)}
        flops, moved = case.work(mode)
        peak, bandwidth = machine.fma_peak(case.dtype, threads), machine.copy_bandwidth(moved, threads)
        bounds = {"multiply-adds": flops / peak.flops, "copy bandwidth": moved / bandwidth}
        bound_by = max(bounds, key=lambda name: bounds[name])
        fused = times.get("fused")
        return {
            "suite": case.suite,
            "case": case.title,
            "dtype": dtype_name(case.dtype),
            "threads": threads,
            "mode": mode,
            "results": {name: result.to_dict() for name, result in results.items()},
            "over_fused": {n: t / fused for n, t in times.items() if n != "fused"} if fused else {},
            "peak_bytes": self.peak_bytes(mode),
            "limit": {
                "seconds": bounds[bound_by],
                "bound_by": bound_by,
                "flops": flops,
                "bytes": moved,
                "flops_per_s": peak.flops,
                "flops_source": peak.source,
                "bytes_per_s": bandwidth,
            },
            "part_of_limit": {name: bounds[bound_by] / t for name, t in times.items()},
            "path": self.path(mode),
            "busy_cores": busy_cores,
            **(case.facts(mode, self.contestants) if isinstance(case, Mlp | Model) else {}),
        }


@contextmanager
def prepare(job: Job, *, compiled: bool = True, note: Callable[[str], None] | None = None) -> Iterator[Prepared]:
    """Set the number of threads, build the contestants, drop wrong answers; restore the threads at the end.

    ``note`` gets a few words on progress, since compiling a contestant takes seconds.
    """
    # Compiled code is specialised on shapes and on the number of threads.
    torch._dynamo.reset()
    with machine.torch_threads(job.threads):
        field = job.case.contestants(compiled)
        contestants.reject_wrong_answers(field, (lambda name: note(f"first call: {name}")) if note else None)
        yield Prepared(job, field)


def run_job(
    job: Job,
    *,
    repeats: int = 15,
    budget: float = 20.0,
    compiled: bool = True,
    note: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Time one job in both modes: two rows."""

    def told_in(mode: str) -> Callable[[str], None] | None:
        return (lambda name: note(f"{mode}: {name}")) if note else None

    rows = []
    with prepare(job, compiled=compiled, note=note) as prepared:
        for mode in MODES:
            with torch.set_grad_enabled(mode == STEP), machine.Neighbours() as others:
                results = protocol.race(
                    prepared.calls(mode),
                    repeats=repeats,
                    budget=budget,
                    on_contestant=told_in(mode),
                )
            rows.append(prepared.row(mode, results, others.cores))
    return rows


def document(rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    """The JSON document of a run: its rows, and the machine and settings that they were measured with."""
    return {
        "kind": "fastlane-bench",
        "schema": SCHEMA,
        **machine.environment(),
        "quiet_cores": QUIET,
        "settings": settings,
        "rows": rows,
    }
