"""The error for a wrong argument: one line with the argument, the value it got and the value expected."""

import itertools
import re
from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastlane_ext as fl


def arguments(**changes):
    """Right arguments, 5 × 4 → 3, with some replaced."""
    right = {"x": (5, 4), "weight": (3, 4), "bias": (3,), "residual": (5, 3)}
    return {name: torch.zeros(shape) for name, shape in right.items()} | changes


def zeros(*shape, **options):
    return lambda: torch.zeros(shape, **options)


def quantized(t):
    return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)


DTYPE_CASES = [
    pytest.param({name: zeros(*shape, dtype=dtype)}, [name, text, expected], id=f"{name}-{text}")
    for dtype, text in (
        (torch.int64, "Long"),
        (torch.int8, "Char"),
        (torch.bool, "Bool"),
        (torch.complex64, "ComplexFloat"),
        (torch.float64, "Double"),
        (torch.bfloat16, "BFloat16"),
    )
    for name, shape, expected in (
        ("x", (5, 4), "float32, float64, bfloat16 or float16"),
        ("weight", (3, 4), "Float like x"),
        ("bias", (3,), "Float like x"),
        ("residual", (5, 3), "Float like x"),
    )
    if not (name == "x" and dtype.is_floating_point)
]
SHAPE_CASES = [
    pytest.param({name: zeros(*shape)}, [name, *texts], id=f"{name}-{'x'.join(map(str, shape)) or '0-D'}")
    for name, shape, texts in (
        ("x", (), ["x is 0-D", "(..., in_features)"]),
        ("x", (5, 3), ["weight has shape [3, 4]", "(out_features, 3)", "[5, 3]"]),
        ("x", (4, 5), ["weight has shape [3, 4]", "(out_features, 5)"]),
        ("weight", (4,), ["weight has shape [4]", "(out_features, in_features)"]),
        ("weight", (1, 3, 4), ["weight has shape [1, 3, 4]", "(out_features, in_features)"]),
        ("weight", (4, 3), ["weight has shape [4, 3]", "(out_features, 4)", "[5, 4]"]),
        ("bias", (4,), ["bias has shape [4]", "(3,)"]),
        ("bias", (1,), ["bias has shape [1]", "(3,)"]),
        ("bias", (), ["bias has shape []", "(3,)"]),
        ("bias", (1, 3), ["bias has shape [1, 3]", "(3,)"]),
        ("residual", (4,), ["residual has shape [4]", "[5, 3]"]),
        ("residual", (4, 3), ["residual has shape [4, 3]", "[5, 3]"]),
        ("residual", (2, 5, 3), ["residual has shape [2, 5, 3]", "[5, 3]"]),
        ("residual", (1, 5, 3), ["residual has shape [1, 5, 3]", "[5, 3]"]),
        ("residual", (0,), ["residual has shape [0]", "[5, 3]"]),
    )
]
OTHER_CASES = (
    [
        pytest.param(
            {name: lambda name=name: arguments()[name].to_sparse()},
            [name, "layout", "dense"],
            id=f"{name}-sparse",
        )
        for name in ("x", "weight", "bias", "residual")
    ]
    + [
        pytest.param(
            {name: lambda name=name: quantized(arguments()[name])}, [name, "quantized"], id=f"{name}-quantized"
        )
        for name in ("x", "weight", "bias", "residual")
    ]
    + [
        pytest.param(
            {"x": lambda: torch.nested.nested_tensor([torch.zeros(5, 4)])}, ["x", "nested", "dense"], id="x-nested"
        ),
        pytest.param(
            {"x": lambda: torch.nested.nested_tensor([torch.zeros(5, 4)], layout=torch.jagged)},
            ["x", "nested", "dense"],
            id="x-jagged",
        ),
    ]
    + [
        pytest.param(
            {name: lambda name=name: arguments()[name].to("meta")}, [name, "meta", "cpu"], id=f"{name}-on-meta"
        )
        for name in ("weight", "bias", "residual")
    ]
)


def assert_one_line(message, texts):
    assert "\n" not in message.strip(), message
    assert message.startswith("linear_gelu_"), message
    assert "expected" in message
    for text in texts:
        assert text in message, message


