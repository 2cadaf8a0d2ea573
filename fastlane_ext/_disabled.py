"""Whether fused operations are switched off, also while something compiles or exports."""

from __future__ import annotations

import threading

import torch

from ._load import library

_lock = threading.Lock()
blocks = 0
"""How many blocks of `fastlane_ext.disabled` are open, in all threads: a number that torch.compile guards on."""


@torch.compiler.assume_constant_result
def _is_disabled_here() -> bool:
    return library.is_disabled()


def is_disabled() -> bool:
    """Whether this thread is in a block of `fastlane_ext.disabled`, or FASTLANE_DISABLE is set.

    torch.compile reads ``blocks`` in place of the thread's own number, and compiles again when that changes: another
    thread's block may cost speed, never a value.
    """
    if torch.compiler.is_compiling():
        return blocks > 0 or _is_disabled_here()
    return library.is_disabled()


def enter() -> None:
    global blocks
    with _lock:
        blocks += 1
    library.disable(True)


def leave() -> None:
    global blocks
    with _lock:
        blocks -= 1
    library.disable(False)
