"""What counts as GELU: no function that differs from GELU in a value or slope anywhere, or that may come to differ."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from test_fuse import NamedMlp, fused_calls
from torch import nn

import fastlane_ext as fl
from fastlane_ext.fusion.activations import Activation, form_of_values, read_activation

pytestmark = pytest.mark.filterwarnings("ignore:fuse. nothing runs fused")


class Act(nn.Module):
    """A module that computes what the function given computes, in code of its own."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Reversed(torch.autograd.Function):
    """GELU's value, with the gradient's sign turned, as domain-adversarial training does."""

    @staticmethod
    def forward(ctx, x):
        return F.gelu(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


NOT_GELU = {
    "clamped at 24": lambda x: F.gelu(x).clamp(max=24.0),
    "clamped at 100": lambda x: F.gelu(x).clamp(max=100.0),
    "clamped at 1e30": lambda x: F.gelu(x).clamp(max=1e30),
    "the input clamped": lambda x: F.gelu(x.clamp(min=-1e3)),
    "the smallest of two": lambda x: torch.minimum(F.gelu(x), torch.full_like(x, 1e6)),
    "NaN replaced": lambda x: F.gelu(x).nan_to_num(),
    "infinity replaced": lambda x: torch.nan_to_num(F.gelu(x), nan=float("nan"), posinf=1.0),
    "detached": lambda x: F.gelu(x.detach()),
    "its data": lambda x: F.gelu(x.data),
    "straight through": lambda x: x + (F.gelu(x) - x).detach(),
    "half straight through": lambda x: 0.5 * F.gelu(x) + 0.5 * F.gelu(x).detach(),
    "another gradient": Reversed.apply,
    "a hook on the gradient": lambda x: F.gelu(x) if x.requires_grad and not x.register_hook(torch.neg) else F.gelu(x),
    "by rank": lambda x: F.gelu(x) if x.dim() != 4 else F.relu(x),
    "by magnitude": lambda x: torch.where(x.abs() < 1e5, F.gelu(x), x),
    "rounded": lambda x: F.gelu(x.half()).to(x.dtype),
    "of another dtype": lambda x: F.gelu(x).double(),
    "of another shape": lambda x: F.gelu(x).unsqueeze(0),
    "a subclass": lambda x: F.gelu(x).as_subclass(nn.Parameter),
    "random numbers drawn": lambda x: F.gelu(x + 0 * torch.rand(())),
    "dropped out": lambda x: F.dropout(F.gelu(x), 0.0),
    "almost quick": lambda x: x * torch.sigmoid(1.7 * x),
    "in place of its input": lambda x: x.copy_(F.gelu(x)),
    "without gradient": torch.no_grad()(F.gelu),
}


@pytest.mark.parametrize("function", NOT_GELU.values(), ids=NOT_GELU)
def test_what_is_no_gelu_stays(function):
    model = NamedMlp(12, 20, Act(function))
    fused = copy.deepcopy(model)
    assert not fl.fuse(fused).fused and type(fused) is NamedMlp


class Scaled(nn.Module):
    approximate = "none"

    def __init__(self):
        super().__init__()
        self.scale = 1.0

    def helper(self, x):
        return torch.erf(x / math.sqrt(2.0))

    def forward(self, x):
        return x * 0.5 * (1.0 + self.helper(x)) * self.scale


def plain(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


GELUS = {
    "a function of torch's": (Act(F.gelu), "gelu"),
    "partial": (Act(functools.partial(F.gelu, approximate="tanh")), "gelu_tanh"),
    "by the error function": (Scaled(), "gelu"),
    "by the normal distribution": (Act(lambda x: x * torch.special.ndtr(x)), "gelu"),
    "by tanh": (Act(plain), "gelu_tanh"),
    "by the logistic function": (
        Act(lambda x: x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))),
        "gelu_tanh",
    ),
    "quick": (Act(lambda x: x * torch.sigmoid(1.702 * x)), "quick_gelu"),
    "by methods": (Act(lambda x: x.mul(0.5).mul(x.div(2**0.5).erf().add(1.0))), "gelu"),
}


