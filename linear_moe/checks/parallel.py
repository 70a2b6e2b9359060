"""Constraints on parallelism: tensor, sequence and pipeline."""

from __future__ import annotations

from linear_moe.config.schema import Config, ParallelConfig
from linear_moe.config.strategies import AttentionStrategy, SequenceLayout
from linear_moe.layout.pipeline import default_split
from linear_moe.layout.sequence import in_pieces, tensor_sequence
from linear_moe.modeling.mixers.registry import mixer_class
from linear_moe.modeling.model import layer_dims
from linear_moe.modeling.pattern import ResolvedLayer, mixer_path
from linear_moe.options.checks import check_divisible, unused
from linear_moe.options.errors import ConfigError, nearest


def check_parallel(config: Config, layers: list[ResolvedLayer]) -> None:
    """Raises ConfigError for parallel sizes and options that do not fit the model or each other."""
    parallel = config.parallel
    _check_pipeline(config, len(layers))
    _check_sequence(config, layers)
    if tensor_sequence(parallel) and not in_pieces(parallel):
        length = config.training.sequence_length
        check_divisible("training.sequence_length", length, "parallel.tensor", parallel.tensor)


def _check_sequence(config: Config, layers: list[ResolvedLayer]) -> None:
    """Raises ConfigError for options that do not fit parallel.sequence; `checks/mixers.py` checks the mixers."""
    parallel = config.parallel
    if parallel.sequence == 1:
        fields = ("sequence_layout", "sequence_exchange", "sequence_dtype", "sequence_attention")
        unused("parallel", parallel, *fields, needs="set parallel.sequence")
        if all(mixer_class(layer.mixer.type).family == "softmax" for layer in layers):
            unused("parallel", parallel, "sequence_pieces", needs="have a layer with a state")
        return
    each = parallel.sequence_pieces
    if each is not None and each % 2 and parallel.sequence_layout == SequenceLayout.ZIGZAG:
        zigzag = f"parallel.sequence_layout={SequenceLayout.ZIGZAG}"
        constraint = f"must be even with {zigzag}, which balances pairs of pieces"
        fix = f"{nearest(each, step=2)}, or parallel.sequence_layout={SequenceLayout.CONTIGUOUS}"
        raise ConfigError("parallel.sequence_pieces", each, constraint, fix=fix)
    _check_sequence_attention(config, layers)


def _check_sequence_attention(config: Config, layers: list[ResolvedLayer]) -> None:
    softmax = 0
    for i, layer in enumerate(layers):
        heads = mixer_class(layer.mixer.type).softmax_heads(layer.mixer, layer_dims(config.model, i))
        softmax += heads is not None
        if heads is not None and config.parallel.sequence_attention == AttentionStrategy.ULYSSES:
            _check_ulysses(*heads, config.parallel, mixer_path(config.model, layer.symbol))
    if not softmax:
        unused("parallel", config.parallel, "sequence_attention", needs="have a layer of softmax attention")
    if softmax == len(layers):
        fields = ("sequence_exchange", "sequence_dtype", "sequence_pieces")
        unused("parallel", config.parallel, *fields, needs="have a layer with a state")


def _check_ulysses(queries: int, keys: int, parallel: ParallelConfig, path: str) -> None:
    """Raises ConfigError unless the ranks of a sequence can share out the heads of each tensor rank.

    The heads of queries must be a multiple of the ranks. Fewer heads of keys than ranks are repeated.
    """
    tensor, ranks = parallel.tensor, parallel.sequence
    cause = f"parallel.sequence = {ranks} with parallel.sequence_attention={AttentionStrategy.ULYSSES}"
    instead = f"or parallel.sequence_attention={AttentionStrategy.RING}"
    if queries % (step := tensor * ranks):
        constraint = f"must be divisible by parallel.tensor {tensor} * {ranks} = {step}: {cause}"
        fix = f"{nearest(queries, step=step)}, {instead}"
        raise ConfigError(f"{path}.num_heads", queries, constraint, fix=fix)

    def divides(n: int) -> bool:
        return queries % n == 0 and n % tensor == 0 and ((n // tensor) % ranks == 0 or ranks % (n // tensor) == 0)

    if not divides(keys):
        constraint = f"must be a multiple or divisor of {ranks} on each of parallel.tensor = {tensor} ranks: {cause}"
        raise ConfigError(f"{path}.num_kv_heads", keys, constraint, fix=f"{nearest(keys, divides)}, {instead}")


def _check_pipeline(config: Config, num_layers: int) -> None:
    """Raises ConfigError unless every chunk has a layer, and an explicit split has all layers."""
    parallel, path = config.parallel, "parallel.pipeline_layers"
    stages, virtual, sizes = parallel.pipeline, parallel.virtual_pipeline, parallel.pipeline_layers
    if virtual > 1 and stages == 1:
        constraint = "interleaves the chunks of several pipeline stages, and there is one"
        raise ConfigError("parallel.virtual_pipeline", virtual, constraint, fix="set it to 1, or parallel.pipeline=2")
    chunks = stages * virtual
    if chunks > num_layers:
        name, other = ("virtual_pipeline", stages) if virtual > 1 and stages <= num_layers else ("pipeline", virtual)
        constraint = f"cuts model.num_layers = {num_layers} into {chunks} chunks: at least one has no layer"
        fix = f"nearest valid: {max(num_layers // other, 1)}"
        raise ConfigError(f"parallel.{name}", getattr(parallel, name), constraint, fix=fix)
    if sizes is None:
        return
    fix = f"balanced: {default_split(config)}"
    if len(sizes) != chunks:
        terms = f"parallel.pipeline {stages} * parallel.virtual_pipeline {virtual} = {chunks}"
        raise ConfigError(path, sizes, f"must have {terms} numbers, one for each chunk", fix=fix)
    if min(sizes) < 1:
        raise ConfigError(path, sizes, "must be >= 1 each", fix=fix)
    if sum(sizes) != num_layers:
        raise ConfigError(path, sizes, f"must add up to model.num_layers = {num_layers}, not {sum(sizes)}", fix=fix)
