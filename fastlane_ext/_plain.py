"""Whether a child module still is what its parent was built with, so that a fused op may stand in for it.

Anything else (a subclass, hooks, a parametrization, an adapter in its place) has to be called as a module.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as nn_module

# A fake tensor stands for a plain one while torch.export or make_fx traces.
PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)
_FORWARDS = {kind: kind.forward for kind in (nn.Linear, nn.GELU, nn.Identity, nn.Sequential)}
"""As they were at import: somebody may assign others to the classes."""


def original_class(kind: type) -> type:
    """The class that a class made by `fuse` stands for, or ``kind`` itself."""
    return kind.__dict__.get("_fastlane_original", kind)


def why_not_plain(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """None if ``module`` does just what ``kind`` does, else why not: other type, hooks, own forward."""
    if type(module) is not kind:
        name = type(module).__name__
        # An adapter may be called Linear too.
        name = f"{type(module).__module__}.{name}" if name == kind.__name__ else name
        return f"is a {name}, not a plain {kind.__name__}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    if kind.forward is not _FORWARDS.get(kind, kind.forward):
        return "is of a class that has another forward now"
    return "has a forward of its own" if "forward" in module.__dict__ else None


def under_global_hooks() -> str | None:
    """The reason to call every child as a module, if a hook was registered for all modules."""
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return "is under a hook registered for all modules"
    return None


def _why_odd_parameters(linear: nn.Linear) -> str | None:
    """A subclass of Tensor (quantised, sharded) may know F.linear and no operator of ours."""
    for name in ("weight", "bias"):
        value = getattr(linear, name)
        if isinstance(value, Tensor) and type(value) not in PLAIN_TENSORS:
            return f"has a {name} that is no plain parameter"
    return None


def why_not_plain_linear(module: nn.Module) -> str | None:
    """None if calling ``module`` is just ``F.linear`` on plain parameters, else the reason why it is not."""
    return under_global_hooks() or why_not_plain(module, nn.Linear) or _why_odd_parameters(module)
