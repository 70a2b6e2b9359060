"""Translates our configuration into Megatron-Core's TransformerConfig; no other file builds one."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from linear_moe.config.schema import Config
from linear_moe.layout.sequence import tensor_sequence
from linear_moe.modeling.host import DTYPES
from linear_moe.modeling.model import crossing
from linear_moe.modeling.pattern import resolve_layers


def crossing_columns(config: Config) -> dict[str, int]:
    """Columns that stages send beside the hidden states, for the tensors that layers leave for later layers, by name.

    {}: there is one pipeline stage, which sends nothing.
    """
    parallel = config.parallel
    # A rank has all T tokens of such a tensor, with channels / tensor columns. With tensor_sequence it sends only
    # T / tensor rows of hidden states, and the same elements take `channels` columns beside them.
    share = 1 if tensor_sequence(parallel) else parallel.tensor
    columns = {name: channels // share for name, channels in crossing(config.model).items()}
    return columns if parallel.pipeline > 1 else {}


def transformer_config(config: Config) -> TransformerConfig:
    """The configuration that Megatron's schedules, DDP, gradient finalisation, optimizer and token dispatchers read.

    Our layers do not read it: its attention heads and FFN sizes have no meaning.
    """
    model, parallel = config.model, config.parallel
    dtype = DTYPES[config.training.dtype]
    pipeline: dict[str, Any] = {"pipeline_model_parallel_size": parallel.pipeline, "deallocate_pipeline_outputs": True}
    moe: dict[str, Any] = {}
    if any(layer.ffn == "moe" for layer in resolve_layers(model)):
        moe = {
            "num_moe_experts": model.moe.num_experts,
            "moe_router_topk": model.moe.top_k,
            "moe_router_pre_softmax": True,  # not used, for the router is ours; but False is refused with top_k = 1
            "moe_router_load_balancing_type": "none",
            # With None the dispatchers assume top_k choices per token; with a factor they count the choices.
            "moe_expert_capacity_factor": model.moe.capacity_factor,
            "moe_ffn_hidden_size": model.moe.expert_ffn_size,
            "moe_token_dispatcher_type": "alltoall",
            "expert_model_parallel_size": parallel.expert,
        }
    if parallel.virtual_pipeline > 1:
        pipeline |= {
            "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline,
            # With two stages, each one is both the next and the previous stage of the other. In a batch, the messages
            # forwards and backwards could be taken for one another.
            "batch_p2p_comm": False,
            "overlap_p2p_comm": True,
            # With overlap, the schedule would free an output before it has waited for its sending to end.
            "deallocate_pipeline_outputs": False,
        }
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size + sum(crossing_columns(config).values()),  # width of the tensors stages send
        num_attention_heads=parallel.tensor,  # no meaning, as our heads may differ by layer; `tensor` must divide it
        ffn_hidden_size=model.ffn_size,
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        tensor_model_parallel_size=parallel.tensor,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=tensor_sequence(parallel),
        context_parallel_size=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Gradients are sums over tokens, divided once by the global number of tokens. DDP reads this option when DDP is
        # built.
        calculate_per_token_loss=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        **pipeline,
        **moe,
    )
