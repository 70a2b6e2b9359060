"""Constraints on the FFNs: routers, experts and grouped GEMMs."""

from __future__ import annotations

from linear_moe.config.schema import Config
from linear_moe.layout.sequence import tensor_sequence
from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.host import DTYPES
from linear_moe.modeling.moe.config import MoEConfig
from linear_moe.modeling.pattern import ResolvedLayer
from linear_moe.options.checks import check, check_divisible, check_most, unused
from linear_moe.options.errors import ConfigError, nearest


def check_ffn(config: Config, layers: list[ResolvedLayer]) -> None:
    """Raises ConfigError for FFN, router and expert options that do not fit each other or the parallel sizes."""
    moe, parallel, kinds = config.model.moe, config.parallel, {layer.ffn for layer in layers}
    check_most("model.moe.first_dense_layers", moe.first_dense_layers, "model.num_layers - 1", len(layers) - 1)
    if "dense" in kinds:
        check_divisible("model.ffn_size", config.model.ffn_size, "parallel.tensor", parallel.tensor)
    if "moe" not in kinds:
        for name in ("expert", "expert_tensor"):
            if getattr(parallel, name) > 1:
                value = getattr(parallel, name)
                raise ConfigError(f"parallel.{name}", value, "no layer has experts", fix="set it to 1")
        return
    _check_router(moe)
    check_divisible("model.moe.num_experts", moe.num_experts, "parallel.expert", parallel.expert)
    expert_tensor = parallel.expert_tensor
    if moe.experts != "sequential":
        check_grouped_gemm(config.model, config.training.dtype, expert_tensor)
    check_divisible("model.moe.expert_ffn_size", moe.expert_ffn_size, "parallel.expert_tensor", expert_tensor)
    check_divisible("model.moe.shared_ffn_size", moe.shared_ffn_size, "parallel.tensor", parallel.tensor)
    if parallel.tensor > 1 and not tensor_sequence(parallel):
        constraint = "experts with parallel.tensor > 1 need activations sharded by tokens"
        raise ConfigError("parallel.tensor_sequence", False, constraint, fix="set it to true or null")


def _check_router(moe: MoEConfig) -> None:
    path, groups = "model.moe", moe.num_groups
    check_most(f"{path}.top_k", moe.top_k, f"{path}.num_experts", moe.num_experts)
    constraint = f"must divide {path}.num_experts = {moe.num_experts}"
    check(f"{path}.num_groups", groups, lambda n: moe.num_experts % n == 0, constraint)
    check_most(f"{path}.top_k_groups", moe.top_k_groups, f"{path}.num_groups", groups)
    per_group = moe.num_experts // groups
    if moe.top_k > moe.top_k_groups * per_group:
        constraint = f"must be <= {moe.top_k_groups} groups (top_k_groups) of {per_group} experts"
        fix = f"nearest valid: {moe.top_k_groups * per_group}, or {path}.top_k_groups={-(-moe.top_k // per_group)}"
        raise ConfigError(f"{path}.top_k", moe.top_k, constraint, fix=fix)
    if groups == 1:
        unused(path, moe, "group_score", needs="set num_groups")
    elif moe.group_score == "sum_top_2" and per_group < 2:
        constraint = f"groups have one expert (num_experts {moe.num_experts}, num_groups {groups})"
        raise ConfigError(f"{path}.group_score", moe.group_score, constraint, fix="set it to max")
    if moe.top_k_first and moe.score != "softmax":
        raise ConfigError(f"{path}.top_k_first", True, "needs score: softmax", fix="set it to false")
    if moe.top_k == 1 and (moe.top_k_first or moe.normalize_top_k):
        name = "top_k_first" if moe.top_k_first else "normalize_top_k"
        constraint = "with top_k = 1 every weight is 1 and the router cannot learn"
        raise ConfigError(f"{path}.{name}", True, constraint, fix="set it to false, or raise top_k")
    if moe.top_k_first:
        unused(path, moe, "normalize_top_k", needs="set top_k_first=false: weights over the chosen sum to 1")
    if not moe.shared_ffn_size:
        unused(path, moe, "shared_gate", "overlap_shared_expert", needs="set shared_ffn_size")
    if not moe.expert_bias:
        unused(path, moe, "bias_update_rate", needs="set expert_bias")
    if moe.capacity_factor is None:
        unused(path, moe, "capacity_pad", "drop_policy", needs="set capacity_factor")
    elif moe.capacity_factor >= (most := moe.num_experts / moe.top_k):
        constraint = f"must be < num_experts / top_k = {most:g}: no expert is chosen by more than all tokens"
        raise ConfigError(f"{path}.capacity_factor", moe.capacity_factor, constraint, fix="set it to null: dropless")
    if moe.capacity_pad and moe.dispatcher == "allgather":
        constraint = "pads the exchange of the dispatcher alltoall"
        raise ConfigError(
            f"{path}.capacity_pad", True, constraint, fix=f"set it to false, or {path}.dispatcher=alltoall"
        )


def check_grouped_gemm(model: ModelConfig, dtype: str, expert_tensor: int = 1) -> None:
    """Raises ConfigError for experts that grouped GEMMs cannot compute, as they read multiples of 16 bytes."""
    experts = model.moe.experts
    if experts == "quack" and dtype != "bf16":
        raise ConfigError("model.moe.experts", experts, f"multiplies bf16, not {dtype}", fix="set it to auto")
    multiple = 16 // DTYPES[dtype].itemsize
    for path, value, share in (
        ("model.hidden_size", model.hidden_size, 1),
        ("model.moe.expert_ffn_size", model.moe.expert_ffn_size, expert_tensor),
    ):
        if value % (step := multiple * share):
            split = f" times parallel.expert_tensor {share} = {step}" if share > 1 else ""
            constraint = f"must be divisible by {multiple} ({dtype}: 16 bytes){split} for model.moe.experts={experts}"
            fix = f"{nearest(value, step=step)}, or model.moe.experts=sequential"
            raise ConfigError(path, value, constraint, fix=fix)
