"""The layer's first and second derivatives, by every tensor, and the gradients' strides."""

import pytest
import torch
from support.cases import RESIDUALS, make_case, small_case
from support.choices import ACTIVATIONS, dtype_name
from support.layouts import LAYOUTS, SHARING_LAYOUTS
from support.runs import as_function, eager_layer, fused_layer, run_eager, run_fused

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


@each_activation
@each_option
def test_gradcheck(options, activation, assert_fused):
    call, leaves = as_function(small_case(activation=activation, **options))
    assert torch.autograd.gradcheck(call, leaves)
    assert_fused(forward=None, backward=None)


@pytest.mark.expects_fallback(CREATE_GRAPH)
@each_activation
@each_option
def test_gradgradcheck(options, activation, assert_fused):
    call, leaves = as_function(small_case(activation=activation, **options))
    assert torch.autograd.gradgradcheck(call, leaves)
    assert_fused(forward=None, backward=0)


@pytest.mark.parametrize(
    "wrt", [*(pytest.param(i, marks=pytest.mark.expects_fallback(CREATE_GRAPH)) for i in range(3)), 3]
)
def test_gradgradcheck_of_each_input_alone(wrt):
    """The residual's gradient is dy itself: differentiating it again needs no kernel, and no fallback."""
    call, leaves = as_function(small_case())
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == wrt)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.expects_fallback(CREATE_GRAPH)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_penalty(recompute):
    """The usual use of a double backward: the norm of dx, differentiated by the parameters."""
    results = []
    for layer in (fused_layer, eager_layer):
        call, leaves = as_function(small_case(recompute=recompute), layer)
        (dx,) = torch.autograd.grad(call(*leaves).square().sum(), leaves[0], create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), leaves))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


GRADS = {
    "sum": lambda g: torch.ones((), dtype=g.dtype).expand(g.shape),
    "narrowed": lambda g: torch.cat([g, g, g], -1).narrow(-1, g.shape[-1], g.shape[-1]),
    **{name: LAYOUTS[name] for name in ("transposed", "stepped", "padded", "misaligned", "permuted")},
    **SHARING_LAYOUTS,
}


@pytest.mark.own_kernels
@pytest.mark.parametrize("grad", GRADS)
@each_activation
@pytest.mark.parametrize("options", [{"residual": "x"}, {"concat": True}, {"residual": "row"}], ids=str)
@pytest.mark.parametrize(("shape", "features"), [((4, 5), 17), ((389,), 17), ((2, 17), 300)], ids=str)
def test_any_grad_output(shape, features, options, activation, grad):
    """The same bits as with a contiguous grad_output; gradcheck and opcheck never try any other."""
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
    """dW, db and dx have the strides of W, b and x, since DDP's buckets warn of others."""
    out_features, in_features = shape
    case = make_case((5,), in_features, out_features, dtype=dtype)
    if column_major:
        case = case.with_layout(weight="transposed")
    call, leaves = as_function(case)
    leaves[1] = case.weight.detach().requires_grad_()
    # Not .backward(), which copies a gradient that lies otherwise.
    grads = torch.autograd.grad(call(*leaves), leaves, case.grad)
    for grad, like in zip(grads, (case.x, case.weight, case.bias, case.residual_data), strict=True):
        assert grad.stride() == like.stride()
    torch.testing.assert_close(grads[1], run_eager(case)["dweight"], rtol=1e-2, atol=1e-2)


@each_option
def test_second_backward_is_equal(options):
    call, leaves = as_function(small_case(**options))
    y = call(*leaves)
    grad = torch.randn_like(y)
    first = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(y, leaves, grad)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, leaves, grad)


def test_output_can_be_changed_in_place():
    """y belongs to the caller, as eager's sum does, and y's history follows the change."""
    results = []
    for layer in (fused_layer, eager_layer):
        call, leaves = as_function(small_case(), layer)
        results.append(torch.autograd.grad(call(*leaves).mul_(3).sum(), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("activation", ["gelu", "none"])
def test_unused_output(activation):
    call, leaves = as_function(small_case(activation=activation))
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
    call, leaves = as_function(small_case(**options))
    grads = torch.autograd.grad(Swallow.apply(call(*leaves)).sum(), leaves, allow_unused=True)
    assert all(grad is None or (grad == 0).all() for grad in grads)
    assert_fused(forward=1, backward=0)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("features", [3, 0])
@pytest.mark.parametrize("shape", [(2, 2), (0,), ()], ids=str)
@pytest.mark.parametrize("residual", ["x", "tensor", "none", "concat"])
def test_output_is_fresh_memory(residual, shape, features, needs_grad):
    """The output is never an alias of an input, not even where the layer adds nothing to the input."""
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
    """The residual's gradient equals dy: changing one in place must not change the other."""
    case = small_case(residual=residual)
    call, leaves = as_function(case)
    y = call(*leaves)
    grad = case.grad.clone()
    y.backward(grad)
    leaves[-1].grad.zero_()
    leaves[0].grad.zero_()
    assert torch.equal(grad, case.grad)


@pytest.mark.own_kernels
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
