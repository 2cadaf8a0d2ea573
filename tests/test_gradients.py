"""print_gradients, gradient_report and their pictures: right figures, and no trace left behind."""

import contextlib
import doctest
import io
import json
import math
import subprocess
import sys

import pytest
import torch
from support.subprocesses import HANG_S
from torch import nn
from torch.nn.functional import mse_loss

import fastlane_ext as fl
from fastlane_ext import gradients
from fastlane_ext.gradients import gradient_report, print_gradients, shortcut_demo
from fastlane_ext.plots import plot_gradients

WITHOUT = 1.797181e-05


@pytest.mark.parametrize("function", [print_gradients, gradient_report])
@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (None, {}, "model: got a NoneType, expected an nn.Module"),
        (len, {}, "model: got a builtin_function_or_method"),
        (nn.Linear(3, 3), {"target": [0.0]}, "target: got a list, expected a tensor"),
        (nn.Linear(3, 3), {"loss_fn": "mse"}, "loss_fn: got 'mse', expected a function"),
    ],
)
def test_wrong_arguments_are_named(function, model, options, message):
    with pytest.raises(TypeError, match=f"^{message}") as error:
        function(model, torch.ones(2, 3), **options)
    assert "\n" not in str(error.value)


def test_a_target_made_in_inference_mode():
    with torch.inference_mode():
        target = torch.ones(2, 3)
    assert gradient_report(nn.Linear(3, 3), torch.ones(2, 3), target).loss > 0


def test_a_report_is_compared_with_a_report():
    report = gradient_report(nn.Linear(3, 3), torch.ones(2, 3))
    with pytest.raises(TypeError, match="^other: got a NoneType, expected a GradientReport"):
        report.compare(None)


@pytest.fixture(autouse=True)
def fresh():
    fl.reset_stats()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    fl.reset_stats()


def printed(*args, **kwargs):
    stream = io.StringIO()
    assert print_gradients(*args, file=stream, **kwargs) is None
    return stream.getvalue().splitlines()


def known_model():
    """Output 2a + 3b for input (2, 3), so that the MSE against zero has the gradient 2y * (2, 3)."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -0.5]]))
    return model, torch.tensor([[2.0, 3.0]])


class Noisy(nn.Module):
    """Dropout, running statistics, a frozen, an unused and a shared parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.again = self.first
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        return self.frozen(self.again(self.drop(self.norm(self.first(x)))))


def first_figure(model, x):
    """The first figure; its last digit in float32 depends on the CPU."""
    first = printed(model, x)[0]
    assert first.startswith("layers.0.0.weight has gradient mean of ")
    return pytest.approx(float(first.split()[-1]), rel=2e-6)


def test_the_first_figure_in_eager():
    demo = shortcut_demo(eager=True)
    assert first_figure(demo.without, demo.x) == WITHOUT
    assert len(printed(demo.without, demo.x)) == 5
    assert first_figure(demo.with_shortcuts, demo.x) == 2.496186e-04


def test_the_first_figure_fused():
    demo = shortcut_demo()
    assert first_figure(demo.without, demo.x) == WITHOUT
    assert fl.stats()["fallback"] == {} and fl.stats()["fused"]["backward"] > 0


@pytest.mark.parametrize("shortcut", ["projection", "identity", "concat"])
def test_the_fused_demo_has_eagers_figures(shortcut):
    fused, eager = (shortcut_demo(shortcut=shortcut, eager=eager) for eager in (False, True))
    assert torch.equal(fused.x, eager.x)
    for name in ("without", "with_shortcuts"):
        mine, theirs = getattr(fused, name), getattr(eager, name)
        for key, value in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[key], value)
        fl.reset_stats()
        got = gradient_report(mine, fused.x)
        assert fl.stats()["fallback"] == {}
        assert fl.stats()["fused"]["forward"] > 0 and fl.stats()["fused"]["backward"] > 0
        expected = gradient_report(theirs, eager.x)
        assert [row.name for row in got.rows] == [row.name for row in expected.rows]
        means = [[row.mean_abs for row in report.rows] for report in (got, expected)]
        # The loss's gradient is proportional to an output in which much cancels: it lends its error to all.
        assert means[0] == pytest.approx(means[1], rel=1e-5, abs=0)


