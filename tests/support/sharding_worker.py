"""One of the processes of test_sharding.py: tensor parallelism against one process, forward and backward."""

import copy
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastlane_ext as fl
from support.nanogpt import NanoGpt
from support.subprocesses import run_scenarios

exact = {"rtol": 1e-9, "atol": 1e-12}
SCENARIOS = {}
COMPOSED = "a DTensor"


def scenario(function, *args, name=None):
    SCENARIOS[name or function.__name__] = lambda: function(*args)
    return function


def mesh():
    return dist.init_device_mesh("cpu", (dist.get_world_size(),))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(x, w, b, r, v, p):
    return fl.linear_gelu_residual(x, w, b, r)


# operands: x, weight, bias, residual; a second weight (in, hidden) and its bias
OPS = {
    "layer": layer,
    "layer, identity": lambda x, w, b, r, v, p: fl.linear_gelu_residual(x, w, b, x, activation="gelu_tanh"),
    "product": lambda x, w, b, r, v, p: fl.linear_gelu_residual(x, w, activation="none"),
    "concat": lambda x, w, b, r, v, p: fl.linear_gelu_concat(x, w, b),
    "stack": lambda x, w, b, r, v, p: fl.residual_stack(x, [w, v], [b, p]),
    "mlp": lambda x, w, b, r, v, p: fl.mlp_residual(x, w, b, v, p, x),
}
WAYS = {
    "replicated": [Replicate()] * 6,
    "batch": [Shard(0), Replicate(), Replicate(), Shard(0), Replicate(), Replicate()],
    "second batch dimension": [Shard(1), Replicate(), Replicate(), Shard(1), Replicate(), Replicate()],
    "column-wise, then row-wise": [Replicate(), Shard(0), Shard(0), Shard(2), Shard(1), Replicate()],
    "row-wise": [Shard(2), Shard(1), Replicate(), Replicate(), Shard(1), Replicate()],
}


