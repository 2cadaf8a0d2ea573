"""The whole network as one operation: one node forward, one backward, whatever the shortcut."""

import itertools

import numpy as np
import pytest
import torch
from support.choices import ACTIVATIONS, dtype_name
from support.oracle import activation_and_slope

import fastlane_ext as fl
from fastlane_ext import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHORTCUTS = ("identity", "projection", "concat", "none")
# Equal and mixed widths, one layer, and layers too wide for a block of rows to carry through.
SIZES = {
    "equal": (64, 64, 64, 64),
    "mixed": (5, 17, 17, 33, 7),
    "tiny": (3, 3, 3, 1),
    "one layer": (20, 20),
    "wide": (300, 700, 700, 40),
}
CREATE_GRAPH = "backward with create_graph=True"
BATCH = "a batch of gradients"

each_shortcut = pytest.mark.parametrize("shortcut", SHORTCUTS)


class Network:
    """A stack's parameters as leaves, and the call that runs it."""

    def __init__(self, sizes, shortcut, *, dtype=torch.float64, bias=True, activation="gelu", seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()

        self.shortcut, self.activation, self.random = shortcut, activation, random
        self.weights, self.biases, self.projections, self.projection_biases = [], [], [], []
        fan_in = sizes[0]
        for width in sizes[1:]:
            projected = shortcut == "projection" and fan_in != width
            self.weights.append(random(width, fan_in, scale=max(1, fan_in) ** -0.5))
            self.biases.append(random(width) if bias else None)
            self.projections.append(random(width, fan_in, scale=max(1, fan_in) ** -0.5) if projected else None)
            self.projection_biases.append(random(width) if projected and bias else None)
            fan_in = fan_in + width if shortcut == "concat" else width
        self.out_features = fan_in

    @property
    def lists(self):
        return [self.weights, self.biases, self.projections, self.projection_biases]

    @property
    def parameters(self):
        return [t for tensors in self.lists for t in tensors if t is not None]

    def run(self, x, kind=fl, lists=None, **options):
        weights, biases, projections, projection_biases = lists or self.lists
        if self.shortcut == "projection":
            options |= {"projections": projections, "projection_biases": projection_biases}
        return kind.residual_stack(x, weights, biases, shortcut=self.shortcut, activation=self.activation, **options)

    def results(self, x, dy, kind=fl, double=False, **options):
        """The output and every gradient; with ``double`` in float64."""
        move = (lambda t: t.detach().double().requires_grad_()) if double else (lambda t: t)
        lists = [[t if t is None else move(t) for t in tensors] for tensors in self.lists]
        x = move(x)
        y = self.run(x, kind, lists, **options)
        leaves = [x, *(t for tensors in lists for t in tensors if t is not None)]
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.double() if double else dy)]


def draw(network, shape, sizes):
    return network.random(*shape, sizes[0]), network.random(*shape, network.out_features).detach()


