"""Every fused module against the eager module of the same name: parameters, values, gradients, copies, pickles."""

import copy
import doctest
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fastlane_ext as fl
from fastlane_ext import modules, reference

SHORTCUTS = ("identity", "projection", "concat", "none")

LAYER = ("LinearGELUResidual", (7, 9), {"shortcut": "projection"}, (5, 7))
SQUARE = ("LinearGELUResidual", (7, 7), {"activation": "gelu_tanh"}, (2, 3, 7))
MLP = ("ResidualMLP", (7, 19), {}, (2, 3, 7))
NETWORK = ("ResidualNetwork", ([7, 9, 7],), {"shortcut": "projection"}, (5, 7))

# name of the class, its arguments, shape of the input
CASES = [
    *(("LinearGELUResidual", (7, out), {"shortcut": s}, (5, 7)) for s in SHORTCUTS for out in (7, 9)),
    SQUARE,
    ("LinearGELUResidual", (7, 9, False), {"shortcut": "projection", "activation": "none"}, (7,)),
    MLP,
    ("ResidualMLP", (7, 19), {"activation": "gelu_tanh", "bias": False}, (5, 7)),
    *(("ResidualNetwork", ([7, 7, 9, 9, 4],), {"shortcut": s}, (5, 7)) for s in SHORTCUTS),
    *(("ResidualNetwork", ([7, 7, 3],), {"shortcut": s, "bias": False}, (0, 7)) for s in SHORTCUTS),
    *(("ResidualNetwork", ([7, 7, 3],), {"activation": a}, (7,)) for a in ("gelu_tanh", "quick_gelu", "none")),
    *(("ExampleDeepNeuralNetwork", ([7, 7, 7, 1], on), {}, (5, 7)) for on in (False, True)),
    *(("ImprovedResidualNetwork", ([1, 64, 64, 1], on), {}, (3, 1)) for on in (False, True)),
    *(("DeepNeuralNet", (on, [25, 25, 43, 43, 54]), {}, (2, 3, 25)) for on in (False, True)),
    ("DeepNeuralNet", (True, [7, 7, 5]), {"activation": "none"}, (1, 1, 2, 2, 7)),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}".replace(" ", ""))


def make_pair(case, seed=0):
    name, args, kwargs, _ = case
    made = []
    with torch.random.fork_rng(devices=[]):
        for kind in (fl, reference):
            torch.manual_seed(seed)
            made.append(getattr(kind, name)(*args, **kwargs))
            made.append(torch.rand(()).item())
    fused, after_fused, eager, after_eager = made
    assert after_fused == after_eager, "the fused constructor draws other random numbers"
    return fused, eager


