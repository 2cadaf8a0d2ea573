"""The report of `fuse` on a model: one `Site` for each place where a fused operation runs or could run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

from .._json import to_json
from .._text import aligned, for_stream


class PassedOver(NamedTuple):
    """A module that was not looked into: its name in ``named_modules()``, its class's name, and the reason."""

    name: str
    class_name: str
    reason: str


@dataclass(frozen=True)
class Site:
    """One place where a fused operation runs or could run.

    ``name`` is the module's name in ``named_modules()``, ``class_name`` its class's name. ``pattern`` is the pattern
    found there, and ``fused`` whether it runs fused. ``reason`` says why it does not, or is a note. ``measured`` holds
    the times of a plain linear layer in milliseconds, by the library and fused, or None. ``calls`` counts how often the
    module ran fused since `fuse` and how often its original forward ran (torch.compile counts nothing); None for a
    module that is not fused.
    """

    name: str
    class_name: str
    pattern: str
    fused: bool
    reason: str = ""
    measured: dict[str, float] | None = None
    calls: dict[str, int] | None = None


class FusionReport:
    """The sites that `fuse` found in a model, each a `Site`, in the order of ``named_modules()``.

    ``str(report)`` is a table with a summary line, in characters that standard output can encode. ``len``, iteration
    and ``report.sites`` give the rows. ``report.passed_over`` lists the modules that were not looked into, each a
    `PassedOver`.
    """

    def __init__(self, model_name: str, sites: list[Site], passed_over: list[PassedOver] | None = None) -> None:
        self.model_name = model_name
        self.sites = sites
        self.passed_over = passed_over or []

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
        """One line: the number of sites, of fused sites, and of modules that were not looked into."""
        found = f"{len(self.fused)} of {len(self.sites)} sites fused"
        if not self.sites:
            found = "no Linear next to a GELU was found"
        if self.passed_over:
            first = self.passed_over[0]
            found += f"; not looked into: {first.name or '(model)'}, {first.reason}"
            found += f", and {len(self.passed_over) - 1} more" if len(self.passed_over) > 1 else ""
        return f"{self.model_name}: {found}"

    def __str__(self) -> str:
        rows = [("site", "class", "pattern", "fused", "reason")]
        rows += [
            (s.name or "(model)", s.class_name, s.pattern, "yes" if s.fused else "no", s.reason) for s in self.sites
        ]
        lines = aligned(rows, left=len(rows[0])) if self.sites else []
        text = "\n".join([line.rstrip() for line in lines] + [self.summary()])
        return for_stream(text, sys.stdout)

    __repr__ = __str__

    def to_json(self) -> str:
        """JSON text: the rows, the number of fused sites, and the modules passed over."""
        result = {
            "model": self.model_name,
            "fused": len(self.fused),
            "sites": [asdict(site) for site in self.sites],
            "passed_over": [module._asdict() for module in self.passed_over],
        }
        return to_json(result)

    def assert_fused(self, count: int) -> None:
        """Raise AssertionError, with the table, unless exactly ``count`` sites run fused."""
        if len(self.fused) != count:
            raise AssertionError(f"expected {count} fused sites, got {len(self.fused)}\n{self}")
