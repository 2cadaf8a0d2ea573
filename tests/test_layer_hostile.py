"""Inputs that broke packages of this kind: one layer survives them."""

import math
import mmap

import pytest
import torch
from support.cases import make_case
from support.choices import ACTIVATIONS, DTYPES, dtype_name
from support.exactness import assert_as_exact_as_eager, assert_exact
from support.oracle import run_oracle
from support.runs import run_eager, run_fused
from support.subprocesses import run_python

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
    """Work memory of size zero has no address yet; the gradients are written nevertheless."""
    run_python(EMPTY_FIRST)


# Addresses and strides


@pytest.mark.own_kernels
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
    """A concatenation writes behind x: with an odd width every row starts at another offset."""
    for in_features in range(1, 18):
        case = make_case((5,), in_features, 33, dtype=dtype, concat=True)
        got = run_fused(case)["y"]
        assert torch.equal(got[:, :in_features], case.x)
        activated = fl.linear_gelu_residual(case.x, case.weight, case.bias)
        assert torch.equal(got[:, in_features:], activated)


@pytest.fixture(scope="module")
def far_apart():
    """Views whose last element lies beyond 2^31 elements from the first. Neighbours lie beyond 2^31 bytes apart, where
    that leaves room for all rows of a tile. Only the touched pages take memory.
    """
    most, slot = 13, 8192
    reserve_nothing = 0x4000  # MAP_NORESERVE, which Python's mmap does not name
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing
    try:
        memory = mmap.mmap(-1, most * (2**31 + 8 * slot), flags=flags)
    except OSError as error:
        pytest.skip(f"26 GiB of address space are needed: {error}")
    memory.madvise(mmap.MADV_NOHUGEPAGE)

    def make(t, far, number):
        count = t.shape[far == "columns"]
        step = 2**31 // (count - 1 if count > most else t.element_size()) + 8
        elements = torch.frombuffer(memory, dtype=t.dtype)
        view = elements.as_strided(
            t.shape, (step, 1) if far == "rows" else (1, step), number * slot // t.element_size()
        )
        return view.copy_(t)

    return make


FAR_SIZES = {
    "inner products": (13, 67, 35),
    "tiles": (35, 13, 67),
    "the transposed product": (35, 67, 13),
    "two chunks of a narrow layer": (401, 21, 35),
    "beyond a narrow layer": (33, 301, 299),
    "beyond a block": (25, 2051, 67),
}