def make_input(case, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(case[3], generator=generator, dtype=torch.float64).to(dtype)


def results(module, x):
    """Output and all gradients under a fixed random cotangent, each in float64."""
    x = x.detach().clone().requires_grad_()
    y = module(x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad(y, [x, *parameters], cotangent.to(y.dtype))
    return {"y": y.detach().double()} | {name: grad.double() for name, grad in zip(("x", *names), grads, strict=True)}


@pytest.fixture(autouse=True)
def fresh_stats():
    fl.reset_stats()
    yield
    fl.reset_stats()


def assert_fused(backward=True):
    stats = fl.stats()
    assert stats["fallback"] == {}
    assert stats["fused"]["forward"] > 0
    assert (stats["fused"]["backward"] > 0) == backward


@each_case
def test_parameters_and_tree_equal_the_eager_ones(case):
    fused, eager = make_pair(case)
    assert type(fused).__name__ == type(eager).__name__ and type(fused) is not type(eager)
    assert list(fused.state_dict()) == list(eager.state_dict())
    for name, value in eager.state_dict().items():
        assert torch.equal(fused.state_dict()[name], value), name
    tree = [(name, type(child)) for name, child in eager.named_modules() if name]
    assert [(name, type(child)) for name, child in fused.named_modules() if name] == tree
    assert repr(fused) == repr(eager)

    other_fused, other_eager = make_pair(case, seed=1)
    assert other_fused.load_state_dict(eager.state_dict(), strict=True).missing_keys == []
    assert other_eager.load_state_dict(fused.state_dict(), strict=True).missing_keys == []
    x = make_input(case)
    torch.testing.assert_close(other_fused(x), other_eager(x))


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_less_exact_than_eager(case, dtype):
    """The root mean square error against float64 is at most twice eager's, for the output and every gradient.

    Several seeds, because eager may by luck be exact in the few numbers of one network's bias.
    """
    squares = {}
    for seed in range(10):
        fused, eager = (module.to(dtype) for module in make_pair(case, seed))
        x = make_input(case, dtype, seed)
        exact = results(copy.deepcopy(eager).double(), x.double())
        got, plain = results(fused, x), results(eager, x)
        for name, truth in exact.items():
            assert got[name].shape == truth.shape
            values = torch.stack([got[name] - truth, plain[name] - truth, truth]).square()
            squares.setdefault(name, []).append(values.reshape(3, -1).sum(1))
    assert_fused()
    for name, parts in squares.items():
        error, eager_error, size = torch.stack(parts).sum(0).sqrt().tolist()
        rounding = torch.finfo(dtype).eps / 2 * size
        assert error <= 2 * eager_error + rounding, (name, error / rounding, eager_error / rounding)


@each_case
def test_double_agrees_with_eager(case):
    fused, eager = (module.double() for module in make_pair(case))
    x = make_input(case, torch.float64)
    got, expected = results(fused, x), results(eager, x)
    assert_fused()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "case",
    [
        *(("LinearGELUResidual", (3, 2), {"shortcut": s}, (2, 3)) for s in SHORTCUTS),
        ("ResidualMLP", (3, 4), {}, (2, 3)),
        *(("ResidualNetwork", ([3, 3, 2],), {"shortcut": s}, (2, 3)) for s in SHORTCUTS),
    ],
    ids=lambda c: f"{c[0]}-{c[2]}",
)
def test_first_and_second_derivatives(case):
    fused = make_pair(case)[0].double()
    names, parameters = zip(*fused.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(fused, dict(zip(names, values, strict=True)), (x,))

    inputs = [v.detach().requires_grad_() for v in (make_input(case, torch.float64), *parameters)]
    assert torch.autograd.gradcheck(call, inputs)
    assert_fused()
    assert torch.autograd.gradgradcheck(call, inputs)
    # A backward that is itself to be differentiated takes the composition, and nothing else does.
    assert list(fl.stats()["fallback"]) == ["backward with create_graph=True"]


@each_case
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "share", "to_empty"])
def test_survives(case, how):
    module, _ = make_pair(case)
    x = make_input(case)
    expected = module(x)
    if how == "deepcopy":
        twin = copy.deepcopy(module)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    elif how == "save":
        stream = io.BytesIO()
        torch.save(module, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    elif how == "share":
        twin = module.share_memory()
        assert all(p.is_shared() for p in twin.parameters())
    else:
        name, args, kwargs, _ = case
        with torch.device("meta"):
            twin = getattr(fl, name)(*args, **kwargs)
        assert all(p.is_meta for p in twin.parameters())
        twin = twin.to_empty(device="cpu")
        twin.load_state_dict(module.state_dict())
    assert type(twin) is type(module)
    assert torch.equal(twin(x), expected)
    assert_fused(backward=False)


@each_case
def test_no_grad_and_inference_mode(case):
    module, _ = make_pair(case)
    x = make_input(case)
    expected = module(x).detach()
    fl.reset_stats()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = module(x)
        assert torch.equal(y, expected) and not y.requires_grad
    assert_fused(backward=False)


@pytest.mark.parametrize("kind", [fl, reference], ids=["fused", "reference"])
def test_an_explicit_residual_replaces_the_shortcut(kind):
    x, other = torch.randn(2, 4), torch.randn(2, 4)
    for shortcut in ("identity", "projection", "none"):
        layer = kind.LinearGELUResidual(4, 4, shortcut=shortcut)
        bare = nn.functional.gelu(nn.functional.linear(x, layer.weight, layer.bias))
        torch.testing.assert_close(layer(x, other), bare + other)
        torch.testing.assert_close(layer(x), bare + x if shortcut != "none" else bare)
    projected = kind.LinearGELUResidual(4, 3, shortcut="projection")
    bare = nn.functional.gelu(nn.functional.linear(x, projected.weight, projected.bias))
    torch.testing.assert_close(projected(x, other[:, :3]), bare + other[:, :3])
    torch.testing.assert_close(projected(x), bare + projected.projection(x))
    with pytest.raises(ValueError, match='^residual: got a tensor, expected None with shortcut="concat"'):
        kind.LinearGELUResidual(4, 4, shortcut="concat")(x, other)


@pytest.mark.parametrize("kind", [fl, reference], ids=["fused", "reference"])
def test_from_linear_shares_parameters(kind):
    linear = nn.Linear(3, 4, dtype=torch.float64).eval()
    layer = kind.LinearGELUResidual.from_linear(linear, shortcut="projection", activation="gelu_tanh")
    assert type(layer) is kind.LinearGELUResidual and not layer.training
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.projection.weight.dtype == torch.float64 and not layer.projection.weight.is_meta
    x = torch.randn(2, 3, dtype=torch.float64)
    expected = nn.functional.gelu(linear(x), approximate="tanh") + layer.projection(x)
    torch.testing.assert_close(layer(x), expected)
    # One Parameter in two modules: gradients add up.
    (layer(x).sum() + linear(x).sum()).backward()
    alone = torch.autograd.grad(layer(x).sum(), layer.weight)[0]
    both = alone + torch.autograd.grad(linear(x).sum(), linear.weight)[0]
    torch.testing.assert_close(linear.weight.grad, both)
    assert kind.LinearGELUResidual.from_linear(nn.Linear(3, 4, bias=False)).bias is None


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda linear: parametrizations.weight_norm(linear), "ParametrizedLinear"),
        (lambda linear: linear.register_forward_hook(lambda *_: None) and linear, "has hooks"),
        (lambda linear: nn.Sequential(linear), "is a Sequential"),
    ],
)
def test_from_linear_refuses_what_it_would_lose(spoil, words):
    with pytest.raises(TypeError, match=f"^linear: got a module that .*{words}.*, expected an nn.Linear"):
        fl.LinearGELUResidual.from_linear(spoil(nn.Linear(3, 3)))


