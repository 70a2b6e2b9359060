"""Megatron-Core's optimizer (gradient clipping, fp32 copies, ZeRO-1) around our AdamW or Muon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from megatron.core import parallel_state as ps
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from torch import Tensor, nn

from linear_moe.config.schema import Config
from linear_moe.layout.optimizer import orthogonalized
from linear_moe.modeling.host import DTYPES, spec_of
from linear_moe.training.optimizer.adamw import AdamW
from linear_moe.training.optimizer.muon import Muon, Share


def ddp_config(config: Config) -> DistributedDataParallelConfig:
    """Settings of Megatron's DDP: gradients are reduced in fp32, with the distributed optimizer into shards."""
    o = config.optimizer
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=o.distributed,
        overlap_grad_reduce=o.overlap,
        overlap_param_gather=o.overlap and o.distributed,
    )


def build_optimizer(model: list[Any], config: Config) -> MegatronOptimizer:
    """Builds Megatron's optimizer for model chunks wrapped in its DistributedDataParallel with `ddp_config(config)`.

    Weight decay follows each parameter's `spec.decay`. The optimizer's state exists from the start, so that a model
    that does not fit runs out of memory here and not after the first step.
    """
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
    no_decay = ParamKey(predicate=ParamPredicate("no decay", lambda p: not spec_of(p).decay))
    use_foreach()
    optimizer = with_inner(
        inner_optimizer(config),
        lambda: get_megatron_optimizer(
            megatron, model, config_overrides={no_decay: {"wd_mult": 0.0}}, use_gloo_process_groups=False
        ),
    )
    names = {p: name for chunk in model for name, p in chunk.module.named_parameters()}
    for part in optimizer_parts(optimizer):
        describe_optimizer(part, names)
        part.optimizer.initialize()
        # A shard of an fp32 parameter is a view of the parameter. Megatron sets the view's grad and reads it back.
        for p in (p for group in part.optimizer.param_groups for p in group["params"] if not p.is_leaf):
            p.retain_grad()
    for group in optimizer.param_groups:
        # Megatron applies `wd_mult` only in its learning-rate scheduler, which is not used here.
        group["weight_decay"] = o.weight_decay * group["wd_mult"]
    return optimizer


def inner_optimizer(config: Config) -> Callable[..., AdamW]:
    """Constructor, with Apex's arguments, of the inner optimizer that updates the parameters: AdamW or Muon."""
    o = config.optimizer
    moments = DTYPES[o.moments]
    if o.type == "adamw":
        return partial(AdamW, moments=moments)
    return partial(Muon, muon=o.muon, dtype=DTYPES[config.training.dtype], moments=moments)


def with_inner(make: Callable[..., AdamW], build: Callable[[], MegatronOptimizer]) -> MegatronOptimizer:
    """Runs `build` with `make` in the place of Apex's AdamW in Megatron-Core (0.16.1 to 0.19.2), whatever is installed.

    The defect: without Apex and Transformer Engine, Megatron-Core takes `torch.optim.AdamW`, whose step is a tensor per
    parameter. `DistributedOptimizer.load_state_dict` then gives all parameters one shared step tensor, which each of
    them increments, and a resumed run silently starts with a step of 1 again. Besides, the optimizers of Apex and
    Transformer Engine have neither Muon nor stochastically rounded bf16 moments.
    """
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    before = optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER, distributed.Adam
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER, distributed.Adam = make, False, AdamW
    try:
        return build()
    finally:
        optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER, distributed.Adam = before


def use_foreach() -> None:
    """Makes Megatron-Core compute norms, clipping and copies over all tensors at once, without Apex and TE.

    The defect (0.16.1, 0.19.2): Megatron-Core's own stand-ins for Apex's kernels loop over the tensors. The stand-in
    for the norm waits for the device at each tensor; the one for the scaling allocates a copy of each gradient.
    """
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer import optimizer as base

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _foreach_norm
        clip_grads.multi_tensor_scale_impl = base.multi_tensor_scale_impl = _foreach_scale
        base._multi_tensor_copy_this_to_that = _foreach_copy


