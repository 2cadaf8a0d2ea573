"""``fastlane gradients``: an experiment of `fastlane_ext.experiments`, fused against eager, and the time of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

import fastlane_ext
from fastlane_ext import experiments, gradients, plots
from fastlane_ext._arguments import shortened
from fastlane_ext._text import seconds
from fastlane_ext.bench import machine, protocol
from fastlane_ext.bench.contestants import stats_since

from ..errors import CommandError
from ..files import cannot_write, picture
from ..limits import fits
from ..output import Note

# Rounding of fp32 sums in another order, through a few layers, stays below this difference.
TOLERANCE = 1e-4

STEPS = 3
"""The number of progress steps of a run: the experiment, the picture, the time of a step."""


def compute(
    experiment: str = "example",
    *,
    sizes: Sequence[int] | None = None,
    seed: int | None = None,
    activation: str | None = None,
    style: str | None = None,
    show: str | None = None,
    plot: str | None = None,
    note: Note = lambda done=0, text=None: None,
) -> dict[str, Any]:
    """An experiment's figures, and the largest relative difference between fused and eager. The result is JSON-able.

    ``sizes`` are the layer sizes; ``activation``, ``style`` and ``show`` are those of `fastlane_ext.experiments.run`;
    None means the experiment's default. ``ok`` in the result is False if fused and eager differ by more than fp32
    rounding explains. ``step`` times one forward and backward of the network with shortcuts. Raises CommandError for a
    value that the experiment refuses, and for a picture of an experiment that compares no layers.
    """
    picture("--plot", plot)
    if sizes is not None:
        # Bytes of two networks, perhaps with projections, fused and in eager, and of their gradients.
        fits(f"--sizes {shortened(','.join(map(str, sizes)))}", 80 * sum((a + 1) * b for a, b in pairwise(sizes)))
    before = fastlane_ext.stats()
    note(0, experiment)
    try:
        result = experiments.run(experiment, sizes=sizes, seed=seed, activation=activation, style=style, show=show)
    except (TypeError, ValueError) as error:
        raise CommandError(f"--{error}") from error
    note(1, "picture" if plot else None)
    if plot is not None:
        if not result.reports:
            raise CommandError(
                f"--plot: got {plot}, but the experiment {experiment} compares no layers; leave the option out"
            )
        with cannot_write("--plot", plot):
            plots.plot_gradients(result.reports, plot, subtitle=f"{result.experiment}: {result.description}")
    note(1, "time of a step")
    path = stats_since(before)
    times = _step_times(*result.pairs) if result.pairs else {}
    note(1)
    return {
        "experiment": experiment,
        "description": result.description,
        **{key: list(value) if key == "sizes" else value for key, value in result.options.items()},
        "blocks": {
            key: {
                "heading": block.heading,
                "lines": block.lines,
                **block.values,
                "largest_relative_difference": block.difference,
            }
            for key, block in result.blocks.items()
        },
        "largest_relative_difference": result.difference,
        "tolerance": TOLERANCE,
        "ok": result.difference <= TOLERANCE,
        "path": path,
        "step": times,
        "plot": plot,
    }


def _step_times(fused: gradients.ShortcutDemo, eager: gradients.ShortcutDemo) -> dict[str, Any]:
    def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
        def call() -> None:
            model.zero_grad()
            model(x).square().mean().backward()

        return call

    # One thread: the network is too small to share, and on a busy machine the time would be the wait for a thread.
    calls = {name: step(demo.with_shortcuts, demo.x) for name, demo in (("fused", fused), ("eager", eager))}
    with machine.torch_threads(1):
        return {name: timing.to_dict() for name, timing in protocol.race(calls, repeats=9, budget=2.0).items()}


def render(result: dict[str, Any]) -> None:
    """Print the blocks as plain lines, then the difference between fused and eager."""
    for block in result["blocks"].values():
        print(block["heading"], *block["lines"], "", sep="\n")
    whose = {"eager": "; lines: eager PyTorch", "fused": "; lines: the fused networks"}.get(result.get("show", ""), "")
    print(f"{result['experiment']}: {result['description']}{whose}")
    verdict = "agree" if result["ok"] else "DISAGREE"
    print(
        f"fused and eager {verdict}: largest relative difference {result['largest_relative_difference']:.1e} "
        f"(limit {result['tolerance']:.0e})"
    )
    step = {name: timing.get("median_s") for name, timing in result["step"].items()}
    if step and all(step.values()):
        print(
            f"one step with shortcuts, one thread: fused {seconds(step['fused'])}, eager {seconds(step['eager'])}, "
            f"{step['eager'] / step['fused']:.1f} times that"
        )
    for reason, count in result["path"]["fallback"].items():
        print(f"not fused, {count} calls: {reason}")
    if result["plot"]:
        print(f"picture: {result['plot']}")
