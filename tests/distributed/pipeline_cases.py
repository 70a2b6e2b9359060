"""Functions that the ranks of the pipeline tests run. To be imported after `platform.install()`."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from linear_moe.config.vocabulary import vocab_size
from linear_moe.training import step as training_step
from linear_moe.training.build import build_model
from linear_moe.training.checkpointing import load_latest, save
from linear_moe.training.optimizer.build import build_optimizer
from linear_moe.training.step import Stepper
from linear_moe.training.supervision.faults import StopSignal
from tests.distributed.cases import shard, start
from tests.distributed.masked import micro_batches


def pipeline(
    config: dict[str, Any], steps: int, save_at: int = 0, save_to: str = "", load: bool = False
) -> dict[str, Any]:
    """Trains with the trainer's own Stepper, on batches that depend on the step alone, and validates once.

    It also asserts that copies of tied embeddings stay equal.

    Args:
        steps: the last step.
        save_at: step after which to save, in the run folder `save_to`; 0: nothing is saved.
        load: whether to begin with the checkpoint of the run folder.

    Returns:
        loss, gradient norm, tokens, router losses and routing of every step and of the validation; the layers of this
        rank's chunks; and, unless a checkpoint was loaded, the shards of the first step's gradients before clipping.
    """
    tree, groups = start(config)
    model = build_model(tree, vocab_size(tree), groups)
    optimizer = build_optimizer(model, tree)
    stepper = Stepper(tree, model, optimizer, groups.device, StopSignal())
    place = groups.data_rank, groups.data_size
    first_gradients: dict[str, Any] = {}
    update = optimizer.step
    first = load_latest(tree, model, optimizer) if load else 0

    def record_and_update() -> Any:
        for inner in (chunk.module for chunk in model):
            first_gradients.update({name: shard(inner, p) for name, p in inner.named_parameters() if p.requires_grad})
        return update()

    def train(step: int) -> dict[str, Any]:
        result = stepper.train(micro_batches(tree, step, *place))
        routing = {layer.layer: [layer.load, layer.bias] for layer in stepper.routing()}
        return vars(result) | {"router": stepper.auxiliary_losses(), "routing": routing}

    # In the first step gradients are all-reduced, so that every rank has them whole. Otherwise each rank would have
    # only the shard of its distributed optimizer.
    whole = partial(get_forward_backward_func(), force_all_reduce=True)
    results = []
    for step in range(first, steps):
        if step:
            results.append(train(step))
        else:
            with (
                mock.patch.object(training_step, "get_forward_backward_func", return_value=whole),
                mock.patch.object(optimizer, "step", record_and_update),
            ):
                results.append(train(step))
        if step + 1 == save_at:
            tree.run = save_to
            save(tree, save_at, model, optimizer)
    results.append(vars(stepper.validate(micro_batches(tree, 100, *place), 1)))
    assert_tied([chunk.module for chunk in model])
    layers = [list(map(int, chunk.module.layers)) for chunk in model]
    return {"results": results, "gradients": first_gradients, "layers": layers, "stage": groups.stage, "first": first}


def assert_tied(chunks: list[Any]) -> None:
    """Asserts that all ranks' copies of each share of the embedding are equal, bit for bit."""
    mine = {
        inner.host.rank("tensor"): inner.shared_embedding_or_output_weight().detach().cpu()
        for inner in chunks
        if inner.share_embeddings_and_output_weights and inner.embedding is not None
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    shares: dict[int, torch.Tensor] = {}
    for place, weight in (item for copies in everyone for item in copies.items()):
        assert torch.equal(weight, shares.setdefault(place, weight)), "copies of a tied embedding differ"
