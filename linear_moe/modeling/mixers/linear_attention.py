"""Linear attention: feature maps of queries and keys in place of the softmax (arXiv 2006.16236)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host
from linear_moe.modeling.layers.feature_maps import FEATURE_MAPS, POSITIVE, TRAINED, FeatureMap
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import RMSNorm
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.mixers.checks import check_heads, scaled
from linear_moe.modeling.ops.fused.feature_maps import sum_to_one
from linear_moe.modeling.ops.fused.normalizer import normalized
from linear_moe.modeling.ops.recurrences.decay import decay
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.checks import unused
from linear_moe.options.errors import ConfigError
from linear_moe.options.fields import opt


@dataclass
class LinearAttentionConfig(MixerConfig):
    type: str = opt("linear_attention", "name of the mixer")
    num_heads: int | None = opt(None, "query heads; null: model.num_heads", ge=1, le=2**16)
    num_kv_heads: int | None = opt(None, "key and value heads; null: num_heads", ge=1, le=2**16)
    expand_k: float = opt(1.0, "width of all heads' queries over hidden_size", gt=0, le=64)
    expand_v: float = opt(1.0, "width of all heads' outputs over hidden_size", gt=0, le=64)
    feature_map: str = opt("elu", "feature map of queries and keys", choices=FEATURE_MAPS)
    tie_feature_map_qk: bool = opt(False, "queries and keys share one set of the feature map's weights")
    dpfp_nu: int = opt(4, "shifts of the feature map dpfp", ge=1, le=2**8)
    norm_q: bool = opt(False, "divide a query's features by their sum")
    norm_k: bool = opt(False, "divide a key's features by their sum")
    normalize: bool = opt(
        False, "divide outputs by the sum of their weights; RMSNorm of the output undoes the division"
    )
    normalizer_eps: float = opt(1e-10, "added to the sum by which normalize divides", gt=0)
    output_norm: str = opt("rmsnorm", "norm of each head's output", choices=("rmsnorm", "none"))


class LinearAttention(LinearMixer):
    """Weights are those of flash-linear-attention's `LinearAttention`, under the same names; tied feature maps have the
    name `feature_map_q`. flash-linear-attention's default is feature_map elementwise_product; the paper has elu, with
    normalize and without an output norm."""

    Config = LinearAttentionConfig
    family = "decay"
    formula = "S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t),  o_t = S_t^T phi(q_t) / (z_t^T phi(q_t))"
    paper = "arXiv 2006.16236"

    def __init__(self, config: LinearAttentionConfig, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        self.num_heads = heads = config.num_heads or dims.num_heads
        keys, values = round(dims.hidden_size * config.expand_k), round(dims.hidden_size * config.expand_v)
        self.key_dim, self.value_dim = keys // heads, values // heads
        kv_heads = config.num_kv_heads or heads
        self.heads, self.kv_heads = host.split(heads), host.split(kv_heads)
        column = partial(Linear, host, dims.hidden_size, split="column", std=dims.init_std)
        self.q_proj = column(keys)
        self.k_proj, self.v_proj = column(kv_heads * self.key_dim), column(kv_heads * self.value_dim)
        self.feature_map_q = FeatureMap(config.feature_map, host, self.key_dim, config.dpfp_nu)
        if not config.tie_feature_map_qk:
            self.feature_map_k = FeatureMap(config.feature_map, host, self.key_dim, config.dpfp_nu)
        self.norm: RMSNorm | None = None
        if config.output_norm == "rmsnorm":
            self.norm = RMSNorm(host, self.value_dim, dims.norm_eps, split="shared")
        self.o_proj = Linear(host, values, dims.hidden_size, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: LinearAttentionConfig, dims: Dims, tensor: int, path: str) -> None:
        keys = scaled(f"{path}.expand_k", dims.hidden_size, config.expand_k, "hidden_size")
        values = scaled(f"{path}.expand_v", dims.hidden_size, config.expand_v, "hidden_size")
        heads = config.num_heads or dims.num_heads
        check_heads(f"{path}.num_heads", heads, tensor, {"the key width": keys, "value width": values})
        check_heads(f"{path}.num_kv_heads", config.num_kv_heads or heads, tensor, {"num_heads =": heads})
        if not config.normalize:
            unused(path, config, "normalizer_eps", needs="set normalize")
        if config.feature_map != "dpfp":
            unused(path, config, "dpfp_nu", needs="set feature_map to dpfp")
        if config.feature_map not in TRAINED:
            unused(path, config, "tie_feature_map_qk", needs=f"set feature_map to one of {', '.join(TRAINED)}")
        divides = next((name for name in ("normalize", "norm_q", "norm_k") if getattr(config, name)), None)
        if divides is not None and config.feature_map not in POSITIVE:
            raise ConfigError(
                f"{path}.{divides}",
                True,
                f"features of {config.feature_map} may be negative, so that their sum, the divisor, may be 0",
                fix=f"set feature_map to one of {', '.join(POSITIVE)}",
            )

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], None]:
        rows = (layout.batch, layout.length)
        q = self.feature_map_q(self.q_proj(x).view(*rows, self.heads, self.key_dim))
        map_k = self.feature_map_q if self.config.tie_feature_map_qk else self.feature_map_k
        k = map_k(self.k_proj(x).view(*rows, self.kv_heads, self.key_dim))
        v = self.v_proj(x).view(*rows, self.kv_heads, self.value_dim)
        q = sum_to_one(q) if self.config.norm_q else q
        k = sum_to_one(k) if self.config.norm_k else k
        if self.kv_heads != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=2) for t in (k, v))
        return {"q": q, "k": k, "v": v}, None

    def recurrence(self, inputs: dict[str, Any], layout: TokenLayout, states: Cache) -> tuple[Tensor, Cache]:
        scale = self.feature_map_q.size**-0.5
        if self.config.normalize:
            return normalized(
                decay,
                **inputs,
                scale=scale,
                eps=self.config.normalizer_eps,
                states=states,
                cu_seqlens=layout.cu_seqlens,
            )
        o, state = decay(**inputs, scale=scale, initial_state=states.get("state"), cu_seqlens=layout.cu_seqlens)
        return o, {"state": state}

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        o = o if self.norm is None else self.norm(o)
        return self.o_proj(o.flatten(2).flatten(0, 1))

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        features = (batch, self.heads, self.feature_map_q.size)
        columns = {"state": self.value_dim} | ({"normalizer": 1} if self.config.normalize else {})
        return {name: ((*features, n), torch.float32) for name, n in columns.items()}

    def recurrence_flops(self, length: int) -> float:
        return 4.0 * self.num_heads * self.feature_map_q.size * (self.value_dim + self.config.normalize)
