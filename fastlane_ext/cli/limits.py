"""Values that are too large for an option or for this machine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from fastlane_ext._text import size

from .errors import CommandError

# A larger value is a typing mistake, would run for years, or does not fit float32.
LARGEST = {
    **{"epochs": 10**6, "layers": 10**5, "width": 10**6, "batch": 10**9, "lr": 1e38},
    **{"repeats": 10**6, "seconds": 86400},
}


def fits(options: str, needed: int) -> None:
    """Raise CommandError if ``needed`` bytes are more than this machine has; else the system would end the process."""
    available = memory()
    if available is not None and needed > available:
        raise CommandError(
            f"{options}: needs about {size(needed)} of memory, this machine has {size(available)}; choose smaller ones"
        )


def memory() -> int | None:
    """The most bytes of memory that this process may use; None where the system does not tell."""
    found = []
    with suppress(AttributeError, ValueError, OSError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(ValueError, OSError):
        # A container's limit; "max" means no limit.
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min(found, default=None)
