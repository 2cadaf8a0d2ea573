"""One list of oddities, tested on `fuse`, on a module and on a network, in Python and in C++.

An oddity changes an instance, a class or a function, or adds a watcher. It is applied to a fused model and to its eager
twin. The compiled check has to say "ask Python", Python has to give a reason, and the values have to be the twin's.
"""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from support.subjects import SUBJECTS, network, residual_mlp, results
from support.subprocesses import run_python
from torch import nn
from torch.nn.modules import linear as linear_file
from torch.nn.modules import module as module_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastlane_ext as fl
from fastlane_ext import _activations, _plain, reference
from fastlane_ext._load import library

LINEAR, GELU, LINEAR_FORWARD = F.linear, F.gelu, nn.Linear.forward


ODDITIES = {}


def oddity(function):
    ODDITIES[function.__name__] = function
    return function


def doubled(self, x):
    return 2 * LINEAR(x, self.weight, self.bias)


def shrunk(x):
    return 0.5 * x


def on_linears(name):
    """An oddity of the first linear layer alone."""

    def remember(change):
        def apply(subject, patch):
            for linear in subject.linears():
                change(linear)

        ODDITIES[name] = apply
        return change

    return remember


on_linears("a forward of its own")(lambda m: setattr(m, "forward", types.MethodType(doubled, m)))
on_linears("a _call_impl of its own")(lambda m: setattr(m, "_call_impl", types.MethodType(doubled, m)))
on_linears("a hook")(lambda m: m.register_forward_hook(lambda *a: 2 * a[2]))
on_linears("a pre-hook")(lambda m: m.register_forward_pre_hook(lambda m, a: (2 * a[0],)))
on_linears("a bias that is a buffer")(lambda m: (delattr_bias(m), m.register_buffer("bias", torch.ones(8))))
on_linears("a bias that broadcasts")(lambda m: setattr(m, "bias", nn.Parameter(torch.ones(1))))
on_linears("a class of its own")(lambda m: setattr(m, "__class__", type("Linear", (nn.Linear,), {"forward": doubled})))
on_linears("a weight of a subclass")(
    lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach().as_subclass(Doubled), requires_grad=False))
)


def delattr_bias(linear):
    del linear.bias


