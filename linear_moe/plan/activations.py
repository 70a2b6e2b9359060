"""Bytes of activations that a rank keeps for backward passes: those of mixers are measured, all others stated here."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from operator import mul
from typing import Any

from torch import nn

from linear_moe.config.schema import Config
from linear_moe.layout.processes import ProcessMesh
from linear_moe.layout.recompute import recomputed
from linear_moe.layout.sequence import rank_tokens, tensor_sequence
from linear_moe.modeling.host import DTYPES
from linear_moe.modeling.mixers.base import Mixer
from linear_moe.modeling.moe.config import expert_dispatcher
from linear_moe.modeling.ops.fused.linear_cross_entropy import block_rows
from linear_moe.plan.needs import SequenceNeeds
from linear_moe.plan.ranks import RankChunk
from linear_moe.plan.saved import mixer_saved
from linear_moe.plan.traffic import SequenceSplit, kept_bytes


def mixer_elements(config: Config, mixer: Mixer, recompute: Collection[str] = ()) -> float:
    """Elements per token of a rank's micro-batch that a mixer keeps if the modules `recompute` are computed again."""
    tokens = rank_tokens(config)
    return mixer_saved(mixer, recompute).of(tokens) / tokens / DTYPES[config.training.dtype].itemsize


def layer_elements(
    config: Config, layer: nn.Module, stream: float, modules: frozenset[str] = frozenset()
) -> tuple[float, float]:
    """Elements that one layer keeps for its backward pass; fp32 elements count twice in a bf16 model.

    Args:
        layer: a `Layer` built for one rank.
        stream: elements per token of this rank's residual stream.
        modules: those computed again, as `Activations` names them.

    Returns:
        Elements per token that it keeps, and most that the backward pass has besides at a time, made again.
    """
    model, parallel, hidden = config.model, config.parallel, config.model.hidden_size
    wide = 4 / DTYPES[config.training.dtype].itemsize
    mixer: Any = layer.mixer
    mixing = mixer_elements(config, mixer)
    core = mixing - mixer_elements(config, mixer, ("core",)) if "core" in modules else 0.0
    inside = {"mixer": mixing, "ffn": 0.0}  # of both halves, besides the norm's output
    normed = {"mixer": float(hidden), "ffn": float(hidden)}  # that output, as it is used
    parts = {"core": ("mixer", core)}  # that can be left out of them
    if hasattr(layer.ffn, "experts"):
        moe = model.moe
        # Of each expert that a token has: gate and up. A balanced router sends a rank as many tokens as it has. Those
        # received are kept: one by one, sorted by expert, or all tokens of all ranks, with room for all their experts.
        ranks = parallel.expert * parallel.expert_tensor
        gate_up = 2 * moe.top_k * moe.expert_ffn_size * stream / hidden
        received = 0.0
        if ranks > 1 and expert_dispatcher(moe, parallel.expert) == "allgather":
            received, gate_up = stream * ranks, gate_up * parallel.expert
        elif ranks > 1:
            received = stream * parallel.expert_tensor * moe.top_k
        # The input of router and experts, and the shared expert's, if that is a copy.
        normed["ffn"] = stream + (hidden if moe.shared_ffn_size and parallel.tensor > 1 else 0)
        inside["ffn"] = wide * 4 * moe.num_experts + received + gate_up
        parts["experts"] = "ffn", gate_up
    dense = (moe.shared_ffn_size if hasattr(layer.ffn, "experts") else model.ffn_size) / parallel.tensor
    inside["ffn"] += 4 * dense  # gate, up, silu(gate), product
    parts["activation"] = "ffn", 2 * dense
    if "layer" in modules:
        gradients = max(2 * dense, parts["experts"][1] if "experts" in parts else 0.0)  # of gate and up, with all that
        return stream, 2 * stream + sum(inside.values()) + sum(normed.values()) + gradients
    kept, again = 2 * stream, [0.0]  # inputs of both norms
    for half in ("mixer", "ffn"):
        left_out = {name: elements for name, (of, elements) in parts.items() if of == half and name in modules}
        if half in modules:
            kept += 0 if "norm" in modules else stream
            again.append(normed[half] + inside[half])
            continue
        kept += inside[half] - sum(left_out.values()) + (0 if "norm" in modules else normed[half])
        again.append(max([0.0, *left_out.values()]) + (normed[half] if "norm" in modules else 0))
    return kept, max(again)