def test_the_demo_is_made_from_its_seed_and_options():
    before = torch.get_rng_state()
    demo, same = shortcut_demo([3, 8, 8, 2], seed=5), shortcut_demo([3, 8, 8, 2], seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert demo.x.shape == (1, 3) and torch.equal(demo.x, same.x)
    assert type(demo.without) is fl.ResidualNetwork
    assert (demo.without.shortcut, demo.with_shortcuts.shortcut) == ("none", "identity")
    for mine, theirs in zip(demo[1:], same[1:], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), theirs.parameters(), strict=True))
    # The plain script: one seed, then x, the network without, the network with.
    torch.manual_seed(5)
    assert torch.equal(demo.x, torch.randn(1, 3))
    for model in demo[1:]:
        drawn = fl.ResidualNetwork([3, 8, 8, 2])
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), drawn.parameters(), strict=True))
    first = demo.without.layers[0][0].weight
    assert not torch.equal(first, shortcut_demo([3, 8, 8, 2], seed=6).without.layers[0][0].weight)
    x = torch.ones(2, 3)
    given = shortcut_demo([3, 8, 8, 2], seed=5, x=x, activation="gelu_tanh")
    assert given.x is x and torch.equal(given.without.layers[0][0].weight, first)
    assert given.without.layers[0][1].approximate == "tanh"


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (2**64, ValueError, "seed: got 18446744073709551616, expected an int from -2"),
        (-(2**63) - 1, ValueError, "seed: got -9223372036854775809, expected an int from -2"),
        pytest.param(10**5000, ValueError, "seed: got an int of 16610 bits, expected an int from -2", id="huge"),
        ("1", TypeError, r"seed: got '1' \(str\), expected an int"),
        (True, TypeError, r"seed: got True \(bool\), expected an int"),
    ],
)
def test_a_seed_that_torch_does_not_take(seed, error, message):
    with pytest.raises(error, match=f"^{message}") as caught:
        shortcut_demo(seed=seed)
    assert "\n" not in str(caught.value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2**64 - 1)
        assert torch.equal(shortcut_demo(seed=2**64 - 1).x, torch.randn(1, 1))
    shortcut_demo(seed=-(2**63))


def test_figures_are_those_of_backward():
    demo = shortcut_demo(eager=True)
    lines = printed(demo.without, demo.x, style="full")
    output = demo.without(demo.x)
    mse_loss(output, torch.zeros_like(output)).backward()
    assert lines == [
        f"{name} has gradient mean of {p.grad.abs().mean().item()}"
        for name, p in demo.without.named_parameters()
        if "weight" in name
    ]


def test_styles_to_the_letter():
    model, x = known_model()
    # y = 0.5, gradient 2 * 0.5 * (2, 3), mean 2.5
    assert printed(model, x) == ["weight has gradient mean of 2.500000e+00"]
    assert printed(model, x, style="full") == ["weight has gradient mean of 2.5"]
    heading, rule, line = printed(model, x, style="table")
    assert heading == "Gradients by layer" and rule == "-" * len(heading)
    assert line == "weight: gradient mean = 2.500000"
    with pytest.raises(ValueError, match="^style: got 'wide', expected one of 'lines', 'full', 'table'"):
        printed(model, x, style="wide")


def test_prints_to_standard_output(capsys):
    print_gradients(*known_model())
    assert capsys.readouterr().out == "weight has gradient mean of 2.500000e+00\n"


def test_target_and_loss():
    model, x = known_model()
    target = torch.tensor([[0.25]])
    assert printed(model, x, target=target) == ["weight has gradient mean of 1.250000e+00"]
    assert printed(model, x, loss_fn=lambda y, t: (y - t).abs().sum(), target=target)[0].endswith(" 2.500000e+00")
    # With a loss and no target, zeros in the output's shape are handed over.
    seen = []
    printed(model, x, loss_fn=lambda y, t: seen.append(t) or y.sum())
    assert torch.equal(seen[0], torch.zeros(1, 1))


