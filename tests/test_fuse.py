"""`fuse` on modules that somebody else wrote: what it finds, what it leaves alone, and that nothing else changes."""

import copy
import inspect
import io
import json
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlane_ext as fl
from fastlane_ext import reference

FALLBACK = pytest.mark.expects_fallback


class NamedMlp(nn.Module):
    """timm's shape: an identity where a norm could be, two dropouts."""

    def __init__(self, width=12, hidden=20, act=None, dropout=0.0):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = act or nn.GELU()
        self.drop1 = nn.Dropout(dropout)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, width)
        self.drop2 = nn.Dropout(dropout)

    def forward(self, x):
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))


class FunctionalMlp(nn.Module):
    def __init__(self, approximate="tanh"):
        super().__init__()
        self.up, self.down = nn.Linear(12, 20, bias=False), nn.Linear(20, 12, bias=False)
        self.approximate = approximate

    def forward(self, hidden_states):
        return self.down(F.gelu(self.up(hidden_states), approximate=self.approximate))


class ResidualOutput(nn.Module):
    """BERT's shape: the residual is another input, and a norm follows."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.dense, self.dropout, self.norm = nn.Linear(12, 8), nn.Dropout(dropout), nn.LayerNorm(8)

    def forward(self, hidden, residual):
        return self.norm(self.dropout(self.dense(hidden)) + residual)


class Block(nn.Module):
    """A residual inside the container's own forward."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = nn.LayerNorm(12), nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)

    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down, self.act = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12), nn.GELU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) if x.sum() > 0 else x


class NoisyInTraining(NamedMlp):
    def forward(self, x):
        y = super().forward(x)
        return self.drop2(y) if self.training else y


def sequential(*modules):
    return nn.Sequential(*modules)


PATTERNS = {
    "sequential": (lambda: sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)), ["Linear→GELU→Linear"]),
    "layers": (
        lambda: sequential(nn.Linear(12, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 7), nn.GELU("tanh"), nn.Tanh()),
        ["Linear→GELU", "Linear→GELU(tanh)"],
    ),
    "three": (
        lambda: sequential(nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 7), nn.GELU(), nn.Dropout(0.5), nn.Linear(7, 5)),
        ["Linear→GELU", "Linear→GELU→Linear"],
    ),
    "named": (NamedMlp, ["Linear→GELU→Linear"]),
    "functional": (FunctionalMlp, ["Linear→GELU(tanh)→Linear"]),
    "functional_exact": (lambda: FunctionalMlp("none"), ["Linear→GELU→Linear"]),
    "block": (Block, ["Linear→GELU→Linear+residual"]),
    "nested": (lambda: sequential(NamedMlp(), sequential(Block(), nn.Tanh())), ["Linear→GELU→Linear"] * 2),
}


def patterns(report):
    return [site.pattern.removesuffix("+residual") for site in report.fused]


