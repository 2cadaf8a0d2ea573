"""`fuse`: fused operations in models that somebody else wrote, in place, and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils._contextlib import _DecoratorContextManager

from .._arguments import bad, check_flag
from .._load import library
from .classes import PLAN, why_forward_replaced
from .known import original_class
from .measure import measured as _measured
from .report import FusionReport, PassedOver, Site
from .search import FUSED_NETWORKS, Search

__all__ = ["FusionReport", "PassedOver", "Site", "disabled", "explain", "fuse", "unfuse"]


def fuse(
    model: nn.Module,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    linears: bool = False,
    strict: bool = False,
    dry_run: bool = False,
) -> FusionReport:
    """Let fused operations run in ``model``, in place, wherever its modules compute what they compute.

    Found, by following each container's forward and not by its class's name: Linear→GELU,
    Linear→GELU→(inactive dropout)→Linear, and a Linear whose result is added to another input; ``nn.Linear`` and
    transformers' ``Conv1D``; any activation whose values and slopes are GELU's, exact or tanh; the networks of
    `fastlane_ext.reference`. No parameter is made, renamed or copied: the container's class becomes a subclass of
    it. At every call that forward looks whether all that it stands in for still is what it was (children, hooks,
    attributes, code, torch's own functions, modes), and runs the original one where it is not.

    Args:
        model: any module. Its submodules are looked at, and it itself.
        filter_fn: called with the name and the module of each candidate; false leaves it alone.
        linears: take plain linear layers too, each only where a measurement now, 128 rows forward, finds the fused
            op at least 5 % faster than the library on this machine. Only on CPUs; costs some ten milliseconds for
            each shape.
        strict: RuntimeError, and nothing changed, if a site is refused for what it is: not one that ``filter_fn``
            or a measurement leaves out.
        dry_run: report, and change nothing.

    Returns:
        A `FusionReport`. A warning tells if nothing in the model runs fused.

    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
    >>> report = fuse(model)
    >>> report.assert_fused(1)
    >>> print(report.summary())
    Sequential: 1 of 1 sites fused
    """
    if not isinstance(model, nn.Module):
        raise bad("model", f"a {type(model).__name__}", "an nn.Module", "pass the model itself", TypeError)
    if filter_fn is not None and not callable(filter_fn):
        raise bad("filter_fn", repr(filter_fn), "a function of a name and a module", "pass a callable", TypeError)
    linears, strict, dry_run = (
        check_flag(name, value) for name, value in (("linears", linears), ("strict", strict), ("dry_run", dry_run))
    )
    search = Search(filter_fn or (lambda name, module: True), linears, lambda *linear: _measured(*linear))
    search.run(model)
    report = FusionReport(original_class(type(model)).__name__, search.sites, search.passed_over)
    if strict and search.refused:
        raise RuntimeError(f"fuse: strict=True, and {search.refused} sites are refused\n{report}")
    if not dry_run:
        for module, make_class, plan in search.changes:
            kind = make_class()
            module.__dict__[PLAN] = plan
            object.__setattr__(module, "__class__", kind)
        if not report.fused:
            warnings.warn(f"fuse: nothing runs fused in {report}", UserWarning, stacklevel=2)
    return report


def unfuse(model: nn.Module) -> int:
    """Undo `fuse`: every module gets its own class back. Returns how many were fused.

    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
    >>> len(fuse(model)), unfuse(model), type(model).__name__
    (1, 1, 'Sequential')
    """
    if not isinstance(model, nn.Module):
        raise bad("model", f"a {type(model).__name__}", "an nn.Module", "pass the model itself", TypeError)
    originals = {fused: original for original, fused in FUSED_NETWORKS.items()}
    changes: list[tuple[nn.Module, type[nn.Module]]] = []
    for module in model.modules():
        kind, has_plan = type(module), PLAN in module.__dict__
        original = originals.get(kind, kind) if has_plan else kind
        original = original_class(original)
        if original is kind and has_plan and hasattr(kind, "_fastlane_original"):
            raise RuntimeError(
                f"unfuse: a {kind.__name__} has changed its class since fuse() (a parametrization or FSDP does "
                "that); undo that first"
            )
        if original is not kind and "forward" not in module.__dict__ and why_forward_replaced(module) is not None:
            raise RuntimeError(f"unfuse: {why_forward_replaced(module)} ({kind.__name__}); undo that first")
        if original is not kind or has_plan:
            changes.append((module, original))
    for module, original in changes:
        object.__setattr__(module, "__class__", original)
        module.__dict__.pop(PLAN, None)
    return len(changes)


def explain(model: nn.Module, linears: bool = False) -> FusionReport:
    """What runs fused in ``model`` now, what could, and why the rest does not; changes nothing.

    A row of a module that was called since `fuse` also says what ran: ``site.calls``.

    >>> print(explain(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())).summary())
    Sequential: 1 of 1 sites fused
    """
    return fuse(model, linears=linears, dry_run=True)


class disabled(_DecoratorContextManager):
    """In this block, in this thread, everything runs as eager PyTorch would run it: fused modules their original
    forward, the functions of `fastlane_ext` their composition. ``stats()["fallback"]`` counts the latter. What is
    compiled or exported in the block is eager PyTorch, too. Also a decorator, of generators too. The backward of a
    fused forward stays fused.

    >>> from fastlane_ext import linear_gelu_residual
    >>> with disabled():
    ...     y = linear_gelu_residual(torch.ones(1, 2), torch.ones(2, 2))
    """

    def __enter__(self) -> None:
        library.disable(True)

    def __exit__(self, *error: Any) -> None:
        library.disable(False)
