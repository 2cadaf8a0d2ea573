"""Names that pickles of fused models look up here, though the classes are made in fusion/classes.py now.

Only ``pickle`` reads this file; `_plan` serves pickles too.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from .fusion.classes import fused_class
from .fusion.classes import remake as _remake

__all__ = ["_remake"]


def __getattr__(name: str) -> type[nn.Module]:
    """The first versions pickled a fused class under a name of this module, ``package:module|Class``."""
    module, separator, qualname = name.partition("|")
    if not separator:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: Any = importlib.import_module(module.replace(":", "."))
    for part in qualname.split(":"):
        found = getattr(found, part)
    return fused_class(found)
