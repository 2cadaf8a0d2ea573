"""Whether a call of a module does only what its class says, so that a fused operation may stand in for the call.

In Python only this file decides the question; csrc/python/plain_module.cpp decides it faster, without a reason. The
question has four parts: the instance (its type, hooks, names in its own dict that hide the class's), the class and the
functions that it calls (`_facts`, compared with torch's own when this package was imported), the parameters, and
watchers of all calls (hooks for all modules, modes). Anything unusual has to be called as a module.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import _activations
from ._facts import ABSENT, Fact, Facts, collected, comes_from, lookup, of_class, of_function, of_item, why_changed

# A fake tensor stands for a plain one while torch.export or make_fx traces.
PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)
PLAIN_DICTS = (dict, OrderedDict)
KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

SHADOWS = ("forward", "_call_impl", "_slow_forward")
"""Names that nn.Module's call looks up on the instance first."""
_TRACERS = ("torch.export.", "torch._export.", "torch.fx.experimental.proxy_tensor")
"""Modules whose function modes watch the recordings of torch.export and make_fx, and change nothing."""
_CALL = {
    "__call__": "_wrapped_call_impl",
    "_call_impl": "_call_impl",
    "_slow_forward": "_slow_forward",
    "__getattr__": "__getattr__",
}
_LOOKUP = ("__getattribute__", "_compiled_call_impl")


def constant_while_traced(function: Any) -> Any:
    """The same as ``torch.compiler.assume_constant_result``, which would import the whole compiler."""
    function._dynamo_marked_constant = True
    return function


def class_name(kind: type) -> str:
    """The class's name, with its module unless that is torch.nn: an adapter may be called Linear too."""
    return kind.__name__ if kind.__module__.startswith("torch.nn.") else f"{kind.__module__}.{kind.__name__}"


def why_own_call(kind: type[nn.Module]) -> str | None:
    """None if modules of this class are called and find their attributes by torch's own code; else the difference."""
    for name, own in _CALL.items():
        if not comes_from(lookup(kind, name), nn_module.__name__, own):
            return f"has a {name} other than nn.Module's"
    if lookup(kind, "__getattribute__") is not object.__getattribute__:
        return "has a __getattribute__ of its own"
    return None if lookup(kind, "_compiled_call_impl") is None else "has a compiled call"


def call_facts(kind: type[nn.Module], names: Iterable[str] = ()) -> Facts:
    """The facts that a call of a ``kind`` rests on: nn.Module's machinery, the forward and the attributes ``names``."""
    return collected(of_class(kind, *_CALL, *_LOOKUP, "forward", *names))


class Known(NamedTuple):
    """A class whose forward this package knows: the facts it was known by, and why it cannot be relied on, or None."""

    kind: type[nn.Module]
    facts: Facts
    reason: str | None


def know(
    kind: type[nn.Module], module: str, reads: tuple[tuple[str, str, str], ...] = (), own: tuple[str, ...] = ()
) -> Known:
    """The facts about ``kind`` now; its forward is expected to come from ``module``.

    ``reads``: for each function that the forward calls, the name of the function's module in the forward's globals, the
    function's name, and the module where it was written. ``own``: methods of the class on which the forward relies.
    """
    reason = why_own_call(kind)
    for name in ("forward", *own):
        if not comes_from(lookup(kind, name), module, name):
            reason = reason or f"has a {name} that is not the one of {module}"
    attributes = {nn.Linear: ("weight", "bias"), nn.GELU: ("approximate",), nn.Dropout: ("p", "training")}
    facts: list[Fact] = [*call_facts(kind, (*own, *attributes.get(kind, ("weight", "bias"))))]
    holder = getattr(lookup(kind, "forward"), "__globals__", {})
    for namespace, name, written_in in reads:
        facts.append(of_item(holder, namespace))
        found = facts[-1].value
        called = of_item(vars(found), name) if hasattr(found, "__dict__") else Fact({}, name, ABSENT)
        facts += [called, *of_function(called.value)]
        if not comes_from(called.value, written_in, name):
            reason = reason or f"calls a {name} that is not the one of {written_in}"
    return Known(kind, collected(facts), reason)


