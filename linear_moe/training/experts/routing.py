"""What this rank's routers do: counted on the device in every micro-batch, read when something is logged."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from torch import Tensor, nn

from linear_moe.modeling.moe.router import Router


@dataclass(frozen=True)
class LayerRouting:
    """A layer's routing since the last reading, over all replicas.

    Attributes:
        layer: global index.
        load: tokens that chose each expert, as a multiple of the mean over experts.
        dropped: share of the choices that were beyond an expert's capacity.
        idle: steps since each expert was last chosen, as far as this process has seen.
        bias: of each expert, where the choice has one.
    """

    layer: int
    load: list[float]
    dropped: float
    idle: list[int]
    bias: list[float] | None

    @property
    def max_load(self) -> float:
        return max(self.load)

    @property
    def entropy(self) -> float:
        """Of the load's distribution, divided by its maximum: 1 is even, 0 is all tokens to one expert."""
        shares = [load / len(self.load) for load in self.load]
        most = math.log(len(shares))
        return sum(-p * math.log(p) for p in shares if p > 0) / most if most else 1.0

    def dead(self, steps: int) -> list[int]:
        """Experts that no token has chosen in the last `steps` steps or more."""
        return [expert for expert, idle in enumerate(self.idle) if idle >= steps]

    def to_json(self) -> dict[str, Any]:
        record = {"load": [round(x, 4) for x in self.load], "max_load": self.max_load, "entropy": self.entropy}
        record |= {"dropped": self.dropped}
        return record if self.bias is None else record | {"bias": self.bias}


def summary(layers: Iterable[LayerRouting], dead_after: int) -> dict[str, Any]:
    """The worst of all layers, for a step's record: {} where there are none."""
    layers = list(layers)
    if not layers:
        return {}
    worst = max(layers, key=lambda layer: layer.max_load)
    return {
        "max_load": worst.max_load,
        "max_load_layer": worst.layer,
        "load_entropy": min(layer.entropy for layer in layers),
        "dropped_fraction": sum(layer.dropped for layer in layers) / len(layers),
        "dead_experts": sum(len(layer.dead(dead_after)) for layer in layers),
    }


def routers_of(model: Iterable[nn.Module]) -> list[Router]:
    """Those of this rank's model chunks."""
    return [module for chunk in model for module in chunk.modules() if isinstance(module, Router)]


class RoutingStatistics:
    """Counts of this rank's layers; nothing here waits for the device but `pop`.

    Args:
        device: of the counts.
        num_layers: of the whole model.
    """

    def __init__(self, device: torch.device, num_layers: int):
        self.device, self.num_layers = device, num_layers
        self._step: dict[int, Tensor] = {}  # layer -> [E + 1] int64: choices, and how many were dropped; this rank
        self._step_load: dict[int, Tensor] = {}  # layer -> [E] int64: choices of all replicas
        self._window: dict[int, Tensor] = {}  # layer -> as `_step`, over all replicas and the steps since `pop`
        self._idle: dict[int, Tensor] = {}  # layer -> [E] int64

    @torch.no_grad()
    def add(self, counts: Tensor, dropped: Tensor | None, layer: int) -> None:
        """One micro-batch, this rank's tokens: choices of each expert `[E]`, and how many were dropped, a scalar."""
        added = torch.cat([counts, counts.new_zeros(1) if dropped is None else dropped.unsqueeze(0)])
        self._step[layer] = self._step[layer] + added if layer in self._step else added

    @torch.no_grad()
    def add_global(self, counts: Tensor, layer: int) -> Tensor:
        """Choices `[E]` of all replicas in the step's micro-batches so far, these `counts` of a rank's tokens added."""
        counts = counts.clone()
        dist.all_reduce(counts, group=ps.get_tensor_and_data_parallel_group(with_context_parallel=True))
        self._step_load[layer] = self._step_load[layer] + counts if layer in self._step_load else counts
        return self._step_load[layer]

    @torch.no_grad()
    def finish_step(self, routers: list[Router]) -> None:
        """After an optimizer step: add up the replicas' counts, and move the biases of the experts' choice.

        Collective over the ranks of a pipeline stage; all of them then hold equal biases.
        """
        if not self._step:
            return
        layers = sorted(self._step)
        counts = torch.stack([self._step[layer] for layer in layers])
        dist.all_reduce(counts, group=ps.get_tensor_and_data_parallel_group(with_context_parallel=True))
        self._step.clear()
        self._step_load.clear()
        by_layer = dict(zip(layers, counts, strict=True))
        for layer, count in by_layer.items():
            load = count[:-1]
            if layer not in self._window:
                self._window[layer], self._idle[layer] = torch.zeros_like(count), torch.zeros_like(load)
            self._window[layer] += count
            self._idle[layer].add_(1).mul_(load == 0)
        for router in routers:
            if router.expert_bias is not None and router.layer in by_layer:
                load = by_layer[router.layer][:-1]
                below_mean = torch.sign(load.sum() - load * len(load))  # of whole numbers: the same on every rank
                router.expert_bias.add_(below_mean, alpha=router.config.bias_update_rate)

    def pop(self, routers: list[Router]) -> list[LayerRouting]:
        """Every layer's routing since the last call, in order, on every rank. Collective over all ranks; waits."""
        mine = {router.layer: router for router in routers if router.layer in self._window}
        experts = max((len(idle) for idle in self._idle.values()), default=0)
        sizes = torch.tensor([experts], device=self.device)
        dist.all_reduce(sizes, op=dist.ReduceOp.MAX)
        experts = int(sizes)
        table = torch.zeros(self.num_layers, 3 * experts + 2, dtype=torch.float64, device=self.device)
        if ps.get_tensor_model_parallel_rank() == 0 and ps.get_data_parallel_rank(with_context_parallel=True) == 0:
            for layer, router in mine.items():
                bias = self._idle[layer].new_zeros(experts) if router.expert_bias is None else router.expert_bias
                known = torch.ones(1, device=self.device)  # whether there is anything in this row, and a bias
                known += 0.0 if router.expert_bias is None else 1.0
                parts = [self._window[layer], self._idle[layer], bias.detach(), known]
                table[layer] = torch.cat([part.double() for part in parts])
        dist.all_reduce(table)
        self._window = {layer: torch.zeros_like(count) for layer, count in self._window.items()}
        return [_layer(i, row, experts) for i, row in enumerate(table.tolist()) if row[-1]]


def _layer(layer: int, row: list[float], experts: int) -> LayerRouting:
    counts, dropped = row[:experts], row[experts]
    total = max(sum(counts), 1.0)
    idle, bias = row[experts + 1 : 2 * experts + 1], row[2 * experts + 1 : 3 * experts + 1]
    return LayerRouting(
        layer=layer,
        load=[count * experts / total for count in counts],
        dropped=dropped / total,
        idle=[int(x) for x in idle],
        bias=bias if row[-1] > 1 else None,
    )