def outputs_and_gradients(model, *inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = model(*leaves)
    wanted = [*leaves, *model.parameters()]
    return [y, *torch.autograd.grad(y, wanted, torch.ones_like(y) + y.detach())]


def assert_same_results(model, fused, *inputs, **tolerances):
    for expected, got in zip(outputs_and_gradients(model, *inputs), outputs_and_gradients(fused, *inputs), strict=True):
        torch.testing.assert_close(got, expected, **(tolerances or {"rtol": 1e-4, "atol": 1e-5}))


def fused_calls():
    stats = fl.stats()
    return sum(stats[path]["forward"] for path in ("fused", "library", "hopper"))


@pytest.mark.parametrize(("make", "expected"), PATTERNS.values(), ids=PATTERNS)
def test_patterns(make, expected):
    model = make().eval()
    fused = copy.deepcopy(model)
    report = fl.fuse(fused)
    assert patterns(report) == [pattern.removesuffix("+residual") for pattern in expected], report
    assert not report.refused
    calls = fused_calls()
    assert_same_results(model, fused, torch.randn(3, 5, 12))
    assert fused_calls() - calls == len(expected)


def test_a_residual_that_is_another_input():
    model = ResidualOutput()
    fused = copy.deepcopy(model)
    report = fl.fuse(fused)
    assert [site.pattern for site in report.fused] == ["Linear+residual"]
    hidden = torch.randn(4, 12)
    calls = fused_calls()
    assert_same_results(model, fused, hidden, torch.randn(4, 8))
    assert fused_calls() == calls + 1
    # What the kernels do not broadcast or promote is added afterwards.
    assert_same_results(model, fused, hidden, torch.randn(3, 4, 8))
    with torch.no_grad():
        torch.testing.assert_close(
            model(hidden, torch.ones(4, 8).bfloat16()), fused(hidden, torch.ones(4, 8).bfloat16())
        )


def test_keyword_arguments():
    model = FunctionalMlp()
    x = torch.randn(2, 12)
    expected = model(x)
    fl.fuse(model)
    torch.testing.assert_close(model(hidden_states=x), expected)
    output = ResidualOutput()
    expected = output(x, residual=torch.ones(2, 8))
    fl.fuse(output)
    torch.testing.assert_close(output(x, residual=torch.ones(2, 8)), expected)


class ExactByErf(nn.Module):
    def forward(self, x):
        return x * 0.5 * (1.0 + torch.erf(x / 2**0.5))


class TanhByHand(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


class Clipped(nn.Module):
    def forward(self, x):
        return torch.clip(F.gelu(x), -10, 10)


class Quick(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class AlmostQuick(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.7 * x)


class NeedsAnotherDevice(nn.Module):
    def forward(self, x):
        if x.dtype == torch.float64:
            raise RuntimeError("float32 only")
        return F.gelu(x)


@pytest.mark.parametrize(
    ("act", "pattern"),
    [
        (nn.GELU(), "GELU"),
        (nn.GELU("tanh"), "GELU(tanh)"),
        (ExactByErf(), "GELU"),
        (TanhByHand(), "GELU(tanh)"),
        (Quick(), "quick_gelu"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_activations_are_known_by_their_values(act, pattern):
    model = NamedMlp(act=act)
    fused = copy.deepcopy(model)
    assert patterns(fl.fuse(fused)) == [f"Linear→{pattern}→Linear"]
    assert_same_results(model, fused, torch.randn(7, 12))


@pytest.mark.parametrize(
    "act", [AlmostQuick(), Clipped(), nn.ReLU(), nn.SiLU(), nn.PReLU()], ids=lambda a: type(a).__name__
)
def test_other_activations_are_left_alone_with_a_reason(act):
    model = NamedMlp(act=act)
    with pytest.warns(UserWarning, match=type(act).__name__):
        report = fl.fuse(model)
    assert type(model) is NamedMlp and "forward" not in vars(model)
    (site,) = report
    known = "which is not known to compute a GELU" if type(act) is Clipped else "which computes no GELU"
    assert site.reason.startswith(f"act is a {type(act).__name__}, {known}")


def test_register_activation():
    model = NamedMlp(act=NeedsAnotherDevice())
    assert not fl.explain(model).fused
    fl.register_activation(NeedsAnotherDevice, "gelu")
    assert patterns(fl.explain(model)) == ["Linear→GELU→Linear"]
    with pytest.raises(ValueError, match="form: got 'relu'"):
        fl.register_activation(Quick, "relu")
    with pytest.raises(TypeError, match="cls: got"):
        fl.register_activation(Quick(), "gelu")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Gated(), "its forward also computes mul"),
        (Conditional(), "its forward decides or repeats something"),
        (NoisyInTraining(), "its forward decides or repeats something"),
        (nn.TransformerEncoderLayer(12, 2, 20, activation="gelu"), "its forward "),
        (nn.TransformerEncoderLayer(12, 2, 20, activation=nn.GELU()), "its forward "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_forwards_that_are_refused_with_the_reason(model, reason):
    before = type(model)
    with pytest.warns(UserWarning, match="nothing runs fused"):
        report = fl.fuse(model)
    assert len(report) == 1 and reason in report.sites[0].reason
    assert type(model) is before


def test_nothing_to_find():
    with pytest.warns(UserWarning, match="no Linear next to a GELU"):
        report = fl.fuse(nn.Sequential(nn.Linear(3, 3), nn.Conv2d(1, 1, 1)))
    assert len(report) == 0


def test_nothing_of_the_model_changes_but_its_class():
    model = nn.Sequential(NamedMlp(), NamedMlp())
    ids = {name: id(p) for name, p in model.named_parameters()}
    keys, modules = list(model.state_dict()), [id(m) for m in model.modules()]
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append("hook"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.random.fork_rng():
        before = torch.get_rng_state()
        fl.fuse(model)
        assert torch.equal(before, torch.get_rng_state())
    assert ids == {name: id(p) for name, p in model.named_parameters()}
    assert keys == list(model.state_dict()) and modules == [id(m) for m in model.modules()]
    assert isinstance(model[0], NamedMlp) and type(model[0]) is not NamedMlp
    assert repr(model[0]).startswith("NamedMlp[fused](")
    weight = model[0].fc1.weight.clone()
    model(torch.randn(2, 12)).sum().backward()
    optimizer.step()
    assert seen == ["hook"] and not torch.equal(weight, model[0].fc1.weight)
    NamedMlp().load_state_dict(model[0].state_dict())
    model[1].load_state_dict(NamedMlp().state_dict())


@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy"])
def test_copies(way):
    model = nn.Sequential(NamedMlp(), FunctionalMlp())
    fl.fuse(model)
    if way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif way == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        other = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    else:
        other = copy.deepcopy(model)
    assert type(other[0]) is type(model[0])
    x = torch.randn(4, 12)
    calls = fused_calls()
    assert torch.equal(other(x), model(x))
    assert fused_calls() == calls + 4
    assert fl.unfuse(other) == 2 and fl.explain(model).fused


def test_a_fused_class_goes_by_its_original_name():
    model = NamedMlp()
    fl.fuse(model)
    kind = type(model)
    assert kind is not NamedMlp and issubclass(kind, NamedMlp)
    assert (kind.__name__, kind.__qualname__, kind.__module__) == ("NamedMlp", "NamedMlp", __name__)
    assert inspect.getsource(kind) == inspect.getsource(NamedMlp)
    assert repr(model).startswith("NamedMlp[fused](")


def test_unfuse_restores_exactly():
    model = nn.Sequential(NamedMlp(), ResidualOutput(), reference.ResidualMLP(12, 20), nn.Linear(12, 4))
    before = [(type(m), set(vars(m))) for m in model.modules()]
    fl.fuse(model)
    assert fl.unfuse(model) == 3
    assert before == [(type(m), set(vars(m))) for m in model.modules()]
    assert fl.unfuse(model) == 0


def test_fusing_twice_is_fusing_once():
    model = nn.Sequential(NamedMlp(), Block())
    first = fl.fuse(model)
    classes = [type(m) for m in model]
    second = fl.fuse(model)
    assert [type(m) for m in model] == classes
    assert [site.fused for site in second] == [site.fused for site in first] == [True, True]


@FALLBACK("NamedMlp: its arguments are not plain tensors, one for each input")
def test_other_arguments():
    class Logged(torch.Tensor):
        pass

    model = NamedMlp()
    fl.fuse(model)
    x = torch.randn(2, 12)
    assert isinstance(model(x.as_subclass(Logged)), Logged)
    with pytest.raises(TypeError):
        model(x, x)


@FALLBACK("a torch.func transform is active")
def test_function_transforms():
    model = NamedMlp().double()
    x = torch.randn(3, 12, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    loss = lambda p, x: torch.func.functional_call(model, p, (x,)).square().sum()  # noqa: E731
    expected = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    fl.fuse(model)
    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    torch.testing.assert_close(got, expected)


def test_disabled():
    model = NamedMlp()
    x = torch.randn(2, 12)
    expected = model(x)
    fl.fuse(model)
    fl.reset_stats()
    with fl.disabled():
        with fl.disabled():
            pass
        assert torch.equal(model(x), expected)
        fl.linear_gelu_residual(x, model.fc1.weight)
    assert fl.stats()["fused"]["forward"] == 0
    assert fl.stats()["fallback"] == {"fastlane_ext.disabled() is active": 1}
    fl.reset_stats()
    model(x)
    assert fused_calls() == 1


def test_dry_run_filter_and_strict():
    model = nn.Sequential(NamedMlp(), Gated())
    assert len(fl.fuse(model, dry_run=True).fused) == 1 and type(model[0]) is NamedMlp
    with pytest.raises(RuntimeError, match="strict=True, and 1 sites are refused"):
        fl.fuse(model, strict=True)
    assert type(model[0]) is NamedMlp
    seen = []

    def only_linear(name, module):
        seen.append((name, type(module)))
        return False

    with pytest.warns(UserWarning, match="left out by filter_fn"):
        fl.fuse(model, filter_fn=only_linear)
    assert seen == [("0", NamedMlp)] and type(model[0]) is NamedMlp


def test_report():
    model = nn.Sequential(NamedMlp(), Gated())
    report = fl.fuse(model)
    report.assert_fused(1)
    with pytest.raises(AssertionError, match="expected 2 fused sites, got 1"):
        report.assert_fused(2)
    text = str(report)
    assert text.splitlines()[-1] == report.summary() == "Sequential: 1 of 2 sites fused"
    assert "its forward also computes mul" in text
    data = json.loads(report.to_json())
    assert data["fused"] == 1 and [site["name"] for site in data["sites"]] == ["0", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": [nn.Linear(2, 2)]}, "model: got a list"),
        ({"filter_fn": 3}, "filter_fn: got 3"),
        ({"linears": "yes"}, "linears: got 'yes'"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(TypeError, match=message):
        fl.fuse(**{"model": NamedMlp(), **arguments})


def test_reference_networks_become_the_fused_ones():
    model = nn.Sequential(
        reference.ExampleDeepNeuralNetwork([4, 4, 4]),
        reference.ImprovedResidualNetwork([4, 5, 4]),
        reference.ResidualMLP(4, 9),
        reference.LinearGELUResidual(4, 4),
    )
    fused = copy.deepcopy(model)
    fl.fuse(fused).assert_fused(4)
    assert [type(m) for m in fused] == [
        fl.ExampleDeepNeuralNetwork,
        fl.ImprovedResidualNetwork,
        fl.ResidualMLP,
        fl.LinearGELUResidual,
    ]
    assert_same_results(model, fused, torch.randn(3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("make", [NamedMlp, Block, FunctionalMlp], ids=lambda make: make.__name__)
def test_compile_fullgraph(make):
    model = make()
    fused = copy.deepcopy(model)
    fl.fuse(fused)
    compiled = torch.compile(fused, fullgraph=True, dynamic=True)
    for rows in (2, 5):
        assert_same_results(model, compiled, torch.randn(rows, 12))


def test_compile_fullgraph_of_an_owner_that_changes_a_dict():
    """transformers' models change their keyword arguments, and then a graph cannot read a class's own dict."""

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = NamedMlp()

        def forward(self, x, **options):
            options["a"] = 1
            return self.mlp(x)

    model, x = Owner(), torch.randn(2, 12)
    expected = model(x)
    fl.fuse(model).assert_fused(1)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    torch._dynamo.reset()


def test_bytes_held_for_backward():
    from test_mlp import bytes_held

    model = NamedMlp(64, 256)
    weights = 4 * 64 * 256
    eager = bytes_held(model, torch.randn(128, 64)) - weights
    fl.fuse(model)
    assert bytes_held(model, torch.randn(128, 64)) - weights <= 0.6 * eager


def test_no_warning_where_something_is_fused():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fl.fuse(NamedMlp())
