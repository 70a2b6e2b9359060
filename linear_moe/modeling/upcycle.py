"""Sparse upcycling (arXiv 2212.05055): makes the weights of a mixture of experts from a dense SwiGLU.

The experts are copies of the dense FFN, and the router is drawn at random. Experts that are narrower than the dense FFN
(arXiv 2410.07524) are parts of a copy: with a granularity of G, G consecutive experts are one copy, cut along the
hidden size. The G experts have the same router weights, hence the same scores, and a top-k that is a multiple of G
chooses whole copies. A shared expert is one more part, the first. Weights are scaled so that the layer's output equals
the dense FFN's: exactly if the weights of the chosen experts have a fixed sum, and on average if not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.host import ParameterSpec, initial_value
from linear_moe.modeling.moe.config import MoEConfig
from linear_moe.modeling.moe.router import route
from linear_moe.options.errors import ConfigError, nearest

DENSE = ("gate_proj", "up_proj", "down_proj")
SAMPLES = 4096


def granularity(moe: MoEConfig, ffn_size: int) -> int:
    """Number of experts that make up a dense FFN of hidden size `ffn_size`; ConfigError if the sizes do not fit."""
    path, shared = "model.moe", moe.shared_ffn_size
    if shared >= ffn_size:
        constraint = f"must be smaller than the dense ffn_size = {ffn_size}, of which the shared expert takes a part"
        raise ConfigError(f"{path}.shared_ffn_size", shared, constraint, fix=f"nearest valid: {ffn_size - 1}, or 0")
    routed = ffn_size - shared
    size = f"{routed}" if not shared else f"{ffn_size} - {shared} (shared_ffn_size) = {routed}"
    if routed % moe.expert_ffn_size:
        fix = nearest(min(moe.expert_ffn_size, routed + 1), lambda n: routed % n == 0)
        raise ConfigError(
            f"{path}.expert_ffn_size", moe.expert_ffn_size, f"must divide the dense ffn_size {size}", fix=fix
        )
    parts = routed // moe.expert_ffn_size
    why = f"the experts that make up one copy of the dense FFN ({size} / expert_ffn_size {moe.expert_ffn_size})"
    for name in ("num_experts", "top_k"):
        value = getattr(moe, name)
        if value % parts:
            raise ConfigError(
                f"{path}.{name}", value, f"must be divisible by {parts}, {why}", fix=nearest(value, step=parts)
            )
    if moe.num_experts // moe.num_groups % parts:
        constraint = f"groups of {moe.num_experts // moe.num_groups} experts must be divisible by {parts}, {why}"
        fix = nearest(moe.num_groups, lambda n: moe.num_experts % (n * parts) == 0)
        raise ConfigError(f"{path}.num_groups", moe.num_groups, constraint, fix=fix)
    return parts


def is_exact(moe: MoEConfig) -> bool:
    """Whether the weights of a token's experts always have the same sum."""
    return moe.top_k_first or moe.normalize_top_k


class Upcycler:
    """Makes the parameters of a mixture of experts from dense ones.

    Args:
        config: the model with experts.
        parts: number of experts that make up one copy of the dense FFN, from `granularity`.
        seed: seed of the router's weights, which are those that `initialize` draws.
        read: `read(name)` returns a parameter of the dense model, unsharded and in fp32.
    """

    def __init__(self, config: ModelConfig, parts: int, seed: int, read: Callable[[str], Tensor]):
        self.config, self.moe, self.parts, self.seed, self.read = config, config.moe, parts, seed, read
        self._scales: dict[str, float] = {}

    def value(self, prefix: str, name: str, spec: ParameterSpec, index: int = 0) -> Tensor:
        """Returns the value of a parameter of a layer's mixture of experts, in fp32.

        Args:
            prefix: prefix of the layer's parameters, for example "layers.0.".
            name: name of the parameter in the FFN, for example "router.weight".
            spec: specification of the parameter.
            index: index of the expert if `spec.by_expert`; only the slice of this expert is returned.
        """
        shared, size = self.moe.shared_ffn_size, self.moe.expert_ffn_size
        start = shared + index % self.parts * size
        part = slice(0, shared) if name.startswith("shared_expert.") else slice(start, start + size)
        if name == "router.weight":
            drawn = initial_value(f"{prefix}ffn.{name}", spec, self.seed)
            return drawn[:: self.parts].repeat_interleave(self.parts, 0)
        if name == "router.expert_bias" or name == "shared_expert_gate.weight":  # zero weights: the gate is always 1/2
            return torch.zeros(spec.shape)
        gate, up, down = (self.read(f"{prefix}ffn.{dense}.weight") for dense in DENSE)
        # The output is linear in two of the three matrices, up and down: each gets the square root of the scale.
        scale = math.sqrt(self._shared_scale() if name.startswith("shared_expert.") else self._scale(prefix))
        parameters = {
            "experts.gate_up_proj": lambda: torch.stack([gate[part], up[part] * scale]),
            "experts.down_proj": lambda: down[:, part] * scale,
            "shared_expert.gate_proj.weight": lambda: gate[part],
            "shared_expert.up_proj.weight": lambda: up[part] * scale,
            "shared_expert.down_proj.weight": lambda: down[:, part] * scale,
        }
        return parameters[name]()

    def _shared_scale(self) -> float:
        return 2.0 if self.moe.shared_gate else 1.0

    def _scale(self, prefix: str) -> float:
        """Factor of the experts' outputs that makes the weighted sum of a token's experts equal the dense FFN."""
        if is_exact(self.moe):
            return self.parts / self.moe.routed_scaling_factor
        # If the sum of a token's weights is not fixed, its mean is estimated over random logits, with the standard
        # deviation that the norm before the FFN gives to logits.
        if prefix not in self._scales:
            logits = torch.randn(
                SAMPLES, self.moe.num_experts // self.parts, generator=torch.Generator().manual_seed(0)
            )
            std = self.config.init_std * float(self.read(f"{prefix}ffn_norm.weight").norm())
            weights, _ = route(std * logits.repeat_interleave(self.parts, 1), self.moe)
            self._scales[prefix] = self.parts / float(weights.sum(-1).mean())
        return self._scales[prefix]
