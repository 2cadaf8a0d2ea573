"""Which form of GELU a module or function computes; its name does not matter.

A module counts as a GELU if its code can do nothing but arithmetic (reads.py), and its values and slopes agree with
GELU's on a grid, for several ranks. In doubt a module does not count as a GELU.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from .._activations import ACTIVATIONS, MODULES, in_float64, name_of_module
from .._arguments import bad, check_choice
from .._facts import Facts, collected
from .._plain import GELU, call_facts, why_own_call
from .formula import why_no_formula
from .known import known
from .reads import CONSTANTS, Evidence, why_not_closed

_FORMS = tuple(name for name in ACTIVATIONS if name != "none")
_OF_APPROXIMATE = {made.arguments["approximate"]: name for name, made in MODULES.items() if made.kind is nn.GELU}
_KINDS = tuple(MODULES[form].kind for form in _FORMS)
_registered: dict[type[nn.Module], str] = {}


def register_activation(cls: type[nn.Module], form: str) -> None:
    """Tell `fuse` that modules of exactly this class compute ``form``: ``"gelu"``, ``"gelu_tanh"`` or ``"quick_gelu"``.

    Classes whose forward is plain arithmetic need no registration: `fuse` finds them by their values and slopes.
    Register classes that `fuse` cannot read or call, such as wrappers of GPU kernels, and classes that branch or have a
    state.

    Raises TypeError if ``cls`` is not a subclass of ``nn.Module`` or ``form`` is not a string. Raises ValueError for an
    unknown ``form`` or for a class of ``torch.nn``, whose meaning is known.

    >>> class MyGELU(torch.nn.GELU):
    ...     pass
    >>> register_activation(MyGELU, "gelu")
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise bad("cls", repr(cls), "a subclass of nn.Module", "pass the class, not an instance", TypeError)
    check_choice("form", form, _FORMS)
    if cls.__module__.startswith("torch.nn."):
        raise bad("cls", cls.__name__, "a class that is not torch's own", "nn.GELU needs no registration")
    _registered[cls] = form


@contextmanager
def outside_modes() -> Iterator[None]:
    """A block whose tensors are real CPU tensors, whatever device, tracer or torch.func transform the caller is in."""
    with (
        temporarily_clear_interpreter_stack(),
        torch._C.DisableTorchFunction(),
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield


class _Grid(NamedTuple):
    """Inputs, and for each form its values and slopes there."""

    x: Tensor
    forms: dict[str, tuple[Tensor, Tensor]]


@functools.cache
def _grid() -> _Grid:
    # Dense where the forms differ, sparse out to float32's limits: an activation may clip or switch anywhere.
    far = torch.logspace(1, 38.47, 160, dtype=torch.float64)
    near = torch.linspace(-24, 24, 480, dtype=torch.float64)
    tiny = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-38, -1, 79, dtype=torch.float64)])
    x = torch.cat([-far, near, -tiny, tiny, far])  # 960 values: they go into (2, 2, 2, -1)
    return _Grid(x, {form: in_float64(x, form)[:2] for form in _FORMS})


def form_of_values(call: Callable[[Tensor], Any]) -> str | None:
    """The form whose values and slopes ``call`` has, or None.

    Compares in float64 from −3e38 to 3e38, where no intermediate value overflows, in one to five dimensions; and in
    float32 where |x| is at most 1e4. Infinities and NaN must not become ordinary numbers. Leaves torch's random state
    alone.
    """
    with outside_modes(), torch.random.fork_rng(devices=[]):
        x, forms = _grid()
        close = x.abs() <= 1e4
        near = {form: tuple(v[close] for v in values) for form, values in forms.items()}
        found = {
            _form_in(call, x, forms, shape) for shape in ((-1,), (2, -1), (2, 2, -1), (2, 2, 2, -1), (1,) * 4 + (-1,))
        }
        found.add(_form_in(call, x[close].float(), near, (1, -1)))
        if len(found) != 1 or not _keeps_special_values(call):
            return None
        form = found.pop()
        return form if form is not None and all(_keeps_dtype(call, dtype, form) for dtype in _NARROW) else None


_NARROW = (torch.float16, torch.bfloat16)


def _keeps_dtype(call: Callable[[Tensor], Any], dtype: torch.dtype, form: str) -> bool:
    """Whether a 16-bit input gives a result of the same dtype that is about GELU up to half the dtype's largest number:
    an overflow would show.
    """
    largest = min(torch.finfo(dtype).max, 3e38)
    x = torch.linspace(-largest / 2, largest / 2, 64, dtype=torch.float64)
    x = torch.cat([x, torch.linspace(-300, 300, 121, dtype=torch.float64)]).to(dtype)
    try:
        y = call(x.clone())
    except Exception:
        return False
    if type(y) is not Tensor or y.dtype != dtype or y.shape != x.shape:
        return False
    expected = in_float64(x.double(), form)[0]
    return bool(((y.double() - expected).abs() <= 0.05 * x.double().abs().clamp(min=1)).all())


