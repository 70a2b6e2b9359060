"""Process groups from the configuration, which must have been validated for this number of ranks."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from linear_moe.config.schema import Config
from linear_moe.training.supervision import watch


@dataclass(frozen=True)
class Groups:
    """Places of this rank in the parallel layout.

    `stage` is its pipeline stage. The `data_size` data-parallel ranks take different sequences; the `sequence_size`
    ranks share out the same sequences.
    """

    rank: int
    world: int
    tensor_rank: int
    tensor_size: int
    data_rank: int
    data_size: int
    stage: int
    stages: int
    device: torch.device
    sequence_rank: int = 0
    sequence_size: int = 1

    @property
    def first_stage(self) -> bool:
        return self.stage == 0

    @property
    def last_stage(self) -> bool:
        return self.stage == self.stages - 1


def initialize_groups(config: Config) -> Groups:
    """Starts torch.distributed and Megatron's process groups, and seeds all random generators.

    The ranks are those of torchrun's environment; without one, this process alone. If torch.distributed has been
    started before, it is used as it is.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = watch.backstop(config)
    if not dist.is_initialized():
        options: dict[str, Any] = {"backend": "nccl" if cuda else "gloo", "timeout": timeout}
        if cuda:
            options["device_id"] = device
        if (store := watch.store()) is not None:
            options |= {"store": store, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        elif "WORLD_SIZE" not in os.environ:
            options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(**options)
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    sizes = config.parallel
    ps.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual_pipeline if sizes.virtual_pipeline > 1 else None,
        context_parallel_size=sizes.sequence,
        expert_model_parallel_size=sizes.expert,
        expert_tensor_parallel_size=sizes.expert_tensor,
        distributed_timeout_minutes=timeout.total_seconds() / 60,
        create_gloo_process_groups=False,
    )
    seed = config.training.seed
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - Megatron's datasets use the global generator
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return Groups(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        tensor_rank=ps.get_tensor_model_parallel_rank(),
        tensor_size=ps.get_tensor_model_parallel_world_size(),
        data_rank=ps.get_data_parallel_rank(),
        data_size=ps.get_data_parallel_world_size(),
        stage=ps.get_pipeline_model_parallel_rank(),
        stages=ps.get_pipeline_model_parallel_world_size(),
        device=device,
        sequence_rank=ps.get_context_parallel_rank(),
        sequence_size=ps.get_context_parallel_world_size(),
    )


def destroy() -> None:
    """Undoes `initialize_groups`: destroys Megatron's process groups, and torch.distributed's."""
    from megatron.core import parallel_state as ps

    ps.destroy_model_parallel()
    dist.destroy_process_group()
