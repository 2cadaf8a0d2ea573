"""One of the processes of test_training.py: DDP and FSDP2 against one process on the joint batch.

Everything is float64, so that only another order of additions can make a difference.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastlane_ext as fl
from fastlane_ext import reference
from support.nanogpt import NanoGpt
from support.subprocesses import run_scenarios

STEPS, ROWS, WIDTH = 3, 6, 6
exact = {"rtol": 1e-9, "atol": 1e-12}
SCENARIOS = {}


def scenario(function, *args, name=None, **kwargs):
    SCENARIOS[name or function.__name__] = lambda: function(*args, **kwargs)
    return function


class Text(nn.Module):
    """A transformer that returns logits in place of a tuple; the signs of a row's values spell its tokens."""

    def __init__(self):
        super().__init__()
        self.model = NanoGpt(width=16)

    def forward(self, x):
        return self.model((x > 0).long() * 7 + torch.arange(WIDTH))[0]


class Checkpointed(nn.Module):
    def __init__(self, module, use_reentrant):
        super().__init__()
        self.module, self.use_reentrant = module, use_reentrant

    def forward(self, x):
        # The reentrant kind needs an input that requires a gradient.
        x = x.clone().requires_grad_()
        return checkpoint(self.module, x, use_reentrant=self.use_reentrant)


class Unused(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module, self.unused = module, fl.LinearGELUResidual(3, 3)

    def forward(self, x):
        return self.module(x)


def fused_text():
    model = Text()
    fl.fuse(model).assert_fused(2)
    return model


# a model, and how many fused calls its forward is
MODELS = {
    "network": (lambda kind=fl: kind.ResidualNetwork([WIDTH, WIDTH, 8, 7], shortcut="projection"), 1),
    "sizes of 1": (lambda kind=fl: kind.ResidualNetwork([WIDTH, 1, 1, WIDTH], shortcut="projection"), 1),
    "concat": (lambda kind=fl: kind.ResidualNetwork([WIDTH, 4, 3], shortcut="concat"), 1),
    "mlp": (lambda kind=fl: kind.ResidualMLP(WIDTH, 15), 1),
    "layer": (lambda kind=fl: kind.LinearGELUResidual(WIDTH, 7, shortcut="projection"), 2),
    "blocks": (
        lambda kind=fl: nn.Sequential(kind.ResidualMLP(WIDTH, 9), nn.LayerNorm(WIDTH), kind.ResidualMLP(WIDTH, 9)),
        2,
    ),
    "transformer": (fused_text, 2),
}


def build(name, **options):
    torch.manual_seed(5)
    return MODELS[name][0](**options).double()


def batch(step):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(model, rows, optimizer=None):
    """Losses and, at the end, parameters. Every parameter's gradient must arrive once in a step."""
    arrived, losses = {}, []

    def count(name):
        return lambda _: arrived.update({name: arrived.get(name, 0) + 1})

    hooks = [p.register_post_accumulate_grad_hook(count(n)) for n, p in model.named_parameters()]
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = (model(batch(step)[rows]) - 1).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.detach())
    for hook in hooks:
        hook.remove()
    names = {n for n, _ in model.named_parameters() if "unused" not in n}
    assert {n: c for n, c in arrived.items() if "unused" not in n} == dict.fromkeys(names, STEPS), arrived
    return torch.stack(losses), [whole(p.detach()) for p in model.parameters()]


def own_rows():
    size = ROWS // dist.get_world_size()
    return slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)


@contextmanager
def all_fused(calls, recomputed=0):
    fl.reset_stats()
    yield
    stats = fl.stats()
    expected = {"forward": STEPS * (calls + recomputed), "backward": STEPS * calls}
    assert stats["fallback"] == {} and stats["fused"] == expected, stats


def assert_as_one_process(parallel, alone, calls, recomputed=0):
    expected_losses, expected = train(alone, slice(None))
    with all_fused(calls, recomputed):
        losses, got = train(parallel, own_rows())
    dist.all_reduce(losses)
    torch.testing.assert_close(losses / dist.get_world_size(), expected_losses, **exact)
    torch.testing.assert_close(got, expected, **exact)


def ddp(name, wrap=lambda m: m, recomputed=0, **options):
    model = wrap(build(name))
    alone = copy.deepcopy(model)
    calls = MODELS[name][1]
    parallel = DistributedDataParallel(model, **options)
    assert_as_one_process(parallel, alone, calls, recomputed * calls)


def fsdp2(name, recomputed=0, wrap=lambda m: m, parts=lambda m: [], **options):
    model = wrap(build(name))
    alone = copy.deepcopy(model)
    calls = MODELS[name][1]
    for part in [*parts(model), model]:
        fully_shard(part, **options)
    assert_as_one_process(model, alone, calls, recomputed * calls)


for _name in MODELS:
    scenario(ddp, _name, name=f"ddp {_name}")
    scenario(ddp, _name, name=f"ddp {_name}, static graph", gradient_as_bucket_view=True, static_graph=True)
    scenario(ddp, _name, Unused, name=f"ddp {_name}, unused parameters", find_unused_parameters=True)
    scenario(fsdp2, _name, name=f"fsdp2 {_name}")
    scenario(fsdp2, _name, name=f"fsdp2 {_name}, kept whole", reshard_after_forward=False)
# A bucket for each parameter: every view of a bucket must then lie as its gradient does.
scenario(ddp, "network", name="ddp network, small buckets", bucket_cap_mb=1e-5, gradient_as_bucket_view=True)


