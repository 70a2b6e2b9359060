"""Training steps and validations, on Megatron-Core's pipeline schedules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from linear_moe.config.schema import Config
from linear_moe.config.strategies import AttentionStrategy, StateExchangeStrategy
from linear_moe.layout.sequence import in_pieces, order_of, padded_length
from linear_moe.modeling.host import DTYPES
from linear_moe.modeling.tokens import TokenLayout
from linear_moe.training.experts.routing import LayerRouting, routers_of
from linear_moe.training.host import MegatronHost
from linear_moe.training.sequence import pieces
from linear_moe.training.sequence.exchange import SequenceGroup
from linear_moe.training.supervision.faults import StopSignal
from linear_moe.training.supervision.watch import mark

Batch = dict[str, Any]


def token_layout(batch: Batch, line: SequenceGroup | None = None) -> TokenLayout:
    """The layout of a micro-batch from the loader: rows, or packed documents as one row.

    Args:
        line: the ranks that share out the micro-batch's sequences; None: sequences are not cut into pieces.
    """
    rows, length = batch["tokens"].shape
    cu_seqlens = batch.get("cu_seqlens")
    positions = batch["positions"]
    if line is not None:
        return pieces.pieces_layout(batch["cut"], line, positions.device, positions, cu_seqlens)
    if cu_seqlens is None:
        return TokenLayout(rows, length, positions=positions)
    return TokenLayout(1, rows * length, cu_seqlens, batch["max_document"], positions.reshape(1, -1))


def sequence_line(config: Config) -> SequenceGroup | None:
    """The ranks that share out this rank's sequences, with its number among them; None: sequences are not cut."""
    parallel = config.parallel
    if not in_pieces(parallel):
        return None
    alone = parallel.sequence == 1
    group, rank = (None, 0) if alone else (ps.get_context_parallel_group(), ps.get_context_parallel_rank())
    # One rank alone has all pieces of a sequence: with ulysses it attends to the whole sequence in one call.
    attention = AttentionStrategy.ULYSSES if alone else AttentionStrategy(parallel.sequence_attention)
    exchange, dtype = StateExchangeStrategy(parallel.sequence_exchange), DTYPES[parallel.sequence_dtype]
    return SequenceGroup(order_of(parallel), rank, group, exchange, attention, dtype)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _tokens(batch: Batch) -> int:
    """Number of this rank's tokens of a micro-batch, without padding."""
    return batch["loss_mask"].numel() - (sum(batch["cut"].padding) if "cut" in batch else 0)


