"""Forwards and changes that look like an MLP at first glance: `fuse` must refuse them or keep their behaviour."""

import copy
import random as python_random
import threading

import pytest
import torch
import torch.nn.functional as F
from test_fuse import NamedMlp, fused_calls
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import fastlane_ext as fl

pytestmark = pytest.mark.filterwarnings("ignore:fuse. nothing runs fused")


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2, self.ln = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8)
        self.flag, self.count, self.seen = False, 0, None

    def mlp(self, x):
        return self.fc2(self.act(self.fc1(x)))


def forward_of(function):
    return type(function.__name__, (Mlp,), {"forward": function})


def _helper(x):
    return x


FORWARDS = {}


def refused(reason):
    def remember(function):
        FORWARDS[function.__name__] = (function, reason)
        return function

    return remember


@refused("is decorated")
@torch.no_grad()
def without_grad(self, x):
    return self.fc2(self.act(self.fc1(x)))


@refused("has a with block")
def partly_without_grad(self, x):
    with torch.no_grad():
        h = self.act(self.fc1(x))
    return self.fc2(h)


@refused("has a with block")
def own_precision(self, x):
    with torch.autocast("cpu", enabled=False):
        return self.fc2(self.act(self.fc1(x)))


@refused("also calls checkpoint")
def checkpointed(self, x):
    return checkpoint(self.mlp, x, use_reentrant=False)


@refused("uses self.mlp")
def through_a_method(self, x):
    return self.mlp(x)


@refused("also calls _helper")
def through_a_helper(self, x):
    return self.fc2(_helper(self.act(self.fc1(x))))


@refused("decides or repeats")
def optional_condition(self, x, cond=None):
    if cond is not None:
        x = self.ln(x)
    return self.fc2(self.act(self.fc1(x)))


@refused("decides or repeats")
def asks_for_types(self, x):
    return self.fc2(self.act(self.fc1(x))) if isinstance(x, torch.Tensor) else x


@refused("decides or repeats")
def layer_drop(self, x):
    if self.training and python_random.random() < 0.1:
        return x
    return x + self.fc2(self.act(self.fc1(x)))


@refused("decides or repeats")
def asks_its_flag(self, x):
    return self.fc2(self.act(self.fc1(x))) * 2 if self.flag else self.fc2(self.act(self.fc1(x)))


@refused("changes something in place")
def in_place_sum(self, x):
    x += self.fc2(self.act(self.fc1(x)))
    return x


@refused("also uses 'add_' of a tensor")
def in_place_method(self, x):
    return self.fc2(self.act(self.fc1(x))).add_(x)


@refused("changes something in place")
def counts(self, x):
    self.count += 1
    return self.fc2(self.act(self.fc1(x)))


@refused("sets an attribute")
def records(self, x):
    self.seen = x
    return self.fc2(self.act(self.fc1(x)))


@refused("also computes mul")
def scaled(self, x):
    return self.fc2(self.act(self.fc1(x))) * 0.5


@refused("adds a float")
def shifted(self, x):
    return self.fc2(self.act(self.fc1(x))) + 1.0


@refused("any number of arguments")
def any_arguments(self, *xs):
    return self.fc2(self.act(self.fc1(xs[0])))


@refused("returns something else than one tensor")
def returns_a_pair(self, x):
    return self.fc2(self.act(self.fc1(x))), None


@refused("also computes getitem")
def first_token(self, x):
    return self.fc2(self.act(self.fc1(x[0])))


@pytest.mark.parametrize(("function", "reason"), FORWARDS.values(), ids=FORWARDS)
def test_forwards_that_are_more_than_they_seem(function, reason):
    model = forward_of(function)()
    before = dict(vars(model))
    report = fl.fuse(model)
    assert len(report) == 1 and not report.fused
    assert reason in report.sites[0].reason
    assert vars(model) == before


