"""Functions that the ranks of the checkpoint tests run. To be imported after `platform.install()`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from linear_moe.config.load import save_config
from linear_moe.config.schema import Config
from linear_moe.config.vocabulary import vocab_size
from linear_moe.modeling.host import ParameterSpec
from linear_moe.modeling.tokens import TokenLayout
from linear_moe.options.errors import ConfigError
from linear_moe.training import build as training_model
from linear_moe.training.build import build_model
from linear_moe.training.checkpointing import SaveError, load_latest, save
from linear_moe.training.optimizer.build import build_optimizer, ddp_config
from linear_moe.training.optimizer.schedule import learning_rate, set_learning_rate
from linear_moe.training.parallel import Groups
from linear_moe.training.step import Stepper
from linear_moe.training.supervision.faults import StopSignal
from tests.distributed.cases import start


def small_buckets(config: Config) -> DistributedDataParallelConfig:
    """DDP settings with small buckets, so that there are several, with padding, if reduction overlaps."""
    return dataclasses.replace(ddp_config(config), bucket_size=1000 if config.optimizer.overlap else None)


class Trainer:
    """A model, its optimizer, and random batches that depend on the step alone."""

    def __init__(self, config: Config, groups: Groups):
        self.config, self.groups = config, groups
        with mock.patch.object(training_model, "ddp_config", small_buckets):
            self.model = build_model(config, vocab_size(config), groups)
        assert (len(self.model[0].buffers[0].buckets) > 1) == config.optimizer.overlap
        self.optimizer = build_optimizer(self.model, config)
        self.stepper = Stepper(config, self.model, self.optimizer, groups.device, StopSignal())

    def batches(self, step: int) -> Iterator[dict[str, Any]]:
        t = self.config.training
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(0, vocab_size(self.config), (t.global_batch, t.sequence_length + 1), generator=generator)
        positions = torch.arange(t.sequence_length).expand(t.micro_batch, -1)
        for part in rows.split(t.micro_batch)[self.groups.data_rank :: self.groups.data_size]:
            mask = torch.ones(t.micro_batch, t.sequence_length)
            yield {"tokens": part[:, :-1], "labels": part[:, 1:], "loss_mask": mask, "positions": positions}

    def run(self, steps: range) -> list[tuple[float, float]]:
        """Trains, and returns the loss and the gradient norm of every step."""
        results = []
        for step in steps:
            set_learning_rate(self.optimizer, learning_rate(step, self.config))
            result = self.stepper.train(self.batches(step))
            results.append((result.loss, result.gradient_norm))
        return results

    def save(self, step: int) -> Path:
        return save(self.config, step, self.model, self.optimizer, data="these tokens")

    def load(self) -> int:
        return load_latest(self.config, self.model, self.optimizer)

    def weights(self) -> dict[str, tuple[tuple[int, ...], Tensor]]:
        """Offset of this rank's share in the full parameter, and a copy of the share, by parameter name."""
        (chunk,) = self.model
        inner = chunk.module
        parts = {}
        for name, parameter in inner.named_parameters():
            spec: ParameterSpec = parameter.spec
            offset = [0] * len(spec.shape)
            for dim, axis in spec.axes.items():
                offset[dim] = inner.host.rank(axis) * parameter.shape[dim]
            parts[name] = (tuple(offset), parameter.detach().clone())
        return parts


def draw() -> list[float]:
    """The next number of every random generator, and the state of Megatron's random tracker as numbers."""
    tracked = [state.double().sum().item() for state in get_cuda_rng_tracker().get_states().values()]
    return [torch.rand(()).item(), random.random(), float(np.random.rand()), *tracked]  # noqa: NPY002


def resume(config: dict[str, Any], before: int, after: int) -> dict[str, Any]:
    """Runs a training without a break, and one resumed from its checkpoint in a model with other initial weights."""
    tree, groups = start(config)
    first = Trainer(tree, groups)
    first.run(range(1, before + 1))
    draw()
    first.save(before)
    numbers = draw()
    went_on = first.run(range(before + 1, before + after + 1))
    reseeded = copy.deepcopy(tree)
    reseeded.training.seed += 1
    second = Trainer(reseeded, groups)
    fresh = second.weights()
    loaded = second.load()
    numbers_again = draw()
    resumed = second.run(range(before + 1, before + after + 1))
    return {
        "step": loaded,
        "results": (went_on, resumed),
        "weights": (first.weights(), second.weights()),
        "fresh": fresh,
        "random": (numbers, numbers_again),
    }


def write(config: dict[str, Any], steps: int, after: int) -> dict[str, Any]:
    """Trains `steps` steps, saves, and trains `after` more."""
    trainer = Trainer(*start(config))
    trainer.run(range(1, steps + 1))
    folder = trainer.save(steps)
    weights = trainer.weights()
    return {"folder": folder, "weights": weights, "results": trainer.run(range(steps + 1, steps + after + 1))}


