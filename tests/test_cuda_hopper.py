"""The fused CUDA products, with FASTLANE_PATH=fused on a GPU of capability 9.0: forward and dgrad must take one."""

import pytest
import torch
from oracle import ACTIVATIONS, assert_as_exact_as_eager, dtype_name, make_case, random, run_fused
from test_cuda import on_gpu

import fastlane_ext as fl

pytestmark = [pytest.mark.hopper, pytest.mark.any_isa]

# Rows, in, out: less than a tile; edges of the small tile and the cluster of two; last, of the wide tile both ways.
SIZES = [(8, 8, 8), (100, 72, 40), (128, 64, 256), (257, 136, 264), (1000, 520, 776), (5000, 1032, 1032)]
DTYPES = [torch.bfloat16, torch.float16]


def assert_every_product_was_fused(forward=None):
    counts = fl.stats()
    assert counts["library"] == {"forward": 0, "backward": 0}
    assert counts["hopper"]["forward"] > 0 if forward is None else counts["hopper"]["forward"] == forward


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_hopper_never_less_exact_than_eager(dtype, activation, size):
    rows, *features = size
    assert_as_exact_as_eager([on_gpu(make_case((rows,), *features, dtype=dtype, activation=activation))])
    assert_every_product_was_fused()


@pytest.mark.parametrize("residual", ["none", "tensor", "x"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"recompute": True}, {"concat": True}], ids=str)
def test_hopper_small(options, residual):
    if options.get("concat") and residual != "none":
        pytest.skip("a concatenation adds nothing")
    case = make_case((3, 50), 64, 64, dtype=torch.bfloat16, residual=residual, **options)
    assert_as_exact_as_eager([on_gpu(case)])
    assert_every_product_was_fused()


@pytest.mark.parametrize("size", [(300, 128, 192), SIZES[-1]], ids=["small tile", "wide tile"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_inference_gives_the_same_bits_as_training(dtype, size):
    rows, *features = size
    case = on_gpu(make_case((rows,), *features, dtype=dtype))
    expected = fl.linear_gelu_residual(case.x, case.weight, case.bias, case.residual_data)
    with torch.no_grad():
        got = fl.linear_gelu_residual(case.x, case.weight, case.bias, case.residual_data)
    assert torch.equal(got, expected)
    assert_every_product_was_fused(forward=2)


def test_same_bits_from_run_to_run():
    case = on_gpu(make_case((5000,), 512, 768, dtype=torch.bfloat16))
    first = run_fused(case)
    for _ in range(5):
        for name, value in run_fused(case).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("size", [(300, 128, 192), SIZES[-1]], ids=["small tile", "wide tile"])
def test_tf32_where_torch_allows_it(size):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        rows, *features = size
        case = on_gpu(make_case((rows,), *features))
        operands = (case.x, case.weight, case.bias, case.residual_data)
        with torch.no_grad():
            y = fl.linear_gelu_residual(*operands)
        trained = fl.linear_gelu_residual(*(t.detach().requires_grad_() for t in operands))
        assert_every_product_was_fused(forward=2)
        x, weight, bias, residual = (t.double() for t in operands)
        expected = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias)) + residual
        assert (y - expected).abs().max() < 1e-2
        assert torch.equal(trained, y)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_what_no_fused_kernel_takes_is_refused(dtype):
    case = on_gpu(make_case((16,), 16, 16, dtype=dtype))
    with pytest.raises(NotImplementedError, match="FASTLANE_PATH=fused: got a CUDA product that no fused kernel takes"):
        fl.linear_gelu_residual(case.x, case.weight, case.bias)


def test_a_wide_stack():
    weights = [random(256, 256, dtype=torch.bfloat16, seed=i).cuda() / 16 for i in range(3)]
    x = random(512, 256, dtype=torch.bfloat16).cuda().requires_grad_()
    y = fl.residual_stack(x, weights)
    y.sum().backward()
    expected = x.detach()
    for weight in weights:
        expected = expected + torch.nn.functional.gelu(torch.nn.functional.linear(expected, weight))
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=5e-2)
    assert fl.stats()["hopper"] == {"forward": 1, "backward": 1}