@each_shortcut
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients(sizes, activation, bias, shortcut, assert_fused):
    network = Network(sizes, shortcut, bias=bias, activation=activation)
    for shape in [(1,), (2, 3, 5), (130,), (0,), ()]:
        x, dy = draw(network, shape, sizes)
        for got, expected in zip(network.results(x, dy), network.results(x, dy, reference), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    assert_fused(forward=5, backward=5)


@each_shortcut
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("sizes", [SIZES["equal"], SIZES["mixed"]], ids=["equal", "mixed"])
def test_never_less_exact_than_eager(sizes, dtype, shortcut):
    networks = [Network(sizes, shortcut, dtype=dtype, seed=seed) for seed in range(5)]
    assert_as_exact_as_eager((n, *draw(n, (r,), sizes)) for n, r in zip(networks, (1, 7, 48, 100, 500), strict=True))


def assert_as_exact_as_eager(runs):
    """The rule of exactness.py for the largest error of the output and of each gradient over all (network, x, dy)."""
    fused, eager, scale = {}, {}, {}
    for network, x, dy in runs:
        exact = network.results(x, dy, reference, double=True)
        for errors, kind in ((fused, fl), (eager, reference)):
            for i, (got, want) in enumerate(zip(network.results(x, dy, kind), exact, strict=True)):
                assert got.dtype == x.dtype and got.isfinite().all()
                errors[i] = max(errors.get(i, 0.0), (got.double() - want).abs().max().item())
                scale[i] = max(scale.get(i, 0.0), want.abs().max().item())
    for i, error in fused.items():
        assert error <= 2 * eager[i] + 2 * torch.finfo(x.dtype).eps * scale[i], (i, error, eager[i], scale[i])


def results_in_long_double(network, x, dy):
    """The results of `Network.results` in long double, for layers of one width, where a projection is the identity."""
    wide = lambda t: t.detach().double().numpy().astype(np.longdouble)  # noqa: E731
    concat, adds = network.shortcut == "concat", network.shortcut in ("identity", "projection")
    h, slopes, inputs = wide(x), [], []
    weights = [wide(w) for w in network.weights]
    for weight, bias in zip(weights, network.biases, strict=True):
        inputs.append(h)
        activated, slope = activation_and_slope(h @ weight.T + (0 if bias is None else wide(bias)), network.activation)
        slopes.append(slope)
        h = np.concatenate([h, activated], 1) if concat else activated + h if adds else activated
    y, grad, of_weights, of_biases = h, wide(dy), [], []
    for weight, slope, h in zip(weights[::-1], slopes[::-1], inputs[::-1], strict=True):
        dz = grad[:, -len(weight) :] * slope
        of_weights.insert(0, dz.T @ h)
        of_biases.insert(0, dz.sum(0))
        through = grad[:, : h.shape[1]] if concat else grad if adds else 0
        grad = dz @ weight + through
    return [y, grad, *of_weights, *(of_biases if network.biases[0] is not None else [])]


def pooled_error(results, exact):
    """The root mean square, over the output and all gradients, of the largest error in units of the last place."""
    eps = torch.finfo(results[0].dtype).eps
    as_array = lambda t: t.detach().double().cpu().numpy() if isinstance(t, torch.Tensor) else t  # noqa: E731
    exact = [as_array(t) for t in exact]
    errors = [np.abs(as_array(a) - b).max() / np.abs(b).max() for a, b in zip(results, exact, strict=True)]
    return float(np.sqrt(np.square(errors).mean())) / eps


@each_shortcut
@pytest.mark.parametrize("bias", [True, False])
def test_a_hundred_layers(bias, shortcut):
    """Inputs restored from the zs lose no accuracy, by exactness.py's rule, pooled over all gradients.

    So many layers magnify some roundings and not others. One network's ratio to eager is luck; the mean of six is not.
    """
    width = 4 if shortcut == "concat" else 32
    sizes = (width,) * 101
    gain = 1.2 if shortcut == "none" else 0.2  # so that values stay within float32's range, and roundings near them
    for dtype in (torch.float32, torch.float64):
        ratios = []
        for seed in range(6):
            network = Network(sizes, shortcut, dtype=dtype, bias=bias, seed=seed)
            for weight in network.weights:
                weight.data.mul_(gain)
            x, dy = draw(network, (70,), sizes)
            exact = results_in_long_double(network, x, dy)
            fused, eager = (pooled_error(network.results(x, dy, kind), exact) for kind in (fl, reference))
            ratios.append(fused / (eager + 0.5))
        assert np.exp(np.log(ratios).mean()) <= 2, (dtype, ratios)


@pytest.mark.own_product
@each_shortcut
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("rows", [3, 50, 1000])
def test_same_bits_for_any_number_of_threads(rows, dtype, shortcut, restore_threads):
    sizes = SIZES["mixed"]
    network = Network(sizes, shortcut, dtype=dtype)
    x, dy = draw(network, (rows,), sizes)
    torch.set_num_threads(1)
    expected = network.results(x, dy)
    for threads in (2, 3, 4, 2):
        torch.set_num_threads(threads)
        for got, want in zip(network.results(x, dy), expected, strict=True):
            assert torch.equal(got, want), threads


@pytest.mark.own_product
def test_rows_have_the_same_bits_in_any_batch():
    """Up to 16 rows and above 24 rows: for most types the change from inner products to tiles lies in between."""
    sizes = SIZES["mixed"]
    network = Network(sizes, "identity", dtype=torch.float32)
    x, _ = draw(network, (1000,), sizes)
    with torch.no_grad():
        assert torch.equal(network.run(x[100:125]), network.run(x)[100:125])
        assert torch.equal(network.run(x[100:101]), network.run(x[90:106])[10:11])


@pytest.mark.own_product
@pytest.mark.parametrize("rows", [5, 40])
def test_a_denormal_weight_is_kept(rows):
    """bf16's own instruction takes a denormal for zero, in inner products of few rows and in tiles."""
    tiny = torch.finfo(torch.bfloat16).smallest_normal / 4
    weights = [torch.eye(35, dtype=torch.bfloat16) for _ in range(3)]
    weights[1][4, 4] = tiny
    x = torch.ones(rows, 35, dtype=torch.bfloat16)
    y = fl.residual_stack(x, weights, [None] * 3, shortcut="none", activation="none")
    expected = x.clone()
    expected[:, 4] = tiny
    assert torch.equal(y, expected)


SUBSETS = list(itertools.product([False, True], repeat=5))


@each_shortcut
@pytest.mark.parametrize("sizes", [(6, 6, 4, 4), (300, 700, 40)], ids=["narrow", "wide"])
def test_subsets_of_needed_gradients(sizes, shortcut, assert_fused):
    network = Network(sizes, shortcut)
    x, dy = draw(network, (5,), sizes)
    expected = dict(zip(["x", *map(id, network.parameters)], network.results(x, dy)[1:], strict=True))
    calls = 1
    for subset in SUBSETS:
        lists = [
            [None if t is None else t.detach().requires_grad_(on and i > 0) for i, t in enumerate(tensors)]
            for tensors, on in zip(network.lists, subset[1:], strict=True)
        ]
        leaf = x.detach().requires_grad_(subset[0])
        y = network.run(leaf, lists=lists)
        needed = [("x", leaf)] * subset[0] + [
            (id(t), own)
            for tensors, owns in zip(network.lists, lists, strict=True)
            for t, own in zip(tensors, owns, strict=True)
            if own is not None and own.requires_grad
        ]
        assert y.requires_grad == bool(needed)
        if needed:
            calls += 1
            for (name, _), got in zip(needed, torch.autograd.grad(y, [t for _, t in needed], dy), strict=True):
                torch.testing.assert_close(got, expected[name], rtol=1e-11, atol=1e-12)
    assert_fused(forward=None, backward=calls)


@each_shortcut
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias, activation, shortcut):
    network = Network((3, 3, 2, 2), shortcut, bias=bias, activation=activation)
    x, _ = draw(network, (2,), (3,))
    assert torch.autograd.gradcheck(lambda x, *_: network.run(x), [x, *network.parameters])


