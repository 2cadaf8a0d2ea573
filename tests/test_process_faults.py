"""A process in trouble: no memory left, interrupted, many threads at once, a damaged library."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.subprocesses import HANG_S, run_python

import fastlane_ext as fl
from fastlane_ext._load import REINSTALL

pytestmark = pytest.mark.any_isa

PACKAGE = Path(fl.__file__).parent

# Every operation, in sizes that take each way through the kernels, with the bits that one thread alone gives.
ALL_OPS = """
import json, os, resource, signal, sys, threading
import torch
import fastlane_ext as fl

def leaves(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(s, generator=generator) / s[-1] ** 0.5).to(dtype).requires_grad_() for s in shapes]

def calls():
    layer, stack = fl.linear_gelu_residual, lambda x, *w: fl.residual_stack(x, w)
    mlp = lambda x, a, b: fl.mlp_residual(x, a, None, b, None, x)
    for i, rows in enumerate((3, 40, 500)):
        dtype = (torch.float32, torch.bfloat16, torch.float64)[i]
        yield layer, leaves((rows, 65), (65, 65), (65,), dtype=dtype)
        yield layer, leaves((rows, 300), (400, 300), (400,), dtype=dtype)
        yield fl.linear_gelu_concat, leaves((rows, 33), (70, 33), (70,), dtype=dtype)
        yield stack, leaves((rows, 48), *[(48, 48)] * 4, dtype=dtype)
        yield mlp, leaves((rows, 64), (256, 64), (64, 256), dtype=dtype)

CALLS = list(calls())

def results(number):
    op, tensors = CALLS[number % len(CALLS)]
    y = op(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, y.detach())]

def same(number):
    return all(torch.equal(a, b) for a, b in zip(results(number), EXPECTED[number % len(CALLS)], strict=True))

torch.set_num_threads(1)
EXPECTED = [results(i) for i in range(len(CALLS))]
torch.set_num_threads(2)
"""

HAMMER = """
calls, wrong = int(sys.argv[1]), []
start = threading.Barrier(8)
def work(mine):
    start.wait()
    for number in range(mine, mine + calls):
        if not same(number):
            wrong.append(number)
        if number % 50 == 0:
            torch.set_num_threads(1 + number // 50 % 3)
threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for t in threads: t.start()
for t in threads: t.join()
assert not wrong, wrong
assert fl.stats()["fallback"] == {}
"""


def run_program(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", ALL_OPS + code, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )


@pytest.mark.slow
@pytest.mark.parametrize("calls", [60, pytest.param(1200, marks=pytest.mark.thorough)])
def test_all_operations_in_eight_threads_at_once(calls):
    """Each operation gives the same bits as alone, while torch's number of threads changes."""
    result = run_program(HAMMER, calls)
    assert result.returncode == 0, result.stderr[-3000:]


# Memory

NO_MEMORY = """
def used():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

assert all(same(i) for i in range(len(CALLS)))  # the threads' stacks and arenas exist
op, sizes = {
    "layer": (fl.linear_gelu_residual, [(4096, 700), (900, 700), (900,)]),
    "concat": (fl.linear_gelu_concat, [(4096, 700), (900, 700), (900,)]),
    "stack": (lambda x, *w: fl.residual_stack(x, w), [(60000, 128), (128, 128), (128, 128)]),
    "wide stack": (lambda x, *w: fl.residual_stack(x, w), [(3000, 900), (900, 900), (900, 900)]),
    "mlp": (lambda x, a, b: fl.mlp_residual(x, a, None, b, None, x), [(3000, 300), (2000, 300), (300, 2000)]),
    "narrow mlp": (lambda x, a, b: fl.mlp_residual(x, a, None, b, None, x), [(30000, 64), (128, 64), (64, 128)]),
}[sys.argv[1]]
tensors = leaves(*sizes, dtype=getattr(torch, sys.argv[2]))

def step():
    y = op(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, y.detach())]

failures, messages, successes = 0, set(), 0
_, hard = resource.getrlimit(resource.RLIMIT_AS)
for mebibytes in (0, 0.5, 1, 2, 3, 5, 8, 12, 16, 24, 32, 48, 64, 96, 1000):
    resource.setrlimit(resource.RLIMIT_AS, (used() + int(mebibytes * 2**20), hard))
    try:
        step()
        successes += 1
    except (RuntimeError, MemoryError) as error:
        failures += 1
        messages.add(type(error).__name__ + ": " + (str(error).splitlines() or [""])[0])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    assert all(same(i) for i in range(len(CALLS))), mebibytes
first = step()
torch.set_num_threads(1)
assert all(torch.equal(a, b) for a, b in zip(step(), first))
print(json.dumps([failures, successes, sorted(messages)]))
"""


QUICK = ("layer", "float32")
OPERATIONS = ["layer", "concat", "stack", "wide stack", "mlp", "narrow mlp"]


@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        pytest.param(op, dtype, marks=pytest.mark.slow if (op, dtype) == QUICK else pytest.mark.thorough)
        for op in OPERATIONS
        for dtype in ("float32", "bfloat16")
    ],
)
def test_a_call_without_memory_raises_and_the_next_is_right(op, dtype):
    """Memory may run out anywhere in the call: in a result, in the caller's work memory or in another thread's."""
    result = run_program(NO_MEMORY, op, dtype, MALLOC_ARENA_MAX="1", MALLOC_TRIM_THRESHOLD_="0")
    assert result.returncode == 0, result.stderr[-3000:]
    failures, successes, messages = json.loads(result.stdout.splitlines()[-1])
    assert failures > 0 and successes > 0
    # torch's allocator, and work memory; MemoryError alone is Python's own.
    assert all("can't allocate memory" in m or "std::bad_alloc" in m or m == "MemoryError: " for m in messages)
    assert any("std::bad_alloc" in m for m in messages)


