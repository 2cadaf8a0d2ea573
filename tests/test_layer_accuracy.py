"""The layer against an oracle: never less exact than eager, and exact where exactness is possible."""

import itertools
import math
from dataclasses import replace

import mpmath
import pytest
import torch
from support.cases import RESIDUALS, make_case, random
from support.choices import ACTIVATIONS, DTYPES, dtype_name
from support.exactness import assert_as_exact_as_eager, assert_exact
from support.layouts import LAYOUTS
from support.oracle import activation_in_many_digits, run_oracle
from support.plans import plan_of_layer
from support.runs import run_fused

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PLANS = [plan_of_layer(4096, 4096, 4096, dtype) for dtype in DTYPES]


def edges(*names):
    """The sizes at which the plans cut, each with its neighbours. A name is a plan's field, or a product of fields."""
    cuts = {math.prod(plan[field] for field in name.split("*")) for plan in PLANS for name in names}
    return sorted({size for cut in cuts for size in (cut - 1, cut, cut + 1) if size > 0})


OTHERS = itertools.cycle((5, 33, 8, 20, 13, 63, 9))
# (rows, in_features, out_features). Elementwise passes take rows in chunks of 16 and 128, columns in strips of 256.
SIZES = [
    (1, 1, 1),
    (64, 0, 8),
    (17, 5, 255),
    (129, 513, 257),
    *((size, next(OTHERS), next(OTHERS)) for size in edges("tile_rows", "task_row_panels*tile_rows")),
    *((next(OTHERS), size, next(OTHERS)) for size in edges("chain_values")),
    *((next(OTHERS), next(OTHERS), size) for size in edges("tile_cols", "block_cols")),
    *((30, size, 37) for size in edges("pass_values")),
    *((size, 30, 37) for size in edges("pass_values")),
]


