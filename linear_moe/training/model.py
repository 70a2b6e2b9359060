"""This rank's part of the model, as Megatron's pipeline schedules and DDP want it."""

from __future__ import annotations

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from linear_moe.config.schema import Config
from linear_moe.modeling.host import initialize
from linear_moe.modeling.mixers.base import Layout
from linear_moe.modeling.model import LanguageModel
from linear_moe.training.host import MegatronHost
from linear_moe.training.megatron_config import transformer_config
from linear_moe.training.parallel import Groups, stage_layers


class MegatronModel(MegatronModule):
    """One pipeline stage of `LanguageModel`, initialised.

    Args:
        config: the configuration.
        vocab_size: rows of the embedding.
        groups: this process's place.
        megatron: Megatron's configuration.
    """

    # Tied embeddings live in one stage, so Megatron has no copies to keep equal.
    share_embeddings_and_output_weights = False

    def __init__(self, config: Config, vocab_size: int, groups: Groups, megatron: TransformerConfig):
        super().__init__(megatron)
        self.pre_process, self.post_process = groups.first_stage, groups.last_stage
        self.micro_batch = config.training.micro_batch
        self.host = MegatronHost(megatron, groups.device, recompute=config.training.recompute == "full")
        layers = stage_layers(config.model.num_layers, groups.stages, groups.stage)
        self.model = LanguageModel(config.model, vocab_size, self.host, layers, self.pre_process, self.post_process)
        initialize(self.model, self.host, config.training.seed)
        self._received: Tensor | None = None

    def set_input_tensor(self, tensor: list[Tensor | None] | Tensor | None) -> None:
        """The schedule hands over what the previous stage sent, `[T / tensor, B, D]`."""
        self._received = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, tokens: Tensor, layout: Layout, labels: Tensor | None = None) -> Tensor:
        """`tokens`, `labels` `[B, T]` -> as LanguageModel.forward; what goes to the next stage is `[T / tensor, B, D]`.

        Stages agree on the order of tokens, so the sent tensor is a view: its first two dimensions have no meaning.
        """
        hidden = None
        if not self.pre_process:
            assert self._received is not None
            hidden = self._received.flatten(0, 1)
        output = self.model(tokens, layout, hidden=hidden, labels=labels)
        if self.post_process:
            return output
        sent = output.view(-1, self.micro_batch, output.shape[-1])
        # The schedule frees the storage of what it has sent, which it must not do to a view.
        return make_viewless_tensor(sent, requires_grad=sent.requires_grad, keep_graph=sent.requires_grad)


def build_model(config: Config, vocab_size: int, groups: Groups) -> list[DistributedDataParallel]:
    """This rank's model chunks (one), wrapped in Megatron's DDP, ready for its schedules.

    The model inside is `chunk.module` (MegatronModel), Megatron's configuration `chunk.config`.
    """
    megatron = transformer_config(config)
    optimizer = config.optimizer
    model = DistributedDataParallel(
        megatron,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=optimizer.distributed,
            overlap_grad_reduce=optimizer.overlap,
            overlap_param_gather=optimizer.overlap and optimizer.distributed,
        ),
        MegatronModel(config, vocab_size, groups, megatron),
    )
    megatron.finalize_model_grads_func = finalize_model_grads
    if optimizer.overlap:
        megatron.no_sync_func = model.no_sync
    return [model]
