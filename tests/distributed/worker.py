"""One rank of `harness.run`: runs the cases of a folder and stores what they return."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from linear_moe.training import platform


def destroy_groups() -> None:
    """All but the default one: Megatron-Core only forgets them, and the threads of each slow the next cases down."""
    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def main(folder: Path) -> None:
    platform.install()
    from megatron.core import parallel_state

    from tests.distributed import cases, checkpoint_cases, layout_cases, pipeline_cases, plan_cases

    modules = (cases, checkpoint_cases, layout_cases, pipeline_cases, plan_cases)
    functions = {k: f for m in modules for k, f in vars(m).items() if getattr(f, "__module__", "") == m.__name__}

    for name, (function, arguments) in torch.load(folder / "cases.pt", weights_only=False).items():
        print(f"case {name} at {time.perf_counter():.1f}", flush=True)
        result = functions[function](**arguments)
        torch.save(result, folder / f"{name}.{dist.get_rank()}.pt")
        parallel_state.destroy_model_parallel()
        destroy_groups()
    dist.barrier()  # a rank that ends early would break the connections of the others
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