def repeated(rows, in_features, out_features, **options):
    """Enough cases that the largest error is taken over about a thousand outputs."""
    count = max(1, min(24, 1000 // (rows * out_features)))
    return [make_case((rows,), in_features, out_features, seed=seed, **options) for seed in range(count)]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_never_less_exact_than_eager(dtype, activation, size):
    assert_as_exact_as_eager(repeated(*size, dtype=dtype, activation=activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("options", [{"bias": False}, {"recompute": True}, {"concat": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_options(dtype, options, activation):
    assert_as_exact_as_eager(repeated(37, 45, 51, dtype=dtype, activation=activation, **options))


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_residuals(dtype, activation, residual):
    case = make_case((5, 8), 35, 35, dtype=dtype, activation=activation, residual=residual)
    assert_as_exact_as_eager([case])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operand", ["x", "weight", "bias", "residual_data", "grad"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_layouts(dtype, operand, layout):
    """Each operand alone has the layout. Random data, since integers might hide a misread layout."""
    assert_as_exact_as_eager([make_case((37,), 45, 51, dtype=dtype).with_layout(**{operand: layout})])


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("concat", [False, True], ids=["residual", "concat"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_integers_are_exact(dtype, concat, size):
    rows, in_features, out_features = size
    case = make_case((rows,), in_features, out_features, dtype=dtype, integers=True, concat=concat)
    case.activation = "none"
    assert_exact(case)


# How x and the weight lie decides which operand runs along k, and with it whether rows are multiplied as inner
# products or as tiles, which operand is packed, and whether the product or its transpose is computed.
LYING = [
    ("contiguous", "contiguous"),
    ("padded", "padded"),
    ("contiguous", "transposed"),
    ("transposed", "contiguous"),
    ("transposed", "transposed"),
]
each_lying = pytest.mark.parametrize("lying", LYING, ids="-".join)


def paired(sizes, shift):
    """Each of seven sizes once as in_features and once as out_features; with seven shifts, all pairs."""
    return [(size, sizes[(2 * i + shift) % len(sizes)]) for i, size in enumerate(sizes)]


def lying_cases(rows, in_features, out_features, lying, **options):
    """The same layer for each number of rows."""
    case = make_case((max(rows),), in_features, out_features, **options).with_layout(weight=lying[1])
    for n in rows:
        first = {name: getattr(case, name)[:n] for name in ("x", "residual_data", "grad")}
        yield replace(case, **first).with_layout(x=lying[0])


def integer_cases(*arguments, **options):
    return lying_cases(*arguments, **options, integers=True, activation="none")


@pytest.mark.own_product
@each_lying
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_few_rows(dtype, lying):
    """Inner products up to 16 or 24 rows, sums of a weight's rows up to 128, tiles beyond; odd and even, by turns."""
    turn, real = LYING.index(lying) % 2, []
    for size in paired((1, 15, 17, 63, 65, 129, 1025), LYING.index(lying)):
        few = [*range(1 + turn, 18, 2), 24 + turn, 48 + turn, 128 + turn]
        for case in integer_cases(few if max(size) < 1000 else few[:-1], *size, lying, dtype=dtype):
            assert_exact(case)
        real += lying_cases((1, 7, 17, 25) if max(size) < 1000 else (7,), *size, lying, dtype=dtype)
    assert_as_exact_as_eager(real)


@each_lying
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.own_product
def test_beyond_a_block(dtype, lying):
    """More than a block of k, of columns, or of both, and a remainder in each."""
    plan = plan_of_layer(4096, 4096, 4096, dtype)
    k, cols = plan["block_values"] + 1, plan["block_cols"] + 1
    for size in [(k, 257), (2 * k, 33), (65, 3 * cols), (257, cols)]:
        rows = (5, 300) if size == (k, 257) else (33,)
        for case in integer_cases(rows, *size, lying, dtype=dtype):
            assert_exact(case)
    real = [case for size in [(2 * k, 33), (65, cols)] for case in lying_cases([9], *size, lying, dtype=dtype)]
    assert_as_exact_as_eager(real)


# The backward of a narrow layer takes runs of 192 rows, in at most 64 chunks of at least two runs.
NARROW_ROWS = [0, 1, 191, 192, 193, 384, 385]


@pytest.mark.parametrize("rows", NARROW_ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_narrow_layers(dtype, rows):
    real = []
    for turn in (DTYPES.index(dtype) + NARROW_ROWS.index(rows), NARROW_ROWS.index(rows) + 3):
        for i, size in enumerate(paired((1, 3, 16, 48, 64, 100, 257), turn)):
            lying = LYING[(turn + i) % len(LYING)]
            for case in integer_cases([rows], *size, lying, dtype=dtype):
                assert_exact(case)
            if rows * math.prod(size) < 1e6:
                real += lying_cases([rows], *size, lying, dtype=dtype)
    assert_as_exact_as_eager(real)


@pytest.mark.parametrize("lying", [LYING[0], LYING[-1]], ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_narrow_layers_of_many_rows(dtype, lying):
    for rows, *size in [(64 * 384, 1, 257), (64 * 384 + 1, 100, 3), (30000, 16, 48)]:
        for case in integer_cases([rows], *size, lying, dtype=dtype):
            assert_exact(case)
    if dtype == torch.float32:
        assert_as_exact_as_eager(list(lying_cases([rows], *size, lying, dtype=dtype)))


def exactly(value):
    """Every element, exactly, as an mpmath number."""
    return mpmath.matrix([[mpmath.mpf(v) for v in row] for row in value.double().tolist()])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("size", [(3, 5, 4), (5, 40, 9)], ids=str)
def test_fifty_digits(size, dtype, activation):
    """The numpy oracle and the kernels against arbitrary precision, so that neither is the other's only check."""
    rows, in_features, out_features = size
    case = make_case((rows,), in_features, out_features, dtype=dtype, activation=activation)
    with mpmath.workdps(50):
        z = exactly(case.x) * exactly(case.weight).T
        bias, residual, dy = case.bias.tolist(), exactly(case.residual_data), exactly(case.grad)

        def act(v):
            return activation_in_many_digits(v, activation)

        y, dz = mpmath.matrix(rows, out_features), mpmath.matrix(rows, out_features)
        for i in range(rows):
            for j in range(out_features):
                v = z[i, j] + mpmath.mpf(bias[j])
                y[i, j] = act(v) + residual[i, j]
                dz[i, j] = dy[i, j] * mpmath.diff(act, v)
        exact = {
            "y": y,
            "dx": dz * exactly(case.weight),
            "dweight": dz.T * exactly(case.x),
            "dbias": mpmath.matrix([sum(dz[i, j] for i in range(rows)) for j in range(out_features)]),
        }
        got, oracle = run_fused(case), run_oracle(case)
        for name, value in exact.items():
            flat = list(value)
            scale = max(abs(v) for v in flat)
            for result, limit in ((got, 2e-16 if dtype == torch.float64 else 1e-7), (oracle, 2e-16)):
                values = [float(v) for v in result[name].flatten()]
                worst = max(abs(mpmath.mpf(a) - b) for a, b in zip(values, flat, strict=True))
                assert worst <= 6 * limit * scale, (name, mpmath.nstr(worst / scale))


@pytest.mark.own_product
@pytest.mark.parametrize(
    ("size", "weight"),
    [
        ((5, 17000, 300), "contiguous"),
        ((17000, 300, 5), "contiguous"),
        ((17, 17000, 300), "transposed"),
        ((129, 17000, 300), "transposed"),
    ],
    ids=["long k", "many rows", "few rows", "tasks of columns"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_sums_longer_than_what_is_packed_at_once(dtype, size, weight, restore_threads):
    """Packed B is bounded: beyond the bound the sums are kept from one slab of k to the next, for any thread count."""
    rows, in_features, out_features = size
    if dtype == torch.float64 and in_features > rows:
        in_features //= 2  # as many bytes
    case = make_case((rows,), in_features, out_features, dtype=dtype).with_layout(weight=weight)
    assert_as_exact_as_eager([case])
    results = []
    for threads in (1, 2, 3, 12):
        torch.set_num_threads(threads)
        results.append(run_fused(case))
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_long_sums_in_16_bits(dtype, assert_fused):
    """Sums are accumulated in float32 and rounded once: in 16 bits a sum of ones would stop at 256 or 2048."""
    n = 5000
    x, weight = torch.ones(1, n, dtype=dtype, requires_grad=True), torch.ones(3, n, dtype=dtype)
    y = fused_none(x, weight)
    assert (y == torch.tensor(float(n)).to(dtype)).all()
    x, weight = torch.ones(n, 2, dtype=dtype), torch.ones(3, 2, dtype=dtype, requires_grad=True)
    bias = torch.zeros(3, dtype=dtype, requires_grad=True)
    fused_none(x, weight, bias).sum().backward()
    assert (weight.grad == torch.tensor(float(n)).to(dtype)).all()
    assert (bias.grad == torch.tensor(float(n)).to(dtype)).all()
    assert_fused(forward=2, backward=1)


@pytest.mark.own_product
@pytest.mark.parametrize("in_features", [3, 700], ids=["one pass", "own pass"])
def test_what_a_large_row_hides_in_a_bias_gradient(in_features, assert_fused):
    """Small terms, each below half a unit in the last place of the sum so far, are not lost, and inf is not lost."""
    rows, columns = 3000, 300
    dy = torch.zeros(rows, columns, dtype=torch.float64)
    dy[16:-16:16] = 1
    dy[0], dy[-1] = 2.0**60, -(2.0**60)
    expected = dy[1:-1].sum(0)
    dy[1, 7] = expected[7] = math.inf
    x, weight = (torch.zeros(n, in_features, dtype=torch.float64) for n in (rows, columns))
    bias = torch.zeros(columns, dtype=torch.float64, requires_grad=True)
    fused_none(x, weight, bias).backward(dy)
    assert torch.equal(bias.grad, expected)
    assert_fused(forward=1, backward=1)


@pytest.mark.parametrize("in_features", [129, 512, 4096])
@pytest.mark.parametrize("rows", [3, 37])
def test_sums_of_one_number(rows, in_features, assert_fused):
    """All roundings go one way. The error of one number is luck, for fused as for eager, so the test takes many."""
    errors = {"fused": [], "eager": []}
    for seed in range(20):
        of_x, of_weight = (random(2, dtype=torch.float32, seed=seed).abs() + 0.5).tolist()
        x, weight = torch.full((rows, in_features), of_x), torch.full((50, in_features), of_weight)
        exact = x[0].double() @ weight[0].double()
        for name, y in (("fused", fused_none(x, weight)), ("eager", torch.nn.functional.linear(x, weight))):
            errors[name].append((y.double() / exact - 1).abs().max())
    fused, eager = (torch.stack(e).square().mean().sqrt().item() for e in errors.values())
    assert fused <= 2 * eager, (fused, eager)
    assert_fused(forward=20)


def fused_none(*args):
    return torch.ops.fastlane.linear_gelu_residual(*args, activation="none")
