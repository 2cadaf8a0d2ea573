"""The experiments of ``fastlane gradients``: scripts that show what a shortcut does, run fused and in eager PyTorch.

Each experiment draws its random numbers in the order of the plain script that it stands for, and seeds as often as the
script does. `run` runs one experiment fused and in eager, and reports how far apart the two are.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import functional, networks, reference
from ._activations import in_float64
from ._arguments import bad, check_choice, check_layer_sizes
from .gradients import GradientReport, ShortcutDemo, gradient_report, print_gradients, seeded, shortcut_demo

__all__ = ["EXPERIMENTS", "Block", "Result", "any_rank", "example", "projection", "published", "run", "worked"]

HEADINGS = {"without": "=== Gradients WITHOUT shortcuts ===", "with": "=== Gradients WITH shortcuts ==="}


@dataclass(frozen=True)
class Block:
    """A part of an experiment: a heading, the lines below it, and the values of the fused run and of eager's."""

    heading: str
    lines: list[str]
    values: dict[str, Any]
    difference: float
    """The largest relative difference between the fused result and eager's; infinite where one is NaN."""


@dataclass(frozen=True)
class Result:
    """The result of `run`. ``reports`` and ``pairs`` (fused, eager) are empty where no networks are compared."""

    experiment: str
    description: str
    options: dict[str, Any]
    blocks: dict[str, Block]
    reports: dict[str, GradientReport] = field(default_factory=dict)
    pairs: tuple[ShortcutDemo, ...] = ()

    @property
    def difference(self) -> float:
        """The largest of the blocks' differences."""
        return max(block.difference for block in self.blocks.values())


# Pairs of networks


def example(
    sizes: Sequence[int] = (1, 64, 64, 64, 64, 1), *, seed: int = 42, activation: str = "gelu", eager: bool = False
) -> ShortcutDemo:
    """x, then network 1 without and with identity shortcuts, from one seed.

    >>> [tuple(p.shape) for p in example([1, 3, 3]).without.parameters()]
    [(3, 1), (3,), (3, 3), (3,)]
    """
    return shortcut_demo(sizes, seed=seed, activation=activation, eager=eager)


def published(*, eager: bool = False) -> ShortcutDemo:
    """The two networks 1 of the published gradient table, each from seed 123, with a given input.

    >>> published().x.tolist()
    [[1.0, 0.0, -1.0]]
    """
    library = reference if eager else networks
    made = []
    for use_shortcut in (False, True):
        with seeded(123):
            made.append(library.ExampleDeepNeuralNetwork([3, 3, 3, 3, 3, 1], use_shortcut, "gelu_tanh"))
    return ShortcutDemo(torch.tensor([[1.0, 0.0, -1.0]]), *made)


def projection(
    sizes: Sequence[int] = (128, 64, 32, 16, 8, 1), *, seed: int = 0, activation: str = "gelu", eager: bool = False
) -> ShortcutDemo:
    """Network 2 without, then with shortcuts (projections where sizes differ), then ten rows of x, all from one seed.

    >>> len(projection([4, 3, 3, 1]).with_shortcuts.state_dict())
    10
    """
    library = reference if eager else networks
    with seeded(seed):
        sizes = check_layer_sizes("sizes", sizes)
        made = [library.ImprovedResidualNetwork(sizes, use_shortcut, activation) for use_shortcut in (False, True)]
        return ShortcutDemo(torch.randn(10, sizes[0]), *made)