@pytest.mark.parametrize("call", [print_gradients, gradient_report])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("had_grad", [True, False])
def test_leaves_no_trace(call, training, mode, had_grad, capsys):
    model, x = Noisy().train(training), torch.randn(8, 4)
    if had_grad:
        model(x).sum().backward()
    grads = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    values = {name: value.detach().clone() for name, value in tensors.items()}
    rng = torch.get_rng_state()
    fired = []
    model.first.weight.register_post_accumulate_grad_hook(lambda _: fired.append(1))
    with mode():
        call(model, x)
        grad_mode = torch.is_grad_enabled()
    assert grad_mode == (mode is contextlib.nullcontext)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training == training and model.drop.training == training and not fired
    for parameter, grad, value in grads:
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, value)
    for name, tensor in {**dict(model.named_buffers()), **dict(model.named_parameters())}.items():
        assert tensor is tensors[name] and torch.equal(tensor, values[name]), name


def test_leaves_no_trace_after_an_error():
    model, x = Noisy(), torch.randn(8, 4)
    before, rng = model.norm.running_mean.clone(), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        gradient_report(model, x, loss_fn=lambda *_: 1 / 0)
    assert torch.equal(model.norm.running_mean, before) and torch.equal(torch.get_rng_state(), rng)


def test_an_inference_tensor_as_input():
    model, _ = known_model()
    with torch.inference_mode():
        assert printed(model, torch.ones(1, 2)) == ["weight has gradient mean of 1.000000e+00"]


@pytest.mark.parametrize("call", [lambda *a, **k: printed(*a, **k), gradient_report])
def test_keep_grad_adds_as_backward_does(call):
    model, x = known_model()
    call(model, x, keep_grad=True)
    assert torch.equal(model.weight.grad, torch.tensor([[2.0, 3.0]]))
    kept = model.weight.grad
    call(model, x, keep_grad=True)
    assert model.weight.grad is kept and torch.equal(kept, torch.tensor([[4.0, 6.0]]))
    assert not kept.requires_grad


def test_frozen_unused_and_shared_parameters():
    model, x = Noisy().eval(), torch.randn(8, 4)
    report = gradient_report(model, x)
    names = [row.name for row in report.rows]
    assert names == [name for name, _ in model.named_parameters()]
    assert "first.weight" in names and "again.weight" not in names
    rows = {row.name: row for row in report.rows}
    for name in ("frozen.weight", "unused.bias"):
        assert rows[name].shape == tuple(model.get_parameter(name).shape)
        assert (rows[name].mean_abs, rows[name].zero_fraction, rows[name].ratio) == (None, None, None)
        line = next(line for line in str(report).splitlines() if line.startswith(name))
        assert line.split()[2:] == ["-"] * 6
    assert rows["first.weight"].mean_abs > 0
    assert "frozen.weight has no gradient" in printed(model, x)
    assert "unused.weight: no gradient" in printed(model, x, style="table")
    json_rows = {row["name"]: row for row in json.loads(report.to_json())["rows"]}
    assert json_rows["unused.weight"]["mean_abs"] is None


class Fixed(nn.Module):
    """A model whose gradient is ``values``."""

    def __init__(self, values, weight=1.0):
        super().__init__()
        self.values = torch.as_tensor(values)
        self.weight = nn.Parameter(torch.full_like(self.values, weight))

    def forward(self, x):
        return (self.weight * self.values).sum()


def fixed_report(values, weight=1.0):
    return gradient_report(Fixed(values, weight), None, loss_fn=lambda y, _: y)


def test_figures_of_a_known_gradient():
    row = fixed_report([[3.0, -4.0], [0.0, 0.0]], weight=2.0).rows[0]
    assert (row.name, row.shape) == ("weight", (2, 2))
    assert (row.mean_abs, row.l2, row.max_abs) == (1.75, 5.0, 4.0)
    assert (row.zero_fraction, row.nonfinite_fraction, row.ratio) == (0.5, 0.0, 5.0 / 4.0)
    assert fixed_report([3.0], weight=0.0).rows[0].ratio == math.inf
    assert math.isnan(fixed_report([0.0], weight=0.0).rows[0].ratio)
    empty = fixed_report(torch.zeros(0, 3)).rows[0]
    assert (empty.mean_abs, empty.max_abs, empty.zero_fraction) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_mean_does_not_round_to_a_narrow_type(dtype):
    values = torch.full((4096,), 1.0, dtype=dtype)
    values[0] = 2.0
    row = fixed_report(values).rows[0]
    assert row.mean_abs == 1 + 1 / 4096
    assert row.l2 == pytest.approx(math.sqrt(4095 + 4), rel=1e-12)