# Signals

INTERRUPTED = """
def large(rows):
    tensors = leaves((rows, 768), (3072, 768), (768, 3072))
    y = fl.mlp_residual(tensors[0], tensors[1], None, tensors[2], None, tensors[0])
    return torch.autograd.grad(y, tensors, y.detach())

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background

def forwards():
    return sum(counts.get("forward", 0) for counts in fl.stats().values())

def interrupt_after(calls):
    # Once so many forwards more are counted: what follows, a backward or the next forward, is under way then.
    last = forwards() + calls
    def wait():
        while forwards() < last:
            pass
        os.kill(os.getpid(), signal.SIGINT)
    waiting = threading.Thread(target=wait)
    waiting.start()
    return waiting

large(64)
seen = 0
for _ in range(3):
    try:
        waiting = interrupt_after(1)
        large(1024)
        waiting.join()  # one that came too late
        while True:
            pass
    except KeyboardInterrupt:
        seen += 1
    assert all(same(i) for i in range(len(CALLS)))
assert seen == 3, seen

wrong, stop = [], threading.Event()
def work(number):
    while not stop.is_set():
        if not same(number):
            wrong.append(number)
        number += 1
threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
for t in threads: t.start()
try:
    interrupt_after(300)
    while True:
        assert same(0)
except KeyboardInterrupt:
    stop.set()
for t in threads: t.join()
assert not wrong and all(same(i) for i in range(len(CALLS)))
print("right")
"""


@pytest.mark.slow
def test_an_interrupt_in_a_call_comes_after_it_and_harms_nothing():
    result = run_program(INTERRUPTED)
    assert (result.returncode, result.stdout.strip()) == (0, "right"), result.stderr[-3000:]


# A damaged installation


def install_copy(folder):
    """A copy of the package that a test may damage: the package, its library and its record."""
    package = folder / "fastlane_ext"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (library,) = package.glob("_C*.so")
    return library, package / "_build_record.json"


def import_errors(folders):
    """The error of importing the package from each folder, each in a fork of a process that has imported torch."""
    return run_python(f"""
import json, os, sys, torch
messages = []
for folder in {[str(folder) for folder in folders]!r}:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        sys.path.insert(0, folder)
        try:
            import fastlane_ext
        except ImportError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    messages.append(os.read(read, 10000).decode())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, (folder, status)
print(json.dumps(messages))
""")


@pytest.mark.slow
def test_a_half_written_library_is_named_in_one_sentence(tmp_path):
    damages = {
        "nothing": lambda data: b"",
        "a page": lambda data: data[:4096],
        "half": lambda data: data[: len(data) // 2],
        "all but its end": lambda data: data[:-4096],
        "another file": lambda data: b"<html>404</html>",
    }
    folders = [tmp_path / name for name in (*damages, "missing")]
    for folder in folders:
        library, _ = install_copy(folder)
        data = library.read_bytes()
        library.unlink()
        if folder.name in damages:
            library.write_bytes(damages[folder.name](data))
    for folder, message in zip(folders, import_errors(folders), strict=True):
        assert message.startswith("fastlane_ext: the compiled extension does not load ("), folder
        assert message.endswith(f"reinstall in the source folder with: {REINSTALL}") and "\n" not in message


@pytest.mark.slow
def test_a_record_that_does_not_fit_is_named_in_one_sentence(tmp_path):
    damages = {
        "half": (lambda text: text[: len(text) // 2], "_build_record.json is damaged; reinstall"),
        "list": (lambda text: "[]", "_build_record.json is damaged; reinstall"),
        "torch": (lambda text: text.replace(f'"{torch.__version__}"', '"1.0.0"'), "built for torch 1.0.0, but torch "),
    }
    folders = [tmp_path / name for name in damages]
    for folder in folders:
        _, record = install_copy(folder)
        record.write_text(damages[folder.name][0](record.read_text()))
    for folder, message in zip(folders, import_errors(folders), strict=True):
        assert damages[folder.name][1] in message and "\n" not in message
