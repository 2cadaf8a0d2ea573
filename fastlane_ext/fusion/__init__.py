"""`fuse` puts fused operations into a model that somebody else wrote, in place; `unfuse` takes them out again."""

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
    """Make the modules of ``model`` run fused operations, in place, wherever a fused operation computes the same.

    `fuse` finds Linear→GELU, Linear→GELU→(inactive dropout)→Linear, and a Linear whose result is added to another
    input. A Linear is an ``nn.Linear`` or transformers' ``Conv1D``. A GELU is any activation whose values and slopes
    are GELU's, in its exact, tanh or quick form. The networks of `fastlane_ext.reference` become fused networks. The
    search follows each container's forward and does not go by class names.

    No parameter is made, renamed or copied: the container gets a subclass of its class, with another forward. At
    every call the new forward checks that everything the plan rests on is unchanged (children, hooks, attributes,
    code, torch's own functions, modes), and runs the original forward if anything has changed.

    Args:
        model: any module; the search covers the module and all its submodules.
        filter_fn: called as ``filter_fn(name, module)`` for each candidate; a false result leaves the candidate alone.
        linears: fuse plain linear layers too, each only if a measurement now, 128 rows forward, finds the fused op at
            least 5 % faster than the library on this machine. Only on CPUs; costs some ten milliseconds for each
            shape.
        strict: raise RuntimeError and change nothing if a site cannot be fused. Sites that ``filter_fn`` or a
            measurement leaves out do not count.
        dry_run: report, and change nothing.

    Returns:
        A `FusionReport`. Without ``dry_run``, a UserWarning says if nothing in the model runs fused.

    Raises:
        TypeError: an argument has the wrong type.
        RuntimeError: ``strict`` is set and a site cannot be fused.

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
    """Undo `fuse`: every module gets its original class back. Returns how many modules were fused.

    Raises TypeError if ``model`` is not a module. Raises RuntimeError, and changes nothing, if a module's class changed
    after `fuse`, or if its fused class was given another forward.

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
    """Report what runs fused in ``model`` now, what could, and why the rest cannot; change nothing.

    For a fused module, ``site.calls`` counts its calls since `fuse`: how many ran fused, how many ran the original
    forward.

    >>> print(explain(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())).summary())
    Sequential: 1 of 1 sites fused
    """
    return fuse(model, linears=linears, dry_run=True)


class disabled(_DecoratorContextManager):
    """Run everything in this block, in this thread, as eager PyTorch would.

    Fused modules run their original forward. The functions of `fastlane_ext` run eager operations, and
    ``stats()["fallback"]`` counts their calls. Graphs compiled or exported in the block hold eager operations too. The
    backward of a fused forward stays fused. `disabled` is also a decorator, of generators too.

    >>> from fastlane_ext import linear_gelu_residual
    >>> with disabled():
    ...     y = linear_gelu_residual(torch.ones(1, 2), torch.ones(2, 2))
    """

    def __enter__(self) -> None:
        library.disable(True)

    def __exit__(self, *error: Any) -> None:
        library.disable(False)
