"""``fastlane tune``: measures our own products against the library's on this CPU, and writes the profile."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastlane_ext
from fastlane_ext import _profile
from fastlane_ext._files import write_whole
from fastlane_ext._json import to_json
from fastlane_ext._text import seconds
from fastlane_ext.bench import tuning

from ..errors import CommandError
from ..files import cannot_write, writable
from ..output import Note, console, table

FORBIDDEN = ("FASTLANE_PATH", "FASTLANE_DISABLE", "FASTLANE_CACHES")
"""Variables under which a call would not run as in other processes."""


def threads_of_this_process() -> list[int]:
    """One thread, and all that torch uses."""
    return sorted({1, torch.get_num_threads()})


def _path(output: str | None) -> Path:
    if output is None:
        named = os.environ.get("FASTLANE_PROFILE", "")
        if named not in ("", "off"):
            return Path(named)
        try:
            path = _profile.default_path()
        except RuntimeError as error:
            raise CommandError(f"no folder for the profile: {error}; give --output a PATH") from error
        with cannot_write("--output", str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path
    if not output:
        raise CommandError("--output: got '', expected a file's name")
    return Path(output)


def _who_reads(path: str) -> str:
    named = os.environ.get("FASTLANE_PROFILE", "")
    if named == "off":
        return "no process reads it while FASTLANE_PROFILE is off"
    with suppress(RuntimeError):  # a user without a home
        if Path(path) == (Path(named) if named else _profile.default_path()):
            return "later processes read it; FASTLANE_PROFILE=off ignores it"
    return f"FASTLANE_PROFILE={path} makes processes read it"


def compute(
    points: Sequence[tuning.Point],
    *,
    threads: Sequence[int] | None = None,
    budget: float = 120.0,
    output: str | None = None,
    note: Note = lambda done=0, text=None: None,
) -> dict[str, Any]:
    """Measure ``points`` for ``budget`` seconds and write the profile to ``output``.

    The default of ``output`` is the file that later processes read: that of FASTLANE_PROFILE, or this CPU's in the
    user's cache. The result is the profile, with ``path``,
    ``left_out`` (points for which no time was left) and ``changes`` (points that decide against the built-in rule).
    Raises CommandError where no kernels of ours run, where a variable forces a path, and for a file that cannot be
    written.
    """
    set_variables = [name for name in FORBIDDEN if os.environ.get(name, "0") not in ("", "0")]
    if set_variables:
        raise CommandError(f"{set_variables[0]}: got {os.environ[set_variables[0]]!r}, expected nothing; unset it")
    if fastlane_ext.cpu_isa() == "none":
        raise CommandError(f"no kernels to measure: {fastlane_ext.build_info()['cpu_isa_reason']}")
    path = _path(output)
    writable("--output", str(path))
    counts = list(threads or threads_of_this_process())
    measured: list[tuning.Measured] = []
    left_out = []
    for each in tuning.measure(points, counts, budget):
        point = each if isinstance(each, tuning.Point) else each.point
        note(1, f"{point.work} {point.dtype} {point.rows}x{point.in_features}x{point.out_features}")
        if isinstance(each, tuning.Measured):
            measured.append(each)
        else:
            left_out.append(point)
    profile = {
        **_profile.identity(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": counts,
        "points": [each.to_dict() for each in measured],
    }
    with cannot_write("--output", str(path)):
        write_whole(path, f"{to_json(profile)}\n".encode())
    return {
        **profile,
        "path": str(path),
        "left_out": [asdict(point) for point in left_out],
        "changes": [{**each.to_dict(), "ratio": each.ratio} for each in measured if each.fused_wins != each.rule],
    }


def render(result: dict[str, Any]) -> None:
    """Print the points that change the path, a summary, and where the profile is."""
    out = table("Points that change the path", "work", "dtype", "rows", "features", "fused", "library", "taken", left=2)
    for point in sorted(result["changes"], key=lambda point: (point["dtype"], point["work"], point["rows"])):
        times = [" / ".join(seconds(value) for value in point[name].values()) for name in ("fused_s", "library_s")]
        features = f"{point['in_features']} -> {point['out_features']}"
        taken = "fused" if point["fused_wins"] else "library"
        out.add_row(point["work"], point["dtype"], str(point["rows"]), features, *times, taken)
    if result["changes"]:
        console().print(out)
    paths = Counter((point["dtype"], point["fused_wins"]) for point in result["points"])
    for dtype in dict.fromkeys(point["dtype"] for point in result["points"]):
        print(f"{dtype}: {paths[dtype, True]} points fused, {paths[dtype, False]} by the library")
    print(f"threads: {', '.join(map(str, result['threads']))}; times are medians on each")
    left_out = Counter(f"{point['dtype']} {point['work']}" for point in result["left_out"])
    if left_out:
        counts = ", ".join(f"{count} of {name}" for name, count in left_out.items())
        print(f"left to the built-in rules, for lack of time (--seconds gives more): {counts}")
    print(f"profile: {result['path']}; {_who_reads(result['path'])}")