class Doubled(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        result = super().__torch_function__(function, kinds, args, kwargs)
        return 2 * result if function is LINEAR else result


@oddity
def a_compiled_child(subject, patch):
    for linear in subject.linears():
        linear._compiled_call_impl = types.MethodType(doubled, linear)


@oddity
def another_forward_of_the_class(subject, patch):
    patch.setattr(nn.Linear, "forward", doubled)


@oddity
def other_code_in_the_forward(subject, patch):
    def forward(self, input):
        return 2 * F.linear(input, self.weight, self.bias)

    patch.setattr(LINEAR_FORWARD, "__code__", forward.__code__)


@oddity
def a_call_of_the_class(subject, patch):
    patch.setattr(nn.Linear, "__call__", doubled, raising=False)


@oddity
def a_call_impl_of_the_class(subject, patch):
    patch.setattr(nn.Linear, "_call_impl", doubled, raising=False)


@oddity
def a_call_impl_of_all_modules(subject, patch):
    original = nn.Module._call_impl
    patch.setattr(
        nn.Module, "_call_impl", lambda self, *a: original(self, *a) * (1 + isinstance(self, nn.Linear)), raising=False
    )


@oddity
def a_call_of_all_modules(subject, patch):
    original = nn.Module.__call__
    patch.setattr(nn.Module, "__call__", lambda self, *a: original(self, *a) * (1 + isinstance(self, nn.Linear)))


@oddity
def other_code_in_the_call(subject, patch):
    def _wrapped_call_impl(self, *args, **kwargs):
        y = self._call_impl(*args, **kwargs)
        return 2 * y if type(self).__name__ == "Linear" else y

    patch.setattr(nn.Module._wrapped_call_impl, "__code__", _wrapped_call_impl.__code__)


@oddity
def a_weight_on_the_class(subject, patch):
    patch.setattr(nn.Linear, "weight", property(lambda self: 2 * self._parameters["weight"]), raising=False)


@oddity
def a_getattr_on_the_class(subject, patch):
    original = nn.Module.__getattr__
    scale = {"weight": 2}
    patch.setattr(nn.Linear, "__getattr__", lambda self, name: original(self, name) * scale.get(name, 1), raising=False)


@oddity
def another_linear_function(subject, patch):
    patch.setattr(F, "linear", lambda *a: 2 * LINEAR(*a))


@oddity
def another_gelu_function(subject, patch):
    patch.setattr(F, "gelu", lambda x, approximate="none": shrunk(x))


@oddity
def another_namespace_in_torchs_file(subject, patch):
    patch.setattr(linear_file, "F", types.SimpleNamespace(linear=lambda *a: 2 * LINEAR(*a)))


@oddity
def another_sum(subject, patch):
    original = torch.Tensor.__add__
    patch.setattr(torch.Tensor, "__add__", lambda a, b: original(a, 3 * b) if a.dim() == 2 else original(a, b))


@oddity
def a_hook_for_all_modules(subject, patch):
    hook = {-1: lambda module, args, output: 2 * output if isinstance(module, nn.Linear) else None}
    patch.setattr(module_file, "_global_forward_hooks", hook)


class DoublesLinear(TorchFunctionMode):
    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return 2 * result if function is LINEAR else result


class DoublesProducts(TorchDispatchMode):
    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return 2 * result if function is torch.ops.aten.addmm.default else result


MODES = {"a function mode": DoublesLinear, "a dispatch mode": DoublesProducts}


def assert_as_eager(subject, x):
    fl.reset_stats()
    assert subject.compiled_check(x) in (False, None)
    fl.reset_stats()
    got, expected = results(subject.fused, x), results(subject.eager, x)
    reasons = fl.stats()["fallback"]
    fl.reset_stats()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    return reasons


@pytest.mark.parametrize("name", ODDITIES)
@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_after_the_model_was_made(subject, name, monkeypatch):
    subject, x = subject(), torch.randn(3, 8)
    before = results(subject.eager, x)[0]
    assert subject.compiled_check(x) in (True, None)
    ODDITIES[name](subject, monkeypatch)
    assert not torch.allclose(results(subject.eager, x)[0], before), "the oddity changes nothing"
    assert assert_as_eager(subject, x)
    monkeypatch.undo()


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_under_a_mode(subject, name):
    subject, x = subject(), torch.randn(3, 8)
    before = results(subject.eager, x)[0]
    with MODES[name]():
        assert not torch.allclose(results(subject.eager, x)[0], before)
        assert assert_as_eager(subject, x)
    assert subject.compiled_check(x) in (True, None)
    with torch.device("cpu"):
        fl.reset_stats()
        subject.fused(x)
        assert fl.stats()["fused"]["forward"] and not fl.stats()["fallback"]


OF_CLASSES = [name for name in ODDITIES if name.startswith(("another", "other", "a_call", "a_weight", "a_getattr"))]
BEFORE_FUSE = [name for name in OF_CLASSES if name != "another_sum"]  # a Sequential has none


@pytest.mark.parametrize("name", BEFORE_FUSE)
def test_before_fuse(name, monkeypatch):
    """The package knows torch's functions from its own import: a patch is not taken for the original."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), torch.randn(3, 8)
    ODDITIES[name](types.SimpleNamespace(linears=lambda: [], activations=lambda: []), monkeypatch)
    expected = model(x)
    with pytest.warns(UserWarning, match="nothing runs fused"):
        fl.fuse(model)
    assert torch.equal(model(x), expected) and type(model) is nn.Sequential
    fl.reset_stats()
    monkeypatch.undo()


def test_a_layer_with_a_weight_of_its_own(monkeypatch):
    layer, eager = fl.LinearGELUResidual(8, 8), reference.LinearGELUResidual(8, 8)
    eager.load_state_dict(layer.state_dict())
    x = torch.randn(3, 8)
    for name in ("another_linear_function", "another_gelu_function", "another_sum"):
        with monkeypatch.context() as patch:
            ODDITIES[name](None, patch)
            assert torch.equal(layer(x), eager(x))
            assert len(fl.stats()["fallback"]) == 1
            fl.reset_stats()
    for mode in MODES.values():
        with mode():
            assert torch.equal(layer(x), eager(x))
    fl.reset_stats()


@pytest.mark.parametrize("kind", list(_plain.KNOWN), ids=lambda kind: kind.__name__)
def test_what_torch_defined_is_known_to_be_torchs(kind):
    known = _plain.KNOWN[kind]
    assert known.reason is None and library.hold(known.facts)
    remade = _plain.know(kind, "somewhere.else")
    assert "that is not the one of somewhere.else" in remade.reason


def test_both_checks_of_facts_agree(monkeypatch):
    from fastlane_ext._facts import hold_slowly

    for name in OF_CLASSES:
        with monkeypatch.context() as patch:
            ODDITIES[name](None, patch)
            for known in _plain.KNOWN.values():
                assert library.hold(known.facts) == hold_slowly(known.facts)
            assert library.hold(_plain.NETWORK) is hold_slowly(_plain.NETWORK) is False
    assert library.hold(_plain.NETWORK)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:Sparse CSR")
@pytest.mark.parametrize("kind", ["jagged", "sparse", "subclass"])
@pytest.mark.parametrize("name", ["ResidualMLP", "LinearGELUResidual", "ResidualNetwork"])
def test_inputs_that_are_no_plain_tensors(name, kind):
    arguments = ([8, 8],) if name == "ResidualNetwork" else (8, 8)
    options = {"shortcut": "none"} if name != "ResidualMLP" else {}
    fused, eager = (getattr(which, name)(*arguments, **options).requires_grad_(False) for which in (fl, reference))
    eager.load_state_dict(fused.state_dict())
    x = torch.eye(8)
    if kind == "jagged":
        x = torch.nested.nested_tensor([x[:3], x[3:]], layout=torch.jagged)
    else:
        x = x.to_sparse_csr() if kind == "sparse" else x.as_subclass(Doubled)
    try:
        expected = eager(x)
    except Exception as error:
        with pytest.raises(type(error)):
            fused(x)
    else:
        got = fused(x)
        assert type(got) is type(expected)
        for a, b in zip(*(y.unbind() if y.is_nested else [y] for y in (got, expected)), strict=True):
            assert torch.equal(a, b)
    assert fl.stats()["fallback"]
    fl.reset_stats()


def run_layer(self, index, layer, x):
    return 3 * layer(x)


@pytest.mark.parametrize("where", ["instance", "class", "reference", "forward"])
def test_what_a_network_stands_for_is_another(where, monkeypatch):
    subject, x = network(), torch.randn(3, 8)
    if where == "instance":
        for model in (subject.fused, subject.eager):
            model._run_layer = types.MethodType(run_layer, model)
    elif where == "class":
        monkeypatch.setattr(fl.ResidualNetwork, "_run_layer", run_layer, raising=False)
        monkeypatch.setattr(reference.ResidualNetwork, "_run_layer", run_layer)
    elif where == "reference":
        monkeypatch.setattr(reference.ResidualNetwork, "_run_layer", run_layer)
    else:
        monkeypatch.setattr(reference.ResidualNetwork, "forward", lambda self, x: 5 * x)
    assert library.run_plain_network(subject.fused, x) is None
    assert torch.equal(subject.fused(x), subject.eager(x))
    assert len(fl.stats()["fallback"]) == 1
    fl.reset_stats()
    monkeypatch.undo()


def doubled_activate(z, activation):
    return 2 * z


def doubled_residual(x, weight, bias=None, residual=None, *, activation="gelu", recompute=False):
    return 2 * x


def three(self, x):
    return torch.full((self.out_features,), 3.0)


DOUBLED = types.SimpleNamespace(
    linear=F.linear, gelu=lambda z, approximate="none": 2 * F.gelu(z, approximate=approximate)
)
DOUBLED_LINEAR = types.SimpleNamespace(linear=lambda *args: 2 * F.linear(*args))
DOUBLED_TORCH = types.SimpleNamespace(cat=lambda tensors, dim: 2 * torch.cat(tensors, dim))
REPLACED = {
    "activate": lambda patch: patch.setattr(reference, "activate", doubled_activate),
    "code of activate": lambda patch: patch.setattr(reference.activate, "__code__", doubled_activate.__code__),
    "F": lambda patch: patch.setattr(reference, "F", DOUBLED_LINEAR),
    "the activations' F": lambda patch: patch.setattr(_activations, "F", DOUBLED),
    "torch": lambda patch: patch.setattr(reference, "torch", DOUBLED_TORCH),
    "linear_gelu_residual": lambda patch: patch.setattr(reference, "linear_gelu_residual", doubled_residual),
    "code of linear_gelu_residual": lambda patch: patch.setattr(
        reference.linear_gelu_residual, "__code__", doubled_residual.__code__
    ),
    "_shortcut": lambda patch: patch.setattr(reference.LinearGELUResidual, "_shortcut", three),
}


@pytest.mark.parametrize("name", REPLACED)
def test_what_the_eager_modules_call_is_another(name, monkeypatch):
    modules = [
        [kind.LinearGELUResidual(8, 8), kind.LinearGELUResidual(8, 16, shortcut="projection")]
        + [kind.LinearGELUResidual(8, 8, shortcut="concat"), kind.ResidualMLP(8, 16)]
        + [kind.ResidualNetwork([8, 8], shortcut="concat")]
        for kind in (fl, reference)
    ]
    x = torch.randn(3, 8)
    before = []
    for fused, eager in zip(*modules, strict=True):
        eager.load_state_dict(fused.state_dict())
        before.append(eager(x))
    with monkeypatch.context() as patch:
        REPLACED[name](patch)
        after = [eager(x) for eager in modules[1]]
        for fused, expected in zip(modules[0], after, strict=True):
            torch.testing.assert_close(fused(x), expected)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    fl.reset_stats()


@pytest.mark.parametrize(
    ("holder", "name"), [(torch, "sigmoid"), (torch.Tensor, "__mul__"), (torch.Tensor, "__rmul__")]
)
def test_what_quick_gelu_calls_is_another(holder, name, monkeypatch):
    options = {"activation": "quick_gelu"}
    eager = [reference.ResidualMLP(8, 16, **options), reference.ResidualNetwork([8, 8], **options)]
    eager.append(nn.Sequential(nn.Linear(8, 8), _activations.QuickGELU(), nn.Linear(8, 8)))
    fused = [fl.ResidualMLP(8, 16, **options), fl.ResidualNetwork([8, 8], **options), copy.deepcopy(eager[-1])]
    fl.fuse(fused[-1]).assert_fused(1)
    for a, b in zip(fused, eager, strict=True):
        a.load_state_dict(b.state_dict())
    x, own = torch.randn(3, 8), getattr(holder, name)
    before = [model(x) for model in eager]
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, lambda *arguments: own(*arguments) + 1)
        after = [model(x) for model in eager]
        got = [model(x) for model in fused]
    for a, b, c in zip(got, after, before, strict=True):
        torch.testing.assert_close(a, b)
        assert not torch.equal(b, c)
    fl.reset_stats()


PATCHED_FIRST = """
import json, torch, torch.nn.functional as F
gelu, add, multiply = F.gelu, torch.Tensor.__add__, torch.Tensor.__mul__
twice = lambda y: torch.add(y, y)
PATCH
import fastlane_ext as fl
from fastlane_ext import reference
x, same = torch.randn(3, 4), []
for name, arguments in (("LinearGELUResidual", (4, 4)), ("ResidualMLP", (4, 4)), ("ResidualNetwork", ([4, 4, 4],))):
    fused, eager = (getattr(f, name)(*arguments, activation="ACTIVATION") for f in (fl, reference))
    eager.load_state_dict(fused.state_dict())
    same.append(torch.equal(fused(x), eager(x)))
print(json.dumps([same, len(fl.stats()["fallback"])]))
"""


@pytest.mark.parametrize(
    ("patch", "activation"),
    [
        ('F.gelu = lambda x, approximate="none": twice(gelu(x, approximate=approximate))', "gelu"),
        ("torch.Tensor.__add__ = lambda a, b: twice(add(a, b))", "gelu"),
        ("torch.Tensor.__mul__ = lambda a, b: twice(multiply(a, b))", "quick_gelu"),
    ],
    ids=["F.gelu", "+", "*"],
)
def test_torch_was_patched_before_the_import(patch, activation):
    same, reasons = run_python(PATCHED_FIRST.replace("PATCH", patch).replace("ACTIVATION", activation))
    assert same == [True] * 3 and reasons


def test_another_concatenation(monkeypatch):
    cat = torch.cat
    kinds = fl.LinearGELUResidual, reference.LinearGELUResidual
    layers = [kind(8, 8, shortcut="concat") for kind in kinds]
    networks = [which.ResidualNetwork([8, 8], shortcut="concat") for which in (fl, reference)]
    monkeypatch.setattr(torch, "cat", lambda *a, **k: 2 * cat(*a, **k))
    x = torch.randn(3, 8)
    for fused, eager in (layers, networks):
        eager.load_state_dict(fused.state_dict())
        torch.testing.assert_close(fused(x), eager(x))
    assert len(fl.stats()["fallback"]) == 2
    fl.reset_stats()
    monkeypatch.undo()


def test_shapes_that_eager_broadcasts():
    """A fused model, an MLP and a network behave alike: they call a child of another shape as a module."""
    x = torch.randn(3, 8)
    subjects = [make() for make in (residual_mlp, network)]
    for subject in subjects:
        for linear in subject.linears():
            linear.bias = nn.Parameter(torch.zeros(1))
    wide = residual_mlp()
    for model in (wide.fused, wide.eager):
        torch.manual_seed(0)
        model.fc2 = nn.Linear(8, 1)
    projected = [which.ResidualNetwork([8, 8, 8], shortcut="projection") for which in (fl, reference)]
    projected[1].load_state_dict(projected[0].state_dict())
    without = [which.ResidualNetwork([8, 8], shortcut="none") for which in (fl, reference)]
    without[1].load_state_dict(without[0].state_dict())
    for model in projected:
        torch.manual_seed(0)
        model.layers[1] = nn.Sequential(nn.Linear(8, 1), nn.GELU())
    for model in without:
        model.shortcut = "projection"
    pairs = [(s.fused, s.eager) for s in (*subjects, wide)] + [projected, without]
    for fused, eager in pairs:
        torch.testing.assert_close(fused(x), eager(x))
        assert fl.stats()["fallback"]
        fl.reset_stats()
