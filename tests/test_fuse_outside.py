"""`fuse` and what lies outside a module's own code and attributes: helpers, globals, classes, modes of the caller."""

import functools
import math
import types

import pytest
import torch
import torch.nn.functional as F
from test_fuse import NamedMlp, fused_calls
from torch import nn
from torch._subclasses import FakeTensorMode

import fastlane_ext as fl
from fastlane_ext import reference

pytestmark = pytest.mark.filterwarnings("ignore:fuse. nothing runs fused")
MODE, SETTINGS, SEEN = "none", {"approximate": "none"}, []


class Config:
    approximate = "none"


def by_dtype(x):
    return F.gelu(x) if x.dtype == torch.float64 else F.relu(x)


def by_rank(x):
    return F.gelu(x) if x.dim() == 1 else F.relu(x)


def logging(x):
    SEEN.append(x.shape)
    return F.gelu(x)


def by_global(x):
    return F.gelu(x, approximate=SETTINGS["approximate"])


def by_class(x):
    return F.gelu(x, approximate=Config.approximate)


def by_attribute_of_a_function(x):
    return F.gelu(x, approximate=plain.approximate)


def by_module_in_a_variable(x):
    config = CONFIG
    return F.gelu(x, approximate=config.approximate)


def with_default(x, approximate="none"):
    return F.gelu(x, approximate=approximate)


def by_index(x):
    return F.gelu(x, approximate=("none", "tanh")[x.requires_grad])


def by_comparison(x):
    return F.gelu(x) * (1 + (x.shape == (7, 7)))


def through_two(x):
    return by_dtype(x)


def in_a_circle(x):
    return in_a_circle(x)


def by_closure():
    mode = "none"

    def act(x):
        return F.gelu(x, approximate=mode)

    def change():
        nonlocal mode
        mode = "tanh"

    act.change = change
    return act


def plain(x):
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


plain.approximate = "none"
CONFIG = types.ModuleType("config")
CONFIG.approximate = "none"
BY_DATA = [by_global, by_class, by_attribute_of_a_function, by_module_in_a_variable]
HELPERS = [
    by_dtype,
    by_rank,
    logging,
    *BY_DATA,
    with_default,
    through_two,
    by_index,
    by_comparison,
    in_a_circle,
    by_closure(),
]
each_helper = pytest.mark.parametrize("helper", HELPERS, ids=lambda f: f.__name__)


class Kept(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.f = act

    def forward(self, x):
        return self.f(x)


def calling(act):
    """A class whose forward reads the helper from an enclosing function."""

    class Calling(nn.Module):
        def forward(self, x):
            return act(x)

    return Calling()


@each_helper
@pytest.mark.parametrize(
    "make", [Kept, calling, lambda act: Kept(functools.partial(act))], ids=["kept", "read", "partial"]
)
def test_an_activation_whose_helper_does_more_is_refused(make, helper):
    model = nn.Sequential(nn.Linear(8, 8), make(helper))
    fl.fuse(model)
    assert type(model) is nn.Sequential


@pytest.mark.parametrize(
    "make",
    [
        lambda: Kept(plain),
        lambda: calling(plain),
        lambda: Kept(F.gelu),
        lambda: calling(F.gelu),
        lambda: Kept(functools.partial(F.gelu, approximate="tanh")),
    ],
)
def test_an_activation_whose_helper_is_all_its_own_is_fused(make):
    model = nn.Sequential(nn.Linear(8, 8), make()).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = model(x)
    fl.fuse(model).assert_fused(1)
    torch.testing.assert_close(model(x), expected, rtol=1e-7, atol=1e-7)
    assert fused_calls() == 1


class OfItsClass(nn.Module):
    approximate = "none"

    def forward(self, x):
        return F.gelu(x, approximate=self.approximate)


class OwnCall(nn.GELU):
    def __call__(self, x):
        return 2 * super().__call__(x)


@pytest.mark.parametrize("kind", [OfItsClass, OwnCall])
def test_an_activation_that_its_class_decides_is_refused(kind):
    model = nn.Sequential(nn.Linear(8, 8), kind())
    fl.fuse(model)
    assert type(model) is nn.Sequential


class Backwards(nn.Sequential):
    def __iter__(self):
        return iter([*self._modules.values()][::-1])


class WithoutGelu(nn.Sequential):
    def __iter__(self):
        return (child for child in self._modules.values() if not isinstance(child, nn.GELU))


@pytest.mark.parametrize("kind", [Backwards, WithoutGelu])
def test_a_sequential_with_an_order_of_its_own(kind):
    model = kind(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    (site,) = fl.fuse(model)
    assert not site.fused and type(model) is kind


@pytest.mark.parametrize("kind", [nn.Linear, nn.GELU])
def test_a_class_of_children_with_a_call_of_its_own(kind, monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    monkeypatch.setattr(kind, "__call__", lambda self, x: 2 * nn.Module.__call__(self, x))
    fl.fuse(model)
    assert type(model) is nn.Sequential


class Ordered(nn.Sequential):
    pass


def test_a_sequential_gets_another_order(monkeypatch):
    model, x = Ordered(nn.Linear(8, 8), nn.GELU()), torch.randn(3, 8)
    fl.fuse(model).assert_fused(1)
    monkeypatch.setattr(Ordered, "__iter__", Backwards.__iter__, raising=False)
    assert torch.equal(model(x), Ordered.forward(model, x))
    assert fl.stats()["fallback"] == {"Ordered: Ordered has another __iter__ now": 1}
    fl.reset_stats()


class ReadsAGlobal(NamedMlp):
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=MODE))


class ReadsAClass(NamedMlp):
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=Config.approximate))


