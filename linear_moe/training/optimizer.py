"""Megatron-Core's optimizer (gradient clipping, fp32 copies, ZeRO-1) around our AdamW."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

from linear_moe.config.schema import Config
from linear_moe.training.adamw import AdamW


def use_own_adamw() -> None:
    """Give Megatron-Core (0.16.1 to 0.19.2) our AdamW as if it were Apex's, where neither Apex nor TE is installed.

    The defect: it then falls back on `torch.optim.AdamW`, whose step is a tensor per parameter.
    `DistributedOptimizer.load_state_dict` then gives all parameters one shared step tensor, which each of them
    increments, and a resumed run starts with a step of 1 again, silently.
    """
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = distributed.Adam = AdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True


def ddp_config(config: Config) -> DistributedDataParallelConfig:
    """How gradients are reduced: in fp32, over the data-parallel ranks, into shards with the distributed optimizer."""
    o = config.optimizer
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=o.distributed,
        overlap_grad_reduce=o.overlap,
        overlap_param_gather=o.overlap and o.distributed,
    )


def build_optimizer(model: list[Any], config: Config) -> MegatronOptimizer:
    """Megatron's optimizer for model chunks wrapped in its DistributedDataParallel with `ddp_config(config)`.

    Weight decay follows each parameter's `spec.decay`. The Adam state exists from the start, so that a model that
    does not fit runs out of memory here and not after the first step.
    """
    use_own_adamw()
    o, bf16 = config.optimizer, config.training.dtype == "bf16"
    megatron = MegatronOptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=config.schedule.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.clip,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=o.distributed,
        overlap_param_gather=o.overlap and o.distributed,
    )
    no_decay = ParamKey(predicate=ParamPredicate("no decay", lambda p: not p.spec.decay))  # type: ignore[attr-defined]
    optimizer = get_megatron_optimizer(
        megatron, model, config_overrides={no_decay: {"wd_mult": 0.0}}, use_gloo_process_groups=False
    )
    for part in optimizer_parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)
        for p in (p for group in part.optimizer.param_groups for p in group["params"] if not p.is_leaf):
            p.retain_grad()  # a shard of an fp32 parameter is a view of it; Megatron sets its grad and reads it back
    for group in optimizer.param_groups:
        group["weight_decay"] = o.weight_decay * group["wd_mult"]  # Megatron leaves that to its scheduler
    return optimizer


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that it chains (dense and expert parameters have their own), less those without parameters."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]
