"""Constraints on recomputation, the learning rate's schedule and the batch."""

from __future__ import annotations

from linear_moe.config.schema import Config
from linear_moe.layout.processes import ProcessMesh
from linear_moe.modeling.activations import MODULES
from linear_moe.options.checks import check_most, unused
from linear_moe.options.errors import ConfigError, nearest


def check_recompute(config: Config) -> None:
    """Raises ConfigError for options of recomputation that do not fit each other or the model."""
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
    check_most("training.recompute_layers", training.recompute_layers or 1, "model.num_layers", config.model.num_layers)


def check_schedule(config: Config) -> None:
    """Raises ConfigError for a learning-rate schedule that does not fit the number of steps or the peak rate."""
    schedule, steps = config.schedule, config.training.steps
    check_most("schedule.warmup_steps", schedule.warmup_steps, "training.steps", steps)
    check_most("schedule.min_lr", schedule.min_lr, "optimizer.lr", config.optimizer.lr)
    if schedule.decay_steps is None:
        return
    if schedule.type == "cosine" and schedule.decay_steps < schedule.warmup_steps:
        constraint = f"must be >= schedule.warmup_steps ({schedule.warmup_steps})"
        raise ConfigError("schedule.decay_steps", schedule.decay_steps, constraint)
    if schedule.type == "wsd":
        left = steps - schedule.warmup_steps
        check_most("schedule.decay_steps", schedule.decay_steps, "training.steps - schedule.warmup_steps", left)


def check_batch(config: Config, layout: ProcessMesh) -> None:
    """Raises ConfigError unless the global batch is a whole number of micro-batches for every replica."""
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
