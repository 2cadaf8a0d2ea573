"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to a temporary file beside ``path`` and rename it; OSError leaves ``path`` as it was.

    A symbolic link stays a link. Devices, pipes, and files in a folder that takes no new file are written directly.
    """
    path = os.path.abspath(os.fspath(path))
    special = os.path.exists(path) and not os.path.isfile(path)
    if special or path.startswith(("/dev/", "/proc/")):
        _write(path, data, "wb")
        return
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name[:64]}.{os.getpid()}.part")
    try:
        try:
            _write(temporary, data, "xb")
        except PermissionError:
            if not os.access(path, os.W_OK):
                raise
            _write(path, data, "wb")
            return
        if os.path.exists(path):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _write(path: str, data: bytes, mode: str) -> None:
    with open(path, mode) as file:
        file.write(data)