def test_initial_values_are_those_of_linear():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        linear, projection = nn.Linear(5, 4), nn.Linear(5, 4)
        torch.manual_seed(3)
        layer = fl.LinearGELUResidual(5, 4, shortcut="projection")
        assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)
        assert torch.equal(layer.projection.weight, projection.weight)
        nn.init.zeros_(layer.weight)
        torch.manual_seed(3)
        layer.reset_parameters()
        assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)


def test_layer_is_not_a_linear_and_shows_its_settings():
    layer = fl.LinearGELUResidual(3, 4, False, shortcut="none", activation="gelu_tanh")
    assert not isinstance(layer, nn.Linear)
    assert repr(layer) == (
        "LinearGELUResidual(in_features=3, out_features=4, bias=False, shortcut='none', activation='gelu_tanh')"
    )


@pytest.mark.parametrize("kind", [fl, reference], ids=["fused", "reference"])
def test_a_parametrized_layer_uses_the_computed_weight(kind):
    layer = parametrizations.weight_norm(kind.LinearGELUResidual(4, 4))
    assert isinstance(layer, kind.LinearGELUResidual)
    x = torch.randn(2, 4)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3)
    torch.testing.assert_close(layer(x), nn.functional.gelu(nn.functional.linear(x, layer.weight, layer.bias)) + x)
    layer(x).sum().backward()
    assert layer.parametrizations.weight.original0.grad.abs().sum() > 0
    if kind is fl:
        assert_fused()


def hook(module):
    module.seen = 0

    def count(module, *_):
        module.seen += 1

    module.register_forward_hook(count)
    return module


@pytest.mark.parametrize(
    ("name", "reason"),
    [("fc1", "fc1 has hooks"), ("fc2", "fc2 has hooks"), ("projection", "projection has hooks")],
)
def test_a_hooked_child_is_called(name, reason, set_strict):
    case = LAYER if name == "projection" else MLP
    fused, eager = (module.double() for module in make_pair(case))
    x = make_input(case, torch.float64)
    hook(getattr(fused, name))
    got, expected = results(fused, x), results(eager, x)
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-10, atol=1e-12)
    assert getattr(fused, name).seen == 1
    stats = fl.stats()
    assert stats["fallback"] == {reason: 1}
    assert stats["fused"]["forward"] > 0 and stats["fused"]["backward"] > 0
    set_strict(True)
    with pytest.raises(RuntimeError, match=reason):
        fused(x)


def test_replaced_children_of_the_mlp_are_called():
    x = torch.randn(2, 7)
    mlp = fl.ResidualMLP(7, 19)
    mlp.fc2 = nn.Sequential(nn.Dropout(0.0), mlp.fc2)
    expected = x + mlp.fc2(nn.functional.gelu(mlp.fc1(x)))
    torch.testing.assert_close(mlp(x), expected)
    assert fl.stats()["fallback"] == {"fc2 is a Sequential, not a plain Linear": 1}


@pytest.mark.parametrize("case", [SQUARE, MLP, NETWORK], ids=lambda c: c[0])
def test_one_module_used_twice(case):
    fused, eager = (module.double() for module in make_pair(case))
    x = make_input(case, torch.float64)
    got, expected = ([*torch.autograd.grad(m(m(x)).sum(), m.parameters())] for m in (fused, eager))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert_fused()


def test_examples_in_docstrings():
    result = doctest.testmod(modules)
    assert result.attempted >= 3 and result.failed == 0
