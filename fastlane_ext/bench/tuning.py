"""Measures this CPU for `fastlane tune`: our own products against the library's, over a grid of shapes.

A point is a piece of work, a dtype and a shape. Both paths take turns, on one thread and on all. The faster path is
taken, by the geometric mean over the numbers of threads, so that a call takes the same path for any number of threads.
The built-in rule stays where both are within `MARGIN` of one another, or where one number of threads speaks against the
mean.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch

from fastlane_ext import functional
from fastlane_ext._load import library

from .machine import torch_threads
from .protocol import Race, Timing, no_garbage_collection

MARGIN = 1.03
"""One path has to be so many times as fast as the other to be chosen against the rule."""

ROWS = (1, 8, 32, 128, 512, 4096)
FEATURES = (
    *((width, width) for width in (64, 256, 512, 1024, 4096)),
    *((256, 1024), (1024, 256), (768, 3072), (3072, 768), (1024, 4096), (4096, 1024)),
)
MLP_FEATURES = ((256, 1024), (768, 3072))
STACK_WIDTHS, STACK_LAYERS = (64, 128, 256), 8
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARES = {"float32": 0.5, "float64": 0.2, "bfloat16": 0.15, "float16": 0.15}
"""Of the time, if all dtypes are measured."""
MOST_MULTIPLY_ADDS = 2**33
"""Of a product. A larger one takes too long here, and the rule decides."""
ACTIVATION = "gelu"
ROUNDS, LEAST_ROUNDS, MIN_SAMPLE_SECONDS, POINT_SECONDS = 7, 3, 1e-3, 0.4
CLEAR = 1.5
"""A path so many times as fast as the other in its first samples is not measured further."""


@dataclass(frozen=True)
class Point:
    """A piece of work to measure: one of `WORKS`, a dtype's name, and the shape of its (first) layer."""

    work: str
    dtype: str
    rows: int
    in_features: int
    out_features: int

    def values(self, fused_wins: bool) -> tuple[str, str, int, int, int, bool]:
        """The point as the compiled library takes it."""
        return (*asdict(self).values(), fused_wins)

    @property
    def multiply_adds(self) -> int:
        """Of one of the point's products."""
        return self.rows * self.in_features * self.out_features


@dataclass(frozen=True)
class Measured:
    """A point with the median seconds of each path, by number of threads, and the path that is chosen."""

    point: Point
    fused_s: dict[int, float]
    library_s: dict[int, float]
    fused_wins: bool
    rule: bool
    """Whether the built-in rule takes the fused path."""

    @property
    def ratio(self) -> float:
        """The library's time over the fused time, as a geometric mean over the numbers of threads."""
        return math.exp(sum(math.log(self.library_s[n] / self.fused_s[n]) for n in self.fused_s) / len(self.fused_s))

    @property
    def is_clear(self) -> bool:
        """Whether one path is faster by more than `MARGIN`, and no number of threads says the opposite as clearly."""
        ratios = [self.library_s[n] / self.fused_s[n] for n in self.fused_s]
        return (self.ratio > MARGIN and min(ratios) > 1 / MARGIN) or (self.ratio < 1 / MARGIN and max(ratios) < MARGIN)

    def to_dict(self) -> dict[str, Any]:
        """The point as the profile holds it."""
        return {
            **asdict(self.point),
            "fused_wins": self.fused_wins,
            "fused_s": self.fused_s,
            "library_s": self.library_s,
        }


# The calls to be timed


def _layer(point: Point) -> list[torch.Tensor]:
    dtype = DTYPES[point.dtype]
    weight = torch.randn(point.out_features, point.in_features, dtype=dtype) / math.sqrt(point.in_features)
    return [torch.randn(point.rows, point.in_features, dtype=dtype), weight, torch.randn(point.out_features).to(dtype)]


def _mlp(point: Point) -> list[torch.Tensor]:
    second = torch.randn(point.in_features, point.out_features, dtype=DTYPES[point.dtype])
    return [*_layer(point), second / math.sqrt(point.out_features), torch.randn(point.in_features).to(second.dtype)]


def _backward(call: Callable[..., torch.Tensor], operands: list[torch.Tensor]) -> Callable[[], object]:
    for operand in operands:
        operand.requires_grad_()
    y = call(*operands)
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, operands, dy, retain_graph=True)


def _layer_call(*operands: torch.Tensor) -> torch.Tensor:
    x, weight, bias = operands
    residual = x if weight.shape[0] == weight.shape[1] else None
    return functional.linear_gelu_residual(x, weight, bias, residual, activation=ACTIVATION)


def _mlp_call(*operands: torch.Tensor) -> torch.Tensor:
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias = operands
    return functional.mlp_residual(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, x, activation=ACTIVATION)


