"""``fastlane gradients``: mean |gradient| of each weight, without and with shortcuts, fused against eager, and the time
that both take."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

import fastlane_ext
from fastlane_ext import gradients, plots
from fastlane_ext.bench import machine, protocol
from fastlane_ext.bench.contestants import stats_since

from . import CommandError, seconds, writable

HEADINGS = {"without": "=== Gradients WITHOUT shortcuts ===", "with": "=== Gradients WITH shortcuts ==="}
# fp32 sums in another order, through a few layers: differences beyond this are no rounding.
TOLERANCE = 1e-4


def compute(
    sizes: Sequence[int] = (1, 64, 64, 64, 64, 1),
    *,
    seed: int = 42,
    activation: str = "gelu",
    style: str = "lines",
    plot: str | None = None,
) -> dict[str, Any]:
    """Gradients of the fused pair of networks, and their largest relative difference from the eager pair.

    ``sizes`` are the layer sizes, ``activation`` and ``style`` as in ``fastlane_ext.print_gradients``.
    ``ok`` in the result is False if fused and eager differ by more than fp32 rounding explains; ``step`` times
    one forward and backward of the network with shortcuts.
    CommandError for a value that the networks refuse.
    """
    writable("--plot", plot)
    try:
        fused = gradients.shortcut_demo(sizes, seed=seed, activation=activation)
        eager = gradients.shortcut_demo(sizes, seed=seed, activation=activation, eager=True)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    before = fastlane_ext.stats()
    blocks: dict[str, Any] = {}
    reports = {}
    for key, model, twin in (
        ("without", fused.without, eager.without),
        ("with", fused.with_shortcuts, eager.with_shortcuts),
    ):
        lines = io.StringIO()
        gradients.print_gradients(model, fused.x, style=style, file=lines)
        reports[key] = gradients.gradient_report(model, fused.x)
        expected = gradients.gradient_report(twin, eager.x)
        weights = [row for row in reports[key].rows if "weight" in row.name]
        means = {row.name: row.mean_abs for row in expected.rows}
        difference = max((_relative(row.mean_abs, means[row.name]) for row in weights), default=0.0)
        blocks[key] = {
            "heading": HEADINGS[key],
            "lines": lines.getvalue().splitlines(),
            "parameters": [asdict(row) for row in reports[key].rows],
            "eager": means,
            "largest_relative_difference": difference,
        }
    if plot is not None:
        _plot({f"{key} shortcuts": report for key, report in reports.items()}, plot)
    largest = max(block["largest_relative_difference"] for block in blocks.values())
    return {
        "sizes": list(sizes),
        "seed": seed,
        "activation": activation,
        "blocks": blocks,
        "largest_relative_difference": largest,
        "tolerance": TOLERANCE,
        "ok": largest <= TOLERANCE,
        "path": stats_since(before),
        "step": _step_times(fused, eager),
        "plot": plot,
    }


def _step_times(fused: gradients.ShortcutDemo, eager: gradients.ShortcutDemo) -> dict[str, Any]:
    def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
        def call() -> None:
            model.zero_grad()
            model(x).square().mean().backward()

        return call

    # So small a network has nothing to share: on a busy machine the wait for a thread would be what is timed.
    calls = {name: step(demo.with_shortcuts, demo.x) for name, demo in (("fused", fused), ("eager", eager))}
    with machine.torch_threads(1):
        return {name: timing.to_dict() for name, timing in protocol.race(calls, repeats=9, budget=2.0).items()}


def _relative(value: float | None, expected: float | None) -> float:
    if value is None or expected is None:
        return 0.0 if value is expected else float("inf")
    if value == expected:
        return 0.0
    difference = abs(value - expected) / max(abs(expected), 1e-30)
    return difference if difference == difference else float("inf")


def _plot(reports: dict[str, gradients.GradientReport], path: str) -> None:
    try:
        plots.plot_gradients(reports, path)
    except ImportError as error:
        raise CommandError(str(error)) from error
    except (OSError, ValueError) as error:
        raise CommandError(f"--plot: cannot write {path}: {error}") from error


def render(result: dict[str, Any]) -> None:
    """Print both blocks as plain lines, then how far fused and eager are apart."""
    for block in result["blocks"].values():
        print(block["heading"], *block["lines"], "", sep="\n")
    verdict = "agree" if result["ok"] else "DISAGREE"
    print(
        f"fused and eager {verdict}: largest relative difference {result['largest_relative_difference']:.1e} "
        f"(limit {result['tolerance']:.0e})"
    )
    step = {name: timing.get("median_s") for name, timing in result["step"].items()}
    if all(step.values()):
        print(
            f"one step with shortcuts, one thread: fused {seconds(step['fused'])}, eager {seconds(step['eager'])}, "
            f"{step['eager'] / step['fused']:.1f} times that"
        )
    for reason, count in result["path"]["fallback"].items():
        print(f"not fused, {count} calls: {reason}")
    if result["plot"]:
        print(f"picture: {result['plot']}")
