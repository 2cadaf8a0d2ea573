"""`freeze`: which weights it finds, the bits of the weights themselves, ways in which a weight may change later."""

import copy
import gc
import io
import multiprocessing
import pickle
import weakref

import pytest
import torch
from support.paths import PATH
from torch import nn

import fastlane_ext as fl
from fastlane_ext import freeze, fuse, reference, unfreeze
from fastlane_ext._load import library

# Without vector kernels there are no panels: copies are kept and never read.
pytestmark = [pytest.mark.any_isa, pytest.mark.skipif(PATH == "torch", reason="torch's operators read no copies")]

CHANGED = "a frozen weight has changed since freeze(model)"


def mlp():
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))


def fused_mlp():
    model = mlp()
    fuse(model)
    return model


def fused_linears():
    """Plain linear layers, fused without the measurement that `fuse` would make."""
    model = fused_mlp()
    fl.unfuse(model)
    from fastlane_ext.fusion.classes import PLAN, fused_class

    for child in (model[0], model[2]):
        object.__setattr__(child, "__class__", fused_class(nn.Linear))
        child.__dict__[PLAN] = True
    return model


def reference_network():
    model = nn.Sequential(reference.ResidualNetwork([24, 24, 24]))
    fuse(model)
    return model


MODELS = {
    "fused MLP": (fused_mlp, 2),
    "fused linear layers": (fused_linears, 2),
    "fused reference network": (reference_network, 2),
    "ResidualMLP": (lambda: fl.ResidualMLP(24, 40), 2),
    "LinearGELUResidual": (lambda: fl.LinearGELUResidual(24, 24), 1),
    "with projection": (lambda: fl.LinearGELUResidual(24, 16, shortcut="projection"), 2),
    "ResidualNetwork": (lambda: fl.ResidualNetwork([24, 16, 16], shortcut="projection"), 3),
    "wide network": (lambda: fl.ResidualNetwork([24, 1100, 24], shortcut="none"), 2),
    "concat": (lambda: fl.ResidualNetwork([24, 16, 16], shortcut="concat"), 2),
}
NARROW_STACKS = ("fused reference network", "ResidualNetwork", "concat")


def states(model):
    """What a call would find for each weight that `freeze` finds."""
    found = [library.is_frozen(parameter) for parameter in model.parameters() if parameter.dim() == 2]
    return [state for state in found if state is not None]


@pytest.fixture
def reads(monkeypatch):
    """Whether a call reads the copies: breaks them, and looks whether the result changes."""

    def check(model, x):
        with torch.no_grad():
            expected = model(x)
            kept = [c for m in model.modules() for c in m.__dict__.get("_fastlane_copies", ())]
            before = [c.clone() for c in kept]
            for c in kept:
                c.view(-1)[64:] = 0
            got = model(x)
            for c, values in zip(kept, before, strict=True):
                c.copy_(values)
        return not torch.equal(got, expected)

    return check


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits(name, dtype, reads):
    make, count = MODELS[name]
    model = make().to(dtype)
    inputs = [torch.randn(rows, 24).to(dtype) for rows in (1, 7, 30, 100)]
    with torch.no_grad():
        before = [model(x) for x in inputs]
        report = freeze(model)
        assert len(report) == len(report.frozen) == count and all(states(model))
        for x, y in zip(inputs, before, strict=True):
            assert torch.equal(model(x), y)
    # A narrow stack of bf16 may have to read values again, so it takes no copies.
    if dtype != torch.bfloat16 or name not in NARROW_STACKS:
        assert all(reads(model, x) for x in inputs)
    assert unfreeze(model) == count and not states(model) and not reads(model, inputs[0])


def test_conv1d():
    transformers = pytest.importorskip("transformers.pytorch_utils")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act, self.proj = transformers.Conv1D(40, 24), nn.GELU(), transformers.Conv1D(24, 40)

        def forward(self, x):
            return self.proj(self.act(self.fc(x)))

    model, x = Block(), torch.randn(5, 24)
    fuse(model).assert_fused(1)
    with torch.no_grad():
        before = model(x)
        assert len(freeze(model).frozen) == 2
        assert torch.equal(model(x), before)
        model.fc.weight.mul_(2)
        after = model(x)
    assert not torch.equal(after, before) and fl.stats()["fallback"] == {CHANGED: 1}
    fl.reset_stats()


