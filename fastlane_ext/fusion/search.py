"""The search of `fuse`: every place in a model where a fused operation runs or could."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import modules, networks, reference
from .._facts import ABSENT, lookup
from .._plain import class_name, why_parameters_unfit, why_touched
from .activations import read_activation
from .changes import why_changed
from .classes import PLAN, fused_class, plan_of, why_forward_replaced, why_no_class
from .known import known, original_class
from .linears import is_linear, is_transposed, linear_class
from .measure import Measure, why_not_faster
from .mentions import has_linear, looks_linear, mentions_gelu, says_gelu
from .plan import Plan
from .read_plan import other_activation, read_plan
from .report import PassedOver, Site
from .trace import Refused

FUSED_NETWORKS: dict[type[nn.Module], type[nn.Module]] = {
    reference.ExampleDeepNeuralNetwork: networks.ExampleDeepNeuralNetwork,
    reference.ImprovedResidualNetwork: networks.ImprovedResidualNetwork,
    reference.DeepNeuralNet: networks.DeepNeuralNet,
    reference.ResidualNetwork: networks.ResidualNetwork,
    reference.ResidualMLP: modules.ResidualMLP,
    reference.LinearGELUResidual: modules.LinearGELUResidual,
}
_WRITTEN_FUSED = tuple(FUSED_NETWORKS.values())
_NEVER = "no call counted since fuse(): its owner may call its children, or a graph holds it"


class _OfFilter(Exception):
    """Carries an exception of the caller's filter_fn past the search's own ``except``."""


class Search:
    """`run` fills ``sites`` and ``passed_over``. ``refused`` counts the sites and modules that cannot be fused.
    ``changes`` lists the work of `fuse`: a module, a function that makes its class, its plan.
    """

    def __init__(self, wanted: Callable[[str, nn.Module], bool], linears: bool, measure: Measure) -> None:
        self.wanted = wanted
        self.linears = linears
        self.measure = measure
        self.sites: list[Site] = []
        self.passed_over: list[PassedOver] = []
        self.refused = 0
        self.changes: list[tuple[nn.Module, Callable[[], type[nn.Module]], Plan | None]] = []
        self.covered: set[int] = set()

    def run(self, model: nn.Module) -> None:
        plain_linears = []
        for name, module in model.named_modules():
            if id(module) in self.covered:
                continue
            try:
                if is_linear(module):
                    plain_linears.append((name, module))
                else:
                    self._module(name, module)
            except _OfFilter as error:
                assert error.__cause__ is not None
                raise error.__cause__ from None
            except Exception as error:  # somebody's __getattr__, property or descriptor
                self.refused += 1
                self._pass_over(name, module, f"looking into it raised {type(error).__name__}")
        for name, module in plain_linears:
            if id(module) not in self.covered and (self.linears or PLAN in module.__dict__):
                self._linear(name, module)
        self._note_uncalled()
        order = {name: position for position, (name, _) in enumerate(model.named_modules())}
        self.sites.sort(key=lambda site: order[site.name])

    def _module(self, name: str, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            self.covered.update(id(child) for child in module.modules())
            self._pass_over(name, module, "is a scripted or traced module")
        elif type(module) in FUSED_NETWORKS or isinstance(module, _WRITTEN_FUSED):
            self.covered.update(id(child) for child in module.modules())
            self._network(name, module)
        elif lookup(original_class(type(module)), "forward") not in (nn.Module.forward, ABSENT) and has_linear(module):
            self._container(name, module)

    def _pass_over(self, name: str, module: nn.Module, reason: str) -> None:
        self.passed_over.append(PassedOver(name, original_class(type(module)).__name__, reason))

    def _add(self, name: str, module: nn.Module, pattern: str, reason: str | None, note: str = "", **more: Any) -> None:
        kind = original_class(type(module)).__name__
        self.sites.append(Site(name, kind, pattern, reason is None, reason or note, **more))

    def _left_out(self, name: str, module: nn.Module) -> str | None:
        try:
            return None if self.wanted(name, module) else "left out by filter_fn"
        except Exception as error:
            raise _OfFilter from error

    def _network(self, name: str, module: nn.Module) -> None:
        own = why_forward_replaced(module)
        if isinstance(module, _WRITTEN_FUSED):
            self._add(name, module, "network", own, "" if PLAN in module.__dict__ else "written fused")
            return
        reason = own or self._left_out(name, module)
        self._add(name, module, "network", reason)
        if reason is None:
            kind = FUSED_NETWORKS[type(module)]
            self.changes.append((module, lambda: kind, None))

    def _container(self, name: str, module: nn.Module) -> None:
        is_new = PLAN not in module.__dict__ or original_class(type(module)) is type(module)
        try:
            plan = read_plan(module) if is_new else plan_of(module)
            if isinstance(plan, str):
                raise Refused(plan)
        except Refused as refused:
            # Without any mention of a GELU nobody would expect a fused operation here.
            if mentions_gelu(module):
                self.refused += 1
                self._add(name, module, "Linear, GELU", str(refused))
            return
        if not plan.fused:
            self._explain_unmatched(name, module, plan)
            return
        changed = why_changed(module, plan)
        reason = why_changed(module, plan, ignore_dropout=True) if changed else None
        reason = reason or why_forward_replaced(module)
        if reason is None and is_new:
            reason = why_no_class(type(module))
        self.refused += reason is not None
        if reason is None and is_new:
            reason = self._left_out(name, module)
        if reason is None:
            self.covered.update(id(module._modules[linear]) for step in plan.fused for linear in step.linears)
            if is_new:
                kind = type(module)
                self.changes.append((module, lambda: fused_class(kind), plan))
        calls = None if is_new else {"fused": plan.calls.fused, "original": plan.calls.original}
        note = "" if changed is None else "runs its original forward while dropout is active"
        if plan.calls.reason and not note:
            note = f"ran its original forward {plan.calls.original} times, the last time because {plan.calls.reason}"
        for step in plan.fused:
            self._add(name, module, step.pattern, reason, note, calls=calls)

    def _note_uncalled(self) -> None:
        """Add a note to fused modules that were not called since `fuse`, if others were: their owner may call their
        children directly.
        """
        called = [site for site in self.sites if site.calls is not None and any(site.calls.values())]
        for index, site in enumerate(self.sites):
            if called and site.fused and not site.reason and site.calls is not None and not any(site.calls.values()):
                self.sites[index] = replace(site, reason=_NEVER)

    def _explain_unmatched(self, name: str, module: nn.Module, plan: Plan) -> None:
        activation = other_activation(module, plan)
        reason, pattern = None, "Linear, Linear"
        if activation is not None:
            child = module._modules[activation]
            assert child is not None
            reason = f"{activation} is a {type(child).__name__}, {read_activation(child)}"
        elif mentions_gelu(module):
            # A stand-in for a linear layer: an adapter, a quantised layer, a parametrised one.
            pattern = "Linear, GELU"
            for child_name, child in module._modules.items():
                if reason is None and child is not None and not is_linear(child) and looks_linear(child):
                    reason = f"{child_name} is a {class_name(type(child))}, not a plain Linear"
            reason = reason or _why_apart(module)
        if reason is not None:
            self.refused += 1
            self._add(name, module, pattern, reason)

    def _linear(self, name: str, module: nn.Module) -> None:
        if PLAN in module.__dict__:
            self._add(name, module, "Linear", why_touched(module))
            return
        kind = linear_class(type(module))
        of_class = None if kind is None else known(kind)
        assert of_class is not None
        reason = of_class.reason or why_touched(module)
        reason = reason or why_parameters_unfit(module, is_transposed(module))
        self.refused += reason is not None
        reason = reason or self._left_out(name, module)
        times = None
        if reason is None:
            reason, times = why_not_faster(module, self.measure)
        self._add(name, module, "Linear", reason, measured=times)
        if reason is None:
            kind = type(module)
            self.changes.append((module, lambda: fused_class(kind), None))


def _why_apart(module: nn.Module) -> str | None:
    """Why a child that may be a GELU is not one, or None; for a forward that was followed and has no pair to fuse."""
    for name, child in module._modules.items():
        if child is None:
            continue
        if child._modules and not has_linear(child) and mentions_gelu(child):
            return f"{name} is a {type(child).__name__}, not a plain GELU"
        if says_gelu(child):
            found = read_activation(child)
            if isinstance(found, str):
                return f"{name} is a {type(child).__name__}, {found}"
    return None
