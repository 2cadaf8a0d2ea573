"""What the layer should compute, written a second time: numpy, explicit derivatives, one precision up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from paths import COUNTED, PATH
from torch import Tensor

import fastlane_ext as fl

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Which counters of `stats` a call on CUDA may raise under it.
CUDA_PATHS = {"": ("fused", "library", "hopper"), "fused": ("fused", "hopper"), "library": ("library",)}
ACTIVATIONS = ("gelu", "gelu_tanh", "none")
dtype_name = lambda value: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None  # noqa: E731


# Layouts: the same values, lying otherwise in memory. Whatever lies between the elements is NaN.


def _nan(shape, like: Tensor) -> Tensor:
    return torch.full(shape, math.nan, dtype=like.dtype, device=like.device)


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else t.clone()


def _stepped(t: Tensor) -> Tensor:
    view = _nan([2 * size for size in t.shape], t)[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


def _padded(t: Tensor) -> Tensor:
    view = _nan([size + 3 for size in t.shape], t)[tuple(slice(1, size + 1) for size in t.shape)]
    return view.copy_(t)


def _misaligned(t: Tensor) -> Tensor:
    return _nan([t.numel() + 1], t)[1:].view(t.shape).copy_(t)


def _permuted(t: Tensor) -> Tensor:
    dims = list(range(t.dim()))[::-1]
    return t.permute(dims).contiguous().permute(dims)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": _transposed,
    "stepped": _stepped,
    "padded": _padded,
    "misaligned": _misaligned,
    "permuted": _permuted,
}


def _overlapping(t: Tensor) -> Tensor:
    """Each row is the one before it, moved by one element: all strides 1."""
    if t.dim() == 0 or t.numel() == 0:
        return t
    buffer = torch.cat([t.flatten(), t.flatten()])
    return buffer.as_strided(t.shape, [1] * t.dim())


# These change the values: memory that is its own neighbour cannot hold arbitrary ones.
SHARING_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded_rows": lambda t: t[:1].expand(t.shape),
    "expanded_columns": lambda t: t[..., :1].expand(t.shape),
    "scalar": lambda t: t.flatten()[:1].reshape([1] * t.dim()).expand(t.shape) if t.numel() else t,
    "overlapping": _overlapping,
}
ALL_LAYOUTS = LAYOUTS | SHARING_LAYOUTS


# Where the residual comes from; always a differentiable function of x

RESIDUALS: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "none": None,
    "tensor": lambda x, r: r,
    "row": lambda x, r: r[(0,) * (r.dim() - 1)],
    "column": lambda x, r: r[..., :1],
    "scalar": lambda x, r: r.flatten()[0],
    "x": lambda x, r: x,
    "view_of_x": lambda x, r: x[..., :1],
}
IN_X = ("x", "view_of_x")  # the residual's gradient arrives in x's


@dataclass
class Case:
    """One layer with its data. `residual` is a name in RESIDUALS or a tensor's own data."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual_data: Tensor
    grad: Tensor
    residual: str = "tensor"
    activation: str = "gelu"
    concat: bool = False
    recompute: bool = False

    @property
    def residual_of(self):
        return None if self.concat else RESIDUALS[self.residual]

    def with_layout(self, **layouts: str) -> Case:
        return replace(self, **{name: ALL_LAYOUTS[layout](getattr(self, name)) for name, layout in layouts.items()})