@pytest.mark.parametrize(("act", "form"), GELUS.values(), ids=GELUS)
def test_what_is_gelu_is_fused(act, form):
    found = read_activation(act)
    assert isinstance(found, Activation) and found.form == form
    model = NamedMlp(12, 20, act).double()
    x = torch.randn(4, 12, dtype=torch.float64)
    expected = model(x)
    fl.fuse(model).assert_fused(1)
    torch.testing.assert_close(model(x), expected, rtol=1e-7, atol=1e-7)
    assert fused_calls() == 1


def test_the_probe_sees_what_the_code_does_not_show():
    """The probe of values and the reading of code both have to agree: each alone is not enough."""
    assert form_of_values(F.gelu) == "gelu"
    for name in ("clamped at 1e30", "straight through", "NaN replaced", "infinity replaced", "another gradient"):
        assert form_of_values(NOT_GELU[name]) is None
    for low in (-1e-30, -1e-3, 1.0, 30.0, 1e3, 1e10, 1e30):
        assert (
            form_of_values(lambda x, low=low: torch.where((x > low) & (x < 2 * abs(low) + low), 2 * x, F.gelu(x)))
            is None
        )


def changes_of_code():
    def helper_replaced(patch, act):
        patch.setattr(Scaled, "helper", lambda self, x: 2 * torch.erf(x))

    def helper_edited(patch, act):
        patch.setattr(Scaled.helper, "__code__", (lambda self, x: 2 * torch.erf(x)).__code__)

    def helper_of_the_instance(patch, act):
        act.helper = lambda x: 2 * torch.erf(x)

    def forward_edited(patch, act):
        patch.setattr(Scaled.forward, "__code__", (lambda self, x: x).__code__)

    def global_replaced(patch, act):
        patch.setitem(globals(), "math", type("", (), {"sqrt": staticmethod(lambda x: 1.0)}))

    def function_of_torch_replaced(patch, act):
        erf = torch.erf
        patch.setattr(torch, "erf", lambda x: 2 * erf(x))

    def constant_changed(patch, act):
        act.scale = 2.0

    def constant_on_the_class(patch, act):
        patch.setattr(Scaled, "scale", property(lambda self: 2.0, lambda self, value: None), raising=False)

    return [change for name, change in list(locals().items())]


@pytest.mark.parametrize("change", changes_of_code(), ids=lambda change: change.__name__)
def test_an_activation_whose_code_changes(change, monkeypatch):
    model, x = NamedMlp(12, 20, Scaled()), torch.randn(4, 12)
    eager = copy.deepcopy(model)
    before = eager(x)
    fl.fuse(model).assert_fused(1)
    model(x)
    assert fused_calls() == 1
    change(monkeypatch, model.act)
    change(monkeypatch, eager.act)
    assert not torch.allclose(eager(x), before)
    torch.testing.assert_close(model(x), eager(x), rtol=0, atol=0)
    assert len(fl.stats()["fallback"]) == 1
    fl.reset_stats()
    monkeypatch.undo()


def test_a_variable_of_an_enclosing_function_changes():
    form = F.gelu

    def act(x):
        return form(x)

    model, x = NamedMlp(12, 20, Act(act)), torch.randn(4, 12)
    fl.fuse(model).assert_fused(1)
    form = torch.relu
    torch.testing.assert_close(model(x), model.fc2(torch.relu(model.fc1(x))), rtol=0, atol=0)
    assert len(fl.stats()["fallback"]) == 1
    fl.reset_stats()


def test_the_random_state_is_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    for function in NOT_GELU.values():
        form_of_values(function)
    assert torch.equal(torch.rand(1), expected)


class Bump(nn.Module):
    """Not GELU on less than a thousandth of the line, between the points of any grid."""

    def forward(self, x):
        return F.gelu(x) + torch.exp(-(((x - 5.05) * 100) ** 2))


class Step(nn.Module):
    """The probe's grid has 4.960 and 5.061, where the step is less than any rounding."""

    def forward(self, x):
        return F.gelu(x) + torch.tanh((x - 5.01) * 900.0) - torch.tanh((x - 5.0101) * 900.0)


class Pole(nn.Module):
    def forward(self, x):
        return F.gelu(x) + 0.001 / ((x - 5.05) ** 2 + 0.001)


class Tilted(nn.Module):
    def forward(self, x):
        return F.gelu(x) + 1e-6 * x


class Wide(nn.Module):
    """Returns float32 where x has 16 bits."""

    def forward(self, x):
        return x * torch.tensor([0.5]) * (1 + torch.erf(x * 0.5**0.5))