def test_a_layer_used_twice_and_an_output_used_twice():
    def twice(self, x):
        h = self.fc1(x)
        return self.fc2(self.act(h)) + self.ln(self.fc2(h))

    def again(self, x):
        return self.fc2(self.act(self.fc1(self.fc2(self.act(self.fc1(x))))))

    for function, sites in ((twice, None), (again, 2)):
        model = forward_of(function)()
        fused = copy.deepcopy(model)
        report = fl.fuse(fused)
        assert sites is None or len(report.fused) == sites
        x = torch.randn(3, 8)
        torch.testing.assert_close(fused(x), model(x))


def test_a_residual_that_a_child_changes_in_place_meanwhile():
    def forward(self, x):
        y = self.fc2(self.act(self.fc1(x)))
        self.relu(x)
        return y + x

    model = forward_of(forward)()
    model.relu = nn.ReLU(inplace=True)
    fused = copy.deepcopy(model)
    assert [site.pattern for site in fl.fuse(fused)] == ["Linear→GELU→Linear"]
    x = torch.randn(3, 8)
    torch.testing.assert_close(fused(x.clone()), model(x.clone()))


class MonteCarlo(nn.Dropout):
    def forward(self, x):
        return F.dropout(x, self.p, True)


class OwnDropout(nn.Dropout):
    pass


class Scale(nn.Identity):
    def forward(self, x):
        return 3 * x


@pytest.mark.parametrize("between", [MonteCarlo(0.5), OwnDropout(0.9), Scale(), nn.AlphaDropout(0.5)], ids=repr)
@pytest.mark.parametrize("training", [False, True])
def test_dropouts_and_identities_that_are_subclasses(between, training):
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), between, nn.Linear(16, 8)).train(training)
    fused = copy.deepcopy(model)
    assert [site.pattern for site in fl.fuse(fused)] == ["Linear→GELU"]
    x = torch.randn(4, 8)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(fused(x), expected)


class NoisyInTraining(nn.Module):
    def forward(self, x):
        return F.dropout(F.gelu(x), 0.5, self.training)


class Branching(nn.Module):
    def forward(self, x):
        return F.gelu(x) + (1 if self.training else 0)


class Recording(nn.Module):
    def forward(self, x):
        self.last = x
        return F.gelu(x)


class TensorState(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.ones(())

    def forward(self, x):
        return F.gelu(x) * self.scale


@pytest.mark.parametrize("kind", [NoisyInTraining, Branching, Recording, TensorState], ids=lambda kind: kind.__name__)
def test_activations_that_may_change(kind):
    act = kind()
    model = NamedMlp(act=act).eval()
    before = set(vars(act))
    (site,) = fl.fuse(model)
    assert not site.fused and "is not known to compute a GELU" in site.reason
    assert set(vars(act)) == before


def sequential():
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def test_new_instances_of_a_fused_class():
    model = sequential()
    fl.fuse(model)
    x = torch.randn(4, 8)
    assert torch.equal(model[:2](x), F.gelu(model[0](x)))
    assert type(model)(nn.Identity())(x) is x
    part = model[1:]
    fl.fuse(part[1:], linears=True, dry_run=True)
    whole = type(model)(*model)
    fl.fuse(whole).assert_fused(1)
    assert type(whole) is type(model)
    assert fl.unfuse(whole) == 1 and fl.unfuse(part) == 1 and type(part) is nn.Sequential
    block = NamedMlp()
    fl.fuse(block)
    assert type(block)()(torch.randn(2, 12)).shape == (2, 12)
    assert repr(type(block)()).startswith("NamedMlp(")


def test_explain_leaves_no_trace():
    class DropPath(nn.Module):
        def forward(self, x):
            return x * torch.rand(())

    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), DropPath(), nn.Linear(64, 64), nn.Dropout1d(0.5))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    fl.explain(model, linears=True)
    assert torch.equal(torch.rand(1), expected)


