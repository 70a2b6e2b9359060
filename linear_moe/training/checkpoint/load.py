"""Loading: into any layout, after checking that the checkpoint is of this model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner, mcore_to_pyt_state_dict
from megatron.core.optimizer import MegatronOptimizer

from linear_moe.config.errors import ConfigError
from linear_moe.config.schema import Config
from linear_moe.inference.checkpoint_reader import latest_checkpoint, read_info, read_tensors, weight_shapes
from linear_moe.modeling.host import ParameterSpec
from linear_moe.training.checkpoint import state
from linear_moe.training.checkpoint.collective import on_rank_0

logger = logging.getLogger(__name__)

# What may differ between a checkpoint's model and the one that resumes from it: how it started, how it is computed, and
# what its losses weigh; the weights mean the same.
FREE = {"init_std", "scale_output_init", "moe.aux_loss", "moe.z_loss", "moe.experts", "moe.dispatcher"}

# What the position in the data means nothing without.
ORDER = {
    "training": {"seed", "global_batch", "sequence_length"},
    "data": {"corpus", "validation_fraction", "tokenizer.type", "tokenizer.path", "tokenizer.vocab_size"},
}


def check_resume(config: Config) -> None:
    """Raises ConfigError, naming the first differing path, when the run's checkpoint is of another model or data order.

    Needs no process group; does nothing where there is no checkpoint.
    """
    folder = latest_checkpoint(Path(config.run) / "checkpoints", warn=False)
    if folder is None:
        return
    saved, now = read_info(folder)["config"], config.to_dict()
    for section in ("model", *ORDER):
        there, here = dict(_leaves(saved[section])), dict(_leaves(now[section]))
        for path in [*here, *(path for path in there if path not in here)]:
            pinned = path in ORDER[section] if section in ORDER else path not in FREE
            unset = path == "vocab_size" and None in (there.get(path), here.get(path))  # the tokenizer's; shapes will tell
            if pinned and not unset and there.get(path) != here.get(path):
                raise ConfigError(
                    f"{section}.{path}",
                    here.get(path),
                    f"the checkpoint {folder} has {there.get(path)!r}",
                    fix="set it back, or choose another run folder",
                )


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, list(tree) if isinstance(tree, tuple) else tree


def load_latest(config: Config, model: list[Any], optimizer: MegatronOptimizer) -> int:
    """Resume from the run's newest complete checkpoint; collective. Returns its step, 0 where there is none.

    Weights, Adam's moments and step are restored in any layout; the random states only in the one that saved them.
    """
    folder = on_rank_0(lambda: latest_checkpoint(Path(config.run) / "checkpoints"))
    if folder is None:
        return 0
    info = load(folder, model, optimizer)
    now = config.to_dict()["parallel"]
    if info["world"] == dist.get_world_size() and info["config"]["parallel"] == now:
        rng = state.rng_object(None)
        state.set_rng_state(_read(folder, {rng.unique_key: [rng]})[rng.unique_key][0])
    elif dist.get_rank() == 0:
        logger.warning("%s was saved in another layout: the random generators start anew", folder)
    return info["step"]


def load(folder: Path, model: list[Any], optimizer: MegatronOptimizer | None = None) -> dict[str, Any]:
    """Read a checkpoint's weights, and the optimizer's state, into `model` and `optimizer`; collective.

    Returns the checkpoint's `checkpoint.json`. Raises ConfigError, alike on all ranks, when parameters differ.
    """
    info = read_info(folder)
    _check_parameters(folder, model)
    _read(folder, state.weights(model))
    if optimizer is not None:
        _read(folder, state.main_weights(model, optimizer) | state.moments(model, optimizer))
        state.set_optimizer_step(optimizer, info["optimizer_step"])
    return info


def _read(folder: Path, shards: dict[str, Any]) -> dict[str, Any]:
    """Fill the shards' tensors in place; objects come in the returned dict. Each rank reads what it needs."""
    tensors = mcore_to_pyt_state_dict(shards, is_loading=True)
    planner = MCoreLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    read_tensors(folder, tensors, planner)
    return tensors


def _check_parameters(folder: Path, model: list[Any]) -> None:
    local: dict[str, tuple[int, ...]] = {}
    for name, parameter in state.named_parameters(model).items():
        spec: ParameterSpec = parameter.spec  # type: ignore[attr-defined]
        local[name] = spec.shape
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, local)
    expected = {name: shape for rank in everyone for name, shape in rank.items()}
    saved = weight_shapes(folder)
    for name in sorted(expected.keys() | saved.keys()):
        if expected.get(name) != saved.get(name):
            here, there = (_words(shapes.get(name)) for shapes in (expected, saved))
            raise ConfigError(
                str(folder),
                ...,
                f"is of another model: parameter {name} is {there} there and {here} here",
                fix="choose another run folder",
            )


def _words(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "a scalar"
