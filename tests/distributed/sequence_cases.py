"""Functions that the ranks of the sequence-parallel tests run."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from linear_moe.config.vocabulary import vocab_size
from linear_moe.layout.sequence import PieceOrder
from linear_moe.modeling.activations import Activations
from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.model import LanguageModel
from linear_moe.options.load import from_dict
from linear_moe.training.build import build_model
from linear_moe.training.data import prepare_data
from linear_moe.training.data.loader import TrainLoader, validation_batches
from linear_moe.training.optimizer.build import build_optimizer
from linear_moe.training.optimizer.schedule import learning_rate, set_learning_rate
from linear_moe.training.sequence import exchange
from linear_moe.training.sequence.cut import cut, share
from linear_moe.training.sequence.exchange import SequenceGroup
from linear_moe.training.sequence.pieces import pieces_layout
from linear_moe.training.step import Stepper
from linear_moe.training.supervision.faults import StopSignal
from tests.distributed import sequences
from tests.distributed.cases import start
from tests.distributed.sequences import (
    HIDDEN,
    LENGTH,
    ROWS,
    SHORT,
    VOCABULARY,
    one_pass,
    own_layout,
    settings,
    stream,
    whole_layout,
)
from tests.unit.modeling.mixers.common import build


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def line(layout: str, strategy: str, attention: str = "all_gather") -> SequenceGroup:
    return SequenceGroup(PieceOrder(ranks(), layout), dist.get_rank(), dist.group.WORLD, strategy, attention)


def sequence_mixer_on_short_pieces(name: str, fields: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Results of `sequence_mixer` on the short sequences of `SHORT`."""
    with mock.patch.multiple(sequences, **SHORT):
        return sequence_mixer(name, fields)


def sequence_mixer(name: str, fields: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Results of `one_pass` on this rank's tokens, by setting. Gradients of parameters are summed over the ranks."""
    mixer, results = build(name, fields), {}
    for layout, strategy, attention, packed in settings(mixer, ranks()):
        own = line(layout, strategy, attention)
        pieces, own_tokens = own_layout(own, packed)
        result = one_pass(mixer, share(stream(packed, 0), pieces), share(stream(packed, 1), pieces), own_tokens)
        for key, gradient in result.items():
            if key not in ("output", "tokens"):
                dist.all_reduce(gradient)
        results[f"{layout}-{strategy}-{attention}-{packed}"] = result
    return results


def sequence_bytes(
    name: str, fields: dict[str, Any], layout: str, strategy: str, length: int, attention: str = "all_gather"
) -> tuple[int, int]:
    """Bytes that this rank hands to collectives in one layer's forward and backward pass, over rows of `length`."""
    mixer, own = build(name, fields), line(layout, strategy, attention)
    pieces = cut(ROWS, length, own.order, own.rank)
    x = share(torch.randn(ROWS, length, HIDDEN, generator=torch.Generator().manual_seed(0)), pieces)
    tokens = x.flatten(0, 1).requires_grad_()
    positions = share(torch.arange(length).expand(ROWS, length), pieces)
    counted = 0

    def counting(function: Any, place: int | None) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal counted
            given = [op.tensor for op in args[0] if op.op is not dist.irecv] if place is None else [args[place]]
            counted += sum(x.numel() * x.element_size() for x in given)
            return function(*args, **options)

        return call

    # Index of the argument that holds the sent tensor: 1 for collectives, 0 for sends. None: the first argument is a
    # list of sends and receives.
    collectives = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")
    places = dict.fromkeys(collectives, 1) | {"isend": 0, "send": 0, "batch_isend_irecv": None}
    with ExitStack() as stack:
        for function, place in places.items():
            stack.enter_context(mock.patch.object(exchange.dist, function, counting(getattr(dist, function), place)))
        y = mixer(tokens, pieces_layout(pieces, own, torch.device("cpu"), positions, None))
        forward, counted = counted, 0
        y.sum().backward()
    return forward, counted


def sequence_training(config: dict[str, Any], steps: int) -> dict[str, Any]:
    """Trains on the loader's batches with the trainer's Stepper, then validates.

    Returns:
        (loss, gradient norm, tokens) of every step and of the validation, the router losses of every step, and the
        routing.
    """
    tree, groups = start(config)
    data = prepare_data(tree)
    model = build_model(tree, vocab_size(tree), groups)
    optimizer = build_optimizer(model, tree)
    stepper = Stepper(tree, model, optimizer, groups.device, StopSignal())
    batches = TrainLoader(data, tree, groups.data_rank, groups.data_size, 0, groups.sequence_rank)
    results, router = [], []
    for step in range(1, steps + 1):
        set_learning_rate(optimizer, learning_rate(step, tree))
        results.append(stepper.train(batches))
        router.append(stepper.auxiliary_losses())
    held_out = validation_batches(data, tree, groups.data_rank, groups.data_size, groups.sequence_rank)
    scored = stepper.validate(held_out, 1)
    losses = [(result.loss, result.gradient_norm, result.tokens) for result in [*results, scored]]
    return {"losses": losses, "router": router, "routing": [asdict(layer) for layer in stepper.routing()]}


def sequence_model(
    model: dict[str, Any], modules: list[str], packed: bool, layout: str | None, attention: str = "all_gather"
) -> dict[str, Tensor]:
    """Losses of this rank's tokens in a whole model, and gradients of all parameters, summed over the ranks.

    Args:
        modules: modules that are computed again in the backward pass.
        layout: layout of the pieces; None: all tokens are on this rank.
    """
    host = Host(activations=Activations(modules))
    network = LanguageModel(from_dict(ModelConfig, model), VOCABULARY, host)
    initialize(network, host, seed=3)
    rows = 1 if packed else ROWS
    text = torch.randint(0, VOCABULARY, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    tokens, labels, where = text[:, :-1], text[:, 1:], whole_layout(packed)
    if layout is not None:
        pieces, where = own_layout(line(layout, "all_gather", attention), packed)
        tokens, labels = share(tokens, pieces), share(labels, pieces)
    shape = (where.batch, where.length)
    losses = network(tokens.reshape(shape), where, labels=labels.reshape(shape))
    losses.sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    if layout is not None:
        for gradient in gradients.values():
            dist.all_reduce(gradient)
    return {"losses": losses.detach().view(rows, -1, 1)} | gradients
