"""One of the processes of test_gradients_kinds.py: reports of sharded and replicated models against one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastlane_ext as fl
from support.subprocesses import run_scenarios

ROWS = 3
SCENARIOS = {}


def scenario(function, *args, name=None, **kwargs):
    SCENARIOS[name or function.__name__] = lambda: function(*args, **kwargs)
    return function


def mesh():
    return dist.init_device_mesh("cpu", (dist.get_world_size(),))


def batch(all_rows=False):
    """This process's rows of the batch that all processes share, or all rows."""
    rows = torch.randn(ROWS * dist.get_world_size(), 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return rows if all_rows else rows[dist.get_rank() * ROWS :][:ROWS]


class Checkpointed(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return checkpoint(self.module, x.clone().requires_grad_(), use_reentrant=True)


def model(last=None):
    """A model with sizes that do not divide by two, a frozen layer and running statistics."""
    torch.manual_seed(3)
    made = nn.Sequential(
        nn.Linear(5, 7),
        fl.LinearGELUResidual(7, 7),
        nn.Linear(7, 7).requires_grad_(False),
        nn.Sequential(nn.BatchNorm1d(7), nn.Linear(7, 3)),
    ).double()
    # One process would normalise over the joint batch.
    made[3][0].eval()
    return made


def shard(made, **options):
    for layer in made:
        fully_shard(layer, mesh=mesh(), **options)
    return fully_shard(made, mesh=mesh(), **options)


def step(made, optimizer, x):
    optimizer.zero_grad()
    y = made(x)
    mse_loss(y, torch.zeros_like(y)).backward()
    optimizer.step()


def same(report, expected, prefix=""):
    assert report.loss != 0 and [row.name for row in report.rows] == [prefix + row.name for row in expected.rows]
    assert any(row.mean_abs for row in report.rows)
    for row, other in zip(report.rows, expected.rows, strict=True):
        assert row.shape == other.shape
        for name, value in list(vars(other).items())[2:]:
            close = value if value is None else pytest.approx(value, rel=1e-9, abs=1e-15)
            assert getattr(row, name) == close, (row.name, name)


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def state(made):
    """Values and gradients as this process holds them, and the tensors that hold them."""
    tensors = [*made.parameters(), *made.buffers()]
    grads = [p.grad for p in made.parameters()]
    values = [local(t).detach().clone() for t in tensors]
    return tensors, values, grads, [None if g is None else local(g).clone() for g in grads]


def untouched(before, made):
    after = state(made)
    assert all(a is b for a, b in zip(before[0], after[0], strict=True))
    # DDP makes new views of its buckets in the second forward, with the same values.
    assert isinstance(made, DistributedDataParallel) or all(a is b for a, b in zip(before[2], after[2], strict=True))
    for a, b in zip(before[1] + before[3], after[1] + after[3], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def fsdp2(made=model, **options):
    """The figures are right before, between and after steps, and reports do not change the training."""
    plain, looked_at, trained = made(), shard(made(), **options), shard(made(), **options)
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (plain, looked_at, trained)
    ]
    fired = []
    for p in looked_at.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda _: fired.append(1))
    for _ in range(3):
        before, count = state(looked_at), len(fired)
        rng = torch.get_rng_state()
        report = fl.gradient_report(looked_at, batch())
        same(report, fl.gradient_report(plain, batch(all_rows=True)))
        untouched(before, looked_at)
        assert len(fired) == count and torch.equal(rng, torch.get_rng_state())
        step(plain, optimizers[0], batch(all_rows=True))
        step(looked_at, optimizers[1], batch())
        step(trained, optimizers[2], batch())
        for p, q in zip(looked_at.parameters(), trained.parameters(), strict=True):
            assert torch.equal(local(p), local(q))


scenario(fsdp2)
scenario(fsdp2, name="FSDP2, unsharded between forward and backward", reshard_after_forward=False)
scenario(fsdp2, lambda: nn.Sequential(Checkpointed(model()[:2]), model()[3]), name="FSDP2 and re-entrant checkpoints")


@scenario
def fsdp2_settings_of_a_training_loop():
    """Figures do not depend on settings that the loop has switched off, and these settings stay off."""
    expected, made = fl.gradient_report(model(), batch(all_rows=True)), shard(model())
    with torch.no_grad():
        made(batch())  # the root's parameters stay whole until a backward
    same(fl.gradient_report(made, batch()), expected)
    made.set_reshard_after_backward(False)
    made.set_requires_gradient_sync(False)
    made.set_is_last_backward(False)
    same(fl.gradient_report(made, batch()), expected)
    # What is accumulated and not reduced yet would be lost.
    loss = made(batch()).sum()
    loss.backward()
    with pytest.raises(ValueError, match="^model: got gradients that FSDP has yet to reduce, expected none; ") as error:
        fl.gradient_report(made, batch())
    assert "\n" not in str(error.value)
    made.set_is_last_backward(True)
    made.set_reshard_after_backward(True)
    made.set_requires_gradient_sync(True)
    made(batch()).sum().backward()
    twice = model()
    (2 * twice(batch(all_rows=True)).sum() / dist.get_world_size()).backward()
    for p, q in zip(made.parameters(), twice.parameters(), strict=True):
        assert p.grad is None if q.grad is None else torch.allclose(p.grad.full_tensor(), q.grad, rtol=1e-9)


@scenario
def fsdp2_after_a_forward_without_gradients():
    """The root's own parameters stay whole until the next backward, in place of the sharded parameters."""
    made, expected = model(), fl.gradient_report(model(), batch(all_rows=True))
    fully_shard(made[0], mesh=mesh())
    fully_shard(made, mesh=mesh())
    for _ in range(2):
        mse_loss(made(batch()), torch.zeros(ROWS, 3, dtype=torch.float64)).backward()
    before = state(made)
    with torch.no_grad():
        made(batch())
    same(fl.gradient_report(made, batch()), expected)
    untouched(before, made)


@scenario
def fsdp2_mixed_precision():
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)
    made, expected = shard(model()[:2], mp_policy=policy), fl.gradient_report(model()[:2], batch(all_rows=True))
    report = fl.gradient_report(made, batch())
    got = [row.mean_abs for row in report.rows if row.mean_abs is not None]
    assert got == pytest.approx([row.mean_abs for row in expected.rows if row.mean_abs is not None], rel=1e-5)


