"""One rank of `harness.run`: runs the cases of a folder, and stores the values that they return.

The server from which ranks are forked imports this module once, because importing Megatron-Core takes longer than most
cases.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from linear_moe.training import platform

platform.install()
from megatron.core import parallel_state  # noqa: E402

from tests.distributed import (  # noqa: E402
    cases,
    checkpoint_cases,
    exchange_cases,
    layout_cases,
    pipeline_cases,
    plan_cases,
    sequence_cases,
)

MODULES = (cases, checkpoint_cases, exchange_cases, layout_cases, pipeline_cases, plan_cases, sequence_cases)
FUNCTIONS = {k: f for m in MODULES for k, f in vars(m).items() if getattr(f, "__module__", "") == m.__name__}


def destroy_groups() -> None:
    """Destroys all process groups but the default one.

    Megatron-Core only drops its references to them, and the threads of each group would slow the next cases down.
    """
    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def main(folder: Path, rank: int, world: int) -> None:
    """Runs the cases of `folder` as one rank, with its output in a file. Exits with 1 if a case raises an error."""
    os.setsid()  # a process group of its own, so that the rank can be killed with all processes that it starts
    with open(folder / "output", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        run(folder, rank, world)
    except BaseException:
        print(f"rank {rank}:\n{traceback.format_exc()}", flush=True)
        os._exit(1)  # the other ranks may wait for this one


def run(folder: Path, rank: int, world: int) -> None:
    """Starts torch.distributed, with torchrun's environment if there are several ranks, and runs the cases."""
    warnings.simplefilter("ignore")
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        cuda = torch.device("cuda", rank) if torch.cuda.is_available() else None
        if cuda is not None:
            torch.cuda.set_device(cuda)
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group(
            "gloo" if cuda is None else "nccl", store=store, rank=rank, world_size=world, device_id=cuda
        )
    for name, (function, arguments) in torch.load(folder / "cases.pt", weights_only=False).items():
        if rank == 0:
            print(f"case {name} at {time.perf_counter():.1f}", flush=True)
        result = FUNCTIONS[function](**arguments)
        torch.save(result, folder / f"{name}.{rank}.pt")
        parallel_state.destroy_model_parallel()
        destroy_groups()
    dist.barrier()  # a rank that ends early would break the connections of the others
    dist.destroy_process_group()
    sys.stdout.flush()
