"""All four operations on anything that fits their signatures: values, gradients, bits, layouts of the gradients."""

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from support.exactness import assert_no_less_exact
from support.fuzz import OPS, Exact, plans, run_eager
from support.paths import PATH

import fastlane_ext as fl

# All of the explore profile's; few of the fixed one's, since every example is a dozen calls.
EXAMPLES = settings.default.max_examples // (6 if settings.default.derandomize else 1)
# What one layer of no more rows or features than this gives, integers or slopes of GELU, does not depend on layouts.
SMALL = 40

pytestmark = [pytest.mark.own_product, pytest.mark.usefixtures("poisoned_memory", "restore_threads")]


def run_fused(call):
    fl.reset_stats()
    results = call.run(fl)
    # A residual's own gradient needs no kernel.
    assert fl.stats()[PATH] == {"forward": 1, "backward": int(bool(call.plan.needs - {"residual"}))}
    assert fl.stats()["fallback"] == {}
    return results


def assert_same_bits(got, expected, what):
    for name, value in expected.items():
        assert torch.equal(got[name], value), f"{name}: {what}"


def assert_gradients_lie_as_their_tensors(call, got):
    """A gradient has its tensor's strides, or is contiguous where the tensor's strides have gaps."""
    assert got["y"].is_contiguous()
    for name in call.plan.needs:
        tensor, grad = call.tensors[name], got[f"d{name}"]
        assert grad.shape == tensor.shape and grad.dtype == tensor.dtype, name
        by_columns = tensor.dim() == 2 and name != "x" and tensor.t().is_contiguous()
        if by_columns and name != "residual":
            assert grad.t().is_contiguous(), name
        elif name != "residual":  # whose gradient is a view of grad_output, or torch's own sum
            assert grad.is_contiguous(), name


def assert_exact(call, got):
    exact = Exact(call)
    if not exact.is_representable:
        event("integers: rounded between layers")
        return
    event("integers: exact")
    for name, value in exact.results.items():
        assert torch.equal(got[name], torch.from_numpy(value.astype("float64")).to(call.plan.dtype)), name


def scale_of(call, name, value):
    """A sum of n random terms passes through values √n times as large, whatever the order of additions."""
    terms = call.tensors["grad"].numel() / max(1, value.size)
    scale = float(abs(value).max(initial=0))
    if name == "dresidual" and terms > 1:
        scale = max(scale, terms**0.5 * float(call.tensors["grad"].abs().max()))
    return scale


def assert_as_exact_as_eager(plan):
    """The largest error of a call with few elements says little: the rule is broken only if many calls together break
    it.
    """
    for seeds in (range(1), range(8), range(64)):
        calls = [plan.call(seed) for seed in seeds]
        try:
            return assert_no_less_exact(calls, run_fused, run_eager, lambda call: Exact(call).results, scale_of)
        except AssertionError:
            if len(seeds) == 64:
                raise
            event(f"not within the rule of {len(seeds)}")


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_any_call(op, data):
    plan = data.draw(plans(op))
    torch.set_num_threads(1)
    call = plan.call(seed=0)
    results = []
    for threads in plan.threads:
        torch.set_num_threads(threads)
        results.append(run_fused(call))
    torch.set_num_threads(1)
    got = results[0]
    assert_gradients_lie_as_their_tensors(call, got)
    for other, threads in zip(results, plan.threads, strict=True):
        assert_same_bits(other, got, f"other bits with {threads} threads than with {plan.threads[0]}")
    if not plan.integers:
        return assert_as_exact_as_eager(plan)
    if len(plan.widths) == 2 and max(call.x[..., :1].numel(), *plan.widths) <= SMALL:
        assert_same_bits(run_fused(call.contiguous()), got, "other bits than of contiguous tensors")
    if plan.activation == "none":
        assert_exact(call, got)
