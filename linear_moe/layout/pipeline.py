"""Assignment of a model's layers to pipeline stages.

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
"""Ratio of the head's FLOP/s to a layer's: the head is one large matrix product, a layer consists of many small ones.

docs/results/parallel_2gpu.md compares the splits that follow from this ratio with other splits."""


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
    """Numbers of layers of all chunks that minimise the FLOPs (of layers, and of the head) of the costliest stage."""
    head = 2.0 * vocab_size(config) * config.model.hidden_size / HEAD_SPEED
    return balanced(layer_costs(config), head, config.parallel.pipeline, config.parallel.virtual_pipeline)


def balanced(costs: list[float], head: float, stages: int, virtual: int = 1) -> list[int]:
    """Cuts `costs` into `stages * virtual` runs of consecutive layers, so that the costliest stage is the cheapest.

    Returns the sizes of the runs, each at least 1. A stage costs the sum of its chunks, and `head` is added to the last
    chunk. Of splits that are equal in that, the one with the most even chunks is taken. With one chunk a stage, the
    result is the best of all splits; with several, no layer moved from one chunk to another makes it better.
    """
    sizes = _runs(costs, head, stages * virtual)
    total = [0.0, *accumulate(costs)]

    def rank(sizes: list[int]) -> tuple[float, ...]:
        chunks = [total[b] - total[a] for a, b in pairwise([0, *accumulate(sizes)])]
        chunks[-1] += head
        sums = [sum(chunks[stage::stages]) for stage in range(stages)]
        # Every micro-batch waits for the costliest stage, but only a few of them for the costliest chunk.
        return max(sums) + max(chunks) / 4, sum(x * x for x in sums), sum(x * x for x in chunks)

    best = rank(sizes)
    while virtual > 1:
        moved = [
            [n - (i == source) + (i == target) for i, n in enumerate(sizes)]
            for source, target in permutations(range(len(sizes)), 2)
            if sizes[source] > 1
        ]
        score, option = min(((rank(option), option) for option in moved), default=(best, sizes))
        if score >= best:
            break
        best, sizes = score, option
    return sizes


def _runs(costs: list[float], head: float, chunks: int) -> list[int]:
    """Cuts `costs` into `chunks` runs of at least one layer, so that the largest sum of a run is the least.

    Returns the sizes of the runs. `head` is added to the last run. Of equal splits, the most even one is taken.
    """
    total = [0.0, *accumulate(costs)]
    # For the chunks so far: number of layers -> (the largest sum, the sum of squares, sizes) of the best split.
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for chunk in range(chunks):
        left = chunks - 1 - chunk
        longer: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for end in range(chunk + 1, len(costs) - left + 1) if left else [len(costs)]:
            extra = 0.0 if left else head
            for start in range(min(end - 1, max(best)), min(best) - 1, -1):
                cost = total[end] - total[start] + extra
                if end in longer and cost > longer[end][0]:
                    break  # an earlier start only makes this chunk costlier
                largest, squares, sizes = best[start]
                option = (max(largest, cost), squares + cost**2, (*sizes, end - start))
                longer[end] = min(longer.get(end, option), option)
        best = longer
    return list(best[len(costs)][2])


def layer_costs(config: Config) -> list[float]:
    """Forward FLOPs per token of every layer; layers that are alike are counted once and share the result."""
    known: dict[str, float] = {}
    layers = resolve_layers(config.model)
    for i, layer in enumerate(layers):
        if (key := repr(layer)) not in known:
            parts = layer_flops(Layer(layer, config.model, layer_dims(config.model, i), Host(device="meta")), config)
            known[key] = parts["mixer"] + parts["ffn"]
    return [known[repr(layer)] for layer in layers]
