"""Which gradients are formed, which tensors are saved for them, and how long these live."""

import gc
import itertools
import weakref

import pytest
import torch
from support.cases import make_case, small_case
from support.choices import ACTIVATIONS, dtype_name
from support.paths import PATH
from support.runs import as_function, eager_layer, fused_layer, run_fused

import fastlane_ext as fl

pytestmark = pytest.mark.usefixtures("poisoned_memory")

each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def packed(call):
    """The result of ``call()``, and each tensor that autograd saved during the call."""
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
    """All sixteen subsets: right values, None elsewhere, and no saved tensor that they do not need."""
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
    # Without kernels of ours torch differentiates z σ(1.702 z) operator by operator.
    of_activation = 3 if activation == "quick_gelu" and PATH == "torch" else 1
    assert len(saved) == len(expected) + of_activation * (need_z and not recompute)
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
    """A narrow layer's backward is one pass for all gradients: leaving some out changes no bit of the others."""
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
    """A layer too wide for the one pass reads only dy and z for the bias gradient alone."""
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


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("changed", ["x", "weight", "bias", "residual", "y"])
def test_change_between_forward_and_backward(changed, recompute):
    """Torch's version counter guards the tensors that backward reads; the residual and y are free to change."""
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


class Held:
    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("drop", ["backward", "output"])
def test_memory_is_freed(drop, recompute):
    """Saved tensors are freed with the backward, though y lives; or with y, though nothing was differentiated."""
    held = []

    def pack(tensor):
        wrapped = Held(tensor.detach())  # a hook that keeps the node's own output keeps the node
        held.append(weakref.ref(wrapped))
        return wrapped

    call, leaves = as_function(small_case(recompute=recompute))
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
    call, leaves = as_function(small_case(concat=concat))
    with mode():
        y, saved = packed(lambda: call(*leaves))
    assert not saved and y.grad_fn is None and not y.requires_grad
    assert y.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(y, call(*leaves))
    assert_fused(forward=2)


@pytest.mark.parametrize("options", [{}, {"residual": "x"}, {"concat": True}], ids=str)
def test_inference_tensors(options, assert_fused):
    """Inference tensors are accepted where nothing has to be saved; elsewhere torch raises its error, as in eager."""
    case = small_case(**options)
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