def optimizer_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(3, 24)).square().sum().backward()
    optimizer.step()
    model.zero_grad()


def load(model):
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})


def load_assigned(model):
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()}, assign=True)


@torch.no_grad()
def copy_into(model):
    model[0].weight.copy_(torch.randn(40, 24))


@torch.no_grad()
def one_element(model):
    model[2].weight[3, 4] += 1


@torch.no_grad()
def through_a_view(model):
    model[0].weight.view(-1)[5:9].zero_()


@torch.no_grad()
def through_detach(model):
    model[0].weight.detach().mul_(2)


def new_parameter(model):
    model[0].weight = nn.Parameter(torch.randn(40, 24))


def new_data(model):
    model[0].weight.data = torch.randn(40, 24)


def swapped_data(model):
    model[0].weight.data = model[0].weight.data.flip(0)


def to_double_and_back(model):
    model.double().float()
    with torch.no_grad():
        model[0].weight.mul_(2)


@torch.no_grad()
def foreach(model):
    torch._foreach_mul_([p for p in model.parameters() if p.dim() == 2], 2.0)


def initialised_anew(model):
    nn.init.normal_(model[0].weight)


@torch.no_grad()
def ema(model):
    model[0].weight.lerp_(torch.randn(40, 24), 0.5)


@torch.no_grad()
def with_out(model):
    torch.mul(torch.randn(40, 24), 2, out=model[0].weight)


TRACED_CHANGES = (
    optimizer_step, load, load_assigned, copy_into, one_element, through_a_view, through_detach, new_parameter,
    new_data, swapped_data, to_double_and_back, foreach, initialised_anew, ema, with_out,
)  # fmt: skip


@pytest.mark.parametrize("change", TRACED_CHANGES, ids=lambda change: change.__name__)
def test_changes_are_noticed(change, reads):
    model, x = fused_mlp(), torch.randn(6, 24)
    freeze(model)
    change(model)
    fresh = mlp()
    fresh.load_state_dict(model.state_dict())
    fuse(fresh)
    with torch.no_grad():
        assert torch.equal(model(x), fresh(x))
    assert not all(states(model)) or len(states(model)) < 2
    freeze(model)
    fl.reset_stats()
    with torch.no_grad():
        assert torch.equal(model(x), fresh(x))
    assert reads(model, x) and not fl.stats()["fallback"]


def through_data(model):
    model[0].weight.data.mul_(2)


def through_numpy(model):
    model[0].weight.detach().numpy()[:] *= 2


def through_a_storage(model):
    torch.frombuffer(model[0].weight.detach().numpy(), dtype=torch.float32).add_(1)


def _double_in_a_child(weight):
    weight *= 2


def through_shared_memory(model):
    process = multiprocessing.get_context("fork").Process(target=_double_in_a_child, args=(model[0].weight.detach(),))
    process.start()
    process.join()


@pytest.mark.parametrize(
    "change",
    [through_data, through_numpy, through_a_storage, through_shared_memory],
    ids=lambda change: change.__name__,
)
def test_changes_without_a_trace(change):
    """Noticed with check_content and under FASTLANE_STRICT; without, the old values are used, as the documents say."""
    model, x = mlp().share_memory(), torch.randn(6, 24)
    fuse(model)
    with torch.no_grad():
        before = model(x)
        freeze(model)
        change(model)
        assert torch.equal(model(x), before) and all(states(model))
        library.set_strict(True)
        try:
            with pytest.raises(RuntimeError, match="a frozen weight has changed since freeze"):
                model(x)
        finally:
            library.set_strict(False)
        freeze(model, check_content=True)
        after = model(x)
        assert not torch.equal(after, before)
        change(model)
        model(x)
    assert states(model) == [False, True] and fl.stats()["fallback"] == {CHANGED: 1}
    fl.reset_stats()