def rewrite(config: dict[str, Any], run: str, after: int) -> dict[str, Any]:
    """Resumes a checkpoint that another layout saved, saves it at once in the run folder `run`, and trains on."""
    tree, groups = start(config)
    trainer = Trainer(tree, groups)
    step = trainer.load()
    weights = trainer.weights()
    target = copy.deepcopy(tree)
    target.run = run
    folder = save(target, step, trainer.model, trainer.optimizer)
    return {"folder": folder, "weights": weights, "results": trainer.run(range(step + 1, step + after + 1))}


def roll_back(config: dict[str, Any]) -> dict[str, list[str]]:
    """Saves steps 100 and 200, goes back to 100 by naming it in `latest`, and saves steps 150 and 160.

    Returns:
        by step, the names in the checkpoints folder after the save, and last the content of `latest`.
    """
    tree, groups = start(config)
    trainer = Trainer(tree, groups)
    checkpoints, there = Path(tree.run) / "checkpoints", {}
    for step in (100, 200, 150, 160):
        if step == 150:
            (checkpoints / "latest").write_text("step_00000100\n")
        folder = trainer.save(step)
        names = sorted(f.name for f in checkpoints.iterdir())
        there[str(step)] = [*names, (checkpoints / "latest").read_text().strip()]
        assert folder.is_dir() and trainer.load() == step
    return there


def read_with_megatron(config: dict[str, Any], folder: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint, read by Megatron-Core's own loader.

    Megatron-Core's `load_plain_tensors` would do, but fails with torch 2.15: it passes the new properties of a tensor
    on to `torch.empty`.
    """
    start(config)
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: t for name, t in entries.items() if isinstance(t, TensorStorageMetadata)}
    whole = {name: torch.empty(t.size, dtype=t.properties.dtype, device="meta") for name, t in tensors.items()}
    wanted = {name: ShardedTensor.from_rank_offsets(name, t).without_data() for name, t in whole.items()}
    return dist_checkpointing.load(wanted, folder, validate_access_integrity=False)


def decay(config: dict[str, Any], lr: float) -> dict[str, Any]:
    """Every parameter before and after a step with zero gradients, which only weight decay can change."""
    trainer = Trainer(*start(config))
    before = {name: value for name, (_, value) in trainer.weights().items()}
    decays = {name: p.spec.decay for name, p in trainer.model[0].module.named_parameters()}
    trainer.model[0].zero_grad_buffer()
    trainer.optimizer.zero_grad()
    set_learning_rate(trainer.optimizer, lr)
    trainer.optimizer.step()
    after = {name: value for name, (_, value) in trainer.weights().items()}
    return {"before": before, "after": after, "decays": decays}


def load_error(config: dict[str, Any]) -> str:
    """The error message of loading a checkpoint that does not fit the model; "loaded" if there is no error."""
    trainer = Trainer(*start(config))
    try:
        trainer.load()
    except ConfigError as error:
        return str(error)
    return "loaded"


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Makes writes beyond `size` bytes of a file fail in this process, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def free_space(size: int) -> Iterator[None]:
    """Makes the file system report that `size` bytes are free."""
    with mock.patch.object(shutil, "disk_usage", return_value=SimpleNamespace(free=size)):
        yield


def failing_saves(config: dict[str, Any], failures: dict[str, tuple[str, int, int]]) -> dict[str, Any]:
    """Makes a good save, a failing one per entry of `failures` (kind, bytes, rank), a good one, and a resume."""
    tree, groups = start(config)
    trainer = Trainer(tree, groups)
    trainer.run(range(1, 3))
    trainer.save(2)
    expected = trainer.weights()
    kinds = {"file size": file_size_limit, "free space": free_space}
    errors, folders, states = {}, {}, {}
    for step, (name, (kind, size, rank)) in enumerate(failures.items(), 3):
        trainer.run(range(step, step + 1))
        try:
            with kinds[kind](size) if groups.rank == rank else contextlib.nullcontext():
                trainer.save(step)
            errors[name] = "saved"
        except SaveError as error:
            errors[name] = str(error)
        dist.barrier()
        folders[name] = sorted(f.name for f in (Path(tree.run) / "checkpoints").iterdir())
        resumed = Trainer(tree, groups)
        states[name] = resumed.load() == 2 and all(
            torch.equal(value, expected[key][1]) for key, (_, value) in resumed.weights().items()
        )
    last = trainer.save(100)
    return {
        "errors": errors,
        "folders": folders,
        "previous is good": states,
        "last": last.name,
        "loads": trainer.load(),
    }


def logits(config: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """Trains two steps, saves, and computes the logits of `tokens [B, T]`.

    Returns:
        the logits of this rank's part of the vocabulary, the first token id of this part, and whether tensor ranks
        split tokens.
    """
    tree, groups = start(config)
    trainer = Trainer(tree, groups)
    trainer.run(range(1, 3))
    trainer.save(2)
    if groups.rank == 0:
        save_config(tree, Path(tree.run) / "config.yaml")
    (chunk,) = trainer.model
    model = chunk.module.eval()
    with torch.no_grad():
        part = model(tokens, TokenLayout(*tokens.shape))
    return {"logits": part, "first": groups.tensor_rank * part.shape[-1], "tensor_sequence": model.host.tensor_sequence}
