"""Micro-batches for one data-parallel rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from linear_moe.config.schema import Config
from linear_moe.layout.sequence import order_of, padded_length
from linear_moe.training.data.dataset import PADDING, Sample, open_dataset, samples_per_epoch
from linear_moe.training.data.prepared import PreparedData
from linear_moe.training.sequence.cut import split

Batch = dict[str, Any]
"""A micro-batch of b rows: tokens, labels, positions `[b, T]` int64, loss_mask `[b, T]` fp32. With isolated documents
also cu_seqlens `[documents + 1]` int64 and max_document (int) of the rows laid end to end, `[1, b * T]`. If sequences
are cut into pieces, a rank's share of these tensors, and `cut`, which says what pieces the share consists of."""


def rank_samples(start: int, rank: int, ranks: int, global_batch: int, micro_batch: int) -> Iterator[list[int]]:
    """Yields the sample numbers of each micro-batch of a rank, for the global batch that begins at sample `start`.

    Each of the ranks takes an equal run of consecutive samples.
    """
    share = global_batch // ranks
    first = start + rank * share
    for i in range(first, first + share, micro_batch):
        yield list(range(i, i + micro_batch))


def check_batch(config: Config, ranks: int) -> None:
    """Raises ValueError unless the global batch divides into micro-batches over `ranks`."""
    training = config.training
    if training.global_batch % (training.micro_batch * ranks):
        raise ValueError(
            f"training.global_batch {training.global_batch} is no multiple of "
            f"training.micro_batch {training.micro_batch} x {ranks} data-parallel ranks"
        )


class _Batches:
    """Batch sampler: a rank's sample numbers of every micro-batch, from sample `consumed` to the end of the run."""

    def __init__(self, config: Config, rank: int, ranks: int, consumed: int):
        self.training, self.rank, self.ranks, self.consumed = config.training, rank, ranks, consumed

    def __iter__(self) -> Iterator[list[int]]:
        size, end = self.training.global_batch, self.training.steps * self.training.global_batch
        for start in range(self.consumed, end - size + 1, size):
            yield from rank_samples(start, self.rank, self.ranks, size, self.training.micro_batch)


class Collate:
    """Makes a Batch of samples.

    Documents end after the end-of-document token, and with their row. Where documents are isolated, positions count
    from the beginning of the document, and the datasets' loss_mask leaves out positions that would predict across the
    document's end.

    Args:
        eod_id: id of the end-of-document token.
        config: configuration of the run.
        sequence_rank: this rank's number among the `parallel.sequence` ranks that share out every sequence.
    """

    def __init__(self, eod_id: int, config: Config, sequence_rank: int):
        self.eod_id, self.isolate = eod_id, config.data.isolate_documents
        self.order, self.rank, self.padded = order_of(config.parallel), sequence_rank, padded_length(config)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        batch: Batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
        tokens = batch["tokens"]
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        if self.isolate:
            cu_seqlens = document_offsets(tokens, self.eod_id)
            lengths = cu_seqlens.diff()
            starts = cu_seqlens[:-1].repeat_interleave(lengths)
            positions = (torch.arange(tokens.numel()) - starts).view_as(tokens)
            batch |= {"cu_seqlens": cu_seqlens, "max_document": int(lengths.max())}
        batch["positions"] = positions.contiguous()
        return batch if self.order.count == 1 else split(batch, self.order, self.rank, self.padded)


def document_offsets(tokens: Tensor, eod_id: int) -> Tensor:
    """Offsets int64 `[documents + 1]` of the documents in `tokens [b, T]`, with the rows laid end to end."""
    ends = tokens == eod_id
    ends[:, -1] = True
    return torch.cat([torch.zeros(1, dtype=torch.int64), ends.flatten().nonzero().flatten() + 1])


class TrainLoader:
    """Iterator of a rank's micro-batches from sample `consumed_samples` to the end of `training.steps`.

    The samples of a global batch depend on the data, `training.seed` and `consumed_samples` only, not on the micro
    batch or on the number of ranks. Tensors are on the CPU, in pinned memory where there is a GPU.

    Args:
        prepared: result of `prepare_data` for the same config.
        config: configuration of the run.
        data_parallel_rank, data_parallel_size: this rank and the number of ranks that share out a global batch.
        consumed_samples: number of samples of earlier steps, over all ranks.
        sequence_rank: this rank's number among the ranks that share out every sequence.
    """

    def __init__(
        self,
        prepared: PreparedData,
        config: Config,
        data_parallel_rank: int,
        data_parallel_size: int,
        consumed_samples: int = 0,
        sequence_rank: int = 0,
    ):
        check_batch(config, data_parallel_size)
        loader = DataLoader(
            open_dataset(prepared, config, "train"),
            batch_sampler=_Batches(config, data_parallel_rank, data_parallel_size, consumed_samples),
            num_workers=config.data.workers,
            collate_fn=Collate(prepared.eod_id, config, sequence_rank),
            pin_memory=torch.cuda.is_available(),
            # Without a generator of its own, DataLoader would draw a seed from the global generator, whose state would
            # then differ between a resumed and an uninterrupted run.
            generator=torch.Generator(),
        )
        self._batches = iter(loader)

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)


def validation_sequences(prepared: PreparedData, config: Config) -> int:
    """Number of sequences that a validation scores: `eval_batches` global batches, or the whole set if it is smaller.

    Raises:
        ValueError: nothing is held out for validation.
    """
    wanted = config.training.eval_batches * config.training.global_batch
    if prepared.synthetic:
        return wanted
    if not prepared.has_validation:
        raise ValueError("nothing is held out for validation (data.validation_fraction)")
    return min(wanted, samples_per_epoch(prepared, "validation", config.training.sequence_length))


def validation_batches(
    prepared: PreparedData, config: Config, data_parallel_rank: int, data_parallel_size: int, sequence_rank: int = 0
) -> Iterator[Batch]:
    """Yields a rank's micro-batches of one validation: `eval_batches` global batches, the same in every validation.

    Rows beyond the end of a small validation set are padding: their loss_mask is zero.
    """
    check_batch(config, data_parallel_size)
    training = config.training
    count = validation_sequences(prepared, config)
    dataset = open_dataset(prepared, config, "validation")
    collate = Collate(prepared.eod_id, config, sequence_rank)
    for start in range(0, training.eval_batches * training.global_batch, training.global_batch):
        for numbers in rank_samples(
            start, data_parallel_rank, data_parallel_size, training.global_batch, training.micro_batch
        ):
            yield collate([dataset[number if number < count else PADDING] for number in numbers])
