"""Measures the memory of a rank: bytes of parameters, gradients and optimizer state, and autograd's peak."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state as ps
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from linear_moe.config.vocabulary import vocab_size
from linear_moe.modeling.moe import router
from linear_moe.modeling.moe.config import MoEConfig
from linear_moe.modeling.ops.kernels import stand_ins
from linear_moe.modeling.tokens import TokenLayout
from linear_moe.training import build as training_model
from linear_moe.training.build import build_model
from linear_moe.training.optimizer.build import build_optimizer, optimizer_parts
from tests.distributed.cases import start


class Kept:
    """Peak of the bytes that autograd saves for backward passes, without the storages at the addresses `known`.

    A storage counts from the first time it is saved until autograd has freed it, even if others hold it too.
    """

    def __init__(self, known: set[int]):
        self.known, self.now, self.peak = known, 0, 0
        self._uses: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if (address := storage.data_ptr()) in self.known:
            return tensor
        holder = _Holder(tensor)
        if address not in self._uses:
            self._uses[address] = 0
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        self._uses[address] += 1
        weakref.finalize(holder, self._release, address, storage.nbytes())
        return holder

    def _release(self, address: int, size: int) -> None:
        self._uses[address] -= 1
        if not self._uses[address]:
            del self._uses[address]
            self.now -= size

    @staticmethod
    def unpack(held: Any) -> Tensor:
        return held.tensor if isinstance(held, _Holder) else held


class _Holder:
    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def balanced(choice: Tensor, config: MoEConfig) -> Tensor:
    """A router's choice in which all experts have the same load.

    The stand-ins for kernels return zeros, from which a real router could not choose.
    """
    slots = torch.arange(choice.shape[0] * config.top_k, device=choice.device)
    return (slots % config.num_experts).view(-1, config.top_k)


def kernels() -> ExitStack:
    """Patches in stand-ins that keep what the GPU's kernels keep, and `balanced` routers."""
    stack = ExitStack()
    stack.enter_context(stand_ins())
    stack.enter_context(mock.patch.object(router, "choose", balanced))
    return stack


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Sizes in bytes of the tensors' storages, by address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


def memory(config: dict[str, Any], bucket: int | None = None) -> dict[str, Any]:
    """Trains one step and measures the memory of this rank.

    Args:
        bucket: number of elements of a DDP bucket, so that there are several; None: Megatron-Core's default, which is
            larger than these models.

    Returns:
        this rank's stage and place, the bytes that it holds after the step, autograd's peak in the step, and the number
        of parameters that are still alive when nobody uses them.
    """
    held = _held(config, bucket)
    gc.collect()
    return held | {"left": sum(isinstance(x, nn.Parameter) for x in gc.get_objects())}


def _held(config: dict[str, Any], bucket: int | None) -> dict[str, Any]:
    tree, groups = start(config)
    ddp = replace(training_model.ddp_config(tree), bucket_size=bucket)
    with mock.patch.object(training_model, "ddp_config", return_value=ddp):
        model = build_model(tree, vocab_size(tree), groups)
    optimizer = build_optimizer(model, tree)
    training = tree.training
    parameters = [p for chunk in model for p in chunk.parameters()]
    weights = storages(parameters)
    gradients = storages(p.main_grad for p in parameters if p.requires_grad)

    def batches() -> Iterator[Tensor]:
        while True:
            yield torch.randint(vocab_size(tree), (training.micro_batch, training.sequence_length + 1))

    def forward(data: Iterator[Tensor], chunk: Any) -> tuple[Tensor, Any]:
        rows = next(data)
        losses = chunk(rows[:, :-1], TokenLayout(rows.shape[0], rows.shape[1] - 1), labels=rows[:, 1:])
        return losses, lambda x: (x.sum(), torch.tensor(x.numel(), dtype=torch.int), x.sum().detach())

    kept = Kept(set(weights))
    with saved_tensors_hooks(kept.pack, kept.unpack), kernels():
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[batches() for _ in model] if len(model) > 1 else batches(),
            model=model,
            num_microbatches=training.global_batch // training.micro_batch // groups.data_size,
            seq_length=training.sequence_length,
            micro_batch_size=training.micro_batch,
            forward_only=False,
        )
    assert kept.now == 0, "something keeps what backward passes have used"
    optimizer.step()
    state: list[Tensor] = []
    for part in optimizer_parts(optimizer):
        state += [p for group in part.optimizer.param_groups for p in group["params"]]
        state += [t for s in part.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    return {
        "stage": groups.stage,
        "place": (groups.data_rank, ps.get_expert_data_parallel_rank()),
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(size for address, size in storages(state).items() if address not in weights),
        "activations": kept.peak,
    }
