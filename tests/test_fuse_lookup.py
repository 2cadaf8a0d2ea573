"""`fuse` follows Python's rules of lookup, at `fuse` and at every call; and it sees code that is edited in place."""

import copy
import types
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from test_fuse import fused_calls
from torch import nn

import fastlane_ext as fl

pytestmark = pytest.mark.filterwarnings("ignore:fuse. nothing runs fused")


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Dropout(0.1)
        self.approximate = "none"

    def forward(self, x):
        return self.drop(self.fc2(self.act(self.fc1(x))))


class ActOfTheClass(Mlp):
    act = staticmethod(torch.relu)


class ActByProperty(Mlp):
    act = property(lambda self: torch.relu)

    def __init__(self):
        super().__init__()
        self._modules["act"] = nn.GELU()


class DropByDescriptor(Mlp):
    class Descriptor:
        def __get__(self, instance, owner):
            return torch.relu

    drop = Descriptor()


class OwnGetattr(Mlp):
    def __getattr__(self, name):
        return torch.relu if name == "act" else super().__getattr__(name)


class OwnGetattribute(Mlp):
    def __getattribute__(self, name):
        return torch.relu if name == "act" else super().__getattribute__(name)


class ConstantByProperty(Mlp):
    approximate = property(lambda self: "tanh", lambda self, value: None)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


HIDDEN = [ActOfTheClass, ActByProperty, DropByDescriptor, OwnGetattr, OwnGetattribute, ConstantByProperty]


@pytest.mark.parametrize("kind", HIDDEN, ids=lambda kind: kind.__name__)
def test_children_that_lookup_would_not_find(kind):
    model, x = kind().eval(), torch.randn(3, 8)
    expected = model(x)
    report = fl.fuse(model)
    assert not report.fused and type(model) is kind
    assert torch.equal(model(x), expected)


def class_attribute(patch, model):
    patch.setattr(Mlp, "act", staticmethod(torch.relu), raising=False)


def class_property(patch, model):
    patch.setattr(Mlp, "fc2", property(lambda self: torch.relu), raising=False)


def class_getattr(patch, model):
    original = nn.Module.__getattr__
    swap = {"act": torch.relu}
    patch.setattr(
        Mlp, "__getattr__", lambda self, name: swap[name] if name in swap else original(self, name), raising=False
    )


def class_getattribute(patch, model):
    original = object.__getattribute__
    swap = {"act": torch.relu}
    patch.setattr(
        Mlp, "__getattribute__", lambda self, name: swap[name] if name in swap else original(self, name), raising=False
    )


def instance_attribute(patch, model):
    model.__dict__["act"] = torch.relu


def outside_the_fused_steps(patch, model):
    del model.drop
    model.drop = torch.relu


def deleted_and_set_again(patch, model):
    del model.act
    model.act = nn.ReLU()


def base_class_attribute(patch, model):
    patch.setattr(nn.Module, "act", staticmethod(torch.relu), raising=False)


def code_of_the_forward(patch, model):
    patch.setattr(Mlp.forward, "__code__", (lambda self, x: 2 * self.fc1(x)).__code__)


def another_forward(patch, model):
    patch.setattr(Mlp, "forward", lambda self, x: 2 * self.fc1(x))


def code_of_a_child(patch, model):
    patch.setattr(nn.GELU.forward, "__code__", (lambda self, input: input * 3).__code__)


def another_dropout(patch, model):
    patch.setattr(nn.Dropout, "forward", lambda self, x: 2 * x)


def code_of_dropout(patch, model):
    patch.setattr(nn.Dropout.forward, "__code__", (lambda self, input: 2 * input).__code__)


def another_dropout_function(patch, model):
    patch.setattr(F, "dropout", lambda x, *a, **k: 2 * x)


def code_of_the_dropout_function(patch, model):
    def dropout(input, p=0.5, training=True, inplace=False):
        return 2 * input

    patch.setattr(F.dropout, "__code__", dropout.__code__)


