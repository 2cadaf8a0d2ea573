"""What changes after `fuse`: constants, forwards of classes, children, parameters. The original then runs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_fuse import FALLBACK, NamedMlp, fused_calls
from test_fuse_refuses import sequential
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastlane_ext as fl

pytestmark = pytest.mark.filterwarnings("ignore:fuse. nothing runs fused")


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = 1.0

    def forward(self, x):
        return F.gelu(x) * self.scale


@pytest.mark.expects_fallback("NamedMlp: act has another scale now: 2.0")
def test_an_activation_whose_constant_changes():
    model = NamedMlp(act=Scaled())
    fl.fuse(model).assert_fused(1)
    model.act.scale = 2.0
    x = torch.randn(3, 12)
    torch.testing.assert_close(model(x), model.fc2(2 * F.gelu(model.fc1(x))))


@pytest.mark.expects_fallback("NamedMlp: act has another approximate now: None")
def test_an_activation_that_loses_its_constant():
    model = NamedMlp()
    fl.fuse(model)
    del model.act.approximate
    with pytest.raises(AttributeError):
        model(torch.randn(3, 12))


@pytest.mark.expects_fallback("NamedMlp: Linear has another forward now")
def test_the_class_of_linear_layers_gets_another_forward(monkeypatch):
    model = NamedMlp()
    fl.fuse(model)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 0 * F.linear(x, self.weight, self.bias))
    assert not model(torch.randn(3, 12)).any()


@pytest.mark.expects_fallback("NamedMlp: GELU has another forward now")
def test_the_class_of_a_child_gets_another_forward(monkeypatch):
    model = NamedMlp()
    fl.fuse(model)
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: x)
    x = torch.randn(3, 12)
    torch.testing.assert_close(model(x), model.fc2(model.fc1(x)))


class ReadsAConstant(NamedMlp):
    def __init__(self):
        super().__init__()
        self.approximate = "none"

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


@pytest.mark.expects_fallback("ReadsAConstant: has another approximate now: 'tanh'")
def test_a_constant_of_the_container_changes():
    model = ReadsAConstant()
    fl.fuse(model).assert_fused(1)
    x = 3 * torch.randn(30, 12)
    model(x)
    model.approximate = "tanh"
    assert torch.equal(model(x), model.fc2(F.gelu(model.fc1(x), approximate="tanh")))


CHILDREN = {
    "append": lambda m: m.append(nn.Softmax(-1)),
    "insert": lambda m: m.insert(3, nn.Tanh()),
    "extend": lambda m: m.extend([nn.Tanh(), nn.Tanh()]),
    "add_module": lambda m: m.add_module("head", nn.Tanh()),
    "pop": lambda m: m.pop(-1),
    "replace": lambda m: m.__setitem__(1, nn.ReLU()),
}


@pytest.mark.parametrize("change", CHILDREN.values(), ids=CHILDREN)
def test_children_that_come_and_go(change):
    model = sequential().append(nn.Tanh())
    fused = copy.deepcopy(model)
    fl.fuse(fused)
    change(model)
    change(fused)
    x = torch.randn(4, 8)
    assert torch.equal(fused(x), model(x))
    (reason,) = fl.stats()["fallback"]
    assert reason in ("Sequential: its children are others now", "Sequential: 1 is a ReLU, not a GELU")
    fl.reset_stats()


@pytest.mark.expects_fallback(
    "NamedMlp: fc1 has a weight of torch.complex64", "NamedMlp: fc1 has a weight of layout torch.sparse_csr"
)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.filterwarnings("ignore:Complex modules")
def test_parameters_that_become_something_else():
    model = NamedMlp()
    x = torch.randn(3, 12)
    expected = model(x)
    fl.fuse(model)
    model.fc1.weight = nn.Parameter(model.fc1.weight.detach().to_sparse_csr())
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    other = NamedMlp(act=nn.GELU())
    fl.fuse(other)
    with pytest.raises(RuntimeError):
        other.to(torch.complex64)(x.to(torch.complex64))


def changes():
    def replaced(model):
        model.fc1 = nn.Sequential(model.fc1)

    def subclassed(model):
        class Adapter(nn.Linear):
            def forward(self, x):
                return super().forward(x) + 1

        model.fc2.__class__ = Adapter

    return {
        "child replaced": (replaced, "fc1 is a Sequential, not a plain Linear"),
        "child subclassed": (subclassed, "fc2 is a test_fuse_changes.Adapter, not a plain Linear"),
        "forward hook": (lambda m: m.fc1.register_forward_hook(lambda *a: a[2] * 2), "fc1 has hooks"),
        "pre-hook": (lambda m: m.act.register_forward_pre_hook(lambda _, a: (a[0] * 2,)), "act has hooks"),
        "own forward": (lambda m: setattr(m.fc2, "forward", lambda x: x[..., :12]), "fc2 has a forward of its own"),
        "activation replaced": (lambda m: setattr(m, "act", nn.ReLU()), "act is a ReLU, not a GELU"),
        "activation changed": (
            lambda m: setattr(m.act, "approximate", "tanh"),
            "act has another approximate now: 'tanh'",
        ),
        "dropout active": (lambda m: setattr(m.drop1, "p", 0.5), "drop1 is active"),
        "norm in place of identity": (lambda m: setattr(m, "norm", nn.LayerNorm(20)), "norm is a LayerNorm"),
        "pruned": (lambda m: prune.l1_unstructured(m.fc1, "weight", amount=3), "fc1 has hooks"),
        "parametrised": (lambda m: parametrizations.weight_norm(m.fc2), "fc2 is a ParametrizedLinear"),
        "weight_norm": (lambda m: nn.utils.weight_norm(m.fc1), "fc1 has hooks"),
    }


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(("change", "reason"), changes().values(), ids=changes())
def test_changes_after_fusing_are_honoured(change, reason):
    model = NamedMlp()
    fused = copy.deepcopy(model)
    fl.fuse(fused)
    change(model)
    change(fused)
    x = torch.randn(5, 12)
    fl.reset_stats()
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(fused(x), expected, rtol=0, atol=0)
    (counted,) = fl.stats()["fallback"]
    fl.reset_stats()
    assert counted.startswith(f"NamedMlp: {reason}")
    assert [site.fused for site in fl.explain(fused)] == ["active" in reason]


def test_the_last_dropout_may_be_active():
    """The dropout is called as a module, with the random numbers that eager draws."""
    model = NamedMlp()
    model.drop2.p = 0.5
    fused = copy.deepcopy(model)
    fl.fuse(fused)
    x = torch.randn(5, 12)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    calls = fused_calls()
    torch.testing.assert_close(fused(x), expected)
    assert fused_calls() == calls + 1


@FALLBACK("NamedMlp: is under a hook registered for all modules")
def test_global_hooks():
    model = NamedMlp()
    fl.fuse(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        model(torch.randn(2, 12))
    finally:
        handle.remove()
    assert seen.count("Linear") == 2


@FALLBACK("NamedMlp: NamedMlp has another forward now")
def test_the_class_gets_another_forward(monkeypatch):
    model = NamedMlp()
    fl.fuse(model)
    monkeypatch.setattr(NamedMlp, "forward", lambda self, x: x + 1)
    assert torch.equal(model(torch.zeros(1, 12)), torch.ones(1, 12))