def make_case(
    shape, in_features, out_features, *, dtype=torch.float32, seed=0, integers=False, bias=True, **options
) -> Case:
    """Random data of a trained layer's size, or small integers, whose sums every dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)

    def data(*size, scale=1.0):
        if integers:
            return torch.randint(-1, 2, size, generator=generator).to(dtype)
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype)

    shape = tuple(shape)
    out = out_features + (in_features if options.get("concat") else 0)
    return Case(
        x=data(*shape, in_features),
        weight=data(out_features, in_features, scale=max(in_features, 1) ** -0.5),
        bias=data(out_features) if bias else None,
        residual_data=data(*shape, out_features),
        grad=data(*shape, out),
        **options,
    )


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Three ways to run a case; each returns y, dx, dweight, dbias and dresidual by name


def eager_layer(x, weight, bias=None, residual=None, *, activation="gelu", concat=False):
    y = F.linear(x, weight, bias)
    if activation != "none":
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    if concat:
        return torch.cat([x, y], -1)
    return y if residual is None else y + residual


def fused_layer(x, weight, bias=None, residual=None, *, activation="gelu", concat=False, recompute=False):
    if concat:
        return fl.linear_gelu_concat(x, weight, bias, activation=activation)
    return fl.linear_gelu_residual(x, weight, bias, residual, activation=activation, recompute=recompute)


def as_function(case, layer=fused_layer):
    """A function of its leaves, and the leaves, for gradcheck."""
    leaves = [case.x, case.weight]
    with_bias = case.bias is not None
    with_residual = case.residual_of is not None and case.residual not in IN_X
    leaves += [case.bias] * with_bias + [case.residual_data] * with_residual
    extra = {"recompute": case.recompute} if layer is fused_layer else {}

    def call(x, weight, *rest):
        rest = list(rest)
        bias = rest.pop(0) if with_bias else None
        residual = case.residual_of(x, *rest or [None]) if case.residual_of else None
        return layer(x, weight, bias, residual, activation=case.activation, concat=case.concat, **extra)

    return call, [leaf.detach().clone().requires_grad_() for leaf in leaves]


def small_case(dtype=torch.float64, shape=(2, 2), features=3, **options):
    return make_case(shape, features, features, dtype=dtype, **options)


def _run(case: Case, layer, **options) -> dict[str, Tensor]:
    leaves = {"x": case.x, "weight": case.weight, "bias": case.bias}
    if case.residual_of and case.residual not in IN_X:
        leaves["residual"] = case.residual_data
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items() if t is not None}
    x, weight, bias = leaves["x"], leaves["weight"], leaves.get("bias")
    residual = case.residual_of(x, leaves.get("residual")) if case.residual_of else None
    y = layer(x, weight, bias, residual, activation=case.activation, concat=case.concat, **options)
    grads = torch.autograd.grad(y, list(leaves.values()), case.grad)
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def run_fused(case: Case) -> dict[str, Tensor]:
    """Forward and backward; the counters prove that the kernels did both."""
    before = fl.stats()
    result = _run(case, fused_layer, **({} if case.concat else {"recompute": case.recompute}))
    after = fl.stats()
    paths = CUDA_PATHS[PATH] if case.x.is_cuda else (PATH,)
    for direction in COUNTED:
        calls = sum(after[path][direction] - before[path][direction] for path in paths)
        assert calls == 1, f"{direction} was not fused"
    assert after["fallback"] == before["fallback"]
    return result


def run_eager(case: Case) -> dict[str, Tensor]:
    return _run(case, eager_layer)


def _as_numpy(t: Tensor) -> np.ndarray:
    return t.detach().double().cpu().numpy()


def normal_cdf(z: np.ndarray) -> np.ndarray:
    """Φ in double; where z carries more digits, the rest is a first-order step, exact to 1e-32."""
    high = z.astype(np.float64)
    cdf = 0.5 * torch.special.erfc(torch.from_numpy(-high * math.sqrt(0.5))).numpy()
    return cdf + (z - high) * np.exp(-0.5 * high * high) / math.sqrt(2 * math.pi)


def gelu_parts(z: np.ndarray, activation: str) -> tuple[np.ndarray, np.ndarray]:
    """(c, b) with GELU = z c and GELU′ = c + b: Φ and zφ, or their counterparts in the tanh form."""
    if activation == "gelu":
        return normal_cdf(z), z * np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    two_u = 2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    small = np.exp(-np.abs(two_u)) / (1 + np.exp(-np.abs(two_u)))
    large = 1 / (1 + np.exp(-np.abs(two_u)))
    sigmoid, complement = np.where(z < 0, small, large), np.where(z < 0, large, small)
    slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z * z)
    return sigmoid, z * sigmoid * complement * slope


def activation_and_slope(z: np.ndarray, activation: str) -> tuple[np.ndarray, np.ndarray]:
    if activation == "none":
        return z, np.ones_like(z)
    c, b = gelu_parts(z, activation)
    return z * c, c + b


def run_oracle(case: Case, real=None) -> dict[str, np.ndarray]:
    """float64; for float64 itself the products are summed in long double."""
    real = real or (np.longdouble if case.x.dtype == torch.float64 else np.float64)
    k, n = case.weight.shape[1], case.weight.shape[0]
    x, weight, dy = (_as_numpy(t).astype(real, copy=False) for t in (case.x, case.weight, case.grad))
    rows = math.prod(x.shape[:-1])
    x_rows, dy_rows = x.reshape(rows, k), dy.reshape(rows, dy.shape[-1])
    z = x_rows @ weight.T
    if case.bias is not None:
        z = z + _as_numpy(case.bias).astype(real)
    y, slope = activation_and_slope(z, case.activation)
    dz = dy_rows[:, -n or dy_rows.shape[1] :] * slope
    result = {"dweight": dz.T @ x_rows, "dx": (dz @ weight).reshape(x.shape)}
    if case.bias is not None:
        result["dbias"] = dz.sum(0)
    if case.concat:
        result["dx"] = result["dx"] + dy[..., :k]
        y = np.concatenate([x_rows, y], 1)
    y = y.reshape(dy.shape)
    if case.residual_of:
        # Which elements the residual has, and where their gradients go, is torch's own indexing, in float64.
        source = case.x if case.residual in IN_X else case.residual_data
        source = source.detach().double().requires_grad_()
        residual = case.residual_of(source, source)
        y = y + _as_numpy(residual)
        (d_source,) = torch.autograd.grad(residual.expand(dy.shape), source, case.grad.double())
        if case.residual in IN_X:
            result["dx"] = result["dx"] + _as_numpy(d_source)
        else:
            result["dresidual"] = _as_numpy(d_source)
    return result | {"y": y}


def assert_as_exact_as_eager(cases: list[Case]):
    """`assert_no_less_exact` on layers."""

    def scale_of(case, name, value):
        scale = float(np.abs(value).max(initial=0))
        if name == "dresidual" and case.grad.numel():
            # A sum of n random terms passes through values √n times as large: no order of adding avoids that.
            terms = case.grad.numel() / case.residual_of(case.x, case.residual_data).numel()
            scale = max(scale, math.sqrt(terms) * float(case.grad.abs().max()))
        return scale

    assert_no_less_exact(cases, run_fused, run_eager, run_oracle, scale_of)


def _largest(case, name, value):
    return float(np.abs(value).max(initial=0))


def assert_no_less_exact(cases, run_fused, run_eager, run_oracle, scale_of=_largest):
    """The promise: no error, in the output or a gradient, exceeds twice eager's own at the same dtype.

    Errors are pooled over the cases, so that the largest is one of thousands and not of three. Two units in
    the last place of the largest value are free: where eager happens to be exact, rounding may cost one.
    """
    fused_error, eager_error, scale = {}, {}, {}
    for case in cases:
        fused, eager, exact = run_fused(case), run_eager(case), run_oracle(case)
        assert fused.keys() == eager.keys() == exact.keys()
        for name, value in exact.items():
            assert fused[name].shape == value.shape and fused[name].dtype == case.x.dtype, name
            assert fused[name].isfinite().all(), f"{name} has an element that no kernel wrote"
            for errors, result in ((fused_error, fused), (eager_error, eager)):
                difference = np.abs(_as_numpy(result[name]) - value)
                errors[name] = max(errors.get(name, 0.0), float(difference.max(initial=0)))
            scale[name] = max(scale.get(name, 0.0), scale_of(case, name, value))
    eps = torch.finfo(cases[0].x.dtype).eps
    for name in fused_error:
        limit = 2 * eager_error[name] + 2 * eps * scale[name]
        assert fused_error[name] <= limit, (
            f"{name}: error {fused_error[name]:.3g}, eager's {eager_error[name]:.3g}, scale {scale[name]:.3g}"
        )


def assert_exact(case: Case, got: dict[str, Tensor] | None = None):
    """Without an activation, sums of small integers, or of their products with one power of two, are exact in
    every dtype's accumulator: the result is the exact one, rounded once.
    """
    got, exact = got or run_fused(case), run_oracle(case, np.float64)
    assert got.keys() == exact.keys()
    for name, value in exact.items():
        assert got[name].dtype == case.x.dtype and got[name].shape == value.shape, name
        assert torch.equal(got[name], torch.from_numpy(value).to(case.x.dtype)), name
