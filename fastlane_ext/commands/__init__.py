"""The commands of ``fastlane``, one a file: a function that computes a JSON-able result, one that
renders it.

What they share is here: user errors, the extras, progress, JSON.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

    from rich.console import Console
    from rich.table import Table

Note = Callable[..., None]
"""``note(done=0, text=None)``: move the progress bar by ``done`` steps and say what is going on."""

PLAIN_NOTE_SECONDS = 5.0


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
    made: Console = need("rich.console", "cli", "output as tables").Console()
    # Piped into a file or a pager there is no width to ask for, and 80 columns would cut the tables.
    return made if made.is_terminal else need("rich.console", "cli", "").Console(width=160)


def table(title: str, *columns: str, left: int = 1) -> Table:
    """An empty rich table whose first ``left`` columns are aligned left, the others right."""
    made: Table = need("rich.table", "cli", "output as tables").Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index < left else "right", overflow="fold")
    return made


def _plain_notes(title: str, total: int) -> Note:
    finished, last = 0, time.monotonic()

    def note(done: int = 0, text: str | None = None) -> None:
        nonlocal finished, last
        finished += done
        if time.monotonic() - last > PLAIN_NOTE_SECONDS:
            last = time.monotonic()
            print(f"{title}: {finished} of {total} done{'; ' + text if text else ''}", file=sys.stderr, flush=True)

    return note


@contextmanager
def progress(title: str, total: int, *, json_output: bool) -> Iterator[Note]:
    """Progress on stderr, as a function ``note(done=0, text=None)``.

    On a terminal it is a bar; elsewhere a plain line every few seconds, or nothing under ``--json``.
    """
    if not sys.stderr.isatty():
        yield (lambda done=0, text=None: None) if json_output else _plain_notes(title, total)
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
    """Write ``result`` as one JSON document to a file, or to stdout for ``"-"``."""
    text = json.dumps(_clean(result), indent=2, allow_nan=False, ensure_ascii=False)
    if path == "-":
        print(text)
        return
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"--json: cannot write {path}: {error.strerror}") from error


def writable(option: str, path: str | None) -> None:
    """Refuse a path that cannot be written before minutes of work rather than after; CommandError."""
    if path is None or path == "-":
        return
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise CommandError(f"{option}: got {path}, but the folder {folder} does not exist; make it first")
    if Path(path).is_dir():
        raise CommandError(f"{option}: got {path}, which is a folder; give a file's name")


def seconds(value: float) -> str:
    """A time for people: ``1.23 ms``."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def size(value: int) -> str:
    """A number of bytes for people: ``1.5 MiB``."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if value >= 1 << shift:
            return f"{value / (1 << shift):.3g} {unit}"
    return f"{value} B"
