"""Samples in which rows, micro-batches and ranks count different numbers of tokens. Without Megatron-Core."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from linear_moe.config.schema import Config
from linear_moe.config.vocabulary import vocab_size
from linear_moe.training.data.dataset import SyntheticDataset

draw = SyntheticDataset.__getitem__


def masked_sample(dataset: SyntheticDataset, number: int) -> dict[str, Tensor]:
    """A sample of which a share is counted that differs from sample to sample; of two in ten, which may be a whole
    micro-batch, nothing.
    """
    sample = draw(dataset, number)
    generator = torch.Generator().manual_seed(number)
    share = 0.0 if number // 2 % 5 == 2 else float(torch.rand((), generator=generator))
    chosen = torch.rand(sample["loss_mask"].shape, generator=generator) < share
    return sample | {"loss_mask": sample["loss_mask"] * chosen}


def global_batch(config: Config, number: int) -> dict[str, Tensor]:
    """One global batch, as the loader lays it out. Its second micro-batch counts no token, the others few to most."""
    t = config.training
    generator = torch.Generator().manual_seed(number)
    rows = torch.randint(0, vocab_size(config), (t.global_batch, t.sequence_length + 1), generator=generator)
    share = torch.rand(t.global_batch, 1, generator=generator)
    share[t.micro_batch : 2 * t.micro_batch] = 0
    mask = (torch.rand(t.global_batch, t.sequence_length, generator=generator) < share).float()
    positions = torch.arange(t.sequence_length).repeat(t.global_batch, 1)
    return {"tokens": rows[:, :-1], "labels": rows[:, 1:], "loss_mask": mask, "positions": positions}


def micro_batches(config: Config, number: int, rank: int, ranks: int) -> Iterator[dict[str, Tensor]]:
    """A data-parallel rank's share of a global batch: the loader's equal runs."""
    batch = global_batch(config, number)
    t = config.training
    share = t.global_batch // ranks
    for start in range(rank * share, (rank + 1) * share, t.micro_batch):
        yield {key: value[start : start + t.micro_batch] for key, value in batch.items()}