@pytest.mark.parametrize("recompute", [False, True])
def test_training_goes_on(recompute):
    """50 steps of a frozen model are those of a model that is not; between them, inference reads the new values."""
    torch.manual_seed(0)
    frozen = fused_mlp() if not recompute else nn.Sequential(fl.ResidualMLP(24, 40), fl.LinearGELUResidual(24, 24))
    plain = copy.deepcopy(frozen)
    freeze(frozen)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for model in (frozen, plain)]
    for step in range(50):
        x = torch.randn(8, 24)
        losses = []
        for model, optimizer in zip((frozen, plain), optimizers, strict=True):
            optimizer.zero_grad()
            loss = (model(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == losses[1]
        if step % 10 == 9:
            if step > 20:
                freeze(frozen)
            with torch.no_grad():
                assert torch.equal(frozen(x), plain(x))
    fl.reset_stats()


def test_copies_and_files_have_no_copies(reads):
    model, x = fused_mlp(), torch.randn(4, 24)
    keys = list(model.state_dict())
    freeze(model)
    assert list(model.state_dict()) == keys and all(states(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    size = buffer.tell()
    unfreeze(model)
    other = io.BytesIO()
    torch.save(model, other)
    assert abs(size - other.tell()) < 1000
    freeze(model)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert not states(twin) and all(states(model))
        with torch.no_grad():
            assert torch.equal(twin(x), model(x))
        assert len(freeze(twin).frozen) == 2 and reads(twin, x)


def test_memory_goes_with_the_model():
    model = fused_mlp()
    freeze(model)
    copies = [weakref.ref(c) for m in model.modules() for c in m.__dict__.get("_fastlane_copies", ())]
    assert len(copies) == 2
    del model
    gc.collect()
    assert all(copy() is None for copy in copies)


def test_tied_weights_and_parts():
    model = nn.Sequential(fl.ResidualMLP(24, 24), fl.ResidualMLP(24, 24))
    model[1].fc1.weight = model[0].fc1.weight
    x = torch.randn(4, 24)
    with torch.no_grad():
        before = model(x)
        freeze(model)
        assert torch.equal(model(x), before)
        assert unfreeze(model[0]) == 2
        assert torch.equal(model(x), before)


def test_other_tensors_in_the_same_memory():
    """The transpose of a square weight, a part that begins where it begins, the memory read as another dtype."""
    layer, x = fl.LinearGELUResidual(24, 24), torch.randn(4, 24)
    weight = layer.weight.detach()
    others = (weight.t(), weight[:12], weight.view(-1)[: 24 * 12].view(24, 12), weight.view(torch.bfloat16)[:, :24])
    expected = [fl.linear_gelu_residual(x[:, : w.shape[1]].to(w.dtype), w) for w in others]
    freeze(layer)
    for other, y in zip(others, expected, strict=True):
        got = fl.linear_gelu_residual(x[:, : other.shape[1]].to(other.dtype), other)
        torch.testing.assert_close(got, y, rtol=0, atol=0, equal_nan=True)
    assert library.is_frozen(weight) is True and library.is_frozen(weight.t()) is None


def test_what_cannot_be_frozen():
    with torch.inference_mode():
        model = fl.ResidualMLP(24, 40)
    report = freeze(model)
    assert not report.frozen and "inference mode" in report.weights[0].reason
    meta = fl.ResidualMLP(24, 40).to("meta")
    assert "on meta" in freeze(meta).weights[0].reason
    assert str(freeze(nn.Linear(3, 3))) == "no weight of a fused operation was found"
    for wrong in (lambda: freeze(3), lambda: unfreeze(None), lambda: freeze(model, check_content="yes")):
        with pytest.raises(TypeError, match="expected"):
            wrong()


def test_report():
    report = freeze(nn.Sequential(fl.ResidualMLP(256, 1024)))
    assert [weight.name for weight in report] == ["0.fc1", "0.fc2"]
    assert [weight.shape for weight in report] == [(1024, 256), (256, 1024)]
    assert report.summary() == "2 of 2 weights frozen, 2.0 MiB added"
    assert str(report).splitlines()[0].split() == ["weight", "shape", "MiB", "reason"]
