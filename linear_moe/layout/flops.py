"""Forward FLOPs per token: two per active weight of a matrix product, and FLOPs that mixers declare for recurrences."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from linear_moe.config.schema import Config
from linear_moe.config.vocabulary import vocab_size
from linear_moe.modeling.host import DTYPES, Host, spec_of
from linear_moe.modeling.model import LanguageModel


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs per token of a model, over all ranks' shares.

    Attributes:
        layers: FLOPs of each layer, by the parts of `layer_flops`.
        head: FLOPs of the head.
    """

    layers: list[dict[str, float]]
    head: float

    @property
    def total(self) -> float:
        return sum(layer["mixer"] + layer["ffn"] for layer in self.layers) + self.head

    def again(self, layer: int, modules: frozenset[str]) -> float:
        """FLOPs that the backward pass of layer number `layer` repeats, if it recomputes `modules` of `Activations`."""
        parts = self.layers[layer]
        return sum(
            parts[half] if modules & {"layer", half} else parts[part] * (part in modules)
            for half, part in (("mixer", "core"), ("ffn", "experts"))
        )


def active(parameter: nn.Parameter, config: Config) -> int:
    """Elements of `parameter` that one token meets; of the routed experts, only top_k are counted."""
    moe, spec = config.model.moe, spec_of(parameter)
    return parameter.numel() * moe.top_k // moe.num_experts if spec.by_expert else parameter.numel()


def products(parameters: Iterable[nn.Parameter], config: Config) -> float:
    """Forward FLOPs per token of the matrix products with `parameters`; vectors do not count."""
    return 2.0 * sum(active(p, config) for p in parameters if p.dim() >= 2)


def layer_flops(layer: Any, config: Config) -> dict[str, float]:
    """Forward FLOPs per token of a `Layer` at training.sequence_length: "mixer", "core", "ffn" and "experts".

    "core" is the recurrence, or softmax attention, and is part of "mixer". "experts" are the routed experts' gate and
    up projections, and are part of "ffn".
    """
    core = layer.mixer.recurrence_flops(config.training.sequence_length)
    experts = getattr(layer.ffn, "experts", None)
    return {
        "mixer": products(layer.mixer.parameters(), config) + core,
        "core": core,
        "ffn": products(layer.ffn.parameters(), config),
        "experts": 0.0 if experts is None else products([experts.gate_up_proj], config),
    }


def flops_per_token(config: Config) -> float:
    """Model FLOPs per trained token, forward and backward, without recomputation; over all ranks' shares.

    A forward pass has two FLOPs per active weight of a matrix product (the embedding's lookup is none), and the FLOPs
    that mixers declare for their recurrences at training.sequence_length; a backward pass costs twice as many.
    """
    return 3 * forward_flops(config).total


def forward_flops(config: Config, model: LanguageModel | None = None) -> Flops:
    """FLOPs of the forward pass, counted as in `flops_per_token`; `model`: the model on the plain host, if built."""
    model = model or LanguageModel(config.model, vocab_size(config), Host(DTYPES[config.training.dtype], "meta"))
    head = model.embedding if config.model.tie_embeddings else model.head
    return Flops([layer_flops(layer, config) for layer in model.layers.values()], products(_parameters(head), config))


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())
