"""Inputs that broke packages of this kind: one layer survives them."""

import math

import pytest
import torch
from oracle import (
    ACTIVATIONS,
    DTYPES,
    assert_as_exact_as_eager,
    dtype_name,
    make_case,
    run_eager,
    run_fused,
)
from subprocesses import run_python

import fastlane_ext as fl

poisoned = pytest.mark.usefixtures("poisoned_memory")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


# Shapes


@poisoned
@every_dtype
@pytest.mark.parametrize("concat", [False, True], ids=["residual", "concat"])
@pytest.mark.parametrize(
    ("shape", "in_features", "out_features"),
    [
        ((0,), 3, 4),
        ((2, 0), 3, 4),
        ((0, 5), 3, 3),
        ((2, 0, 5), 1, 1),
        ((), 3, 4),
        ((), 1, 1),
        ((), 0, 3),
        ((5,), 0, 3),
        ((0,), 0, 3),
        ((5,), 3, 0),
        ((5,), 0, 0),
        ((0,), 0, 0),
        ((1,), 3, 4),
        ((1,), 1, 1),
        ((5,), 1, 4),
        ((5,), 3, 1),
        ((2, 1, 3, 2), 3, 4),
        ((1, 1, 1, 1), 3, 4),
        ((2, 3, 1, 2, 2), 3, 4),
    ],
    ids=str,
)
def test_shapes(shape, in_features, out_features, concat, dtype):
    """No rows: empty output, zero dW and db. No features: act(b) + residual. 1-D and 5-D: as `F.linear`."""
    case = make_case(shape, in_features, out_features, dtype=dtype, concat=concat)
    got = run_fused(case)
    for name, expected in run_eager(case).items():
        assert got[name].shape == expected.shape and got[name].dtype == expected.dtype, name
        tolerance = {"rtol": 4e-2, "atol": 4e-2} if dtype.itemsize == 2 else {}
        torch.testing.assert_close(got[name], expected, **tolerance)
        if math.prod(shape) == 0:
            assert (got[name] == 0).all(), name


EMPTY_FIRST = """
import torch
torch.use_deterministic_algorithms(True)  # fills new memory with NaN
import fastlane_ext as fl
x = torch.zeros(0, 3, requires_grad=True)
weight = torch.zeros(4, 3, requires_grad=True)
bias = torch.zeros(4, requires_grad=True)
fl.linear_gelu_residual(x, weight, bias).sum().backward()
assert (weight.grad == 0).all() and (bias.grad == 0).all(), (weight.grad, bias.grad)
assert fl.stats()["fused"] == {"forward": 1, "backward": 1}
"""


@pytest.mark.any_isa
def test_no_rows_as_the_first_call_of_a_process():
    """Work memory of size zero has no address yet; the gradients are written all the same."""
    run_python(EMPTY_FIRST)


# Addresses and strides


@poisoned
@every_dtype
@pytest.mark.parametrize("operand", ["x", "weight", "bias", "residual_data", "grad"])
@pytest.mark.parametrize("size", [(5, 7, 9), (33, 64, 48)], ids=str)
def test_base_off_by_one_element(size, operand, dtype):
    rows, in_features, out_features = size
    case = make_case((rows,), in_features, out_features, dtype=dtype)
    moved = case.with_layout(**{operand: "misaligned"})
    element = case.x.element_size()
    assert getattr(moved, operand).data_ptr() % 16 == element
    expected = run_fused(case)
    for name, got in run_fused(moved).items():
        assert torch.equal(got, expected[name]), name


@poisoned
@every_dtype
def test_output_into_a_slice_off_by_one(dtype):
    """Concatenation writes behind x: with an odd width every row starts at another offset."""
    for in_features in range(1, 18):
        case = make_case((5,), in_features, 33, dtype=dtype, concat=True)
        got = run_fused(case)["y"]
        assert torch.equal(got[:, :in_features], case.x)
        activated = fl.linear_gelu_residual(case.x, case.weight, case.bias)
        assert torch.equal(got[:, in_features:], activated)


@pytest.fixture(scope="module")
def far_apart():
    """rows × cols views whose last elements lie beyond 2^31 elements; only the touched pages take memory."""
    step = 2**30 + 8
    try:
        memory = torch.empty(2 * step + 8 * 8192, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"4 GiB of address space are needed: {error}")

    def make(t, stride_of, slot):
        strides = (step, 1) if stride_of == "rows" else (1, step)
        view = memory.as_strided(t.shape, strides, slot * 8192)
        return view.copy_(t)

    return make


@pytest.mark.parametrize("far", ["rows", "columns"])
@pytest.mark.parametrize("operand", ["x", "weight", "residual_data", "grad"])
def test_strides_beyond_31_bits(operand, far, far_apart):
    """A row number times a leading dimension needs 64 bits."""
    rows, in_features, out_features = {
        ("x", "rows"): (3, 65, 5),
        ("x", "columns"): (65, 3, 5),
        ("weight", "rows"): (5, 65, 3),
        ("weight", "columns"): (5, 3, 65),
    }.get((operand, far), (3, 7, 65) if far == "rows" else (65, 7, 3))
    case = make_case((rows,), in_features, out_features, dtype=torch.bfloat16)
    expected = run_fused(case)
    setattr(case, operand, far_apart(getattr(case, operand), far, slot=1))
    for name, got in run_fused(case).items():
        assert torch.equal(got, expected[name]), name


# Values


def spared(t, row=None, column=None):
    """t without a row and a column."""
    rows, columns = (torch.ones(size, dtype=torch.bool) for size in t.shape)
    if row is not None:
        rows[row] = False
    if column is not None:
        columns[column] = False
    return t[rows][:, columns]


