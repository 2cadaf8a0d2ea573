"""The kernels' GELU and GELU′, over all kinds of floats.

The tests reach both through the layer: with the identity as weight, z is x itself, and dx is dy ⊙ GELU′(x).
"""

import math
from functools import partial

import mpmath
import pytest
import torch
from support.choices import DTYPES, dtype_name
from support.oracle import activation_in_many_digits, gelu_parts
from support.paths import COUNTED, PATH

import fastlane_ext as fl

GELUS = ("gelu", "gelu_tanh", "quick_gelu")
each_gelu = pytest.mark.parametrize("activation", GELUS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
SIXTEEN_BITS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
LIMIT = {"gelu": 4e-6, "gelu_tanh": 8e-6, "quick_gelu": 4e-6}  # relative, of float32; 1e-5 is promised
TINY = 2.0**-149  # the smallest float32: no relative bound holds below it

SPECIAL = [
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    math.nan,
    1e-40,
    -1e-40,
    1e-8,
    -1e-8,
    0.5,
    -0.5,
    -0.7517,
    1.0,
    -1.0,
]
SPECIAL += [3.0, -3.0, 9.9, -9.9, -13.0, 13.0, -14.6, 14.6, -40.0, 40.0, -41.0, 41.0, 1e4, -1e4, 6e4, -6e4]
SPECIAL += [sign * v for v in (1e10, 1e20, 3e38) for sign in (1, -1)]


def fused_gelu(values, activation, width=1):
    """(GELU, GELU′) of each value. With a width of 1 inf and NaN reach no other value; larger widths fill vectors."""
    x = values.reshape(-1, width).clone().requires_grad_()
    before = fl.stats()[PATH]
    y = fl.linear_gelu_residual(x, torch.eye(width, dtype=x.dtype), activation=activation)
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    after = fl.stats()[PATH]
    assert all(after[direction] == before[direction] + 1 for direction in COUNTED)
    return y.detach().flatten(), slope.flatten()


def exact_gelu(values, activation):
    """(GELU, GELU′, and the sum of the moduli of GELU′'s two terms) of finite values in float64."""
    z = values.double().numpy()
    c, b = gelu_parts(z, activation)
    return tuple(torch.from_numpy(a) for a in (z * c, c + b, c + abs(b)))


def test_the_oracle_against_fifty_digits():
    values = torch.linspace(-12, 12, 97, dtype=torch.float64)
    with mpmath.workdps(50):
        for activation in GELUS:
            value, slope, size = exact_gelu(values, activation)
            for i, z in enumerate(map(mpmath.mpf, values.tolist())):
                f = partial(activation_in_many_digits, activation=activation)
                assert abs(value[i].item() - f(z)) <= 1e-12 * abs(f(z))
                assert abs(slope[i].item() - mpmath.diff(f, z)) <= 1e-12 * size[i].item()


def assert_float32_promise(values, got, activation):
    value, slope, size = exact_gelu(values, activation)
    for name, result, exact, bound in (("GELU", got[0], value, value.abs()), ("GELU′", got[1], slope, size)):
        excess = (result.double() - exact).abs() - (LIMIT[activation] * bound + TINY)
        worst = excess.argmax()
        assert excess[worst] <= 0, (
            f"{name}({values[worst].item()!r}) = {result[worst].item()!r}, expected {exact[worst].item()!r}"
        )


@pytest.mark.own_kernels
@each_gelu
def test_float32_everywhere_in_ten(activation):
    values = torch.linspace(-10, 10, 3_000_000 // 64 * 64)
    assert_float32_promise(values, fused_gelu(values, activation, width=64), activation)


@pytest.mark.own_kernels
@each_gelu
def test_float32_in_every_binade(activation):
    """All powers of two up to 8, denormals included, with several mantissas and both signs."""
    powers = 2.0 ** torch.arange(-149, 4, dtype=torch.float64)
    values = torch.outer(powers, torch.tensor([1.0, 1.1, 1.25, 1.37, 1.5, 1.7, 1.99], dtype=torch.float64))
    values = torch.cat([values, -values]).flatten().float()
    values = values[values.abs() <= 10]
    assert_float32_promise(values, fused_gelu(values, activation), activation)


@pytest.mark.own_kernels
@each_gelu
def test_float32_beyond_ten(activation):
    values = torch.logspace(1, 38.5, 40_000, dtype=torch.float64).float()
    value, slope = fused_gelu(values, activation)
    size = {"quick_gelu": 1e-6}.get(activation, 1e-20)
    assert ((values - value).abs() <= size).all() and ((1 - slope).abs() <= size).all()
    value, slope = fused_gelu(-values, activation)
    assert (value <= 0).all() and (value > -size).all()
    assert (slope <= 0).all() and (slope > -size).all()


@pytest.mark.own_kernels
@each_gelu
def test_float64(activation):
    """The error relative to GELU itself may include z's rounding, since GELU's condition number grows like z²."""
    generator = torch.Generator().manual_seed(0)
    values = torch.cat(
        [
            torch.linspace(-36, 36, 400, dtype=torch.float64),
            torch.randn(200, generator=generator, dtype=torch.float64),
            torch.tensor([1e-310, -1e-310, 1e-300, -1e-20, 0.0], dtype=torch.float64),
        ]
    )
    value, slope = fused_gelu(values, activation)
    f = partial(activation_in_many_digits, activation=activation)
    with mpmath.workdps(60):
        for z, got, got_slope in zip(values.tolist(), value.tolist(), slope.tolist(), strict=True):
            exact, exact_slope = f(mpmath.mpf(z)), mpmath.diff(f, mpmath.mpf(z), h=mpmath.mpf(10) ** -20)
            condition = 8 * (1 + z * z if activation == "gelu" else 1 + abs(z) + z * z + abs(z) ** 3 / 4)
            limit = condition * 2.3e-16
            size = max(abs(exact_slope), abs(exact / z) if z else 1)
            # Where exp() is a denormal of a few bits, z and GELU′ multiply what they miss.
            assert abs(got - exact) <= limit * abs(exact) + 1e-321, (z, got)
            assert abs(got_slope - exact_slope) <= limit * size + 1e-320, (z, got_slope)


def ordinal(t):
    """Neighbouring floats of 16 bits become neighbouring integers; both zeros become 0."""
    bits = t.view(torch.int16).to(torch.int64)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


@pytest.mark.own_product
@SIXTEEN_BITS
@each_gelu
def test_all_values_of_16_bits(dtype, activation):
    """GELU and GELU′ of all 65,536 values are within one unit in the last place of the rounded exact value."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    value, slope = fused_gelu(values, activation)
    nan, infinite = values.isnan(), values.isinf()
    assert value[nan].isnan().all() and slope[nan].isnan().all()
    assert torch.equal(value[infinite], values[infinite].clamp(min=0))
    assert torch.equal(slope[infinite], (values[infinite] > 0).to(dtype))
    finite = values[~nan & ~infinite]
    for got, exact in zip((value, slope), exact_gelu(finite, activation), strict=False):
        distance = (ordinal(got[~nan & ~infinite]) - ordinal(exact.to(dtype))).abs()
        worst = distance.argmax()
        assert distance[worst] <= 1, (finite[worst].item(), exact[worst].item())


@pytest.mark.own_kernels
@every_dtype
@each_gelu
def test_special_values(dtype, activation):
    """Far out GELU′ is 0 or 1, never 0 · inf; NaN stays NaN; a denormal is halved and does not vanish."""
    values = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
    value, slope = fused_gelu(values, activation)
    assert torch.equal(value.isnan(), values.isnan()) and torch.equal(slope.isnan(), values.isnan())
    far = values.abs() >= (471 if activation == "quick_gelu" else 41)
    assert torch.equal(value[far], values[far].clamp(min=0))
    assert torch.equal(slope[far], (values[far] > 0).to(dtype))
    zero = values == 0
    assert (value[zero] == 0).all() and (slope[zero] == 0.5).all()
    smallest = 4 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    tiny = torch.tensor([smallest, -smallest], dtype=dtype)
    value, slope = fused_gelu(tiny, activation)
    assert torch.equal(value, tiny / 2) and (tiny != 0).all() and (slope == 0.5).all()


@every_dtype
@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=str)
@pytest.mark.parametrize(
    "create_graph", [False, pytest.param(True, marks=pytest.mark.expects_fallback("backward with create_graph=True"))]
)
def test_scaling_overflows(dtype, options, create_graph):
    """quick_gelu of a z for which 1.702 z is infinite."""
    large = 0.6 * torch.finfo(dtype).max
    x = torch.tensor([[large], [-large]], dtype=dtype, requires_grad=True)
    y = fl.linear_gelu_residual(x, torch.ones(1, 1, dtype=dtype), activation="quick_gelu", **options)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=create_graph)
    assert torch.equal(y.detach(), x.detach().clamp(min=0)) and dx.flatten().tolist() == [1, 0]


def backward_slope(z, activation, grad=None):
    """GELU′(z) for a z that the kernel gets directly: row by row, as the bias gradient of one row."""
    grad = torch.ones_like(z) if grad is None else grad
    return torch.ops.fastlane.linear_gelu_backward(
        grad, z, None, None, None, None, activation=activation, weight_column_major=False,
        output_mask=[False, False, True],
    )[2]  # fmt: skip


@every_dtype
@each_gelu
def test_zeros(dtype, activation):
    """GELU′ is the same for both zeros; a value that is rounded to zero keeps its sign."""
    zeros = torch.tensor([[-0.0, 0.0]], dtype=dtype)
    assert torch.equal(backward_slope(zeros, activation), torch.full((2,), 0.5, dtype=dtype))
    smallest = torch.tensor([1.0, -1.0], dtype=dtype) * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    value, _ = fused_gelu(smallest, activation)
    assert (smallest != 0).all() and (value.abs() <= smallest.abs()).all()
    if PATH != "torch":  # the sign of torch's own zero depends on its vectors
        assert torch.equal(value.signbit(), smallest.signbit())


@pytest.mark.own_kernels
@every_dtype
@each_gelu
def test_vector_and_tail_agree(dtype, activation):
    """The same value at every place of a row and of a tile gives the same bits, forward and backward."""
    values = torch.cat([torch.tensor(SPECIAL, dtype=torch.float64), torch.linspace(-6, 6, 53, dtype=torch.float64)])
    values = values.to(dtype).reshape(-1, 1)
    values = torch.where(values.isnan(), torch.zeros_like(values), values)  # NaN has no equal
    for width in (1, 3, 15, 16, 17, 31, 32, 33, 67, 257):
        y = fl.linear_gelu_residual(values, values.new_ones(width, 1), activation=activation)
        assert torch.equal(y, y[:, :1].expand(-1, width)), f"width {width}"
        assert torch.equal(y[:, :1], fused_gelu(values, activation)[0].reshape(-1, 1))
        for row in (0, len(values) // 2, len(values) - 1):
            again = fl.linear_gelu_residual(values.roll(row, 0), values.new_ones(width, 1), activation=activation)
            assert torch.equal(again, y.roll(row, 0))
        slopes = torch.stack([backward_slope(v.expand(1, width), activation) for v in values])
        assert torch.equal(slopes, slopes[:, :1].expand(-1, width)), f"width {width}"
        assert torch.equal(slopes[:, 0], fused_gelu(values, activation)[1])
