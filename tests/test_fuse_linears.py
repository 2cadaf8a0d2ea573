"""`fuse(linears=True)`: plain linear layers, taken where a measurement says so."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_fuse import NamedMlp, assert_same_results, fused_calls, patterns
from torch import nn
from torch.nn.utils import prune

import fastlane_ext as fl


@pytest.mark.parametrize("faster", ["fused", "library"])
def test_linears_are_measured(monkeypatch, faster):
    """The times depend on the machine and are not checked; the conclusions from given times are checked."""
    from fastlane_ext import fusion

    times = {"library_ms": 2.0, "fused_ms": 1.0 if faster == "fused" else 4.0}
    measure, found = fusion._measured, []

    def measured(weight, bias):
        found.append(measure(weight, bias))
        return found[-1] | times

    monkeypatch.setattr(fusion, "_measured", measured)
    model = nn.Sequential(nn.Linear(256, 512), nn.LayerNorm(512), nn.Linear(512, 256, bias=False), NamedMlp(256, 512))
    fused = copy.deepcopy(model)
    report = fl.fuse(fused, linears=True)
    assert [site.name for site in report] == ["0", "2", "3"]
    assert len(found) == 2 and all(one["library_ms"] > 0 and one["fused_ms"] > 0 for one in found)
    for site in report.sites[:2]:
        assert site.measured == {"rows": 128, **times} and site.fused == (faster == "fused")
        assert site.fused or "the library is faster here: its time is 0.50 of the fused op's" in site.reason
    assert_same_results(model, fused, torch.randn(4, 256))
    fl.unfuse(fused)
    assert type(fused[0]) is nn.Linear


def test_measuring_leaves_the_counting_as_it_was():
    count = fl._load.library.count
    assert count(False) is True
    try:
        fl.fuse(nn.Linear(33, 35), linears=True)
        assert count(False) is False
    finally:
        count(True)
    fl.fuse(nn.Linear(35, 33), linears=True)
    assert count(True) is True


@pytest.fixture
def linears_always_win(monkeypatch):
    from fastlane_ext import fusion

    monkeypatch.setattr(fusion, "_measured", lambda *_: {"library_ms": 2.0, "fused_ms": 1.0})


def test_a_fused_linear_is_a_linear(linears_always_win):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    fused = copy.deepcopy(model)
    fl.fuse(fused, linears=True).assert_fused(2)
    assert isinstance(fused[0], nn.Linear) and fused[0].in_features == 6
    calls = fused_calls()
    assert_same_results(model, fused, torch.randn(4, 6))
    assert fused_calls() == calls + 2
    assert torch.equal(pickle.loads(pickle.dumps(fused))(torch.ones(2, 6)), fused(torch.ones(2, 6)))
    fused[0].register_forward_hook(lambda *a: a[2] + 1)
    model[0].register_forward_hook(lambda *a: a[2] + 1)
    assert_same_results(model, fused, torch.randn(4, 6))


def test_a_pruned_fused_linear(linears_always_win):
    model = nn.Linear(6, 8)
    fl.fuse(model, linears=True)
    prune.l1_unstructured(model, "weight", amount=5)
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), F.linear(x, model.weight, model.bias))


def test_a_container_of_fused_linears(linears_always_win):
    """Linear layers that were fused one by one run as an MLP after their container is fused."""
    model = NamedMlp()
    for linear in (model.fc1, model.fc2):
        fl.fuse(linear, linears=True)
    report = fl.fuse(model)
    assert patterns(report) == ["Linear→GELU→Linear"]
    calls = fused_calls()
    model(torch.randn(2, 12))
    assert fused_calls() == calls + 1
