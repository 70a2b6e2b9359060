"""What must hold between the fields of a config, checked before any process group or model exists.

Corpus and tokenizer are checked by `training/data`, a run's checkpoint by `training/checkpoint`; `check.py` calls all.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

from linear_moe.config.errors import ConfigError, nearest
from linear_moe.config.schema import Config, ModelConfig, MoEConfig, ParallelConfig
from linear_moe.config.vocabulary import vocab_size
from linear_moe.modeling.activations import MODULES
from linear_moe.modeling.host import DTYPES
from linear_moe.modeling.mixers.checks import check, unused
from linear_moe.modeling.mixers.registry import mixer_class
from linear_moe.modeling.model import layer_dims
from linear_moe.modeling.pattern import ResolvedLayer, resolve_layers
from linear_moe.stages import default_split

MAX_WORLD = 2**20  # its groups are listed
TRIES = 200  # layouts that `nearest_layout` tries: of a large model a second or two
# What is said of these is what to do about them: another layout is no help.
OWN_FIX = ("training.global_batch", "parallel.tensor_sequence", "parallel.pipeline_layers")


@dataclass(frozen=True)
class ParallelLayout:
    """Process groups of a world, as Megatron-Core's parallel_state makes them (order tp-cp-ep-dp-pp).

    Attributes:
        sequence: ranks that share out sequences.
        data: ranks that take different sequences.
        expert_data: ranks that hold the same routed experts.
    """

    world: int
    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int
    data: int
    expert_data: int
    sequence: int = 1

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights outside the routed experts."""
        return self.data * self.sequence

    @cached_property
    def groups(self) -> dict[str, list[list[int]]]:
        """Axis -> its groups, each a list of ranks. Axes: tensor, data (all `replicas`), pipeline, sequence if there
        are such ranks, and for the routed experts expert_tensor, expert, expert_data."""
        dense = {"tensor": self.tensor, "data": self.replicas, "pipeline": self.pipeline}
        experts = {"expert_tensor": self.expert_tensor, "expert": self.expert, "expert_data": self.expert_data}
        experts["pipeline"] = self.pipeline
        found = {axis: list(_groups(dense, axis)) for axis in dense}
        if self.sequence > 1:
            apart = {"tensor": self.tensor, "sequence": self.sequence, "data": self.data, "pipeline": self.pipeline}
            found["sequence"] = list(_groups(apart, "sequence"))
        return found | {axis: list(_groups(experts, axis)) for axis in experts if axis != "pipeline"}


def tensor_sequence(parallel: ParallelConfig) -> bool:
    """Whether activations outside tensor-parallel regions are split by tokens over the tensor ranks."""
    return parallel.tensor > 1 and parallel.tensor_sequence is not False


def expert_dispatcher(moe: MoEConfig, expert: int) -> str:
    """`model.moe.dispatcher` with `expert` ranks, "alltoall" or "allgather"."""
    if moe.dispatcher != "auto":
        return moe.dispatcher
    return "allgather" if expert <= 2 and not moe.capacity_pad else "alltoall"


def in_pieces(parallel: ParallelConfig) -> bool:
    """Whether sequences are cut into pieces."""
    return parallel.sequence > 1 or (parallel.sequence_pieces or 1) > 1


def smallest_world(parallel: ParallelConfig) -> int:
    """The fewest ranks that the parallel sizes allow."""
    dense = parallel.tensor * parallel.sequence
    return parallel.pipeline * math.lcm(dense, parallel.expert * parallel.expert_tensor)


