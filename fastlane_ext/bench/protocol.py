"""One way to measure: contestants take turns and report median and quartiles.

Turns spread a machine's slow moments over all contestants alike, so that ratios are reliable where absolute times are
not. Every round has another order, drawn from a fixed seed: a contestant with its own copy of the weight pushes the
next contestant's weight out of the cache. A contestant that raises stays in the table, with its reason.
"""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch

Call = Callable[[], object]


@runtime_checkable
class TimesItself(Protocol):
    """A call into another process, which times so many calls there."""

    def __call__(self) -> object: ...
    def timed(self, calls: int) -> float: ...


MIN_SAMPLE_SECONDS = 2e-3
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """Seconds per call: quartiles over ``samples`` samples, each the mean of ``calls_per_sample`` calls."""

    median: float
    q1: float
    q3: float
    samples: int
    calls_per_sample: int

    @classmethod
    def of(cls, seconds: list[float], calls_per_sample: int = 1) -> Timing:
        """Summarise samples, in seconds per call. Raises ValueError if there are none.

        >>> Timing.of([3.0, 1.0, 2.0]).median
        2.0
        """
        if not seconds:
            raise ValueError("seconds: expected at least one sample, got none")
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1, calls_per_sample)
        q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, q1, q3, len(seconds), calls_per_sample)

    def to_dict(self) -> dict[str, float | int]:
        return {
            "median_s": self.median,
            "q1_s": self.q1,
            "q3_s": self.q3,
            "samples": self.samples,
            "calls_per_sample": self.calls_per_sample,
        }


@dataclass(frozen=True)
class Skipped:
    """A contestant that could not run, and why, in one line."""

    reason: str

    def to_dict(self) -> dict[str, str]:
        return {"skipped": self.reason}


def reason_of(error: BaseException) -> str:
    """The first line of an exception's message, with its type, short enough for a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@dataclass
class _Entry:
    call: Call
    calls_per_sample: int = 1
    seconds: list[float] = field(default_factory=list)
    failed: str | None = None


class Race:
    """Contestants that take turns.

    ``calls`` maps each name to a call without arguments. Calls shorter than ``min_sample`` seconds are
    repeated within a sample until the clock can resolve them; the fastest of ``probes`` tries says how often.
    ``prepare`` gets a contestant's name before each of its samples, outside the time. The orders of the rounds follow
    from ``seed``. If ``raises``, a contestant that fails ends the race with its exception.

    >>> r = Race({"a": lambda: None, "b": lambda: None}, min_sample=1e-5)
    >>> r.warm_up()
    >>> r.round()
    >>> sorted(r.results())
    ['a', 'b']
    """

    def __init__(
        self,
        calls: Mapping[str, Call],
        *,
        min_sample: float = MIN_SAMPLE_SECONDS,
        probes: int = 3,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] | None = None,
        prepare: Callable[[str], None] = lambda name: None,
        seed: int = 0,
        raises: bool = False,
    ) -> None:
        self._entries = {name: _Entry(call) for name, call in calls.items()}
        self._draw = random.Random(seed)
        self._min_sample = min_sample
        self._probes = probes
        self._clock = clock
        self._synchronize = synchronize
        self._prepare = prepare
        self._raises = raises

    def _timed(self, call: Call, repeats: int) -> float:
        if isinstance(call, TimesItself):
            return call.timed(repeats)
        sync = self._synchronize
        if sync is not None:
            sync()
        start = self._clock()
        for _ in range(repeats):
            call()
        if sync is not None:
            sync()
        return self._clock() - start

    def _calls_per_sample(self, call: Call) -> int:
        # The fastest, since the first calls may still meet page faults; one whole sample corrects the number.
        calls = 1
        for _ in range(2):
            seconds = min(self._timed(call, calls) for _ in range(self._probes)) / calls
            calls = max(1, math.ceil(self._min_sample / max(seconds, 1e-9)))
            if calls == 1:
                break
        return calls

    def _fail(self, entry: _Entry, error: Exception) -> None:
        if self._raises:
            raise error
        entry.failed = reason_of(error)

    def warm_up(self, on_contestant: Callable[[str], None] | None = None) -> None:
        """Run each contestant until it is warm, and fix its number of calls per sample.

        ``on_contestant`` gets each name before the first call, which may compile for many seconds.
        """
        for name, entry in self._entries.items():
            if on_contestant is not None:
                on_contestant(name)
            self._prepare(name)
            try:
                self._timed(entry.call, min(2, self._probes))
                entry.calls_per_sample = self._calls_per_sample(entry.call)
            except Exception as error:
                self._fail(entry, error)

    def sample(self, name: str) -> None:
        """Take one sample of one contestant; if it fails, keep the reason."""
        entry = self._entries[name]
        if entry.failed is not None:
            return
        self._prepare(name)
        try:
            seconds = self._timed(entry.call, entry.calls_per_sample)
        except Exception as error:
            self._fail(entry, error)
            return
        entry.seconds.append(seconds / entry.calls_per_sample)

    def round(self) -> None:
        """One sample of each contestant, in an order drawn anew."""
        for name in self._draw.sample(list(self._entries), len(self._entries)):
            self.sample(name)

    def samples(self, name: str) -> list[float]:
        """The seconds of a call in each sample so far."""
        return self._entries[name].seconds

    def results(self) -> dict[str, Timing | Skipped]:
        """Each contestant's times, or why it could not run."""
        out: dict[str, Timing | Skipped] = {}
        for name, entry in self._entries.items():
            if entry.failed is not None:
                out[name] = Skipped(entry.failed)
            elif not entry.seconds:
                out[name] = Skipped("no sample was taken")
            else:
                out[name] = Timing.of(entry.seconds, entry.calls_per_sample)
        return out


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Inside, Python's garbage collector does not run."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def race(
    calls: Mapping[str, Call],
    *,
    repeats: int = 15,
    budget: float = 20.0,
    min_sample: float = MIN_SAMPLE_SECONDS,
    synchronize: Callable[[], None] | None = None,
    on_contestant: Callable[[str], None] | None = None,
    on_round: Callable[[], None] | None = None,
) -> dict[str, Timing | Skipped]:
    """Time ``calls`` in turns: warm-up, then ``repeats`` rounds.

    Stops early, after at least three rounds, when ``budget`` seconds are spent; ``samples`` in the result is the number
    of rounds. ``synchronize`` runs before and after each sample, as a CUDA device needs. ``on_contestant`` is called as
    by `Race.warm_up`, ``on_round`` after each round.
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    contest = Race(calls, min_sample=min_sample, synchronize=synchronize)
    contest.warm_up(on_contestant)
    start = time.perf_counter()
    with no_garbage_collection():
        for done in range(1, repeats + 1):
            contest.round()
            if on_round is not None:
                on_round()
            if done >= MIN_ROUNDS and time.perf_counter() - start > budget:
                break
    return contest.results()


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hide file descriptor 2 inside: the profiler's C++ code writes its start and stop there."""
    try:
        saved = os.dup(2)
    except OSError:
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def peak_memory(call: Call, device: str = "cpu") -> int:
    """The most bytes that were live at once during ``call``, beyond the bytes live before the call.

    Counts memory from torch's allocators: results, saved tensors, temporaries. On the CPU the peak is the largest
    running sum over the profiler's allocation events; buffers that a library takes from malloc itself are not counted.
    On CUDA the peak is the caching allocator's own.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    with (
        _silent_stderr(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profile,
    ):
        call()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, size in changes:
        live += size
        peak = max(peak, live)
    return peak