def operands():
    shapes = (2, 4, 6), (6, 6), (6,), (2, 4, 6), (6, 6), (6,)
    return [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def results(op, leaves):
    y = op(*leaves)
    grads = torch.autograd.grad((y * y).sum(), leaves, allow_unused=True)
    return y, [y, *(grad for grad in grads if grad is not None)]


def linear_accepts(x, weight):
    try:
        nn.functional.linear(x, weight)
    except RuntimeError:
        return False
    return True


def op_on_dtensors(op, placements):
    plain = [t.requires_grad_() for t in operands()]
    _, expected = results(op, plain)
    on = mesh()
    leaves = [distribute_tensor(t, on, [way]).requires_grad_() for t, way in zip(operands(), placements, strict=True)]
    # Torch 2.11's own linear refuses rows that are sharded in their second dimension.
    if placements[0] == Shard(1) and not linear_accepts(*leaves[:2]):
        with pytest.raises(RuntimeError, match="redistribution"):
            op(*leaves)
        return
    fl.reset_stats()
    y, got = results(op, leaves)
    assert fl.stats()["fallback"] == {COMPOSED: 1}, fl.stats()
    assert isinstance(y, DTensor) and len(got) == len(expected)
    torch.testing.assert_close([t.full_tensor() for t in got], expected, **exact)
    with torch.no_grad():
        torch.testing.assert_close(op(*leaves).full_tensor(), expected[0], **exact)


for (_op_name, _op), (_way_name, _way) in product(OPS.items(), WAYS.items()):
    scenario(op_on_dtensors, _op, _way, name=f"{_op_name}, {_way_name}")


@scenario
def columns_and_rows_are_not_gathered():
    """The output of a column-wise layer stays sharded by columns; a row-wise layer's product is a partial sum."""
    on = mesh()
    x, w, b, *_ = operands()
    whole_x, columns, own_b = (
        distribute_tensor(t, on, [p]) for t, p in ((x, Replicate()), (w, Shard(0)), (b, Shard(0)))
    )
    assert fl.linear_gelu_residual(whole_x, columns, own_b).placements == (Shard(2),)
    parts, rows = distribute_tensor(x, on, [Shard(2)]), distribute_tensor(w, on, [Shard(1)])
    assert fl.linear_gelu_residual(parts, rows, activation="none").placements == (Partial(),)


@scenario
def strict_raises_the_reason():
    on = mesh()
    x, w, *_ = (distribute_tensor(t, on, [Replicate()]) for t in operands())
    fl._load.library.set_strict(True)
    try:
        for call in (
            lambda: fl.linear_gelu_residual(x, w),
            lambda: fl.linear_gelu_concat(x, w),
            lambda: fl.residual_stack(x, [w]),
            lambda: fl.mlp_residual(x, w, None, w, None),
        ):
            with pytest.raises(RuntimeError, match="^FASTLANE_STRICT: .* leave the fused path: a DTensor; unset"):
                call()
    finally:
        fl._load.library.set_strict(False)


@scenario
def half_of_the_operands_is_refused():
    on = mesh()
    x, w, *_ = operands()
    with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
        fl.linear_gelu_residual(x, distribute_tensor(w, on, [Shard(0)]))


@scenario
def shapes_are_checked_as_ever():
    on = mesh()
    x, w, *_ = (distribute_tensor(t, on, [Replicate()]) for t in operands())
    with pytest.raises(RuntimeError, match=r"^linear_gelu_residual: weight has shape \[6, 5\], expected"):
        fl.linear_gelu_residual(x, w[:, :5])


def compare(parallel, alone, x, reasons):
    """Compares the output and the gradients of parameters and input, and the reasons for leaving the fused path."""
    found = []
    for model in (alone, parallel):
        leaf = x.clone().requires_grad_()
        fl.reset_stats()
        y = model(leaf)
        (y * y).sum().backward()
        whole = lambda t: t.full_tensor() if isinstance(t, DTensor) else t  # noqa: E731
        found.append([whole(y), whole(leaf.grad), *(whole(p.grad) for p in model.parameters())])
    assert fl.stats()["fallback"] == reasons, fl.stats()
    torch.testing.assert_close(found[1], found[0], **exact)


def twins(make):
    torch.manual_seed(3)
    model = make().double()
    return model, copy.deepcopy(model)


@scenario
def mlp_in_columns_and_rows():
    model, alone = twins(lambda: fl.ResidualMLP(6, 8))
    parallelize_module(model, mesh(), {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    compare(model, alone, random(5, 6), {"fc1 has hooks": 1, "fc2 has hooks": 1})


@scenario
def network_in_columns_and_rows():
    model, alone = twins(lambda: fl.ResidualNetwork([6, 8, 6, 6], shortcut="none"))
    parallelize_module(model, mesh(), {"layers.0.0": ColwiseParallel(), "layers.1.0": RowwiseParallel()})
    # A GELU of columns comes between the two.
    reasons = {f"layers.{i} has a child 0 that has hooks": 1 for i in range(2)}
    compare(model, alone, random(5, 6), reasons)
    assert fl.stats()["fused"]["forward"] == 1


@scenario
def projection_in_columns():
    model, alone = twins(lambda: fl.LinearGELUResidual(6, 8, shortcut="projection"))
    parallelize_module(model, mesh(), {"projection": ColwiseParallel(output_layouts=Replicate())})
    compare(model, alone, random(5, 6), {"projection has hooks": 1})


def layer_in_columns(shortcut):
    """ColwiseParallel takes only an nn.Linear, which our layer is not: its parameters are sharded by hand."""
    model, alone = twins(lambda: fl.LinearGELUResidual(6, 6, shortcut=shortcut))
    on = mesh()

    def shard(_, module, on):
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(distribute_tensor(parameter.detach(), on, [Shard(0)])))

    distribute_module(
        model,
        on,
        shard,
        input_fn=lambda _, inputs, on: DTensor.from_local(inputs[0], on, [Replicate()]),
        output_fn=lambda _, y, on: y.full_tensor(),
    )
    compare(model, alone, random(5, 6), {"a layer gets a DTensor": 1})


for _shortcut in ("identity", "none", "concat"):
    scenario(layer_in_columns, _shortcut, name=f"layer in columns, {_shortcut}")


def parameters_without_hooks(make, reasons):
    """Sharded parameters in modules without hooks: the children are called as modules, on DTensors."""
    model, alone = twins(make)
    on = mesh()
    distribute_module(model, on, input_fn=lambda _, inputs, on: DTensor.from_local(inputs[0], on, [Replicate()]))
    compare(model, alone, random(5, 6), reasons)


def plain(*names):
    return {f"{name} has a weight that is no plain parameter": 1 for name in names}


scenario(parameters_without_hooks, lambda: fl.ResidualMLP(6, 8), plain("fc1", "fc2"), name="mlp of DTensors")
scenario(
    parameters_without_hooks,
    lambda: fl.ResidualNetwork([6, 6, 4], shortcut="projection"),
    {f"layers.{i} has a child 0 that has a weight that is no plain parameter": 1 for i in range(2)},
    name="network of DTensors",
)


@scenario
def fused_transformer_in_columns_and_rows():
    for fuse_first in (True, False):
        model, alone = twins(lambda: NanoGpt(width=16))
        plan = {
            f"blocks.{i}.mlp.{name}": style()
            for i in range(2)
            for name, style in (("c_fc", ColwiseParallel), ("c_proj", RowwiseParallel))
        }
        if fuse_first:
            fl.fuse(model).assert_fused(2)
        parallelize_module(model, mesh(), plan)
        if not fuse_first:
            with pytest.warns(UserWarning, match="c_fc has hooks"):
                assert not fl.fuse(model).fused
        tokens = torch.arange(10).view(2, 5)
        fl.reset_stats()
        logits = [m(tokens)[0] for m in (alone, model)]
        torch.testing.assert_close(logits[1], logits[0], **exact)
        for y in logits:
            y.square().mean().backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            torch.testing.assert_close(grad, q.grad, **exact)
        assert fl.stats()["fallback"] == ({"NanoMlp: c_fc has hooks": 2} if fuse_first else {}), fl.stats()


@scenario
def compiled_layer():
    on = mesh()
    x, w, b, *_ = (distribute_tensor(t, on, [p]) for t, p in zip(operands(), WAYS["batch"], strict=True))
    compiled = torch.compile(fl.linear_gelu_residual, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, w, b).full_tensor(), fl.linear_gelu_residual(x, w, b).full_tensor(), **exact)


if __name__ == "__main__":
    run_scenarios(SCENARIOS)