def _values_and_slopes(call: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, Tensor] | None:
    leaf = x.clone().requires_grad_()
    try:
        y = call(leaf.view_as(leaf))
        if type(y) is not Tensor or y.shape != x.shape or y.dtype != x.dtype or not y.requires_grad:
            return None
        (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    except Exception:
        return None
    return y.detach(), slope


def _form_in(
    call: Callable[[Tensor], Any], x: Tensor, forms: Mapping[str, tuple[Tensor, ...]], shape: tuple[int, ...]
) -> str | None:
    shaped = x.view(shape)
    got = _values_and_slopes(call, shaped)
    if got is None:
        return None
    # The forms differ by 5e-4; constants written with ten digits cost 1e-10, float32 1e-6.
    scale = shaped.flatten().abs().clamp(min=1)
    for form, (values, slopes) in forms.items():
        close = 1e-9 if x.dtype is torch.float64 else 2e-6
        is_value = (got[0].flatten().double() - values).abs() <= close * scale
        is_slope = (got[1].flatten().double() - slopes).abs() <= 2 * close
        if bool(is_value.all()) and bool(is_slope.all()):
            return form
    return None


def _keeps_special_values(call: Callable[[Tensor], Any]) -> bool:
    """Whether NaN stays NaN and infinities give GELU's limits or NaN, as torch's own GELU does at minus infinity."""
    inf, nan = float("inf"), float("nan")
    for dtype in (torch.float64, torch.float32):
        got = _values_and_slopes(call, torch.tensor([-inf, inf, nan, 1.0], dtype=dtype))
        if got is None:
            return False
        (low, high, none, _), (low_slope, high_slope, none_slope, _) = (t.tolist() for t in got)
        if none == none or none_slope == none_slope:
            return False
        for value, limit in ((low, 0.0), (high, inf), (low_slope, 0.0), (high_slope, 1.0)):
            if value == value and value != limit:
                return False
    return True


_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
_EMPTY_MODULE = frozenset(vars(nn.Module()))


class Partial(NamedTuple):
    """The contents of a ``functools.partial``, which can be changed in place. csrc/python/plan_call.cpp reads them."""

    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @classmethod
    def of(cls, value: functools.partial[Any]) -> Partial:
        return cls(value.func, value.args, dict(value.keywords))


def state_of(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The activation's own attributes, on which its values may depend."""
    own = ((name, value) for name, value in vars(module).items() if name not in _EMPTY_MODULE)
    return tuple((name, Partial.of(v) if type(v) is functools.partial else v) for name, v in own)


def is_same(now: Any, value: Any) -> bool:
    """Whether an attribute is still the same object that `state_of` found, or an equal constant. Calls no ``__eq__``
    that somebody else wrote.
    """
    if type(value) is Partial:
        return type(now) is functools.partial and Partial.of(now) == value
    return now is value or (type(now) is type(value) and type(value) in CONSTANTS and now == value)


NO_GELU = "which computes no GELU"


class Activation(NamedTuple):
    """The form of GELU that a module computes, and what the finding rests on: the module's own attributes, names that
    its own dict must not hold, facts.
    """

    form: str
    state: tuple[tuple[str, Any], ...]
    of_class: tuple[str, ...]
    facts: Facts


def read_activation(module: nn.Module) -> Activation | str:
    """What ``module`` computes; a reason if it is not a GELU or may become another function. Calls the module's code
    only after reading that the code is arithmetic.
    """
    kind = type(module)
    if kind in _registered:
        return Activation(_registered[kind], state_of(module), (), call_facts(kind))
    if kind in _KINDS:
        form, own = name_of_module(module), known(kind)
        assert own is not None
        if form is None or own.reason is not None:
            return f"which {own.reason}" if own.reason else NO_GELU
        return Activation(form, tuple(MODULES[form].arguments.items()), (), own.facts)
    if module._modules or module._parameters or module._buffers or known(kind) is not None:
        return NO_GELU
    if kind.__module__.startswith("torch."):
        return NO_GELU
    evidence = Evidence()
    reason = why_own_call(kind) or _why_not_closed(module, evidence)
    if reason is not None:
        return _not_known(reason)
    # In both modes, since some activations read `self.training`; on a copy, so that the model does not change.
    forms = set()
    for training in (False, True):
        stand_in = copy.copy(module)
        stand_in.__dict__ = {**vars(module), "training": training}
        reason = reason or why_no_formula(stand_in.forward)
        forms.add(form_of_values(stand_in.forward))
    if len(forms) != 1 or None in forms:
        return NO_GELU
    if reason is not None:
        return _not_known(reason)
    state = state_of(module)
    names = (name for name, _ in state)
    facts = collected([*call_facts(kind, names), *evidence.facts])
    form = forms.pop()
    assert form is not None
    return Activation(form, state, tuple(sorted(evidence.of_class)), facts)


def _why_not_closed(module: nn.Module, evidence: Evidence) -> str | None:
    computed_by = [type(module).forward]
    for name, value in vars(module).items():
        if name in _EMPTY_MODULE:
            continue
        if isinstance(value, _FUNCTIONS):
            computed_by.append(value)
        elif type(value) not in CONSTANTS:
            return f"keeps a {type(value).__name__}, {name}"
    reasons = (why_not_closed(value, module, evidence) for value in computed_by)
    return next((reason for reason in reasons if reason is not None), None)


def _not_known(reason: str) -> str:
    return f"which is not known to compute a GELU ({reason}); register_activation() can vouch for it"


def form_of_module(module: nn.Module) -> str | None:
    """The form of GELU, or None for a module that computes, or may come to compute, something else."""
    found = read_activation(module)
    return found.form if isinstance(found, Activation) else None


def form_of_function(function: object, options: dict[str, Any]) -> str | None:
    """The form of torch's own ``F.gelu`` called with these options, or None."""
    gelu = known(nn.GELU)
    assert gelu is not None
    if function is not GELU or gelu.reason is not None or options.keys() - {"approximate"}:
        return None
    return _OF_APPROXIMATE.get(options.get("approximate", "none"))
