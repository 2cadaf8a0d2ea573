"""Two ways to run a case, fused and eager; each returns y, dx, dweight, dbias and dresidual by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlane_ext as fl
from support.cases import IN_X, Case
from support.paths import COUNTED, PATH

# Which counters of `stats` a call on CUDA may raise under it.
CUDA_PATHS = {"": ("fused", "library", "hopper"), "fused": ("fused", "hopper"), "library": ("library",)}


def eager_activation(z, activation):
    if activation == "quick_gelu":
        return z * torch.sigmoid(1.702 * z)
    return z if activation == "none" else F.gelu(z, approximate={"gelu": "none", "gelu_tanh": "tanh"}[activation])


def eager_layer(x, weight, bias=None, residual=None, *, activation="gelu", concat=False):
    y = F.linear(x, weight, bias)
    y = eager_activation(y, activation)
    if concat:
        return torch.cat([x, y], -1)
    return y if residual is None else y + residual


def fused_layer(x, weight, bias=None, residual=None, *, activation="gelu", concat=False, recompute=False):
    if concat:
        return fl.linear_gelu_concat(x, weight, bias, activation=activation)
    return fl.linear_gelu_residual(x, weight, bias, residual, activation=activation, recompute=recompute)


def as_function(case, layer=fused_layer):
    """A function of its leaves, and the leaves, for gradcheck."""
    leaves = [case.x, case.weight]
    with_bias = case.bias is not None
    with_residual = case.residual_of is not None and case.residual not in IN_X
    leaves += [case.bias] * with_bias + [case.residual_data] * with_residual
    extra = {"recompute": case.recompute} if layer is fused_layer else {}

    def call(x, weight, *rest):
        rest = list(rest)
        bias = rest.pop(0) if with_bias else None
        residual = case.residual_of(x, *rest or [None]) if case.residual_of else None
        return layer(x, weight, bias, residual, activation=case.activation, concat=case.concat, **extra)

    return call, [leaf.detach().clone().requires_grad_() for leaf in leaves]


def _run(case: Case, layer, **options) -> dict[str, Tensor]:
    leaves = {"x": case.x, "weight": case.weight, "bias": case.bias}
    if case.residual_of and case.residual not in IN_X:
        leaves["residual"] = case.residual_data
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items() if t is not None}
    x, weight, bias = leaves["x"], leaves["weight"], leaves.get("bias")
    residual = case.residual_of(x, leaves.get("residual")) if case.residual_of else None
    y = layer(x, weight, bias, residual, activation=case.activation, concat=case.concat, **options)
    grads = torch.autograd.grad(y, list(leaves.values()), case.grad)
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def run_fused(case: Case) -> dict[str, Tensor]:
    """Forward and backward; the counters prove that the kernels did both."""
    before = fl.stats()
    result = _run(case, fused_layer, **({} if case.concat else {"recompute": case.recompute}))
    after = fl.stats()
    paths = CUDA_PATHS[PATH] if case.x.is_cuda else (PATH,)
    for direction in COUNTED:
        calls = sum(after[path][direction] - before[path][direction] for path in paths)
        assert calls == 1, f"{direction} was not fused"
    assert after["fallback"] == before["fallback"]
    return result


def run_eager(case: Case) -> dict[str, Tensor]:
    return _run(case, eager_layer)