def masked_loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sums the losses of the counted tokens of a micro-batch, for Megatron's schedule.

    Returns:
        the sum; the number of counted tokens, whose global sum Megatron divides gradients by; and both of them for
        `Stepper`, under "loss".
    """
    total = (losses.flatten() * loss_mask.flatten()).sum()
    tokens = loss_mask.sum()
    return total, tokens.to(torch.int), {"loss": torch.stack([total.detach(), tokens])}


@dataclass
class StepResult:
    """Result of a step or a validation, over all ranks.

    Attributes:
        loss: mean loss per counted token, in nats.
        tokens: number of counted tokens.
        gradient_norm: norm of the gradient before clipping; 0 for a validation.
        stop: whether any rank has received a signal to stop.
    """

    loss: float
    tokens: int
    gradient_norm: float = 0.0
    stop: bool = False


class Stepper:
    """Runs training steps and validations of one model.

    Args:
        config: configuration of the run.
        model: this rank's model chunks, wrapped in DDP.
        optimizer: Megatron's optimizer, or None where only validations run.
        device: device to which micro-batches are copied.
        stop: this rank's signals; a step's result says whether any rank received one.
    """

    def __init__(
        self,
        config: Config,
        model: list[DistributedDataParallel],
        optimizer: Any,
        device: torch.device,
        stop: StopSignal,
    ):
        self.config, self.model, self.optimizer, self.device, self.stop = config, model, optimizer, device, stop
        self.host: MegatronHost = model[0].module.host
        self.routers = routers_of(model)
        self.line = sequence_line(config)
        training = config.training
        self.micro_batches = training.global_batch // (training.micro_batch * ps.get_data_parallel_world_size())

    def forward(self, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        """Runs one micro-batch through this stage's chunk `model`: the `forward_step_func` of Megatron's schedules."""
        mark("forward and backward")
        batch = to_device(next(batches), self.device)
        layout = token_layout(batch, self.line)
        shape = (layout.batch, layout.length)
        losses = model(batch["tokens"].reshape(shape), layout, labels=batch["labels"].reshape(shape))
        return losses, partial(masked_loss, batch["loss_mask"])

    def _run(self, batches: Iterator[Batch], forward_only: bool) -> list[dict[str, Tensor]]:
        """Runs this replica's micro-batches of a global batch through the schedule.

        Returns:
            on the last stage, the dict that `masked_loss` returns for each micro-batch; elsewhere nothing of use.
        """
        training = self.config.training
        mark("reading data")
        share = list(islice(batches, self.micro_batches))
        if not forward_only:
            self.host.counted = self._counted(share)
        return get_forward_backward_func()(
            forward_step_func=self.forward,
            # All chunks of a stage go through the same micro-batches.
            data_iterator=[iter(share) for _ in self.model],
            model=self.model,
            num_microbatches=self.micro_batches,
            seq_length=padded_length(self.config),
            micro_batch_size=training.micro_batch,
            forward_only=forward_only,
        )

    def _counted(self, share: list[Batch]) -> Tensor:
        """Share of the global batch's tokens, padding apart, whose loss counts: a scalar on the device. Collective."""
        counts = [sum(int(batch["loss_mask"].sum()) for batch in share), sum(map(_tokens, share))]
        totals = torch.tensor(counts, dtype=torch.float32).to(self.device, non_blocking=True)
        dist.all_reduce(totals, group=ps.get_data_parallel_group(with_context_parallel=True))
        return totals[0] / totals[1]

    def _totals(self, results: list[dict[str, Tensor]]) -> tuple[float, int, bool]:
        """Sums over all ranks: loss and number of counted tokens, and whether any rank is to stop. Collective.

        Only the last stages, and of tensor-parallel ranks only the first, add their losses.
        """
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        if ps.is_pipeline_last_stage() and ps.get_tensor_model_parallel_rank() == 0:
            for result in results:
                totals[:2] += result["loss"].double()
        totals[2] = self.stop.received is not None
        dist.all_reduce(totals)
        loss, tokens, stops = totals.tolist()
        return loss, int(tokens), stops > 0

    def train(self, batches: Iterator[Batch]) -> StepResult:
        """Runs one optimizer step: forward and backward pass, gradient reduction, clipping and update. Collective."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        for chunk in self.model:
            chunk.train()
        results = self._run(batches, forward_only=False)
        mark("optimizer step")
        _, gradient_norm, _ = self.optimizer.step()
        mark("summing up the step")
        self.host.routing.finish_step(self.routers)
        loss, tokens, stopping = self._totals(results)
        return StepResult(loss / max(tokens, 1), tokens, float(gradient_norm or 0.0), stopping)

    @torch.no_grad()
    def validate(self, batches: Iterator[Batch], global_batches: int) -> StepResult:
        """Computes the mean loss over `global_batches` global batches. Collective."""
        for chunk in self.model:
            chunk.eval()
        loss, tokens = 0.0, 0
        for _ in range(global_batches):
            part, count, _ = self._totals(self._run(batches, forward_only=True))
            loss, tokens = loss + part, tokens + count
        return StepResult(loss / max(tokens, 1), tokens)

    def auxiliary_losses(self) -> dict[str, float]:
        """Mean auxiliary losses since the last call, over all ranks. Collective."""
        return self.host.pop_auxiliary_losses()

    def routing(self) -> list[LayerRouting]:
        """Every MoE layer's routing in the steps since the last call, over all ranks. Collective."""
        return self.host.routing.pop(self.routers)
