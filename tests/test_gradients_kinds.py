"""gradient_report on models of every kind: the figures equal those of ``backward()``, and the model is unchanged."""

import copy
import io
import itertools

import pytest
import torch
from support.subprocesses import run_workers
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

from fastlane_ext.gradients import gradient_report, print_gradients

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def backward_of(model, x, target=None):
    """A copy's gradients by name, as ``backward()`` leaves them."""
    model = copy.deepcopy(model)
    y = model(x)
    mse_loss(y, torch.zeros_like(y) if target is None else target).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def agree(report, grads):
    assert [row.name for row in report.rows] == list(grads)
    for row in report.rows:
        grad = grads[row.name]
        if grad is None:
            assert row.mean_abs is None
            continue
        grad = grad.to_dense().to(torch.complex128).abs()
        for figure, value in ((row.mean_abs, grad.mean()), (row.l2, grad.norm()), (row.max_abs, grad.max())):
            assert figure == pytest.approx(value.item(), rel=1e-5, abs=1e-12), row.name


# Complex


class Spectral(nn.Module):
    def __init__(self, *values, dtype=torch.complex64):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values, dtype=dtype))

    def forward(self, x):
        return (x * self.weight).abs()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters(dtype):
    row = gradient_report(Spectral(3 + 4j, dtype=dtype), torch.ones(1)).rows[0]
    assert (row.mean_abs, row.l2, row.max_abs, row.ratio) == pytest.approx((10, 10, 10, 2), rel=1e-6)
    assert (row.zero_fraction, row.nonfinite_fraction) == (0, 0)
    imaginary = Spectral(4j, 3j, dtype=dtype)
    row = gradient_report(imaginary, torch.ones(2)).rows[0]
    # d mean(|w|^2) = w, of which nothing is real.
    assert (row.mean_abs, row.l2, row.max_abs, row.ratio) == pytest.approx((3.5, 5, 4, 1), rel=1e-6)
    stream = io.StringIO()
    print_gradients(imaginary, torch.ones(2), file=stream)
    assert stream.getvalue() == "weight has gradient mean of 3.500000e+00\n"


def test_complex_parameters_that_are_not_finite():
    row = gradient_report(Spectral(complex(0, float("inf")), 1j), torch.ones(2)).rows[0]
    assert row.nonfinite_fraction == 0.5 and not row.l2 < float("inf")


# Lazy


def test_lazy_modules():
    lazy = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 2))
    report = gradient_report(lazy, X)
    agree(report, backward_of(lazy, X))
    assert type(lazy[0]) is nn.Linear and lazy[0].weight.shape == (4, 8)
    # The running statistics have their first values, not those after a batch.
    assert torch.equal(lazy[1].running_mean, torch.zeros(4)) and torch.equal(lazy[1].running_var, torch.ones(4))
    assert lazy[1].num_batches_tracked == 0 and not lazy[1]._forward_pre_hooks
    agree(gradient_report(lazy, X), backward_of(lazy, X))


def test_a_lazy_module_that_the_forward_does_not_reach():
    class Partly(nn.Linear):
        def __init__(self):
            super().__init__(8, 2)
            self.later, self.norm = nn.LazyLinear(3), nn.LazyBatchNorm1d()

    model = Partly()
    assert [row.name for row in gradient_report(model, X).rows] == ["weight", "bias"]
    assert model.later.has_uninitialized_params() and model.norm.has_uninitialized_params()
    assert len(model.norm._forward_pre_hooks) == len(Partly().norm._forward_pre_hooks)


# Backward inside a backward


class Checkpointed(nn.Module):
    """A frozen layer, then one by itself and one under a re-entrant checkpoint, which is used twice."""

    def __init__(self, use_reentrant=True):
        super().__init__()
        self.frozen, self.a, self.b = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop, self.unused, self.use_reentrant = nn.Dropout(0.3), nn.Linear(2, 2), use_reentrant
        self.scale = torch.ones(8, requires_grad=True)  # a leaf that is no parameter

    def forward(self, x):
        y = self.a(self.frozen(x)) * self.scale
        run = lambda t: self.drop(self.b(self.b(t)))  # noqa: E731
        return self.b(checkpoint(run, y, use_reentrant=self.use_reentrant))


