"""Replacements that other libraries make for a layer's weight or child: LoRA, pruning, norms, quantised weights.

Each replacement takes effect: values and gradients equal the eager module's of the same name with the same change.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import fastlane_ext as fl
from fastlane_ext import reference

pytestmark = [
    pytest.mark.any_isa,
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel"),
]
exact = {"rtol": 1e-10, "atol": 1e-12}


class Model(nn.Module):
    """A layer with a projection and an MLP, of this library or of the eager reference."""

    def __init__(self, kind):
        super().__init__()
        self.layer = kind.LinearGELUResidual.from_linear(nn.Linear(6, 4), shortcut="projection")
        self.mlp = kind.ResidualMLP(4, 8)

    def forward(self, x):
        return self.mlp(self.layer(x))


def pair(dtype=torch.float64):
    models = []
    for kind in (fl, reference):
        torch.manual_seed(2)
        models.append(Model(kind).to(dtype))
    return models


def data(dtype=torch.float64):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def results(model):
    x = data().requires_grad_()
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *trained])]


def assert_honoured(change, reasons):
    models = pair()
    unchanged = models[1](data())
    for model in models:
        torch.manual_seed(4)
        change(model)
    fl.reset_stats()
    got = results(models[0])
    assert fl.stats()["fallback"] == dict.fromkeys(reasons, 1)
    assert fl.stats()["fused"]["forward"] > 0
    fl.reset_stats()
    expected = results(models[1])
    assert not torch.allclose(expected[0], unchanged)
    torch.testing.assert_close(got, expected, **exact)


def old_spectral_norm(module):
    # In training each call moves its estimate, which both models then share.
    return spectral_norm(module, n_power_iterations=3)


NORMS = {
    "weight_norm": (parametrizations.weight_norm, "is a ParametrizedLinear, not a plain Linear"),
    "weight_norm, the old": (weight_norm, "has hooks"),
    "spectral_norm": (parametrizations.spectral_norm, "is a ParametrizedLinear, not a plain Linear"),
    "spectral_norm, the old": (old_spectral_norm, "has hooks"),
    "orthogonal": (parametrizations.orthogonal, "is a ParametrizedLinear, not a plain Linear"),
    "pruning": (lambda m: prune.l1_unstructured(m, "weight", 0.4), "has hooks"),
    "structured pruning": (lambda m: prune.ln_structured(m, "weight", 0.5, n=2, dim=0), "has hooks"),
}
each_norm = pytest.mark.parametrize(("change", "reason"), NORMS.values(), ids=NORMS)


def scaled(change, weight_of):
    """A new norm is an identity at first: some of its values are changed."""

    def run(model):
        module = weight_of(model)
        change(module)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.25)

    return run


@each_norm
@pytest.mark.parametrize("child", ["mlp.fc1", "mlp.fc2", "layer.projection"])
def test_a_changed_child_is_called(child, change, reason):
    change = scaled(change, lambda model: model.get_submodule(child))
    assert_honoured(change, [f"{child.partition('.')[2]} {reason}"])


@each_norm
def test_a_changed_layer_stays_fused(change, reason):
    """The layer's weight is computed before the call, and the call then uses it like any other weight."""
    assert_honoured(scaled(change, lambda model: model.layer), [])


@each_norm
def test_removing_the_change_restores_the_fused_call(change, reason):
    remove = {
        weight_norm: torch.nn.utils.remove_weight_norm,
        old_spectral_norm: torch.nn.utils.remove_spectral_norm,
    }.get(change)
    if reason == "has hooks" and remove is None:
        remove = lambda m: prune.remove(m, "weight")  # noqa: E731
    if remove is None:
        remove = lambda m: torch.nn.utils.parametrize.remove_parametrizations(m, "weight")  # noqa: E731
    model = pair()[0].eval()
    for module in (model.mlp.fc1, model.layer):
        change(module)
    expected = model(data())
    for module in (model.mlp.fc1, model.layer):
        remove(module)
    fl.reset_stats()
    torch.testing.assert_close(model(data()), expected, **exact)
    assert fl.stats()["fallback"] == {}


