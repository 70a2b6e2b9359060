"""Parameters, FLOPs and a rank's memory of a configuration, counted on its model built on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from linear_moe.checks.validate import validate
from linear_moe.config.schema import Config
from linear_moe.config.vocabulary import vocab_size
from linear_moe.layout.flops import _parameters, active, forward_flops
from linear_moe.layout.processes import ProcessMesh, parallel_layout, smallest_world
from linear_moe.modeling.host import DTYPES, Host
from linear_moe.modeling.model import LanguageModel
from linear_moe.modeling.pattern import resolve_layers
from linear_moe.plan.memory import rank_bytes
from linear_moe.plan.ranks import RankModels


@dataclass(frozen=True)
class LayerPlan:
    """Types of one layer's mixer and FFN, its parameters, and how many of them one token meets."""

    mixer: str
    ffn: str
    params: int
    active_params: int


@dataclass(frozen=True)
class Plan:
    """Costs of a configuration: parameters, counted once over all ranks, FLOPs, and memory of the fullest rank.

    Attributes:
        active_params: parameters that one token meets; of the routed experts, only top_k are counted.
        forward_flops: FLOPs per token of a forward pass at training.sequence_length; training costs three times that.
        memory: bytes by the KINDS of `memory`.
    """

    layers: list[LayerPlan]
    total_params: int
    active_params: int
    active_params_without_embeddings: int
    forward_flops: float
    vocab_size: int
    layout: ProcessMesh
    memory: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        layout = self.layout
        sizes = {axis: len(groups[0]) for axis, groups in layout.groups.items()}
        return {
            "total_params": self.total_params,
            "active_params": self.active_params,
            "active_params_without_embeddings": self.active_params_without_embeddings,
            "flops_per_token": 3 * self.forward_flops,
            "forward_flops_per_token": self.forward_flops,
            "vocab_size": self.vocab_size,
            "layers": [{"mixer": p.mixer, "ffn": p.ffn, "params": p.params} for p in self.layers],
            "memory_per_rank_bytes": self.memory,
            "world": layout.world,
            "parallel": sizes,
            "groups": layout.groups,
        }


def make_plan(config: Config, world: int | None = None) -> Plan:
    """Makes the plan for `world` ranks (None: the fewest possible); raises ConfigError if the config cannot run so."""
    world = smallest_world(config.parallel) if world is None else world
    validate(config, world, files=False)
    layout = parallel_layout(config, world)
    rows = vocab_size(config)
    model = LanguageModel(config.model, rows, Host(DTYPES[config.training.dtype], "meta"))
    total, active = _count(model, config)
    outside = sum(p.numel() for name in ("embedding", "head") for p in _parameters(getattr(model, name)))
    layers = [
        LayerPlan(layer.mixer.type, layer.ffn, *_count(model.layers[str(i)], config))
        for i, layer in enumerate(resolve_layers(config.model))
    ]
    rank = RankModels(config, rows)
    stages = (rank_bytes(config, layout, rank, stage) for stage in range(layout.pipeline))
    memory = max(stages, key=lambda kinds: kinds["total"])
    flops = forward_flops(config, model).total
    return Plan(layers, total, active, active - outside, flops, rows, layout, memory)


def _count(module: nn.Module, config: Config) -> tuple[int, int]:
    """Counts all parameters of a module, and the parameters that one token meets."""
    parameters = _parameters(module)
    return sum(p.numel() for p in parameters), sum(active(p, config) for p in parameters)
