"""Hooks of autograd and of modules run as often, in the same order and with the same values as in eager.

The leaves of a fused node get their gradients in the order of its edges, which the engine's heap turns into eager's
order (`csrc/ops/autograd/edges.h`). The order may differ where one leaf serves several layers of one stack, or where
nodes of another branch of the graph are ready at the same moment. The number of calls and the values may not differ.
"""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlane_ext as fl
from fastlane_ext import reference

CREATE_GRAPH = "backward with create_graph=True"
BATCH = "a batch of gradients"


class Layer(nn.Module):
    """A function as a module: `run(kind, parameters, x)`."""

    def __init__(self, run, **shapes):
        super().__init__()
        self.run = run
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)))

    def forward(self, x):
        return self.run(self, x)


def layer(kind, *, bias=True, residual=None, activation="gelu", recompute=False, frozen=()):
    shapes = {"weight": (4, 4)} | ({"bias": (4,)} if bias else {}) | ({"residual": residual} if residual else {})

    def run(own, x):
        addend = getattr(own, "residual", None) if residual else x
        return kind.linear_gelu_residual(
            x, own.weight, getattr(own, "bias", None), addend, activation=activation, recompute=recompute
        )

    made = Layer(run, **shapes)
    for name in frozen:
        getattr(made, name).requires_grad_(False)
    return made


def concat(kind):
    return Layer(lambda own, x: kind.linear_gelu_concat(x, own.weight, own.bias), weight=(3, 4), bias=(3,))


def mlp(kind, *, bias=True, residual=None, recompute=False):
    shapes = {"fc1_weight": (5, 4), "fc2_weight": (4, 5)}
    shapes |= {"fc1_bias": (5,), "fc2_bias": (4,)} if bias else {}
    shapes |= {"residual": residual} if residual else {}

    def run(own, x):
        b1, b2 = (own.fc1_bias, own.fc2_bias) if bias else (None, None)
        addend = own.residual if residual else x
        return kind.mlp_residual(x, own.fc1_weight, b1, own.fc2_weight, b2, addend, recompute=recompute)

    return Layer(run, **shapes)


def stack(kind, *, shortcut, sizes=(4, 4, 3, 3), bias=True, recompute=False):
    shapes, fan_in = {}, sizes[0]
    for i, width in enumerate(sizes[1:]):
        shapes[f"weight{i}"] = (width, fan_in)
        if bias:
            shapes[f"bias{i}"] = (width,)
        if shortcut == "projection" and width != fan_in:
            shapes |= {f"projection{i}": (width, fan_in), f"projection_bias{i}": (width,)}
        fan_in = fan_in + width if shortcut == "concat" else width

    def run(own, x):
        lists = {
            name: [getattr(own, f"{name}{i}", None) for i in range(len(sizes) - 1)]
            for name in ("weight", "bias", "projection", "projection_bias")
        }
        extra = {}
        if shortcut == "projection":
            extra = {"projections": lists["projection"], "projection_biases": lists["projection_bias"]}
        return kind.residual_stack(x, lists["weight"], lists["bias"], shortcut=shortcut, recompute=recompute, **extra)

    return Layer(run, **shapes)


def module(name, *args, **options):
    def make(kind):
        torch.manual_seed(0)
        return getattr(kind, name)(*args, **options).double()

    return make


OPERATIONS = {
    "layer": layer,
    "layer, no bias": partial(layer, bias=False),
    "layer, no activation": partial(layer, activation="none"),
    "layer, residual": partial(layer, residual=(2, 3, 4)),
    "layer, broadcast residual": partial(layer, residual=(4,)),
    "layer, residual, no bias": partial(layer, residual=(1, 4), bias=False),
    "layer, recompute": partial(layer, recompute=True),
    "layer, frozen weight": partial(layer, frozen=("weight",), residual=(4,)),
    "layer, frozen bias": partial(layer, frozen=("bias",), residual=(4,)),
    "concat": concat,
    "mlp": mlp,
    "mlp, no biases": partial(mlp, bias=False),
    "mlp, residual": partial(mlp, residual=(4,)),
    "mlp, recompute": partial(mlp, recompute=True),
    **{f"stack, {s}": partial(stack, shortcut=s) for s in reference.SHORTCUTS},
    **{f"stack, {s}, no biases": partial(stack, shortcut=s, bias=False) for s in ("identity", "none")},
    "stack, one layer": partial(stack, shortcut="identity", sizes=(4, 4)),
    "stack, wide": partial(stack, shortcut="projection", sizes=(4, 1030, 3)),
    "stack, deep": partial(stack, shortcut="identity", sizes=(4,) * 12),
    "stack, recompute": partial(stack, shortcut="projection", recompute=True),
}
MODULES = {
    **{f"LinearGELUResidual, {s}": module("LinearGELUResidual", 4, 6, shortcut=s) for s in reference.SHORTCUTS},
    "LinearGELUResidual, square": module("LinearGELUResidual", 4, 4),
    "LinearGELUResidual, no bias": module("LinearGELUResidual", 4, 4, bias=False),
    "ResidualMLP": module("ResidualMLP", 4, 6),
    "ResidualMLP, no biases": module("ResidualMLP", 4, 6, bias=False),
    **{f"ResidualNetwork, {s}": module("ResidualNetwork", [4, 4, 6, 6], shortcut=s) for s in reference.SHORTCUTS},
    "ExampleDeepNeuralNetwork": module("ExampleDeepNeuralNetwork", [4, 4, 4, 1], True),
    "ImprovedResidualNetwork": module("ImprovedResidualNetwork", [4, 6, 6, 1], True),
    "DeepNeuralNet": module("DeepNeuralNet", True, [4, 4, 6, 6]),
}
CASES = OPERATIONS | MODULES

