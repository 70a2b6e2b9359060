"""This rank's part of the model, as Megatron's pipeline schedules and DDP want it."""

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
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.training.host import MegatronHost
from linear_moe.training.megatron_config import crossing_columns, transformer_config
from linear_moe.training.optimizer.build import ddp_config
from linear_moe.training.parallel import Groups


class MegatronModel(LanguageModel):
    """One chunk of a pipeline stage, initialised. `config` is Megatron's configuration: it asks every model for it.

    Args:
        config: the configuration.
        vocab_size: rows of the embedding.
        chunk: the layers.
        host: of all chunks of this process.
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
        # Tied embeddings on two stages: Megatron adds up their gradients, and counts one of them in the norm.
        self.share_embeddings_and_output_weights = config.model.tie_embeddings and not (chunk.first and chunk.last)
        if self.share_embeddings_and_output_weights and self.embedding is not None:
            weight: Any = self.embedding.weight
            weight.shared_embedding, weight.shared = True, chunk.last
        initialize(self, host, config.training.seed)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """For Megatron, which asks where embeddings are shared between stages."""
        assert self.embedding is not None
        return self.embedding.weight

    def set_input_tensor(self, tensor: list[Tensor | None]) -> None:
        """The schedule hands over what the previous stage sent, `[T / tensor, B, D]`."""
        (self._received,) = tensor

    def forward(
        self,
        tokens: Tensor | None,
        layout: TokenLayout,
        *,
        hidden: Tensor | None = None,
        labels: Tensor | None = None,
        caches: list[Cache] | None = None,
        keep: int = 0,
    ) -> Tensor:
        """As LanguageModel.forward, but `hidden` comes from the schedule and goes to it as `[T / tensor, B, D]`.

        Stages agree on the order of tokens, so that the sent tensor's first two dimensions have no meaning.
        """
        if not self.pre_process:
            assert self._received is not None and hidden is None
            hidden = self._unpack(self._received.flatten(0, 1), layout)
        output = super().forward(tokens, layout, hidden=hidden, labels=labels, caches=caches, keep=keep)
        if self.post_process:
            return output
        output = self._pack(output, layout)
        sent = output.view(-1, self.micro_batch, output.shape[-1])
        # The schedule frees the storage of what it has sent, which it must not do to a view.
        return make_viewless_tensor(sent, requires_grad=sent.requires_grad, keep_graph=sent.requires_grad)

    def _pack(self, hidden: Tensor, layout: TokenLayout) -> Tensor:
        """`hidden [n, D]` -> `[n, D + columns]`, with what layers have left for later ones; zeros until they do."""
        parts = [hidden]
        for name, columns in self._crossing.items():
            left = layout.shared.get(name)
            parts.append(hidden.new_zeros(len(hidden), columns) if left is None else left.reshape(-1, columns))
        return torch.cat(parts, -1) if len(parts) > 1 else hidden

    def _unpack(self, received: Tensor, layout: TokenLayout) -> Tensor:
        """Undoes `_pack`."""
        if not self._crossing:
            return received
        hidden, *parts = received.split([self._width, *self._crossing.values()], -1)
        for name, part in zip(self._crossing, parts, strict=True):
            if name in self._crossed:
                layout.shared[name] = part.reshape(layout.batch * layout.length, -1)
        return hidden.contiguous()


def build_model(config: Config, vocab_size: int, groups: Groups) -> list[DistributedDataParallel]:
    """This rank's model chunks, in order, wrapped in Megatron's DDP, ready for its schedules.

    The model inside is `chunk.module` (MegatronModel); all share their host, `chunk.module.host` (MegatronHost).
    """
    megatron = transformer_config(config)
    host = MegatronHost(megatron, groups.device, Activations(*recomputed(config)))
    model: list[DistributedDataParallel] = []
    for chunk in stage_chunks(config, groups.stage):
        inner = MegatronModel(config, vocab_size, chunk, host)
        # Reducing a later chunk's gradients overlaps with the chunks before it, so they need no buckets.
        model.append(DistributedDataParallel(megatron, ddp_config(config), inner, disable_bucketing=bool(model)))
    megatron.finalize_model_grads_func = finalize_model_grads
    if config.optimizer.overlap:
        megatron.no_sync_func = [chunk.no_sync for chunk in model] if len(model) > 1 else model[0].no_sync
    return model
