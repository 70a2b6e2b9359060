"""Functions that the ranks of test_layouts.py run: training as the command `train` does it.

To be imported after `platform.install()`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from linear_moe.config.schema import Config
from linear_moe.config.vocabulary import vocab_size
from linear_moe.training import build as training_model
from linear_moe.training.build import build_model
from linear_moe.training.checkpointing import load_latest, save, state
from linear_moe.training.data import TrainLoader, prepare_data, validation_batches
from linear_moe.training.data import loader as data_loader
from linear_moe.training.data.dataset import SyntheticDataset
from linear_moe.training.optimizer.build import build_optimizer, optimizer_parts, stretches
from linear_moe.training.optimizer.schedule import learning_rate, set_learning_rate
from linear_moe.training.parallel import Groups
from linear_moe.training.step import Stepper
from linear_moe.training.supervision.faults import StopSignal
from tests.distributed.cases import start
from tests.distributed.checkpoint_cases import small_buckets
from tests.distributed.harness import all_tensors
from tests.distributed.masked import masked_sample

Pieces = dict[str, tuple[tuple[int, ...], Tensor, Tensor]]
"""Name -> shape of the full tensor, indices of some of its elements in the flattened tensor, and their values."""

masked_samples = mock.patch.object(SyntheticDataset, "__getitem__", masked_sample)


def merged(replicas: int) -> Any:
    """Patch for one process: its micro-batch consists of the micro-batches that `replicas` replicas compute at once."""
    of_rank = data_loader.rank_samples

    def samples(start: int, rank: int, ranks: int, global_batch: int, micro_batch: int) -> Iterator[list[int]]:
        shares = [of_rank(start, r, replicas, global_batch, micro_batch // replicas) for r in range(replicas)]
        yield from (list(chain(*together)) for together in zip(*shares, strict=True))

    return mock.patch.object(data_loader, "rank_samples", samples if replicas > 1 else of_rank)


class Run:
    """A model, its optimizer and its data, made as a training run makes them."""

    def __init__(self, config: Config, groups: Groups):
        self.config, self.groups = config, groups
        with mock.patch.object(training_model, "ddp_config", small_buckets):
            self.model = build_model(config, vocab_size(config), groups)
        if groups.first_stage:  # on later stages Megatron makes a single bucket
            assert (len(self.model[0].buffers[0].buckets) > 1) == config.optimizer.overlap
        self.optimizer = build_optimizer(self.model, config)
        self.stepper = Stepper(config, self.model, self.optimizer, groups.device, StopSignal())
        self.data = prepare_data(config)

    def train(self, first: int, last: int) -> Iterator[dict[str, Any]]:
        """Trains, and yields the stepper's result of every step with the logged router losses and routing."""
        groups, consumed = self.groups, (first - 1) * self.config.training.global_batch
        batches = TrainLoader(self.data, self.config, groups.data_rank, groups.data_size, consumed)
        for step in range(first, last + 1):
            set_learning_rate(self.optimizer, learning_rate(step, self.config))
            result = asdict(self.stepper.train(batches))
            yield result | {
                "router": self.stepper.auxiliary_losses(),
                "routing": [asdict(layer) for layer in self.stepper.routing()],
            }

    def validate(self) -> float:
        batches = validation_batches(self.data, self.config, self.groups.data_rank, self.groups.data_size)
        return self.stepper.validate(batches, self.config.training.eval_batches).loss

    def places(self, parameter: Any) -> Tensor:
        """Indices in the flattened full parameter of the elements of this rank's share, shaped like the share."""
        spec, host = parameter.spec, self.stepper.host
        index = torch.arange(math.prod(spec.shape)).view(spec.shape)
        for dim, axis in spec.axes.items():
            index = index.chunk(host.size(axis), dim)[host.rank(axis)]
        assert index.shape == parameter.shape
        return index

    def weights(self) -> Pieces:
        """Weights of this rank's parameters."""
        return {
            name: (p.spec.shape, self.places(p).flatten(), p.detach().flatten().clone())  # type: ignore[attr-defined]
            for name, p in state.named_parameters(self.model).items()
        }

    def gradients(self) -> Pieces:
        """Gradients, reduced, averaged and clipped, of the elements that this rank's optimizers update."""
        names = {p: name for name, p in state.named_parameters(self.model).items()}
        shares: Pieces = {}
        for part in optimizer_parts(self.optimizer):
            for p, main, first, last in stretches(part):
                gradient = main.grad.detach().flatten().clone()
                shares[names[p]] = (p.spec.shape, self.places(p).flatten()[first:last], gradient)
        return shares

    def moments(self) -> dict[str, Pieces]:
        """The optimizer state that this rank owns, by its name."""
        owned = state.owned_by_optimizer(self.optimizer)
        by_kind: dict[str, Pieces] = {}
        for name, p in state.named_parameters(self.model).items():
            if p in owned:
                index = self.places(p).flatten()[owned[p].start : owned[p].stop]
                for key, moment in owned[p].moments.items():
                    by_kind.setdefault(key, {})[name] = (p.spec.shape, index, moment.clone())  # type: ignore[attr-defined]
        return by_kind

    def forget(self) -> None:
        """Overwrites everything that a checkpoint restores: weights and moments with NaN, and the step."""
        with torch.no_grad():
            for parameter in state.named_parameters(self.model).values():
                parameter.fill_(torch.nan)
            for owned in state.owned_by_optimizer(self.optimizer).values():
                for moment in owned.moments.values():
                    moment.fill_(torch.nan)
        state.set_optimizer_step(self.optimizer, 1000)