def _compare_pair(
    make: Callable[..., ShortcutDemo], style: str, show: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    pairs = fused, eager = make(**options), make(**options, eager=True)
    blocks, reports = {}, {}
    for key, model, twin in zip(HEADINGS, fused[1:], eager[1:], strict=True):
        lines = io.StringIO()
        print_gradients(twin if show == "eager" else model, fused.x, style=style, file=lines)
        report, twin_report = gradient_report(model, fused.x), gradient_report(twin, eager.x)
        reports[f"{key} shortcuts"] = twin_report if show == "eager" else report
        means = {row.name: row.mean_abs for row in twin_report.rows}
        weights = [row for row in report.rows if "weight" in row.name]
        blocks[key] = Block(
            HEADINGS[key],
            lines.getvalue().splitlines(),
            {"parameters": [asdict(row) for row in report.rows], "eager": means},
            max((_relative(row.mean_abs, means[row.name]) for row in weights), default=0.0),
        )
    return {"blocks": blocks, "reports": reports, "pairs": pairs}


# One layer


def worked(*, activation: str = "gelu", eager: bool = False) -> dict[str, Tensor]:
    """One layer with given numbers, step by step: x, ``x W^T``, its activation, and the activation + x.

    >>> worked()["x W^T"].tolist()
    [2.0, -0.5, -1.5]
    """
    layer = (reference if eager else functional).linear_gelu_residual
    x = torch.tensor([1.0, 0.0, -1.0])
    weight = torch.tensor([[1.0, 0.5, -1.0], [0.0, 1.0, 0.5], [-0.5, 0.5, 1.0]])
    bias = torch.zeros(3)
    return {
        "x": x,
        "x W^T": layer(x, weight, bias, activation="none"),
        "act(x W^T)": layer(x, weight, bias, activation=activation),
        "act(x W^T) + x": layer(x, weight, bias, x, activation=activation),
    }


def _worked(activation: str) -> dict[str, Any]:
    fused, eager = worked(activation=activation), worked(activation=activation, eager=True)
    name = {"gelu": "GELU", "gelu_tanh": "tanh GELU"}.get(activation, activation)
    labels = ["x", "x W^T", f"{name}(x W^T)", f"{name}(x W^T) + x"]
    if activation == "none":
        labels[2:] = ["no activation", "x W^T + x"]
    width = max(map(len, labels))
    lines = [
        label.ljust(width) + "".join(f"{value:12.6f}" for value in values.tolist())
        for label, values in zip(labels, fused.values(), strict=True)
    ]
    values = {key: {"fused": fused[key].tolist(), "eager": eager[key].tolist()} for key in fused}
    difference = max(_distance(fused[key], eager[key]) for key in fused)
    return {"blocks": {"steps": Block("=== One layer, step by step ===", lines, values, difference)}}


def any_rank(
    sizes: Sequence[int] = (25, 25, 43, 43, 54, 54),
    *,
    seed: int = 0,
    activation: str = "gelu_tanh",
    eager: bool = False,
) -> Tensor:
    """Network 3's output for a ``(2, 3, sizes[0])`` input; x is drawn after the parameters, from one seed.

    >>> any_rank().shape
    torch.Size([2, 3, 54])
    """
    library = reference if eager else networks
    with seeded(seed):
        network = library.DeepNeuralNet(True, list(sizes), activation)
        x = torch.randn(2, 3, sizes[0])
    with torch.no_grad():
        return network(x)


def slopes(activation: str = "gelu_tanh", *, eager: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x, ``out = x + f(x)`` and d out/d x by autograd, for a layer of one feature with weight 1: f is the activation.

    >>> slopes("none", eager=True)[2].tolist()
    [2.0, 2.0, 2.0, 2.0, 2.0]
    """
    layer = (reference if eager else functional).linear_gelu_residual
    x = torch.tensor([[-2.0], [-1.0], [0.0], [1.0], [2.0]], requires_grad=True)
    out = layer(x, torch.ones(1, 1), torch.zeros(1), x, activation=activation)
    (slope,) = torch.autograd.grad(out.sum(), x)
    return x.detach().flatten(), out.detach().flatten(), slope.flatten()


def _any_rank(sizes: Sequence[int], seed: int, activation: str) -> dict[str, Any]:
    fused, eager = (any_rank(sizes, seed=seed, activation=activation, eager=eager) for eager in (False, True))
    shape = tuple(fused.shape)
    path = ", ".join(map(str, sizes))
    line = f"input (2, 3, {sizes[0]}) through {path}: output {shape}"
    blocks = {"shape": Block("=== Any rank ===", [line], {"shape": list(shape)}, _distance(fused, eager))}

    x, out, slope = slopes(activation)
    formula = 1 + (torch.ones_like(x.double()) if activation == "none" else in_float64(x.double(), activation)[1])
    rows: list[tuple[str, ...]] = [("x", "out = x + f(x)", "d out/d x, autograd", "1 + f'(x)")]
    rows += [tuple(f"{value:.6f}" for value in row) for row in zip(*_lists(x, out, slope, formula), strict=True)]
    values = dict(zip(("x", "out", "autograd", "formula"), _lists(x, out, slope, formula), strict=True))
    eager_slope = slopes(activation, eager=True)[2]
    difference = max(_distance(slope, formula), _distance(slope, eager_slope))
    lines = [row[0].rjust(9) + "".join(cell.rjust(22) for cell in row[1:]) for row in rows]
    blocks["slope"] = Block("=== One layer with a shortcut: d out/d x = 1 + f'(x) ===", lines, values, difference)
    return {"blocks": blocks}


def _lists(*tensors: Tensor) -> list[list[float]]:
    return [tensor.tolist() for tensor in tensors]


# Running one


@dataclass(frozen=True)
class _Experiment:
    summary: str
    defaults: dict[str, Any]
    """The experiment's options and their default values."""
    describe: str
    run: Callable[..., dict[str, Any]]


def _pair(make: Callable[..., ShortcutDemo]) -> Callable[..., dict[str, Any]]:
    return lambda style, show, **options: _compare_pair(make, style, show, options)


EXPERIMENTS = {
    "example": _Experiment(
        "one network without, one with identity shortcuts, both from one seed",
        {"sizes": (1, 64, 64, 64, 64, 1), "seed": 42, "activation": "gelu", "style": "lines", "show": "eager"},
        "sizes {sizes}, identity shortcuts where sizes are equal, {activation}, seed {seed}",
        _pair(example),
    ),
    "published": _Experiment(
        "the published table: seed 123 for each, tanh GELU, a given input",
        {"style": "lines", "show": "eager"},
        "sizes 3, 3, 3, 3, 3, 1, identity shortcuts where sizes are equal, gelu_tanh, seed 123 for each",
        _pair(published),
    ),
    "projection": _Experiment(
        "layers of different sizes, with learned projections as shortcuts",
        {"sizes": (128, 64, 32, 16, 8, 1), "seed": 0, "activation": "gelu", "style": "table", "show": "eager"},
        "sizes {sizes}, projections where sizes differ, {activation}, seed {seed}",
        _pair(projection),
    ),
    "worked": _Experiment(
        "one layer with given numbers, step by step",
        {"activation": "gelu"},
        "one layer, {activation}",
        _worked,
    ),
    "any-rank": _Experiment(
        "an input of three dimensions, and the derivative 1 + f'(x) of a layer with a shortcut",
        {"sizes": (25, 25, 43, 43, 54, 54), "seed": 0, "activation": "gelu_tanh"},
        "sizes {sizes}, identity shortcuts where sizes are equal, {activation}, seed {seed}",
        _any_rank,
    ),
}
"""The experiments of `run`, by name; each has a ``summary`` and its options' ``defaults``."""


def run(name: str = "example", **options: Any) -> Result:
    """Run an experiment fused and in eager.

    Args:
        name: a key of ``EXPERIMENTS``.
        options: the options in the experiment's ``defaults``, from ``sizes`` (the input size, then each layer's),
            ``seed``, ``activation``, ``style`` (as in `print_gradients`) and ``show``: the lines and the reports hold
            the plain script's gradients for "eager", those of the fused networks for "fused". None means the default.

    Raises:
        TypeError, ValueError: one line; also for an option that this experiment does not have.

    >>> result = run("worked")
    >>> result.blocks["steps"].values["x W^T"]["fused"], result.difference < 1e-6
    ([2.0, -0.5, -1.5], True)
    """
    check_choice("experiment", name, tuple(EXPERIMENTS))
    experiment = EXPERIMENTS[name]
    given = {key: value for key, value in options.items() if value is not None}
    for key, value in given.items():
        if key not in experiment.defaults:
            raise bad(key, repr(value), f"none for the experiment {name}, which has no such choice", "leave it out")
    chosen = {**experiment.defaults, **given}
    if "show" in chosen:
        check_choice("show", chosen["show"], ("eager", "fused"))
    if "sizes" in chosen:
        chosen["sizes"] = check_layer_sizes("sizes", chosen["sizes"])
    shown = {**chosen, "sizes": ", ".join(map(str, chosen.get("sizes", ())))}
    return Result(name, experiment.describe.format(**shown), chosen, **experiment.run(**chosen))


def _relative(value: float | None, expected: float | None) -> float:
    if value is None or expected is None:
        return 0.0 if value is expected else math.inf
    if value == expected:
        return 0.0
    difference = abs(value - expected) / max(abs(expected), 1e-30)
    return difference if difference == difference else math.inf


def _distance(value: Tensor, expected: Tensor) -> float:
    # Relative to the largest element: relative to its own size, an element near zero would show cancellation only.
    value, expected = value.double(), expected.double()
    if not value.numel() or torch.equal(value, expected):
        return 0.0
    difference = ((value - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
    return difference if difference == difference else math.inf
