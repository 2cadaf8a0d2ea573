"""The layer under vmap and autocast, and with tensors that are not plain. Other transforms: test_transforms.py."""

import itertools

import pytest
import torch
from support.cases import make_case, random
from support.choices import dtype_name
from support.runs import eager_layer, fused_layer

import fastlane_ext as fl

VMAP = "vmap over weight or bias"
exact = {"rtol": 1e-11, "atol": 1e-12}


# Vmap


def as_eager(function, fused, *arguments):
    """function(layer, *arguments) with the fused layer equals the same with the eager one."""
    got, expected = function(fused, *arguments), function(eager_layer, *arguments)
    flat_got, flat_expected = (torch.utils._pytree.tree_leaves(t) for t in (got, expected))
    for a, b in zip(flat_got, flat_expected, strict=True):
        torch.testing.assert_close(a, b, **exact)


# which of x, weight, bias, residual carry a batch
BATCHED = [b for b in itertools.product([False, True], repeat=4) if any(b)]


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("batched", BATCHED, ids=lambda b: "".join(n for n, on in zip("xWbr", b, strict=True) if on))
def test_vmap(batched, shape, dim):
    """A batch of x or of residuals is one more leading size; of weights or biases, the composition."""
    sizes = ((*shape, 4), (3, 4), (3,), (*shape, 3))
    tensors = [
        random(*((6, *size) if on else size), seed=i) for i, (size, on) in enumerate(zip(sizes, batched, strict=True))
    ]
    tensors = [t.movedim(0, dim) if on else t for t, on in zip(tensors, batched, strict=True)]
    in_dims = tuple(dim if on else None for on in batched)
    got = torch.vmap(fused_layer, in_dims)(*tensors)
    composed = batched[1] or batched[2]
    assert fl.stats()["fused"]["forward"] == (not composed)
    assert fl.stats()["fallback"] == ({VMAP: 1} if composed else {})
    torch.testing.assert_close(got, torch.vmap(eager_layer, in_dims)(*tensors), **exact)
    fl.reset_stats()


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize(
    ("batched", "bias"),
    [
        (b, bias)
        for b in itertools.product([False, True], repeat=3)
        for bias in (False, True)
        if any(b) and (bias or not b[2])
    ],
    ids=str,
)
def test_vmap_concat(batched, bias, shape, dim):
    sizes = ((*shape, 4), (3, 4), (3,))
    tensors, in_dims = [], []
    for i, (size, on) in enumerate(zip(sizes, batched, strict=True)):
        t = random(*((6, *size) if on else size), seed=i)
        where = min(dim, len(size))
        tensors.append(t.movedim(0, where) if on else t)
        in_dims.append(where if on else None)
    if not bias:
        tensors, in_dims = tensors[:2], in_dims[:2]

    def run(layer, *args):
        return torch.vmap(lambda *a: layer(*a, concat=True), tuple(in_dims))(*args)

    as_eager(run, fused_layer, *tensors)
    assert set(fl.stats()["fallback"]) == ({VMAP} if batched[1] or batched[2] else set())
    fl.reset_stats()


@pytest.mark.parametrize("residual_shape", [(), (1,), (3,), (5, 1), (1, 3), (5, 3)], ids=str)
@pytest.mark.parametrize(("x_batched", "residual_batched"), [(True, False), (False, True), (True, True)])
def test_vmap_over_a_broadcast_residual(residual_shape, x_batched, residual_batched, assert_fused):
    """Within an example the residual still broadcasts from its last dimension."""
    x = random(*((6, 5, 4) if x_batched else (5, 4)))
    residual = random(*((6, *residual_shape) if residual_batched else residual_shape), seed=1)
    in_dims = (0 if x_batched else None, None, None, 0 if residual_batched else None)
    as_eager(lambda layer, *a: torch.vmap(layer, in_dims)(*a), fused_layer, x, random(3, 4), None, residual)
    assert_fused(forward=1)


@pytest.mark.expects_fallback(VMAP)
def test_nested_vmap():
    """All pairs of weights and inputs, the batches in one order and in the other."""
    x, weight, bias = random(6, 5, 4), random(2, 3, 4, seed=1), random(2, 3, seed=2)

    def pairs(layer, *args):
        return torch.vmap(torch.vmap(layer, (0, None, None)), (None, 0, 0))(*args)

    def other_order(layer, *args):
        return torch.vmap(torch.vmap(layer, (None, 0, 0)), (0, None, None))(*args)

    as_eager(pairs, fused_layer, x, weight, bias)
    as_eager(other_order, fused_layer, x, weight, bias)


def test_nested_vmap_of_x_stays_fused(assert_fused):
    x, weight, bias = random(2, 6, 5, 4), random(3, 4, seed=1), random(3, seed=2)
    as_eager(lambda layer, *a: torch.vmap(torch.vmap(layer, (0, None, None)), (0, None, None))(*a),
             fused_layer, x, weight, bias)  # fmt: skip
    assert_fused(forward=1)


@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_then_backward(dim):
    """requires_grad outside of vmap: the tape records through the batching rule."""
    results = []
    for layer in (fused_layer, eager_layer):
        leaves = [t.requires_grad_() for t in (random(6, 5, 4).movedim(0, dim), random(3, 4), random(3))]
        y = torch.vmap(layer, (dim, None, None))(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **exact)


# Autocast


def autocast_run(layer, case, low):
    leaves = [case.x, case.weight, case.bias]
    if case.residual_of:
        leaves.append(case.residual_data)
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    with torch.autocast("cpu", dtype=low):
        y = layer(*leaves, activation=case.activation, concat=case.concat)
    return [y.detach(), *torch.autograd.grad(y, leaves, case.grad.to(y.dtype))]