def micro_batches_in_flight(config: Config, micro_batches: int, stage: int) -> list[tuple[int, ...]]:
    """Forward passes of each of a stage's chunks that wait for their backward pass, at the moment when most of them do.

    As in Megatron-Core's schedules (Narayanan et al. 2021, arXiv 2104.04473): after the warm-up, forward and backward
    passes take turns; chunks go in groups of as many micro-batches as stages, backward from the last chunk. So which
    chunks' passes wait changes, but not their number.
    """
    stages, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline
    if chunks == 1:
        return [(min(stages - stage, micro_batches),)]
    total = micro_batches * chunks
    warm_up = min(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, total)
    waiting, found = [0] * chunks, dict[tuple[int, ...], None]()
    for i in range(min(total, warm_up + stages * chunks)):  # then all that repeats
        if i >= warm_up:
            waiting[-1 - (i - warm_up) // stages % chunks] -= 1
        waiting[i // stages % chunks] += 1
        if i >= warm_up - 1:
            found[tuple(waiting)] = None
    return list(found)


def activation_bytes(
    config: Config,
    layout: ProcessMesh,
    chunks: list[RankChunk],
    stage: int,
    needs: Mapping[int, SequenceNeeds] | None = None,
) -> dict[str, int]:
    """Bytes that backward passes hold at the peak, and bytes of the logits of one micro-batch.

    Args:
        needs: of the layers, if sequences are shared out.
    """
    training, parallel, hidden = config.training, config.parallel, config.model.hidden_size
    size = DTYPES[training.dtype].itemsize
    tokens, split = rank_tokens(config), SequenceSplit.of(config)
    stream = hidden / (parallel.tensor if tensor_sequence(parallel) else 1)
    micro_batches = training.global_batch // (training.micro_batch * layout.data)
    modules, concerned = recomputed(config)
    each: list[float] = []  # of one micro-batch in each chunk
    again = once = logits = 0.0
    for chunk in chunks:
        kept = stream if len(chunks) > 1 and not chunk.logits else 0.0  # what it sent, which plain 1F1B frees
        for number, layer in chunk.layers.items():
            key = number, modules if number in concerned else frozenset[str]()
            if key not in chunk.elements:
                chunk.elements[key] = layer_elements(config, layer, stream, key[1])
            elements, most = chunk.elements[key]
            if needs:  # also where the layer is computed again
                elements += kept_bytes(needs[number], split) / (tokens * size)
            kept, again = kept + elements, max(again, most)
        if chunk.logits:
            once = stream + hidden  # inputs of the norm and of the head
            logits = logit_bytes(config, chunk.logits / parallel.tensor, tokens)
        each.append(kept)
    in_flight = micro_batches_in_flight(config, micro_batches, stage)
    kept = once + max(sum(map(mul, counts, each)) for counts in in_flight)
    more = max(0.0, tokens * size * again - logits)  # the logits are gone when layers go backward
    return {"activations": math.ceil(tokens * size * kept + more), "logits": math.ceil(logits)}


def logit_bytes(config: Config, columns: float, tokens: int) -> float:
    """Bytes of one micro-batch's logits on a rank and of the gradient of the head's weight, which lives as long."""
    size, hidden = DTYPES[config.training.dtype].itemsize, config.model.hidden_size
    weight = size * columns * hidden
    if "logits" in config.training.recompute_modules:  # a block; the gradient of the head's input is summed in fp32
        return weight + size * tokens * min(block_rows(tokens), columns) + 4 * tokens * hidden
    # The gradient takes the logits' place; over tensor ranks Megatron's loss takes them to fp32 first.
    copies = size if config.parallel.tensor == 1 or size == 4 else size + 4
    return weight + copies * tokens * columns
