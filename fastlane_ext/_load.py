"""Loads the compiled library, or says in one sentence why the library cannot be loaded and what to do."""

from __future__ import annotations

import importlib
import json
import struct
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from . import _facts

RECORD_KEYS = {"version", "torch", "torch_cuda", "compiler", "cuda_archs", "cuda_reason", "hopper", "hopper_reason"}
REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps ."


def read_build_record(folder: Path | None = None) -> dict[str, Any]:
    """The record that setup.py wrote beside the library. Raises ImportError if the record is missing or damaged."""
    path = (folder or Path(__file__).parent) / "_build_record.json"
    try:
        record = json.loads(path.read_text())
        if record.keys() >= RECORD_KEYS:
            return record
    except FileNotFoundError:
        raise ImportError(
            f"fastlane_ext: no compiled extension in {path.parent}; if this is the source folder, leave it to use "
            f"an installed copy, or build in it with: {REINSTALL.replace(' .', ' -e .')}"
        ) from None
    except (OSError, ValueError, AttributeError):
        pass
    raise ImportError(f"fastlane_ext: {path} is damaged; reinstall in the source folder with: {REINSTALL}")


def check_torch(built: str, running: str) -> None:
    """Raise ImportError unless the running torch is the one the library was built against."""
    if built != running:
        raise ImportError(
            f"fastlane_ext: built for torch {built}, but torch {running} is running; "
            f"reinstall in the source folder with: {REINSTALL}"
        )


def is_cut_short(library: Path) -> bool:
    """Whether an ELF file ends before the table that its header announces does; loading it would be a bus error."""
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02\x01"):
        return False  # the loader's own error says what is wrong
    (table,) = struct.unpack_from("<Q", header, 0x28)
    entry_size, entries = struct.unpack_from("<HH", header, 0x3A)
    return library.stat().st_size < table + entry_size * entries


def load(record: dict[str, Any]) -> ModuleType:
    check_torch(record["torch"], torch.__version__)
    try:
        # Search beside this file only: an editable install's finder would look in its source folder too.
        folder = Path(__file__).parent
        spec = PathFinder.find_spec("fastlane_ext._C", [str(folder)])
        if spec is None or spec.origin is None:
            raise ImportError(f"no library _C in {folder}")
        if is_cut_short(Path(spec.origin)):
            raise ImportError(f"{spec.origin} is cut short")
        return importlib.import_module("fastlane_ext._C")
    except ImportError as error:
        raise ImportError(
            f"fastlane_ext: the compiled extension does not load ({error}); "
            f"reinstall in the source folder with: {REINSTALL}"
        ) from error


build_record = read_build_record()
if TYPE_CHECKING:
    from . import _C

    library = _C
else:
    library = load(build_record)
library.set_absent(_facts.ABSENT)
_facts.hold = library.hold