def test_the_l2_norm_does_not_overflow():
    assert fixed_report([1e30, 1e30]).rows[0].l2 == pytest.approx(math.sqrt(2) * 1e30)


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_json_is_valid_with_nan_and_infinity():
    report = fixed_report([float("nan"), float("inf"), 0.0, 1.0])
    row = json.loads(report.to_json(), parse_constant=refuse)["rows"][0]
    assert row["mean_abs"] is None and row["l2"] is None
    assert row["nonfinite_fraction"] == 0.5 and row["zero_fraction"] == 0.25
    assert row["shape"] == [4]
    assert math.isnan(report.rows[0].mean_abs)
    finite = json.loads(fixed_report([3.0, 4.0]).to_json())
    assert finite["loss"] == 7.0 and finite["rows"][0]["l2"] == 5.0


def test_table_is_plain_aligned_text():
    lines = str(fixed_report([[3.0, -4.0], [0.0, float("nan")]])).splitlines()
    assert lines[0].split() == [
        "parameter", "shape", "mean", "|g|", "L2", "max", "|g|", "zero", "non-finite", "|g|/|w|",
    ]  # fmt: skip
    assert set(lines[1]) == {"-"} and len({len(line) for line in lines}) == 1
    assert lines[2].split() == ["weight", "2x2", "nan", "nan", "nan", "25.0%", "25.0%", "nan"]


def test_compare_models_with_different_parameters():
    demo = shortcut_demo([1, 4, 4, 1], shortcut="projection")
    without, with_shortcuts = (gradient_report(model, demo.x) for model in demo[1:])
    comparison = without.compare(with_shortcuts, ("without", "with"))
    rows = {row[0]: row[1:] for row in comparison.rows}
    assert list(rows) == [row.name for row in with_shortcuts.rows]
    first = rows["layers.0.0.weight"]
    assert first[2] == pytest.approx(first[1] / first[0])
    assert rows["projections.0.weight"][0] is None and rows["projections.0.weight"][2] is None
    lines = str(comparison).splitlines()
    assert lines[0].split() == ["parameter", "without", "with", "ratio"]
    assert len({len(line) for line in lines}) == 1
    back = with_shortcuts.compare(without)
    assert {row[0] for row in back.rows} == set(rows)
    assert json.loads(comparison.to_json(), parse_constant=refuse)["rows"][0]["ratio"] == first[2]
    zero, one = fixed_report([0.0]), fixed_report([1.0])
    assert zero.compare(one).rows[0][3] == math.inf
    assert math.isnan(zero.compare(zero).rows[0][3])


