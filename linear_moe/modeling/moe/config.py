"""Options of mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass

from linear_moe.options.fields import opt


@dataclass
class MoEConfig:
    num_experts: int = opt(8, "number of routed experts", ge=1, le=2**16)
    top_k: int = opt(2, "experts to which each token is sent", ge=1)
    expert_ffn_size: int = opt(256, "hidden size of one expert's SwiGLU", ge=1, le=2**20)
    shared_ffn_size: int = opt(
        0, "hidden size of the always-active shared expert (the sum, if there are several); 0: none", ge=0, le=2**20
    )
    shared_gate: bool = opt(False, "multiply the shared expert's output by a sigmoid gate of the token (Qwen2-MoE)")
    overlap_shared_expert: bool = opt(
        False,
        "on a GPU, compute the shared expert while tokens travel to other ranks' experts and back; results are equal",
    )
    first_dense_layers: int = opt(
        0, "number of first layers that are dense although their channel mixer is model.ffn = moe", ge=0
    )
    layer_frequency: int = opt(
        1, "n: of the layers after first_dense_layers, every n-th one is moe, beginning with the first of them", ge=1
    )
    score: str = opt("softmax", "router score function", choices=("softmax", "sigmoid"))
    top_k_first: bool = opt(
        False,
        "choose by the logits, then take the softmax over the chosen (Mixtral); false: the softmax over all, then "
        "choose (Qwen2-MoE, DeepSeek)",
    )
    normalize_top_k: bool = opt(True, "divide the chosen experts' scores by their sum")
    routed_scaling_factor: float = opt(1.0, "multiplies the weights of the chosen experts", gt=0)
    num_groups: int = opt(1, "equal groups of consecutive experts, of which a token uses top_k_groups", ge=1)
    top_k_groups: int = opt(1, "groups from which the experts of a token are chosen", ge=1)
    group_score: str = opt(
        "max",
        "score of a group: the score of its best expert (DeepSeek-V2), or the sum of its best two (DeepSeek-V3)",
        choices=("max", "sum_top_2"),
    )
    expert_bias: bool = opt(
        False,
        "balance the load without a loss, by a bias for each expert that changes only the choice (arXiv 2408.15664)",
    )
    bias_update_rate: float = opt(0.001, "increase per step of the bias of an expert below the mean load", ge=0)
    aux_loss: float = opt(0.01, "coefficient of the load-balancing loss (Switch Transformer, eq. 4); 0: off", ge=0)
    sequence_aux_loss: float = opt(0.0, "coefficient of the same loss within each sequence (DeepSeek-V2, -V3)", ge=0)
    global_aux_loss: float = opt(
        0.0,
        "coefficient of the same loss with the load of all replicas and of the step's micro-batches so far "
        "(arXiv 2501.11873)",
        ge=0,
    )
    z_loss: float = opt(0.001, "coefficient of the router z-loss (ST-MoE, eq. 5); 0: off", ge=0)
    capacity_factor: float | None = opt(
        None,
        "in training, an expert takes at most this factor times the mean load of a micro-batch, and drops its other "
        "tokens; null, and always in validation and inference: no token is dropped",
        gt=0,
    )
    capacity_pad: bool = opt(
        False,
        "exchange as many rows as the capacity allows between the ranks of parallel.expert and parallel.expert_tensor, "
        "instead of as many as there are: more bytes are sent, but no rank waits for the numbers of rows",
    )
    drop_policy: str = opt(
        "probs",
        "tokens that an expert drops: those with the least weights (probs), or the last ones (position)",
        choices=("probs", "position"),
    )
    experts: str = opt(
        "auto",
        "implementation of the experts. grouped: grouped GEMMs, by our Triton kernels on Hopper, else by PyTorch; "
        "quack: grouped GEMMs of quack-kernels, for bf16 on GPUs of compute capability 9.0 or above; auto: quack on "
        "Hopper where possible, else grouped; sequential: a loop over experts, which defines the result",
        choices=("auto", "grouped", "quack", "sequential"),
    )
    dispatcher: str = opt(
        "auto",
        "how tokens travel to other ranks' experts: each to the ranks of its experts (alltoall), or all tokens to all "
        "ranks (allgather), which needs more memory but does not wait for the device; auto: allgather up to "
        "parallel.expert = 2",
        choices=("auto", "alltoall", "allgather"),
    )


def expert_dispatcher(moe: MoEConfig, expert: int) -> str:
    """Resolves `model.moe.dispatcher` for `expert` ranks to "alltoall" or "allgather"."""
    if moe.dispatcher != "auto":
        return moe.dispatcher
    return "allgather" if expert <= 2 and not moe.capacity_pad else "alltoall"
