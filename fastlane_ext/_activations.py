"""Which form of GELU a module or function computes, found by what it computes and not by its name."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._arguments import bad, check_choice

_FORMS = ("gelu", "gelu_tanh")
_registered: dict[type[nn.Module], str] = {}


def register_activation(cls: type[nn.Module], form: str) -> None:
    """Tell `fuse` that modules of exactly this class compute ``form``: ``"gelu"`` or ``"gelu_tanh"``.

    Classes that compute a GELU on a CPU need no registration: `fuse` finds them by their values. This is for
    those it cannot call, such as wrappers of GPU kernels.

    Raises TypeError if ``cls`` is no subclass of ``nn.Module``, ValueError for an unknown ``form``.

    >>> class MyGELU(torch.nn.GELU):
    ...     pass
    >>> register_activation(MyGELU, "gelu")
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise bad("cls", repr(cls), "a subclass of nn.Module", "pass the class, not an instance", TypeError)
    check_choice("form", form, _FORMS)
    _registered[cls] = form


@functools.cache
def _probe() -> tuple[Tensor, dict[str, Tensor]]:
    # Beyond ±10 for activations that clip; dense where the two forms differ.
    x = torch.cat([torch.linspace(-24, 24, 97, dtype=torch.float64), torch.linspace(-5, 5, 161, dtype=torch.float64)])
    cdf = 0.5 * torch.special.erfc(-x * 0.5**0.5)
    return x, {"gelu": x * cdf, "gelu_tanh": F.gelu(x, approximate="tanh")}


def form_of_values(call) -> str | None:
    """The form whose values ``call`` returns on a grid in float64, or None."""
    x, expected = _probe()
    try:
        with torch.no_grad():
            y = call(x.clone())
    except Exception:
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point():
        return None
    # The forms differ by 5e-4; constants written with eight digits cost 1e-8, a detour through float32 1e-6.
    for form, values in expected.items():
        if bool(((y.double() - values).abs() <= 2e-6 * x.abs().clamp(min=1)).all()):
            return form
    return None


def form_of_module(module: nn.Module) -> str | None:
    """``"gelu"``, ``"gelu_tanh"``, or None for a module that computes something else or has a state."""
    if type(module) in _registered:
        return _registered[type(module)]
    if module._modules or module._parameters or module._buffers or not type(module).__module__:
        return None
    if isinstance(module, (nn.Dropout, nn.Identity)):
        return None
    return form_of_values(module)