class Reversible(torch.autograd.Function):
    """Calls ``backward()`` in its backward, as functions that recompute do; also works under torch.autograd.grad."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x).detach()

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        torch.autograd.backward(y, grad)
        return x.grad, None


class Recomputed(Checkpointed):
    def forward(self, x):
        return self.b(Reversible.apply(self.a(self.frozen(x)) * self.scale, self.b))


@pytest.mark.parametrize("kind", [Checkpointed, Recomputed])
@pytest.mark.parametrize("had_grad", [False, True])
def test_a_backward_inside_the_backward(kind, had_grad):
    model = kind()
    x, target = X.clone().requires_grad_(), torch.ones(6, 8, requires_grad=True)
    if had_grad:
        mse_loss(model(x), target).backward()
    rng = torch.get_rng_state()
    expected = backward_of(model, X, target.detach())
    torch.set_rng_state(rng)
    optimizers = {p: torch.optim.SGD([p], 1.0, momentum=0.5) for p in model.parameters() if p.requires_grad}
    called = []
    for p in optimizers:
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step() or called.append(p))
    leaves = [*model.parameters(), model.scale, x, target]
    values, grads = [t.detach().clone() for t in leaves], [t.grad for t in leaves]
    copies = [None if g is None else g.clone() for g in grads]

    agree(gradient_report(model, x, target), expected)
    assert not called and torch.equal(torch.get_rng_state(), rng)
    for leaf, value, grad, earlier in zip(leaves, values, grads, copies, strict=True):
        assert torch.equal(leaf, value) and leaf.grad is grad
        assert grad is None or torch.equal(grad, earlier)
    # The hooks are back.
    mse_loss(model(x), target).backward()
    assert {id(p) for p in called} == {id(p) for p in optimizers if p.grad is not None} and called


def test_a_backward_inside_the_backward_that_fails():
    model = Checkpointed()
    model.a.weight.grad = kept = torch.ones(8, 8)
    model.a.weight.register_hook(lambda grad: 1 / 0)
    fired = []
    model.b.weight.register_post_accumulate_grad_hook(fired.append)
    with pytest.raises(ZeroDivisionError):
        gradient_report(model, X)
    assert model.a.weight.grad is kept and model.b.weight.grad is None and not fired
    model.b.weight.sum().backward()
    assert len(fired) == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_tensor_hooks_change_the_figures_as_they_change_backwards(use_reentrant):
    model = Checkpointed(use_reentrant).eval()
    hooks = [model.a.weight.register_hook(lambda grad: grad * 3), model.b.weight.register_hook(lambda grad: grad / 2)]
    report = gradient_report(model, X)
    model(X).square().mean().backward()
    agree(report, {name: p.grad for name, p in model.named_parameters()})
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", [Checkpointed, Recomputed])
def test_keep_grad_with_a_backward_inside_the_backward(kind):
    model = kind().eval()
    expected = backward_of(model, X)
    for times in (1, 2):
        gradient_report(model, X, keep_grad=True)
        for name, p in model.named_parameters():
            assert p.grad is None if expected[name] is None else torch.allclose(p.grad, times * expected[name])


# Others


class Tied(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3, sparse=sparse), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


TOKENS = torch.tensor([1, 2, 2])
OTHERS = {
    "tied": (lambda: Tied(sparse=False), TOKENS),
    "tied, one use sparse": (lambda: Tied(sparse=True), TOKENS),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 2)), X),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 2)), X),
    "half": (lambda: nn.Linear(8, 2).bfloat16(), X.bfloat16()),
    "recurrent": (lambda: nn.Sequential(nn.LSTM(8, 3), Pick()), X),
    "compiled": (lambda: torch.compile(nn.Sequential(nn.Linear(8, 4), nn.GELU()), backend="aot_eager"), X),
}


class Pick(nn.Module):
    def forward(self, outputs):
        return outputs[0]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.usefixtures("fresh_compiler")
def test_other_kinds(name):
    make, x = OTHERS[name]
    model = make()
    before = {key: value.clone() for key, value in itertools.chain(model.state_dict().items(), model.named_buffers())}
    report = gradient_report(model, x)
    for key, value in itertools.chain(model.state_dict().items(), model.named_buffers()):
        assert torch.equal(value, before[key]), key
    y = model(x)
    mse_loss(y, torch.zeros_like(y)).backward()
    agree(report, {key: p.grad for key, p in model.named_parameters()})


def test_autocast():
    model = nn.Linear(8, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            model(X)
        report = gradient_report(model, X)
        y = model(X)
        mse_loss(y, torch.zeros_like(y)).backward()
    agree(report, {key: p.grad for key, p in model.named_parameters()})


def test_a_model_that_returns_its_parameter():
    class Parameter(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.weight

    assert gradient_report(Parameter(), None, loss_fn=lambda y, _: y).rows[0].mean_abs == 1


def test_inference_tensors_in_a_dict():
    class FromDict(nn.Linear):
        def forward(self, x):
            return {"y": super().forward(x["x"])}

    with torch.inference_mode():
        x = {"x": X.clone()}
    assert gradient_report(FromDict(8, 2), x, loss_fn=lambda out, _: out["y"].sum()).rows[0].mean_abs > 0


def inference_model():
    with torch.inference_mode():
        return nn.Linear(8, 2)


class Product(Spectral):
    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: nn.Linear(8, 2, device="meta"), {}, ValueError, "model: got parameters on the meta device, expected"),
        (inference_model, {}, ValueError, "model: got parameters made in inference mode, expected"),
        (lambda: Product(*[1j] * 8), {}, TypeError, "loss_fn: got None for a model that returns a torch.complex64"),
        (lambda: nn.Sequential(nn.Linear(8, 2), Long()), {}, TypeError, "loss_fn: got None .* a torch.int64 tensor"),
        (
            lambda: Product(*[1j] * 8),
            {"loss_fn": lambda y, _: y.sum()},
            ValueError,
            "loss_fn: got torch.complex64, expected a real number",
        ),
    ],
)
def test_what_has_no_gradients_is_refused_in_one_line(make, options, error, message):
    with pytest.raises(error, match=f"^{message}") as caught:
        gradient_report(make(), X, **options)
    assert "\n" not in str(caught.value)


class Long(nn.Module):
    def forward(self, x):
        return x.long()


def test_no_parameter_is_called_weight():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.W1, self.w2 = nn.Parameter(torch.ones(8, 2)), nn.Parameter(torch.ones(2))

        def forward(self, x):
            return x @ self.W1 + self.w2

    for style in ("lines", "full", "table"):
        stream = io.StringIO()
        print_gradients(Named(), X, style=style, file=stream)
        *heading, line = stream.getvalue().splitlines()
        assert line == 'no parameter has "weight" in its name; gradient_report lists all 2 parameters'
        assert len(heading) == (2 if style == "table" else 0)


@pytest.mark.any_isa
@pytest.mark.parametrize("world", [1, 2])
def test_many_processes_as_one(world, tmp_path):
    """FSDP2, DDP and tensor parallelism."""
    for results in run_workers("gradients_worker", tmp_path, world):
        assert len(results) == 16
        assert {name: error for name, error in results.items() if error} == {}
