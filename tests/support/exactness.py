"""The rules of exactness: never less exact than eager, and exact on integers."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from support.cases import Case
from support.oracle import as_numpy, run_oracle
from support.runs import run_eager, run_fused


def assert_as_exact_as_eager(cases: list[Case]):
    """`assert_no_less_exact` on layers."""

    def scale_of(case, name, value):
        scale = float(np.abs(value).max(initial=0))
        if name == "dresidual" and case.grad.numel():
            # A sum of n random terms passes through values √n times as large: no order of adding avoids that.
            terms = case.grad.numel() / case.residual_of(case.x, case.residual_data).numel()
            scale = max(scale, math.sqrt(terms) * float(case.grad.abs().max()))
        return scale

    assert_no_less_exact(cases, run_fused, run_eager, run_oracle, scale_of)


def _largest(case, name, value):
    return float(np.abs(value).max(initial=0))


def assert_no_less_exact(cases, run_fused, run_eager, run_oracle, scale_of=_largest):
    """The promise: no error in the output or a gradient exceeds twice eager's own error at the same dtype.

    Errors are pooled over the cases, so that the largest error is one of thousands and not of three. Two units in the
    last place of the largest value are allowed in any case: where eager happens to be exact, rounding may cost one.
    """
    fused_error, eager_error, scale = {}, {}, {}
    for case in cases:
        fused, eager, exact = run_fused(case), run_eager(case), run_oracle(case)
        assert fused.keys() == eager.keys() == exact.keys()
        for name, value in exact.items():
            assert fused[name].shape == value.shape and fused[name].dtype == case.x.dtype, name
            assert fused[name].isfinite().all(), f"{name} has an element that no kernel wrote"
            for errors, result in ((fused_error, fused), (eager_error, eager)):
                difference = np.abs(as_numpy(result[name]) - value)
                errors[name] = max(errors.get(name, 0.0), float(difference.max(initial=0)))
            scale[name] = max(scale.get(name, 0.0), scale_of(case, name, value))
    eps = torch.finfo(cases[0].x.dtype).eps
    for name in fused_error:
        limit = 2 * eager_error[name] + 2 * eps * scale[name]
        assert fused_error[name] <= limit, (
            f"{name}: error {fused_error[name]:.3g}, eager's {eager_error[name]:.3g}, scale {scale[name]:.3g}"
        )


def assert_exact(case: Case, got: dict[str, Tensor] | None = None):
    """Without an activation, sums of small integers, or of small integers times one power of two, are exact in every
    dtype's accumulator. The result has to be the exact result, rounded once.
    """
    got, exact = got or run_fused(case), run_oracle(case, np.float64)
    assert got.keys() == exact.keys()
    for name, value in exact.items():
        assert got[name].dtype == case.x.dtype and got[name].shape == value.shape, name
        assert torch.equal(got[name], torch.from_numpy(value).to(case.x.dtype)), name