def _stack(point: Point) -> Callable[[], object]:
    layers = [_layer(point)[1:] for _ in range(STACK_LAYERS)]
    x = _layer(point)[0].requires_grad_()
    weights, biases = ([layer[i].requires_grad_() for layer in layers] for i in (0, 1))
    dy = torch.randn_like(x)

    def step() -> object:
        y = functional.residual_stack(x, weights, biases, activation=ACTIVATION)
        return torch.autograd.grad(y, [x, *weights, *biases], dy)

    return step


def _forward(call: Callable[..., torch.Tensor], operands: list[torch.Tensor]) -> Callable[[], object]:
    def forward() -> object:
        with torch.no_grad():
            return call(*operands)

    return forward


WORKS: Mapping[str, Callable[[Point], Callable[[], object]]] = {
    "layer_forward": lambda point: _forward(_layer_call, _layer(point)),
    "layer_backward": lambda point: _backward(_layer_call, _layer(point)),
    "mlp_forward": lambda point: _forward(_mlp_call, _mlp(point)),
    "mlp_backward": lambda point: _backward(_mlp_call, _mlp(point)),
    "stack": _stack,
}
"""The kinds of work, each as a function that makes the call to be timed. Layers come first: what is not one kernel runs
layer by layer, as the layers' points say."""


def grid(dtypes: Sequence[str]) -> list[Point]:
    """The points to measure, in the order in which they matter: all layers of a dtype, then what consists of layers."""
    points = []
    for dtype in dtypes:
        shapes = {
            "layer": [(rows, *features) for features in FEATURES for rows in ROWS],
            "mlp": [(rows, *features) for features in MLP_FEATURES for rows in ROWS],
            "stack": [(rows, width, width) for width in STACK_WIDTHS for rows in ROWS],
        }
        for work in WORKS:
            made = [Point(work, dtype, *shape) for shape in shapes[work.partition("_")[0]]]
            made = [point for point in made if point.multiply_adds <= MOST_MULTIPLY_ADDS]
            points += sorted(made, key=lambda point: point.multiply_adds)
    return points


# Measuring


def _race(point: Point, layers: Sequence[tuple[Any, ...]], call: Callable[[], object]) -> tuple[float, float]:
    # Median seconds of the fused path and of the library's.
    paths = ("fused", "library")
    contest = Race(
        dict.fromkeys(paths, call),
        min_sample=MIN_SAMPLE_SECONDS,
        probes=1,
        prepare=lambda path: library.set_profile([*layers, point.values(path == "fused")]),
        seed=point.multiply_adds,
        raises=True,
    )
    start = time.perf_counter()
    with no_garbage_collection():
        contest.warm_up()
        for done in range(1, ROUNDS + 1):
            contest.round()
            enough = time.perf_counter() - start > POINT_SECONDS or _is_clear(*map(contest.samples, paths))
            if done >= LEAST_ROUNDS and enough:
                break
    fused, of_library = (Timing.of(contest.samples(path)).median for path in paths)
    return fused, of_library


def _is_clear(fused: Sequence[float], library_: Sequence[float]) -> bool:
    return bool(fused) and (max(fused) * CLEAR < min(library_) or max(library_) * CLEAR < min(fused))


def measure(points: Sequence[Point], threads: Sequence[int], budget: float) -> Iterator[Measured | Point]:
    """Measure ``points`` until ``budget`` seconds are spent; a point for which no time is left comes back as it is.

    Inside, the process's profile is the one that is being measured; at the end the process has none.
    """
    dtypes = list(dict.fromkeys(point.dtype for point in points))
    shares = list(accumulate(SHARES[dtype] for dtype in dtypes))
    start = time.perf_counter()
    # The next dtype gets the time that a dtype does not use.
    deadlines = {dtype: start + budget * share / shares[-1] for dtype, share in zip(dtypes, shares, strict=True)}
    known: list[tuple[Any, ...]] = []  # layers, as measured
    slowest: dict[tuple[str, str], float] = {}  # seconds of a multiply-add, of the slower path on one thread
    try:
        for point in points:
            library.set_profile([])
            rule = library.fuses(*point.values(True)[:-1])
            # Two paths, five calls each at the least, on every number of threads.
            expected = 10 * len(threads) * point.multiply_adds * slowest.get((point.work, point.dtype), 0.0)
            if time.perf_counter() + expected > deadlines[point.dtype]:
                yield point
                continue
            is_layer = point.work.startswith("layer")
            layers = [] if is_layer else known
            call = WORKS[point.work](point)
            fused_s, library_s = {}, {}
            for count in threads:
                with torch_threads(count):
                    fused_s[count], library_s[count] = _race(point, layers, call)
            measured = Measured(point, fused_s, library_s, rule, rule)
            if measured.is_clear:
                measured = Measured(point, fused_s, library_s, measured.ratio > 1, rule)
            if is_layer:
                known.append(point.values(measured.fused_wins))
            slowest[point.work, point.dtype] = max(*fused_s.values(), *library_s.values()) / point.multiply_adds
            yield measured
    finally:
        library.set_profile([])