def call(fields, device=None, requires_grad=False):
    """The message of linear_gelu_residual's error, which linear_gelu_concat must share."""
    changed = arguments() | {name: make() for name, make in fields.items()}
    if device:
        changed = {name: t.to(device) for name, t in changed.items()}
    if requires_grad:
        changed["bias" if "bias" not in fields else "weight"].requires_grad_()
    with pytest.raises(RuntimeError) as error:
        fl.linear_gelu_residual(**changed)
    message = str(error.value)
    if "residual" not in fields:
        changed.pop("residual")
        with pytest.raises(RuntimeError) as error:
            fl.linear_gelu_concat(**changed)
        assert str(error.value) == message.replace("linear_gelu_residual", "linear_gelu_concat")
    return message


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("fields", "texts"), DTYPE_CASES + SHAPE_CASES)
def test_wrong_dtype_or_shape(fields, texts, requires_grad):
    assert_one_line(call(fields, requires_grad=requires_grad), texts)
    assert fl.stats()["fused"]["forward"] == 0


@pytest.mark.parametrize(("fields", "texts"), DTYPE_CASES + SHAPE_CASES)
@pytest.mark.parametrize("how", ["meta", "fake"])
def test_the_same_message_without_data(how, fields, texts):
    """A tracer, or a model on the meta device, raises the error before any data exists."""
    real = call(fields)
    if how == "meta":
        message = call(fields, device="meta")
    else:
        with FakeTensorMode():
            message = call(fields)
    assert message == real
    assert_one_line(message, texts)


@pytest.mark.parametrize(("fields", "texts"), OTHER_CASES)
def test_wrong_kind_of_tensor(fields, texts):
    """A sparse tensor, or one on another device: refused in one line of ours, not in the dispatcher's page."""
    assert_one_line(call(fields), texts)


