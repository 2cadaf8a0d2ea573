"""Children that act during a fused call: they replace each other, or return values that no kernel takes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_fuse_lookup import Mlp
from torch import nn

import fastlane_ext as fl

pytestmark = pytest.mark.filterwarnings("ignore:fuse. nothing runs fused")


class Switch(nn.Module):
    """Changes its siblings when it is called."""

    def __init__(self, change):
        super().__init__()
        self.change, self.owner = change, []

    def forward(self, x):
        for owner in self.owner:
            self.change(owner)
        return x


class Switched(Mlp):
    def __init__(self, change):
        super().__init__()
        self.switch = Switch(change)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(self.switch(x))))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "act", nn.ReLU()),
        lambda m: m.fc1.register_forward_hook(lambda *a: 2 * a[2]),
        lambda m: setattr(m.fc1, "forward", lambda x: 3 * x),
        lambda m: setattr(m.act, "approximate", "tanh"),
        lambda m: setattr(m, "fc2", nn.Identity()),
        lambda m: m.__dict__.update(act=torch.relu),
    ],
    ids=["another act", "a hook", "a forward", "another form", "no layer", "an attribute"],
)
def test_a_child_that_changes_its_siblings_meanwhile(change):
    model, x = Switched(change), 3 * torch.randn(3, 8)
    eager = copy.deepcopy(model)
    fl.fuse(model).assert_fused(1)
    for one in (model, eager):
        one.switch.owner.append(one)
    assert torch.equal(model(x), eager(x))
    assert len(fl.stats()["fallback"]) == 1
    fl.reset_stats()


class Doubling(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        y = super().__torch_function__(function, kinds, args, kwargs)
        return 2 * y if function is F.linear else y


class Gives(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


class AfterAChild(Mlp):
    def __init__(self, make):
        super().__init__()
        self.pre = Gives(make)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(self.pre(x))))


class AddsAChild(AfterAChild):
    def forward(self, x):
        r = self.pre(x)
        return self.fc1(x) + r


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.as_subclass(Doubling),
        lambda x: x.to_sparse_csr(),
        lambda x: torch.nested.nested_tensor([x[:1], x[1:]], layout=torch.jagged),
        lambda x: 2.5,
    ],
    ids=["a subclass", "sparse", "jagged", "a number"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
def test_a_child_that_gives_no_plain_tensor(make):
    x = torch.randn(3, 8)
    for kind in (AfterAChild, AddsAChild):
        model = kind(make).requires_grad_(False)
        eager = copy.deepcopy(model)
        fl.fuse(model).assert_fused(1)
        try:
            expected = eager(x)
        except Exception as error:
            with pytest.raises(type(error)):
                model(x)
        else:
            got = model(x)
            assert type(got) is type(expected) and got.layout == expected.layout
            for a, b in zip(
                got.unbind() if got.is_nested else [got],
                expected.unbind() if got.is_nested else [expected],
                strict=True,
            ):
                assert torch.equal(
                    a.to_dense() if a.layout != torch.strided else a, b.to_dense() if b.layout != torch.strided else b
                )
        assert list(fl.stats()["fallback"]) == [f"{kind.__name__}: a child gave something else than a plain tensor"]
        fl.reset_stats()


class AddsByFunction(Mlp):
    def __init__(self, make):
        super().__init__()
        self.pre = Gives(make)

    def forward(self, x):
        return torch.add(self.pre(x), self.act(self.fc1(x)))


class Adding(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        y = super().__torch_function__(function, kinds, args, kwargs)
        return 10 * y if function is torch.add else y


@pytest.mark.parametrize(
    "make", [lambda x: x.as_subclass(Adding), lambda x: (1,), lambda x: x], ids=["own", "tuple", "plain"]
)
def test_a_sum_by_function(make):
    model, x = AddsByFunction(make).requires_grad_(False), torch.randn(3, 8)
    eager = copy.deepcopy(model)
    fl.fuse(model).assert_fused(1)
    try:
        expected = eager(x)
    except TypeError:
        with pytest.raises(TypeError):
            model(x)
    else:
        torch.testing.assert_close(model(x), expected)
    fl.reset_stats()


def test_many_other_children_cost_no_more_than_eager():
    """The cost of a snapshot of all children at each call would grow with the square of their number."""
    from fastlane_ext.fusion.execute import _Lookup

    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), *[nn.ReLU() for _ in range(50)])
    fl.fuse(model).assert_fused(1)
    plan = model.__dict__["_fastlane_plan"]
    assert plan.looked_up_early == frozenset()
    nested = Switched(lambda m: None)
    fl.fuse(nested).assert_fused(1)
    assert nested.__dict__["_fastlane_plan"].looked_up_early == {0}
    lookup = _Lookup(nested, frozenset({0}))
    lookup.called(3)
    assert list(lookup.before) == [0]