bad_values = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def limit_of_layer(z, residual, activation):
    """act(±inf or NaN) + residual."""
    return (z if activation == "none" else torch.where(z == -math.inf, torch.zeros_like(z), z)) + residual


@poisoned
@bad_values
@each_activation
@every_dtype
def test_a_bad_row_of_x_taints_its_row(dtype, activation, bad):
    case = make_case((29,), 21, 37, dtype=dtype, activation=activation)
    clean = run_fused(case)
    case.x[7, 3] = bad
    got = run_fused(case)
    for name in ("y", "dx"):
        assert torch.equal(spared(got[name], row=7), spared(clean[name], row=7)), name
    expected = limit_of_layer(bad * case.weight[:, 3], case.residual_data[7], activation)
    torch.testing.assert_close(got["y"][7], expected, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(got["dresidual"], clean["dresidual"])
    if activation == "none":  # dz is dy, whatever z is
        assert torch.equal(got["dx"], clean["dx"]) and torch.equal(got["dbias"], clean["dbias"])
        assert torch.equal(spared(got["dweight"], column=3), spared(clean["dweight"], column=3))
    elif math.isinf(bad):  # GELU′ of ±inf is 0 or 1
        assert got["dx"].isfinite().all() and got["dbias"].isfinite().all()
        assert spared(got["dweight"], column=3).isfinite().all()
        passed = (bad * case.weight[:, 3] > 0).to(dtype) * case.grad[7]
        torch.testing.assert_close(got["dx"][7], passed @ case.weight, rtol=2e-2, atol=2e-2)
    else:
        assert got["dx"][7].isnan().all() and got["dbias"].isnan().all() and got["dweight"].isnan().all()


@poisoned
@bad_values
@each_activation
@every_dtype
def test_a_bad_row_of_the_weight_taints_its_column(dtype, activation, bad):
    case = make_case((29,), 21, 37, dtype=dtype, activation=activation)
    clean = run_fused(case)
    case.weight[11, 5] = bad
    got = run_fused(case)
    assert torch.equal(spared(got["y"], column=11), spared(clean["y"], column=11))
    expected = limit_of_layer(bad * case.x[:, 5], case.residual_data[:, 11], activation)
    torch.testing.assert_close(got["y"][:, 11], expected, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(got["dresidual"], clean["dresidual"])
    assert torch.equal(spared(got["dweight"], row=11), spared(clean["dweight"], row=11))
    others = torch.arange(37) != 11
    assert torch.equal(got["dbias"][others], clean["dbias"][others])
    if activation == "none":
        assert torch.equal(spared(got["dx"], column=5), spared(clean["dx"], column=5))
        assert torch.equal(got["dweight"], clean["dweight"]) and torch.equal(got["dbias"], clean["dbias"])
    elif math.isinf(bad):
        assert spared(got["dx"], column=5).isfinite().all()
        assert got["dweight"].isfinite().all() and got["dbias"].isfinite().all()
    else:
        assert got["dx"].isnan().all() and got["dweight"][11].isnan().all() and got["dbias"][11].isnan()


@poisoned
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@every_dtype
def test_huge_preactivations(dtype, activation):
    """|z| up to the dtype's limit: y is z or 0, gradients pass or stop, nothing is NaN."""
    big = 1e4 if dtype == torch.float16 else 1e20
    signs = torch.tensor([[1.0], [-1.0], [1.0]], dtype=dtype)
    x = (big * signs).requires_grad_()
    weight = torch.ones(35, 1, dtype=dtype, requires_grad=True)
    bias = torch.zeros(35, dtype=dtype, requires_grad=True)
    y = fl.linear_gelu_residual(x, weight, bias, activation=activation)
    assert torch.equal(y, x.detach().clamp(min=0).expand(3, 35))
    dx, dbias = torch.autograd.grad(y, (x, bias), torch.ones_like(y))
    assert dx.flatten().tolist() == [35, 0, 35] and (dbias == 2).all()


@poisoned
@every_dtype
def test_denormals_are_kept(dtype):
    """Through every operand, forward and backward: no flush to zero."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    one = torch.ones(1, 1, dtype=dtype)
    small = torch.full((1, 1), tiny, dtype=dtype)
    zero = torch.zeros(1, 1, dtype=dtype)
    assert small.item() != 0
    for x, weight, bias, residual in ((small, one, None, None), (one, small, None, None),
                                      (zero, one, small[0], None), (zero, one, None, small)):  # fmt: skip
        y = fl.linear_gelu_residual(x, weight, bias, residual, activation="none")
        assert torch.equal(y, small)
    leaves = [t.clone().requires_grad_() for t in (one, one, one[0], one)]
    y = fl.linear_gelu_residual(*leaves, activation="none")
    for grad in torch.autograd.grad(y, leaves, small):
        assert grad.item() == small.item()


@poisoned
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_large_sums(dtype):
    """K and M in the thousands: the float32 sum is rounded once."""
    assert_as_exact_as_eager([make_case((3,), 4099, 5, dtype=dtype), make_case((4099,), 3, 5, dtype=dtype)])


@poisoned
def test_bias_is_added_once():
    """Also where K is cut into blocks, whatever their number."""
    for in_features in (1, 255, 256, 257, 512, 513, 1100):
        case = make_case((3,), in_features, 5, integers=True, activation="none", residual="none")
        case.x.zero_()
        case.bias.fill_(1000)
        assert (run_fused(case)["y"] == 1000).all()
