"""Chunks of a model's layers as one rank of a layout holds them: with the rank's shapes, on the meta device."""

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
    """Whether a parameter belongs to the routed experts."""
    return "expert" in spec_of(parameter).axes.values()


class RankHost(Host):
    """Host that gives parameters the shapes of one rank of a layout; models on it have no contents."""

    def __init__(self, parallel: ParallelConfig, dtype: torch.dtype):
        super().__init__(dtype, "meta")
        self.parallel = parallel

    def size(self, axis: str) -> int:
        return getattr(self.parallel, axis)


class RankModels:
    """Models whose parameters have the shapes of one rank, built once for each way of splitting parameters.

    Args:
        config: the model's configuration; its `parallel` is not used.
        rows: rows of the embedding.
    """

    def __init__(self, config: Config, rows: int):
        self.model, self.dtype, self.rows = config.model, DTYPES[config.training.dtype], rows
        self._built: dict[tuple[int, ...], LanguageModel] = {}
        self._needs: dict[int, dict[int, SequenceNeeds]] = {}

    def __call__(self, parallel: ParallelConfig) -> LanguageModel:
        """Returns the whole model; with pipeline stages, a rank holds only its chunks (`rank_chunks`)."""
        key = (parallel.tensor, parallel.expert, parallel.expert_tensor)
        if key not in self._built:
            self._built[key] = LanguageModel(self.model, self.rows, RankHost(parallel, self.dtype))
        return self._built[key]

    def needs(self, parallel: ParallelConfig) -> dict[int, SequenceNeeds]:
        """Returns, by layer number, the exchanges that each mixer needs between the ranks of a sequence."""
        if parallel.tensor not in self._needs:
            self._needs[parallel.tensor] = layer_needs(self(parallel).numbered_layers())
        return self._needs[parallel.tensor]

    def split_needs(self, parallel: ParallelConfig) -> dict[int, SequenceNeeds]:
        """Returns `needs`, or no entries if sequences are not cut into pieces."""
        return self.needs(parallel) if in_pieces(parallel) else {}


@dataclass(frozen=True)
class RankChunk:
    """A chunk of a pipeline stage as one rank holds it.

    Attributes:
        layers: layers by their index in the whole model.
        embedding: the embedding; None if the chunk has none.
        after: the final norm and the head, if the chunk is the last one.
        logits: columns of the unsplit logits; 0 if the chunk makes no logits.
        shares_embedding: whether the embedding is tied to a head in another chunk, or the head to an embedding there.
        elements: cache of `layer_elements`, by layer index and the modules that are recomputed.
    """

    layers: dict[int, nn.Module]
    embedding: nn.Module | None
    after: list[nn.Module]
    logits: int
    shares_embedding: bool
    elements: dict[tuple[int, frozenset[str]], tuple[float, float]] = field(default_factory=dict, repr=False)

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, in the order in which the model of the stage registers them."""
        before = [] if self.embedding is None else [self.embedding]
        return [p for module in (*before, *self.layers.values(), *self.after) for p in module.parameters()]

    @cached_property
    def alone(self) -> list[nn.Parameter]:
        """Parameters that Megatron-Core reduces in a bucket of their own."""
        return list(self.embedding.parameters()) if self.embedding is not None and self.shares_embedding else []


def rank_chunks(config: Config, model: LanguageModel, stage: int) -> list[RankChunk]:
    """Cuts out of `model` (from RankModels) the chunks that a rank of pipeline stage `stage` holds, in model order."""
    chunks = []
    for chunk in stage_chunks(config, stage):
        layers: dict[int, nn.Module] = {i: model.layers[str(i)] for i in chunk.layers}
        tied = config.model.tie_embeddings
        embedding = model.embedding if chunk.first or (chunk.last and tied) else None
        after: list[nn.Module] = [module for module in (model.norm, model.head) if module is not None and chunk.last]
        logits = model.vocab_size if chunk.last else 0
        chunks.append(RankChunk(layers, embedding, after, logits, tied and not (chunk.first and chunk.last)))
    return chunks
