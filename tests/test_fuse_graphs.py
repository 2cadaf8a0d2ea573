"""Fused models under torch.compile: graphs notice every change that graphs of the original would notice."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from test_fuse_lookup import Mlp, another_dropout, another_dropout_function
from torch import nn

import fastlane_ext as fl

pytestmark = pytest.mark.filterwarnings("ignore:fuse. nothing runs fused")


@pytest.mark.parametrize("name", ["fc1", "act"])
def test_a_forward_set_after_compiling(name):
    """accelerate and offloading set a forward later; torch.compile has to notice."""
    model, x = Mlp().eval(), torch.randn(3, 8)
    fl.fuse(model).assert_fused(1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(x)
    getattr(model, name).forward = lambda t: 2 * t
    torch.testing.assert_close(compiled(x), Mlp.forward(model, x))
    torch._dynamo.reset()
    fl.reset_stats()


@pytest.mark.parametrize("change", [another_dropout, another_dropout_function], ids=lambda change: change.__name__)
def test_another_dropout_in_a_graph(change, monkeypatch):
    model, x = Mlp().eval(), torch.randn(3, 8)
    eager = copy.deepcopy(model)
    fl.fuse(model).assert_fused(1)
    change(monkeypatch, model)
    results = [torch.compile(m, backend="eager", fullgraph=True)(x) for m in (model, eager)]
    torch.testing.assert_close(*results)
    torch._dynamo.reset()
    monkeypatch.undo()


def test_a_fused_linear_in_a_graph(monkeypatch):
    from fastlane_ext import fusion

    monkeypatch.setattr(fusion, "_measured", lambda *_: {"rows": 128, "library_ms": 2.0, "fused_ms": 1.0})
    model, x, linear = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(3, 8), F.linear
    eager = copy.deepcopy(model)
    fl.fuse(model, linears=True).assert_fused(1)
    monkeypatch.setattr(F, "linear", lambda *a: 2 * linear(*a))
    results = [torch.compile(m, backend="eager", fullgraph=True)(x) for m in (model, eager)]
    torch.testing.assert_close(*results)
    torch._dynamo.reset()
    monkeypatch.undo()


def test_another_order_of_children_in_a_graph():
    model = nn.Sequential(OrderedDict(fc=nn.Linear(8, 8), act=nn.GELU(), out=nn.Linear(8, 8)))
    x = torch.randn(3, 8)
    eager = copy.deepcopy(model)
    fl.fuse(model).assert_fused(1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(x)
    for one in (model, eager):
        fc = one.fc
        del one.fc
        one.fc = fc
    torch.testing.assert_close(compiled(x), eager(x))
    torch._dynamo.reset()
    fl.reset_stats()
