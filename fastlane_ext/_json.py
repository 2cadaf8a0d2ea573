"""JSON that every parser accepts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(value: Any, *, ascii_only: bool = True) -> str:
    """``value`` as JSON text. JSON has no NaN or infinity: null stands for them.

    >>> print(to_json({"a": [float("nan"), 1.5]}))
    {
      "a": [
        null,
        1.5
      ]
    }
    """
    return json.dumps(_clean(value), indent=2, allow_nan=False, ensure_ascii=ascii_only)


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