LOW = (torch.bfloat16, torch.float16)
AUTOCASTS = [
    # x, weights, residual; the parameters are float32 as a rule, and float64 is left alone
    *((x, torch.float32, r) for x in (torch.float32, *LOW) for r in (torch.float32, torch.float64, *LOW, None)),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64, torch.float64),
    (torch.float64, torch.float64, None),
]


def assert_autocast_as_eager(case, low, assert_fused):
    got, expected = autocast_run(fused_layer, case, low), autocast_run(eager_layer, case, low)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)
    assert_fused(forward=1, backward=1)


@pytest.mark.parametrize("low", LOW, ids=dtype_name)
@pytest.mark.parametrize("activation", ["gelu", "none"])
@pytest.mark.parametrize("dtypes", AUTOCASTS, ids=lambda d: "-".join(str(dtype_name(t)) for t in d))
def test_autocast(dtypes, activation, low, assert_fused):
    """The dtypes of y and of every gradient are eager's: a float32 residual stream stays float32."""
    x, weights, residual = dtypes
    case = make_case((5,), 4, 4, activation=activation, residual="tensor" if residual else "none")
    case.x, case.weight, case.bias = case.x.to(x), case.weight.to(weights), case.bias.to(weights)
    case.residual_data = case.residual_data.to(residual or x)
    assert_autocast_as_eager(case, low, assert_fused)


@pytest.mark.parametrize(
    ("x", "weights", "low"),
    [
        *((x, torch.float32, low) for low in LOW for x in (torch.float32, low)),  # eager mixes no two low dtypes
        *((torch.float64, torch.float64, low) for low in LOW),
    ],
    ids=dtype_name,
)
def test_autocast_concat(x, weights, low, assert_fused):
    case = make_case((5,), 4, 4, concat=True)
    case.x, case.weight, case.bias = case.x.to(x), case.weight.to(weights), case.bias.to(weights)
    assert_autocast_as_eager(case, low, assert_fused)


def test_autocast_uses_the_weight_cache():
    """One cast of a weight serves all its uses in a step."""
    weight = random(4, 4, dtype=torch.float32).requires_grad_()
    x = random(5, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.profiler.profile() as profile:
        fused_layer(fused_layer(x, weight), weight)
    casts = [event.count for event in profile.key_averages() if event.key == "aten::_to_copy"]
    assert sum(casts) == 1


def test_autocast_off(assert_fused):
    x, weight = random(5, 4, dtype=torch.bfloat16), random(3, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with (
            torch.autocast("cpu", enabled=False),
            pytest.raises(RuntimeError, match="weight has dtype Float"),
        ):
            fused_layer(x, weight)
        assert fused_layer(x, weight).dtype == torch.bfloat16
    assert_fused(forward=1)


def test_autocast_under_compile(fresh_compiler, assert_fused):
    case = make_case((5,), 4, 4)

    def step(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fused_layer(*args)

    arguments = [t.requires_grad_() for t in (case.x, case.weight, case.bias, case.residual_data)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    plain = step(*arguments)
    assert compiled.dtype == plain.dtype == torch.float32 and torch.equal(compiled, plain)
    for a, b in zip(*(torch.autograd.grad(y.sum(), arguments) for y in (compiled, plain)), strict=True):
        assert torch.equal(a, b)
    assert_fused(forward=2, backward=2)


# Tensors that are not plain


class Logged(torch.Tensor):
    """A wrapper subclass: it has no data of its own, so a kernel that read its pointer would crash."""

    calls: list[str] = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(str(func))
        unwrap = lambda t: t.inner if isinstance(t, Logged) else t  # noqa: E731
        args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
        wrap = lambda t: Logged(t) if isinstance(t, torch.Tensor) else t  # noqa: E731
        return torch.utils._pytree.tree_map(wrap, func(*args, **kwargs))


def test_wrapper_subclass(assert_fused):
    """Calls go through the dispatcher; no raw pointer is read."""
    case = make_case((5,), 4, 3)
    leaves = [t.detach().requires_grad_() for t in (case.x, case.weight, case.bias)]
    expected = fused_layer(*leaves)
    expected = [expected, *torch.autograd.grad(expected.sum(), leaves)]
    wrapped = [Logged(t.detach()).requires_grad_() for t in leaves]
    Logged.calls.clear()
    y = fused_layer(*wrapped)
    got = [y, *torch.autograd.grad(y.sum(), wrapped)]
    for a, b in zip(got, expected, strict=True):
        assert isinstance(a, Logged) and torch.equal(a.inner, b)
    assert "fastlane.linear_gelu_forward.default" in Logged.calls
    assert "fastlane.linear_gelu_backward.default" in Logged.calls
    assert_fused(forward=2, backward=2)


@pytest.mark.parametrize("kind", ["parameter", "conjugate view", "negative view"])
def test_lazy_views(kind):
    """Negation bits are resolved before a kernel sees the memory."""
    weight = torch.nn.Parameter(random(3, 4))
    x = random(5, 4)
    if kind == "conjugate view":
        x = torch.complex(x, x).conj().real
    elif kind == "negative view":
        x = torch.complex(x, x).conj().imag
        assert x.is_neg()
    torch.testing.assert_close(fused_layer(x, weight), eager_layer(x, weight), **exact)


def test_a_composed_call_refuses_what_a_fused_one_refuses():
    x, weight = random(3, dtype=torch.float32), random(4, 3, dtype=torch.float32)
    for residual, message in ((random(4), "residual has dtype Double"), (torch.zeros(5, 4), "residual has shape")):
        with pytest.raises(RuntimeError, match=f"^linear_gelu_residual: {message}"):
            torch.func.grad(lambda x, r=residual: fl.linear_gelu_residual(x, weight, None, r).sum())(x)
