"""The tensors that a stack keeps for backward, and the tensors that may change between forward and backward."""

import numpy as np
import pytest
import torch
from support.choices import ACTIVATIONS
from support.subprocesses import run_python
from test_stack import SHORTCUTS, Network, draw, held_bytes

import fastlane_ext as fl
from fastlane_ext import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# A stack that one kernel takes as a whole, with square layers and others, and one that goes layer by layer.
SIZES = {"narrow": (4, 4, 3, 3), "wide": (3, 1030, 3, 3)}
LISTS = ("weight", "bias", "projection", "projection_bias")
# Names are as in LISTS, with the layer behind: which need a gradient.
NEEDED = {
    "all": lambda name: True,
    "x": lambda name: name == "x",
    "parameters": lambda name: name != "x",
    "weights": lambda name: name.startswith("weight"),
    "biases": lambda name: name.startswith("bias"),
    "projections": lambda name: name.startswith("projection"),
    "first layer frozen": lambda name: name != "x" and not name.endswith("0"),
    "last layer alone": lambda name: name.endswith("2"),
    "last bias alone": lambda name: name == "bias2",
    "middle layer alone": lambda name: name.endswith("1"),
    "x and the last weight": lambda name: name in ("x", "weight2"),
}

each_shortcut = pytest.mark.parametrize("shortcut", SHORTCUTS)
each_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
with_and_without_recompute = pytest.mark.parametrize("recompute", [False, True])


class Call:
    """One forward of a stack with tensors of its own, by name."""

    def __init__(self, network, x, needs, kind, **options):
        self.tensors = {"x": x.detach().clone()}
        lists = []
        for name, tensors in zip(LISTS, network.lists, strict=True):
            lists.append([None if t is None else t.detach().clone() for t in tensors])
            self.tensors |= {f"{name}{i}": t for i, t in enumerate(lists[-1]) if t is not None}
        for name, tensor in self.tensors.items():
            tensor.requires_grad_(needs(name))
        self.leaves = [t for t in self.tensors.values() if t.requires_grad]
        if kind is reference:
            options.pop("recompute", None)
        self.y = network.run(self.tensors["x"], kind, lists, **options)

    def gradients(self, dy):
        return torch.autograd.grad(self.y, self.leaves, dy)


def may_be_read_again(name, needs, network, recompute):
    """The tensors that the docstring of `residual_stack` names as read again."""
    if recompute:
        return True
    layers = len(network.weights)
    later = {
        i
        for i in range(layers)
        if needs(f"weight{i}") or (needs(f"projection{i}") and network.projections[i] is not None)
    }
    if name == "x":
        return network.shortcut != "none" and bool(later)
    if name.startswith("projection"):
        return any(i > int(name[-1]) for i in later)
    return False


def changes(tensor):
    """Changes in place, which torch notices, and unnoticed ones, as when memory is filled with the next observation."""
    with torch.no_grad():
        tensor.add_(1)


def refills(tensor):
    tensor.detach().numpy()[...] = 7


@each_shortcut
@each_size
@each_activation
@with_and_without_recompute
@pytest.mark.parametrize("change", [changes, refills], ids=["in place", "refilled"])
def test_changes_between_forward_and_backward(change, recompute, activation, sizes, shortcut):
    """An error, or other gradients, only where eager has them or the docstring says that the tensor is read again."""
    network = Network(sizes, shortcut, activation=activation)
    x, dy = draw(network, (5,), sizes)
    for needs in NEEDED.values():
        whole = Call(network, x, needs, reference)
        if not whole.leaves:
            continue
        expected = whole.gradients(dy)
        for name in whole.tensors:
            outcomes = []
            for kind in (fl, reference):
                call = Call(network, x, needs, kind, recompute=recompute)
                change(call.tensors[name])
                try:
                    got = call.gradients(dy)
                    outcomes.append(
                        all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(got, expected, strict=True))
                    )
                except RuntimeError as error:
                    assert "modified by an inplace operation" in str(error)
                    outcomes.append(False)
            right, eagers_right = outcomes
            assert right or not eagers_right or may_be_read_again(name, needs, network, recompute), name
            if change is changes and not right:
                # It was an error then, never a wrong gradient.
                call = Call(network, x, needs, fl, recompute=recompute)
                change(call.tensors[name])
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    call.gradients(dy)


