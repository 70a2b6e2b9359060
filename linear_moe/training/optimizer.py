"""AdamW, and Megatron-Core's optimizer (gradient clipping, fp32 copies, ZeRO-1) around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from torch import Tensor

from linear_moe.config.schema import Config


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) in one fused kernel on GPU and on CPU.

    State as Apex's FusedAdam keeps it, which is what Megatron-Core expects: the step is one int per parameter group,
    so that restoring a group restores the bias correction; `exp_avg` and `exp_avg_sq` per parameter.

    Args:
        params: parameters or groups of them; all tensors of one device and dtype are updated in one call.
        lr, betas, eps, weight_decay: defaults of the groups.
        adam_w_mode, capturable: Apex's flags, which Megatron-Core passes; only True and False, respectively.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        if not adam_w_mode or capturable:
            raise ValueError("AdamW has decoupled weight decay only, and does not run inside a CUDA graph")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` is not supported."""
        if closure is not None:
            raise ValueError("AdamW takes no closure")
        for group in self.param_groups:
            group["step"] += 1  # also where this rank has no parameter of the group: groups stay alike on all ranks
            for tensors in self._by_kind(group["params"]).values():
                parameters, gradients, exp_avgs, exp_avg_sqs = (list(t) for t in zip(*tensors, strict=True))
                step = torch.full((), float(group["step"]), device=parameters[0].device)
                torch._fused_adamw_(
                    parameters,
                    gradients,
                    exp_avgs,
                    exp_avg_sqs,
                    [],
                    [step] * len(parameters),
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                )

    def _by_kind(self, parameters: list[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, ...]]]:
        kinds: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, ...]]] = {}
        for p in parameters:
            if p.grad is None or p.numel() == 0:
                continue
            state = self.state[p]
            if not state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p.data), torch.zeros_like(p.data)
            kinds.setdefault((p.device, p.dtype), []).append((p.data, p.grad, state["exp_avg"], state["exp_avg_sq"]))
        return kinds


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