def follow(config: dict[str, Any], steps: int, replicas: int = 1, save_at: int = 0) -> dict[str, Any]:
    """Trains from the start, then validates.

    Args:
        config: configuration of the run.
        steps: number of steps to train.
        replicas: number of replicas that one process stands for; see `merged`.
        save_at: step after which to save; 0: nothing is saved.

    Returns:
        the initial weights, the gradients of the first step as the optimizer got them, the results of every step and of
        the validation, and the final weights.
    """
    with masked_samples, merged(replicas):
        run = Run(*start(config))
        outcome: dict[str, Any] = {"initial": run.weights(), "gradients": {}}

        def record(update: Any) -> Any:
            def step(*args: Any) -> Any:
                if not outcome["gradients"]:
                    outcome["gradients"] = run.gradients()
                return update(*args)

            return step

        for part in optimizer_parts(run.optimizer):
            part.optimizer.step = record(part.optimizer.step)
        outcome["steps"] = list(run.train(1, save_at))
        if save_at:
            save(run.config, save_at, run.model, run.optimizer, data=run.data.fingerprint)
        outcome["steps"] += run.train(save_at + 1, steps)
        return outcome | {"validation": run.validate(), "final": run.weights()}


def resume_elsewhere(config: dict[str, Any], folders: dict[str, str], go_on: list[str], after: int) -> dict[str, Any]:
    """Loads checkpoints that other layouts saved, one after the other into one model, and trains on from some.

    Args:
        folders: run folders by name.
        go_on: names of the runs to train on from.
        after: number of steps to train.

    Returns:
        for each run, the names of the tensors that differ from those that PyTorch's own reader finds in the checkpoint;
        and for each run in `go_on`, the results of its steps.
    """
    tree, groups = start(config)
    run = Run(tree, groups)
    wrong, steps = {}, {}
    for name, folder in folders.items():
        tree.run = folder
        run.forget()
        step = load_latest(tree, run.model, run.optimizer)
        full = all_tensors(next(Path(folder, "checkpoints").glob("step_*")))
        here = {f"model.{key}": piece for key, piece in run.weights().items()}
        for moment, pieces in run.moments().items():
            here |= {f"optimizer.{moment}.{key}": piece for key, piece in pieces.items()}
        wrong[name] = [k for k, (_, index, value) in here.items() if not torch.equal(full[k].flatten()[index], value)]
        if name in go_on:
            with masked_samples:
                steps[name] = list(run.train(step + 1, step + after))
    return {"wrong": wrong, "steps": steps}
