"""torch's FlopCounterMode: every operator counts as the products that it computes."""

import itertools

import pytest
import torch
from test_stack import SHORTCUTS, Network, draw
from torch.utils.flop_counter import FlopCounterMode

import fastlane_ext as fl
from fastlane_ext import reference

SHAPES = [(4,), (5, 4), (2, 3, 4), (0, 4)]


def counted(call):
    with FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops(), result


def leaves_of(shapes, subset):
    return [torch.randn(shape).requires_grad_(on) for shape, on in zip(shapes, subset, strict=True)]


def assert_as_eager(call, leaves, again=0):
    """Forward counts as eager's, backward `again` operations more, since eager keeps values that we compute again."""
    (forward, y), (eager_forward, eager_y) = (
        counted(lambda kind=kind: call(kind, *leaves)) for kind in (fl, reference)
    )
    assert forward == eager_forward
    needed = [t for t in leaves if t.requires_grad]
    if needed:
        backward, eager_backward = (
            counted(lambda out=out: torch.autograd.grad(out, needed, torch.ones_like(out)))[0] for out in (y, eager_y)
        )
        assert backward == eager_backward + again


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "none"])
@pytest.mark.parametrize("recompute", [False, True])
def test_layer(recompute, activation, shape):
    rows = torch.Size(shape[:-1]).numel()
    for subset in itertools.product([False, True], repeat=4):
        leaves = leaves_of([shape, (3, 4), (3,), (3,)], subset)
        computes_z = recompute and activation != "none" and any(subset[:3])
        assert_as_eager(
            lambda kind, *t: kind.linear_gelu_residual(*t, activation=activation, recompute=recompute),
            leaves,
            again=computes_z * 2 * rows * 4 * 3,
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_concat(shape):
    for subset in itertools.product([False, True], repeat=3):
        assert_as_eager(lambda kind, *t: kind.linear_gelu_concat(*t), leaves_of([shape, (3, 4), (3,)], subset))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "none"])
@pytest.mark.parametrize("recompute", [False, True])
def test_mlp(recompute, activation, shape):
    rows = torch.Size(shape[:-1]).numel()
    for subset in itertools.product([False, True], repeat=6):
        leaves = leaves_of([shape, (5, 4), (5,), (4, 5), (4,), (4,)], subset)
        computes_z = recompute and (subset[3] or (activation != "none" and any(subset[:3])))
        assert_as_eager(
            lambda kind, *t: kind.mlp_residual(*t, activation=activation, recompute=recompute),
            leaves,
            again=computes_z * 2 * rows * 4 * 5,
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("sizes", [(4, 4, 3, 3, 5), (4, 1030, 3)], ids=["narrow", "wide"])
def test_stack(sizes, shortcut, shape):
    network = Network(sizes, shortcut, dtype=torch.float32)
    x, _ = draw(network, shape[:-1], sizes)
    rows = torch.Size(shape[:-1]).numel()
    subsets = {
        "all": lambda i, kind: True,
        "x": lambda i, kind: kind == "x",
        "weights": lambda i, kind: kind == "weight",
        "biases": lambda i, kind: kind == "bias",
        "last": lambda i, kind: i == len(sizes) - 2,
        "projections": lambda i, kind: kind == "projection",
    }
    kinds = ("weight", "bias", "projection", "projection_bias")
    for needs in subsets.values():
        x.requires_grad_(needs(None, "x"))
        for kind, tensors in zip(kinds, network.lists, strict=True):
            for i, t in enumerate(tensors):
                if t is not None:
                    t.requires_grad_(needs(i, kind))
        needed = [
            i
            for i in range(len(sizes) - 1)
            if needs(i, "weight") or (network.projections[i] is not None and needs(i, "projection"))
        ]
        # A projection is multiplied once more where a later layer's input is formed again from it.
        again = sum(
            2 * rows * p.numel()
            for i, p in enumerate(network.projections)
            if p is not None and any(j > i for j in needed)
        )
        assert_as_eager(lambda kind, *_: network.run(x, kind), [x, *network.parameters], again)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_a_stack_computed_again(shortcut):
    """Every layer counts once more, except the last layer's projection, whose result nothing reads."""
    sizes = (4, 4, 3, 3)
    network = Network(sizes, shortcut, dtype=torch.float32)
    x, _ = draw(network, (5,), sizes)
    kept, without = (network.run(x, recompute=recompute) for recompute in (False, True))
    leaves = [x, *network.parameters]
    kept, without = (
        counted(lambda y=y: torch.autograd.grad(y, leaves, torch.ones_like(y)))[0] for y in (kept, without)
    )
    assert without - kept == sum(2 * 5 * w.numel() for w in network.weights)


@pytest.mark.expects_fallback(
    "fc1 is under a hook registered for all modules", "fc2 is under a hook registered for all modules"
)
def test_modules_count_by_their_name():
    """An eager and a fused model of the same parts get the same count for each part, by the mode's own hooks."""
    torch.manual_seed(0)
    counts = []
    for kind in (fl, reference):
        model = torch.nn.Sequential(kind.ResidualMLP(4, 8), kind.LinearGELUResidual(4, 4))
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(5, 4)).sum().backward()
        counts.append({name: sum(of.values()) for name, of in counter.get_flop_counts().items()})
    fused, eager = counts
    assert {name: fused[name] for name in ("Global", "Sequential", "Sequential.1")} == {
        name: eager[name] for name in ("Global", "Sequential", "Sequential.1")
    }
