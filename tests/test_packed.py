"""Packed weights: the bits of the weight itself, on every way of multiplying; messages; graphs and other processes."""

import copy
import io
import itertools
import pickle
import random
import re

import pytest
import torch
from support.choices import ACTIVATIONS, DTYPES, dtype_name
from support.paths import PATH
from support.subprocesses import run_python
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastlane_ext as fl
from fastlane_ext import (
    PackedWeight,
    linear_gelu_concat,
    linear_gelu_residual,
    mlp_residual,
    pack_weight,
    residual_stack,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Around the tiles of every set, inner products up to 24 rows, panels of few rows up to 48, blocks.
ROWS = (0, 1, 2, 3, 7, 12, 13, 24, 25, 48, 49, 200)
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def assert_same_bits(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    integers = INTEGERS[expected.element_size()]
    assert torch.equal(got.view(integers), expected.view(integers))


def weight_of(out_features, in_features, dtype, layout="usual"):
    if layout == "transposed":
        return torch.randn(in_features, out_features, dtype=torch.float64).to(dtype).t()
    weight = torch.randn(out_features, in_features, dtype=torch.float64).to(dtype)
    return weight.repeat_interleave(2, 0)[::2] if layout == "every other row" else weight


@pytest.mark.parametrize("layout", ["usual", "transposed", "every other row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("rows", ROWS)
def test_layer(rows, dtype, layout, assert_fused):
    torch.manual_seed(rows)
    # Chains and k blocks end within, at and beyond these sizes; the last k is longer than a k block of every dtype.
    for in_features, out_features in ((1, 1), (16, 33), (65, 64), (1000, 100), (4100, 40)):
        weight = weight_of(out_features, in_features, dtype, layout)
        x, bias = torch.randn(rows, in_features).to(dtype), torch.randn(out_features).to(dtype)
        residual = torch.randn(rows, out_features).to(dtype)
        packed = pack_weight(weight)
        assert_same_bits(packed.unpack(), weight)
        assert (packed.shape, packed.dtype) == (weight.shape, dtype)
        y, expected = (linear_gelu_residual(x, w, bias, residual) for w in (packed, weight))
        if PATH == "torch" and layout == "every other row":
            torch.testing.assert_close(y, expected)  # torch adds in another order if rows lie next to each other
        else:
            assert_same_bits(y, expected)
    assert_fused(forward=10)


def results(x, weights, bias, activation):
    return (
        linear_gelu_residual(x, weights[0], bias, activation=activation),
        linear_gelu_concat(x, weights[0], bias, activation=activation),
        mlp_residual(x, weights[0], bias, weights[1], None, activation=activation),
        residual_stack(x, weights, [bias, None], activation=activation),
    )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_random_calls(threads):
    """Any sizes, activations, strides of x; every operation."""
    choose, before = random.Random(threads), torch.get_num_threads()
    torch.manual_seed(threads)
    torch.set_num_threads(threads)
    try:
        for _ in range(60):
            dtype, activation = choose.choice(DTYPES), choose.choice(ACTIVATIONS)
            rows, sizes = choose.choice(ROWS), [choose.choice((1, 5, 16, 31, 64, 100, 257)) for _ in range(3)]
            x = torch.randn(rows, sizes[0]).to(dtype)
            x = choose.choice((x, x.t().contiguous().t(), torch.cat([x, x], 1)[:, : sizes[0]]))
            weights = [weight_of(*shape, dtype) for shape in zip(sizes[1:], sizes, strict=False)]
            packed = [pack_weight(weight) for weight in weights]
            bias = torch.randn(sizes[1]).to(dtype)
            for got, expected in zip(*(results(x, ws, bias, activation) for ws in (packed, weights)), strict=True):
                assert_same_bits(got, expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shortcut", ["identity", "projection", "concat", "none"])
@pytest.mark.parametrize("width", [16, 600], ids=["one kernel", "layer by layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_stack(dtype, width, shortcut):
    torch.manual_seed(0)
    sizes = [width, width, 24, 24]
    inputs = [sum(sizes[: i + 1]) for i in range(3)] if shortcut == "concat" else sizes
    weights = [weight_of(out, in_, dtype) for in_, out in zip(inputs, sizes[1:], strict=False)]
    projections = [weight_of(o, i, dtype) if i != o else None for i, o in itertools.pairwise(sizes)]
    is_projected = shortcut == "projection"
    for rows in (1, 20, 100):
        x = torch.randn(rows, width).to(dtype)
        lists = [weights, projections if is_projected else None]
        packed = [ws and [None if w is None else pack_weight(w) for w in ws] for ws in lists]
        expected = residual_stack(x, weights, shortcut=shortcut, projections=lists[1])
        assert_same_bits(residual_stack(x, packed[0], shortcut=shortcut, projections=packed[1]), expected)


@pytest.mark.parametrize("rows", [1, 2, 16, 100])
@pytest.mark.parametrize("layout", ["usual", "transposed"])
def test_denormals(rows, layout):
    """Where products of bf16 pairs take them for zero: in the weight, in x, in both."""
    torch.manual_seed(0)
    for of_weight, of_x in ((True, False), (False, True), (True, True)):
        weight, x = weight_of(33, 40, torch.bfloat16, layout), torch.randn(rows, 40).to(torch.bfloat16)
        weight[5, :] = 1e-39 if of_weight else 1
        x[-1, :] = 1e-39 if of_x else 1
        expected = linear_gelu_residual(x, weight, activation="none")
        assert_same_bits(linear_gelu_residual(x, pack_weight(weight), activation="none"), expected)
        both = [weight, weight_of(40, 33, torch.bfloat16)]
        expected = residual_stack(x, both)
        assert_same_bits(residual_stack(x, [pack_weight(w) for w in both]), expected)


@pytest.mark.any_isa
def test_what_it_tells():
    packed = pack_weight(torch.randn(33, 20))
    kernels = "" if PATH == "torch" else fl.cpu_isa().removesuffix("_bf16")
    assert packed.kernels == kernels and str(tuple(packed.shape)) == "(33, 20)" and "out_features=33" in repr(packed)
    assert packed.data.dtype == torch.uint8 and packed.data.shape[0] == 33 and packed.nbytes >= 33 * 20 * 4


@pytest.mark.any_isa
def test_a_copy_does_not_follow_its_weight():
    weight, x = torch.randn(8, 8), torch.randn(3, 8)
    packed, before = pack_weight(weight), linear_gelu_residual(x, weight)
    weight.zero_()
    assert_same_bits(linear_gelu_residual(x, packed), before)
    unpacked = packed.unpack()
    unpacked.zero_()
    assert_same_bits(linear_gelu_residual(x, packed), before)


@pytest.mark.any_isa
def test_gradients_are_refused_in_one_line():
    packed, x = pack_weight(torch.randn(8, 8)), torch.randn(3, 8, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    for call, name in (
        (lambda: linear_gelu_residual(x, packed), "linear_gelu_residual: weight"),
        (lambda: linear_gelu_residual(x.detach(), packed, bias), "linear_gelu_residual: weight"),
        (lambda: linear_gelu_concat(x, packed), "linear_gelu_concat: weight"),
        (lambda: mlp_residual(x, torch.randn(8, 8), None, packed, None), "mlp_residual: fc2_weight"),
        (lambda: mlp_residual(x, packed, None, torch.randn(8, 8), None), "mlp_residual: fc1_weight"),
        (lambda: residual_stack(x, [torch.randn(8, 8), packed]), r"residual_stack: weights\[1\]"),
    ):
        if PATH == "torch":
            continue  # torch differentiates its own operators
        with pytest.raises(RuntimeError, match=rf"^{name} is packed, expected .* gradient; pass the weight") as error:
            call()
        assert len(str(error.value).splitlines()) == 1
        with torch.no_grad():
            call()


def damaged(packed, at, value):
    data = packed.data.clone()
    data.view(-1)[at] = value
    return PackedWeight(data)


@pytest.mark.any_isa
@pytest.mark.skipif(PATH == "torch", reason="torch's operators get the values, and other messages")
def test_messages():
    x, weight = torch.randn(3, 8), torch.randn(8, 8)
    packed = pack_weight(weight)
    no_packed = "is a uint8 tensor of shape .* that holds no packed weight, expected a weight, or the tensor of"
    for wrong, message in (
        (lambda: linear_gelu_residual(x.double(), packed), "weight was packed from dtype Float, expected Double"),
        (
            lambda: linear_gelu_residual(torch.randn(3, 9), packed),
            r"weight was packed from shape \[8, 8\], expected .* 9",
        ),
        (lambda: linear_gelu_residual(x, torch.zeros(8, 80, dtype=torch.uint8)), no_packed),
        (lambda: linear_gelu_residual(x, PackedWeight(packed.data[:1])), "damaged header|no packed weight"),
        (lambda: linear_gelu_residual(x, PackedWeight(packed.data.t())), no_packed),
        (lambda: linear_gelu_residual(x, PackedWeight(packed.data[:4].clone())), "damaged header"),
        (lambda: linear_gelu_residual(x, torch.zeros(8, dtype=torch.uint8)), "weight has dtype Byte and shape"),
        (lambda: linear_gelu_residual(x, damaged(packed, 0, 0)), no_packed),
        (
            lambda: linear_gelu_residual(x, damaged(packed, 8, 9)),
            "packed in format 9, expected format 1; pack it again",
        ),
        (lambda: linear_gelu_residual(x, damaged(packed, 12, 200)), "damaged header"),
        (lambda: linear_gelu_residual(x, damaged(packed, 39, 128)), "damaged header"),
        (lambda: linear_gelu_residual(x, damaged(packed, 40, 9)), "damaged header"),
        (lambda: linear_gelu_residual(x, damaged(packed, 53, 1)), "damaged header"),
        (
            lambda: residual_stack(x, [weight, damaged(packed, 8, 9)]),
            r"^residual_stack: weights\[1\] is a weight packed",
        ),
        (
            lambda: mlp_residual(x, weight, None, pack_weight(torch.randn(8, 9)), None),
            "fc2_weight was packed from shape",
        ),
        (lambda: pack_weight(torch.randn(8)), "^pack_weight: weight has shape"),
        (lambda: pack_weight(torch.randn(0, 8)), "^pack_weight: weight has shape .* at least one row"),
        (lambda: pack_weight(torch.ones(8, 8, dtype=torch.int32)), "^pack_weight: weight has dtype Int"),
        (lambda: pack_weight(torch.randn(8, 8, device="meta")), "^pack_weight: weight is on meta"),
        (lambda: pack_weight(weight.to_sparse()), "^pack_weight: weight has layout"),
    ):
        with pytest.raises(RuntimeError, match=message) as error:
            wrong()
        assert len(str(error.value).splitlines()) == 1
    for wrong, message in (
        (lambda: pack_weight([1]), "^weight: got a list"),
        (lambda: PackedWeight(weight), "^data: got dtype torch.float32, expected the uint8 tensor"),
        (lambda: PackedWeight(None), "^data: got a NoneType"),
    ):
        with pytest.raises(TypeError, match=message):
            wrong()


@pytest.mark.any_isa
@pytest.mark.skipif(PATH == "torch", reason="without vector kernels every set reads the copy")
def test_another_kernel_set(tmp_path):
    """A file of one machine on another: one line, and the way out."""
    weight, path = torch.randn(8, 8), tmp_path / "packed.pt"
    torch.save(pack_weight(weight).data, path)
    own = fl.cpu_isa().removesuffix("_bf16")  # its float32 kernels are those of the set without the suffix
    sets = [isa for isa in fl.build_info()["supported_isas"] if isa.removesuffix("_bf16") != own]
    message = run_python(
        f"""
import json, torch, fastlane_ext as fl
packed = fl.PackedWeight(torch.load({str(path)!r}))
try:
    fl.linear_gelu_residual(torch.ones(1, 8), packed)
except RuntimeError as error:
    print(json.dumps(str(error)))
""",
        FASTLANE_CPU_ISA=sets[0],
    )
    assert re.fullmatch(
        r"linear_gelu_residual: weight was packed for the kernel set \w+, expected "
        rf"{sets[0].removesuffix('_bf16')}, which this process runs; pack it again with .*",
        message,
    )


@pytest.mark.any_isa
def test_copies_and_files():
    packed, x = pack_weight(torch.randn(9, 8)), torch.randn(3, 8)
    expected = linear_gelu_residual(x, packed)
    buffer = io.BytesIO()
    torch.save(packed.data, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), PackedWeight(torch.load(buffer))):
        assert_same_bits(linear_gelu_residual(x, other), expected)


@pytest.mark.any_isa
@pytest.mark.expects_fallback("fastlane_ext.disabled() is active")
def test_disabled_runs_eager():
    weight, x = torch.randn(9, 8), torch.randn(3, 8)
    packed = pack_weight(weight)
    with fl.disabled():
        for call in (
            lambda w: linear_gelu_residual(x, w),
            lambda w: linear_gelu_concat(x, w),
            lambda w: mlp_residual(x, w, None, w.t() if isinstance(w, torch.Tensor) else pack_weight(weight.t()), None),
            lambda w: residual_stack(x, [w]),
        ):
            assert_same_bits(call(packed), call(weight))
        with torch.inference_mode():
            assert_same_bits(linear_gelu_residual(x, packed), linear_gelu_residual(x, weight))


@pytest.mark.any_isa
def test_flops():
    packed, x = pack_weight(torch.randn(9, 8)), torch.randn(3, 8)
    with FlopCounterMode(display=False) as counter:
        linear_gelu_residual(x, packed)
        mlp_residual(x, packed, None, pack_weight(torch.randn(5, 9)), None)
        residual_stack(x, [packed, pack_weight(torch.randn(5, 9))], shortcut="none")
    assert counter.get_total_flops() == 2 * 3 * (9 * 8 + 2 * (9 * 8 + 5 * 9))


@pytest.mark.any_isa
def test_vmap():
    packed, x = pack_weight(torch.randn(9, 8)), torch.randn(4, 3, 8)
    y = torch.func.vmap(lambda rows: linear_gelu_residual(rows, packed))(x)
    assert_same_bits(y, linear_gelu_residual(x, packed))


@pytest.mark.any_isa
@pytest.mark.skipif(PATH == "torch", reason="torch differentiates its own operators")
def test_transforms_that_differentiate():
    packed, x = pack_weight(torch.randn(9, 8)), torch.randn(3, 8)
    for transform in (torch.func.grad, lambda f: torch.func.vjp(f, x)[1]):
        with pytest.raises(RuntimeError, match="weight is packed and wrapped by a torch.func transform"):
            transform(lambda rows: linear_gelu_residual(rows, packed).sum())(x)


class Packed(nn.Module):
    """Holds the bytes as a buffer, or the packed weight as an attribute."""

    def __init__(self, weight, as_buffer):
        super().__init__()
        self.weight = pack_weight(weight)
        if as_buffer:
            self.register_buffer("data", self.weight.data)
            self.weight = None

    def forward(self, x):
        return linear_gelu_residual(x, self.weight or PackedWeight(self.data), residual=x)


@pytest.mark.slow
@pytest.mark.parametrize("as_buffer", [True, False], ids=["buffer", "attribute"])
def test_graphs(as_buffer):
    model, x = Packed(torch.randn(8, 8), as_buffer).eval(), torch.randn(3, 8)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        assert_same_bits(compiled(x), expected)
        assert_same_bits(compiled(x.repeat(2, 1)), expected.repeat(2, 1))
    rows = torch.export.Dim("rows")
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    assert_same_bits(exported.module()(x), expected)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    assert_same_bits(torch.export.load(buffer).module()(x), expected)