CHANGES = [
    class_attribute,
    class_property,
    class_getattr,
    class_getattribute,
    instance_attribute,
    outside_the_fused_steps,
    deleted_and_set_again,
    base_class_attribute,
    code_of_the_forward,
    another_forward,
    code_of_a_child,
    another_dropout,
    code_of_dropout,
    another_dropout_function,
    code_of_the_dropout_function,
]
AROUND_THE_FUSED_STEP = {
    "another_dropout",
    "code_of_dropout",
    "another_dropout_function",
    "code_of_the_dropout_function",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_after_fuse(change, monkeypatch):
    model, x = Mlp().eval(), torch.randn(3, 8)
    eager = copy.deepcopy(model)
    before = eager(x)
    fl.fuse(model).assert_fused(1)
    model(x)
    assert fused_calls() == 1
    change(monkeypatch, model)
    change(monkeypatch, eager)
    assert not torch.allclose(eager(x), before)
    torch.testing.assert_close(model(x), eager(x))
    # A dropout after the fused step is called as a module; the step itself may stay fused.
    assert len(fl.stats()["fallback"]) == (change.__name__ not in AROUND_THE_FUSED_STEP)
    fl.reset_stats()
    monkeypatch.undo()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_before_fuse(change, monkeypatch):
    model, x = Mlp().eval(), torch.randn(3, 8)
    change(monkeypatch, model)
    expected = model(x)
    fl.fuse(model)
    torch.testing.assert_close(model(x), expected)
    fl.reset_stats()
    monkeypatch.undo()


def test_an_absent_child_raises_what_eager_raises():
    model = Mlp().eval()
    fl.fuse(model).assert_fused(1)
    del model.drop
    with pytest.raises(AttributeError, match="has no attribute 'drop'"):
        model(torch.randn(3, 8))
    fl.reset_stats()


def test_a_bias_that_is_no_parameter():
    """The bias is a buffer, before and after `fuse`, alone, in a container and under torch.compile."""
    linear = nn.Linear(8, 8)
    bias = linear.bias.detach()
    del linear.bias
    linear.register_buffer("bias", bias)
    x = torch.randn(3, 8)
    for model in (nn.Sequential(copy.deepcopy(linear), nn.GELU()), nn.Sequential(nn.Linear(8, 8), nn.GELU())):
        eager = copy.deepcopy(model)
        fl.fuse(model)
        if "bias" not in model[0]._buffers:
            for one in (model, eager):
                del one[0].bias
                one[0].register_buffer("bias", bias)
        torch.testing.assert_close(model(x), eager(x))
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), eager(x))
    torch._dynamo.reset()
    fl.reset_stats()


def test_children_in_an_ordered_dict():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU()), torch.randn(3, 8)
    del model[3]
    assert type(model._modules) is OrderedDict
    expected = model(x)
    fl.fuse(model).assert_fused(1)
    torch.testing.assert_close(model(x), expected)
    assert fused_calls() == 1
    model._modules.move_to_end("0")
    torch.testing.assert_close(model(x), nn.Sequential.forward(model, x))
    assert list(fl.stats()["fallback"]) == ["Sequential: its children are others now"]
    fl.reset_stats()


def test_a_custom_dict_of_children():
    class Doubling(dict):
        def __getitem__(self, name):
            return torch.relu if name == "act" else super().__getitem__(name)

    model, x = Mlp().eval(), torch.randn(3, 8)
    fl.fuse(model).assert_fused(1)
    model.__dict__["_modules"] = Doubling(model._modules)
    expected = Mlp.forward(model, x)
    torch.testing.assert_close(model(x), expected)
    assert list(fl.stats()["fallback"]) == ["Mlp: keeps its children in a Doubling"]
    fl.reset_stats()


def test_the_edited_class_of_an_activation_runs_its_new_code():
    """A notebook's autoreload keeps the function object and replaces its code."""

    class Act(nn.Module):
        def forward(self, x):
            return F.gelu(x)

    model, x = nn.Sequential(nn.Linear(8, 8), Act()), torch.randn(3, 8)
    fl.fuse(model).assert_fused(1)

    def forward(self, x):
        return 2 * F.gelu(x)

    Act.forward.__code__ = types.FunctionType(forward.__code__, globals()).__code__
    assert torch.equal(model(x), 2 * F.gelu(model[0](x)))
    assert list(fl.stats()["fallback"]) == [f"Sequential: {Act.forward.__qualname__} has other code now"]
    fl.reset_stats()


def doubled_sequential(self, x):
    for module in self:
        x = module(x)
    return 2 * x


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (nn.Sequential, "forward", doubled_sequential),
        (nn.Sequential, "__iter__", lambda self: iter([*self._modules.values()][::-1])),
        (torch.Tensor, "__add__", lambda a, b: torch.add(a, b, alpha=3)),
    ],
    ids=["forward", "iter", "add"],
)
def test_torchs_own_containers_and_sums_patched_before(kind, name, value, monkeypatch):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(x) + x

    models, x = [nn.Sequential(nn.Linear(8, 8), nn.GELU()), Sum()], torch.randn(3, 8)
    monkeypatch.setattr(kind, name, value)
    for model in models:
        expected = model(x)
        fl.fuse(model)
        assert torch.equal(model(x), expected) or (
            fused_calls() and kind is nn.Sequential and type(model) is not nn.Sequential
        )
    fl.reset_stats()
    monkeypatch.undo()


