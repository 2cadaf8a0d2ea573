"""The report of `fuse` and `explain`: all places where a GELU meets a linear layer, and what really ran."""

import io
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from test_fuse import NamedMlp, fused_calls
from torch import fx, nn
from torch.utils.checkpoint import checkpoint_sequential

import fastlane_ext as fl

pytestmark = pytest.mark.filterwarnings("ignore:fuse. nothing runs fused", "ignore:.*torch.jit.*:DeprecationWarning")


def activate(x):
    return F.gelu(x)


def formula(x):
    return x * 0.5 * (1.0 + torch.erf(x / 1.41421))


class GeluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return F.gelu(x)


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 0.5 * x * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


class FastGelu(nn.Module):
    def forward(self, x):
        return GeluFunction.apply(x) if self.training else F.gelu(x)


ACTIVATE = activate
OBJECT = FastGelu()


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm, self.out = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)


def head(function):
    return type(function.__name__, (Head,), {"forward": function})


def by_global_function(self, x):
    return self.out(self.norm(ACTIVATE(self.dense(x))))


def by_global_object(self, x):
    return self.out(self.norm(OBJECT(self.dense(x))))


def by_formula(self, x):
    x = self.dense(x)
    return self.out(x * 0.5 * (1.0 + torch.erf(x * 0.70710678)))


def by_function_with_formula(self, x):
    return self.out(formula(self.dense(x)))


def by_autograd_function(self, x):
    return self.out(Hidden.apply(self.dense(x)))


def by_branch(self, x):
    x = self.dense(x)
    return self.out(F.gelu(x) if self.training else F.gelu(x))


def by_a_method(self, x):
    return self.out(self.helper(x))


def by_partial(self, x):
    return self.out(self.act(self.dense(x)))


class ByAMethod(Head):
    def forward(self, x):
        return self.out(self.helper(x))

    def helper(self, x):
        return F.gelu(self.dense(x))


class InAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            x = F.gelu(layer(x))
        return x


class OfParameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return F.gelu(F.linear(x, self.w))


class Bloom(Head):
    """Bloom's shape: the activation is a child that branches."""

    def __init__(self):
        super().__init__()
        self.gelu_impl = FastGelu()

    def forward(self, x):
        return self.out(self.gelu_impl(self.dense(x)))


FORWARDS = [by_global_function, by_global_object, by_formula, by_function_with_formula, by_autograd_function, by_branch]
MISSED = [*map(head, FORWARDS), ByAMethod, InAList, OfParameters, Bloom]


@pytest.mark.parametrize("kind", MISSED, ids=lambda kind: kind.__name__)
def test_a_place_that_is_not_followed_is_listed(kind):
    model = nn.Sequential(NamedMlp(8, 8), kind())
    report = fl.explain(model)
    assert [(site.name, site.fused) for site in report] == [("0", True), ("1", False)]
    assert report.sites[1].reason
    with pytest.raises(RuntimeError, match="strict=True, and 1 sites are refused"):
        fl.fuse(model, strict=True)
    assert type(model[0]) is NamedMlp


def test_models_without_a_gelu_are_not_listed():
    class Relu(Head):
        def forward(self, x):
            return self.out(torch.relu(self.dense(x)))

    assert len(fl.explain(nn.Sequential(Relu(), nn.Linear(8, 8), nn.Conv1d(8, 8, 1), nn.LSTM(8, 8)))) == 0


