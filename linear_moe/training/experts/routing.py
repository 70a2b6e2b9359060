"""Statistics of this rank's routers, counted on the device in every micro-batch, and read when a step is logged."""

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
        layer: global index of the layer.
        load: tokens that chose each expert, as a multiple of the mean over experts.
        dropped: share of the choices that were beyond an expert's capacity.
        idle: steps since each expert was last chosen, counted from the start of this process.
        bias: bias of each expert in the choice; None: the router has no biases.
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
        """Entropy of the load, divided by its maximum: 1 is an even load, 0 is all tokens to one expert."""
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
    """Routing figures over all layers for a step's record; {} if no layer has experts.

    They are the largest load and its layer, the smallest entropy, the mean share of dropped choices, and the number of
    dead experts.
    """
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
    """All routers in this rank's model chunks."""
    return [module for chunk in model for module in chunk.modules() if isinstance(module, Router)]


class RoutingStatistics:
    """Counts of the choices of this rank's routers. Only `pop` makes the host wait for the device.

    Args:
        device: device of the counts.
        num_layers: number of layers of the whole model.
    """

    def __init__(self, device: torch.device, num_layers: int):
        self.device, self.num_layers = device, num_layers
        # All by layer. [E + 1] int64: choices of each expert, and last the dropped ones, of this rank in this step.
        self._step: dict[int, Tensor] = {}
        # [E] int64: choices of each expert of all replicas in this step so far.
        self._step_load: dict[int, Tensor] = {}
        # [E + 1] int64: sums of `_step` over all replicas and over the steps since the last `pop`.
        self._window: dict[int, Tensor] = {}
        # [E] int64: steps since each expert was last chosen.
        self._idle: dict[int, Tensor] = {}

    @torch.no_grad()
    def add(self, counts: Tensor, dropped: Tensor | None, layer: int) -> None:
        """Adds the counts of this rank's tokens of one micro-batch.

        Args:
            counts: int64 `[E]`, choices of each expert.
            dropped: scalar, number of choices that were dropped; None: none can be.
        """
        added = torch.cat([counts, counts.new_zeros(1) if dropped is None else dropped.unsqueeze(0)])
        self._step[layer] = self._step[layer] + added if layer in self._step else added

    @torch.no_grad()
    def add_global(self, counts: Tensor, layer: int) -> Tensor:
        """Adds the choices `counts [E]` of this rank's tokens of one micro-batch to the load of the step. Collective.

        Returns:
            the choices `[E]` of all replicas in the micro-batches of the step so far.
        """
        counts = counts.clone()
        dist.all_reduce(counts, group=ps.get_tensor_and_data_parallel_group(with_context_parallel=True))
        self._step_load[layer] = self._step_load[layer] + counts if layer in self._step_load else counts
        return self._step_load[layer]

    @torch.no_grad()
    def finish_step(self, routers: list[Router]) -> None:
        """Ends an optimizer step: sums the counts over replicas, and updates the routers' expert biases.

        A bias moves up by `bias_update_rate` if its expert's load is below the mean, and down if it is above the mean.
        Collective over the ranks of a pipeline stage, all of which then hold equal biases.
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
                below_mean = torch.sign(load.sum() - load * len(load))  # in integers, so exactly equal on every rank
                router.expert_bias.add_(below_mean, alpha=router.config.bias_update_rate)

    def pop(self, routers: list[Router]) -> list[LayerRouting]:
        """The routing of every MoE layer of the model since the last call, in order of layers, on every rank.

        Collective over all ranks; the host waits for the device.
        """
        mine = {router.layer: router for router in routers if router.layer in self._window}
        experts = max((len(idle) for idle in self._idle.values()), default=0)
        sizes = torch.tensor([experts], device=self.device)
        dist.all_reduce(sizes, op=dist.ReduceOp.MAX)
        experts = int(sizes)
        table = torch.zeros(self.num_layers, 3 * experts + 2, dtype=torch.float64, device=self.device)
        if ps.get_tensor_model_parallel_rank() == 0 and ps.get_data_parallel_rank(with_context_parallel=True) == 0:
            for layer, router in mine.items():
                bias = self._idle[layer].new_zeros(experts) if router.expert_bias is None else router.expert_bias
                known = torch.ones(1, device=self.device)  # 1: the row has counts; 2: it has counts and biases
                known += 0.0 if router.expert_bias is None else 1.0
                parts = [self._window[layer], self._idle[layer], bias.detach(), known]
                table[layer] = torch.cat([part.double() for part in parts])
        dist.all_reduce(table)
        self._window = {layer: torch.zeros_like(count) for layer, count in self._window.items()}
        return [_layer(i, row, experts) for i, row in enumerate(table.tolist()) if row[-1]]


def _layer(layer: int, row: list[float], experts: int) -> LayerRouting:
    """The routing of a layer from its row of the table in `pop`: counts, dropped choices, idle steps, biases."""
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