each_case = pytest.mark.parametrize("name", CASES)
each_case_and_shape = pytest.mark.parametrize(
    ("name", "shape"),
    [
        (name, shape)
        for shape in ((4,), (5, 4), (2, 3, 4))
        for name, make in CASES.items()
        if len(getattr(make, "keywords", {}).get("residual") or ()) <= len(shape)
    ],
    ids=str,
)


class Run:
    """A model with hooks wherever autograd takes them; `log` lists (which hook, value) in the order of the calls."""

    def __init__(self, kind, name, shape, *, leaf_x, scale=False, for_all=True, through=lambda call, x: call(x)):
        self.log = []
        self.model = CASES[name](kind)
        generator = torch.Generator().manual_seed(1)
        source = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        self.x = source if leaf_x else source * 1.5
        self.named = {"x": self.x, "source": source} | {
            n: p for n, p in self.model.named_parameters() if p.requires_grad
        }
        if not leaf_x:
            self.x.retain_grad()
        self.y = through(self.model, self.x)
        for tensor_name, tensor in {**self.named, "y": self.y}.items():
            if tensor_name == "source" and leaf_x:
                continue
            tensor.register_hook(partial(self.note, f"hook of {tensor_name}", scale))
            if tensor.is_leaf:
                tensor.register_post_accumulate_grad_hook(
                    lambda t, n=tensor_name: self.log.append((f"accumulated {n}", t.grad.detach().clone()))
                )
        self.y.retain_grad()
        self.leaves = [t for t in self.named.values() if t.is_leaf]
        if not for_all:  # torch refuses them with autograd.grad
            return
        torch.autograd.graph.register_multi_grad_hook(
            self.leaves,
            lambda gradients: self.log.append(("all", sum(0 if g is None else g.sum().detach() for g in gradients))),
        )
        torch.autograd.graph.register_multi_grad_hook(
            self.leaves, lambda g: self.log.append(("any", g.detach().clone())), mode="any"
        )

    def note(self, what, scale, grad):
        self.log.append((what, comparable(grad)))
        return grad / 2 if scale else None

    def retained(self):
        kept = {n: t.grad for n, t in {**self.named, "y": self.y}.items() if t.is_leaf or t.retains_grad}
        return {n: comparable(g) for n, g in kept.items() if g is not None}


def comparable(grad):
    """None for a batch of gradients, whose values are vmap's own."""
    return None if torch._C._functorch.is_legacy_batchedtensor(grad) else grad.detach().clone()


def assert_same(fused, eager, in_order=True):
    names = [what for what, _ in fused.log], [what for what, _ in eager.log]
    assert sorted(names[0]) == sorted(names[1])
    if in_order:
        assert names[0] == names[1]
    for (what, got), (_, want) in zip(sorted(fused.log, key=first), sorted(eager.log, key=first), strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10, msg=what)
    got, want = fused.retained(), eager.retained()
    assert got.keys() == want.keys()
    for name, value in got.items():
        if value is not None:
            torch.testing.assert_close(value, want[name], rtol=1e-9, atol=1e-10, msg=name)


def first(entry):
    return entry[0]


def both(name, shape, **options):
    return Run(fl, name, shape, **options), Run(reference, name, shape, **options)


@each_case_and_shape
@pytest.mark.parametrize("leaf_x", [True, False], ids=["leaf", "inner"])
@pytest.mark.parametrize("scale", [False, True], ids=["look", "halve"])
def test_backward(scale, leaf_x, shape, name):
    runs = both(name, shape, leaf_x=leaf_x, scale=scale)
    for run in runs:
        run.y.square().sum().backward()
        run.log.append(("again", torch.zeros(())))
    assert_same(*runs)


