"""The experiments of ``fastlane gradients``: their figures, fused and in eager PyTorch, and what each of them shows."""

from __future__ import annotations

import doctest
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import fails, run_json

import fastlane_ext as fl
from fastlane_ext import cli, experiments, functional
from fastlane_ext.gradients import gradient_report, shortcut_demo

# Mean |gradient| of each weight, eager, torch 2.13; the last digits depend on how a CPU adds up.
FIGURES = {
    "example": {
        "without": [1.797180e-05, 4.828102e-05, 6.131295e-05, 9.431678e-05, 2.186470e-03],
        "with": [2.496186e-04, 1.455541e-04, 1.487314e-04, 1.571888e-04, 5.235277e-03],
    },
    "published": {
        "without": [
            0.00020173587836325169,
            0.00012011159560643137,
            0.0007152039906941354,
            0.0013988736318424344,
            0.005049645435065031,
        ],
        "with": [
            0.22169792652130127,
            0.20694106817245483,
            0.32896995544433594,
            0.2665732204914093,
            1.3258540630340576,
        ],
    },
    "projection": {
        "without": [0.000013, 0.000022, 0.000043, 0.000183, 0.004021],
        "with": [
            *(0.000916, 0.001609, 0.002951, 0.004927, 0.024069),
            *(0.001640, 0.003067, 0.005784, 0.009416, 0.058301),
        ],
    },
}
# The example's output nearly cancels, and lends its rounding to every gradient; projection's figures have six decimals.
TOLERANCE: dict[str, dict[str, float]] = {
    "example": {"rel": 1e-5, "abs": 0},
    "published": {"rel": 2e-6, "abs": 0},
    "projection": {"rel": 0, "abs": 1.5e-6},
}
RANDOM = ("example", "projection", "any-rank")


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("show", ["eager", "fused"])
def test_figures(name: str, show: str) -> None:
    fl.reset_stats()
    result = experiments.run(name, show=show)
    assert fl.stats()["fallback"] == {} and fl.stats()["fused"]["backward"] > 0
    assert result.difference < 1e-5
    for key, expected in FIGURES[name].items():
        block = result.blocks[key]
        weights = [row for row in block.values["parameters"] if row["name"].endswith("weight")]
        close = pytest.approx(expected, **TOLERANCE[name])
        assert [row["mean_abs"] for row in weights] == close
        assert [block.values["eager"][row["name"]] for row in weights] == close
        shown = [float(line.split()[-1]) for line in block.lines if line.startswith(("layers", "projections"))]
        assert shown == close
    style = "Gradients by layer" if name == "projection" else "layers.0.0.weight has gradient mean of "
    assert result.blocks["with"].lines[0].startswith(style)


@pytest.mark.parametrize("name", FIGURES)
def test_networks_are_those_of_the_plain_script(name: str) -> None:
    """One seed at the start and no later seed; the published table's script seeds both networks."""
    torch.manual_seed({"example": 42, "published": 123, "projection": 0}[name])
    expected = []
    if name == "example":
        x = torch.randn(1, 1)
    for use_shortcut in (False, True):
        if name == "published":
            torch.manual_seed(123)
        if name == "projection":
            expected.append(fl.reference.ImprovedResidualNetwork([128, 64, 32, 16, 8, 1], use_shortcut))
        else:
            sizes = [1, 64, 64, 64, 64, 1] if name == "example" else [3, 3, 3, 3, 3, 1]
            activation = "gelu" if name == "example" else "gelu_tanh"
            expected.append(fl.reference.ExampleDeepNeuralNetwork(sizes, use_shortcut, activation))
    if name == "projection":
        x = torch.randn(10, 128)
    elif name == "published":
        x = torch.tensor([[1.0, 0.0, -1.0]])
    for demo in experiments.run(name).pairs:
        assert torch.equal(demo.x, x)
        for model, other in zip(demo[1:], expected, strict=True):
            assert model.state_dict().keys() == other.state_dict().keys()
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
            report, twin = gradient_report(model, x), gradient_report(other, x)
            assert [r.mean_abs for r in report.rows] == pytest.approx([r.mean_abs for r in twin.rows], rel=1e-5, abs=0)


