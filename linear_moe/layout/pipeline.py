"""Which layers are where in a pipeline, and what the stages send each other besides the residual stream.

The model is cut into `parallel.pipeline * parallel.virtual_pipeline` chunks of consecutive layers, dealt to the stages
in turn: with two stages of two chunks, stage 0 has chunks 0 and 2, stage 1 has 1 and 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise, permutations

from linear_moe.config.schema import Config
from linear_moe.config.vocabulary import vocab_size
from linear_moe.layout.flops import layer_flops
from linear_moe.modeling.host import Host
from linear_moe.modeling.model import Layer, layer_dims
from linear_moe.modeling.pattern import resolve_layers

HEAD_SPEED = 2.4
"""How many times a layer's FLOP/s the head reaches: it is one large matrix product, a layer many small ones.

docs/results/parallel_2gpu.md compares splits by it with others."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers of a model on one pipeline stage.

    Attributes:
        layers: global indices.
        first, last: whether it begins with the embedding, and ends with the final norm and head.
    """

    layers: range
    first: bool
    last: bool


def stage_chunks(config: Config, stage: int) -> list[Chunk]:
    """The chunks of a pipeline stage, in model order: `parallel.virtual_pipeline` of them."""
    sizes = config.parallel.pipeline_layers or default_split(config)
    ends = [0, *accumulate(sizes)]
    assert ends[-1] == config.model.num_layers, (sizes, config.model.num_layers)
    chunks = [Chunk(range(a, b), a == 0, b == ends[-1]) for a, b in pairwise(ends)]
    return chunks[stage :: config.parallel.pipeline]


def default_split(config: Config) -> list[int]:
    """Layers of each chunk so that the slowest stage is the fastest: by the FLOPs of its layers, and of the head."""
    head = 2.0 * vocab_size(config) * config.model.hidden_size / HEAD_SPEED
    return balanced(layer_costs(config), head, config.parallel.pipeline, config.parallel.virtual_pipeline)


def balanced(costs: list[float], head: float, stages: int, virtual: int = 1) -> list[int]:
    """Sizes of `stages * virtual` runs of `costs`, each >= 1, with the cheapest costliest stage; then chunks alike.

    A stage costs what its chunks do, and `head` is added to the last. With one chunk a stage it is the best of all
    splits; with more, one that no layer moved from any chunk to any other makes better.
    """
    sizes = _runs(costs, head, stages * virtual)
    total = [0.0, *accumulate(costs)]

    def rank(sizes: list[int]) -> tuple[float, ...]:
        chunks = [total[b] - total[a] for a, b in pairwise([0, *accumulate(sizes)])]
        chunks[-1] += head
        sums = [sum(chunks[stage::stages]) for stage in range(stages)]
        # The pipeline waits for the costliest stage with each micro-batch, with a few of them for the costliest chunk.
        return max(sums) + max(chunks) / 4, sum(x * x for x in sums), sum(x * x for x in chunks)

    best = rank(sizes)
    while virtual > 1:
        moved = [
            [n - (i == source) + (i == target) for i, n in enumerate(sizes)]
            for source, target in permutations(range(len(sizes)), 2)
            if sizes[source] > 1
        ]
        found, option = min(((rank(option), option) for option in moved), default=(best, sizes))
        if found >= best:
            break
        best, sizes = found, option
    return sizes


def _runs(costs: list[float], head: float, chunks: int) -> list[int]:
    """Sizes of `chunks` runs of `costs`, each >= 1, whose largest sum is the least; then the most even ones.

    `head` is added to the last.
    """
    total = [0.0, *accumulate(costs)]
    # After each number of chunks: layers so far -> (the largest sum, the sum of squares, sizes).
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for chunk in range(chunks):
        left = chunks - 1 - chunk
        found: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for end in range(chunk + 1, len(costs) - left + 1) if left else [len(costs)]:
            extra = 0.0 if left else head
            for start in range(min(end - 1, max(best)), min(best) - 1, -1):
                cost = total[end] - total[start] + extra
                if end in found and cost > found[end][0]:
                    break  # it only grows
                largest, squares, sizes = best[start]
                option = (max(largest, cost), squares + cost**2, (*sizes, end - start))
                found[end] = min(found.get(end, option), option)
        best = found
    return list(best[len(costs)][2])


def layer_costs(config: Config) -> list[float]:
    """Forward FLOPs per token of every layer; those of layers alike are computed once."""
    known: dict[str, float] = {}
    layers = resolve_layers(config.model)
    for i, layer in enumerate(layers):
        if (key := repr(layer)) not in known:
            parts = layer_flops(Layer(layer, config.model, layer_dims(config.model, i), Host(device="meta")), config)
            known[key] = parts["mixer"] + parts["ffn"]
    return [known[repr(layer)] for layer in layers]
