"""Whole model on documents packed by the loader: the results are those of each document alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from linear_moe.config.schema import Config
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.model import LanguageModel
from linear_moe.modeling.tokens import TokenLayout
from linear_moe.options.load import from_dict
from linear_moe.training import platform
from linear_moe.training.data import TrainLoader, prepare_data
from linear_moe.training.data.loader import Batch
from tests.tolerances import FP32, FP32_GRADIENT_FLOOR, assert_close, assert_gradients_close
from tests.unit.inference.common import CASES

ROWS, LENGTH, VOCAB = 3, 40, 12  # VOCAB is also the mean length of a document
END = 0  # the token that ends documents


@dataclass
class Packed:
    """Micro-batch with its documents, and the model."""

    model: LanguageModel
    batch: Batch
    layout: TokenLayout
    documents: list[slice]  # places in the rows laid end to end

    def losses(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Losses per token `[ROWS * LENGTH]` of all documents, from one forward pass as in training."""
        shape = (self.layout.batch, self.layout.length)
        return self.model(tokens.reshape(shape), self.layout, labels=labels.reshape(shape)).flatten()

    @property
    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """Flattens tokens, labels and loss mask to `[ROWS * LENGTH]`."""
        return self.batch["tokens"].flatten(), self.batch["labels"].flatten(), self.batch["loss_mask"].flatten()


@pytest.fixture(scope="module", params=CASES)
def packed(request: pytest.FixtureRequest) -> Packed:
    platform.install()
    from linear_moe.training.step import token_layout

    config = from_dict(
        Config,
        {
            "model": CASES[request.param] | {"vocab_size": VOCAB},
            "data": {"corpus": "synthetic", "isolate_documents": True},
            "training": {"sequence_length": LENGTH, "micro_batch": ROWS, "global_batch": ROWS, "seed": 3},
        },
    )
    batch = next(TrainLoader(prepare_data(config), config, 0, 1))
    documents, first = [], 0
    for i, token in enumerate(batch["tokens"].flatten().tolist()):
        if token == END or (i + 1) % LENGTH == 0:
            documents.append(slice(first, i + 1))
            first = i + 1
    host = Host(torch.float32)
    model = LanguageModel(config.model, VOCAB, host)
    initialize(model, host, seed=0)
    return Packed(model, batch, token_layout(batch), documents)


def test_the_batch_has_all_kinds_of_documents(packed: Packed) -> None:
    lengths = [d.stop - d.start for d in packed.documents]
    assert sum(lengths) == ROWS * LENGTH and len(lengths) >= 8
    assert 1 in lengths and max(lengths) > 16
    _, _, mask = packed.flat
    assert {bool(mask[d.stop - 1]) for d in packed.documents} == {True, False}  # the row ends, or the document does


def test_equals_documents_alone(packed: Packed) -> None:
    """Losses of all tokens and gradients of all parameters equal those of the documents alone."""
    from linear_moe.training.step import masked_loss

    model = packed.model
    tokens, labels, mask = packed.flat
    model.zero_grad()
    losses = packed.losses(tokens, labels)
    total, count, _ = masked_loss(packed.batch["loss_mask"], losses)
    total.backward()
    actual = {name: p.grad for name, p in model.named_parameters()}

    model.zero_grad()
    alone = []
    for d in packed.documents:
        x, y = tokens[None, d], labels[None, d]
        alone.append(model(x, TokenLayout(1, x.shape[1]), labels=y).flatten())
        (alone[-1] * mask[d]).sum().backward()
    assert_close(losses, torch.cat(alone), FP32, "losses per token")
    assert count == mask.sum() < len(tokens)
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert_gradients_close(actual, expected, FP32, FP32_GRADIENT_FLOOR)


@torch.no_grad()
def test_never_reads_across_documents(packed: Packed) -> None:
    """Changing the tokens of one document changes only the losses of this document."""
    tokens, labels, mask = packed.flat
    before = packed.losses(tokens, labels)
    for d in packed.documents:
        changed, inside = tokens.clone(), torch.zeros_like(tokens, dtype=torch.bool)
        inside[d] = True
        own = inside & (tokens != END)
        changed[own] = changed[own] % (VOCAB - 1) + 1  # another token, which is not END
        after = packed.losses(changed, labels)
        assert_close(after[~inside], before[~inside], FP32, f"losses outside {d}")
        if own.any():
            assert ((after - before)[own & mask.bool()].abs() > 1e-3).any(), d