def _of_activations() -> Iterator[Fact]:
    for holder, name in _activations.CALLS:
        yield from of_class(holder, name) if isinstance(holder, type) else [of_item(vars(holder), name)]


def _own(kind: type[nn.Module], reads: tuple[tuple[str, str, str], ...]) -> Known:
    """What `know` says of an activation of this package, which also multiplies tensors."""
    known = know(kind, _activations.__name__, reads)
    return known._replace(facts=collected([*known.facts, *_of_activations()]))


def _known() -> dict[type[nn.Module], Known]:
    linear, gelu = ("F", "linear", "torch._C._nn"), ("F", "gelu", "torch._C._nn")
    dropout = ("F", "dropout", F.__name__)
    made = (
        know(nn.Linear, "torch.nn.modules.linear", (linear,)),
        know(nn.Identity, "torch.nn.modules.linear"),
        know(nn.GELU, "torch.nn.modules.activation", (gelu,)),
        know(nn.Dropout, "torch.nn.modules.dropout", (dropout,)),
        know(nn.Sequential, "torch.nn.modules.container", own=("__iter__",)),
        *(_own(m.kind, m.reads) for m in _activations.MODULES.values() if m.reads),
    )
    return {known.kind: known for known in made}


KNOWN = _known()
"""Read when this package was imported: later somebody may assign another forward to a class."""


def _why_not_torchs() -> str | None:
    for known in KNOWN.values():
        if known.reason:
            return f"{known.kind.__name__} {known.reason}"
    for name in ("__add__", "__radd__", "__mul__", "__rmul__"):
        if not isinstance(lookup(Tensor, name), (types.MethodDescriptorType, types.WrapperDescriptorType)):
            return f"Tensor has a {name} other than torch's"
    return None


_NOT_TORCHS = _why_not_torchs()
"""The first thing that was not torch's own even then, and why; None if all were. No formula holds if there is one."""

GELU = F.gelu
"""torch's own ``gelu``, if `known` has no reason against nn.GELU."""
SUMS = tuple(fact for kind in PLAIN_TENSORS for fact in of_class(kind, "__add__", "__radd__"))
FORMULA = (
    Fact(vars(F), "linear", F.linear),
    *_of_activations(),
    Fact(vars(torch), "cat", torch.cat),
    *SUMS,
    *([] if _NOT_TORCHS is None else [Fact({}, _NOT_TORCHS, True)]),
)
"""The functions that eager's layers compute with. Whoever replaces one of them means every layer of the model."""
NETWORK = collected(
    [
        *(fact for known in KNOWN.values() for fact in known.facts if known.kind is not nn.Dropout),
        *call_facts(nn.ModuleList, ("__iter__", "__getitem__", "__len__")),
        *FORMULA,
    ]
)
"""The facts that the networks of `fastlane_ext.reference` rest on."""


def why_touched(module: nn.Module) -> str | None:
    """None if the instance adds nothing to a call, else the addition."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    own = module.__dict__
    if torch.compiler.is_dynamo_compiling():
        # torch.compile guards on attributes that were read while it traced, not on a dict that was searched.
        _ = (module.forward, module._call_impl)
    for name in SHADOWS:
        if name in own:
            return f"has a {name} of its own"
    return "is compiled by itself" if own.get("_compiled_call_impl") is not None else None


def why_watched() -> str | None:
    """The reason to call every child as a module, or None: a hook or a mode watches all calls."""
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return "is under a hook registered for all modules"
    return _why_under_mode()


def _why_under_mode() -> str | None:
    if torch.compiler.is_dynamo_compiling():
        # While torch.compile traces, the modes' types cannot be read. It traces again when the modes change.
        return "is under a mode" if torch._C._len_torch_function_stack() > 0 else None
    if torch._C._len_torch_function_stack() and torch._C._is_torch_function_mode_enabled():
        for mode in _get_current_function_mode_stack():
            if type(mode) is not DeviceContext and not type(mode).__module__.startswith(_TRACERS):
                return f"is under a {type(mode).__name__}"
    for mode in _get_current_dispatch_mode_stack():
        # torch's own modes trace, fake, count or save; any other mode may compute something else.
        if not type(mode).__module__.startswith("torch."):
            return f"is under a {type(mode).__name__}"
    return None


def why_formula_changed() -> str | None:
    """The reason to compute a layer without children in eager PyTorch: a mode, another ``F.linear`` or ``F.gelu``."""
    return _why_under_mode() or _why_torch_changed(FORMULA)


def why_network_changed() -> str | None:
    """The reason to call every child of a network as a module: a watcher, or replaced code of torch's."""
    return why_watched() or _why_torch_changed(NETWORK)


