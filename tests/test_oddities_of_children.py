"""Names that lead elsewhere than to the children of an MLP or a network, and children that change other children."""

import pytest
import torch
from support.subjects import DoubledLinear, network, residual_mlp, results
from torch import nn

import fastlane_ext as fl
from fastlane_ext import reference
from fastlane_ext._load import library


def test_the_forward_of_the_eager_mlp_is_another(monkeypatch):
    subject, x = residual_mlp(), torch.randn(3, 8)
    monkeypatch.setattr(reference.ResidualMLP, "forward", lambda self, x: 5 * x)
    assert torch.equal(subject.fused(x), 5 * x)
    assert len(fl.stats()["fallback"]) == 1
    fl.reset_stats()
    monkeypatch.undo()


def of_property(model):
    model.doubled = DoubledLinear(8, 8)
    model.__class__ = type("Derived", (type(model),), {"fc1": property(lambda self: self.doubled)})


def of_getattr(model):
    del model.fc1
    model.doubled = DoubledLinear(8, 8)
    found = lambda self, name: nn.Module.__getattr__(self, "doubled" if name == "fc1" else name)  # noqa: E731
    model.__class__ = type("Derived", (type(model),), {"__getattr__": found})


def of_instance(model):
    model.doubled = DoubledLinear(8, 8)
    vars(model)["fc1"] = model.doubled


def narrow(model):
    model.fc2 = nn.Linear(8, 1)


def nameless(model):
    model.activation = type("Name", (str,), {})("gelu")


@pytest.mark.parametrize("change", [of_property, of_getattr, of_instance, narrow, nameless])
def test_an_mlp_whose_parts_are_found_elsewhere(change):
    subject, x = residual_mlp(), torch.randn(3, 8)
    for model in (subject.fused, subject.eager):
        change(model)
    subject.eager.load_state_dict(subject.fused.state_dict())
    assert library.run_plain_residual_mlp(subject.fused, x) is None
    for got, expected in zip(results(subject.fused, x), results(subject.eager, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    fl.reset_stats()


def of_buffer(model):
    model._buffers["fc1"] = DoubledLinear(8, 8)


class Lying(dict):
    def __getitem__(self, name):
        return super().__getitem__("other" if name == "fc1" else name)


def of_children(model):
    model.other = DoubledLinear(8, 8)
    vars(model)["_modules"] = Lying(model._modules)


@pytest.mark.parametrize("change", [of_buffer, of_children])
def test_an_mlp_whose_names_lead_elsewhere(change):
    subject, x = residual_mlp(), torch.randn(3, 8)
    for model in (subject.fused, subject.eager):
        torch.manual_seed(1)
        change(model)
    assert library.run_plain_residual_mlp(subject.fused, x) is None
    torch.testing.assert_close(subject.fused(x), subject.eager(x))
    fl.reset_stats()


@pytest.mark.parametrize(("kind", "name"), [(reference.ResidualMLP, "fc1"), (reference.ResidualNetwork, "layers")])
def test_a_name_that_the_eager_class_got_later(kind, name, monkeypatch):
    subject, x = (residual_mlp if kind is reference.ResidualMLP else network)(), torch.randn(3, 8)
    other = DoubledLinear(8, 8) if name == "fc1" else nn.ModuleList()
    monkeypatch.setattr(kind, name, property(lambda self: other), raising=False)
    assert not subject.compiled_check(x)
    torch.testing.assert_close(subject.fused(x), subject.eager(x))
    fl.reset_stats()
    monkeypatch.undo()


def forward_of_first_half(model):
    model.fc2.forward = lambda h: h[:, :8]


def class_of_fc2(model):
    model.fc2.__class__ = DoubledLinear


def hook_on_fc2(model):
    model.fc2.register_forward_hook(lambda module, inputs, output: 2 * output)


@pytest.mark.parametrize("change", [forward_of_first_half, class_of_fc2, hook_on_fc2])
def test_the_call_of_one_child_changes_the_other(change):
    subject, x = residual_mlp(), torch.randn(3, 8)
    for model in (subject.fused, subject.eager):
        model.fc1.register_forward_hook(lambda module, inputs, output, model=model: change(model))
    torch.testing.assert_close(subject.fused(x), subject.eager(x))
    fl.reset_stats()


def test_the_call_of_a_layer_changes_what_all_layers_rest_on():
    subject, x = network(), torch.randn(3, 8)
    results = []
    for model in (subject.fused, subject.eager):
        handles = []

        def watch(module, inputs, output, handles=handles):
            if not handles:
                hook = lambda m, i, o: 2 * o if type(m) is nn.GELU else None  # noqa: E731
                handles.append(nn.modules.module.register_module_forward_hook(hook))

        model.layers[0][0].register_forward_hook(watch)
        results.append(model(x))
        handles[0].remove()
    torch.testing.assert_close(*results)
    fl.reset_stats()


@pytest.mark.parametrize("hook", [lambda m, i, o: o.double(), lambda m, i, o: o[:1]], ids=["promotes", "broadcasts"])
def test_hidden_activations_unlike_x(hook):
    subject, x = residual_mlp(), torch.randn(3, 8)
    for model in (subject.fused, subject.eager):
        model.fc1.register_forward_hook(hook)
        model.fc2.to(hook(None, None, x).dtype)
    got, expected = subject.fused(x), subject.eager(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)
    fl.reset_stats()


def test_an_mlp_traced_by_fx():
    model, x = fl.ResidualMLP(8, 16), torch.randn(3, 8)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    fl.reset_stats()


def test_another_sum_of_parameters(monkeypatch):
    subject, x = residual_mlp(), nn.Parameter(torch.randn(3, 8))
    monkeypatch.setattr(nn.Parameter, "__add__", lambda a, b: 5 * b, raising=False)
    assert torch.equal(subject.fused(x), subject.eager(x))
    fl.reset_stats()
    monkeypatch.undo()


@pytest.mark.parametrize(("name", "error"), [("relu", ValueError), (None, TypeError)])
def test_an_mlp_of_no_known_activation(name, error):
    model = fl.ResidualMLP(8, 8)
    model.activation = name
    with pytest.raises(error, match="activation: got"):
        model(torch.randn(3, 8))


TRACED_ALONE = "a layer is traced by torch.fx with a residual that may be None"


@pytest.mark.expects_fallback(TRACED_ALONE)
@pytest.mark.parametrize("shortcut", ["identity", "projection", "none"])
def test_a_layer_that_is_traced_alone(shortcut):
    """torch.fx gives the optional residual a stand-in, so the shortcut is not in the graph; a call without a residual
    raises, as eager's graph does.
    """
    x, residual = torch.randn(3, 8), torch.randn(3, 6)
    for which in (fl, reference):
        layer = which.LinearGELUResidual(8, 6, shortcut=shortcut)
        traced = torch.fx.symbolic_trace(layer)
        torch.testing.assert_close(traced(x, residual), layer(x, residual))
        with pytest.raises(TypeError):
            traced(x)


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = fl.LinearGELUResidual(8, 8), fl.LinearGELUResidual(8, 8)

    def forward(self, x):
        return self.second(self.first(x), x)


def test_layers_that_are_traced_in_their_parent():
    model, x = Parent(), torch.randn(3, 8)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))
    assert traced.code.count("fastlane.linear_gelu_residual") == 2
