"""`fuse`: fused operations in models that somebody else wrote, in place, and back."""

from __future__ import annotations

import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from . import functional, modules, networks, reference
from ._activations import outside_modes, why_no_gelu
from ._arguments import bad, check_flag
from ._linears import class_name, is_linear, linear_class, weight_and_bias, why_parameters_unfit
from ._load import library
from ._plain import original_class
from ._plan import Plan, Refused, has_gelu, other_activation, read_plan
from .fused_classes import PLAN, fused_class, why_changed

_FUSED_NETWORKS = {
    reference.ExampleDeepNeuralNetwork: networks.ExampleDeepNeuralNetwork,
    reference.ImprovedResidualNetwork: networks.ImprovedResidualNetwork,
    reference.DeepNeuralNet: networks.DeepNeuralNet,
    reference.ResidualNetwork: networks.ResidualNetwork,
    reference.ResidualMLP: modules.ResidualMLP,
    reference.LinearGELUResidual: modules.LinearGELUResidual,
}
_WRITTEN_FUSED = tuple(_FUSED_NETWORKS.values())


@dataclass(frozen=True)
class Site:
    """One place where a fused operation runs, or could.

    ``name`` is the module's, as in ``named_modules()``, ``class_name`` its class's; ``pattern`` what was found there;
    ``fused`` whether it runs fused; ``reason`` why not, or what to know; ``measured`` the times of a plain linear
    layer, by the library and fused, in milliseconds, or None.
    """

    name: str
    class_name: str
    pattern: str
    fused: bool
    reason: str = ""
    measured: dict[str, float] | None = None


class FusionReport:
    """What `fuse` found in a model: a `Site` a row, in the order of ``named_modules()``.

    ``str(report)`` is a table with a summary line; ``len``, iteration and ``report.sites`` give the rows.
    """

    def __init__(self, model_name: str, sites: list[Site]) -> None:
        self.model_name = model_name
        self.sites = sites

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def fused(self) -> list[Site]:
        return [site for site in self.sites if site.fused]

    @property
    def refused(self) -> list[Site]:
        return [site for site in self.sites if not site.fused]

    def summary(self) -> str:
        """One line: how many sites there are and how many run fused."""
        if not self.sites:
            return f"{self.model_name}: no Linear next to a GELU was found"
        return f"{self.model_name}: {len(self.fused)} of {len(self.sites)} sites fused"

    def __str__(self) -> str:
        rows = [("site", "class", "pattern", "fused", "reason")]
        rows += [
            (s.name or "(model)", s.class_name, s.pattern, "yes" if s.fused else "no", s.reason) for s in self.sites
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
        ]
        return "\n".join([line.rstrip() for line in lines if self.sites] + [self.summary()])

    __repr__ = __str__

    def to_json(self) -> str:
        """The rows, and how many are fused, as JSON text."""
        result = {"model": self.model_name, "fused": len(self.fused), "sites": [asdict(site) for site in self.sites]}
        return json.dumps(result, indent=2)

    def assert_fused(self, count: int) -> None:
        """AssertionError, with the table, unless exactly ``count`` sites run fused."""
        if len(self.fused) != count:
            raise AssertionError(f"expected {count} fused sites, got {len(self.fused)}\n{self}")


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
    transformers' ``Conv1D``; any activation whose values are GELU's, exact or tanh; the networks of
    `fastlane_ext.reference`. No parameter is made, renamed or copied: the container's class becomes an importable
    subclass of it. At every call that forward looks whether the children still are what they were (no hooks, no
    adapter in their place, no active dropout), and runs the original one where they are not.

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
    search = _Search(filter_fn or (lambda name, module: True), linears)
    search.run(model)
    report = FusionReport(_original_name(model), search.sites)
    if strict and search.refused:
        raise RuntimeError(f"fuse: strict=True, and {search.refused} sites are refused\n{report}")
    if not dry_run:
        for module, kind, plan in search.changes:
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
    originals = {fused: original for original, fused in _FUSED_NETWORKS.items()}
    changes = []
    for module in model.modules():
        kind, has_plan = type(module), PLAN in module.__dict__
        original = originals.get(kind, kind) if has_plan else kind
        original = original_class(original)
        if original is not kind:
            changes.append((module, original))
        elif has_plan:
            raise RuntimeError(
                f"unfuse: a {kind.__name__} has changed its class since fuse() (a parametrization or FSDP does "
                "that); undo that first"
            )
    for module, original in changes:
        object.__setattr__(module, "__class__", original)
        module.__dict__.pop(PLAN, None)
    return len(changes)


