"""One layer with its data, random or of small integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from support.layouts import ALL_LAYOUTS

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
    """Random data as large as in a trained layer, or small integers, whose sums every dtype holds exactly."""
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


def small_case(dtype=torch.float64, shape=(2, 2), features=3, **options):
    return make_case(shape, features, features, dtype=dtype, **options)