@pytest.mark.parametrize("function", [fl.linear_gelu_residual, fl.linear_gelu_concat])
@pytest.mark.parametrize("activation", ["relu", "GELU", "", "gelu_erf"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_unknown_activation(function, activation, device, requires_grad):
    x = torch.zeros(5, 4, device=device, requires_grad=requires_grad)
    with pytest.raises(ValueError) as error:
        function(x, torch.zeros(3, 4, device=device), activation=activation)
    message = str(error.value)
    assert "\n" not in message
    assert f"activation: got '{activation}', expected one of 'none', 'gelu', 'gelu_tanh', 'quick_gelu'" in message


@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual"])
def test_not_a_tensor(name):
    with pytest.raises(TypeError, match=rf"^{name}: got a list, expected a tensor( or None)?; convert it"):
        fl.linear_gelu_residual(**arguments(**{name: [1.0]}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(2, 3)}, r"z has shape \[2, 3\], expected \[5, 3\]"),
        ({"z": torch.zeros(5, 3, dtype=torch.half)}, "z has dtype Half, expected Float like grad_activated"),
        ({"x": None}, "x is missing"),
        ({"x": torch.zeros(4, 4)}, r"x has shape \[4, 4\], expected \[5, 4\]"),
        ({"weight": None}, "weight is missing"),
        ({"weight": torch.zeros(4, 3)}, r"weight has shape \[4, 3\], expected \(3, in_features\)"),
        ({"bias": torch.zeros(4)}, r"bias has shape \[4\], expected \(3,\)"),
        ({"grad_shortcut": torch.zeros(5, 3)}, r"grad_shortcut has shape \[5, 3\], expected \[5, 4\]"),
        ({"grad_activated": torch.zeros(5, 3, dtype=torch.int)}, "grad_activated has dtype Int"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_backward_trusts_no_saved_tensor(change, message, device):
    """A hook on saved tensors may return another dtype or size: backward never reads beyond the end."""
    given = {
        "grad_activated": torch.zeros(5, 3),
        "z": torch.zeros(5, 3),
        "x": torch.zeros(5, 4),
        "weight": torch.zeros(3, 4),
        "bias": torch.zeros(3),
        "grad_shortcut": None,
    } | change
    given = {name: t if t is None else t.to(device) for name, t in given.items()}
    with pytest.raises(RuntimeError, match=f"^linear_gelu_backward: {message}") as error:
        torch.ops.fastlane.linear_gelu_backward(
            **given, activation="gelu", weight_column_major=False, output_mask=[True] * 3
        )
    assert "\n" not in str(error.value)


DTYPE_NAMES = {
    torch.float32: "Float",
    torch.float64: "Double",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
}


@pytest.mark.parametrize(("x", "weight"), list(itertools.permutations(DTYPE_NAMES, 2)), ids=str)
def test_mixed_dtypes_name_both(x, weight):
    with pytest.raises(RuntimeError) as error:
        fl.linear_gelu_residual(torch.zeros(5, 4, dtype=x), torch.zeros(3, 4, dtype=weight))
    assert f"weight has dtype {DTYPE_NAMES[weight]}, expected {DTYPE_NAMES[x]} like x" in str(error.value)


@pytest.mark.skipif(bool(fl.build_info()["cuda_archs"]), reason="for a build without CUDA kernels")
@pytest.mark.parametrize("name", ["linear_gelu_residual", "linear_gelu_concat"])
def test_cuda_tensor_in_a_cpu_build(name):
    """No CUDA device is needed to reach the kernel: the dispatcher is told which key to use."""
    op = getattr(torch.ops.fastlane, name).default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(NotImplementedError) as error:
        op.redispatch(keys, torch.zeros(5, 4), torch.zeros(3, 4), activation="gelu")
    message = str(error.value).split("\nException raised from")[0]
    assert "\n" not in message
    assert re.search(rf"fastlane::{name}: got a CUDA tensor, but .* CPU kernels only", message)
    assert fl.build_info()["cuda_reason"] in message
    assert "FASTLANE_CUDA=1 pip install --no-build-isolation" in message


@pytest.mark.skipif(bool(fl.build_info()["cuda_archs"]), reason="for a build without CUDA kernels")
def test_every_operator_says_so_in_a_cpu_build():
    cpu, cuda = (
        {name for name in torch._C._dispatch_get_registrations_for_dispatch_key(key) if name.startswith("fastlane::")}
        for key in ("CPU", "CUDA")
    )
    assert "fastlane::mlp_residual" in cpu
    assert cuda == cpu


def test_wrong_arguments_leave_no_trace(assert_fused):
    """An error leaves no counter moved and no history recorded: the corrected call with the same tensors works."""
    right = arguments()
    right["weight"].requires_grad_()
    with pytest.raises(RuntimeError):
        fl.linear_gelu_residual(**right | {"bias": torch.zeros(7)})
    fl.linear_gelu_residual(**right).sum().backward()
    assert_fused(forward=1, backward=1)


def test_an_unknown_tile_is_refused():
    with pytest.raises(ValueError, match="^cols: got 100, expected 128, 192, 256, or 0 for no force$"):
        fl._C.force_hopper_tile(100)


def test_the_short_way_raises_the_operators_own_errors_and_leaves_the_rest_to_torch_ops():
    """The short way takes plain tensors only, and a mode that watches Python's calls still sees the operator."""
    from torch.overrides import TorchFunctionMode

    short = partial(fl._load.library.run_plain_layer, None)  # no facts to look at first
    op = torch.ops.fastlane.linear_gelu_residual.default
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 3)
    for weight in (torch.randn(4, 2), torch.randn(4, 3, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="^linear_gelu_residual: ") as of_short:
            short(x, weight, None, None, "gelu", False)
        with pytest.raises(RuntimeError) as of_op:
            op(x, weight)
        assert str(of_short.value) == str(of_op.value)
    weight = torch.randn(4, 3)
    assert torch.equal(short(x, weight, None, None, "gelu", False), op(x, weight))
    assert short(x, [1.0], None, None, "gelu", False) is None and short(x, weight, None, None, 3, False) is None
    with Watch():
        assert short(x, weight, None, None, "gelu", False) is None
        fl.linear_gelu_residual(x, weight)
    assert op in seen
