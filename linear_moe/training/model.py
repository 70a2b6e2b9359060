"""This rank's part of the model, as Megatron's pipeline schedules and DDP want it."""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from linear_moe.config.schema import Config
from linear_moe.config.validate import recomputed, stage_layers
from linear_moe.modeling.activations import Activations
from linear_moe.modeling.host import initialize
from linear_moe.modeling.mixers.base import Cache, Layout
from linear_moe.modeling.model import LanguageModel
from linear_moe.training.host import MegatronHost
from linear_moe.training.megatron_config import transformer_config
from linear_moe.training.optimizer import ddp_config
from linear_moe.training.parallel import Groups


class MegatronModel(LanguageModel):
    """One pipeline stage, initialised. `config` is Megatron's configuration: Megatron asks every model for it.

    Args:
        config: the configuration.
        vocab_size: rows of the embedding.
        groups: this process's place.
        megatron: Megatron's configuration.
    """

    config: Any
    model_type = ModelType.encoder_or_decoder
    # Tied embeddings live in one stage, so Megatron has no copies to keep equal.
    share_embeddings_and_output_weights = False

    def __init__(self, config: Config, vocab_size: int, groups: Groups, megatron: TransformerConfig):
        host = MegatronHost(megatron, groups.device, Activations(*recomputed(config)))
        layers = stage_layers(config.model.num_layers, groups.stages, groups.stage)
        super().__init__(config.model, vocab_size, host, layers, groups.first_stage, groups.last_stage)
        self.config = megatron
        self.pre_process, self.post_process = groups.first_stage, groups.last_stage
        self.micro_batch = config.training.micro_batch
        self._received: Tensor | None = None
        initialize(self, host, config.training.seed)

    def set_input_tensor(self, tensor: list[Tensor | None]) -> None:
        """The schedule hands over what the previous stage sent, `[T / tensor, B, D]`."""
        (self._received,) = tensor

    def forward(
        self,
        tokens: Tensor | None,
        layout: Layout,
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
            hidden = self._received.flatten(0, 1)
        output = super().forward(tokens, layout, hidden=hidden, labels=labels, caches=caches, keep=keep)
        if self.post_process:
            return output
        sent = output.view(-1, self.micro_batch, output.shape[-1])
        # The schedule frees the storage of what it has sent, which it must not do to a view.
        return make_viewless_tensor(sent, requires_grad=sent.requires_grad, keep_graph=sent.requires_grad)


def build_model(config: Config, vocab_size: int, groups: Groups) -> list[DistributedDataParallel]:
    """This rank's model chunks (one), wrapped in Megatron's DDP, ready for its schedules.

    The model inside is `chunk.module` (MegatronModel), its host `chunk.module.host` (MegatronHost).
    """
    megatron = transformer_config(config)
    model = DistributedDataParallel(megatron, ddp_config(config), MegatronModel(config, vocab_size, groups, megatron))
    megatron.finalize_model_grads_func = finalize_model_grads
    if config.optimizer.overlap:
        megatron.no_sync_func = model.no_sync
    return [model]
