"""Every operation and module under every transform of torch.func and torch.autograd, against the eager ones."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from support.cases import random
from support.choices import ACTIVATIONS
from support.paths import PATH
from torch.func import functional_call, stack_module_state
from torch.utils._pytree import tree_leaves

import fastlane_ext as fl
from fastlane_ext import reference

FUNC = "a torch.func transform is active"
VMAP = "vmap over weight or bias"
FORWARD = "forward-mode AD"
CREATE_GRAPH = "backward with create_graph=True"
BATCH = "a batch of gradients"

SHORTCUTS = ("identity", "projection", "concat", "none")
exact = {"rtol": 1e-11, "atol": 1e-12}


# What is transformed: functions of x and the parameters, the same of fastlane_ext and of its eager reference


@dataclass
class Case:
    sizes: list  # of x, then of the parameters
    make: object  # (kind, activation) → function of as many tensors
    is_stack: bool = False

    def tensors(self):
        return [random(*size, seed=seed) for seed, size in enumerate(self.sizes)]


def layer(kind, activation):
    return lambda x, w, b: kind.linear_gelu_residual(x, w, b, x[..., :3], activation=activation)


def layer_and_residual(kind, activation):
    return lambda x, w, b, r: kind.linear_gelu_residual(x, w, b, r, activation=activation)


def concat(kind, activation):
    return lambda x, w, b: kind.linear_gelu_concat(x, w, b, activation=activation)


def mlp(kind, activation):
    return lambda x, *parameters: kind.mlp_residual(x, *parameters, x, activation=activation)


def stack(shortcut):
    def make(kind, activation):
        def call(x, w0, b0, w1, b1, *projection):
            options = {"shortcut": shortcut, "activation": activation}
            if projection:
                options |= {"projections": [None, projection[0]], "projection_biases": [None, projection[1]]}
            return kind.residual_stack(x, [w0, w1], [b0, b1], **options)

        return call

    fan_in = 8 if shortcut == "concat" else 4
    projection = [(3, 4), (3,)] if shortcut == "projection" else []
    return Case([(5, 4), (4, 4), (4,), (3, fan_in), (3,), *projection], make, is_stack=True)


def module(name, *args, **options):
    """A module with the given parameters, by functional_call."""

    def make(kind, activation):
        instance = getattr(kind, name)(*args, activation=activation, **options).double()
        names = [name for name, _ in instance.named_parameters()]
        return lambda x, *values: functional_call(instance, dict(zip(names, values, strict=True)), (x,))

    parameters = getattr(reference, name)(*args, **options).parameters()
    return Case([(5, 4), *(tuple(p.shape) for p in parameters)], make, is_stack=name == "ResidualNetwork")


OPERATIONS = {
    "linear_gelu_residual": Case([(5, 4), (3, 4), (3,)], layer),
    "linear_gelu_residual-row": Case([(2, 5, 4), (3, 4), (3,), (3,)], layer_and_residual),
    "linear_gelu_residual-scalar": Case([(2, 5, 4), (3, 4), (3,), (1,)], layer_and_residual),
    "linear_gelu_concat": Case([(5, 4), (3, 4), (3,)], concat),
    "mlp_residual": Case([(2, 5, 4), (6, 4), (6,), (4, 6), (4,)], mlp),
    **{f"residual_stack-{shortcut}": stack(shortcut) for shortcut in SHORTCUTS},
}
MODULES = {
    "LinearGELUResidual": module("LinearGELUResidual", 4, 3, shortcut="projection"),
    "ResidualMLP": module("ResidualMLP", 4, 6),
    "ResidualNetwork": module("ResidualNetwork", [4, 4, 3], shortcut="projection"),
}
CASES = OPERATIONS | MODULES
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def assert_as_eager(case, run, activation="gelu"):
    """run(function, *tensors) of the fused function equals that of the eager one. Returns why calls were composed."""
    fl.reset_stats()
    got = run(case.make(fl, activation), *case.tensors())
    reasons = set(fl.stats()["fallback"])
    assert reasons or fl.stats()[PATH]["forward"], "nothing ran"
    got, expected = tree_leaves(got), tree_leaves(run(case.make(reference, activation), *case.tensors()))
    assert got and any(t.abs().max() > 0 for t in got)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **exact)
    fl.reset_stats()
    return reasons


# Transforms


def scalar(f):
    return lambda *tensors: f(*tensors).square().sum()


def directions(tensors):
    return tuple(torch.cos(t) for t in tensors)


def every(tensors):
    return tuple(range(len(tensors)))


def vjp(f, *tensors):
    y, pull = torch.func.vjp(f, *tensors)
    return y, pull(torch.cos(y))


def grad_of_grad(f, *tensors):
    inner = torch.func.grad(scalar(f), every(tensors))
    return torch.func.grad(lambda *t: sum(g.square().sum() for g in inner(*t)), every(tensors))(*tensors)


def per_sample(f, x, *parameters):
    wrt = tuple(range(1, 1 + len(parameters)))
    return torch.vmap(torch.func.grad(scalar(f), wrt), (0, *[None] * len(parameters)))(x, *parameters)


def ensemble(f, x, *parameters):
    return torch.vmap(f, (None, *[0] * len(parameters)))(x, *(torch.stack([p, -p / 2]) for p in parameters))


def ensemble_of_gradients(f, x, *parameters):
    wrt = tuple(range(1, 1 + len(parameters)))
    many = [torch.stack([p, -p / 2]) for p in parameters]
    return torch.vmap(torch.func.grad(scalar(f), wrt), (None, *[0] * len(parameters)))(x, *many)


def batch_of(t, dim):
    return torch.stack([t, t.sin()], dim)


def vmap_over_x(dim):
    return lambda f, x, *parameters: torch.vmap(f, (dim, *[None] * len(parameters)), dim)(batch_of(x, dim), *parameters)


def vmap_over_x_and_parameters(f, *tensors):
    """x's batch comes first, each parameter's last."""
    return torch.vmap(f, (0, *[-1] * (len(tensors) - 1)))(*(batch_of(t, -1 if i else 0) for i, t in enumerate(tensors)))


def jvp_under_vmap(f, x, *parameters):
    xs = batch_of(x, 0)
    call = lambda x, t: torch.func.jvp(lambda x: f(x, *parameters), (x,), (t,))  # noqa: E731
    return torch.vmap(call)(xs, torch.cos(xs))


def vjp_under_vmap(f, *tensors):
    y, pull = torch.func.vjp(f, *tensors)
    return torch.vmap(pull)(torch.stack([torch.cos(y), torch.sin(y)]))


TRANSFORMS = {
    "vmap over x": (vmap_over_x(0), set()),
    "vmap over x, last dimension": (vmap_over_x(-1), set()),
    "functionalize": (lambda f, *t: torch.func.functionalize(f)(*t), set()),
    "ensemble": (ensemble, {VMAP}),
    "vmap over x and parameters": (vmap_over_x_and_parameters, {VMAP}),
    "grad": (lambda f, *t: torch.func.grad(scalar(f), every(t))(*t), {FUNC}),
    "grad of grad": (grad_of_grad, {FUNC}),
    "grad_and_value": (lambda f, *t: torch.func.grad_and_value(scalar(f), every(t))(*t), {FUNC}),
    "vjp": (vjp, {FUNC}),
    "vmap of vjp": (vjp_under_vmap, {FUNC}),
    "jvp": (lambda f, *t: torch.func.jvp(f, t, directions(t)), {FUNC}),
    "vmap of jvp": (jvp_under_vmap, {FUNC}),
    "jacrev": (lambda f, *t: torch.func.jacrev(f, every(t))(*t), {FUNC}),
    "jacrev in chunks": (lambda f, *t: torch.func.jacrev(f, every(t), chunk_size=2)(*t), {FUNC}),
    "jacfwd": (lambda f, *t: torch.func.jacfwd(f, every(t))(*t), {FUNC}),
    "hessian": (lambda f, *t: torch.func.hessian(scalar(f), every(t))(*t), {FUNC}),
    "per-sample gradients": (per_sample, {FUNC}),
    "ensemble of gradients": (ensemble_of_gradients, {FUNC}),
    "linearize": (lambda f, *t: torch.func.linearize(f, *t)[1](*directions(t)), {FORWARD}),
}


@each_case
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(transform, case):
    """Results are right; a transform that needs the eager composition is counted as a fallback."""
    run, reasons = TRANSFORMS[transform]
    assert assert_as_eager(case, run) == reasons


@pytest.mark.parametrize("case", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("activation", ["gelu_tanh", "none"])
@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "hessian", "per-sample gradients", "ensemble"])
def test_other_activations(transform, activation, case):
    run, reasons = TRANSFORMS[transform]
    assert assert_as_eager(case, run, activation) == reasons


# Forward mode


def dual(which):
    def run(f, *tensors):
        with fwAD.dual_level():
            duals = [fwAD.make_dual(t, torch.cos(t)) if i in which else t for i, t in enumerate(tensors)]
            return tuple(fwAD.unpack_dual(f(*duals)))

    return run


@each_case
def test_forward_mode(case):
    """A tangent for any one tensor, or for all tensors."""
    for activation in ACTIVATIONS:
        for which in [*((i,) for i in every(case.sizes)), every(case.sizes)]:
            assert assert_as_eager(case, dual(which), activation) == {FORWARD}


@each_case
def test_forward_mode_over_backward(case):
    """Forward mode through a recorded backward: a Hessian times a vector."""

    def run(f, *tensors):
        leaves = [t.requires_grad_() for t in tensors]
        with fwAD.dual_level():
            duals = [fwAD.make_dual(t, torch.cos(t.detach())) for t in leaves]
            gradients = torch.autograd.grad(f(*duals).square().sum(), duals, create_graph=True)
            return [fwAD.unpack_dual(g).tangent for g in gradients]

    assert assert_as_eager(case, run) == {FORWARD}


@pytest.mark.parametrize("case", OPERATIONS.values(), ids=OPERATIONS)
def test_gradcheck_of_forward_mode(case):
    leaves = [t.requires_grad_() for t in case.tensors()]
    assert torch.autograd.gradcheck(
        case.make(fl, "gelu"), leaves, check_forward_ad=True, check_backward_ad=False, fast_mode=True
    )
    assert set(fl.stats()["fallback"]) == {FORWARD}
    fl.reset_stats()


# torch.autograd.functional, the older interface, and batches of cotangents: they meet our node, not functorch


def jacobian(**options):
    return lambda f, *t: torch.autograd.functional.jacobian(f, t, **options)


def hessian(**options):
    return lambda f, *t: torch.autograd.functional.hessian(scalar(f), t, **options)


def batched_cotangents(f, *tensors):
    leaves = [t.requires_grad_() for t in tensors]
    y = f(*leaves)
    return torch.autograd.grad(y, leaves, random(7, *y.shape, seed=3), is_grads_batched=True)


OLDER = {
    "jacobian": (jacobian(), set()),
    "jacobian, vectorised": (jacobian(vectorize=True), {BATCH}),
    "jacobian, forward mode": (jacobian(strategy="forward-mode", vectorize=True), {FORWARD}),
    "hessian": (hessian(), {CREATE_GRAPH}),
    "hessian, vectorised": (hessian(vectorize=True), {CREATE_GRAPH, BATCH}),
    "hessian, forward mode": (hessian(vectorize=True, outer_jacobian_strategy="forward-mode"), {FORWARD}),
    "vhp": (lambda f, *t: torch.autograd.functional.vhp(scalar(f), t, directions(t)), {CREATE_GRAPH}),
    "hvp": (lambda f, *t: torch.autograd.functional.hvp(scalar(f), t, directions(t)), {CREATE_GRAPH}),
    "jvp": (lambda f, *t: torch.autograd.functional.jvp(f, t, directions(t)), {CREATE_GRAPH}),
    "vjp": (lambda f, *t: torch.autograd.functional.vjp(f, t, torch.cos(f(*t))), set()),
    "is_grads_batched": (batched_cotangents, {BATCH}),
}


@each_case
@pytest.mark.parametrize("transform", OLDER)
def test_torch_autograd_functional(transform, case):
    run, reasons = OLDER[transform]
    # A list of gradients is what torch's older vmap has no rule for; others it takes one by one.
    expected = reasons if case.is_stack else reasons - {BATCH}
    assert assert_as_eager(case, run) == expected


# Ensembles of modules


ENSEMBLES = {"LinearGELUResidual": (4, 4), "ResidualMLP": (4, 6), "ResidualNetwork": ([4, 4, 4],)}


@pytest.mark.parametrize("each_its_own_x", [False, True])
@pytest.mark.parametrize("name", ENSEMBLES)
def test_ensemble_of_modules(name, each_its_own_x):
    """torch.func's recipe: the stacked states of three modules, one module without data to run them all, training."""
    args = ENSEMBLES[name]
    x = random(*([3] if each_its_own_x else []), 5, 4)
    results = []
    for kind in (fl, reference):
        torch.manual_seed(0)
        modules = [getattr(kind, name)(*args).double() for _ in range(3)]
        state = stack_module_state(modules)
        empty = copy.deepcopy(modules[0]).to("meta")
        run = lambda *state_and_x, empty=empty: functional_call(empty, state_and_x[:2], state_and_x[2])  # noqa: E731
        y = torch.vmap(run, (0, 0, 0 if each_its_own_x else None))(*state, x)
        for i, one in enumerate(modules):
            torch.testing.assert_close(y[i], one(x[i] if each_its_own_x else x), **exact)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(state[0].values()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **exact)
    assert set(fl.stats()["fallback"]) == {VMAP}
    fl.reset_stats()
