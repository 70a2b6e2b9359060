"""What one rank of a layout holds of a model: its chunks of layers, with this rank's shapes and no contents."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from linear_moe.config.schema import Config, ParallelConfig
from linear_moe.layout.pipeline import stage_chunks
from linear_moe.layout.sequence import in_pieces
from linear_moe.modeling.host import DTYPES, Host, spec_of
from linear_moe.modeling.model import LanguageModel
from linear_moe.plan.needs import SequenceNeeds, layer_needs


def is_expert(parameter: nn.Parameter) -> bool:
    return "expert" in spec_of(parameter).axes.values()


class RankHost(Host):
    """Gives parameters the shapes that they have on one rank of a layout; cannot compute."""

    def __init__(self, parallel: ParallelConfig, dtype: torch.dtype):
        super().__init__(dtype, "meta")
        self.parallel = parallel

    def size(self, axis: str) -> int:
        return getattr(self.parallel, axis)


class RankModels:
    """A model's layers as one rank holds them, built once for each way of splitting parameters.

    Args:
        config: its `parallel` does not matter.
        rows: of the embedding.
    """

    def __init__(self, config: Config, rows: int):
        self.model, self.dtype, self.rows = config.model, DTYPES[config.training.dtype], rows
        self._built: dict[tuple[int, ...], LanguageModel] = {}
        self._needs: dict[int, dict[int, SequenceNeeds]] = {}

    def __call__(self, parallel: ParallelConfig) -> LanguageModel:
        """All layers, with embedding and head: no rank has all of them where there are pipeline stages."""
        key = (parallel.tensor, parallel.expert, parallel.expert_tensor)
        if key not in self._built:
            self._built[key] = LanguageModel(self.model, self.rows, RankHost(parallel, self.dtype))
        return self._built[key]

    def needs(self, parallel: ParallelConfig) -> dict[int, SequenceNeeds]:
        """By layer, what its mixer asks of the other ranks of its sequences."""
        if parallel.tensor not in self._needs:
            layers = {int(number): layer for number, layer in self(parallel).layers.items()}
            self._needs[parallel.tensor] = layer_needs(layers)
        return self._needs[parallel.tensor]

    def split_needs(self, parallel: ParallelConfig) -> dict[int, SequenceNeeds]:
        """The same, none where sequences are not shared out."""
        return self.needs(parallel) if in_pieces(parallel) else {}


@dataclass(frozen=True)
class RankChunk:
    """A chunk of a pipeline stage as one rank holds it.

    Attributes:
        layers: by global number.
        embedding: None where there is none.
        after: the final norm and the head, where they are.
        logits: columns of the logits, full; 0 where there are none.
        shares_embedding: with another stage.
        elements: of `layer_elements`, once computed, by layer and what of it is computed again.
    """

    layers: dict[int, nn.Module]
    embedding: nn.Module | None
    after: list[nn.Module]
    logits: int
    shares_embedding: bool
    elements: dict[tuple[int, frozenset[str]], tuple[float, float]] = field(default_factory=dict, repr=False)

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """In the order of the model that the stage builds."""
        before = [] if self.embedding is None else [self.embedding]
        return [p for module in (*before, *self.layers.values(), *self.after) for p in module.parameters()]

    @cached_property
    def alone(self) -> list[nn.Parameter]:
        """Those that Megatron-Core reduces in a bucket of their own."""
        return list(self.embedding.parameters()) if self.embedding is not None and self.shares_embedding else []


def rank_chunks(config: Config, model: LanguageModel, stage: int) -> list[RankChunk]:
    """What a rank of pipeline stage `stage` holds of `model` (from RankModels), in order."""
    found = []
    for chunk in stage_chunks(config, stage):
        layers: dict[int, nn.Module] = {i: model.layers[str(i)] for i in chunk.layers}
        tied = config.model.tie_embeddings
        embedding = model.embedding if chunk.first or (chunk.last and tied) else None
        after: list[nn.Module] = [module for module in (model.norm, model.head) if module is not None and chunk.last]
        logits = model.vocab_size if chunk.last else 0
        found.append(RankChunk(layers, embedding, after, logits, tied and not (chunk.first and chunk.last)))
    return found
