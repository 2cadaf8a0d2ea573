"""Packed copies of a model's weights, for inference: `freeze` makes them, `unfreeze` drops them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ._arguments import bad, check_flag
from ._load import library
from ._plain import is_plain_tensor, parameter_of
from ._text import aligned
from .fusion.classes import PLAN, plan_of
from .fusion.linears import is_linear, is_transposed
from .fusion.plan import Fused
from .modules import LinearGELUResidual, ResidualMLP
from .networks import ResidualNetwork, _FusedForward

__all__ = ["FreezeReport", "FrozenWeight", "freeze", "unfreeze"]

_COPIES = "_fastlane_copies"


class _Copies(list[Tensor]):
    """The packed copies of a module's weights, in the module's own dict. A copied or pickled module has none, since its
    weights lie elsewhere.
    """

    def __reduce__(self) -> Any:
        return (_Copies, ())

    def __deepcopy__(self, memo: Any) -> _Copies:
        return _Copies()


@dataclass(frozen=True)
class FrozenWeight:
    """A weight that `freeze` looked at: its name in ``named_modules()``, its shape as ``(out_features, in_features)``,
    and the bytes of the packed copy. ``reason`` says why there is none.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int
    reason: str = ""

    @property
    def frozen(self) -> bool:
        return not self.reason


class FreezeReport:
    """The weights that `freeze` found, each a `FrozenWeight`; ``str(report)`` is a table with a summary line."""

    def __init__(self, weights: list[FrozenWeight]) -> None:
        self.weights = weights

    def __iter__(self) -> Iterator[FrozenWeight]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def frozen(self) -> list[FrozenWeight]:
        return [weight for weight in self.weights if weight.frozen]

    @property
    def nbytes(self) -> int:
        """The bytes that all copies take."""
        return sum(weight.nbytes for weight in self.weights)

    def summary(self) -> str:
        """One line: the number of weights, of frozen ones, and the bytes added."""
        if not self.weights:
            return "no weight of a fused operation was found"
        return f"{len(self.frozen)} of {len(self.weights)} weights frozen, {self.nbytes / 2**20:.1f} MiB added"

    def __str__(self) -> str:
        rows = [("weight", "shape", "MiB", "reason")]
        for weight in self.weights:
            sizes = "×".join(map(str, weight.shape))
            rows.append((weight.name or "(model)", sizes, f"{weight.nbytes / 2**20:.2f}", weight.reason))
        lines = [line.rstrip() for line in aligned(rows, left=2)] if self.weights else []
        return "\n".join([*lines, self.summary()])

    __repr__ = __str__


def _fused_linears(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers, by their names, that the module hands to a fused operation."""
    prefix = f"{name}." if name else ""
    if isinstance(module, ResidualMLP):
        children: list[Any] = [(f"{prefix}fc1", module.fc1), (f"{prefix}fc2", module.fc2)]
    elif isinstance(module, LinearGELUResidual):
        children = [(name, module), (f"{prefix}projection", module.projection)]
    elif isinstance(module, (ResidualNetwork, _FusedForward)):
        children = [(prefix + child_name, child) for child_name, child in module.named_modules() if is_linear(child)]
    elif PLAN in module.__dict__ and is_linear(module):
        children = [(name, module)]
    elif PLAN in module.__dict__ and not isinstance(plan := plan_of(module), str):
        names = [linear for step in plan.steps if isinstance(step, Fused) for linear in step.linears]
        children = [(prefix + child, module._modules.get(child)) for child in names]
    else:
        children = []
    for child_name, child in children:
        if isinstance(child, LinearGELUResidual) or is_linear(child):
            yield child_name, child


def _freeze_weight(name: str, linear: nn.Module, check_content: bool) -> FrozenWeight:
    weight = parameter_of(linear, "weight")
    if not is_plain_tensor(weight):
        return FrozenWeight(name, (), 0, "its weight is no plain tensor")
    if not isinstance(linear, LinearGELUResidual) and is_transposed(linear):
        weight = weight.t()
    shape = tuple(weight.shape)
    try:
        packed = library.freeze_weight(weight.detach(), check_content)
    except RuntimeError as error:
        return FrozenWeight(name, shape, 0, str(error).splitlines()[0])
    linear.__dict__.setdefault(_COPIES, _Copies()).append(packed)
    return FrozenWeight(name, shape, packed.nbytes)


def freeze(model: nn.Module, *, check_content: bool = False) -> FreezeReport:
    """Keep packed copies of the weights of all fused operations in ``model``, and use them in calls without gradients.

    A call looks at every weight before it uses the copy: a weight that was changed in place, loaded anew, moved,
    converted or replaced is read as it is now, and ``stats()["fallback"]`` counts a change in place. (Under
    ``FASTLANE_STRICT=1`` the call raises.) Freeze again to use the new values. Training goes on with the weights
    themselves. Results have the same bits as without copies. Where a copy would not be faster, as with one row, the
    weight itself is read.

    A write that leaves no trace in the weight's version counter (through ``weight.data``, numpy or shared memory) is
    noticed only with ``check_content``.

    Args:
        model: a module. Weights of this package's modules and of what `fuse` has fused are found.
        check_content: compare the weights' values too, at every call, which costs a pass over each weight. Also on
            under ``FASTLANE_STRICT=1``.

    Returns:
        A `FreezeReport`: each weight, and the bytes that its copy takes.

    Raises:
        TypeError: an argument has the wrong type.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    >>> report = fuse(model)
    >>> print(freeze(model).summary())
    2 of 2 weights frozen, 0.1 MiB added
    """
    if not isinstance(model, nn.Module):
        raise bad("model", f"a {type(model).__name__}", "an nn.Module", "pass the model itself", TypeError)
    check_content = check_flag("check_content", check_content)
    unfreeze(model)
    weights, seen = [], set()
    for name, module in model.named_modules():
        for child_name, linear in _fused_linears(name, module):
            if id(linear) not in seen:
                seen.add(id(linear))
                weights.append(_freeze_weight(child_name, linear, check_content))
    return FreezeReport(weights)


def unfreeze(model: nn.Module) -> int:
    """Drop the copies that `freeze` keeps. Returns how many there were.

    >>> unfreeze(torch.nn.Linear(8, 8))
    0
    """
    if not isinstance(model, nn.Module):
        raise bad("model", f"a {type(model).__name__}", "an nn.Module", "pass the model itself", TypeError)
    return sum(len(module.__dict__.pop(_COPIES, ())) for module in model.modules())
