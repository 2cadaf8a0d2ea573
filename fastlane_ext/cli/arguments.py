"""The arguments of ``fastlane``: what each command takes, and which file of commands/ runs it."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import fastlane_ext
from fastlane_ext._activations import ACTIVATIONS
from fastlane_ext._arguments import shortened
from fastlane_ext.experiments import EXPERIMENTS

from .errors import complain
from .limits import LARGEST
from .output import progress

EPILOG = """\
Exit status: 0 if all went well, 1 if something that was checked does not hold, 2 for a
mistake in the call or a missing extra. FASTLANE_CPU_ISA=scalar|neon|avx2|avx512|avx512_bf16 forces a kernel set,
FASTLANE_CPU_ISA=none torch's own operators, as on a CPU without vector kernels of ours,
FASTLANE_PATH=fused|library forces our own products or the library's, FASTLANE_PROFILE=off|PATH chooses between them
without a profile or by the one in PATH, FASTLANE_DISABLE=1 runs eager PyTorch,
FASTLANE_STRICT=1 raises where a call would leave the fused path. Each is read once, when a process first needs it.
"""


DTYPES = ("float32", "float64", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        complain(f"{self.prog}: {message}; see {self.prog} --help")
        self.exit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse's own method ignores a full disk.
        stream = file or sys.stderr
        if message and stream is not None:
            stream.write(message)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # The default of a switch, or of an option that is absent by default, needs no mention.
        return action.help if action.default in (None, True, False) else super()._get_help_string(action)


def _ints(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        return []


def _refused(text: str, expected: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"got {shortened(text)}, expected {expected}")


def _sizes(text: str) -> list[int]:
    sizes = _ints(text)
    if len(sizes) < 2 or min(sizes) < 1:
        raise _refused(text, "two or more positive sizes, as in 1,64,64,1")
    return sizes


def _counts(text: str) -> list[int]:
    counts = _ints(text)
    if not counts or min(counts) < 1:
        raise _refused(text, "numbers of threads, as in 1,2")
    return counts


def _whole(option: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = _ints(text)
        if len(value) != 1 or not 1 <= value[0] <= LARGEST[option]:
            raise _refused(text, f"a whole number from 1 to {LARGEST[option]}")
        return value[0]

    return parse


def _seed(text: str) -> int:
    value = _ints(text)
    if len(value) != 1 or not -(2**63) <= value[0] < 2**64:
        raise _refused(text, "a whole number from -2^63 to 2^64 - 1")
    return value[0]


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= LARGEST["lr"]:
        raise _refused(text, f"a positive number up to {LARGEST['lr']:g}")
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
    from .commands import gradients

    options = {name: getattr(args, name) for name in ("sizes", "seed", "activation", "style", "show", "plot")}
    with progress("gradients", gradients.STEPS, json_output=args.json is not None) as note:
        return gradients.compute(args.experiment, **options, note=note), gradients.render


def _train(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None]]:
    from .commands import train
    from .digits import Options

    options = Options(
        epochs=args.epochs,
        layers=args.layers,
        width=args.width,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
    )
    with progress("train", train.steps(options), json_output=args.json is not None) as note:
        return train.compute(options, compiled=args.compile, plot=args.plot, note=note), train.render


def _bench(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None]]:
    from .commands import bench

    planned = bench.jobs(args.suite, args.threads, dtype=args.dtype, quick=args.quick)
    with progress("bench", len(planned), json_output=args.json is not None) as note:
        result = bench.compute(planned, repeats=args.repeats, quick=args.quick, compiled=args.compile, note=note)
    return result, bench.render


def _tune(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None]]:
    from fastlane_ext.bench import tuning

    from .commands import tune

    points = tuning.grid(list(dict.fromkeys(args.dtype or DTYPES)))
    with progress("tune", len(points), json_output=args.json is not None) as note:
        result = tune.compute(points, threads=args.threads, budget=args.seconds, output=args.output, note=note)
    return result, tune.render


def _check(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None]]:
    from .commands import check

    isas = args.isa or check.available()
    with progress("check", check.steps(isas), json_output=args.json is not None) as note:
        result = check.compute(isas, note)
    return result, lambda r: check.render(r, full=args.full)


def _info(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None]]:
    from .commands import info

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
    p.add_argument("--seed", type=_seed, help="for the parameters and the input")
    p.add_argument("--activation", choices=ACTIVATIONS, help="of every layer")
    p.add_argument("--style", choices=("lines", "full", "table"), help="how values are printed")
    p.add_argument("--show", choices=("eager", "fused"), help="whose gradients the lines hold (default: eager)")
    p.add_argument("--plot", metavar="PATH", help="save a picture; the ending picks the format")
    _json_option(p)

    p = command(
        "train",
        _train,
        "train a deep MLP on handwritten digits, without and with shortcuts",
        "Fused and eager runs see the same parameters, batches and optimiser; exit status 1 if their loss "
        "curves differ by more than fp32 rounding explains.",
    )
    p.add_argument("--epochs", type=_whole("epochs"), default=20, help="passes over the training digits")
    p.add_argument("--layers", type=_whole("layers"), default=30, help="hidden layers")
    p.add_argument("--width", type=_whole("width"), default=64, help="features of a hidden layer")
    p.add_argument("--batch", type=_whole("batch"), default=64, help="digits in a step")
    p.add_argument("--lr", type=_rate, default=1e-3, help="learning rate of SGD with momentum 0.9")
    p.add_argument("--seed", type=_seed, default=0, help="for parameters, split and batches")
    p.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    p.add_argument("--plot", metavar="PATH", help="save loss curves and gradients; the ending picks the format")
    _json_option(p)

    p = command(
        "bench",
        _bench,
        "time the fused layer, networks and models against eager, torch.compile, oneDNN and ONNX Runtime",
        "Contestants take turns; medians and quartiles, peak memory, and which part of the "
        "machine's own limit was reached. All shapes take many minutes; --quick takes one or two.",
    )
    suites = ("layer", "networks", "mlps", "models", "all")
    p.add_argument("--suite", choices=suites, default="all", help="what to time")
    p.add_argument("--threads", type=_counts, help="numbers of threads, as in 1,2 (default: one, and all)")
    p.add_argument("--repeats", type=_whole("repeats"), help="rounds of samples (default: 15; 5 with --quick)")
    p.add_argument("--quick", action="store_true", help="a few shapes, few rounds, all threads")
    p.add_argument(
        "--dtype",
        choices=DTYPES,
        help="run every shape in this dtype (default: the listed ones)",
    )
    p.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    _json_option(p)

    p = command(
        "tune",
        _tune,
        "measure where our own products are faster than the library's on this CPU",
        "Writes a profile, by which later processes choose for each call: a shape may then take another path, with "
        "other rounding. A call takes the same path for any number of threads. Leave the machine idle meanwhile.",
    )
    p.add_argument("--seconds", type=_whole("seconds"), default=120, help="the time to spend; more measures more")
    p.add_argument("--threads", type=_counts, help="numbers of threads, as in 1,2 (default: one, and all)")
    p.add_argument(
        "--dtype",
        action="append",
        choices=DTYPES,
        help="only this dtype (may be repeated; default: all)",
    )
    p.add_argument("--output", metavar="PATH", help="the profile's file (default: the one that later processes read)")
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
