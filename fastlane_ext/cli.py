"""The ``fastlane`` command: arguments in, one of ``fastlane_ext.commands`` out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import fastlane_ext
from fastlane_ext import commands
from fastlane_ext.experiments import EXPERIMENTS
from fastlane_ext.reference import ACTIVATIONS

EPILOG = """\
Exit status: 0 if all went well, 1 if something that was checked does not hold, 2 for a
mistake in the call or a missing extra. FASTLANE_CPU_ISA=scalar|avx2|avx512|avx512_bf16 forces a kernel set,
FASTLANE_PATH=fused|library forces our own products or the library's, FASTLANE_DISABLE=1 runs eager PyTorch,
FASTLANE_STRICT=1 raises where a call would leave the fused path.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # A switch or an option that is simply absent has no default worth a word.
        return action.help if action.default in (None, True, False) else super()._get_help_string(action)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        sizes = []
    if len(sizes) < 2 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected two or more positive sizes, as in 1,64,64,1")
    return sizes


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers of threads, as in 1,2")
    return counts


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return value


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="PATH",
        help="write the result as one JSON document to PATH, or to standard output, in place of tables",
    )


def _gradients(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None]]:
    from fastlane_ext.commands import gradients

    options = {name: getattr(args, name) for name in ("sizes", "seed", "activation", "style", "plot")}
    return gradients.compute(args.experiment, **options), gradients.render


def _train(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None]]:
    from fastlane_ext.commands import train

    options = train.Options(
        epochs=args.epochs,
        layers=args.layers,
        width=args.width,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
    )
    with commands.progress("train", train.steps(options), json_output=args.json is not None) as note:
        return train.compute(options, compiled=args.compile, plot=args.plot, note=note), train.render


def _bench(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None]]:
    from fastlane_ext.commands import bench

    planned = bench.jobs(args.suite, args.threads, dtype=args.dtype, quick=args.quick)
    with commands.progress("bench", len(planned), json_output=args.json is not None) as note:
        result = bench.compute(planned, repeats=args.repeats, quick=args.quick, compiled=args.compile, note=note)
    return result, bench.render


def _check(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None]]:
    from fastlane_ext.commands import check

    isas = args.isa or check.available()
    with commands.progress("check", check.steps(isas), json_output=args.json is not None) as note:
        result = check.compute(isas, note)
    return result, lambda r: check.render(r, full=args.full)


def _info(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None]]:
    from fastlane_ext.commands import info

    return info.compute(), info.render


def parser() -> argparse.ArgumentParser:
    """The whole command line; ``prog`` is ``fastlane`` however it was started."""
    top = _Parser(
        prog="fastlane",
        description="shortcut + GELU(x Wᵀ + b) as one fused operation: look at it, check it, time it.",
        epilog=EPILOG,
    )
    top.add_argument("--version", action="version", version=f"fastlane_ext {fastlane_ext.__version__}")
    sub = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[..., Any], summary: str, description: str) -> argparse.ArgumentParser:
        made = sub.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {description}",
            formatter_class=_Help,
        )
        made.set_defaults(run=run)
        return made

    p = command(
        "gradients",
        _gradients,
        "print each layer's mean |gradient|, without and with shortcuts",
        "Runs an experiment with the fused networks and checks them against the eager ones; exit status 1 if they "
        "disagree. An option that an experiment does not have is refused.",
    )
    described = "; ".join(f"{name}: {each.summary}" for name, each in EXPERIMENTS.items())
    p.add_argument("--experiment", choices=tuple(EXPERIMENTS), default="example", help=described)
    p.add_argument("--sizes", type=_sizes, help="input size, then each layer's, as in 1,64,64,1")
    p.add_argument("--seed", type=int, help="for the parameters and the input")
    p.add_argument("--activation", choices=ACTIVATIONS, help="of every layer")
    p.add_argument("--style", choices=("lines", "full", "table"), help="how values are printed")
    p.add_argument("--plot", metavar="PATH", help="save a picture; the ending picks the format")
    _json_option(p)

    p = command(
        "train",
        _train,
        "train a deep MLP on handwritten digits, without and with shortcuts",
        "Fused and eager runs see the same parameters, batches and optimiser; exit status 1 if their loss "
        "curves differ by more than fp32 rounding explains.",
    )
    p.add_argument("--epochs", type=_positive, default=20, help="passes over the training digits")
    p.add_argument("--layers", type=_positive, default=30, help="hidden layers")
    p.add_argument("--width", type=_positive, default=64, help="features of a hidden layer")
    p.add_argument("--batch", type=_positive, default=64, help="digits in a step")
    p.add_argument("--lr", type=float, default=1e-3, help="learning rate of SGD with momentum 0.9")
    p.add_argument("--seed", type=int, default=0, help="for parameters, split and batches")
    p.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    p.add_argument("--plot", metavar="PATH", help="save loss curves and gradients; the ending picks the format")
    _json_option(p)

    p = command(
        "bench",
        _bench,
        "time the fused layer, networks and models against eager, torch.compile, F.linear and oneDNN",
        "Contestants take turns in one process; medians and quartiles, peak memory, and which part of the "
        "machine's own limit was reached. All shapes take many minutes; --quick takes one or two.",
    )
    p.add_argument("--suite", choices=("layer", "networks", "models", "all"), default="all", help="what to time")
    p.add_argument("--threads", type=_counts, help="numbers of threads, as in 1,2 (default: one, and all)")
    p.add_argument("--repeats", type=_positive, help="rounds of samples (default: 15; 5 with --quick)")
    p.add_argument("--quick", action="store_true", help="a few shapes, few rounds, all threads")
    p.add_argument(
        "--dtype",
        choices=("float32", "float64", "bfloat16", "float16"),
        help="run every shape in this dtype (default: the listed ones)",
    )
    p.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    _json_option(p)

    p = command(
        "check",
        _check,
        "measure the promised accuracy on every instruction set of this machine",
        "Every dtype, activation and gradient against fp64, next to eager's own error; sweeps of GELU alone; "
        "the published table; the same bits for any number of threads. Exit status 1 if one promise fails.",
    )
    p.add_argument("--isa", action="append", help="only this instruction set (may be repeated; default: all)")
    p.add_argument("--full", action="store_true", help="show every row, not just the worst of each group")
    _json_option(p)

    p = command("info", _info, "print versions, kernels, threads and what was compiled", "")
    _json_option(p)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit status.

    >>> main(["info", "--json"])  # doctest: +SKIP
    0
    """
    args = parser().parse_args(argv)
    try:
        commands.writable("--json", args.json)
        if args.json is None:
            # Before minutes of work, not after.
            commands.need("rich", "cli", "output as tables")
        try:
            fastlane_ext.cpu_isa()
        except RuntimeError as error:
            raise commands.CommandError(str(error)) from error
        result, render = args.run(args)
        if args.json is None:
            render(result)
        else:
            commands.write_json(result, args.json)
        return 0 if result.get("ok", True) else 1
    except commands.CommandError as error:
        print(f"fastlane {args.command}: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        message = str(error)
        if isinstance(error, MemoryError) or "allocate memory" in message:
            print(f"fastlane {args.command}: not enough memory; choose smaller sizes", file=sys.stderr)
            return 2
        if not message.startswith("FASTLANE_STRICT"):
            raise
        print(f"fastlane {args.command}: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"fastlane {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # A pager that was closed early is no error; keep the interpreter from flushing into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
