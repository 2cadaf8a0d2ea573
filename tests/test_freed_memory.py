"""Tensors whose storage was freed or cut while their sizes stayed: one sentence, instead of reading beyond it."""

import pytest
import torch

import fastlane_ext as fl

W, H = 12, 20
SHAPES = {
    "linear_gelu_residual": {"x": (5, W), "weight": (H, W), "bias": (H,), "residual": (5, H)},
    "linear_gelu_concat": {"x": (5, W), "weight": (H, W), "bias": (H,)},
    "mlp_residual": {
        "x": (5, W),
        "fc1_weight": (H, W),
        "fc1_bias": (H,),
        "fc2_weight": (W, H),
        "fc2_bias": (W,),
        "residual": (5, W),
    },
    "residual_stack": {
        "x": (5, W),
        "weights[0]": (W, W),
        "weights[1]": (H, W),
        "biases[0]": (W,),
        "biases[1]": (H,),
        "projections[1]": (H, W),
        "projection_biases[1]": (H,),
    },
}
OPERANDS = [(op, name) for op, shapes in SHAPES.items() for name in shapes]


def operands(op):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in SHAPES[op].items()}


def call(op, tensors):
    if op != "residual_stack":
        return getattr(fl, op)(**tensors)
    lists = {
        name: [tensors.get(f"{name}[{i}]") for i in range(2)]
        for name in ("weights", "biases", "projections", "projection_biases")
    }
    return fl.residual_stack(tensors["x"], shortcut="projection", **lists)


def cut(t, nbytes):
    t.untyped_storage().resize_(nbytes)


def assert_refused(name, run):
    with pytest.raises(RuntimeError) as error:
        run()
    message = str(error.value)
    assert f"{name} has a storage of" in message and "expected at least" in message and "\n" not in message


@pytest.mark.parametrize("grad", [True, False], ids=["training", "no_grad"])
@pytest.mark.parametrize("nbytes", [0, 8])
@pytest.mark.parametrize(("op", "name"), OPERANDS)
def test_an_operand_without_its_memory_is_named(op, name, nbytes, grad):
    tensors = operands(op)
    cut(tensors[name], nbytes)
    with torch.set_grad_enabled(grad):
        assert_refused(name, lambda: call(op, tensors))


@pytest.mark.parametrize("op", SHAPES)
def test_a_view_into_what_is_left_works(op):
    """Memory may be cut behind a tensor, as long as its own elements are there."""
    tensors = operands(op)
    expected = call(op, tensors)
    views = {}
    for name, t in tensors.items():
        storage = torch.cat([t.detach().flatten(), torch.zeros(7)])
        cut(storage, 4 * t.numel())
        views[name] = storage.as_strided(t.shape, t.stride())
    assert torch.equal(call(op, views), expected)


@pytest.mark.parametrize("op", SHAPES)
def test_a_gradient_without_its_memory_is_named(op):
    tensors = operands(op)
    y = call(op, tensors)
    dy = torch.ones_like(y)
    cut(dy, 0)
    # A concatenation's gradient is sliced before, by torch.
    with pytest.raises(RuntimeError, match="has a storage of 0 bytes|out of bounds"):
        torch.autograd.grad(y, list(tensors.values()), dy)


@pytest.mark.parametrize(
    ("op", "name"), [pair for pair in OPERANDS if pair[1] in ("x", "weight", "fc1_weight", "fc2_weight", "weights[1]")]
)
def test_a_saved_tensor_freed_before_backward_is_named(op, name):
    tensors = operands(op)
    y = call(op, tensors)
    cut(tensors[name], 0)
    assert_refused(name, lambda: torch.autograd.grad(y.sum(), list(tensors.values())))