class ReadsAFunction(NamedMlp):
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=plain.approximate))


class KeepsAClass(NamedMlp):
    def forward(self, x):
        config = Config
        return self.fc2(F.gelu(self.fc1(x), approximate=config.approximate))


class KeepsAModule(NamedMlp):
    def forward(self, x):
        config = CONFIG
        return self.fc2(F.gelu(self.fc1(x), approximate=config.approximate))


class ReadsAListByDefault(NamedMlp):
    def forward(self, x, modes=["none"]):  # noqa: B006
        return self.fc2(F.gelu(self.fc1(x), approximate=modes[0]))


@pytest.mark.parametrize(
    "kind", [ReadsAGlobal, ReadsAClass, ReadsAFunction, KeepsAClass, KeepsAModule, ReadsAListByDefault]
)
def test_a_container_that_reads_what_may_change_is_refused(kind):
    model = kind(8, 8)
    (site,) = fl.fuse(model)
    assert type(model) is kind and "may change" in site.reason


class WithDefault(NamedMlp):
    def forward(self, x, approximate="none"):
        return self.fc2(F.gelu(self.fc1(x), approximate=approximate))


def test_a_forward_whose_defaults_change(monkeypatch):
    model, x = WithDefault(8, 8), torch.randn(3, 8)
    fl.fuse(model).assert_fused(1)
    model(x)
    assert fused_calls() == 1
    monkeypatch.setattr(WithDefault.forward, "__defaults__", ("tanh",))
    fl.reset_stats()
    assert torch.equal(model(x), WithDefault.forward(model, x))
    assert fl.stats()["fallback"] == {"WithDefault: WithDefault.forward has other code now": 1}
    fl.reset_stats()


def written_fused():
    yield fl.ResidualMLP(8, 16), reference.ResidualMLP(8, 16)
    yield fl.LinearGELUResidual(8, 4, shortcut="projection"), reference.LinearGELUResidual(8, 4, shortcut="projection")
    yield (
        fl.ResidualNetwork([8, 8, 4], shortcut="projection"),
        reference.ResidualNetwork([8, 8, 4], shortcut="projection"),
    )


@pytest.mark.parametrize("kind", [nn.Linear, nn.GELU])
def test_torchs_own_classes_get_another_forward(kind, monkeypatch):
    """Modules that are written fused then call their children, as eager modules of the same names do."""
    x, original = torch.randn(3, 8), kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * original(self, x))
    for fused, eager in written_fused():
        eager.load_state_dict(fused.state_dict())
        if isinstance(fused, fl.LinearGELUResidual) and kind is nn.GELU:
            continue  # has no such child
        torch.testing.assert_close(fused(x), eager(x))
    reasons = fl.stats()["fallback"]
    assert reasons and all("another forward now" in reason for reason in reasons)
    fl.reset_stats()


def test_under_a_device_or_a_fake_mode():
    """The caller's mode leaves nothing behind in later calls."""
    from fastlane_ext.fusion import activations

    for mode in (torch.device("meta"), FakeTensorMode()):
        activations._grid.cache_clear()
        with mode:
            fl.fuse(nn.Sequential(nn.Linear(8, 8), nn.GELU())).assert_fused(1)
        model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        fl.fuse(model).assert_fused(1)
    model = nn.Sequential(nn.Linear(9, 11))
    with torch.device("meta"):
        fl.fuse(model, linears=True)
    with FakeTensorMode():
        (site,) = fl.fuse(nn.Sequential(nn.Linear(9, 11)), linears=True)
    assert site.reason == "has no data to be measured with"


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_inputs_run_the_original(layout):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU()), torch.eye(8)
    fl.fuse(model).assert_fused(1)
    expected = model(x)
    fl.reset_stats()
    torch.testing.assert_close(model(getattr(x, layout)()), expected)
    assert sum(fl.stats()["fallback"].values()) == 1
    fl.reset_stats()


@pytest.mark.parametrize("shape", [(1,), (1, 8)], ids=str)
def test_a_bias_that_broadcasts(shape):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU()), torch.randn(3, 8)
    fl.fuse(model).assert_fused(1)
    model[0].bias = nn.Parameter(torch.ones(shape))
    expected = F.gelu(F.linear(x, model[0].weight, model[0].bias))
    torch.testing.assert_close(model(x), expected)
    reason = "Sequential: 0 has parameters of other shapes than a linear layer's"
    assert fl.stats()["fallback"] == {reason: 1}
    fl.reset_stats()


def test_measuring_is_not_counted_nor_done_while_disabled():
    with fl.disabled():
        (site,) = fl.fuse(nn.Linear(23, 29), linears=True)
        assert site.reason == "cannot be measured while fused operations are disabled" and site.measured is None
    (site,) = fl.fuse(nn.Linear(23, 29), linears=True)
    assert site.measured["fused_ms"] > 0 and fused_calls() == 0
    assert fl.stats()["fallback"] == {}