@pytest.mark.expects_fallback(CREATE_GRAPH)
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@each_case_and_shape
@pytest.mark.parametrize("leaf_x", [True, False], ids=["leaf", "inner"])
def test_backward_of_gradients(leaf_x, shape, name):
    """`backward(create_graph=True)`, and then what WGAN's penalty does: a backward of the gradients."""
    runs = both(name, shape, leaf_x=leaf_x, scale=True, for_all=False)
    for run in runs:
        gradients = torch.autograd.grad(run.y.square().sum(), run.leaves, create_graph=True)
        run.log.append(("gradients are there", torch.zeros(())))
        sum(g.square().sum() for g in gradients).backward()
    assert_same(*runs)
    runs = both(name, shape, leaf_x=leaf_x)
    for run in runs:
        run.y.square().sum().backward(create_graph=True)
    assert_same(*runs)


@each_case
def test_batches_of_gradients(name):
    runs = both(name, (2, 3, 4), leaf_x=False, for_all=False)
    results = []
    for run in runs:
        directions = torch.stack([torch.ones_like(run.y), torch.full_like(run.y, 2.0)])
        results.append(torch.autograd.grad(run.y, run.leaves, directions, is_grads_batched=True))
    assert_same(*runs)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    assert set(fl.stats()["fallback"]) <= {BATCH}
    fl.reset_stats()


@each_case
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, name):
    through = partial(checkpoint, use_reentrant=reentrant)
    runs = both(name, (2, 3, 4), leaf_x=False, through=through)
    for run in runs:
        run.y.square().sum().backward()
    assert_same(*runs)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("leaf_x", [True, False], ids=["leaf", "inner"])
def test_hooks_of_modules(leaf_x, name):
    """Full backward hooks and pre-hooks of the module itself: they see gradients and may replace them."""
    logs = []
    for kind in (fl, reference):
        model, log = MODULES[name](kind), []
        model.register_forward_pre_hook(lambda m, args, log=log: log.append(("forward pre", args[0].detach())))
        model.register_forward_hook(lambda m, args, y, log=log: log.append(("forward", y.detach())))

        def pre(m, grads, log=log):
            log.append(("backward pre", grads[0].detach()))
            return (grads[0] / 2,)

        def after(m, inputs, outputs, log=log):
            log.append(("backward", inputs[0].detach()))
            return (inputs[0] * 3,)

        model.register_full_backward_pre_hook(pre)
        model.register_full_backward_hook(after)
        source = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 4).requires_grad_()
        model(source if leaf_x else source * 2).square().sum().backward()
        log += [("source", source.grad), *((n, p.grad) for n, p in model.named_parameters())]
        logs.append(log)
    assert [what for what, _ in logs[0]] == [what for what, _ in logs[1]]
    for (what, got), (_, want) in zip(*logs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10, msg=what)


@pytest.mark.expects_fallback(CREATE_GRAPH)
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_a_halving_hook_halves_once():
    w, x = torch.randn(4, 4, requires_grad=True), torch.randn(2, 4)
    expected = torch.autograd.grad(reference.residual_stack(x, [w]).sum(), w)[0] / 2
    w.register_hook(lambda g: g / 2)
    fl.residual_stack(x, [w]).sum().backward(create_graph=True)
    torch.testing.assert_close(w.grad.detach(), expected)


def in_branches(kind, w, v, x):
    """Tied weights, and two branches whose nodes are ready together."""
    left = kind.residual_stack(x, [w, w, v], [v[0], v[0], v[1]])
    right = kind.linear_gelu_residual(kind.mlp_residual(x, w, None, v, w[0]), v, v[2], left)
    return left * right


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("create_graph", [False, pytest.param(True, marks=pytest.mark.expects_fallback(CREATE_GRAPH))])
def test_tied_leaves_and_branches(create_graph):
    logs = []
    for kind in (fl, reference):
        torch.manual_seed(0)
        tensors = [torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        log = []
        for name, t in zip("wvx", tensors, strict=True):
            t.register_hook(lambda g, name=name, log=log: log.append((name, g.detach().clone())) or g / 2)
            t.register_post_accumulate_grad_hook(
                lambda t, name=name, log=log: log.append((f"accumulated {name}", t.grad.detach().clone()))
            )
        in_branches(kind, *tensors).sum().backward(create_graph=create_graph)
        if create_graph:
            gradients = [t.grad for t in tensors]
            torch.autograd.backward([g.square().sum() for g in gradients])
        logs.append(sorted(log, key=first))
    assert [what for what, _ in logs[0]] == [what for what, _ in logs[1]]
    for (what, got), (_, want) in zip(*logs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=what)