def explain(model: nn.Module, linears: bool = False) -> FusionReport:
    """What runs fused in ``model`` now, what could, and why the rest does not; changes nothing.

    >>> print(explain(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())).summary())
    Sequential: 1 of 1 sites fused
    """
    return fuse(model, linears=linears, dry_run=True)


class disabled(ContextDecorator):
    """In this block, in this thread, everything runs as eager PyTorch would run it: fused modules their original
    forward, the functions of `fastlane_ext` their composition. ``stats()["fallback"]`` counts the latter. Also a
    decorator. The backward of a fused forward stays fused.

    >>> with disabled():
    ...     y = functional.linear_gelu_residual(torch.ones(1, 2), torch.ones(2, 2))
    """

    def __enter__(self) -> None:
        library.disable(True)

    def __exit__(self, *error: object) -> None:
        library.disable(False)


def _original_name(module: nn.Module) -> str:
    return original_class(type(module)).__name__


def _looks_linear(child: nn.Module) -> bool:
    return is_linear(child) or isinstance(child, nn.Linear) or hasattr(child, "in_features")


def _why_no_class(kind: type[nn.Module]) -> str | None:
    try:
        instance = object.__new__(kind)
        object.__setattr__(instance, "__class__", fused_class(kind))
    except Exception as error:
        return f"its class takes no subclass: {type(error).__name__}: {error}"
    return None


