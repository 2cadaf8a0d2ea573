"""What the layer differentiates, what it saves for that, and what it leaves alone."""

import gc
import itertools
import weakref

import pytest
import torch
from oracle import (
    ACTIVATIONS,
    IN_X,
    LAYOUTS,
    RESIDUALS,
    SHARING_LAYOUTS,
    dtype_name,
    eager_layer,
    fused_layer,
    make_case,
    run_eager,
    run_fused,
)

import fastlane_ext as fl

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CREATE_GRAPH = "backward with create_graph=True"
OPTIONS = {
    **{f"residual-{name}": {"residual": name} for name in RESIDUALS},
    "recompute": {"recompute": True},
    "recompute-x": {"recompute": True, "residual": "x"},
    "no-bias": {"bias": False},
    "no-bias-recompute": {"bias": False, "recompute": True, "residual": "none"},
    "concat": {"concat": True},
    "concat-no-bias": {"concat": True, "bias": False},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def as_function(case, layer=fused_layer):
    """A function of its leaves, and the leaves, for gradcheck."""
    leaves = [case.x, case.weight]
    with_bias = case.bias is not None
    with_residual = case.residual_of is not None and case.residual not in IN_X
    leaves += [case.bias] * with_bias + [case.residual_data] * with_residual
    extra = {"recompute": case.recompute} if layer is fused_layer else {}

    def call(x, weight, *rest):
        rest = list(rest)
        bias = rest.pop(0) if with_bias else None
        residual = case.residual_of(x, *rest or [None]) if case.residual_of else None
        return layer(x, weight, bias, residual, activation=case.activation, concat=case.concat, **extra)

    return call, [leaf.detach().clone().requires_grad_() for leaf in leaves]


def small(dtype=torch.float64, shape=(2, 2), features=3, **options):
    return make_case(shape, features, features, dtype=dtype, **options)


@each_activation
@each_option
def test_gradcheck(options, activation, assert_fused):
    call, leaves = as_function(small(activation=activation, **options))
    assert torch.autograd.gradcheck(call, leaves)
    assert_fused(forward=None, backward=None)


@pytest.mark.expects_fallback(CREATE_GRAPH)
@each_activation
@each_option
def test_gradgradcheck(options, activation, assert_fused):
    call, leaves = as_function(small(activation=activation, **options))
    assert torch.autograd.gradgradcheck(call, leaves)
    assert_fused(forward=None, backward=0)


@pytest.mark.parametrize(
    "wrt", [*(pytest.param(i, marks=pytest.mark.expects_fallback(CREATE_GRAPH)) for i in range(3)), 3]
)
def test_gradgradcheck_of_each_input_alone(wrt):
    """The residual's gradient is dy itself: differentiating it again needs no kernel, and no fallback."""
    call, leaves = as_function(small())
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == wrt)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.expects_fallback(CREATE_GRAPH)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_penalty(recompute):
    """The usual use of a double backward: the norm of dx, differentiated by the parameters."""
    results = []
    for layer in (fused_layer, eager_layer):
        call, leaves = as_function(small(recompute=recompute), layer)
        (dx,) = torch.autograd.grad(call(*leaves).square().sum(), leaves[0], create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), leaves))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def packed(call):
    """call(), and each tensor that autograd saved meanwhile."""
    tensors = []

    def pack(t):
        tensors.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    return result, tensors


SUBSETS = list(itertools.product([False, True], repeat=4))


