"""Loads a checkpoint into any layout, after checking that it is a checkpoint of this model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner, mcore_to_pyt_state_dict
from megatron.core.optimizer import MegatronOptimizer

from linear_moe.checkpoints.reader import (
    INFO,
    damaged,
    latest_checkpoint,
    read_info,
    read_metadata,
    read_tensors,
    verify_checkpoint_files,
    weight_shapes,
)
from linear_moe.config.schema import Config
from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.host import spec_of
from linear_moe.modeling.mixers.base import MixerConfig
from linear_moe.modeling.pattern import ResolvedLayer, mixer_path, resolve_layers
from linear_moe.options.errors import ConfigError
from linear_moe.options.load import from_dict
from linear_moe.training.checkpointing import state
from linear_moe.training.checkpointing.collective import on_rank_0

logger = logging.getLogger(__name__)

WAY_OUT = "set it back, or choose another run folder"
MISSING = object()

# Model settings that may differ between a checkpoint and the run that resumes from it, because the weights mean the
# same with either value: initialisation, implementation, weights of losses. (`vocab_multiple` sets the rows of the
# embedding, which the comparison of the parameters' shapes covers.)
FREE = {"init_std", "scale_output_init", "vocab_multiple"}
FREE_MOE = {"aux_loss", "sequence_aux_loss", "global_aux_loss", "z_loss", "bias_update_rate", "experts", "dispatcher"}
FREE_MOE |= {"capacity_factor", "capacity_pad", "drop_policy"}  # settings of training only
FREE_MOE |= {"overlap_shared_expert"}
FREE_MOE |= {"first_dense_layers", "layer_frequency"}  # compared layer by layer

# Model settings that the layers are made from: compared layer by layer, as far as a layer uses them.
LAYERS = {"num_heads", "pattern", "mixer", "attention", "symbols", "ffn", "ffn_size", "moe"}

# Training settings that fix the order of the samples. If one changed, the saved position in the data would point to
# other samples. (`check_data_unchanged` compares the data itself.)
ORDER = ("seed", "global_batch", "sequence_length")

# Data settings that the message of `check_data_unchanged` names if they changed.
DATA = ("validation_fraction", "tokenizer.type", "tokenizer.vocab_size")

Difference = tuple[str, Any, Any]
"""A dotted path of the configuration, its value in this run, and its value in the checkpoint."""


def check_resume(config: Config) -> None:
    """Checks that the run's newest checkpoint has the model, the data order and the optimizer of `config`.

    Needs no process group, and does nothing where there is no checkpoint.

    Raises:
        ConfigError: they differ; names the first path that differs.
    """
    folder = latest_checkpoint(Path(config.run) / "checkpoints", warn=False)
    if folder is None:
        return
    model, training = _saved(folder, "model"), _saved(folder, "training")
    try:
        there = from_dict(ModelConfig, model)
        difference = model_difference(config.model, there)
    except ConfigError as error:
        raise damaged(folder / INFO, f"has a model that this version does not know: {error}") from None
    if difference is None and read_info(folder)["step"]:  # an imported model has seen no data
        sides = ((name, getattr(config.training, name), training.get(name)) for name in ORDER)
        difference = next(((f"training.{name}", a, b) for name, a, b in sides if a != b), None)
        optimizer = _saved(folder, "optimizer").get("type", "adamw")  # older checkpoints name no optimizer
        if difference is None and optimizer != config.optimizer.type:
            difference = "optimizer.type", config.optimizer.type, optimizer
    if difference is not None:
        path, here, value = difference
        raise ConfigError(path, here, f"the checkpoint {folder} has {value!r}", fix=WAY_OUT)


def check_data_unchanged(config: Config, fingerprint: str) -> None:
    """Checks that the run's newest checkpoint was trained on the data with this fingerprint.

    Needs no process group, and does nothing where there is no checkpoint, or the checkpoint records no fingerprint.

    Raises:
        ConfigError: the checkpoint was trained on other data.
    """
    folder = latest_checkpoint(Path(config.run) / "checkpoints", warn=False)
    if folder is None or read_info(folder).get("data") in (None, fingerprint):
        return
    here, there = dict(_leaves(config.to_dict()["data"])), dict(_leaves(_saved(folder, "data")))
    hint = next((f" (data.{path} was {there[path]!r})" for path in DATA if there.get(path) != here[path]), "")
    raise ConfigError(
        "data.corpus",
        config.data.corpus,
        f"the run was trained on other data: files, tokenizer or validation share changed{hint}",
        fix=WAY_OUT,
    )


def _saved(folder: Path, section: str) -> dict[str, Any]:
    """A section of the configuration with which the checkpoint in `folder` was saved."""
    config = read_info(folder, ["config"])["config"]
    if not isinstance(config, dict) or not isinstance(config.get(section), dict):
        raise damaged(folder / INFO, f"is damaged: it has no configuration of {section!r}")
    return config[section]


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def model_difference(here: ModelConfig, there: ModelConfig, *, upcycle: bool = False) -> Difference | None:
    """The first setting in which two models differ; None: they are the same model.

    Models are compared by their resolved layers, so that the patterns LLLN and L * 3 + N are the same. With `upcycle`,
    layers that are dense `there` may have experts `here`.
    """
    for name in (field.name for field in dataclasses.fields(ModelConfig)):
        a, b = getattr(here, name), getattr(there, name)
        unset = name == "vocab_size" and None in (a, b)  # None: the tokenizer's vocabulary size
        if a != b and not unset and name not in FREE | LAYERS:
            return f"model.{name}", a, b
    layers = list(zip(resolve_layers(here), resolve_layers(there), strict=True))  # num_layers has been compared above
    for a, b in layers:
        mixers = _mixer_fields(here, a.mixer), _mixer_fields(there, b.mixer)
        same_ffn = a.ffn == b.ffn or (upcycle and a.ffn == "moe")
        if mixers[0] == mixers[1] and same_ffn:
            continue
        if a.symbol != b.symbol:
            return "model.pattern", here.pattern, there.pattern
        if not same_ffn:
            return _ffn_difference(here, there, a, b)
        name = next(name for name in mixers[0] if mixers[0][name] != mixers[1].get(name, MISSING))
        shared = name == "num_heads" and getattr(a.mixer, name) is None
        path = "model" if shared else mixer_path(here, a.symbol)
        return f"{path}.{name}", mixers[0][name], mixers[1].get(name)
    kinds = {a.ffn for a, b in layers if a.ffn == b.ffn}
    if "dense" in kinds and here.ffn_size != there.ffn_size:
        return "model.ffn_size", here.ffn_size, there.ffn_size
    for name in (field.name for field in dataclasses.fields(here.moe) if "moe" in kinds):
        if name not in FREE_MOE and getattr(here.moe, name) != getattr(there.moe, name):
            return f"model.moe.{name}", getattr(here.moe, name), getattr(there.moe, name)
    return None


def _mixer_fields(model: ModelConfig, mixer: MixerConfig) -> dict[str, Any]:
    """A mixer's configuration, `type` first, with the model's number of heads if the mixer does not set its own."""
    fields = dataclasses.asdict(mixer)
    return fields | ({"num_heads": model.num_heads} if fields.get("num_heads", MISSING) is None else {})


def _ffn_difference(here: ModelConfig, there: ModelConfig, a: ResolvedLayer, b: ResolvedLayer) -> Difference:
    """The setting that makes the FFN of one layer dense here and experts there, or the other way round."""
    if a.symbol in here.symbols and here.symbols[a.symbol].ffn is not None:
        return f"model.symbols.{a.symbol}.ffn", a.ffn, b.ffn
    for name in ("first_dense_layers", "layer_frequency"):
        ours, theirs = getattr(here.moe, name), getattr(there.moe, name)
        if here.ffn == there.ffn and ours != theirs:
            return f"model.moe.{name}", ours, theirs
    return "model.ffn", a.ffn, b.ffn


def load_latest(config: Config, model: list[Any], optimizer: MegatronOptimizer) -> int:
    """Resumes from the run's newest complete checkpoint. Collective.

    The weights, the optimizer's moments and its step are restored in any layout. The random states are restored only in
    the layout that saved them.

    Returns:
        the checkpoint's step; 0: the run has no checkpoint, or only imported weights.
    """
    folder = on_rank_0(lambda: latest_checkpoint(Path(config.run) / "checkpoints"))
    if folder is None:
        return 0
    info = load(folder, model, optimizer)
    now = config.to_dict()["parallel"]
    if info["world"] == dist.get_world_size() and info["config"]["parallel"] == now:
        rng = state.rng_object(None)
        state.set_rng_state(_read(folder, {rng.unique_key: [rng]})[rng.unique_key][0])
    elif dist.get_rank() == 0 and info["step"]:
        logger.warning("%s was saved in another layout: the random generators start anew", folder)
    return info["step"]


def imported_from(config: Config) -> str | None:
    """Source from which the weights of the run's newest checkpoint were imported.

    None: the run has no checkpoint, or its weights were trained by the run.
    """
    folder = latest_checkpoint(Path(config.run) / "checkpoints", warn=False)
    return None if folder is None else read_info(folder).get("imported", {}).get("source")


def load(folder: Path, model: list[Any], optimizer: MegatronOptimizer | None = None) -> dict[str, Any]:
    """Reads a checkpoint's weights into `model`, and its optimizer state into `optimizer`. Collective.

    All files of the checkpoint are verified first, shared out over the ranks, at about 4 GB/s a file. An imported
    checkpoint has no optimizer state: `optimizer` must then not have made a step yet.

    Returns:
        the content of the checkpoint's `checkpoint.json`.

    Raises:
        ConfigError: the parameters are not those of `model`, or a file differs from what was written. On all ranks.
    """
    info = read_info(folder, ["step", "dtypes", "files", "config", "world", "optimizer_step"])
    _verify(folder)
    _check_parameters(folder, model)
    _read(folder, state.weights(model))
    if optimizer is not None:
        moments = state.moments(model, optimizer) if info["optimizer_step"] else {}
        _read(folder, state.main_weights(model, optimizer) | moments)
        state.set_optimizer_step(optimizer, info["optimizer_step"])
    return info


def _verify(folder: Path) -> None:
    """Raises ConfigError, on all ranks, unless every file has the recorded size and CRC-32. Collective."""
    world = dist.get_world_size()
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, verify_checkpoint_files(folder, dist.get_rank(), world))
    wrong = next(filter(None, everyone), None)
    if wrong is not None:
        raise damaged(folder / wrong[0], wrong[1])


def _read(folder: Path, shards: dict[str, Any]) -> dict[str, Any]:
    """Reads the shards' tensors in place, and returns a dict with the objects. Each rank reads its own shards only."""
    tensors = mcore_to_pyt_state_dict(shards, is_loading=True)
    planner = MCoreLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    read_tensors(folder, tensors, planner)
    return tensors


def _check_parameters(folder: Path, model: list[Any]) -> None:
    """Raises ConfigError, on all ranks, unless the checkpoint has the parameters of `model`. Collective."""
    local: dict[str, tuple[int, ...]] = {}
    for name, parameter in state.named_parameters(model).items():
        spec = spec_of(parameter)
        local[name] = spec.shape
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, local)
    expected = {name: shape for rank in everyone for name, shape in rank.items()}
    check_shapes(str(folder), expected, weight_shapes(read_metadata(folder)), fix="choose another run folder")


def check_shapes(
    folder: str, expected: dict[str, tuple[int, ...]], saved: dict[str, tuple[int, ...]], fix: str
) -> None:
    """Raises ConfigError, for the first parameter in `folder` that is missing, unexpected or of another shape.

    Args:
        expected, saved: full shapes of the model's and of the checkpoint's parameters, by name.
    """
    for name in sorted(expected.keys() | saved.keys()):
        if expected.get(name) != saved.get(name):
            here, there = (_words(shapes.get(name)) for shapes in (expected, saved))
            constraint = f"is of another model: parameter {name} is {there} there and {here} here"
            raise ConfigError(folder, ..., constraint, fix=fix)


def _words(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "a scalar"
