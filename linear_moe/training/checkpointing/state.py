"""What a checkpoint holds, named and cut into shards so that any layout can read what any other wrote.

Tensors (Megatron-Core `ShardedTensor`s, full shapes, global names):
    model.NAME                  the weight, in fp32 (the optimizer's copy where the model trains in bf16)
    optimizer.exp_avg.NAME      Adam's first moment, in `optimizer.moments`
    optimizer.exp_avg_sq.NAME   Adam's second moment, likewise
    optimizer.momentum.NAME     Muon's momentum, likewise, of the parameters that it updates, which have no others
Objects: rng/... one per rank.

Megatron's own `optimizer.sharded_state_dict` is not used. With bf16 and fp32 parameters in one model, its distributed
optimizer looks fp32 shards up in the wrong order and its plain one numbers them wrongly; `fully_reshardable` confuses
padded and unpadded offsets when a buffer has more than one bucket (0.16.1 and 0.19.2). Here, each rank writes the
stretch of each parameter that it owns, as the few boxes that such a stretch is; nothing is gathered, nothing copied.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor, nn

from linear_moe.modeling.host import ParameterSpec, spec_of
from linear_moe.training.optimizer.build import optimizer_parts, stretches

MODEL = "model."
Shards = dict[str, list[ShardedTensor]]


@dataclass
class Owned:
    """The part of a parameter that this rank's optimizer updates.

    Attributes:
        start, stop: the stretch of the flattened local parameter.
        whole: whether it is all of it, alike on all data-parallel ranks.
        main: fp32 weights `[stop - start]`; shares memory with an fp32 parameter, else is the copy of a bf16 one.
        moments: the optimizer's state by name, each `[stop - start]`.
    """

    start: int
    stop: int
    whole: bool
    main: Tensor
    moments: dict[str, Tensor]


def named_parameters(model: list[Any]) -> dict[str, nn.Parameter]:
    """All parameters of this rank's chunks by their names in the model, which are global; a shared one appears once.

    The chunks may be wrapped in Megatron's DistributedDataParallel.
    """
    names: dict[str, nn.Parameter] = {}
    for chunk in model:
        module = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
        for name, parameter in module.named_parameters():
            assert name not in names, f"{name} is in two chunks"
            names[name] = parameter
    return names


def owned_by_optimizer(optimizer: MegatronOptimizer) -> dict[nn.Parameter, Owned]:
    """What this rank's optimizers hold, by model parameter (bf16 or fp32)."""
    owned: dict[nn.Parameter, Owned] = {}
    for part in optimizer_parts(optimizer):
        for parameter, main, start, stop in stretches(part):
            state = part.optimizer.state[main]
            moments = {key: state[key].detach().view(-1) for key in part.optimizer.state_names(main)}
            whole = not isinstance(part, DistributedOptimizer)
            owned[parameter] = Owned(start, stop, whole, main.detach().view(-1), moments)
    return owned


