"""Builds this rank's part of the model, with the interface of Megatron's pipeline schedules and DDP."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from linear_moe.config.schema import Config
from linear_moe.layout.pipeline import Chunk, stage_chunks
from linear_moe.layout.recompute import recomputed
from linear_moe.modeling.activations import Activations
from linear_moe.modeling.host import initialize
from linear_moe.modeling.model import LanguageModel, crossing
from linear_moe.modeling.tokens import TokenLayout
from linear_moe.training.host import MegatronHost
from linear_moe.training.megatron_config import crossing_columns, transformer_config
from linear_moe.training.optimizer.build import ddp_config
from linear_moe.training.parallel import Groups


class MegatronModel(LanguageModel):
    """One chunk of a pipeline stage, initialised.

    The attribute `config` is Megatron's TransformerConfig, which Megatron reads from every model.

    Args:
        config: configuration of the run.
        vocab_size: rows of the embedding.
        chunk: the layers of the chunk, and whether it is the first or the last one of the model.
        host: host that all chunks of this process share.
    """

    config: Any
    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: Config, vocab_size: int, chunk: Chunk, host: MegatronHost):
        super().__init__(config.model, vocab_size, host, chunk.layers, chunk.first, chunk.last)
        self.config = host.config
        self.pre_process, self.post_process = chunk.first, chunk.last
        self.micro_batch = config.training.micro_batch
        self._width, self._crossing = config.model.hidden_size, crossing_columns(config)
        self._crossed = crossing(config.model, chunk.layers.start).keys()
        self._received: Tensor | None = None
        # Tied embeddings lie on the first and on the last stage. Megatron adds up their gradients, and counts only one
        # of the two in the gradient norm.
        self.share_embeddings_and_output_weights = config.model.tie_embeddings and not (chunk.first and chunk.last)
        if self.share_embeddings_and_output_weights and self.embedding is not None:
            weight: Any = self.embedding.weight
            weight.shared_embedding, weight.shared = True, chunk.last
        initialize(self, host, config.training.seed)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The weight of the tied embedding, for Megatron, which sums its gradient over the first and last stage."""
        assert self.embedding is not None
        return self.embedding.weight

    def set_input_tensor(self, tensor: list[Tensor | None]) -> None:
        """Takes the tensor `[T / tensor, B, D]` that the previous stage sent; called by the schedule."""
        (self._received,) = tensor

    def forward(
        self, tokens: Tensor | None, layout: TokenLayout, *, hidden: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Runs LanguageModel.forward on the hidden states that the previous stage sent.

        Between stages hidden states are `[T / tensor, B, D]`, the shape that the schedule expects. All stages order
        tokens alike, so the first two dimensions have no meaning of their own.
        """
        if not self.pre_process:
            assert self._received is not None and hidden is None
            hidden = self._unpack(self._received.flatten(0, 1), layout)
        output = super().forward(tokens, layout, hidden=hidden, **options)
        if self.post_process:
            return output
        output = self._pack(output, layout)
        sent = output.view(-1, self.micro_batch, output.shape[-1])
        # The schedule frees the storage of the output once it has sent it, and refuses a view.
        return make_viewless_tensor(sent, requires_grad=sent.requires_grad, keep_graph=sent.requires_grad)

    def _pack(self, hidden: Tensor, layout: TokenLayout) -> Tensor:
        """Adds columns to `hidden [n, D]` for the tensors in `layout.shared`, which layers leave for later stages.

        Returns `[n, D + columns]`; the columns are zeros until a layer has left its tensor.
        """
        parts = [hidden]
        for name, columns in self._crossing.items():
            left = layout.shared.get(name)
            parts.append(hidden.new_zeros(len(hidden), columns) if left is None else left.reshape(-1, columns))
        return torch.cat(parts, -1) if len(parts) > 1 else hidden

    def _unpack(self, received: Tensor, layout: TokenLayout) -> Tensor:
        """Undoes `_pack`: returns the hidden states `[n, D]`, and puts the other columns into `layout.shared`."""
        if not self._crossing:
            return received
        hidden, *parts = received.split([self._width, *self._crossing.values()], -1)
        for name, part in zip(self._crossing, parts, strict=True):
            if name in self._crossed:
                layout.shared[name] = part.reshape(layout.batch * layout.length, -1)
        return hidden.contiguous()


def build_model(config: Config, vocab_size: int, groups: Groups) -> list[DistributedDataParallel]:
    """Builds this rank's model chunks, in order, each wrapped in Megatron's DDP, ready for Megatron's schedules.

    The model in a chunk is `chunk.module` (MegatronModel). All chunks share one host, `chunk.module.host`
    (MegatronHost).
    """
    megatron = transformer_config(config)
    host = MegatronHost(megatron, groups.device, Activations(*recomputed(config)))
    model: list[DistributedDataParallel] = []
    for chunk in stage_chunks(config, groups.stage):
        inner = MegatronModel(config, vocab_size, chunk, host)
        # The backward pass begins with the last chunk. The reduction of a later chunk's gradients overlaps with the
        # backward pass of the chunks before it as a whole, so only the first chunk needs buckets.
        model.append(DistributedDataParallel(megatron, ddp_config(config), inner, disable_bucketing=bool(model)))
    megatron.finalize_model_grads_func = finalize_model_grads
    if config.optimizer.overlap:
        megatron.no_sync_func = [chunk.no_sync for chunk in model] if len(model) > 1 else model[0].no_sync
    return model
