"""PyTorch's own test samples of linear and GELU, through every operation: values, gradients, strides, errors, and the
promises of torch's own operators about their inputs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support.choices import ACTIVATIONS, DTYPES, dtype_name
from support.exactness import assert_no_less_exact
from support.paths import COUNTED, PATH
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

import fastlane_ext as fl
from fastlane_ext import reference

OPERATIONS = ("linear_gelu_residual", "linear_gelu_concat", "residual_stack", "mlp_residual")
SHORTCUTS = ("identity", "projection", "concat", "none")

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
each_operation = pytest.mark.parametrize("operation", OPERATIONS)
each_layout = pytest.mark.parametrize("layout", ["as they are", "noncontiguous"])


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    """The samples have a few elements: other threads would only wait."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def opinfo():
    # Takes seconds to import, so not while tests are collected.
    from torch.testing._internal.common_methods_invocations import op_db

    return {op.name.removeprefix("nn.functional."): op for op in op_db if op.name.startswith("nn.functional.")}


def samples_of(op, dtype, layout="as they are"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        samples = list(op.sample_inputs("cpu", dtype))
        if op.reference_inputs_func is not None:
            samples += op.reference_inputs("cpu", dtype)
    return [sample.noncontiguous() if layout == "noncontiguous" else sample for sample in samples]


def linear_samples(opinfo, dtype, layout="as they are"):
    """(x, weight, bias or None)."""
    return [(s.input, *s.args, *[None] * (2 - len(s.args))) for s in samples_of(opinfo["linear"], dtype, layout)]


def as_sample(t: Tensor, like: Tensor) -> Tensor:
    from torch.testing._internal.common_utils import noncontiguous_like

    return t if like.is_contiguous() else noncontiguous_like(t)


@dataclass
class Call:
    """One operation on a sample. A tensor that occurs twice is one leaf."""

    operation: str
    arguments: dict
    options: dict

    @property
    def x(self):
        return self.arguments["x"]

    def leaves(self, change=lambda t: t.detach().requires_grad_()):
        """The arguments with their tensors replaced, and those tensors by their names."""
        made, named = {}, {}
        for path, t in tree_flatten_with_path(self.arguments)[0]:
            if isinstance(t, Tensor) and id(t) not in made:
                made[id(t)] = named[f"d{keystr(path)}"] = change(t)
        return tree_map(lambda t: made.get(id(t), t), self.arguments), named

    def __call__(self, arguments, kind=fl):
        return getattr(kind, self.operation)(**arguments, **self.options)

    def grad(self, y: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        return as_sample(grad.to(self.x.dtype), self.x)

    def run(self, kind=fl, change=lambda t: t.detach().requires_grad_()) -> dict[str, Tensor]:
        arguments, leaves = self.leaves(change)
        y = self(arguments, kind)
        y.backward(self.grad(y).to(y.dtype))
        return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}

    def run_exact(self) -> dict[str, Tensor]:
        return self.run(reference, lambda t: t.detach().double().requires_grad_())


def calls_of(operation, x, weight, bias, activation="gelu"):
    """The calls of an operation that can be made from a sample of linear."""
    out_features, in_features = weight.shape
    tensor = as_sample(torch.linspace(-1, 1, out_features).to(x.dtype).expand(*x.shape[:-1], -1).clone(), x)
    options = {"activation": activation}
    if operation == "linear_gelu_residual":
        for residual in [None, tensor, *[x] * (in_features == out_features)]:
            yield Call(operation, {"x": x, "weight": weight, "bias": bias, "residual": residual}, options)
    elif operation == "linear_gelu_concat":
        yield Call(operation, {"x": x, "weight": weight, "bias": bias}, options)
    elif operation == "mlp_residual":
        fc2_bias = None if bias is None else as_sample(torch.linspace(-1, 1, in_features).to(x.dtype), bias)
        parameters = {"fc1_weight": weight, "fc1_bias": bias, "fc2_weight": weight.t(), "fc2_bias": fc2_bias}
        for residual in (None, x):
            yield Call(operation, {"x": x, **parameters, "residual": residual}, options)
    else:
        for shortcut in SHORTCUTS:
            arguments = {"x": x, "weights": [weight], "biases": [bias]}
            if shortcut == "projection" and in_features != out_features:
                arguments |= {"projections": [as_sample(weight / 2, weight)]}
                arguments |= {"projection_biases": [None if bias is None else as_sample(-bias, bias)]}
            yield Call(operation, arguments, options | {"shortcut": shortcut})


def assert_as_the_composition(calls):
    """Values by exactness.py's rule, in float64 within rounding; shapes and strides are the composition's."""

    def run_fused(call):
        got, eager = call.run(), call.run(reference)
        for name, t in got.items():
            assert t.shape == eager[name].shape and t.stride() == eager[name].stride(), (call.operation, name)
        return got

    before = fl.stats()[PATH]
    if calls[0].x.dtype == torch.float64:
        for call in calls:
            torch.testing.assert_close(run_fused(call), call.run_exact(), rtol=1e-12, atol=1e-13)
    else:
        as_numpy = lambda call: {name: t.numpy() for name, t in call.run_exact().items()}  # noqa: E731
        assert_no_less_exact(calls, run_fused, lambda call: call.run(reference), as_numpy)
    after = fl.stats()[PATH]
    assert all(after[direction] - before[direction] == len(calls) for direction in COUNTED)


# Values, gradients, strides


@each_dtype
def test_the_samples_are_there(opinfo, dtype):
    """Another version of torch may have other samples, but not too few for the tests below."""
    samples = linear_samples(opinfo, dtype)
    assert len(samples) >= 18
    assert {x.dim() for x, _, _ in samples} >= {1, 2, 3, 5}
    assert any(x.numel() == 0 for x, _, _ in samples)
    assert {bias is None for _, _, bias in samples} == {True, False}
    weights = [weight for _, weight, _ in linear_samples(opinfo, dtype, "noncontiguous") if weight.numel() > 1]
    assert len(weights) >= 16 and not any(weight.is_contiguous() for weight in weights)
    forms = [sample.kwargs["approximate"] for sample in samples_of(opinfo["gelu"], dtype)]
    assert len(forms) >= 8 and set(forms) == {"none", "tanh"}


@each_dtype
@each_layout
@each_operation
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_samples_of_linear(opinfo, operation, activation, layout, dtype):
    samples = linear_samples(opinfo, dtype, layout)
    calls = [call for sample in samples for call in calls_of(operation, *sample, activation)]
    assert len(calls) >= len(samples)
    assert_as_the_composition(calls)


@each_dtype
@each_layout
@each_operation
def test_samples_of_gelu(opinfo, operation, layout, dtype):
    """With the identity as weight, z is x itself and the layer is GELU."""
    for sample in samples_of(opinfo["gelu"], dtype, layout):
        approximate = sample.kwargs["approximate"]
        activation = {"none": "gelu", "tanh": "gelu_tanh"}[approximate]
        x, identity = sample.input, torch.eye(sample.input.shape[-1], dtype=dtype)
        calls = list(calls_of(operation, x, identity, None, activation))
        assert_as_the_composition(calls)
        plain = [call for call in calls if call.options.get("shortcut", "none") == "none"][0]
        y = plain.run()["y"][..., -x.shape[-1] :]
        exact = F.gelu(x.double(), approximate=approximate)
        rounded = F.gelu(x, approximate=approximate)
        error, eager = ((t.double() - exact).abs().max().item() for t in (y, rounded))
        assert error <= 2 * eager + 2 * torch.finfo(dtype).eps * exact.abs().max().item()


@each_layout
@each_operation
def test_fake_strides_are_the_real_ones(opinfo, operation, layout):
    mode = FakeTensorMode()

    def fake(t):
        return mode.from_tensor(t).detach().requires_grad_()

    def tensors(call, change, grad):
        arguments, leaves = call.leaves(change)
        y = call(arguments)
        return [y, *torch.autograd.grad(y, list(leaves.values()), grad)]

    for sample in linear_samples(opinfo, torch.float32, layout):
        for call in calls_of(operation, *sample):
            grad = call.grad(call(call.arguments))
            real = tensors(call, lambda t: t.detach().requires_grad_(), grad)
            fake_grad = mode.from_tensor(grad)
            with mode:
                for a, b in zip(real, tensors(call, fake, fake_grad), strict=True):
                    assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
                    assert a.storage_offset() == b.storage_offset()


# Memory: inputs are read, outputs are new


WIDE = (torch.linspace(-1, 1, 40 * 300).view(40, 300), torch.linspace(-1, 1, 700 * 300).view(700, 300), torch.ones(700))


@each_layout
@pytest.mark.parametrize(
    ("operation", "options"),
    [*((op, {}) for op in OPERATIONS), *((op, {"recompute": True}) for op in OPERATIONS if op != "linear_gelu_concat")],
    ids=str,
)
def test_copy_on_write_inputs_stay_lazy(opinfo, operation, options, layout):
    """Forward and backward ask for no writable pointer to memory that they only read: no lazy clone becomes a copy."""
    samples = [s for s in linear_samples(opinfo, torch.float32, layout) if s[0].numel()] + [WIDE]
    for sample, activation in itertools.product(samples, ACTIVATIONS):
        for call in calls_of(operation, *sample, activation):
            call.options |= options
            arguments, leaves = call.leaves(lambda t: torch._lazy_clone(t.detach()).requires_grad_())
            y = call(arguments)
            names = [name for name, t in leaves.items() if not torch._C._is_cow_tensor(t)]
            assert not names, f"forward copied {names}"
            grad = torch._lazy_clone(call.grad(y))
            grads = torch.autograd.grad(y, list(leaves.values()), grad)
            names = [name for name, t in {**leaves, "grad_output": grad}.items() if not torch._C._is_cow_tensor(t)]
            assert not names, f"backward copied {names}"
            expected = call.run()
            for got, want in zip((y, *grads), expected.values(), strict=True):
                torch.testing.assert_close(got, want)


@each_layout
@each_operation
@pytest.mark.parametrize("needs_grad", [False, True])
def test_outputs_share_no_memory_with_inputs(opinfo, operation, needs_grad, layout):
    for sample, activation in itertools.product(linear_samples(opinfo, torch.float32, layout), ACTIVATIONS):
        for call in calls_of(operation, *sample, activation):
            arguments, leaves = call.leaves(lambda t: t.detach().requires_grad_(needs_grad))
            y = call(arguments)
            outputs = [y, *(torch.autograd.grad(y, list(leaves.values()), call.grad(y)) if needs_grad else ())]
            inputs = {t.untyped_storage().data_ptr() for t in leaves.values()} - {0}
            assert not inputs & {t.untyped_storage().data_ptr() for t in outputs}


# Refusals


def refusal(call, kind=fl):
    """The exception of a call that is refused, or None."""
    try:
        call(call.arguments, kind)
    except (RuntimeError, ValueError, TypeError) as error:
        return error
    return None


def assert_one_line(error, operation):
    assert "\n" not in str(error).strip() and "expected" in str(error), error
    assert isinstance(error, ValueError) or str(error).startswith(f"{operation}: "), error


@each_operation
def test_other_dtypes_are_refused(opinfo, operation):
    """F.linear also takes integers and complex numbers, which have no GELU."""
    linear, seen = opinfo["linear"], 0
    for dtype in linear.dtypes - set(DTYPES):
        for sample in linear_samples(opinfo, dtype):
            for call in calls_of(operation, *sample):
                assert_one_line(refusal(call), operation)
                seen += 1
    assert seen >= 7 * 18


@each_operation
def test_error_inputs_of_gelu(opinfo, operation):
    seen = 0
    for error_input in opinfo["gelu"].error_inputs("cpu"):
        sample = error_input.sample_input
        x = sample.input.reshape(-1)
        for call in calls_of(operation, x, torch.eye(len(x)), None, sample.kwargs["approximate"]):
            with pytest.raises(ValueError, match=f"^activation: got '{sample.kwargs['approximate']}', expected "):
                call(call.arguments)
            seen += 1
    assert seen


# What becomes of a sample. F.linear refuses these.
REFUSED = {
    "x is 0-D": lambda x, w, b: (x[..., 0].sum(), w, b),
    "x has one feature more": lambda x, w, b: (F.pad(x, (0, 1)), w, b),
    "weight has one feature more": lambda x, w, b: (x, F.pad(w, (0, 1)), b),
    "weight is 3-D": lambda x, w, b: (x, w[None], b),
    "weight is 0-D": lambda x, w, b: (x, w[0, 0], b),
    "bias has one element more": lambda x, w, b: (x, w, F.pad(b, (0, 1))),
    "bias of more dimensions than y": lambda x, w, b: (x, w, b[(None,) * 6]),
    "x of another dtype": lambda x, w, b: (x.double(), w, b),
    "weight of another dtype": lambda x, w, b: (x, w.double(), b),
    "bias of another dtype": lambda x, w, b: (x, w, b.double()),
}
# F.linear takes these. With a weight of one dimension y has no features that a shortcut could be added to. An addend
# that is not one element for each feature is a residual.
STRICTER = {
    "weight is 1-D": lambda x, w, b: (x, w[0], None),
    "bias has one element": lambda x, w, b: (x, w, b[:1]),
    "bias is 0-D": lambda x, w, b: (x, w, b[0]),
    "bias is a matrix": lambda x, w, b: (x, w, b[None]),
}


def spoiled_calls(operation, sample, spoil):
    """The sample's calls, with x, weight and bias replaced afterwards."""
    x, weight, bias = spoil(*sample)
    if operation == "residual_stack":
        replaced = {"x": x, "weights": [weight], "biases": [bias]}
    elif operation == "mlp_residual":
        replaced = {"x": x, "fc1_weight": weight, "fc1_bias": bias}
    else:
        replaced = {"x": x, "weight": weight, "bias": bias}
    for call in calls_of(operation, *sample):
        call.arguments |= replaced
        yield call


@each_operation
@pytest.mark.parametrize("spoiled", REFUSED | STRICTER)
def test_what_linear_refuses_is_refused_in_one_line(opinfo, operation, spoiled):
    spoil, taken = (REFUSED | STRICTER)[spoiled], spoiled in STRICTER
    samples = [
        (x, weight, bias)
        for x, weight, bias in linear_samples(opinfo, torch.float32)
        if bias is not None and x.numel() and weight.numel()
    ]
    for sample in samples:
        if not taken:
            with pytest.raises(RuntimeError):
                F.linear(*spoil(*sample))
        else:
            F.linear(*spoil(*sample))
        for call in spoiled_calls(operation, sample, spoil):
            assert_one_line(refusal(call), operation)
    assert len(samples) >= 4