@scenario
def ddp_warns_of_strides():
    """In the other scenarios the warning would be an error. Autograd keeps other strides only for sizes of 1."""

    class OtherStrides(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.empty_strided(grad.shape, (1, 7)).copy_(grad)

    model = nn.Linear(1, 3)
    model.forward = lambda x: nn.functional.linear(x, OtherStrides.apply(model.weight), model.bias)
    parallel = DistributedDataParallel(model)
    with pytest.raises(UserWarning, match="Grad strides do not match bucket view strides"):
        parallel(torch.ones(2, 1)).sum().backward()


@scenario
def ddp_before_fuse():
    torch.manual_seed(5)
    model = Text().double()
    alone = copy.deepcopy(model)
    parallel = DistributedDataParallel(model)
    fl.fuse(parallel).assert_fused(2)
    assert_as_one_process(parallel, alone, 2)


@scenario
def ddp_accumulates_gradients():
    model = build("mlp")
    alone = copy.deepcopy(model)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    x = batch(0)
    alone(x).square().sum().backward()
    first, second = x[own_rows()].split([1, ROWS // dist.get_world_size() - 1])
    with parallel.no_sync():
        parallel(first).square().sum().backward()
    parallel(second).square().sum().backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad * dist.get_world_size(), q.grad, **exact)


def sharded_blocks(model):
    return [child for child in model.children() if isinstance(child, (reference.ResidualMLP, CheckpointWrapper))]


def mlps_of_text(model):
    return [block["mlp"] for block in model.model.blocks]


scenario(fsdp2, "blocks", parts=sharded_blocks, name="fsdp2 blocks, each for itself")
scenario(fsdp2, "blocks", parts=sharded_blocks, name="fsdp2 blocks, kept in two parts", reshard_after_forward=False)
scenario(fsdp2, "transformer", parts=mlps_of_text, name="fsdp2 transformer, its MLPs by themselves")

for _name in ("network", "mlp", "layer", "transformer"):
    for _reentrant in (False, True):
        _wrap = lambda m, r=_reentrant: Checkpointed(m, r)  # noqa: E731
        _title = f"{_name}, checkpoint{', reentrant' if _reentrant else ''}"
        _static = {"static_graph": True} if _reentrant else {}
        scenario(ddp, _name, _wrap, 1, name=f"ddp {_title}", **_static)
        if not _reentrant:
            scenario(fsdp2, _name, 1, _wrap, name=f"fsdp2 {_title}")


def wrap_blocks(model):
    return nn.Sequential(*(checkpoint_wrapper(m) if isinstance(m, reference.ResidualMLP) else m for m in model))


scenario(fsdp2, "blocks", 1, wrap_blocks, sharded_blocks, name="fsdp2 blocks, checkpoint wrapper")
scenario(ddp, "blocks", wrap_blocks, 1, name="ddp blocks, checkpoint wrapper")


@scenario
def fsdp2_of_layers_inside_a_network():
    """A layer that is sharded by itself has to be called as a module; the others stay fused."""
    model = build("network")
    x = batch(0)
    expected = model(x)
    fully_shard(model.layers[1])
    fully_shard(model)
    fl.reset_stats()
    torch.testing.assert_close(model(x), expected, **exact)
    assert fl.stats()["fallback"] == {"layers.1 is a FSDPSequential, not a plain Sequential": 1}
    assert fl.stats()["fused"]["forward"] > 0
    fl.reset_stats()


@scenario
def fuse_after_fsdp2():
    """Parameters that are sharded before `fuse` are not plain: `fuse` changes nothing and reports the reason."""
    model = Text().double()
    x = batch(0)
    expected = model(x)
    fully_shard(model)
    with pytest.warns(UserWarning, match="nothing runs fused"):
        report = fl.fuse(model)
    assert not report.fused and all("no plain parameter" in site.reason for site in report.refused), report
    torch.testing.assert_close(model(x), expected, **exact)


def mixed_precision(name):
    """Parameters gathered in bfloat16: no error of outputs or gradients is above twice eager's own."""
    errors = {}
    truth = build(name, kind=reference)
    x = batch(0)
    y = truth(x)
    y.square().mean().backward()
    exact_values = [y.detach(), *(p.grad for p in truth.parameters())]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for kind in (fl, reference):
        model = build(name, kind=kind).float()
        fully_shard(model, mp_policy=policy)
        fl.reset_stats()
        y = model(x.float())
        y.float().square().mean().backward()
        assert y.dtype == torch.bfloat16
        assert all(whole(p.grad).dtype == torch.float32 for p in model.parameters())
        if kind is fl:
            assert fl.stats()["fallback"] == {} and fl.stats()["fused"]["backward"] > 0
        got = [y.detach(), *(whole(p.grad) for p in model.parameters())]
        errors[kind] = [(a - b).abs().max().item() for a, b in zip(got, exact_values, strict=True)]
    eps = torch.finfo(torch.bfloat16).eps
    for fused, eager, value in zip(errors[fl], errors[reference], exact_values, strict=True):
        assert fused <= 2 * eager + 2 * eps * value.abs().max().item(), errors


for _name in ("network", "concat", "mlp", "layer", "blocks"):
    scenario(mixed_precision, _name, name=f"fsdp2 {_name} in bfloat16")


if __name__ == "__main__":
    run_scenarios(SCENARIOS)
