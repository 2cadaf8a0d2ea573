"""The activations: their list, and each in eager PyTorch, as a function and as a module.

csrc/kernels/activation.h has the same list for the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._arguments import bad, check_choice

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu")


def activate(z: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(z)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if activation == "quick_gelu":
        return z * torch.sigmoid(1.702 * z)
    check_activation(activation)
    return z


def in_float64(x: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """A GELU of ``x`` (float64), its derivative, and the size of the derivative's terms, which nearly cancel in the
    tail: exact far into the tails, the measure for other results. Calls no function of torch.nn, which may be replaced.
    """
    if activation == "gelu":
        gate = 0.5 * torch.special.erfc(-x * math.sqrt(0.5))
        slope = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    elif activation == "gelu_tanh":
        c, k = math.sqrt(2 / math.pi), 0.044715
        inner = 2 * c * (x + k * x**3)
        gate = torch.sigmoid(inner)
        slope = gate * torch.sigmoid(-inner) * 2 * c * (1 + 3 * k * x * x)
    elif activation == "quick_gelu":
        gate = torch.sigmoid(1.702 * x)
        slope = gate * torch.sigmoid(-1.702 * x) * 1.702
    else:
        raise bad("activation", repr(activation), "a GELU of ACTIVATIONS", "write its formula here")
    tilt = torch.where(slope == 0, torch.zeros_like(x), x * slope)
    return torch.where(gate == 0, torch.zeros_like(x), x * gate), gate + tilt, gate + tilt.abs()


CALLS: tuple[tuple[Any, str], ...] = (
    (F, "gelu"),
    (torch, "sigmoid"),
    *((kind, name) for kind in (Tensor, nn.Parameter) for name in ("__mul__", "__rmul__")),
)
"""What `activate` calls: a module and a function's name, or a class and a method's."""


class ActivationModule(NamedTuple):
    """A module that computes an activation: its class, and the arguments of its constructor, which keeps each as the
    attribute of the same name. ``reads`` are the functions that the forward of a class of this file calls, as in
    ``_plain.know``.
    """

    kind: type[nn.Module]
    arguments: Mapping[str, str]
    reads: tuple[tuple[str, str, str], ...] = ()


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 * x)``, elementwise: the activation of CLIP (Hendrycks and Gimpel, arXiv:1606.08415).

    >>> QuickGELU()(torch.zeros(2)).tolist()
    [0.0, 0.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


MODULES = {
    "none": ActivationModule(nn.Identity, {}),
    "gelu": ActivationModule(nn.GELU, {"approximate": "none"}),
    "gelu_tanh": ActivationModule(nn.GELU, {"approximate": "tanh"}),
    "quick_gelu": ActivationModule(QuickGELU, {}, (("torch", "sigmoid", "torch"),)),
}


def check_activation(value: object) -> None:
    check_choice("activation", value, ACTIVATIONS)


def activation_module(activation: str) -> nn.Module:
    made = MODULES[activation]
    return made.kind(**made.arguments)


def name_of_module(module: nn.Module) -> str | None:
    """The activation that a module of exactly this class and with these attributes stands for, or None."""
    own = vars(module)
    for name, made in MODULES.items():
        if type(module) is made.kind and all(_is(own.get(key), value) for key, value in made.arguments.items()):
            return name
    return None


def _is(value: Any, expected: str) -> bool:
    # A class derived from str may answer == as it likes.
    return type(value) is str and value == expected