def _foreach_norm(chunk: int, overflow: Tensor, lists: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    """The L2 norm of all tensors together, `[1]`, with the arguments of Apex's `amp_C.multi_tensor_l2norm`."""
    (tensors,) = lists
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors))).view(1), None


def _foreach_scale(chunk: int, overflow: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    """Writes the tensors of the first list, scaled, to those of the second list, which may be the same list.

    The arguments are those of Apex's `amp_C.multi_tensor_scale`.
    """
    source, target = lists
    if source is not target:
        torch._foreach_copy_(target, source)
    if scale != 1.0:
        torch._foreach_mul_(target, scale)


def _foreach_copy(this: list[Tensor], that: list[Tensor], overflow_buf: Tensor | None = None) -> None:
    """Copies `this` to `that`, with the arguments of Megatron-Core's `_multi_tensor_copy_this_to_that`."""
    if this:
        torch._foreach_copy_(that, this)


def describe_optimizer(part: Any, names: dict[nn.Parameter, str]) -> None:
    """Tells an inner optimizer the parameters to which its tensors belong, and speeds up the copies of its wrapper.

    Args:
        part: one of Megatron's chained optimizers, with our optimizer inside.
        names: the model's parameter names.
    """
    shares: dict[Tensor, Share] = {}
    for parameter, main, start, stop in stretches(part):
        spec = spec_of(parameter)
        name = names[parameter]
        part.optimizer.names[main] = f"{name}/{start}"
        if isinstance(part.optimizer, Muon) and orthogonalized(spec):
            routed = {"expert", "expert_tensor"} & set(spec.axes.values())
            group = ps.get_expert_tensor_parallel_group() if routed else ps.get_tensor_model_parallel_group()
            shares[main] = Share(name, spec, tuple(parameter.shape), start, stop, group)
    distributed = isinstance(part, DistributedOptimizer)
    if isinstance(part.optimizer, Muon):
        part.optimizer.orthogonalize(shares, part.data_parallel_group if distributed else None)
    if distributed:  # only bf16 parameters are copied; fp32 parameters are updated in place
        mains, shards = (
            list(chain.from_iterable(groups))
            for groups in (part.shard_fp32_from_float16_groups, part.shard_float16_groups)
        )
        part._copy_main_params_to_model_params = partial(_foreach_copy, mains, shards)


def stretches(part: Any) -> Iterator[tuple[nn.Parameter, Tensor, int, int]]:
    """Yields (parameter, main, start, stop) for every model parameter of one chained optimizer.

    `main` is the tensor that the inner optimizer updates: the elements [start, stop) of the flattened parameter, in
    fp32.
    """
    for parameter, main in _mains(part):
        start, stop = 0, parameter.numel()
        if isinstance(part, DistributedOptimizer):
            stretch = part._get_model_param_range_map(parameter)["param"]
            start, stop = stretch.start, stretch.end
        yield parameter, main, start, stop


def _mains(part: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yields (parameter, main) of `stretches`, from the attributes of Megatron's three kinds of optimizer."""
    flat = chain.from_iterable
    if isinstance(part, DistributedOptimizer):
        yield from zip(flat(part.model_float16_groups), flat(part.shard_fp32_from_float16_groups), strict=True)
        yield from zip(flat(part.model_fp32_groups), flat(part.shard_fp32_groups), strict=True)
    elif hasattr(part, "float16_groups"):
        yield from zip(flat(part.float16_groups), flat(part.fp32_from_float16_groups), strict=True)
        yield from ((p, p) for p in flat(part.fp32_from_fp32_groups))
    else:
        yield from ((p, p) for group in part.optimizer.param_groups for p in group["params"])


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that `optimizer` chains (for dense and for expert parameters), without those that are empty."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]
