"""Content of a checkpoint, cut into shards so that every layout can read the checkpoints of every other layout.

Tensors (Megatron-Core `ShardedTensor`s, with full shapes and global names):
    model.NAME                  the weight, in fp32 (the optimizer's copy where the model trains in bf16)
    optimizer.exp_avg.NAME      Adam's first moment, in the dtype `optimizer.moments`
    optimizer.exp_avg_sq.NAME   Adam's second moment, in this dtype too
    optimizer.momentum.NAME     Muon's momentum, in this dtype too; its parameters have no moments of Adam
Objects: rng/..., one for every rank.

Megatron's own `optimizer.sharded_state_dict` is not used. With bf16 and fp32 parameters in one model, its distributed
optimizer looks fp32 shards up in the wrong order, and its plain optimizer numbers them wrongly; `fully_reshardable`
confuses padded and unpadded offsets when a buffer has more than one bucket (0.16.1 and 0.19.2). Here, a rank owns a
stretch of each flattened parameter, and writes it as the few boxes of the parameter that the stretch consists of.
Nothing is gathered, and nothing is copied.
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
        whole: whether the stretch is the whole local parameter, on every data-parallel rank alike.
        main: fp32 weights `[stop - start]`: an fp32 parameter's own memory, or the optimizer's copy of a bf16 one.
        moments: the optimizer's state by name, each `[stop - start]`.
    """

    start: int
    stop: int
    whole: bool
    main: Tensor
    moments: dict[str, Tensor]


def named_parameters(model: list[Any]) -> dict[str, nn.Parameter]:
    """All parameters of this rank's model chunks, by their global names in the model; a shared one appears once.

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
    """The parts of parameters that this rank's optimizers update, by model parameter (bf16 or fp32)."""
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
    """Yields the stretch [start, stop) of a flattened tensor as (offset, size) of boxes of the tensor, in order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # rows first .. last - 1 lie in the stretch as a whole
    if first > last:  # the stretch lies inside one row
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
    """The parameter's spec, and the place of this rank's share in it.

    Returns:
        the spec; the offset of this rank's share in the full parameter; and this rank's numbers (tensor-parallel,
        data-parallel) among the ranks that hold the same share.
    """
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
    """Shards of this rank's share of the full tensor `key`, which is shaped and split like `parameter`.

    Args:
        data: tensor of the parameter's local shape; or, with `owned`, the flat stretch that `owned` describes.
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
    """Shards `model.NAME` of all of this rank's parameters, in the parameters' own memory; for loading."""
    return {MODEL + name: shard(MODEL + name, p, p) for name, p in named_parameters(model).items()}


def main_weights(model: list[Any], optimizer: MegatronOptimizer) -> Shards:
    """Shards `model.NAME` of the fp32 weights that this rank's optimizer owns; for saving and for loading.

    Parameters that are not trained belong to no optimizer, and are added as they are.
    """
    owned = owned_by_optimizer(optimizer)
    names = named_parameters(model).items()
    shards = {MODEL + name: shard(MODEL + name, owned[p].main, p, owned[p]) for name, p in names if p in owned}
    return shards | {MODEL + name: shard(MODEL + name, p, p) for name, p in names if not p.requires_grad}


def moments(model: list[Any], optimizer: MegatronOptimizer) -> Shards:
    """Shards `optimizer.MOMENT.NAME` of the optimizer state that this rank owns."""
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
    """The optimizer's step, which all parameter groups share; 0 before the first step."""
    steps = {int(g.get("step", 0)) for part in optimizer_parts(optimizer) for g in part.optimizer.param_groups}
    steps = steps - {0} if len(steps) > 1 else steps  # Apex leaves groups without a parameter on this rank at 0
    assert len(steps) <= 1, f"parameter groups at different steps: {sorted(steps)}"
    return steps.pop() if steps else 0


def set_optimizer_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Sets the step of all parameter groups."""
    for part in optimizer_parts(optimizer):
        for group in part.optimizer.param_groups:
            group["step"] = step


def saved_objects() -> list[ShardedObject]:
    """Checkpoint objects of this rank: its random states, and an empty `common_state`.

    Megatron-Core 0.19.2 reads `common_state`, the state that no single rank owns, in every checkpoint; ours has none.
    """
    return [rng_object(rng_state()), ShardedObject("common_state", {}, (1,), (0,), replica_id=dist.get_rank())]


def rng_object(state: dict[str, Any] | None) -> ShardedObject:
    """The checkpoint object of this rank's random states `state`; None: the states are to be loaded."""
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
    """Sets every random generator to a state of `rng_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
