"""The tools of training around a model: DDP, FSDP2, checkpointing, autocast, loss scaling, optimizers, averages."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.subprocesses import HANG_S, run_workers
from support.training_worker import MODELS, SCENARIOS, build
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import fastlane_ext as fl
from fastlane_ext import reference

pytestmark = pytest.mark.any_isa

exact = {"rtol": 1e-9, "atol": 1e-12}
each_model = pytest.mark.parametrize("name", [name for name in MODELS if name != "transformer"])
SPEND = {name: calls for name, (_, calls) in MODELS.items()}


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    return run_workers("training_worker", tmp_path_factory.mktemp("workers"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_many_processes_as_one(name, workers):
    for rank, results in enumerate(workers):
        assert results[name] is None, f"rank {rank}\n{results[name]}"


# One process


def pair(name, dtype=torch.float64):
    return build(name).to(dtype), build(name, kind=reference).to(dtype)


def data(step=0, rows=16, dtype=torch.float64):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def loss_of(model, x):
    return (model(x).float() - 1).square().mean() if x.dtype != torch.float64 else (model(x) - 1).square().mean()


def assert_equal_parameters(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}", **exact)


@each_model
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_recomputes_the_same_bits(name, use_reentrant, assert_fused):
    """With torch's own check of the recomputed tensors' metadata."""
    model = build(name).float()
    x = data(dtype=torch.float32).requires_grad_()
    leaves = [x, *model.parameters()]
    expected = torch.autograd.grad(loss_of(model, x), leaves)
    fl.reset_stats()
    options = {} if use_reentrant else {"determinism_check": "default"}
    loss = (checkpoint(model, x, use_reentrant=use_reentrant, **options) - 1).square().mean()
    if use_reentrant:
        loss.backward()
        got = [leaf.grad for leaf in leaves]
    else:
        got = torch.autograd.grad(loss, leaves)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert_fused(forward=2 * SPEND[name], backward=SPEND[name])


OPS = {
    "linear_gelu_residual": lambda x, w, v: fl.linear_gelu_residual(x, w, None, x),
    "linear_gelu_concat": lambda x, w, v: fl.linear_gelu_concat(x, w),
    "mlp_residual": lambda x, w, v: fl.mlp_residual(x, w, None, v, None, x),
    "residual_stack": lambda x, w, v: fl.residual_stack(x, [w, v]),
}


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "low"])
@pytest.mark.parametrize("op", OPS)
def test_autocast_casts_a_weight_once_a_context(op, dtype, low, assert_fused):
    w, v = (nn.Parameter(data(i, 6, torch.float32)) for i in range(2))
    x = data(3, dtype=low if dtype == "low" else torch.float32)
    casts_of_weights = []
    for _ in range(2):
        with torch.autocast("cpu", low), torch.profiler.profile(record_shapes=True) as profile:
            y = [OPS[op](x, w, v) for _ in range(3)]
        y[-1].float().sum().backward()
        events = profile.key_averages(group_by_input_shape=True)
        # Activations have 16 rows, weights 6.
        casts = [e.count for e in events if e.key == "aten::_to_copy" and e.input_shapes[0] == [6, 6]]
        casts_of_weights.append(sum(casts))
    used = [w, v] if op in ("mlp_residual", "residual_stack") else [w]
    assert casts_of_weights == [len(used)] * 2
    assert all(t.grad.dtype == torch.float32 for t in used)
    assert_fused(forward=None, backward=None)


def gradients(model, x, low):
    context = torch.autocast("cpu", low) if low else torch.autocast("cpu", enabled=False)
    with context:
        y = model(x)
    loss = (y.to(x.dtype) - 1).square().mean()
    return [y.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@each_model
def test_autocast_with_float32_weights(name, low):
    """Over several batches no error against float64 is above twice eager's own; the dtypes are eager's."""
    fused, eager = pair(name, torch.float32)
    truth = copy.deepcopy(eager).double()
    errors, sizes = {}, {}
    for step in range(8):
        x = data(step, dtype=torch.float32)
        results = {"fused": gradients(fused, x, low), "eager": gradients(eager, x, low)}
        for key, (a, b, t) in enumerate(zip(*results.values(), gradients(truth, x.double(), None), strict=True)):
            assert a.dtype == b.dtype
            for kind, value in (("fused", a), ("eager", b)):
                error = (value.double() - t).abs().max().item()
                errors[kind, key] = max(errors.get((kind, key), 0), error)
            sizes[key] = max(sizes.get(key, 0), t.abs().max().item())
    for key, size in sizes.items():
        limit = 2 * errors["eager", key] + 2 * torch.finfo(low).eps * size
        assert errors["fused", key] <= limit, (key, errors["fused", key], limit)
    assert fl.stats()["fallback"] == {} and fl.stats()["fused"]["backward"] > 0


@each_model
def test_grad_scaler(name, assert_fused):
    """Scaled, unscaled and clipped steps equal eager's; both leave out a step with an infinite gradient."""
    models, scales = pair(name), []
    for model in models:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        seen = []
        for step in range(5):
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.zero_grad()
            loss = loss_of(model, data(step))
            scaler.scale(loss * float("inf") if step == 2 else loss).backward()
            scaler.unscale_(optimizer)
            if step != 2:
                nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            scaler.step(optimizer)
            scaler.update()
            moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
            assert all(moved) if step != 2 else not any(moved)
            seen.append(scaler.get_scale())
        scales.append(seen)
    assert scales[0] == scales[1] == [1024.0, 2048.0, 1024.0, 1024.0, 2048.0]
    assert_equal_parameters(*models)
    assert_fused(forward=5 * SPEND[name], backward=5 * SPEND[name])


