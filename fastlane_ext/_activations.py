"""Which form of GELU a module or function computes, found by what it computes and not by its name."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ._arguments import bad, check_choice
from ._outside import CONSTANTS, why_not_closed

_FORMS = ("gelu", "gelu_tanh")
_registered: dict[type[nn.Module], str] = {}


def register_activation(cls: type[nn.Module], form: str) -> None:
    """Tell `fuse` that modules of exactly this class compute ``form``: ``"gelu"`` or ``"gelu_tanh"``.

    Classes that always compute a GELU, also on a CPU, need no registration: `fuse` finds them by their values. This
    is for those that it cannot call, such as wrappers of GPU kernels, or that branch or have a state.

    Raises TypeError if ``cls`` is no subclass of ``nn.Module``, ValueError for an unknown ``form``.

    >>> class MyGELU(torch.nn.GELU):
    ...     pass
    >>> register_activation(MyGELU, "gelu")
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise bad("cls", repr(cls), "a subclass of nn.Module", "pass the class, not an instance", TypeError)
    check_choice("form", form, _FORMS)
    _registered[cls] = form


@contextmanager
def outside_modes() -> Iterator[None]:
    """Real tensors on the CPU, whatever device or tracer the caller has switched on."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


@functools.cache
def _probe() -> tuple[Tensor, dict[str, Tensor]]:
    # Beyond ±10 for activations that clip; dense where the two forms differ.
    x = torch.cat([torch.linspace(-24, 24, 97, dtype=torch.float64), torch.linspace(-5, 5, 161, dtype=torch.float64)])
    cdf = 0.5 * torch.special.erfc(-x * 0.5**0.5)
    return x, {"gelu": x * cdf, "gelu_tanh": F.gelu(x, approximate="tanh")}


def form_of_values(call: Callable[[Tensor], Any]) -> str | None:
    """The form whose values ``call`` returns on a grid, as one row of float64 and in three dimensions of float32, or
    None. Leaves torch's random numbers alone.
    """
    with outside_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        x, expected = _probe()
        forms = {_form_of_values(call, x, expected), _form_of_values(call, x.float().view(2, 3, -1), expected)}
    return forms.pop() if len(forms) == 1 else None


def _form_of_values(call: Callable[[Tensor], Any], x: Tensor, expected: dict[str, Tensor]) -> str | None:
    try:
        y = call(x.clone())
    except Exception:
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point():
        return None
    # The forms differ by 5e-4; constants written with eight digits cost 1e-8, float32 1e-6.
    for form, values in expected.items():
        if bool(((y.double().flatten() - values).abs() <= 2e-6 * x.flatten().abs().clamp(min=1)).all()):
            return form
    return None


_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)


def state_of(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The activation's own attributes, on which its values may depend."""
    return tuple((name, value) for name, value in vars(module).items() if not _is_of_every_module(name))


def _is_of_every_module(name: str) -> bool:
    return name == "training" or name in _EMPTY_MODULE


_EMPTY_MODULE = frozenset(vars(nn.Module()))


def _form_in_mode(module: nn.Module, training: bool) -> str | None:
    # On a copy, so that nothing of the model changes.
    stand_in = copy.copy(module)
    stand_in.__dict__ = {**vars(module), "training": training}
    return form_of_values(stand_in.forward)


def _may_change(module: nn.Module) -> bool:
    kind = type(module)
    if kind.__call__ is not nn.Module.__call__:
        return True
    computed_by = [] if kind is nn.GELU else [kind.forward]
    for _, value in state_of(module):
        if isinstance(value, _FUNCTIONS):
            computed_by.append(value)
        elif not isinstance(value, CONSTANTS):
            return True
    return any(why_not_closed(value, module) is not None for value in computed_by)


def form_of_module(module: nn.Module) -> str | None:
    """``"gelu"``, ``"gelu_tanh"``, or None for a module that computes something else, or not always the same."""
    kind = type(module)
    if kind in _registered:
        return _registered[kind]
    if module._modules or module._parameters or module._buffers or isinstance(module, (nn.Dropout, nn.Identity)):
        return None
    if _may_change(module):
        return None
    # In both modes, since some ask `self.training`.
    forms = {_form_in_mode(module, training) for training in (True, False)}
    return forms.pop() if len(forms) == 1 else None


def why_no_gelu(module: nn.Module) -> str:
    """Of a module with no form, what to say of it."""
    has_state = module._modules or module._parameters or module._buffers
    if not has_state and _form_in_mode(module, training=False):
        return "whose values may change (it branches or has a state); register_activation() can vouch for it"
    return "which computes no GELU"