class RaisesAnyError(nn.Module):
    """A table that answers with KeyError."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def __getattr__(self, name):
        if name in ("fc", "_modules"):
            return super().__getattr__(name)
        raise KeyError(name)

    def forward(self, x):
        return F.gelu(self.fc(x))


def test_modules_that_are_not_looked_into():
    model = nn.Sequential(torch.jit.script(nn.Conv1d(1, 1, 1)), RaisesAnyError(), NamedMlp(8, 8))
    report = fl.fuse(model)
    assert [site.name for site in report.fused] == ["2"]
    assert report.passed_over[0] == ("0", "RecursiveScriptModule", "is a scripted or traced module")
    assert "1 of 2 sites fused; not looked into: 0, is a scripted or traced module" in report.summary()
    assert torch.equal(model[2](torch.zeros(1, 8)), model[2](torch.zeros(1, 8)))


def test_other_kinds_of_modules_are_no_obstacle():
    quantised = torch.ao.nn.quantized.dynamic.Linear(8, 8)
    traced = torch.jit.trace(nn.Linear(8, 8), torch.ones(1, 8))
    graph = fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    model = nn.Sequential(
        nn.LazyLinear(8), quantised, traced, graph, nn.ParameterList(), nn.Sequential(), NamedMlp(8, 8)
    )
    assert [site.name for site in fl.fuse(model).fused] == ["6"]


def test_a_graph_module_stays():
    graph, x = fx.symbolic_trace(NamedMlp(8, 8)), torch.ones(1, 8)
    expected = graph(x)
    (site,) = fl.fuse(graph)
    assert not site.fused and "GraphModule" in site.reason
    graph.recompile()
    assert torch.equal(graph(x), expected) and fl.unfuse(graph) == 0


def test_a_plan_in_a_module_of_another_class():
    """A pickler that makes the class anew leaves such a module."""
    model, x = NamedMlp(8, 8), torch.ones(1, 8)
    fl.fuse(model)
    object.__setattr__(model, "__class__", NamedMlp)
    (site,) = fl.explain(model)
    assert site.fused and site.calls is None
    fl.fuse(model).assert_fused(1)
    model(x)
    assert fused_calls() == 1 and fl.unfuse(model) == 1


def test_a_forward_of_the_containers_own():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU()), torch.ones(1, 8)
    model.forward = types.MethodType(nn.Sequential.forward, model)
    (site,) = fl.fuse(model)
    assert not site.fused and site.reason.startswith("has a forward of its own")
    del model.forward
    fl.fuse(model).assert_fused(1)
    model.forward = types.MethodType(nn.Sequential.forward, model)  # what accelerate's unwrap_model leaves behind
    model(x)
    assert fused_calls() == 0
    for report in (fl.explain(model), fl.fuse(model)):
        assert [site.reason.startswith("has a forward of its own") for site in report.refused] == [True]
    network = fl.ResidualMLP(8, 8)
    network.forward = types.MethodType(lambda self, x: x, network)
    assert not fl.explain(network).fused


def test_a_wrapper_around_the_fused_forward():
    """accelerate's hooks wrap a forward: the report cannot know the wrapper's effect, but it counts the calls."""
    model, x = NamedMlp(8, 8), torch.ones(1, 8)
    fl.fuse(model)
    inner = model.forward
    model.forward = lambda x: inner(x) + 1
    torch.testing.assert_close(model(x), NamedMlp.forward(model, x) + 1)
    (site,) = fl.explain(model)
    assert not site.fused and site.calls == {"fused": 1, "original": 0}


def test_what_really_ran():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.iterated = nn.Sequential(nn.Linear(8, 8), nn.GELU())
            self.checkpointed = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
            self.called = nn.Sequential(nn.Linear(8, 8), nn.GELU())

        def forward(self, x):
            for child in self.iterated:
                x = child(x)
            return self.called(checkpoint_sequential(self.checkpointed, 1, x, use_reentrant=False))

    model = Owner()
    fl.fuse(model).assert_fused(3)
    assert all(site.calls == {"fused": 0, "original": 0} for site in fl.explain(model))
    model(torch.randn(2, 8))
    never = "no call counted since fuse(): its owner may call its children, or a graph holds it"
    assert {site.name: (site.calls["fused"], site.reason) for site in fl.explain(model)} == {
        "iterated": (0, never),
        "checkpointed": (0, never),
        "called": (1, ""),
    }
    model.called[1].register_forward_hook(lambda *_: None)
    model(torch.randn(2, 8))
    fl.reset_stats()
    assert fl.explain(model).sites[2].calls == {"fused": 1, "original": 1}


@pytest.mark.parametrize(("encoding", "pattern"), [("ascii", "Linear->GELU->Linear"), ("utf-8", "Linear→GELU→Linear")])
def test_explain_in_a_terminal_without_arrows(encoding, pattern, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    print(fl.explain(nn.Sequential(NamedMlp(8, 8))))
    stream.flush()
    assert pattern in stream.buffer.getvalue().decode(encoding)


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.acts, self.by_name = nn.Linear(8, 8), [nn.GELU()], {"gelu": F.gelu}
        self.act_name = "gelu"


def keeps(function):
    return type(function.__name__, (Keeps,), {"forward": function})


def product(self, x):
    return F.gelu(x @ self.fc.weight)


def by_mm(self, x):
    return F.gelu(torch.mm(x, self.fc.weight))


def by_list(self, x):
    return self.acts[0](self.fc(x))


def by_dict(self, x):
    return self.by_name["gelu"](self.fc(x))


def by_getattr(self, x):
    return getattr(F, "gelu")(self.fc(x))  # noqa: B009


def by_distribution(self, x):
    h = self.fc(x)
    return h * torch.distributions.Normal(0.0, 1.0).cdf(h)


class OnlyParameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return F.gelu(x @ self.w)


class InABlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8))

    def forward(self, x):
        return F.gelu(self.block(x))


class ActWithAChild(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(8, 8), nn.Sequential(nn.Identity(), nn.GELU())

    def forward(self, x):
        return self.act(self.fc(x))


ALSO_MISSED = [
    *map(keeps, [product, by_mm, by_list, by_dict, by_getattr, by_distribution]),
    OnlyParameters,
    InABlock,
    ActWithAChild,
]


@pytest.mark.parametrize("kind", ALSO_MISSED, ids=lambda kind: kind.__name__)
def test_more_places_that_are_not_followed(kind):
    model = nn.Sequential(kind(), NamedMlp(8, 8))
    model(torch.randn(2, 8))
    assert [(site.name, site.fused) for site in fl.explain(model)] == [("0", False), ("1", True)]


def test_what_filter_fn_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        fl.fuse(NamedMlp(), filter_fn=lambda name, module: 1 / 0)
    with pytest.raises(TypeError, match="positional argument"):
        fl.fuse(NamedMlp(), filter_fn=lambda name: True, strict=True)


def test_strict_counts_what_could_not_be_looked_into():
    with pytest.raises(RuntimeError, match="strict=True"):
        fl.fuse(nn.Sequential(RaisesAnyError(), NamedMlp(8, 8)), strict=True)


def test_explain_makes_no_class():
    class Own(NamedMlp):
        pass

    fl.explain(Own())
    assert Own.__subclasses__() == []
