"""The models suite: contestants agree, a row says what the MLPs cost and hold; no time asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import fastlane_ext as fl
from fastlane_ext.bench import contestants, model_contestants, protocol, suites

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import report

pytestmark = pytest.mark.any_isa

TINY = model_contestants.Architecture(
    "ViTModel",
    "ViTConfig",
    tuple(
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 32,
            "patch_size": 8,
        }.items()
    ),
    lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
)


def tiny_model(**options):
    return suites.Model("tiny", TINY, 2, 17, width=32, layers=2, other_weights=0, **options)


def run(case):
    return suites.run_job(suites.Job(case, 1), repeats=1, budget=0.1, compiled=False)


def test_mlp_rows():
    forward, step = run(suites.Mlp(64, 16, 64))
    for name in ("eager", "fused"):
        assert "median_s" in forward["results"][name] and "median_s" in step["results"][name]
    assert step["path"]["fused"] == {"forward": 1, "backward": 1}
    held = step["held_bytes"]
    assert held["fused"] == 4 * 64 * (16 + 64)
    assert held["fused"] <= 0.6 * held["eager"]
    assert forward["limit"]["flops"] * 3 == step["limit"]["flops"]


def test_model_rows(monkeypatch):
    pytest.importorskip("transformers")
    from fastlane_ext import fusion

    monkeypatch.setattr(fusion, "_measured", lambda *_: {"library_ms": 2.0, "fused_ms": 1.0})
    forward, step = run(tiny_model())
    assert forward["path"]["fused"]["forward"] == 2 and step["path"]["fused"]["backward"] == 2
    assert 0 < forward["mlp_share"] < 1 and "mlp_share" not in step
    linears, _ = run(tiny_model(linears=True))
    assert linears["case"] == "tiny, linears=True" and linears["path"]["fused"]["forward"] > 2
    text = report.markdown({**suites.document([forward, step, linears]), "quiet_cores": 1e9})
    assert "before, the MLPs had" in text
    json.dumps([forward, step, linears])


def test_without_transformers(monkeypatch):
    monkeypatch.setattr(model_contestants, "has_transformers", lambda: False)
    field = model_contestants.model_contestants(TINY, False, torch.float32)
    assert [c.name for c in field] == list(contestants.NAMES)
    assert all(isinstance(c.forward, protocol.Skipped) and "pip install" in c.forward.reason for c in field)
    assert not any(isinstance(job.case, suites.Model) for job in suites.plan("all", [1]))
    assert any(isinstance(job.case, suites.Model) for job in suites.plan("models", [1]))


def test_held_bytes_leave_parameters_out():
    linear = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    assert model_contestants.held_bytes(lambda: linear(x), linear.parameters()) == 4 * 4 * 8
    fl.reset_stats()