def padded_length(config: Config) -> int:
    """training.sequence_length, up to equal pieces of `in_pieces`."""
    parallel = config.parallel
    each = parallel.sequence_pieces or (2 if parallel.sequence > 1 and parallel.sequence_layout == "zigzag" else 1)
    step = parallel.sequence * each * (parallel.tensor if in_pieces(parallel) and tensor_sequence(parallel) else 1)
    return -(-config.training.sequence_length // step) * step


def rank_tokens(config: Config) -> int:
    """Of a micro-batch, before its tokens are split over tensor ranks."""
    return config.training.micro_batch * padded_length(config) // config.parallel.sequence


def parallel_layout(config: Config, world: int) -> ParallelLayout:
    """Sizes for `world` ranks; raises ConfigError when the parallel sizes do not divide it."""
    p = config.parallel
    _check_most("world size", world, "the largest planned for", MAX_WORLD)
    for names in (("tensor", "sequence", "pipeline"), ("expert", "expert_tensor", "pipeline")):
        size = math.prod(getattr(p, name) for name in names)
        if world < 1 or world % size:
            shown = [name for name in names if name != "sequence" or p.sequence > 1]
            terms = " * ".join(f"parallel.{name} {getattr(p, name)}" for name in shown)
            fix = nearest(world, step=smallest_world(p))
            raise ConfigError("world size", world, f"must be a positive multiple of {terms} = {size}", fix=fix)
    data = world // (p.tensor * p.sequence * p.pipeline)
    expert_data = world // (p.expert * p.expert_tensor * p.pipeline)
    return ParallelLayout(world, p.tensor, p.pipeline, p.expert, p.expert_tensor, data, expert_data, p.sequence)


def _groups(sizes: dict[str, int], axis: str) -> Iterator[list[int]]:
    """Groups along `axis` of a grid of ranks whose first axis varies fastest."""
    strides, stride = {}, 1
    for name, size in sizes.items():
        strides[name] = stride
        stride *= size
    others = [range(0, size * strides[name], strides[name]) for name, size in reversed(sizes.items()) if name != axis]
    for offsets in product(*others):
        yield [sum(offsets) + i * strides[axis] for i in range(sizes[axis])]


def validate(config: Config, world: int | None = None, *, files: bool = True) -> None:
    """Raises ConfigError at the first thing that cannot work; where the parallel sizes are at fault, with some that do.

    Args:
        config: a tree from `load_config`.
        world: number of ranks; None leaves out what depends on it.
        files: also check that the run folder and the data cache can be written.
    """
    try:
        validate_fields(config, world)
    except ConfigError as error:
        if world is not None and error.path not in OWN_FIX and (near := nearest_layout(config, world)):
            error.args = (f"{error}; nearest layout that works at world size {world}: {near}",)
        raise
    if files:
        _check_writable("run", config.run)
        if config.data.corpus != "synthetic":
            _check_writable("data.cache", config.data.cache)


def validate_fields(config: Config, world: int | None = None) -> None:
    """`validate` without files, and without a search for what would work."""
    for path, folder in (("run", config.run), ("data.corpus", config.data.corpus), ("data.cache", config.data.cache)):
        if not folder.strip():
            raise ConfigError(path, folder, "must not be empty")
    layers = resolve_layers(config.model)
    _check_mixers(config, layers)
    _check_ffn(config, layers)
    _check_parallel(config, layers)
    _check_vocabulary(config)
    _check_schedule(config)
    if config.optimizer.type != "muon":
        unused("optimizer.muon", config.optimizer.muon, *vars(config.optimizer.muon), needs="set optimizer.type=muon")
    _check_recompute(config)
    if world is not None:
        _check_batch(config, parallel_layout(config, world))


def nearest_layout(config: Config, world: int) -> str:
    """The parallel sizes for `world` ranks that change the fewest of the config's, and those least, as overrides.

    "" where there are none: the sizes are not what is wrong.
    """
    axes = ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor", "sequence")
    given = {axis: getattr(config.parallel, axis) for axis in axes}

    def works(sizes: dict[str, int], world: int | None) -> bool:
        split = config.parallel.pipeline_layers
        same = split is not None and len(split) == sizes["pipeline"] * sizes["virtual_pipeline"]
        parallel = replace(config.parallel, pipeline_layers=split if same else None, **sizes)  # type: ignore[arg-type]
        try:
            validate_fields(replace(config, parallel=parallel), world)
        except ConfigError:
            return False
        return True

    if not 1 <= world <= MAX_WORLD or not works(dict.fromkeys(axes, 1), None):
        return ""
    parts = [n for n in range(1, min(world, 2**16) + 1) if world % n == 0]

    def far(axis: str, size: int) -> float:
        return abs(math.log(size / given[axis]))

    choices = [{1, *sorted(parts, key=partial(far, axis))[:6]} for axis in axes]
    choices[axes.index("virtual_pipeline")] = {given["virtual_pipeline"], 2, 1}
    choices[axes.index("sequence")] = {given["sequence"], 1}
    found: list[tuple[int, float, dict[str, int]]] = []
    for values in product(*choices):
        sizes = dict(zip(axes, values, strict=True))
        tensor, pipeline, virtual, expert, inside, sequence = values
        if (
            world % (tensor * sequence * pipeline)
            or world % (expert * inside * pipeline)
            or (virtual > 1 and pipeline == 1)
        ):
            continue
        changed = [axis for axis in axes if sizes[axis] != given[axis]]
        found.append((len(changed), sum(far(axis, sizes[axis]) for axis in changed), sizes))
    found.sort(key=lambda entry: entry[:2])
    near = next((sizes for _, _, sizes in found[:TRIES] if works(sizes, world)), None)
    return "" if near is None else " ".join(f"parallel.{a}={near[a]}" for a in axes if near[a] != given[a])


def mixer_path(model: ModelConfig, symbol: str) -> str:
    """Dotted path of the mixer that `symbol` stands for."""
    if symbol in model.symbols and model.symbols[symbol].mixer is not None:
        return f"model.symbols.{symbol}.mixer"
    return "model.attention" if symbol == "N" else "model.mixer"


def _check_mixers(config: Config, layers: list[ResolvedLayer]) -> None:
    first: dict[str, tuple[str, Any]] = {}  # of each type, the first layer's path and config
    pieces = f"parallel.sequence{'' if config.parallel.sequence > 1 else '_pieces'} > 1"
    for i, layer in enumerate(layers):
        path, cls = mixer_path(config.model, layer.symbol), mixer_class(layer.mixer.type)
        first_path, first_mixer = first.setdefault(layer.mixer.type, (path, layer.mixer))
        for name in cls.crossing_fields:
            value, expected = getattr(layer.mixer, name), getattr(first_mixer, name)
            if value != expected:
                constraint = f"must be {first_path}.{name} = {expected!r}: these layers pass each other tensors"
                raise ConfigError(f"{path}.{name}", value, constraint)
        cls.validate(layer.mixer, layer_dims(config.model, i), config.parallel.tensor, path)
        for needed, capability, option in (
            (config.parallel.tensor > 1, "tensor_parallel", "parallel.tensor > 1"),
            (config.data.isolate_documents, "packing", "data.isolate_documents"),
            (in_pieces(config.parallel), "sequence_parallel", pieces),
        ):
            if needed and not getattr(cls.capabilities, capability):
                why = f": {cls.limits[capability]}" if capability in cls.limits else ""
                raise ConfigError(f"{path}.type", layer.mixer.type, f"does not support {option}{why}")


def _check_ffn(config: Config, layers: list[ResolvedLayer]) -> None:
    moe, parallel, kinds = config.model.moe, config.parallel, {layer.ffn for layer in layers}
    _check_most("model.moe.first_dense_layers", moe.first_dense_layers, "model.num_layers - 1", len(layers) - 1)
    if "dense" in kinds:
        _check_divisible("model.ffn_size", config.model.ffn_size, "parallel.tensor", parallel.tensor)
    if "moe" not in kinds:
        for name in ("expert", "expert_tensor"):
            if getattr(parallel, name) > 1:
                value = getattr(parallel, name)
                raise ConfigError(f"parallel.{name}", value, "no layer has experts", fix="set it to 1")
        return
    _check_router(moe)
    _check_divisible("model.moe.num_experts", moe.num_experts, "parallel.expert", parallel.expert)
    expert_tensor = parallel.expert_tensor
    if moe.experts != "sequential":
        check_grouped_gemm(config.model, config.training.dtype, expert_tensor)
    _check_divisible("model.moe.expert_ffn_size", moe.expert_ffn_size, "parallel.expert_tensor", expert_tensor)
    _check_divisible("model.moe.shared_ffn_size", moe.shared_ffn_size, "parallel.tensor", parallel.tensor)
    if parallel.tensor > 1 and not tensor_sequence(parallel):
        constraint = "experts with parallel.tensor > 1 need activations sharded by tokens"
        raise ConfigError("parallel.tensor_sequence", False, constraint, fix="set it to true or null")


def _check_router(moe: MoEConfig) -> None:
    path, groups = "model.moe", moe.num_groups
    _check_most(f"{path}.top_k", moe.top_k, f"{path}.num_experts", moe.num_experts)
    constraint = f"must divide {path}.num_experts = {moe.num_experts}"
    check(f"{path}.num_groups", groups, lambda n: moe.num_experts % n == 0, constraint)
    _check_most(f"{path}.top_k_groups", moe.top_k_groups, f"{path}.num_groups", groups)
    per_group = moe.num_experts // groups
    if moe.top_k > moe.top_k_groups * per_group:
        constraint = f"must be <= {moe.top_k_groups} groups (top_k_groups) of {per_group} experts"
        fix = f"nearest valid: {moe.top_k_groups * per_group}, or {path}.top_k_groups={-(-moe.top_k // per_group)}"
        raise ConfigError(f"{path}.top_k", moe.top_k, constraint, fix=fix)
    if groups == 1:
        unused(path, moe, "group_score", needs="set num_groups")
    elif moe.group_score == "sum_top_2" and per_group < 2:
        constraint = f"groups have one expert (num_experts {moe.num_experts}, num_groups {groups})"
        raise ConfigError(f"{path}.group_score", moe.group_score, constraint, fix="set it to max")
    if moe.top_k_first and moe.score != "softmax":
        raise ConfigError(f"{path}.top_k_first", True, "needs score: softmax", fix="set it to false")
    if moe.top_k == 1 and (moe.top_k_first or moe.normalize_top_k):
        name = "top_k_first" if moe.top_k_first else "normalize_top_k"
        constraint = "with top_k = 1 every weight is 1 and the router cannot learn"
        raise ConfigError(f"{path}.{name}", True, constraint, fix="set it to false, or raise top_k")
    if moe.top_k_first:
        unused(path, moe, "normalize_top_k", needs="set top_k_first=false: weights over the chosen sum to 1")
    if not moe.shared_ffn_size:
        unused(path, moe, "shared_gate", "overlap_shared_expert", needs="set shared_ffn_size")
    if not moe.expert_bias:
        unused(path, moe, "bias_update_rate", needs="set expert_bias")
    if moe.capacity_factor is None:
        unused(path, moe, "capacity_pad", "drop_policy", needs="set capacity_factor")
    elif moe.capacity_factor >= (most := moe.num_experts / moe.top_k):
        constraint = f"must be < num_experts / top_k = {most:g}: no expert is chosen by more than all tokens"
        raise ConfigError(f"{path}.capacity_factor", moe.capacity_factor, constraint, fix="set it to null: dropless")
    if moe.capacity_pad and moe.dispatcher == "allgather":
        constraint = "exchanges tokens all to all"
        raise ConfigError(
            f"{path}.capacity_pad", True, constraint, fix=f"set it to false, or {path}.dispatcher=alltoall"
        )


def check_grouped_gemm(model: ModelConfig, dtype: str, expert_tensor: int = 1) -> None:
    """Raises ConfigError for experts that a grouped GEMM cannot compute: it reads multiples of 16 bytes."""
    experts = model.moe.experts
    if experts == "quack" and dtype != "bf16":
        raise ConfigError("model.moe.experts", experts, f"multiplies bf16, not {dtype}", fix="set it to auto")
    multiple = 16 // DTYPES[dtype].itemsize
    for path, value, share in (
        ("model.hidden_size", model.hidden_size, 1),
        ("model.moe.expert_ffn_size", model.moe.expert_ffn_size, expert_tensor),
    ):
        if value % (step := multiple * share):
            split = f" times parallel.expert_tensor {share} = {step}" if share > 1 else ""
            constraint = f"must be divisible by {multiple} ({dtype}: 16 bytes){split} for model.moe.experts={experts}"
            fix = f"{nearest(value, step=step)}, or model.moe.experts=sequential"
            raise ConfigError(path, value, constraint, fix=fix)


def _check_parallel(config: Config, layers: list[ResolvedLayer]) -> None:
    parallel = config.parallel
    _check_pipeline(config, len(layers))
    _check_sequence(config, layers)
    if tensor_sequence(parallel) and not in_pieces(parallel):
        length = config.training.sequence_length
        _check_divisible("training.sequence_length", length, "parallel.tensor", parallel.tensor)


def _check_sequence(config: Config, layers: list[ResolvedLayer]) -> None:
    """What goes with parallel.sequence; mixers are checked elsewhere."""
    parallel = config.parallel
    if parallel.sequence == 1:
        fields = ("sequence_layout", "sequence_exchange", "sequence_dtype", "sequence_attention")
        unused("parallel", parallel, *fields, needs="set parallel.sequence")
        if all(mixer_class(layer.mixer.type).family == "softmax" for layer in layers):
            unused("parallel", parallel, "sequence_pieces", needs="have a layer with a state")
        return
    each = parallel.sequence_pieces
    if each is not None and each % 2 and parallel.sequence_layout == "zigzag":
        constraint = "must be even with parallel.sequence_layout=zigzag, which balances pairs of pieces"
        fix = f"{nearest(each, step=2)}, or parallel.sequence_layout=contiguous"
        raise ConfigError("parallel.sequence_pieces", each, constraint, fix=fix)
    _check_sequence_attention(config, layers)


def _check_sequence_attention(config: Config, layers: list[ResolvedLayer]) -> None:
    softmax = 0
    for i, layer in enumerate(layers):
        heads = mixer_class(layer.mixer.type).softmax_heads(layer.mixer, layer_dims(config.model, i))
        softmax += heads is not None
        if heads is not None and config.parallel.sequence_attention == "ulysses":
            _check_ulysses(*heads, config.parallel, mixer_path(config.model, layer.symbol))
    if not softmax:
        unused("parallel", config.parallel, "sequence_attention", needs="have a layer of softmax attention")
    if softmax == len(layers):
        fields = ("sequence_exchange", "sequence_dtype", "sequence_pieces")
        unused("parallel", config.parallel, *fields, needs="have a layer with a state")


def _check_ulysses(queries: int, keys: int, parallel: ParallelConfig, path: str) -> None:
    """The ranks of a sequence share out the heads that tensor parallelism leaves; few of keys may be repeated."""
    tensor, ranks = parallel.tensor, parallel.sequence
    what = f"parallel.sequence = {ranks} with parallel.sequence_attention=ulysses"
    instead = "or parallel.sequence_attention=ring"
    if queries % (step := tensor * ranks):
        constraint = f"must be divisible by parallel.tensor {tensor} * {ranks} = {step}: {what}"
        fix = f"{nearest(queries, step=step)}, {instead}"
        raise ConfigError(f"{path}.num_heads", queries, constraint, fix=fix)

    def fits(n: int) -> bool:
        return queries % n == 0 and n % tensor == 0 and ((n // tensor) % ranks == 0 or ranks % (n // tensor) == 0)

    if not fits(keys):
        constraint = f"must be a multiple or divisor of {ranks} on each of parallel.tensor = {tensor} ranks: {what}"
        raise ConfigError(f"{path}.num_kv_heads", keys, constraint, fix=f"{nearest(keys, fits)}, {instead}")


def _check_pipeline(config: Config, num_layers: int) -> None:
    """Every chunk has a layer, and an explicit split has all of them."""
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


def _check_vocabulary(config: Config) -> None:
    rows, tensor = vocab_size(config), config.parallel.tensor
    if config.model.vocab_size is None:  # not `rows`: a trained tokenizer may come out smaller than asked for
        _check_divisible("model.vocab_multiple", config.model.vocab_multiple, "parallel.tensor", tensor)
    else:
        _check_divisible("model.vocab_size", rows, "parallel.tensor", tensor)


def recomputed(config: Config) -> tuple[frozenset[str], frozenset[int]]:
    """What the backward pass computes again, as `Activations` names it, and in which layers."""
    training, total = config.training, config.model.num_layers
    modules = frozenset(training.recompute_modules) | ({"layer"} if training.recompute == "full" else set())
    number = total if training.recompute_layers is None else training.recompute_layers
    return modules, frozenset(i * total // number for i in range(number))


def _check_recompute(config: Config) -> None:
    training, path = config.training, "training.recompute_modules"
    modules, choice = training.recompute_modules, training.recompute
    for name in modules:
        if name not in MODULES:
            raise ConfigError(path, name, "cannot be recomputed by itself", candidates=MODULES)
    if choice == "none":
        unused("training", training, "recompute_layers", needs="set recompute")
        if modules:
            fix = "set training.recompute=selective, or leave it at []"
            raise ConfigError(path, modules, "does nothing here", fix=fix)
    elif choice == "selective" and not modules:
        constraint = "names nothing to recompute"
        raise ConfigError(
            path, modules, constraint, fix="for example [norm, core, experts], or training.recompute=none"
        )
    if choice == "full" and (others := sorted(set(modules) - {"logits"})):
        constraint = "whole layers are recomputed, of which these are parts"
        raise ConfigError(path, others, constraint, fix="leave only logits, or set training.recompute=selective")
    _check_most(
        "training.recompute_layers", training.recompute_layers or 1, "model.num_layers", config.model.num_layers
    )


def _check_schedule(config: Config) -> None:
    schedule, steps = config.schedule, config.training.steps
    _check_most("schedule.warmup_steps", schedule.warmup_steps, "training.steps", steps)
    _check_most("schedule.min_lr", schedule.min_lr, "optimizer.lr", config.optimizer.lr)
    if schedule.decay_steps is None:
        return
    if schedule.type == "cosine" and schedule.decay_steps < schedule.warmup_steps:
        constraint = f"must be >= schedule.warmup_steps ({schedule.warmup_steps})"
        raise ConfigError("schedule.decay_steps", schedule.decay_steps, constraint)
    if schedule.type == "wsd":
        left = steps - schedule.warmup_steps
        _check_most("schedule.decay_steps", schedule.decay_steps, "training.steps - schedule.warmup_steps", left)


def _check_batch(config: Config, layout: ParallelLayout) -> None:
    training = config.training
    size = training.micro_batch * layout.data
    if training.global_batch % size:
        terms = f"training.micro_batch {training.micro_batch} * {layout.data} data-parallel ranks = {size}"
        fix = nearest(training.global_batch, step=size)
        raise ConfigError("training.global_batch", training.global_batch, f"must be divisible by {terms}", fix=fix)
    if config.parallel.virtual_pipeline > 1 and (training.global_batch // size) % layout.pipeline:
        constraint = (
            f"makes {training.global_batch // size} micro-batches for each of {layout.data} replicas: parallel."
            f"virtual_pipeline > 1 needs a multiple of parallel.pipeline = {layout.pipeline}"
        )
        fix = f"{nearest(training.global_batch, step=size * layout.pipeline)}, or parallel.virtual_pipeline=1"
        raise ConfigError("training.global_batch", training.global_batch, constraint, fix=fix)


def _check_writable(path: str, folder: str) -> None:
    """Really creates and removes a file, in the folder or where it would be made: root passes any permission check."""
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing, prefix=".linear-moe-") as file:
            file.write(b"\0")
    except OSError as error:
        where = "" if existing == Path(folder).absolute() else f" in {existing}"
        raise ConfigError(path, folder, f"folder cannot be written: {error.strerror}{where}") from None


def _check_divisible(path: str, value: int, by_path: str, by: int) -> None:
    if value % by:
        most = max(n for n in range(1, by) if value % n == 0)
        fix = f"{nearest(value, step=by)}, or {by_path}={most}"
        raise ConfigError(path, value, f"must be divisible by {by_path} = {by}", fix=fix)


def _check_most(path: str, value: float, bound_path: str, bound: float) -> None:
    if value > bound:
        constraint = f"must be <= {bound_path} = {bound}"
        raise ConfigError(path, value, constraint, fix=f"nearest valid: {bound}")
