"""Samples in which rows, micro-batches and ranks count different numbers of tokens. Without Megatron-Core."""

from __future__ import annotations

import torch
from torch import Tensor

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
