"""Samples with different numbers of counted tokens in rows, micro-batches and ranks. Imports no Megatron-Core."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from linear_moe.config.schema import Config
from linear_moe.config.vocabulary import vocab_size
from linear_moe.training.data.dataset import SyntheticDataset

draw = SyntheticDataset.__getitem__


def masked_sample(dataset: SyntheticDataset, number: int) -> dict[str, Tensor]:
    """A sample with a random share of counted tokens, another one for each sample.

    In two of ten samples, which can be a whole micro-batch, no token is counted.
    """
    sample = draw(dataset, number)
    generator = torch.Generator().manual_seed(number)
    share = 0.0 if number // 2 % 5 == 2 else float(torch.rand((), generator=generator))
    chosen = torch.rand(sample["loss_mask"].shape, generator=generator) < share
    return sample | {"loss_mask": sample["loss_mask"] * chosen}


def global_batch(config: Config, number: int) -> dict[str, Tensor]:
    """One global batch in the loader's form. In its second micro-batch no token is counted, in the others some are."""
    t = config.training
    generator = torch.Generator().manual_seed(number)
    rows = torch.randint(0, vocab_size(config), (t.global_batch, t.sequence_length + 1), generator=generator)
    share = torch.rand(t.global_batch, 1, generator=generator)
    share[t.micro_batch : 2 * t.micro_batch] = 0
    mask = (torch.rand(t.global_batch, t.sequence_length, generator=generator) < share).float()
    positions = torch.arange(t.sequence_length).repeat(t.global_batch, 1)
    return {"tokens": rows[:, :-1], "labels": rows[:, 1:], "loss_mask": mask, "positions": positions}


def micro_batches(config: Config, number: int, rank: int, ranks: int) -> Iterator[dict[str, Tensor]]:
    """Yields the micro-batches of a data-parallel rank, which takes an equal run of rows, as in the loader."""
    batch = global_batch(config, number)
    t = config.training
    share = t.global_batch // ranks
    for start in range(rank * share, (rank + 1) * share, t.micro_batch):
        yield {key: value[start : start + t.micro_batch] for key, value in batch.items()}