@scenario
def fsdp2_keeps_gradients_if_asked():
    plain, made = model(), shard(model())
    for _ in range(2):
        fl.gradient_report(plain, batch(all_rows=True), keep_grad=True)
        fl.gradient_report(made, batch(), keep_grad=True)
    for p, q in zip(made.parameters(), plain.parameters(), strict=True):
        assert p.grad is None if q.grad is None else torch.allclose(p.grad.full_tensor(), q.grad, rtol=1e-9)


@scenario
def fsdp2_after_an_error():
    made = shard(model())
    with pytest.raises(ZeroDivisionError):
        fl.gradient_report(made, batch(), loss_fn=lambda *_: 1 / 0)
    same(fl.gradient_report(made, batch()), fl.gradient_report(model(), batch(all_rows=True)))


@scenario
def tensor_parallelism():
    made = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3)).double()
    for p in made.parameters():
        dist.broadcast(p.detach(), 0)
    expected, x = fl.gradient_report(made, batch(all_rows=True)), batch(all_rows=True)
    sharded = parallelize_module(copy.deepcopy(made), mesh(), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    before = state(sharded)
    same(fl.gradient_report(sharded, x), expected)
    untouched(before, sharded)


def ddp(wrap=lambda made: made, middle=lambda made: made, **options):
    """The figures are this process's own, and reports do not change the averaging."""
    looked_at = wrap(DistributedDataParallel(middle(model()), **options))
    trained = wrap(DistributedDataParallel(middle(model()), **options))
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (looked_at, trained)]
    prefix = next(iter(looked_at.state_dict())).removesuffix("0.weight")
    for _ in range(3):
        own = model()
        own.load_state_dict({key.removeprefix(prefix): value for key, value in looked_at.state_dict().items()})
        before = state(looked_at)
        same(fl.gradient_report(looked_at, batch()), fl.gradient_report(own, batch()), prefix)
        untouched(before, looked_at)
        for made, optimizer in zip((looked_at, trained), optimizers, strict=True):
            step(made, optimizer, batch())
        for p, q in zip(looked_at.parameters(), trained.parameters(), strict=True):
            assert torch.equal(p, q)


scenario(ddp)
scenario(ddp, name="DDP, static graph", static_graph=True)
scenario(ddp, name="DDP, unused parameters are looked for", find_unused_parameters=True)
scenario(ddp, name="DDP, gradients are views of buckets", gradient_as_bucket_view=True)
scenario(ddp, nn.Sequential, name="DDP inside a module")


@scenario
def ddp_and_re_entrant_checkpoints():
    ddp(lambda made: made, middle=Checkpointed)
    made = DistributedDataParallel(Checkpointed(model()), static_graph=True)
    with pytest.raises(ValueError, match="^model: got a DistributedDataParallel with static_graph=True over") as error:
        fl.gradient_report(made, batch())
    assert "\n" not in str(error.value)


@scenario
def fsdp1_is_refused():
    made = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="^model: got a FullyShardedDataParallel, expected .*fully_shard") as error:
        fl.gradient_report(nn.Sequential(fsdp1(made)), torch.ones(2, 4))
    assert "\n" not in str(error.value)


def fsdp1(made):
    # Its constructor warns and wants a GPU; what is refused is the class.
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = made
    return wrapped


if __name__ == "__main__":
    run_scenarios(SCENARIOS)
