"""The profile of this CPU: what `fastlane tune` measured. It is read when the package is imported.

The compiled library chooses a path by the profile's nearest point, and by the rules of ``csrc/ops/path.cpp`` where no
point is near. A profile that cannot be read, or that was measured elsewhere, is ignored with one warning.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ._arguments import shortened
from ._cpu import cpu_identity
from ._load import build_record, library

FORMAT = 1
"""The number of this layout of the file."""

MOST_BYTES = 1 << 24

choice = ""
"""What chooses between our own products and the library's in this process, as `load` said at import."""

_KEYS = {"work": str, "dtype": str, "rows": int, "in_features": int, "out_features": int, "fused_wins": bool}


class ProfileError(ValueError):
    """Why a profile cannot be used, in one line."""


def identity() -> dict[str, Any]:
    """What a profile has to share with this process: the layout, the CPU, its kernels, torch and this package."""
    return {
        "format": FORMAT,
        "cpu": cpu_identity(),
        "kernels": library.cpu_isa(),
        "torch": str(torch.__version__),
        "fastlane_ext": build_record["version"],
    }


def folder() -> Path:
    """The user's folder of profiles: below ``XDG_CACHE_HOME``, ``~/.cache`` or, on macOS, ``~/Library/Caches``.

    Raises RuntimeError for a user without a home.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):
        home = Path.home()
        cache = str(home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache")
    return Path(cache) / "fastlane_ext"


def default_path() -> Path:
    """This CPU's file in `folder`: machines that share a home have a file each."""
    name = f"{cpu_identity()}-{library.cpu_isa()}"
    return folder() / f"profile-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The profile in a file. Raises ProfileError if there is none, or if it does not fit `identity`."""
    file = Path(path)
    try:
        if file.exists() and not file.is_file():
            raise ProfileError("this is no file")
        if file.stat().st_size > MOST_BYTES:
            raise ProfileError("the file is too large for a profile")
        profile = json.loads(file.read_text(encoding="utf-8"))
    except ProfileError:
        raise
    except FileNotFoundError:
        raise ProfileError("there is no such file") from None
    except OSError as error:
        raise ProfileError(f"the file cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ProfileError("the file is damaged") from error
    if not isinstance(profile, dict) or not isinstance(profile.get("points"), list):
        raise ProfileError("the file is no profile")
    for name, expected in identity().items():
        found = profile.get(name)
        if type(found) is not type(expected) or found != expected:
            raise ProfileError(f"the profile's {name} is {shortened(found)}, but {expected!r} is running")
    date = profile.get("date")
    if not isinstance(date, str) or len(date) > 40 or not date.isprintable():
        raise ProfileError("the file is damaged: its date is no date")
    return profile


def use(profile: Mapping[str, Any]) -> None:
    """Choose by this profile from now on. Raises ProfileError for a point that no call could match."""
    points: list[Any] = []
    for point in profile["points"]:
        values: list[Any] = [point.get(key) for key in _KEYS] if isinstance(point, dict) else []
        if [type(value) for value in values] != list(_KEYS.values()):
            raise ProfileError("the file is damaged: a point lacks a value")
        if not all(1 <= size < 2**63 for size in values[2:5]):
            raise ProfileError("the file is damaged: a point has a size that no call has")
        points.append(tuple(values))
    try:
        library.set_profile(points)
    except (TypeError, ValueError) as error:
        raise ProfileError(f"the file is damaged: {str(error).splitlines()[0][:100]}") from error


def load() -> str:
    """Use the profile that FASTLANE_PROFILE names, or `default_path`. Returns what chooses the paths from now on."""
    try:
        isa = library.cpu_isa()
    except RuntimeError:
        return "nothing, since FASTLANE_CPU_ISA is wrong"  # as the first call will say
    if isa == "none":
        return "nothing: torch's own operators run"
    rules = (
        "the rules of this package"
        if library.cpu_is_measured()
        else "the library's products, since nobody has measured this CPU; `fastlane tune` measures it"
    )
    named = os.environ.get("FASTLANE_PROFILE", "")
    if named == "off":
        return f"{rules} (FASTLANE_PROFILE=off)"
    path = Path(named)
    try:
        # Do not look at the CPU where there is no profile at all.
        if not named and not (folder().is_dir() and (path := default_path()).is_file()):
            return rules
        profile = read(path)
        use(profile)
    except ProfileError as error:
        warnings.warn(
            f"fastlane_ext: ignores the profile {path}: {error}; measure again with `fastlane tune`, or set "
            "FASTLANE_PROFILE=off",
            RuntimeWarning,
            stacklevel=2,
        )
        return f"{rules} ({path} is ignored: {error})"
    except (OSError, RuntimeError):
        return rules  # there is no home, or it is closed to this user
    return f"the profile {path} of {profile.get('date')}, {len(profile['points'])} points"