def lora(model, targets, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("names", [["fc1", "fc2"], ["fc2"], ["projection"]], ids="-".join)
def test_lora_on_children(names):
    changed = [f"{name} is a peft.tuners.lora.layer.Linear, not a plain Linear" for name in names]
    assert_honoured(lambda model: lora(model, names), changed)


def test_lora_merged_is_fused_again():
    model = pair()[0]
    adapted = lora(model, ["fc1", "fc2", "projection"])
    expected = adapted(data())
    merged = adapted.merge_and_unload()
    fl.reset_stats()
    torch.testing.assert_close(merged(data()), expected, **exact)
    assert fl.stats()["fallback"] == {} and fl.stats()["fused"]["forward"] == 3


def test_lora_on_a_layer():
    """peft refuses a layer, since it is no nn.Linear. LoRA on the layer's weight as a parameter works, fused."""
    with pytest.raises(ValueError, match=r"(?s)^Target module LinearGELUResidual\(.*\) is not supported"):
        lora(pair()[0], ["layer"])
    assert_honoured(lambda model: lora(model, [], target_parameters=["layer.weight"]), [])


def test_quantize_dynamic():
    models = [torch.ao.quantization.quantize_dynamic(model, {nn.Linear}) for model in pair(torch.float32)]
    fl.reset_stats()
    y, expected = (model(data(torch.float32)) for model in models)
    kind = "torch.ao.nn.quantized.dynamic.modules.linear.Linear"
    names = ("projection", "fc1", "fc2")
    assert fl.stats()["fallback"] == {f"{name} is a {kind}, not a plain Linear": 1 for name in names}
    # The layer's own rounding may move one of the activations that the next child quantises by a step.
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=expected.abs().max().item() / 127)
    fl.reset_stats()


class Int8(torch.Tensor):
    """A weight as torchao keeps it, integers with a scale; F.linear takes such a weight, other operators do not."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype)

    def __init__(self, data, scale):
        self.integers, self.scale = data, scale

    @classmethod
    def quantised(cls, weight):
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.integers * weight.scale, *bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    def __tensor_flatten__(self):
        return ["integers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["integers"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].integers, args[0].scale)
        raise NotImplementedError(f"Int8: {function} is not implemented")


def quantise(linear):
    linear.weight = nn.Parameter(Int8.quantised(linear.weight), requires_grad=False)


@pytest.mark.parametrize("child", ["mlp.fc1", "mlp.fc2", "layer.projection"])
def test_a_child_with_a_weight_of_another_kind_is_called(child):
    name = child.partition(".")[2]
    reason = f"{name} has a weight that is no plain parameter"
    assert_honoured(lambda model: quantise(model.get_submodule(child)), [reason])


@pytest.mark.parametrize("where", ["layers.0.0", "projections.0"])
def test_a_network_with_a_weight_of_another_kind(where):
    torch.manual_seed(2)
    network = fl.ResidualNetwork([6, 4, 4], shortcut="projection").double()
    eager = reference.ResidualNetwork([6, 4, 4], shortcut="projection").double()
    eager.load_state_dict(copy.deepcopy(network.state_dict()))
    for model in (network, eager):
        quantise(model.get_submodule(where))
    fl.reset_stats()
    torch.testing.assert_close(results(network), results(eager), **exact)
    name, index, *inside = where.split(".")
    reason = f"{name}.{index} has{' a child 0 that has' if inside else ''} a weight that is no plain parameter"
    assert fl.stats()["fallback"] == {reason: 1} and fl.stats()["fused"]["forward"] > 0
    fl.reset_stats()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "child"),
    [
        (lambda: fl.ResidualMLP(6, 8), "fc1"),
        (lambda: fl.ResidualNetwork([6, 6, 6]), "layers.0.0"),
        (lambda: fl.LinearGELUResidual(6, 4, shortcut="projection"), "projection"),
    ],
    ids=["mlp", "network", "projection"],
)
def test_a_child_with_a_weight_of_another_kind_is_called_when_compiled(make, child, fresh_compiler):
    model = make().double()
    quantise(model.get_submodule(child))
    with torch.no_grad():
        expected = model(data())
        compiled = torch.compile(model, backend="eager")(data())
    torch.testing.assert_close(compiled, expected, **exact)
    fl.reset_stats()


@pytest.mark.expects_fallback("a layer gets a Int8")
def test_a_layer_with_a_weight_of_another_kind_runs_eager():
    layers = [model.layer for model in pair()]
    for layer in layers:
        quantise(layer)
    torch.testing.assert_close(layers[0](data()), layers[1](data()), **exact)


@pytest.mark.parametrize("site", ["fc1", "fc2"])
def test_a_fused_model_with_a_weight_of_another_kind(site):
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)

        def forward(self, x):
            return self.fc2(self.act(self.fc1(x)))

    model = Mlp().double()
    fused = copy.deepcopy(model)
    fl.fuse(fused).assert_fused(1)
    for one in (model, fused):
        quantise(one.get_submodule(site))
    fl.reset_stats()
    torch.testing.assert_close(fused(data()), model(data()), **exact)
    assert fl.stats()["fallback"] == {f"Mlp: {site} has a weight that is no plain parameter": 1}
    fl.reset_stats()