@each_model
def test_grad_scaler_in_half_precision(name, assert_fused):
    """A scale that overflows float16's gradients is found and lowered until it fits."""
    model = build(name).float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, data(dtype=torch.float32))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[1] == losses[0], "the first step overflowed and was left out"
    assert scaler.get_scale() < 2.0**24 and losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in model.parameters())
    assert_fused(forward=None, backward=None)


@each_model
def test_gradients_accumulate(name, assert_fused):
    """Gradients accumulate in place, in memory that belongs to one parameter only."""
    model = build(name)
    x = data()
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    fl.reset_stats()
    kept = []
    for part in x.split([5, 1, 10]):
        model(part).square().sum().backward()
        kept.append([p.grad for p in model.parameters()])
    assert all(a is b is c for a, b, c in zip(*kept, strict=True))
    for got, value in zip(kept[0], expected, strict=True):
        torch.testing.assert_close(got, value, **exact)
    spans = sorted((g.data_ptr(), g.data_ptr() + g.numel() * g.element_size()) for g in kept[0])
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    assert_fused(forward=3 * SPEND[name], backward=3 * SPEND[name])


OPTIMIZERS = {
    "AdamW, one by one": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adagrad, fused": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@each_model
def test_optimizers(name, make, assert_fused):
    models, norms = pair(name), []
    for model in models:
        optimizer = make(list(model.parameters()))
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, data(step)).backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach="foreach" in str(make)))
            optimizer.step()
    torch.testing.assert_close(norms[:4], norms[4:], **exact)
    assert_equal_parameters(*models)
    assert_fused(forward=4 * SPEND[name], backward=4 * SPEND[name])


@pytest.mark.parametrize("make", [lambda p: torch.optim.LBFGS(p, max_iter=5, line_search_fn="strong_wolfe")])
@each_model
def test_optimizers_that_call_the_model_again(name, make):
    models = pair(name)
    for model in models:
        optimizer = make(list(model.parameters()))

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(model, data())
            loss.backward()
            return loss

        optimizer.step(closure)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.8)], ids=["mean", "ema"])
@each_model
def test_averaged_models(name, average, assert_fused):
    models, outputs = pair(name), []
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, data(step)).backward()
            optimizer.step()
            averaged.update_parameters(model)
        outputs.append([averaged(data()), model(data())])
    torch.testing.assert_close(*outputs, **exact)
    assert not torch.allclose(*outputs[0])
    assert_fused(forward=6 * SPEND[name], backward=4 * SPEND[name])


def test_outputs_are_no_views():
    """FSDP2 warns of a module that returns one, and an in-place addition to it would lose hooks."""
    x = torch.randn(2, 3, 6, requires_grad=True)
    for name in ("network", "concat", "mlp", "layer"):
        assert not build(name).float()(x)._is_view(), name


# The example

EXAMPLE = Path(__file__).parents[1] / "examples" / "train.py"
SMALL = ["--width", "16", "--blocks", "2", "--batch", "32", "--print-every", "4"]


def run_example(*arguments, processes=1, code=0):
    launcher = ["-W", "error"]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, str(EXAMPLE), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_S)
    assert result.returncode == code, result.stderr[-3000:]
    return result.stdout if code == 0 else result.stderr


def losses(output):
    return {words[1]: float(words[3]) for words in map(str.split, output.splitlines()) if words[0] == "step"}


@pytest.mark.slow
def test_example_resumes_in_another_way(tmp_path):
    """4 steps with DDP, 4 with FSDP2, 4 alone: the losses of 12 steps of one process."""
    first, second = str(tmp_path / "ddp"), str(tmp_path / "fsdp2")
    whole = run_example(*SMALL, "--steps", "12")
    assert "fused calls on rank 0: 48 forward, 48 backward; fallbacks: none" in whole
    parts = [
        run_example(*SMALL, "--steps", "4", "--checkpoint", first, processes=2),
        run_example(
            *SMALL, "--steps", "8", "--parallel", "fsdp2", "--resume", first, "--checkpoint", second, processes=2
        ),
        run_example(*SMALL, "--steps", "12", "--resume", second),
    ]
    assert [part.split(",")[0] for part in parts] == ["ddp", "fsdp2", "none"]
    joined = {step: loss for part in parts for step, loss in losses(part).items()}
    assert joined == pytest.approx(losses(whole), rel=1e-4) and list(joined) == ["4", "8", "12"]
    assert joined["12"] < joined["4"]


@pytest.mark.slow
def test_example_has_nothing_left_to_resume(tmp_path):
    folder = str(tmp_path / "run")
    run_example(*SMALL, "--steps", "2", "--checkpoint", folder)
    message = run_example(*SMALL, "--steps", "2", "--resume", folder, code=1).splitlines()[-1]
    assert message == "train.py: error: --steps: got 2, expected more than the 2 of the checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parallel", "ddp"], "--parallel ddp: started as one process, expected torchrun"),
        (["--resume", "/nowhere"], "--resume: /nowhere holds no checkpoint"),
        (["--steps", "0"], "argument --steps: invalid positive value: '0'"),
    ],
)
def test_example_errors_are_one_line(arguments, message):
    assert message in run_example(*arguments, code=2).splitlines()[-1]