class Overflowing(nn.Module):
    """Infinite in float16 where GELU is not."""

    def forward(self, x):
        return F.gelu(x * 1e4 / 1e4)


class OverflowingTwice(nn.Module):
    def forward(self, x):
        return F.gelu(x * 900.0 * 900.0 / 900.0 / 900.0)


@pytest.mark.parametrize("kind", [Bump, Step, Pole, Tilted, Wide, Overflowing, OverflowingTwice])
def test_formulas_that_are_gelu_nearly_everywhere(kind):
    model = NamedMlp(12, 20, kind())
    assert not fl.fuse(model).fused and type(model) is NamedMlp


def test_no_code_is_called_that_was_not_read():
    class Tap(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, x):
            self.seen.append(x.shape)
            return F.gelu(x)

    model = nn.Sequential(nn.Linear(8, 8), Tap(), nn.Linear(8, 8))
    fl.explain(model)
    fl.fuse(model)
    assert not model[1].seen


@pytest.mark.parametrize("copied", [False, True])
def test_a_partial_is_changed_in_place(copied):
    model, x = NamedMlp(12, 20, Act(functools.partial(F.gelu, approximate="none"))), 10 * torch.randn(4, 12)
    fl.fuse(model).assert_fused(1)
    model = copy.deepcopy(model) if copied else model
    model(x)
    assert fused_calls() == 1
    model.act.function.keywords["approximate"] = "tanh"
    torch.testing.assert_close(model(x), NamedMlp.forward(model, x), rtol=0, atol=0)
    model.act.function.__setstate__((torch.relu, (), {}, None))
    torch.testing.assert_close(model(x), NamedMlp.forward(model, x), rtol=0, atol=0)
    assert sum(fl.stats()["fallback"].values()) == 2
    fl.reset_stats()


@pytest.mark.parametrize("name", ["__mul__", "__rmul__", "__add__", "__radd__", "__truediv__", "__sub__"])
def test_an_operator_of_tensors_is_replaced(name, monkeypatch):
    class ByHand(nn.Module):
        def forward(self, x):
            return 0.5 * x * (1.0 - torch.erf((0.0 - x) / math.sqrt(2.0))) * 1.0 + 0.0

    model, x = NamedMlp(12, 20, ByHand()), torch.randn(4, 12)
    fl.fuse(model).assert_fused(1)
    original = getattr(torch.Tensor, name)
    monkeypatch.setattr(torch.Tensor, name, lambda a, b: original(original(a, b), 1.5))
    torch.testing.assert_close(model(x), NamedMlp.forward(model, x), rtol=0, atol=0)
    assert len(fl.stats()["fallback"]) == 1
    fl.reset_stats()
    monkeypatch.undo()


@pytest.mark.parametrize("value", [torch.zeros(3), [1, 2], "a word"], ids=lambda value: type(value).__name__)
def test_an_attribute_that_gelu_does_not_read(value):
    """Statistics that hooks keep in an attribute: their own comparison is not called."""
    model, x = NamedMlp(), torch.randn(4, 12)
    model.act.last = value
    fl.fuse(model).assert_fused(1)
    model.act.last = torch.ones(4)
    model(x)
    assert fused_calls() == 1


def test_the_grid_is_torchs_own(monkeypatch):
    from fastlane_ext.fusion import activations

    activations._grid.cache_clear()
    monkeypatch.setattr(F, "gelu", lambda x, approximate="none": 0.5 * x * (1 + torch.tanh(0.8 * x)))
    assert read_activation(Act(plain)).form == "gelu_tanh"
    monkeypatch.undo()
    assert read_activation(Act(plain)).form == "gelu_tanh"


class Short(nn.Module):
    """A constant of seven digits is not GELU in float64."""

    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh(0.7978845 * (x + 0.044715 * x * x * x)))


def test_constants_that_are_slightly_off():
    assert not fl.fuse(NamedMlp(12, 20, Short())).fused


@pytest.mark.parametrize("kind", [nn.Linear, nn.ReLU, nn.Dropout, nn.GELU])
def test_torchs_own_classes_cannot_be_registered(kind):
    with pytest.raises(ValueError, match="^cls: got "):
        fl.register_activation(kind, "gelu")