class _Search:
    def __init__(self, wanted: Callable[[str, nn.Module], bool], linears: bool) -> None:
        self.wanted = wanted
        self.linears = linears
        self.sites: list[Site] = []
        self.refused = 0  # for what they are
        self.changes: list[tuple[nn.Module, type, Plan | None]] = []
        self.covered: set[int] = set()

    def run(self, model: nn.Module) -> None:
        plain_linears = []
        for name, module in model.named_modules():
            if id(module) in self.covered:
                continue
            if type(module) in _FUSED_NETWORKS or isinstance(module, _WRITTEN_FUSED):
                self.covered.update(id(child) for child in module.modules())
                self._network(name, module)
            elif is_linear(module):
                plain_linears.append((name, module))
            elif type(module).forward is not nn.Module.forward and any(map(_looks_linear, module.children())):
                self._container(name, module)
        for name, module in plain_linears:
            if id(module) not in self.covered and (self.linears or PLAN in module.__dict__):
                self._linear(name, module)
        order = {name: position for position, (name, _) in enumerate(model.named_modules())}
        self.sites.sort(key=lambda site: order[site.name])

    def _add(self, name: str, module: nn.Module, pattern: str, reason: str | None, note: str = "", **more: Any) -> None:
        self.sites.append(Site(name, _original_name(module), pattern, reason is None, reason or note, **more))

    def _left_out(self, name: str, module: nn.Module) -> str | None:
        return None if self.wanted(name, module) else "left out by filter_fn"

    def _network(self, name: str, module: nn.Module) -> None:
        if isinstance(module, _WRITTEN_FUSED):
            self._add(name, module, "network", None, "" if PLAN in module.__dict__ else "written fused")
            return
        reason = self._left_out(name, module)
        self._add(name, module, "network", reason)
        if reason is None:
            self.changes.append((module, _FUSED_NETWORKS[type(module)], None))

    def _container(self, name: str, module: nn.Module) -> None:
        plan = module.__dict__.get(PLAN)
        is_new = plan is None
        if is_new:
            try:
                plan = read_plan(module)
            except Refused as refused:
                # Without a GELU in sight this is no place where anyone would expect a fused operation.
                if has_gelu(module):
                    self.refused += 1
                    self._add(name, module, "Linear, GELU", str(refused))
                return
            if not plan.fused:
                self._explain_unmatched(name, module, plan)
                return
        changed = why_changed(module, plan)
        reason = why_changed(module, plan, ignore_dropout=True) if changed else None
        if reason is None and is_new:
            reason = "has a forward of its own" if "forward" in module.__dict__ else _why_no_class(type(module))
        self.refused += reason is not None
        if reason is None and is_new:
            reason = self._left_out(name, module)
        if reason is None:
            self.covered.update(id(module._modules[linear]) for step in plan.fused for linear in step.linears)
            if is_new:
                self.changes.append((module, fused_class(type(module)), plan))
        for step in plan.fused:
            note = "" if changed is None else "runs its original forward while dropout is active"
            self._add(name, module, step.pattern, reason, note)

    def _explain_unmatched(self, name: str, module: nn.Module, plan: Plan) -> None:
        activation = other_activation(module, plan)
        reason, pattern = None, "Linear, Linear"
        if activation is not None:
            child = module._modules[activation]
            reason = f"{activation} is a {type(child).__name__}, {why_no_gelu(child)}"
        elif has_gelu(module):
            # A stand-in for a linear layer: an adapter, a quantised layer, a parametrised one.
            pattern = "Linear, GELU"
            for child_name, child in module.named_children():
                if reason is None and not is_linear(child) and _looks_linear(child):
                    reason = f"{child_name} is a {class_name(type(child))}, not a plain Linear"
        if reason is not None:
            self.refused += 1
            self._add(name, module, pattern, reason)

    def _linear(self, name: str, module: nn.Module) -> None:
        if PLAN in module.__dict__:
            self._add(name, module, "Linear", None)
            return
        reason = why_parameters_unfit(module)
        self.refused += reason is not None
        reason = reason or self._left_out(name, module)
        measured = None
        if reason is None:
            weight, bias = weight_and_bias(module, linear_class(type(module)) is not nn.Linear)
            if type(weight) is FakeTensor:
                reason = "has no data to be measured with"
            elif weight.device.type != "cpu":
                reason = f"is on {weight.device}; plain linear layers are measured on CPUs only"
            elif library.is_disabled():
                reason = "cannot be measured while fused operations are disabled"
            else:
                measured = _measured(weight, bias)
                ratio = measured["library_ms"] / measured["fused_ms"]
                if ratio < 1.05:
                    speed = "faster" if ratio < 0.95 else "as fast"
                    reason = f"the library is {speed} here: its time is {ratio:.2f} of the fused op's"
        self._add(name, module, "Linear", reason, measured=measured)
        if reason is None:
            self.changes.append((module, fused_class(type(module)), None))


_MEASURED_ROWS, _MEASUREMENTS = 128, 7
_measurements: dict[tuple[Any, ...], dict[str, float]] = {}
_measuring = threading.Lock()


def _measured(weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, float]:
    """The least times of interleaved calls on 128 random rows, in milliseconds; once a shape. They are not counted."""
    path = os.environ.get("FASTLANE_PATH")
    key = (weight.shape, weight.stride(), weight.dtype, bias is None, torch.get_num_threads(), path)
    with _measuring, torch.no_grad(), outside_modes():
        if key not in _measurements:
            x = torch.randn(_MEASURED_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(
                weight.dtype
            )
            calls = {
                "library_ms": lambda: F.linear(x, weight, bias),
                "fused_ms": lambda: functional.linear_gelu_residual(x, weight, bias, activation="none"),
            }
            times: dict[str, list[float]] = {name: [] for name in calls}
            library.count(False)
            try:
                for turn in range(_MEASUREMENTS + 1):
                    for name, call in calls.items():
                        start = time.perf_counter()
                        call()
                        if turn:
                            times[name].append(1e3 * (time.perf_counter() - start))
            finally:
                library.count(True)
            _measurements[key] = {"rows": _MEASURED_ROWS, **{name: min(values) for name, values in times.items()}}
        return dict(_measurements[key])
