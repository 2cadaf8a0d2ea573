"""One run of ``fastlane``: arguments in, exit status out."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import fastlane_ext
from fastlane_ext._text import tolerant

from .arguments import parser
from .errors import CommandError, abandon, complain, need
from .files import writable, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit status.

    >>> main(["info", "--json"])  # doctest: +SKIP
    0
    """
    with tolerant(sys.stdout), tolerant(sys.stderr):
        try:
            try:
                return _run(argv)
            finally:
                # Flush here, where an error can still be reported in one line; at the interpreter's end it cannot.
                if sys.stdout is not None:
                    sys.stdout.flush()
        except BrokenPipeError:
            # The reader, such as a pager, was closed early: no error.
            abandon(sys.stdout)
            return 0
        except OSError as error:
            abandon(sys.stdout)
            complain(f"fastlane: cannot write to standard output: {error.strerror or error}")
            return 2
        except KeyboardInterrupt:
            complain("fastlane: interrupted")
            return 130


def _run(argv: Sequence[str] | None) -> int:
    args = parser().parse_args(argv)
    try:
        writable("--json", args.json)
        if sys.stdout is None and args.json in (None, "-"):
            raise CommandError("standard output is closed; open it, or give --json a PATH")
        if args.json is None:
            # Fail before minutes of work, not after.
            need("rich", "cli", "output as tables")
        try:
            fastlane_ext.cpu_isa()
        except RuntimeError as error:
            raise CommandError(str(error)) from error
        try:
            result, render = args.run(args)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise CommandError(str(error)) from error
    except CommandError as error:
        complain(f"fastlane {args.command}: {error}")
        return 2
    except (RuntimeError, MemoryError) as error:
        message = str(error)
        if isinstance(error, MemoryError) or "allocate memory" in message:
            complain(f"fastlane {args.command}: not enough memory; choose smaller sizes")
            return 2
        if not message.startswith("FASTLANE_STRICT"):
            raise
        complain(f"fastlane {args.command}: {message}")
        return 1
    except KeyboardInterrupt:
        complain(f"fastlane {args.command}: interrupted")
        return 130
    try:
        if args.json is None:
            render(result)
        else:
            write_json(result, args.json)
    except CommandError as error:
        complain(f"fastlane {args.command}: {error}")
        return 2
    return 0 if result.get("ok", True) else 1