# -- shards ---------------------------------------------------------------------------------------------------------
def boxes(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The stretch [start, stop) of a flattened tensor as (offset, size) boxes of the tensor, in order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # inside one row
        yield from _in_row(last, start, stop, shape)
        return
    yield from _in_row(first - 1, start, first * row, shape)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(last, last * row, stop, shape)


def _in_row(i: int, start: int, stop: int, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    base = i * math.prod(shape[1:])
    for offset, size in boxes(start - base, stop - base, shape[1:]):
        yield (i, *offset), (1, *size)


def _axis_rank(axis: str) -> int:
    rank = {
        "tensor": mpu.get_tensor_model_parallel_rank,
        "expert": mpu.get_expert_model_parallel_rank,
        "expert_tensor": mpu.get_expert_tensor_parallel_rank,
    }[axis]
    return rank()


def _place(parameter: nn.Parameter) -> tuple[ParameterSpec, list[int], tuple[int, int]]:
    """Its spec, the offset of this rank's share, and this rank's number among the holders of the same share."""
    spec = spec_of(parameter)
    offset = [0] * len(spec.shape)
    for dim, axis in spec.axes.items():
        offset[dim] = _axis_rank(axis) * parameter.shape[dim]
    axes = set(spec.axes.values())
    if axes & {"expert", "expert_tensor"}:
        tensor = 0 if "expert_tensor" in axes else mpu.get_expert_tensor_parallel_rank()
        return spec, offset, (tensor, mpu.get_expert_data_parallel_rank())
    tensor = 0 if "tensor" in axes else mpu.get_tensor_model_parallel_rank()
    return spec, offset, (tensor, mpu.get_data_parallel_rank(with_context_parallel=True))


def shard(key: str, data: Tensor, parameter: nn.Parameter, owned: Owned | None = None) -> list[ShardedTensor]:
    """This rank's share of the full tensor `key`, shaped and split like `parameter`.

    Args:
        data: of the parameter's local shape; or, with `owned`, the flat stretch that it describes.
    """
    spec, base, (tensor, replica) = _place(parameter)
    start, stop = (owned.start, owned.stop) if owned else (0, parameter.numel())
    if owned and not owned.whole:
        replica = 0  # data-parallel ranks hold different stretches
    flat, shards, used = data.detach().view(-1), [], 0
    for offset, size in boxes(start, stop, tuple(parameter.shape)):
        piece = flat[used : used + math.prod(size)]
        used += piece.numel()
        shards.append(
            ShardedTensor(
                key=key,
                data=piece.view(size),
                dtype=data.dtype,
                local_shape=size,
                global_shape=spec.shape,
                global_offset=tuple(b + o for b, o in zip(base, offset, strict=True)),
                axis_fragmentations=None,
                replica_id=(int(getattr(parameter, "shared", False)), tensor, replica),
            )
        )
    assert used == flat.numel(), (key, used, flat.numel())
    return shards


def weights(model: list[Any]) -> Shards:
    """`model.NAME` for all of this rank's parameters, in the parameters' own memory: to load into."""
    return {MODEL + name: shard(MODEL + name, p, p) for name, p in named_parameters(model).items()}


def main_weights(model: list[Any], optimizer: MegatronOptimizer) -> Shards:
    """`model.NAME` for what this rank's optimizer owns, in fp32, and for what none trains: to save, or to load into."""
    owned = owned_by_optimizer(optimizer)
    names = named_parameters(model).items()
    shards = {MODEL + name: shard(MODEL + name, owned[p].main, p, owned[p]) for name, p in names if p in owned}
    return shards | {MODEL + name: shard(MODEL + name, p, p) for name, p in names if not p.requires_grad}


def moments(model: list[Any], optimizer: MegatronOptimizer) -> Shards:
    """`optimizer.MOMENT.NAME` for what this rank's optimizer owns."""
    owned = owned_by_optimizer(optimizer)
    shards: Shards = {}
    for name, p in named_parameters(model).items():
        if p in owned:
            for moment, data in owned[p].moments.items():
                key = f"optimizer.{moment}.{name}"
                shards[key] = shard(key, data, p, owned[p])
    return shards


# -- the rest ---------------------------------------------------------------------------------------------------------
def optimizer_step(optimizer: MegatronOptimizer) -> int:
    """Adam's step, which all groups share."""
    steps = {int(g.get("step", 0)) for part in optimizer_parts(optimizer) for g in part.optimizer.param_groups}
    steps = steps - {0} if len(steps) > 1 else steps  # Apex leaves groups without a parameter on this rank at 0
    assert len(steps) <= 1, f"parameter groups at different steps: {sorted(steps)}"
    return steps.pop() if steps else 0


def set_optimizer_step(optimizer: MegatronOptimizer, step: int) -> None:
    for part in optimizer_parts(optimizer):
        for group in part.optimizer.param_groups:
            group["step"] = step


def saved_objects() -> list[ShardedObject]:
    """This rank's random states; and nothing, under the name where Megatron-Core 0.19.2 looks for what no rank owns."""
    return [rng_object(rng_state()), ShardedObject("common_state", {}, (1,), (0,), replica_id=dist.get_rank())]


def rng_object(state: dict[str, Any] | None) -> ShardedObject:
    """The random states of this rank; None: to be loaded."""
    return ShardedObject("rng", state, (dist.get_world_size(),), (dist.get_rank(),))


def rng_state() -> dict[str, Any]:
    """Every random generator's state: Python, NumPy, PyTorch's CPU and current GPU, Megatron's tracker."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