def test_the_demo_is_the_example() -> None:
    mine, theirs = shortcut_demo(), experiments.example()
    assert torch.equal(mine.x, theirs.x)
    for model, other in zip(mine[1:], theirs[1:], strict=True):
        assert model.shortcut == other.shortcut
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", FIGURES)
def test_whose_gradients_the_lines_show(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines are the plain script's on this machine, or the fused networks' on demand; nothing else changes.

    Where the two agree in all digits that are shown, as in `projection`, swapped lines would not be noticed.
    """
    argv = ["gradients", "--experiment", name]
    results = {show: run_json([*argv, "--show", show, "--json"], capsys)[1] for show in ("eager", "fused")}
    for key in FIGURES[name]:
        means = {}
        for show, result in results.items():
            assert result["ok"] and result["path"]["fused"]["backward"] > 0
            block = result["blocks"][key]
            means["eager"] = [mean for parameter, mean in block["eager"].items() if parameter.endswith("weight")]
            means["fused"] = [row["mean_abs"] for row in block["parameters"] if row["name"].endswith("weight")]
            shown = [float(line.split()[-1]) for line in block["lines"] if line[-1:].isdigit()]
            assert shown == pytest.approx(means[show], rel=5e-7, abs=5e-7 if name == "projection" else 0)
        assert results["eager"]["blocks"][key]["eager"] == results["fused"]["blocks"][key]["eager"]
        assert results["eager"]["blocks"][key]["parameters"] == results["fused"]["blocks"][key]["parameters"]
    for options, whose in ([], "eager PyTorch"), (["--show", "fused"], "the fused networks"):
        assert cli.main([*argv, *options]) == 0
        assert f"; lines: {whose}\n" in capsys.readouterr().out


def test_worked() -> None:
    steps = experiments.run("worked").blocks["steps"]
    gelu = [z * 0.5 * math.erfc(-z / math.sqrt(2)) for z in (2.0, -0.5, -1.5)]
    for result in ("fused", "eager"):
        assert steps.values["x W^T"][result] == [2.0, -0.5, -1.5]
        assert steps.values["act(x W^T)"][result] == pytest.approx(gelu, rel=1e-6)
        output = [a + b for a, b in zip(gelu, (1, 0, -1), strict=True)]
        assert steps.values["act(x W^T) + x"][result] == pytest.approx(output, rel=1e-6)
    assert [line.split()[-3:] for line in steps.lines[:2]] == [
        ["1.000000", "0.000000", "-1.000000"],
        ["2.000000", "-0.500000", "-1.500000"],
    ]
    plain = experiments.run("worked", activation="none").blocks["steps"].values
    assert plain["act(x W^T) + x"]["fused"] == [3.0, -0.5, -2.5]


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "none"])
def test_any_rank(activation: str) -> None:
    fl.reset_stats()
    result = experiments.run("any-rank", activation=activation)
    assert fl.stats()["fallback"] == {} and fl.stats()["fused"]["backward"] == 1
    assert result.blocks["shape"].values["shape"] == [2, 3, 54]
    assert "(2, 3, 54)" in result.blocks["shape"].lines[0]
    slope = result.blocks["slope"].values
    x = torch.tensor(slope["x"], dtype=torch.float64, requires_grad=True)
    f = {"gelu": torch.nn.GELU(), "gelu_tanh": torch.nn.GELU("tanh"), "none": torch.nn.Identity()}[activation]
    (derivative,) = torch.autograd.grad(f(x).sum(), x)
    assert slope["autograd"] == pytest.approx((1 + derivative).tolist(), rel=1e-6)
    assert slope["formula"] == pytest.approx((1 + derivative).tolist(), rel=1e-12)
    assert len(result.blocks["slope"].lines) == 6


@pytest.mark.parametrize("name", ["worked", "any-rank"])
def test_a_wrong_layer_is_seen(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    layer = functional.linear_gelu_residual
    monkeypatch.setattr(functional, "linear_gelu_residual", lambda *a, **k: layer(*a, **k) * 1.001)
    assert cli.main(["gradients", "--experiment", name]) == 1
    assert "DISAGREE" in capsys.readouterr().out


def test_a_wrong_network_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = fl.DeepNeuralNet.forward
    monkeypatch.setattr(fl.DeepNeuralNet, "forward", lambda self, x: forward(self, x) * 1.001)
    assert experiments.run("any-rank").blocks["shape"].difference > 1e-4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_a_difference(value: float) -> None:
    assert experiments._relative(value, 1.0) == experiments._relative(1.0, math.nan) == math.inf
    assert experiments._distance(torch.tensor([value]), torch.tensor([1.0])) == math.inf
    assert experiments._distance(torch.tensor([math.nan]), torch.tensor([math.nan])) == math.inf


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, result = run_json(["gradients", "--experiment", name, "--json"], capsys)
    assert status == 0 and result["ok"] and result["experiment"] == name
    assert result["path"]["fallback"] == {} and result["path"]["fused"]["forward"] > 0
    assert cli.main(["gradients", "--experiment", name]) == 0
    out = capsys.readouterr().out.splitlines()
    for block in result["blocks"].values():
        start = out.index(block["heading"])
        assert out[start + 1 : start + 1 + len(block["lines"])] == block["lines"]
    assert any(line.startswith(f"{name}: ") for line in out)
    assert any(line.startswith("fused and eager agree") for line in out)
    assert ("seed" in result) == (name in RANDOM)


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_picture(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    path = tmp_path / "g.svg"
    argv = ["gradients", "--experiment", name, "--plot", str(path)]
    if name not in FIGURES:
        assert f"--plot: got {path}, but the experiment {name} compares no layers" in fails(argv, capsys)
        assert not path.exists()
        return
    saved, save = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda f, *a, **k: saved.append(f) or save(f, *a, **k))
    assert cli.main(argv) == 0
    axes = saved[0].axes[0]
    for line, expected in zip(axes.lines, FIGURES[name].values(), strict=True):
        assert list(line.get_ydata()) == pytest.approx(expected[:5], **TOLERANCE[name])
    (shown,) = (text.get_text() for text in axes.texts if text.get_text().startswith(f"{name}: sizes "))
    assert ("projections" in shown) == (name == "projection")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["published", "--sizes", "3,3"], "--sizes: got [3, 3], expected none for the experiment published"),
        (["published", "--seed", "1"], "--seed: got 1, expected none for the experiment published"),
        (["published", "--activation", "gelu"], "--activation: got 'gelu', expected none"),
        (["worked", "--sizes", "3,3"], "--sizes: got [3, 3], expected none for the experiment worked"),
        (["worked", "--seed", "1"], "--seed: got 1, expected none"),
        (["worked", "--style", "full"], "--style: got 'full', expected none"),
        (["any-rank", "--style", "full"], "--style: got 'full', expected none"),
        (["worked", "--show", "fused"], "--show: got 'fused', expected none for the experiment worked"),
        (["other"], "--experiment"),
    ],
)
def test_options_that_do_not_apply(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fails(["gradients", "--experiment", *argv], capsys)


def test_options_that_apply(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--sizes", "4,3,3,1", "--seed", "7", "--activation", "gelu_tanh", "--json"]
    for name in RANDOM:
        status, result = run_json(["gradients", "--experiment", name, *options], capsys)
        assert status == 0
        assert (result["sizes"], result["seed"], result["activation"]) == ([4, 3, 3, 1], 7, "gelu_tanh")
        assert "sizes 4, 3, 3, 1" in result["description"] and "seed 7" in result["description"]
    status, result = run_json(["gradients", "--experiment", "projection", "--style", "full", "--json"], capsys)
    assert result["blocks"]["with"]["lines"][0].startswith("layers.0.0.weight has gradient mean of ")
    assert json.dumps(result["blocks"]["with"]["eager"]["layers.0.0.weight"]) in result["blocks"]["with"]["lines"][0]


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(experiments)
    assert result.attempted >= 8 and result.failed == 0
