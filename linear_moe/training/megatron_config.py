"""The only file that builds Megatron-Core's TransformerConfig: our words into Megatron's."""

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
    """What layers leave for others, as the columns that it takes beside the sent tokens of one rank; {}: one stage."""
    parallel = config.parallel
    share = 1 if tensor_sequence(parallel) else parallel.tensor  # all tokens of some heads; are some tokens sent?
    columns = {name: channels // share for name, channels in crossing(config.model).items()}
    return columns if parallel.pipeline > 1 else {}


def transformer_config(config: Config) -> TransformerConfig:
    """What Megatron's schedules, DDP, gradient finalisation, optimizer and token dispatchers read.

    Our layers do not read it: attention heads and FFN sizes in it stand for nothing.
    """
    model, parallel = config.model, config.parallel
    dtype = DTYPES[config.training.dtype]
    pipeline: dict[str, Any] = {"pipeline_model_parallel_size": parallel.pipeline, "deallocate_pipeline_outputs": True}
    moe: dict[str, Any] = {}
    if any(layer.ffn == "moe" for layer in resolve_layers(model)):
        moe = {
            "num_moe_experts": model.moe.num_experts,
            "moe_router_topk": model.moe.top_k,
            "moe_router_pre_softmax": True,  # the router is ours; without it Megatron refuses top_k = 1
            "moe_router_load_balancing_type": "none",
            "moe_expert_capacity_factor": model.moe.capacity_factor,  # not None: dispatchers count the tokens
            "moe_ffn_hidden_size": model.moe.expert_ffn_size,
            "moe_token_dispatcher_type": "alltoall",
            "expert_model_parallel_size": parallel.expert,
        }
    if parallel.virtual_pipeline > 1:
        pipeline |= {
            "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline,
            # Two stages are each other's next and previous: batched, their messages could be taken for one another.
            "batch_p2p_comm": False,
            "overlap_p2p_comm": True,
            # Overlapped, the schedule would free what it sends before it has waited for the sending to end.
            "deallocate_pipeline_outputs": False,
        }
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size + sum(crossing_columns(config).values()),  # of what stages send each other
        num_attention_heads=parallel.tensor,  # ours may differ by layer; this must only divide
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
        # Gradients are sums over tokens, divided once by the global number of tokens. DDP reads this when it is built.
        calculate_per_token_loss=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        **pipeline,
        **moe,
    )
