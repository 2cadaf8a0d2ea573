"""All promises of one process, which runs one instruction set."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial

import fastlane_ext
from fastlane_ext import reference

from .gelu import scalar_float32, scalar_half
from .layers import accuracy, determinism
from .published import published_table
from .rows import DTYPES, Counter, Row, died, row


def groups(fused: Counter, isa: str) -> list[tuple[str, Callable[[], list[Row]]]]:
    """All measurements, as (text for the user, call).

    Where ``isa`` is ``"none"``, torch's own operators run. They are as exact as eager, but keep no other promise of our
    kernels.
    """
    out: list[tuple[str, Callable[[], list[Row]]]] = []
    for dtype in DTYPES:
        for activation in reference.ACTIVATIONS:
            out.append((f"{dtype} {activation}", partial(accuracy, fused, dtype, activation)))
    if isa == "none":
        return [*out, ("published table", published_table)]
    for activation in (name for name in reference.ACTIVATIONS if name != "none"):
        out.append((f"float32 sweep {activation}", partial(scalar_float32, fused, activation)))
        for dtype in ("bfloat16", "float16"):
            out.append((f"{dtype} sweep {activation}", partial(scalar_half, fused, dtype, activation)))
    out.append(("published table", published_table))
    out.extend((f"threads {dtype}", partial(determinism, fused, dtype)) for dtype in DTYPES)
    return out


def path(calls: int) -> Row:
    """Whether ``stats()`` counted ``calls`` forwards and backwards on one of our paths, and no fallback."""
    counted = fastlane_ext.stats()
    reasons_counted = counted.pop("fallback")
    # Torch differentiates its own operators.
    directions = ("forward",) if fastlane_ext.cpu_isa() == "none" else ("forward", "backward")
    fewest = min(sum(path[name] for path in counted.values()) for name in directions)
    fallbacks = sum(reasons_counted.values())
    reasons = "; ".join(f"{reason} ({n})" for reason, n in reasons_counted.items())
    missing = max(0, calls - fewest) + fallbacks
    found = row("the fused path ran", "all", "all", "calls elsewhere", missing, None, 0, missing == 0)
    return {**found, "note": reasons or f"{calls} calls, {fewest} of them fused both ways"}


def measure() -> Iterator[tuple[str, list[Row]]]:
    """All rows of this process's instruction set, group by group."""
    fused = Counter()
    fastlane_ext.reset_stats()
    for name, call in groups(fused, fastlane_ext.cpu_isa()):
        try:
            rows = call()
        except Exception as error:  # a crash is a failed promise of this group, not the end of the table
            rows = [died(f"{name}: {type(error).__name__}: {error}")]
        yield name, rows
    yield "path", [path(fused.calls)]


def worker() -> None:
    """Entry of the subprocess: writes one JSON document per line to stdout, the instruction set first."""
    print(json.dumps({"isa": fastlane_ext.cpu_isa()}), flush=True)
    for name, rows in measure():
        print(json.dumps({"group": name, "rows": rows}), flush=True)
    sys.stdout.flush()