@each_activation
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: "".join(n for n, on in zip("xWbr", s, strict=True) if on))
def test_subsets_of_needed_gradients(subset, recompute, activation, assert_fused):
    """All sixteen: right values, None elsewhere, and nothing saved that they do not need."""
    case = make_case((5,), 4, 3, dtype=torch.float64, activation=activation, recompute=recompute)
    call, leaves = as_function(case)
    eager, _ = as_function(case, eager_layer)
    for leaf, needed in zip(leaves, subset, strict=True):
        leaf.requires_grad_(needed)
    y, saved = packed(lambda: call(*leaves))
    assert y.requires_grad == any(subset)
    x, weight, bias, _ = leaves
    need_x, need_weight, need_bias, _ = subset
    need_z = (need_x or need_weight or need_bias) and activation != "none"
    again = need_z and recompute
    expected = [x] * (need_weight or again) + [weight] * (need_x or again) + [bias] * again
    known = {t.data_ptr() for t in saved} & {t.data_ptr() for t in leaves}
    assert known == {t.data_ptr() for t in expected}
    assert len(saved) == len(expected) + (need_z and not recompute)
    if any(subset):
        needed = [leaf for leaf, on in zip(leaves, subset, strict=True) if on]
        got = torch.autograd.grad(y, needed, case.grad)
        exact = torch.autograd.grad(eager(*leaves), needed, case.grad)
        for a, b in zip(got, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        y = call(*leaves)
        y.backward(case.grad)
        assert [leaf.grad is not None for leaf in leaves] == list(subset)
    assert_fused(forward=1 + any(subset), backward=2 * any(subset[:3]))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("options", [{}, {"residual": "x"}, {"activation": "none"}, {"concat": True}], ids=str)
@pytest.mark.parametrize("rows", [5, 193, 389])
def test_subsets_of_a_narrow_layer(rows, options, dtype, layout):
    """Its backward is one pass for all gradients: what is left out changes no bit of the others."""
    case = make_case((rows,), 35, 35, dtype=dtype, **options).with_layout(weight=layout)
    expected = run_fused(case)
    call, leaves = as_function(case)
    leaves[1] = case.weight.detach()
    for subset in itertools.product([False, True], repeat=3):
        for leaf, needed in zip(leaves, subset, strict=False):
            leaf.requires_grad_(needed)
        names = [name for name, on in zip(("dx", "dweight", "dbias"), subset, strict=True) if on]
        if names:
            needed = [leaf for leaf, on in zip(leaves, subset, strict=False) if on]
            for name, got in zip(names, torch.autograd.grad(call(*leaves), needed, case.grad), strict=True):
                assert torch.equal(got, expected[name]), (subset, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("size", [(1000, 300, 301), (9, 1030, 1031), (1000, 3, 1100)], ids=str)
def test_bias_alone(size, dtype):
    """Of a layer too wide for the one pass: only dy and z are read."""
    rows, in_features, out_features = size
    case = make_case((rows,), in_features, out_features, dtype=dtype)
    call, leaves = as_function(case)
    for leaf in leaves:
        leaf.requires_grad_(leaf is leaves[2])
    (got,) = torch.autograd.grad(call(*leaves), leaves[2], case.grad)
    # Both are sums in double, in another order.
    torch.testing.assert_close(got, run_fused(case)["dbias"], rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("subset", list(itertools.product([False, True], repeat=3)), ids=str)
def test_subsets_of_concat(subset):
    case = make_case((5,), 4, 3, dtype=torch.float64, concat=True)
    call, leaves = as_function(case)
    eager, _ = as_function(case, eager_layer)
    for leaf, needed in zip(leaves, subset, strict=True):
        leaf.requires_grad_(needed)
    y, saved = packed(lambda: call(*leaves))
    assert len(saved) == subset[1] + subset[0] + any(subset)
    needed = [leaf for leaf, on in zip(leaves, subset, strict=True) if on]
    if needed:
        got = torch.autograd.grad(y, needed, case.grad)
        for a, b in zip(got, torch.autograd.grad(eager(*leaves), needed, case.grad), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(7,), (2, 3), (0,), ()], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "none"])
def test_saved_bytes(activation, shape):
    """x, the weight and z: not the output, not the bias, not the residual."""
    case = make_case(shape, 5, 6, activation=activation)
    call, leaves = as_function(case)
    y, saved = packed(lambda: call(*leaves))
    z = y.nbytes if activation != "none" else 0
    assert sum(t.nbytes for t in saved) == case.x.nbytes + case.weight.nbytes + z
    assert not {t.data_ptr() for t in saved} & {y.data_ptr(), leaves[2].data_ptr(), leaves[3].data_ptr()} - {0}


GRADS = {
    "sum": lambda g: torch.ones((), dtype=g.dtype).expand(g.shape),
    "narrowed": lambda g: torch.cat([g, g, g], -1).narrow(-1, g.shape[-1], g.shape[-1]),
    **{name: LAYOUTS[name] for name in ("transposed", "stepped", "padded", "misaligned", "permuted")},
    **SHARING_LAYOUTS,
}


@pytest.mark.parametrize("grad", GRADS)
@each_activation
@pytest.mark.parametrize("options", [{"residual": "x"}, {"concat": True}, {"residual": "row"}], ids=str)
@pytest.mark.parametrize(("shape", "features"), [((4, 5), 17), ((389,), 17), ((2, 17), 300)], ids=str)
def test_any_grad_output(shape, features, options, activation, grad):
    """As with a contiguous one, to the bit: neither gradcheck nor opcheck ever tries another."""
    case = make_case(shape, features, features, activation=activation, **options)
    case.grad = GRADS[grad](case.grad)
    got = run_fused(case)
    case.grad = case.grad.contiguous()
    for name, expected in run_fused(case).items():
        if name == "dresidual":  # torch's own sum, whose order follows the strides
            torch.testing.assert_close(got[name], expected)
        else:
            assert torch.equal(got[name], expected), name


def test_sum_backward(assert_fused):
    case = make_case((4, 5), 7, 9)
    call, leaves = as_function(case)
    eager, eager_leaves = as_function(case, eager_layer)
    call(*leaves).sum().backward()
    eager(*eager_leaves).sum().backward()
    for a, b in zip(leaves, eager_leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert_fused(forward=1, backward=1)


@pytest.mark.parametrize("shape", [(6, 4), (1, 4), (6, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_gradient_strides(dtype, column_major, shape):
    """dW, db and dx lie as W, b and x do, or DDP's buckets complain."""
    out_features, in_features = shape
    case = make_case((5,), in_features, out_features, dtype=dtype)
    if column_major:
        case = case.with_layout(weight="transposed")
    call, leaves = as_function(case)
    leaves[1] = case.weight.detach().requires_grad_()
    call(*leaves).backward(case.grad)
    for leaf, like in zip(leaves, (case.x, case.weight, case.bias, case.residual_data), strict=True):
        assert leaf.grad.stride() == like.stride()
    expected = run_eager(case)["dweight"]
    torch.testing.assert_close(leaves[1].grad, expected, rtol=1e-2, atol=1e-2)


@each_option
def test_second_backward_is_equal(options):
    call, leaves = as_function(small(**options))
    y = call(*leaves)
    grad = torch.randn_like(y)
    first = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(y, leaves, grad)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("changed", ["x", "weight", "bias", "residual", "y"])
def test_change_between_forward_and_backward(changed, recompute):
    """Torch's version counter guards what the backward reads; the residual and y are free to change."""
    case = make_case((5,), 4, 3, dtype=torch.float64, recompute=recompute)
    call, leaves = as_function(case)
    y = call(*leaves)
    names = ("x", "weight", "bias", "residual")
    with torch.no_grad():
        dict(zip((*names, "y"), (*leaves, y), strict=True))[changed].add_(1)
    if changed in ("x", "weight") or (changed == "bias" and recompute):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, leaves, case.grad)
    else:
        got = torch.autograd.grad(y, leaves, case.grad)
        expected = run_fused(case)
        for name, grad in zip(names, got, strict=True):
            assert torch.equal(grad, expected[f"d{name}"])


def test_output_can_be_changed_in_place():
    """As eager's sum: y belongs to the caller, and its history follows the change."""
    results = []
    for layer in (fused_layer, eager_layer):
        call, leaves = as_function(small(), layer)
        results.append(torch.autograd.grad(call(*leaves).mul_(3).sum(), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("activation", ["gelu", "none"])
def test_unused_output(activation):
    call, leaves = as_function(small(activation=activation))
    call(*leaves)
    other = torch.ones(3, requires_grad=True)
    assert torch.autograd.grad(other.sum(), leaves, allow_unused=True) == (None,) * 4


class Swallow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"concat": True}, {"activation": "none"}], ids=str)
def test_undefined_grad_output(options, assert_fused):
    call, leaves = as_function(small(**options))
    grads = torch.autograd.grad(Swallow.apply(call(*leaves)).sum(), leaves, allow_unused=True)
    assert all(grad is None or (grad == 0).all() for grad in grads)
    assert_fused(forward=1, backward=0)


class Held:
    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("drop", ["backward", "output"])
def test_memory_is_freed(drop, recompute):
    """What was saved dies with the backward, though y lives; or with y, though nothing was differentiated."""
    held = []

    def pack(tensor):
        wrapped = Held(tensor.detach())  # a hook that keeps the node's own output keeps the node
        held.append(weakref.ref(wrapped))
        return wrapped

    call, leaves = as_function(small(recompute=recompute))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda h: h.tensor):
        y = call(*leaves)
    assert len(held) == 3 and all(ref() is not None for ref in held)
    if drop == "backward":
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    else:
        y = None
    gc.collect()
    assert [ref() for ref in held] == [None] * 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("concat", [False, True])
def test_no_grad_saves_nothing(mode, concat, assert_fused):
    call, leaves = as_function(small(concat=concat))
    with mode():
        y, saved = packed(lambda: call(*leaves))
    assert not saved and y.grad_fn is None and not y.requires_grad
    assert y.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(y, call(*leaves))
    assert_fused(forward=2)


@pytest.mark.parametrize("options", [{}, {"residual": "x"}, {"concat": True}], ids=str)
def test_inference_tensors(options, assert_fused):
    """Accepted wherever nothing has to be saved; elsewhere torch's own error, as for eager."""
    case = small(**options)
    call, leaves = as_function(case)
    with torch.inference_mode():
        frozen = [leaf.clone() for leaf in leaves]
        assert torch.equal(call(*frozen), call(*leaves))
    with torch.no_grad():
        assert torch.equal(call(*frozen), call(*leaves))
    assert torch.equal(call(*frozen), call(*leaves))
    for layer in (fused_layer, eager_layer):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            as_function(case, layer)[0](frozen[0], *leaves[1:])
    assert_fused(forward=None)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("features", [3, 0])
@pytest.mark.parametrize("shape", [(2, 2), (0,), ()], ids=str)
@pytest.mark.parametrize("residual", ["x", "tensor", "none", "concat"])
def test_output_is_fresh_memory(residual, shape, features, needs_grad):
    """Never an alias of an input, also where the layer adds nothing to it."""
    options = {"concat": True} if residual == "concat" else {"residual": residual}
    case = make_case(shape, features, features, activation="none", **options)
    case.weight.zero_()
    case.bias.zero_()
    call, leaves = as_function(case)
    for leaf in leaves:
        leaf.requires_grad_(needs_grad)
    y = call(*leaves)
    assert y._base is None and not y._is_view() and y.is_contiguous()
    assert all(y is not leaf for leaf in leaves)
    storages = [leaf.untyped_storage().data_ptr() for leaf in leaves]
    assert y.numel() == 0 or y.untyped_storage().data_ptr() not in storages


@pytest.mark.parametrize("residual", ["x", "tensor"])
def test_gradients_of_residual_and_output_are_separate(residual):
    """The residual's gradient is dy: changing one in place must not change the caller's other."""
    case = small(residual=residual)
    call, leaves = as_function(case)
    y = call(*leaves)
    grad = case.grad.clone()
    y.backward(grad)
    leaves[-1].grad.zero_()
    leaves[0].grad.zero_()
    assert torch.equal(grad, case.grad)


@each_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("residual", ["x", "row", "none"])
def test_recompute_gives_equal_bits(residual, dtype, activation):
    case = make_case((3, 13), 35, 35, dtype=dtype, activation=activation, residual=residual)
    saved = run_fused(case)
    case.recompute = True
    for name, again in run_fused(case).items():
        assert torch.equal(again, saved[name]), name


@pytest.mark.parametrize("how", ["same", "chunk", "transposed", "detached"])
def test_residual_from_x(how):
    """x itself, a part of it, a rearrangement, a copy without history: each path to x adds up."""
    make = {
        "same": lambda x: x,
        "chunk": lambda x: x[:1],
        "transposed": lambda x: x.mT,
        "detached": lambda x: x.detach(),
    }[how]
    results = []
    for layer in (fused_layer, eager_layer):
        case = make_case((5,), 5, 5, dtype=torch.float64)
        x, weight = case.x.requires_grad_(), case.weight.requires_grad_()
        y = layer(x, weight, case.bias, make(x))
        results.append((y, *torch.autograd.grad(y, (x, weight), case.grad)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_residual_that_is_another_input():
    """The weight, or the bias, as the residual: one tensor, two paths."""
    for which in (1, 2):
        results = []
        for layer in (fused_layer, eager_layer):
            case = make_case((4,), 4, 4, dtype=torch.float64)
            leaves = [t.requires_grad_() for t in (case.x, case.weight, case.bias)]
            results.append(torch.autograd.grad(layer(*leaves, leaves[which]), leaves, case.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_weight_used_twice(assert_fused):
    results = []
    for layer in (fused_layer, eager_layer):
        case = make_case((4,), 6, 6, dtype=torch.float64)
        leaves = [t.requires_grad_() for t in (case.x, case.weight, case.bias)]
        x, weight, bias = leaves
        hidden = layer(x, weight, bias, x)
        results.append(torch.autograd.grad(layer(hidden, weight, bias, hidden), leaves, case.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert_fused(forward=2, backward=2)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, assert_fused):
    from torch.utils.checkpoint import checkpoint

    case = make_case((5,), 4, 3)
    expected = run_fused(case)
    fl.reset_stats()
    call, leaves = as_function(case)
    checkpoint(call, *leaves, use_reentrant=use_reentrant).backward(case.grad)
    for name, leaf in zip(("x", "weight", "bias", "residual"), leaves, strict=True):
        assert torch.equal(leaf.grad, expected[f"d{name}"])
    assert_fused(forward=2, backward=1)


@pytest.mark.parametrize("name", ["linear_gelu_forward", "linear_gelu_backward"])
def test_inner_operators_say_that_they_have_no_derivative(name):
    x = torch.randn(2, 3, requires_grad=True)
    op = getattr(torch.ops.fastlane, name)
    if name == "linear_gelu_forward":
        y = op(x, torch.randn(3, 3), None, None, activation="gelu", concat=False)[0]
    else:
        rest = {"activation": "gelu", "weight_column_major": False, "output_mask": [True, False, False]}
        y = op(x, torch.randn(2, 3), None, torch.randn(3, 3), None, None, **rest)[0]
    with pytest.raises(RuntimeError, match=f"derivative for fastlane::{name} is not implemented"):
        y.sum().backward()
