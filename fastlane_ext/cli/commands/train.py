"""``fastlane train``: a deep residual MLP on handwritten digits, without and with shortcuts, fused and eager.

All runs start from the same parameters and see the same batches with the same optimiser settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlane_ext
from fastlane_ext import gradients, plots, reference
from fastlane_ext._text import seconds
from fastlane_ext.bench import protocol
from fastlane_ext.bench.contestants import stats_since

from ..digits import Digits, Options, make_model, make_optimizer, step, train
from ..files import cannot_write, picture
from ..output import Note, console, table

SHORTCUTS = {"without": "none", "with": "identity"}
LEARNED = 0.5
# Two correct fp32 runs differ by a random amount of this order; a wrong gradient differs by far more.
NOISE_FACTOR = 4.0
NOISE_FLOOR = 4 * torch.finfo(torch.float32).eps
TRAININGS = ("fused", "eager", "eager_fp64", "eager_reordered")
TIMED_ROUNDS = 9


def _difference(a: list[float], b: list[float]) -> float:
    each = (abs(p - q) / max(abs(q), 1e-12) for p, q in zip(a, b, strict=True))
    # max() alone may skip a NaN.
    return max(math.inf if value != value else value for value in each)


def _agreement(curves: dict[str, list[float]]) -> dict[str, Any]:
    """The distance of the fused losses from eager's, beside the distance that eager's own fp32 rounding makes.

    The scale comes from two other eager runs: the same run in fp64, and the same run in fp32 with each batch's rows in
    reverse, which changes only the order of the sums.
    """
    fused, eager, wide, reordered = (curves[k] for k in ("fused", "eager", "eager_fp64", "eager_reordered"))
    noise = max(_difference(eager, wide), _difference(reordered, wide), _difference(reordered, eager))
    found = _difference(fused, eager)
    limit = max(NOISE_FACTOR * noise, NOISE_FLOOR)
    return {
        "fused_from_eager": found,
        "fused_from_fp64": _difference(fused, wide),
        "eager_from_fp64": _difference(eager, wide),
        "eager_from_eager_reordered": _difference(reordered, eager),
        "noise": noise,
        "limit": limit,
        "ok": found <= limit,
    }


def _gradients(options: Options, digits: Digits, rows: Tensor, shortcut: str) -> list[float | None]:
    # Mean |gradient| of each hidden layer's weight before the first step.
    model = make_model(fastlane_ext.ResidualNetwork, options, shortcut)
    report = gradients.gradient_report(model, digits.x[rows], digits.y[rows], F.cross_entropy)
    hidden = [row for row in report.rows if row.name.startswith("body.layers.")]
    return [row.mean_abs for row in hidden if row.name.endswith(".weight")]


def _epoch_times(options: Options, digits: Digits, compiled: bool, note: Note) -> dict[str, Any]:
    batches = digits.batches(1, options.batch, options.seed + 1)

    def epoch(model: Callable[[Tensor], Tensor], owner: nn.Module) -> Callable[[], None]:
        optimizer = make_optimizer(owner, options)

        def run() -> None:
            for rows in batches:
                step(model, optimizer, digits.x[rows], digits.y[rows])

        return run

    calls = {}
    for name, kind in (("fused", fastlane_ext.ResidualNetwork), ("eager", reference.ResidualNetwork)):
        model = make_model(kind, options, SHORTCUTS["with"])
        calls[name] = epoch(model, model)
    results: dict[str, protocol.Timing | protocol.Skipped] = {}
    if compiled:
        torch._dynamo.reset()
        model = make_model(reference.ResidualNetwork, options, SHORTCUTS["with"])
        calls["compile"] = epoch(torch.compile(model, dynamic=False), model)
    else:
        results["compile"] = protocol.Skipped("left out by --no-compile")
    rounds = 0

    def round_done() -> None:
        nonlocal rounds
        rounds += 1
        note(1, "time of an epoch")

    results |= protocol.race(
        calls,
        repeats=TIMED_ROUNDS,
        budget=10.0,
        on_contestant=lambda name: note(0, f"first epochs of {name}"),
        on_round=round_done,
    )
    note(TIMED_ROUNDS - rounds)  # a race on a slow machine stops early
    return {name: result.to_dict() for name, result in results.items()}


def steps(options: Options) -> int:
    """The number of progress steps of a run: the epochs of all trainings, the rounds of the timing, and the end."""
    return len(TRAININGS) * len(SHORTCUTS) * options.epochs + TIMED_ROUNDS + 1


def compute(
    options: Options | None = None,
    *,
    compiled: bool = True,
    plot: str | None = None,
    note: Note = lambda done=0, text=None: None,
) -> dict[str, Any]:
    """Train without and with shortcuts, fused and eager, and time an epoch. The result is JSON-able.

    ``ok`` is False if a fused loss curve is farther from eager's than fp32 rounding explains. Raises CommandError for
    options out of range and for a missing extra.
    """
    options = options or Options()
    options.check()
    picture("--plot", plot)
    digits = Digits.load(options.seed)
    batches = digits.batches(options.epochs, options.batch, options.seed + 1)
    before = fastlane_ext.stats()
    runs: dict[str, Any] = {}
    for key, shortcut in SHORTCUTS.items():
        curves: dict[str, list[float]] = {}
        accuracy: dict[str, float] = {}
        for name in TRAININGS:
            kind = (fastlane_ext if name == "fused" else reference).ResidualNetwork
            note(0, f"{key} shortcuts: {name}")
            model = make_model(kind, options, shortcut)
            model = model.double() if name == "eager_fp64" else model
            order = [rows.flip(0) for rows in batches] if name == "eager_reordered" else batches
            curves[name], accuracy[name] = train(model, digits, order, options, on_epoch=lambda: note(1))
        runs[key] = {
            "accuracy": accuracy,
            "learned": accuracy["fused"] > LEARNED,
            "agreement": _agreement(curves),
            "loss": curves,
            "gradients_at_start": _gradients(options, digits, batches[0], shortcut),
        }
    path = stats_since(before)
    times = _epoch_times(options, digits, compiled, note)
    result = {
        "options": {name: getattr(options, name) for name in Options.__dataclass_fields__},
        "images": {"training": len(digits.x), "held_out": len(digits.held_out_x)},
        "steps_per_epoch": len(batches) // options.epochs,
        "threads": torch.get_num_threads(),
        "runs": runs,
        "epoch": times,
        "path": path,
        "ok": all(run["agreement"]["ok"] for run in runs.values()),
        "plot": plot,
    }
    if plot is not None:
        note(0, "picture")
        _plot(result, plot)
    note(1)
    return result


def _plot(result: dict[str, Any], path: str) -> None:
    figure = plots.figure_class()(figsize=(11, 4.2), layout="constrained")
    losses, slopes = figure.subplots(1, 2)
    per_epoch = result["steps_per_epoch"]
    for (key, run), colour in zip(result["runs"].items(), ("#0072b2", "#d55e00"), strict=True):
        steps_done = [(index + 1) / per_epoch for index in range(len(run["loss"]["fused"]))]
        label = f"{key} shortcuts, {run['accuracy']['fused']:.1%} right"
        losses.plot(steps_done, run["loss"]["fused"], color=colour, linewidth=2.2, alpha=0.75, label=label)
        losses.plot(steps_done, run["loss"]["eager"], color="#1a1a1a", linewidth=0.7, linestyle=(0, (4, 4)))
        heights = [value or math.nan for value in run["gradients_at_start"]]
        slopes.plot(range(1, len(heights) + 1), heights, "o-", color=colour, markersize=4, label=f"{key} shortcuts")
    losses.plot([], [], color="#1a1a1a", linewidth=0.7, linestyle=(0, (4, 4)), label="eager, same seed")
    losses.set(xlabel="epoch", ylabel="training loss", yscale="log")
    losses.set_title("Handwritten digits, fused over eager", loc="left", fontweight="bold")
    slopes.set(xlabel="hidden layer (1 is next to the input)", ylabel="mean |gradient| before the first step")
    slopes.set_yscale("log")
    slopes.set_title("What reaches each layer", loc="left", fontweight="bold")
    for axes in (losses, slopes):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    with cannot_write("--plot", path):
        plots.save(figure, path)


def render(result: dict[str, Any]) -> None:
    """Print accuracies, the distance between the curves, and the time of an epoch."""
    out, options = console(), result["options"]
    out.print(
        f"{options['layers']} hidden layers of {options['width']}, {result['images']['training']} digits, "
        f"{options['epochs']} epochs, SGD lr {options['lr']:g} momentum {options['momentum']:g}"
    )
    accuracy = table("Held-out digits right", "", "fused", "eager", "fused loss, first → last", "learned")
    curves = table(
        "Loss curves, largest relative difference",
        "",
        "fused from eager",
        "eager's fp32 noise",
        f"limit ({NOISE_FACTOR:g} × noise)",
        "verdict",
    )
    for key, run in result["runs"].items():
        loss, agreement = run["loss"]["fused"], run["agreement"]
        accuracy.add_row(
            f"{key} shortcuts",
            f"{run['accuracy']['fused']:.1%}",
            f"{run['accuracy']['eager']:.1%}",
            f"{loss[0]:.4g} → {loss[-1]:.4g}",
            "[green]yes[/green]" if run["learned"] else "[red]no[/red]",
        )
        curves.add_row(
            f"{key} shortcuts",
            f"{agreement['fused_from_eager']:.1e}",
            f"{agreement['noise']:.1e}",
            f"{agreement['limit']:.1e}",
            "[green]agree[/green]" if agreement["ok"] else "[red]DISAGREE[/red]",
        )
    out.print(accuracy)
    out.print(curves)
    epoch = table(f"One epoch, {result['threads']} threads", "", "median", "quartiles", "against fused")
    fused = result["epoch"]["fused"].get("median_s")
    for name, timing in result["epoch"].items():
        if "skipped" in timing:
            epoch.add_row(name, "-", timing["skipped"], "")
            continue
        quartiles = f"{seconds(timing['q1_s'])} to {seconds(timing['q3_s'])}"
        over = f"{timing['median_s'] / fused:.2f} ×" if fused else ""
        epoch.add_row(name, seconds(timing["median_s"]), quartiles, over)
    out.print(epoch)
    for reason, count in result["path"]["fallback"].items():
        out.print(f"not fused, {count} calls: {reason}", markup=False)
    if result["plot"]:
        out.print(f"picture: {result['plot']}", markup=False)
