"""Trains a residual model on one process, or on many with DDP or FSDP2: the same numbers from all of them.

python examples/train.py
torchrun --nproc-per-node 2 examples/train.py --parallel fsdp2 --checkpoint run
python examples/train.py --resume run --steps 400
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastlane_ext as fl

FEATURES, TARGETS = 32, 4


class Model(nn.Module):
    """Residual MLP blocks, each followed by a LayerNorm."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.inlet = fl.LinearGELUResidual(FEATURES, width, shortcut="projection")
        self.blocks = nn.ModuleList(
            nn.Sequential(fl.ResidualMLP(width, 4 * width), nn.LayerNorm(width)) for _ in range(blocks)
        )
        self.head = nn.Linear(width, TARGETS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Teacher:
    """The task: what a fixed random network says of random points. A step's batch follows from its number alone, so
    that a resumed run, and a run of more processes, sees the same data.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.seed = seed
        self.hidden = torch.randn(FEATURES, 64, generator=generator) / FEATURES**0.5
        self.output = torch.randn(64, TARGETS, generator=generator) / 8

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, FEATURES, generator=torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + step))
        return x, (2 * x @ self.hidden).sin() @ self.output


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    launched = "WORLD_SIZE" in os.environ
    parser.add_argument(
        "--parallel",
        choices=("none", "ddp", "fsdp2"),
        default="ddp" if launched else "none",
        help="how processes share the work; default: ddp when started by torchrun, none otherwise",
    )
    parser.add_argument("--steps", type=positive, default=200, help="step to train up to (%(default)s)")
    parser.add_argument("--batch", type=positive, default=256, help="rows a step, of all processes (%(default)s)")
    parser.add_argument("--width", type=positive, default=128, help="features of a block (%(default)s)")
    parser.add_argument("--blocks", type=positive, default=4, help="residual blocks (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW's learning rate (%(default)s)")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient (%(default)s)")
    parser.add_argument("--bf16", action="store_true", help="run under bfloat16 autocast; weights stay float32")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of the task (%(default)s)")
    parser.add_argument("--print-every", type=positive, default=20, metavar="STEPS", help="(%(default)s)")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FOLDER", help="where to save model and optimizer at the end"
    )
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="such a folder, saved with any --parallel")
    arguments = parser.parse_args()
    if arguments.parallel != "none" and not launched:
        parser.error(
            f"--parallel {arguments.parallel}: started as one process, expected torchrun; "
            "use torchrun --nproc-per-node N examples/train.py"
        )
    world = int(os.environ.get("WORLD_SIZE", 1))
    if arguments.parallel == "none" and world > 1:
        parser.error(f"--parallel none: torchrun started {world} processes, expected 1; use ddp or fsdp2")
    if arguments.batch % world:
        parser.error(f"--batch: got {arguments.batch}, expected a multiple of the {world} processes")
    if arguments.resume and not (arguments.resume / ".metadata").is_file():
        parser.error(f"--resume: {arguments.resume} holds no checkpoint; pass what --checkpoint wrote")
    return arguments


@contextlib.contextmanager
def process_group(parallel: str):
    """The device of this process, in a process group; one process is a group too, which saves telling them apart."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if parallel == "none" else {}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **alone)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def make_parallel(model: Model, parallel: str, device: torch.device) -> nn.Module:
    if parallel == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    if parallel == "fsdp2":
        # Around whole blocks: a hook on a layer inside would have to run, and take that layer off the fused path.
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    # These helpers name a parameter alike under DDP, FSDP2 and neither, and dcp cuts tensors anew when it loads.
    weights, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": optimizer_state, "step": step}
    dcp.save(state, checkpoint_id=folder)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    weights, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": optimizer_state, "step": 0}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=optimizer_state)
    return state["step"]


def mean_over_processes(value: Tensor) -> float:
    value = value.detach().clone()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def train(arguments: argparse.Namespace, device: torch.device) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(arguments.seed)  # the same initial weights everywhere
    model = make_parallel(Model(arguments.width, arguments.blocks).to(device), arguments.parallel, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    first = load(arguments.resume, model, optimizer) if arguments.resume else 0
    if first >= arguments.steps:
        sys.exit(f"train.py: error: --steps: got {arguments.steps}, expected more than the {first} of the checkpoint")
    teacher = Teacher(arguments.seed)
    if rank == 0:
        print(f"{arguments.parallel}, {world} process(es), {device.type}, steps {first + 1} to {arguments.steps}")

    for step in range(first + 1, arguments.steps + 1):
        x, target = (t.chunk(world)[rank].to(device) for t in teacher.batch(step, arguments.batch))
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
            loss = nn.functional.mse_loss(model(x).float(), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), arguments.clip)
        optimizer.step()
        if step % arguments.print_every == 0 or step == arguments.steps:
            mean = mean_over_processes(loss)
            if rank == 0:
                print(f"step {step}  loss {mean:.6f}", flush=True)

    if arguments.checkpoint:
        save(arguments.checkpoint, model, optimizer, arguments.steps)
    if rank == 0:
        counts = fl.stats()
        fallback = counts.pop("fallback")
        forward, backward = (sum(path[way] for path in counts.values()) for way in ("forward", "backward"))
        print(f"fused calls on rank 0: {forward} forward, {backward} backward; fallbacks: {fallback or 'none'}")


def main() -> None:
    arguments = parse_arguments()
    with process_group(arguments.parallel) as device:
        try:
            train(arguments, device)
        except (dcp.api.CheckpointException, OSError) as error:
            sys.exit(f"train.py: error: checkpoint: {str(error).splitlines()[-1]}")


if __name__ == "__main__":
    main()
    # DTensor's caches keep FSDP2's group, and so gloo's threads, beyond destroy_process_group. One that frees a tensor
    # while Python shuts down aborts the process (pytorch#190489), so Python does not shut down.
    sys.stdout.flush()
    os._exit(0)