@pytest.mark.own_kernels
@pytest.mark.parametrize("far", ["rows", "columns"])
@pytest.mark.parametrize("operand", ["x", "weight", "residual_data", "grad"])
@pytest.mark.parametrize("size", FAR_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_strides_beyond_31_bits(dtype, size, operand, far, far_apart):
    """A row number times a leading dimension needs 64 bits, in elements as in bytes."""
    rows, in_features, out_features = FAR_SIZES[size]
    # Without an activation the products read dy itself; a transposed weight makes tiles of inner products.
    for activation, weight in [("none", "contiguous"), ("none", "transposed"), ("gelu", "contiguous")]:
        case = make_case((rows,), in_features, out_features, dtype=dtype, integers=True, activation=activation)
        case = case.with_layout(weight=weight)
        expected = run_fused(case)
        setattr(case, operand, far_apart(getattr(case, operand), far, number=1))
        for name, got in run_fused(case).items():
            assert torch.equal(got, expected[name]), (activation, weight, name)


@pytest.mark.parametrize("rows", [33, 401])
def test_far_strides_of_all_operands(rows, far_apart):
    """x, dy and the weight have far strides at once, and dy is the shortcut's gradient too; then with dweight
    column-major.
    """
    case = make_case((rows,), 37, 37, integers=True, activation="none", residual="x")
    for number, operand in enumerate(("x", "grad")):
        setattr(case, operand, far_apart(getattr(case, operand), "rows", number))
    case.weight = far_apart(case.weight, "columns", number=2)
    assert_exact(case)
    assert_exact(case.with_layout(weight="transposed"))


# Memory of the results


LARGE = {
    "y and dx": (53, 53, {}),
    "y of a concatenation": (26, 27, {"concat": True}),
    "dweight": (2111, 1001, {}),
    "dweight column-major": (2111, 1001, {}),
}


@every_dtype
@pytest.mark.parametrize("large", LARGE)
def test_results_of_megabytes(large, dtype):
    """Large results in freshly requested pages are right, and their memory is no larger than the tensor."""
    in_features, out_features, options = LARGE[large]
    rows = 3 if "dweight" in large else int(4.2e6) // (53 * dtype.itemsize) + 1
    case = make_case((rows,), in_features, out_features, dtype=dtype, integers=True, activation="none", **options)
    got = run_fused(case.with_layout(weight="transposed" if "column" in large else "contiguous"))
    assert got["dweight" if "dweight" in large else "y"].nbytes > 4e6
    assert_exact(case, got)
    for name in ("y", "dx", "dweight", "dbias"):
        stored = got[name].untyped_storage().nbytes()  # which pytest would print, byte by byte
        assert stored == got[name].nbytes, name


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


# (rows, in_features, out_features) and the bad element's row, in_feature and out_feature
BAD_PLACES = {
    "inner products": ((5, 21, 37), (4, 20, 36)),
    "tiles": ((29, 21, 37), (7, 3, 11)),
    "two chunks of a narrow layer": ((389, 21, 37), (388, 20, 36)),
    "beyond a block": ((19, 2051, 67), (18, 2050, 66)),
}
each_place = pytest.mark.parametrize("place", BAD_PLACES)


def case_with_a_place(place, **options):
    (rows, in_features, out_features), bad_place = BAD_PLACES[place]
    return make_case((rows,), in_features, out_features, **options), *bad_place


@pytest.mark.own_kernels
@poisoned
@bad_values
@each_activation
@each_place
@every_dtype
def test_a_bad_row_of_x_taints_its_row(dtype, place, activation, bad):
    case, row, column, _ = case_with_a_place(place, dtype=dtype, activation=activation)
    clean = run_fused(case)
    case.x[row, column] = bad
    got = run_fused(case)
    for name in ("y", "dx"):
        assert torch.equal(spared(got[name], row=row), spared(clean[name], row=row)), name
    expected = limit_of_layer(bad * case.weight[:, column], case.residual_data[row], activation)
    torch.testing.assert_close(got["y"][row], expected, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(got["dresidual"], clean["dresidual"])
    if activation == "none":  # dz is dy, whatever z is
        assert torch.equal(got["dx"], clean["dx"]) and torch.equal(got["dbias"], clean["dbias"])
        assert torch.equal(spared(got["dweight"], column=column), spared(clean["dweight"], column=column))
    elif math.isinf(bad):  # GELU′ of ±inf is 0 or 1
        assert got["dx"].isfinite().all() and got["dbias"].isfinite().all()
        assert spared(got["dweight"], column=column).isfinite().all()
        passed = (bad * case.weight[:, column] > 0).to(dtype) * case.grad[row]
        torch.testing.assert_close(got["dx"][row], passed @ case.weight, rtol=2e-2, atol=2e-2)
    else:
        assert got["dx"][row].isnan().all() and got["dbias"].isnan().all() and got["dweight"].isnan().all()


@pytest.mark.own_kernels
@poisoned
@bad_values
@each_activation
@each_place
@every_dtype
def test_a_bad_row_of_the_weight_taints_its_column(dtype, place, activation, bad):
    case, _, column, out = case_with_a_place(place, dtype=dtype, activation=activation)
    clean = run_fused(case)
    case.weight[out, column] = bad
    got = run_fused(case)
    assert torch.equal(spared(got["y"], column=out), spared(clean["y"], column=out))
    expected = limit_of_layer(bad * case.x[:, column], case.residual_data[:, out], activation)
    torch.testing.assert_close(got["y"][:, out], expected, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(got["dresidual"], clean["dresidual"])
    assert torch.equal(spared(got["dweight"], row=out), spared(clean["dweight"], row=out))
    others = torch.arange(case.bias.numel()) != out
    assert torch.equal(got["dbias"][others], clean["dbias"][others])
    if activation == "none":
        assert torch.equal(spared(got["dx"], column=column), spared(clean["dx"], column=column))
        assert torch.equal(got["dweight"], clean["dweight"]) and torch.equal(got["dbias"], clean["dbias"])
    elif math.isinf(bad):
        assert spared(got["dx"], column=column).isfinite().all()
        assert got["dweight"].isfinite().all() and got["dbias"].isfinite().all()
    else:
        assert got["dx"].isnan().all() and got["dweight"][out].isnan().all() and got["dbias"][out].isnan()


@poisoned
@bad_values
@each_activation
@each_place
@every_dtype
def test_a_bad_element_of_dy_taints_its_row_and_column(dtype, place, activation, bad):
    case, row, _, out = case_with_a_place(place, dtype=dtype, activation=activation)
    clean = run_fused(case)
    case.grad[row, out] = bad
    got = run_fused(case)
    assert torch.equal(got["y"], clean["y"])
    torch.testing.assert_close(got["dresidual"], case.grad, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(spared(got["dx"], row=row), spared(clean["dx"], row=row))
    assert torch.equal(spared(got["dweight"], row=out), spared(clean["dweight"], row=out))
    others = torch.arange(case.bias.numel()) != out
    assert torch.equal(got["dbias"][others], clean["dbias"][others])
    for tainted in (got["dx"][row], got["dweight"][out], got["dbias"][out]):
        assert not tainted.isfinite().any()
    if activation == "none":
        for tainted, factor in ((got["dx"][row], case.weight[out]), (got["dweight"][out], case.x[row])):
            torch.testing.assert_close(tainted, bad * factor, equal_nan=True, rtol=0, atol=0)


@pytest.mark.own_kernels
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


DENORMAL_SIZES = {place: size for place, (size, _) in BAD_PLACES.items()} | {"beyond a narrow layer": (33, 301, 299)}
DENORMAL_LAYOUTS = [("contiguous", "contiguous"), ("transposed", "contiguous"), ("padded", "transposed")]


@pytest.mark.own_kernels
@poisoned
@pytest.mark.parametrize("layouts", DENORMAL_LAYOUTS, ids="-".join)
@pytest.mark.parametrize("size", DENORMAL_SIZES)
@pytest.mark.parametrize("tiny", ["x", "weight", "grad"])
@every_dtype
def test_products_of_denormals(dtype, tiny, size, layouts):
    """An operand of nothing but denormals, odd numbers of features: each product and each sum is exact."""
    rows, in_features, out_features = DENORMAL_SIZES[size]
    case = make_case((rows,), in_features, out_features, dtype=dtype, integers=True, activation="none")
    scaled = (tiny,) if tiny == "grad" else (tiny, "bias", "residual_data")
    for name in scaled:
        setattr(case, name, getattr(case, name) * (torch.finfo(dtype).smallest_normal / 16))
    assert_exact(case.with_layout(x=layouts[0], weight=layouts[1]))


@pytest.mark.own_kernels
@poisoned
@pytest.mark.parametrize("layouts", DENORMAL_LAYOUTS, ids="-".join)
@pytest.mark.parametrize("size", DENORMAL_SIZES)
@pytest.mark.parametrize("tiny", ["x", "weight", "grad"])
def test_a_single_denormal(tiny, size, layouts):
    """bf16's own instruction takes a denormal for zero. Our kernels find it anywhere; eager loses it, the oracle does
    not.
    """
    rows, in_features, out_features = DENORMAL_SIZES[size]
    case = make_case(
        (rows,), in_features, out_features, dtype=torch.bfloat16, integers=True, activation="none", residual="none"
    )
    operand = getattr(case, tiny).zero_()
    case.bias.zero_()
    middle = (operand.shape[0] // 2, operand.shape[1] // 2)
    for i, j, value in [
        (0, 0, 2.0**-133),
        (-1, -1, 2.0**-133),
        (0, -1, -(2.0**-126 - 2.0**-133)),
        (*middle, 2.0**-133),
    ]:
        operand[i, j] = value
        assert_exact(case.with_layout(x=layouts[0], weight=layouts[1]))
        operand[i, j] = 0


@pytest.mark.own_kernels
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("rows", [1, 5, 40, 130])
def test_a_single_denormal_beyond_a_block(rows, layout):
    """A denormal in a later block of k is found too, in time for the sums of earlier blocks."""
    case = make_case((rows,), 4200, 7, dtype=torch.bfloat16, integers=True, activation="none", residual="none")
    case.bias.zero_()
    for name in ("x", "weight"):
        operand = getattr(case, name)
        before, operand[:] = operand.clone(), 0
        operand[-1, 4150] = 2.0**-133
        assert_exact(case.with_layout(weight=layout))
        operand[:] = before


@pytest.mark.own_kernels
@poisoned
@pytest.mark.parametrize("rows", [5, 29, 389])
@pytest.mark.parametrize(
    ("activation", "dy"), [("gelu", 2.0**-106), ("gelu_tanh", 2.0**-100)], ids=["gelu", "gelu_tanh"]
)
def test_a_slope_makes_a_denormal(activation, dy, rows):
    """dz = dy GELU′(z) is stored in bf16: it is rounded to one of few denormals, and not lost in the products."""
    case = make_case((rows,), 3, 3, dtype=torch.bfloat16, integers=True, activation=activation, residual="none")
    case.x.fill_(1)
    case.weight.copy_(torch.eye(3))
    case.bias.fill_(-7)  # z = -6
    case.grad.zero_()
    case.grad[-1] = dy
    exact, got = run_oracle(case), run_fused(case)
    for name in ("dx", "dweight", "dbias"):
        assert 2.0**-131 < abs(exact[name]).max() < 2.0**-129, name
        error = got[name].double() - torch.from_numpy(exact[name])
        assert error.abs().max() <= 1.001 * 2.0**-134, name


@pytest.mark.own_kernels
@poisoned
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@each_place
def test_bad_values_beside_denormals(place, bad):
    """Where bf16 is computed once more because of a denormal, NaN and inf still arrive."""
    case, row, column, out = case_with_a_place(place, dtype=torch.bfloat16, activation="none")
    tiny = torch.finfo(torch.bfloat16).smallest_normal / 4
    case.x[0], case.grad[0] = tiny, tiny
    case.residual_data[0], case.bias[:] = 0, 0
    clean = run_fused(case)
    assert (clean["y"][0] != 0).any() and (clean["dx"][0] != 0).any()
    case.x[row, column] = bad
    case.grad[row, out] = bad
    got = run_fused(case)
    for name in ("y", "dx"):
        assert not got[name][row].isfinite().any(), name
        assert torch.equal(spared(got[name], row=row), spared(clean[name], row=row)), name
    assert not got["dweight"][out].isfinite().any() and not got["dweight"][:, column].isfinite().any()
    assert torch.equal(spared(got["dweight"], out, column), spared(clean["dweight"], out, column))


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