class TwoOutputs(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return {"y": y} if self.out_features == 2 else (y, y)


@pytest.mark.parametrize(("features", "got"), [(2, "dict"), (3, "tuple")])
def test_outputs_that_are_no_tensor_need_a_loss(features, got):
    model, x = TwoOutputs(2, features), torch.ones(1, 2)
    with pytest.raises(TypeError, match=f"^loss_fn: got None for a model that returns a {got}, expected .*$") as e:
        gradient_report(model, x)
    assert "\n" not in str(e.value)
    loss_fn = lambda output, target: (output["y"] if got == "dict" else output[0]).sum()  # noqa: E731
    assert gradient_report(model, x, loss_fn=loss_fn).rows[0].mean_abs == 1.0


LINEAR = nn.Linear(2, 1)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (LINEAR, {"target": torch.zeros(1)}, r"^target: got shape \(1,\), expected the output's \(3, 1\)"),
        (LINEAR, {"loss_fn": lambda y, t: y}, r"^loss_fn: got shape \(3, 1\), expected a tensor of one"),
        (LINEAR, {"loss_fn": lambda y, t: 0.5}, "^loss_fn: got float, expected a tensor of one element"),
        (LINEAR, {"loss_fn": lambda y, t: y.detach().sum()}, "^model: got an output that no parameter"),
        (nn.Linear(2, 1).requires_grad_(False), {}, "^model: got no parameter with requires_grad"),
        (nn.Identity(), {}, "^model: got no parameter with requires_grad, expected at least one"),
    ],
)
def test_refusals_in_one_line(model, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        gradient_report(model, torch.ones(3, 2), **options)
    assert "\n" not in str(caught.value)


def test_sparse_gradients():
    model = nn.Sequential(nn.Embedding(4, 2, sparse=True))
    row = gradient_report(model, torch.tensor([1, 1]), loss_fn=lambda y, _: y.sum()).rows[0]
    assert row.mean_abs == 0.5 and row.zero_fraction == 0.75 and row.max_abs == 2.0


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, so that a test can look at their contents."""
    figure = pytest.importorskip("matplotlib.figure")
    saved, save = [], figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda f, *a, **k: saved.append(f) or save(f, *a, **k))
    return saved


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_bars(drawn, tmp_path, ending):
    row = gradients.GradientRow
    rows = (
        row("a.weight", (2,), mean_abs=1e-3),
        row("a.bias", (2,), mean_abs=0.0),
        row("b.weight", (2,)),
        row("b.bias", (2,), mean_abs=math.nan),
        row("c.weight", (2,), mean_abs=10.0),
    )
    path = tmp_path / f"bars.{ending}"
    gradients.GradientReport(0.0, rows).plot(path)
    assert path.stat().st_size > 1000
    axes = drawn[0].axes[0]
    assert axes.get_xscale() == "log" and axes.yaxis_inverted()
    assert [label.get_text() for label in axes.get_yticklabels()] == [r.name for r in rows]
    assert [text.get_text() for text in axes.texts] == ["1.0e-03", "0", "no gradient", "nan", "1.0e+01"]
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert ends == pytest.approx([1e-3, 10.0]) and all(bar.get_width() > 0 for bar in axes.patches)


def test_bars_without_any_gradient(drawn, tmp_path):
    fixed_report([0.0]).plot(tmp_path / "bars.png")
    assert not drawn[0].axes[0].patches


def test_lines_without_and_with_shortcuts(drawn, tmp_path):
    demo = shortcut_demo()
    without, with_shortcuts = (gradient_report(model, demo.x) for model in demo[1:])
    path = tmp_path / "lines.png"
    plot_gradients({"without shortcuts": without, "with shortcuts": with_shortcuts}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    axes = drawn[0].axes[0]
    assert axes.get_yscale() == "log"
    assert [line.get_label() for line in axes.lines] == ["without shortcuts", "with shortcuts"]
    for line, report in zip(axes.lines, (without, with_shortcuts), strict=True):
        layers = [r.mean_abs for r in report.rows if r.name.startswith("layers") and "weight" in r.name]
        assert list(line.get_xdata()) == [1, 2, 3, 4, 5]
        assert list(line.get_ydata()) == layers
    assert "13.9 times larger" in [text.get_text() for text in axes.texts]
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_lines_leave_a_gap_where_the_gradient_is_zero(drawn, tmp_path):
    plot_gradients({"a": fixed_report([0.0]), "b": fixed_report([1.0])}, tmp_path / "lines.png")
    assert math.isnan(drawn[0].axes[0].lines[0].get_ydata()[0])
    with pytest.raises(ValueError, match="^reports: got no weight that all reports have"):
        plot_gradients({}, tmp_path / "none.png")


def test_a_missing_matplotlib_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = fixed_report([1.0])
    for plot in (report.plot, lambda path: plot_gradients({"a": report}, path)):
        with pytest.raises(ImportError, match=r'^plots need matplotlib: pip install "fastlane_ext\[plot\]"$'):
            plot(tmp_path / "plot.png")


def test_reports_need_torch_alone():
    code = (
        "import sys, torch; from fastlane_ext.gradients import *; d = shortcut_demo([1, 3, 1]); "
        "r = gradient_report(d.without, d.x); str(r), r.to_json(), str(r.compare(r)); "
        "print_gradients(d.without, d.x); assert not {'matplotlib', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=HANG_S)


def test_examples_in_docstrings():
    result = doctest.testmod(gradients)
    assert result.attempted >= 7 and result.failed == 0
