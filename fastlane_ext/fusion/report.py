"""What `fuse` says of a model: one `Site` a place where a fused operation runs or could."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

from .._json import to_json
from .._text import aligned, for_stream


class PassedOver(NamedTuple):
    """A module that was not looked into: its name in ``named_modules()``, its class's, and why."""

    name: str
    class_name: str
    reason: str


@dataclass(frozen=True)
class Site:
    """One place where a fused operation runs, or could.

    ``name`` is the module's, as in ``named_modules()``, ``class_name`` its class's; ``pattern`` what was found there;
    ``fused`` whether it runs fused; ``reason`` why not, or what to know; ``measured`` the times of a plain linear
    layer, by the library and fused, in milliseconds, or None; ``calls`` how often the module has run fused since
    `fuse`, and its original forward (torch.compile counts nothing), or None for a module that is not fused.
    """

    name: str
    class_name: str
    pattern: str
    fused: bool
    reason: str = ""
    measured: dict[str, float] | None = None
    calls: dict[str, int] | None = None


class FusionReport:
    """What `fuse` found in a model: a `Site` a row, in the order of ``named_modules()``.

    ``str(report)`` is a table with a summary line, in letters that standard output knows; ``len``, iteration and
    ``report.sites`` give the rows.
    ``report.passed_over`` lists the modules that were not looked into, each a `PassedOver`.
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
        """One line: how many sites there are, how many run fused, and how many modules were not looked into."""
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
        """The rows, how many are fused, and what was passed over, as JSON text."""
        result = {
            "model": self.model_name,
            "fused": len(self.fused),
            "sites": [asdict(site) for site in self.sites],
            "passed_over": [module._asdict() for module in self.passed_over],
        }
        return to_json(result)

    def assert_fused(self, count: int) -> None:
        """AssertionError, with the table, unless exactly ``count`` sites run fused."""
        if len(self.fused) != count:
            raise AssertionError(f"expected {count} fused sites, got {len(self.fused)}\n{self}")