def saved_of(network, x, needs, **options):
    """Names of the tensors that autograd keeps; a tensor that is not the call's own is z."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call = Call(network, x, needs, fl, **options)
    names = {t.data_ptr(): name for name, t in call.tensors.items()}
    return {names.get(t.data_ptr(), "z") for t in kept}


EXPECTED = {
    # With needs, shortcut and recompute: exactly this is kept.
    ("biases", "identity", False): {"z", "weight1", "weight2"},
    ("biases", "none", False): {"z", "weight1", "weight2"},
    ("biases", "projection", False): {"z", "weight1", "weight2", "projection1"},
    ("last bias alone", "identity", False): {"z"},
    ("last layer alone", "none", False): {"z"},
    ("last layer alone", "identity", False): {"z"},
    ("last layer alone", "concat", False): {"z", "x"},
    ("parameters", "none", False): {"z", "x", "weight1", "weight2"},
    ("x", "identity", False): {"z", "weight0", "weight1", "weight2"},
    ("x", "projection", False): {"z", "weight0", "weight1", "weight2", "projection1"},
    ("last layer alone", "projection", False): {"z", "x", "projection1", "projection_bias1"},
    ("first layer frozen", "identity", False): {"z", "x", "weight2"},
    ("first layer frozen", "none", True): {"x", "weight0", "bias0", "weight1", "bias1", "weight2", "bias2"},
}


@each_size
@pytest.mark.parametrize("case", EXPECTED, ids=str)
def test_saved_is_what_backward_reads(case, sizes):
    needs, shortcut, recompute = case
    if sizes == SIZES["wide"]:
        pytest.skip("its square layers are others")
    network = Network(sizes, shortcut)
    x, _ = draw(network, (5,), sizes)
    assert saved_of(network, x, NEEDED[needs], recompute=recompute) == EXPECTED[case]


@each_shortcut
@each_size
def test_without_an_activation_z_is_kept_for_weights_alone(sizes, shortcut):
    network = Network(sizes, shortcut, activation="none")
    x, _ = draw(network, (5,), sizes)
    assert "z" not in saved_of(network, x, NEEDED["biases"])
    assert "z" not in saved_of(network, x, NEEDED["x"])
    assert "z" in saved_of(network, x, NEEDED["weights"])


@pytest.mark.expects_fallback("backward with create_graph=True")
@each_shortcut
@with_and_without_recompute
@pytest.mark.parametrize("rows", [(5,), (2, 3), ()], ids=str)
def test_second_derivatives_of_every_subset(rows, recompute, shortcut):
    """Second derivatives reach tensors that were not kept through z, and equal eager's."""
    network = Network(SIZES["narrow"], shortcut)
    x, dy = draw(network, rows, SIZES["narrow"])
    for needs in NEEDED.values():
        results = []
        for kind in (fl, reference):
            call = Call(network, x, needs, kind, recompute=recompute)
            if not call.leaves:
                break
            first = torch.autograd.grad(call.y, call.leaves, dy, create_graph=True)
            total = sum((g * g).sum() for g in first)
            if not total.requires_grad:
                break
            second = torch.autograd.grad(total, call.leaves, allow_unused=True, materialize_grads=True)
            results.append([*first, *second])
        for got, want in zip(*results, strict=True) if results else ():
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.own_product
def test_beyond_the_bound_everything_is_read_again():
    """Where no z is kept, x and all parameters are kept, biases too."""
    sizes = (16,) * 9
    network = Network(sizes, "none", dtype=torch.float32)
    x, _ = draw(network, ((33 << 20) // (8 * 64),), sizes)
    parameters = sum(t.nbytes for t in network.parameters)
    assert held_bytes(lambda: network.run(x.detach())) == x.nbytes + parameters


@pytest.mark.parametrize("rows", [0, 5])
def test_absent_tensors_of_the_operator(rows):
    """A tensor that is not read may be absent; if a tensor that is read is absent, the error names it."""
    w, grad = torch.randn(3, 3), torch.randn(rows, 3)
    z = torch.randn(rows * 6)
    options = {"features": [3, 3, 3], "shortcut": "none", "activation": "gelu", "column_major": []}
    backward = torch.ops.fastlane.residual_stack_backward
    (db,) = backward(grad, None, [None, None], [], [], [], z, needed=[4], **options)
    assert db.shape == (3,)
    for needed, given, missing in (
        ([0], [None, w], r"weights\[0\]"),
        ([3], [w, None], r"weights\[1\]"),
        ([1], [None, w], "x"),
    ):
        with pytest.raises(RuntimeError, match=f"^residual_stack_backward: {missing} is missing, expected") as error:
            backward(grad, None, given, [], [], [], z, needed=needed, **options)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.any_isa
def test_work_memory_is_bounded():
    """Column sums of many rows and layers; no weight's sums limit the number of chunks of rows here."""
    grown = run_python("""
import json, re, torch, fastlane_ext as fl
# getrusage would begin with the peak of the process that started this one.
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) >> 10
sizes = (1, 512) * 20 + (1,)
weights = [torch.randn(b, a) / 30 for a, b in zip(sizes, sizes[1:])]
biases = [torch.zeros(b, requires_grad=True) for b in sizes[1:]]
def backward(rows):
    y = fl.residual_stack(torch.ones(rows, 1), weights, biases, shortcut="none", activation="none")
    torch.autograd.grad(y, biases, torch.ones_like(y))
backward(1000)
before = peak()
backward(1 << 17)
print(json.dumps(peak() - before))
""")
    assert grown < 48  # MiB; 84 of column sums without the bound


def test_refilled_memory_of_a_frozen_first_layer():
    """Without shortcuts, backward reads only the pre-activations behind the first layer."""

    def gradient(kind):
        torch.manual_seed(0)
        net = kind([8, 8, 8], shortcut="none")
        net.layers[0].requires_grad_(False)
        memory = np.ones((2, 8), dtype=np.float32)
        y = net(torch.from_numpy(memory))
        memory[:] = 0
        with torch.no_grad():
            for parameter in net.layers[0].parameters():
                parameter.add_(1)
        y.sum().backward()
        return net.layers[1][0].weight.grad

    torch.testing.assert_close(gradient(fl.ResidualNetwork), gradient(reference.ResidualNetwork))