def test_other_threads_may_run_their_models_meanwhile():
    other, x = NamedMlp(), torch.randn(2, 12)
    errors, stop = [], threading.Event()

    def run_other():
        while not stop.is_set():
            try:
                other(x)
            except Exception as error:
                errors.append(error)

    def fuse_own():
        try:
            for _ in range(20):
                model = nn.Sequential(NamedMlp(), NamedMlp())
                fl.fuse(model).assert_fused(2)
                fl.unfuse(model)
        except Exception as error:
            errors.append(error)

    runner = threading.Thread(target=run_other)
    fusers = [threading.Thread(target=fuse_own) for _ in range(3)]
    runner.start()
    for thread in fusers:
        thread.start()
    for thread in fusers:
        thread.join()
    stop.set()
    runner.join()
    assert not errors


def test_a_residual_that_is_wider_than_the_layer():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 1)

        def forward(self, x):
            return x + self.fc(x)

    model = Narrow()
    x = torch.randn(4, 8)
    expected = model(x)
    fl.fuse(model).assert_fused(1)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.expects_fallback("NamedMlp: its arguments are not plain tensors, one for each input")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors():
    model = NamedMlp()
    rows = [torch.randn(2, 12), torch.randn(3, 12)]
    expected = torch.cat([model(r) for r in rows])
    fl.fuse(model)
    got = model(torch.nested.nested_tensor(rows))
    torch.testing.assert_close(torch.cat(got.unbind()), expected)


def test_a_class_that_enters_its_subclasses_into_a_registry():
    registry = {}

    class Registering(NamedMlp):
        def __init_subclass__(cls, *, key, **options):
            super().__init_subclass__(**options)
            registry[key] = cls

    class Entered(Registering, key="entered"):
        pass

    model = nn.Sequential(Entered())
    fl.explain(model)
    fl.fuse(model).assert_fused(1)
    assert registry == {"entered": Entered}

    class Derived(type(model[0]), key="derived"):
        pass

    assert registry == {"entered": Entered, "derived": Derived}


def test_classes_that_take_no_subclass():
    class Meta(type):
        pass

    class WithMeta(NamedMlp, metaclass=Meta):
        pass

    class Reduces(NamedMlp):
        def __reduce__(self):
            return Reduces, ()

    model = nn.Sequential(NamedMlp(), WithMeta(), Reduces(), fx.symbolic_trace(NamedMlp()))
    report = fl.fuse(model)
    assert [site.fused for site in report] == [True, False, False, False]
    for site, reason in zip(
        report.refused, ("a metaclass, Meta", "a __reduce__ of its own", "GraphModule"), strict=True
    ):
        assert reason in site.reason


def test_unfuse_changes_all_or_nothing():
    model = nn.Sequential(NamedMlp(), NamedMlp())
    fl.fuse(model)
    fused = type(model[1])
    model[1].__class__ = type("Sharded", (fused,), {})
    with pytest.raises(RuntimeError, match="a Sharded has changed its class since fuse"):
        fl.unfuse(model)
    assert type(model[0]) is fused
    model[1].__class__ = fused
    assert fl.unfuse(model) == 2


def test_strict_leaves_wishes_and_measurements_alone(monkeypatch):
    from fastlane_ext import fusion

    monkeypatch.setattr(fusion, "_measured", lambda *_: {"library_ms": 1.0, "fused_ms": 1.0})
    model = nn.Sequential(NamedMlp(), nn.Linear(12, 4), NamedMlp())
    report = fl.fuse(model, filter_fn=lambda name, _: name != "2", linears=True, strict=True)
    assert [site.name for site in report.fused] == ["0"]
    assert {site.reason for site in report.refused} == {
        "left out by filter_fn",
        "the library is as fast here: its time is 1.00 of the fused op's",
    }


def test_module_lists_are_no_sites():
    model = nn.Sequential(NamedMlp())
    model.spare = nn.ModuleList([nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 3)])
    assert [site.name for site in fl.explain(model)] == ["0"]


def test_disabled_as_a_decorator():
    model, x = NamedMlp(), torch.randn(2, 12)
    fl.fuse(model)
    calls = fused_calls()
    fl.disabled()(model)(x)

    @fl.disabled()
    def rows():
        yield model(x)
        yield model(x)

    for _ in rows():
        assert fused_calls() == calls
        model(x)  # outside the generator's own code
        calls += 1
        assert fused_calls() == calls
