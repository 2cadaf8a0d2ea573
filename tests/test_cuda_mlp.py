"""The MLP on a CUDA GPU: the promises of test_mlp.py once more."""

from dataclasses import fields, replace

import pytest
import torch
from support.choices import ACTIVATIONS, DTYPES, dtype_name
from support.exactness import assert_no_less_exact
from support.layouts import LAYOUTS
from test_mlp import PARAMETERS, Mlp, make_mlp, pooled, run_eager, run_fused, run_oracle

pytestmark = [pytest.mark.cuda, pytest.mark.any_isa]

SIZES = [(1, 1, 1, 1), (3, 7, 19, 5), (64, 0, 8, 4), (65, 16, 0, 12), (128, 64, 256, 64), (1000, 31, 129, 33)]


def on_gpu(mlp: Mlp) -> Mlp:
    tensors = {field.name: getattr(mlp, field.name) for field in fields(mlp)}
    return replace(mlp, **{name: t.cuda() for name, t in tensors.items() if isinstance(t, torch.Tensor)})


def check(cases):
    assert_no_less_exact([on_gpu(mlp) for mlp in cases], run_fused, run_eager, run_oracle)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_never_less_exact_than_eager(dtype, activation, size):
    check(pooled(*size, dtype=dtype, activation=activation))


@pytest.mark.parametrize(
    "options",
    [{"bias": False}, {"recompute": True}, {"residual": "x"}, {"residual": "row"}, {"residual": "none"}],
    ids=str,
)
def test_options(options):
    check(pooled((2, 19), 48, 150, 48, **options))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operand", ["x", *PARAMETERS, "grad"])
def test_layouts(operand, layout):
    cases = pooled(40, 32, 64, 48, dtype=torch.bfloat16)
    check([replace(mlp, **{operand: LAYOUTS[layout](getattr(mlp, operand))}) for mlp in cases])


def test_the_same_bits_again():
    mlp = on_gpu(make_mlp(3000, 64, 256, 64))
    first, second = run_fused(mlp), run_fused(mlp)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
