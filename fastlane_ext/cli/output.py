"""Output of commands: tables, and progress on anything longer than two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn

from fastlane_ext._text import for_stream

from .errors import need

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Note = Callable[..., None]
"""``note(done=0, text=None)``: move the progress bar by ``done`` steps and show ``text`` beside the bar."""

PLAIN_NOTE_SECONDS = 5.0


def console() -> Console:
    """A rich console on stdout. Raises CommandError without rich."""
    kind = need("rich.console", "cli", "output as tables").Console
    made: Console = kind()
    # A file or a pager has no width to ask for, and rich's 80 columns would cut the tables.
    made = made if made.is_terminal else kind(width=160)
    made.on_broken_pipe = _reraise  # type: ignore[method-assign]
    return made


def _reraise() -> NoReturn:
    # rich would end the process with status 1, but a reader that left is no error; main() handles the exception.
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
    # rich measures columns before the text is encoded, and "->" is wider than the arrow that it replaces.
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

    On a terminal progress is a bar; elsewhere a plain line every few seconds, or nothing under ``--json``. A command
    needs no rich under ``--json``, so there is no bar without rich either.
    """
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    if sys.stderr is None or (json_output and not (on_terminal and find_spec("rich"))):
        yield lambda done=0, text=None: None
        return
    if not on_terminal:
        yield _plain_notes(title, total)
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
