"""Python in a process of its own, to test decisions that are made once in a process."""

import json
import os
import subprocess
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

# No measure: this only ends what hangs, also on a machine that is busy with something else.
HANG_S = 1800


def run_python(code, **environment):
    """Runs code in a fresh interpreter. Returns the last line of its output, read as JSON if it is JSON."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    return json.loads(lines[-1]) if lines else None


def support_program(name, *arguments, **environment):
    """The command and the environment that run a file of this folder as a program."""
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", f"support.{name}", *map(str, arguments)]
    return command, os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment


def run_workers(name, folder, world=2):
    """Runs a file of scenarios in processes that share a gloo group. Returns each process's result of each scenario."""
    programs = [support_program(name, rank, world, folder, OMP_NUM_THREADS="1") for rank in range(world)]
    workers = [
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, environment in programs
    ]
    try:
        outputs = [worker.communicate(timeout=HANG_S)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output[-2000:]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def run_scenarios(scenarios):
    """In a worker: calls every scenario with warnings as errors, and prints each one's exception, or None."""
    import torch
    import torch.distributed as dist

    torch.set_warn_always(True)
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    timeout = timedelta(seconds=HANG_S)
    dist.init_process_group("gloo", f"file://{folder}/group", timeout, world, rank)
    results = {}
    for name, scenario in scenarios.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                scenario()
            results[name] = None
        except BaseException:  # pytest's failures too
            results[name] = traceback.format_exc()
        # Whoever fails alone would leave the others waiting for it in the next scenario.
        dist.barrier()
    print(json.dumps(results), flush=True)
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads outlive an FSDP2 group, and may abort while Python shuts down (pytorch#190489)