@pytest.mark.expects_fallback(CREATE_GRAPH)
@each_shortcut
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_gradgradcheck(bias, activation, shortcut):
    network = Network((2, 2, 3), shortcut, bias=bias, activation=activation)
    x, _ = draw(network, (2,), (2,))
    assert torch.autograd.gradgradcheck(lambda x, *_: network.run(x), [x, *network.parameters])


@pytest.mark.own_kernels
@each_shortcut
def test_recompute_gives_equal_bits_and_keeps_less(shortcut):
    sizes = SIZES["mixed"]
    network = Network(sizes, shortcut, dtype=torch.float32)
    x, dy = draw(network, (30,), sizes)
    for again, saved in zip(network.results(x, dy, recompute=True), network.results(x, dy), strict=True):
        assert torch.equal(again, saved)
    with_z, without = (held_bytes(lambda r=r: network.run(x, recompute=r)) for r in (False, True))
    biases = sum(t.nbytes for t in network.biases)  # read to compute z
    assert with_z - without == 30 * sum(sizes[1:]) * 4 - biases


def held_bytes(call):
    """Bytes that autograd saves during ``call``; each storage counts once."""
    held = {}

    def pack(t):
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(held.values())


@pytest.mark.own_product
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_many_pre_activations_are_computed_again(dtype):
    """Beyond 32 MiB of pre-activations only x and the parameters are kept; the results are as exact."""
    sizes = (16,) * 9
    row_bytes = 16 * dtype.itemsize
    network = Network(sizes, "identity", dtype=dtype)
    x, dy = draw(network, ((33 << 20) // (8 * row_bytes),), sizes)
    parameters = sum(t.nbytes for t in network.parameters)
    assert held_bytes(lambda: network.run(x)) == x.nbytes + parameters
    few = x[:1000].detach().clone().requires_grad_()
    weights = sum(t.nbytes for t in network.weights)
    assert held_bytes(lambda: network.run(few)) == 1000 * row_bytes * 9 + weights
    exact = network.results(x, dy, reference, double=True)
    eager = pooled_error(network.results(x, dy, reference), exact)
    assert pooled_error(network.results(x, dy), exact) <= 1.5 * eager + 1


@each_shortcut
@pytest.mark.parametrize("rows", [0, 1, 16, 17])
def test_layers_without_outputs(rows, shortcut):
    sizes = (3, 0, 4)
    network = Network(sizes, shortcut)
    x, dy = draw(network, (rows,), sizes)
    for got, want in zip(network.results(x, dy), network.results(x, dy, reference), strict=True):
        assert got.shape == want.shape and torch.allclose(got, want)


@pytest.mark.own_kernels
@pytest.mark.expects_fallback(BATCH)
@each_shortcut
def test_batches_of_gradients(shortcut):
    sizes = SIZES["mixed"]
    network = Network(sizes, shortcut)
    x, dy = draw(network, (5,), sizes)
    y = network.run(x)
    leaves = [x, *network.parameters]
    directions = torch.stack([dy, -dy, dy * dy])
    expected = [torch.autograd.grad(y, leaves, d, retain_graph=True) for d in directions]
    together = torch.autograd.grad(y, leaves, directions, retain_graph=True, is_grads_batched=True)
    mapped = torch.func.vmap(lambda d: torch.autograd.grad(y, leaves, d, retain_graph=True))(directions)
    for index, gradients in enumerate(expected):
        for got, again, want in zip(together, mapped, gradients, strict=True):
            assert torch.equal(again[index], want)
            torch.testing.assert_close(got[index], want)


@pytest.mark.own_kernels
def test_half_of_eagers_bytes():
    network = Network((64,) * 17, "identity", dtype=torch.float32)
    x, _ = draw(network, (4096,), (64,))
    parameters = sum(t.nbytes for t in network.weights)
    fused, eager = (held_bytes(lambda kind=kind: network.run(x, kind)) - parameters for kind in (fl, reference))
    assert fused <= 0.55 * eager


def test_layouts_of_operands(assert_fused):
    """Column-major weights, strided biases, x and dy in any layout; gradients have their tensors' layouts."""
    network = Network((16, 16, 24), "projection", dtype=torch.float32)
    x, dy = draw(network, (3, 7), (16,))
    expected = network.results(x, dy)
    network.weights = [w.detach().t().contiguous().t().requires_grad_() for w in network.weights]
    network.biases = [torch.stack([b.detach()] * 2, 1)[:, 0].requires_grad_() for b in network.biases]
    x = x.detach().permute(1, 0, 2).contiguous().permute(1, 0, 2).mT.contiguous().mT.requires_grad_()
    got = network.results(x, dy.mT.contiguous().mT)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert all(g.stride() == w.stride() for g, w in zip(got[2:4], network.weights, strict=True))
    assert_fused(forward=2, backward=2)


@each_shortcut
def test_opcheck(shortcut):
    network = Network((4, 4, 3), shortcut, dtype=torch.float32)
    x, _ = draw(network, (5,), (4,))
    options = {"shortcut": shortcut, "activation": "gelu"}
    torch.library.opcheck(torch.ops.fastlane.residual_stack.default, (x, *network.lists), options)
    with torch.no_grad():
        torch.library.opcheck(torch.ops.fastlane.residual_stack_forward.default, (x, *network.lists), options)


@each_shortcut
def test_transforms(shortcut):
    network = Network((4, 4, 3), shortcut)
    x, _ = draw(network, (6, 5), (4,))
    assert torch.equal(torch.vmap(network.run)(x.detach()), network.run(x).detach())


@pytest.mark.parametrize("shortcut", ["identity", "none", "concat"])
def test_autocast(shortcut):
    network = Network((8, 8, 8), shortcut, dtype=torch.float32)
    x, _ = draw(network, (5,), (8,))
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = network.run(x), network.run(x, reference)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


W = torch.zeros(3, 3)
BAD = {
    "weights: got an empty list": lambda: fl.residual_stack(W, []),
    r"weights\[0\]: got a list": lambda: fl.residual_stack(W, [[1.0]]),
    r"weights\[1\] has shape \[3, 4\]": lambda: fl.residual_stack(W, [W, torch.zeros(3, 4)]),
    r"weights\[0\] has dtype Double": lambda: fl.residual_stack(W, [W.double()]),
    r"biases: got 1 entries, expected 2": lambda: fl.residual_stack(W, [W, W], [None]),
    r"biases\[0\] has shape \[4\]": lambda: fl.residual_stack(W, [W], [torch.zeros(4)]),
    r"biases\[0\]: got a float": lambda: fl.residual_stack(W, [W], [1.0]),
    "biases: got a Tensor": lambda: fl.residual_stack(W, [W], torch.zeros(3)),
    r"projections\[0\]: got None": lambda: fl.residual_stack(W, [torch.zeros(4, 3)], shortcut="projection"),
    r"projections\[0\] has shape \[3, 3\]": lambda: fl.residual_stack(
        W, [torch.zeros(4, 3)], shortcut="projection", projections=[W]
    ),
    r"projection_biases\[0\]: got a tensor": lambda: fl.residual_stack(
        W, [W], shortcut="projection", projection_biases=[torch.zeros(3)]
    ),
    "projections: got tensors, expected None": lambda: fl.residual_stack(W, [W], projections=[W]),
    "shortcut: got 'skip'": lambda: fl.residual_stack(W, [W], shortcut="skip"),
    "activation: got 'relu'": lambda: fl.residual_stack(W, [W], activation="relu"),
    "x has dtype Long": lambda: fl.residual_stack(W.long(), [W]),
    r"weights\[0\] has shape \[\]": lambda: fl.residual_stack(W, [torch.tensor(1.0, requires_grad=True)]),
    r"weights\[1\] has layout Sparse": lambda: fl.residual_stack(W, [W, W.to_sparse()]),
    r"biases\[0\] has layout Sparse": lambda: fl.residual_stack(W, [W], [W[0].to_sparse()]),
    "needed has 0, expected rising": lambda: torch.ops.fastlane.residual_stack_backward(
        W, W, [W], [], [], [], shortcut="none", activation="gelu", features=[3, 3], needed=[0, 0], column_major=[]
    ),
    "x is 0-D": lambda: fl.residual_stack(W[0, 0], [W]),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_are_one_line(message):
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message) as error:
        BAD[message]()
    assert len(str(error.value).splitlines()) == 1