def _why_torch_changed(facts: Facts) -> str | None:
    return _why_traced_torch_changed() if torch.compiler.is_compiling() else _NOT_TORCHS or why_changed(facts, is_of_fx)


@constant_while_traced
def _why_traced_torch_changed() -> str | None:
    """Asked once while torch.compile traces: facts are about code, and a graph does not notice later changes."""
    return _NOT_TORCHS or why_changed(NETWORK, is_of_fx)


def is_of_fx(value: Any) -> bool:
    """Whether torch.fx has put this method in place while it traces; its graph may hold the fused operations."""
    return any(
        comes_from(value, "torch.fx._symbolic_trace", name)
        for name in ("module_call_wrapper", "module_getattr_wrapper")
    )


def is_plain_tensor(value: Any) -> bool:
    return type(value) in PLAIN_TENSORS and value.layout is torch.strided and not value.is_nested


def why_odd_tensor(*values: Any) -> str | None:
    """None if no value is an unusual tensor, else a reason. Other tensors may support ``F.linear`` and not our ops."""
    for value in values:
        if isinstance(value, Tensor) and not is_plain_tensor(value):
            kind = type(value).__name__
            return f"gets a {kind}" if type(value) not in PLAIN_TENSORS else f"gets a tensor of layout {value.layout}"
    return None


def why_not_plain(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """None if ``module`` is exactly of this class and its own dict adds nothing to a call; else why not. Does not check
    the class; `why_network_changed` does.
    """
    if type(module) is not kind:
        name = type(module).__name__
        name = class_name(type(module)) if name == kind.__name__ else name
        return f"is a {name}, not a plain {kind.__name__}"
    return why_touched(module)


def parameter_of(linear: nn.Module, name: str) -> Any:
    """The value that the layer's forward finds under ``name``: an attribute goes before a parameter (data-parallel
    replicas keep their parameters as attributes). A buffer counts as absent.
    """
    own = linear.__dict__
    if name in own:
        return own[name]
    # A dict of a derived class may return other values than it holds.
    parameters = linear._parameters
    return parameters.get(name, ABSENT) if type(parameters) in PLAIN_DICTS else ABSENT


def why_parameters_unfit(linear: nn.Module, transposed: bool = False) -> str | None:
    """None if the layer's weight and bias are plain tensors that the kernels take, else why not. ``transposed``: the
    weight is stored (in, out).
    """
    for name in ("weight", "bias"):
        tensor = parameter_of(linear, name)
        if tensor is None and name == "bias":
            continue
        if type(tensor) not in PLAIN_TENSORS:
            return f"has a {name} that is no plain parameter"
        if tensor.layout is not torch.strided or tensor.is_nested:
            return f"has a {name} of layout {tensor.layout}"
        if tensor.dtype not in KERNEL_DTYPES:
            return f"has a {name} of {tensor.dtype}"
    weight, bias = parameter_of(linear, "weight"), parameter_of(linear, "bias")
    out_features = weight.shape[-1 if transposed else 0] if weight.dim() == 2 else None
    if out_features is None or (bias is not None and bias.shape != (out_features,)):
        # F.linear takes a weight of one dimension, and broadcasts a bias.
        return "has parameters of other shapes than a linear layer's"
    return None


def why_not_plain_linear(module: nn.Module) -> str | None:
    """None if ``module`` is an nn.Linear to which `why_not_plain` has no objection, with plain parameters."""
    return why_not_plain(module, nn.Linear) or why_parameters_unfit(module)
