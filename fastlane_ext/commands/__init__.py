"""The commands of ``fastlane``, one a file: a function that computes a JSON-able result, one that
renders it.

What they share is here: user errors, the extras, progress, JSON.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastlane_ext._arguments import shortened
from fastlane_ext._files import write_whole
from fastlane_ext._text import for_stream

if TYPE_CHECKING:
    from types import ModuleType

    from rich.console import Console
    from rich.table import Table

Note = Callable[..., None]
"""``note(done=0, text=None)``: move the progress bar by ``done`` steps and say what is going on."""

PLAIN_NOTE_SECONDS = 5.0
# More is a slip of the finger, would run for years, or is no float32.
LARGEST = {"epochs": 10**6, "layers": 10**5, "width": 10**6, "batch": 10**9, "repeats": 10**6, "lr": 1e38}


class CommandError(Exception):
    """A user's mistake or a missing extra: one line on stderr, exit status 2."""


def need(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency; CommandError, naming the extra to install, if it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn"}.get(module.partition(".")[0], module.partition(".")[0])
        raise CommandError(f'{purpose} needs {package}: pip install "fastlane_ext[{extra}]"') from error


def console() -> Console:
    """A rich console on stdout; CommandError without rich."""
    kind = need("rich.console", "cli", "output as tables").Console
    made: Console = kind()
    # Piped into a file or a pager there is no width to ask for, and 80 columns would cut the tables.
    made = made if made.is_terminal else kind(width=160)
    made.on_broken_pipe = _reraise  # type: ignore[method-assign]
    return made


def _reraise() -> NoReturn:
    # rich would end the process with status 1; a reader that left is no error, and main() knows what to do.
    raise


def table(title: str, *columns: str, left: int = 1) -> Table:
    """An empty rich table whose first ``left`` columns are aligned left, the others right."""
    made: Table = need("rich.table", "cli", "output as tables").Table(title=_shown(title), title_justify="left")
    for index, name in enumerate(columns):
        made.add_column(_shown(name), justify="left" if index < left else "right", overflow="fold")
    add_row = made.add_row
    made.add_row = lambda *cells, **options: add_row(*map(_shown, cells), **options)  # type: ignore[method-assign]
    return made


def _shown(cell: Any) -> Any:
    # Columns are measured before they are encoded: "->" is wider than the arrow it stands for.
    return for_stream(cell, sys.stdout) if isinstance(cell, str) else cell


def _plain_notes(title: str, total: int) -> Note:
    finished, last = 0, time.monotonic()

    def note(done: int = 0, text: str | None = None) -> None:
        nonlocal finished, last
        finished += done
        if time.monotonic() - last > PLAIN_NOTE_SECONDS:
            last = time.monotonic()
            with suppress(OSError):
                print(f"{title}: {finished} of {total} done{'; ' + text if text else ''}", file=sys.stderr, flush=True)

    return note


@contextmanager
def progress(title: str, total: int, *, json_output: bool) -> Iterator[Note]:
    """Progress on stderr, as a function ``note(done=0, text=None)``.

    On a terminal it is a bar; elsewhere a plain line every few seconds, or nothing under ``--json``.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield (lambda done=0, text=None: None) if json_output or sys.stderr is None else _plain_notes(title, total)
        return
    rich_progress = need("rich.progress", "cli", "a progress bar")
    errors = need("rich.console", "cli", "a progress bar").Console(stderr=True)
    bar = rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("{task.fields[text]}", style="dim"),
        console=errors,
        transient=True,
    )
    with bar:
        task = bar.add_task(title, total=total, text="")

        def note(done: int = 0, text: str | None = None) -> None:
            bar.update(task, advance=done, **({} if text is None else {"text": text}))

        yield note


def _clean(value: Any) -> Any:
    # JSON proper has no NaN or infinity.
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(result: Mapping[str, Any], path: str) -> None:
    """Write ``result`` as one JSON document to a file, whole or not at all, or to stdout for ``"-"``."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8") if path == "-" else "utf-8"
    text = json.dumps(_clean(result), indent=2, allow_nan=False, ensure_ascii=False)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        # JSON has escapes of its own, and what replaced a character otherwise would be another value.
        text = json.dumps(_clean(result), indent=2, allow_nan=False)
    if path == "-":
        print(text)
        return
    with cannot_write("--json", path):
        write_whole(path, f"{text}\n".encode())


@contextmanager
def cannot_write(option: str, path: str) -> Iterator[None]:
    """CommandError, naming ``option``, for what goes wrong while ``path`` is written."""
    try:
        yield
    except ImportError as error:
        raise CommandError(str(error)) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CommandError(f"{option}: cannot write {path}: {reason}") from error


def writable(option: str, path: str | None) -> None:
    """Refuse a path that cannot be written before minutes of work rather than after; CommandError."""
    if path is None or path == "-":
        return
    try:
        folder = Path(path).absolute().parent
        if not folder.is_dir():
            raise CommandError(f"{option}: got {path}, but the folder {folder} does not exist; make it first")
        if Path(path).is_dir():
            raise CommandError(f"{option}: got {shortened(path)}, which is a folder; give a file's name")
        place = path if os.path.exists(path) else folder
    except OSError as error:
        raise CommandError(f"{option}: cannot write {shortened(path)}: {error.strerror}") from error
    if not os.access(place, os.W_OK):
        raise CommandError(f"{option}: cannot write {path}: no permission to write to {place}")


def picture(option: str, path: str | None) -> None:
    """`writable` for a picture: CommandError too without matplotlib, or for a format that it does not write."""
    if path is None:
        return
    writable(option, path)
    from fastlane_ext import plots

    try:
        plots.picture_format(path)
    except ImportError as error:
        raise CommandError(str(error)) from error
    except ValueError as error:
        raise CommandError(f"{option}: {str(error).removeprefix('path: ')}") from error


def fits(options: str, needed: int) -> None:
    """Refuse what needs more bytes than this machine has before the system ends the process; CommandError."""
    available = memory()
    if available is not None and needed > available:
        raise CommandError(
            f"{options}: needs about {size(needed)} of memory, this machine has {size(available)}; choose smaller ones"
        )


def memory() -> int | None:
    """The bytes of memory that this process may use at most; None where the system does not say."""
    found = []
    with suppress(AttributeError, ValueError, OSError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(ValueError, OSError):
        # A container's limit; "max" is none.
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min(found, default=None)


def seconds(value: float) -> str:
    """A time for people: ``1.23 ms``."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def size(value: int) -> str:
    """A number of bytes for people: ``1.5 MiB``."""
    if value >= 1 << 80:
        return f"2^{value.bit_length() - 1} B"
    for unit, shift in (("EiB", 60), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if value >= 1 << shift:
            return f"{value / (1 << shift):.3g} {unit}"
    return f"{value} B"