def subclass(kind):
    return type("Sub", (kind,), {"act": staticmethod(torch.relu)})


def attribute(kind):
    kind.act = staticmethod(torch.relu)
    return kind


@pytest.mark.parametrize("change", [subclass, attribute], ids=lambda change: change.__name__)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_fused_class_is_changed_or_derived_from(change, compiled):
    class Own(Mlp):
        pass

    model, x = Own().eval(), torch.randn(3, 8)
    fl.fuse(model).assert_fused(1)
    model.__class__ = change(type(model))
    expected = model.fc2(torch.relu(model.fc1(x)))
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    torch.testing.assert_close(run(x), expected)
    assert not fl.explain(model).fused
    torch._dynamo.reset()
    fl.reset_stats()


def test_a_fused_linear_whose_class_is_derived_from(monkeypatch):
    from fastlane_ext import fusion

    monkeypatch.setattr(fusion, "_measured", lambda *_: {"rows": 128, "library_ms": 2.0, "fused_ms": 1.0})
    model, x = nn.Linear(8, 8), torch.randn(3, 8)
    fl.fuse(model, linears=True).assert_fused(1)
    model.__class__ = type("Ones", (type(model),), {"weight": property(lambda self: torch.ones(8, 8))})
    torch.testing.assert_close(model(x), F.linear(x, torch.ones(8, 8), model.bias))
    assert len(fl.stats()["fallback"]) == 1
    fl.reset_stats()


def test_a_forward_given_to_the_fused_class():
    model = Mlp()
    fl.fuse(model)
    kind = type(model)
    original = kind.forward
    kind.forward = lambda self, x: x + 1
    try:
        (site,) = fl.explain(model)
        assert not site.fused and "was given another forward" in site.reason
        with pytest.raises(RuntimeError, match="was given another forward"):
            fl.unfuse(model)
    finally:
        kind.forward = original
    assert fl.unfuse(model) == 1


class Chooses(Mlp):
    def forward(self, x, y):
        return self.act((self.fc1, self.fc2)[x is y](x))


class ChoosesByName(Mlp):
    def forward(self, x, y):
        return self.act({True: self.fc1, False: self.fc2}[x is y](x))


@pytest.mark.parametrize("kind", [Chooses, ChoosesByName])
def test_a_forward_that_chooses_by_identity(kind):
    model, x = kind(), torch.randn(3, 8)
    (site,) = fl.fuse(model)
    assert not site.fused and "compares something" in site.reason and type(model) is kind
    assert torch.equal(model(x, x), kind.forward(model, x, x))


class DoublingDict(dict):
    def __getitem__(self, name):
        return 2 * super().__getitem__(name)


def test_a_custom_dict_of_parameters():
    """DeepSpeed's ZeRO-3 replaces the dict of parameters by its own."""
    from fastlane_ext import reference

    x = torch.randn(3, 8)
    models = [nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), reference.ResidualNetwork([8, 8])]
    for model in (*models, reference.ResidualMLP(8, 8)):
        eager = copy.deepcopy(model)
        fl.fuse(model).assert_fused(1)
        for one in (model, eager):
            linear = next(m for m in one.modules() if isinstance(m, nn.Linear))
            linear.__dict__["_parameters"] = DoublingDict(linear._parameters)
        torch.testing.assert_close(model(x), eager(x))
        assert fl.stats()["fallback"]
        fl.reset_stats()


@pytest.mark.parametrize("kept", ["_parameters", "_buffers"])
def test_something_that_lookup_finds_before_a_child(kept):
    model, x = Mlp().eval(), torch.randn(3, 8)
    fl.fuse(model).assert_fused(1)
    getattr(model, kept)["act"] = nn.ReLU()
    assert torch.equal(model(x), Mlp.forward(model, x))
    assert list(fl.stats()["fallback"]) == ["Mlp: has something in place of its child act"]
    fl.reset_stats()


def test_a_class_that_nobody_uses_any_more_is_freed():
    import gc
    import weakref

    class Own(Mlp):
        pass

    model = Own()
    fl.fuse(model)
    kind = weakref.ref(type(model))
    del model
    gc.collect()
    assert kind() is None and fl.explain(Own()).fused
