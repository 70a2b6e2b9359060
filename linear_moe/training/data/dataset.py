"""Datasets of samples by number: one of Megatron's GPT datasets for every epoch, and one of random tokens.

Sample `i` is a function of (data, sequence length, seed, i) alone. Every epoch is a GPTDataset of its own, with a seed
of its own. So the order of the samples does not depend on the planned number of steps, and a run can be made longer.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from linear_moe.config.schema import Config
from linear_moe.training.data.prepared import PreparedData

VALIDATION_SEED = 0  # fixed, so that the validation sequences do not depend on training.seed
AHEAD = 4  # number of epochs whose sample orders are written before training
PADDING = -1  # number of a sample none of whose positions count in the loss

Sample = dict[str, Tensor]
"""One sequence: tokens and labels `[T]` int64; loss_mask `[T]` fp32, 1 where the loss counts."""


@dataclass(frozen=True)
class _Tokenizer:
    """The attributes of a tokenizer that GPTDataset reads."""

    vocab_size: int
    eod: int
    unique_identifiers: dict[str, Any] = field(default_factory=dict)


def samples_per_epoch(prepared: PreparedData, split: str, length: int) -> int:
    """Number of whole sequences of `length` tokens in a split; the last label needs one token more."""
    return (prepared.tokens[split] - 1) // length


def build_orders(prepared: PreparedData, config: Config) -> None:
    """Writes the sample orders of the first AHEAD epochs that `training.steps` reads, and of the validation set.

    The ranks of a machine share a written order in the page cache. It must be written before the process groups exist,
    because GPTDataset otherwise writes it on rank 0 only, and the other ranks do not wait. The orders of later epochs
    are not written: every rank builds them in memory when it gets there. A small corpus is read thousands of times, and
    its orders are small; a large one is hardly read more than AHEAD times.
    """
    training = config.training
    per_epoch = samples_per_epoch(prepared, "train", training.sequence_length)
    epochs = math.ceil(training.steps * training.global_batch / per_epoch)
    orders = [("train", training.seed, epoch) for epoch in range(min(epochs, AHEAD))]
    if "validation" in prepared.tokens:
        orders.append(("validation", VALIDATION_SEED, 0))
    for split, seed, epoch in orders:
        folder = _order_folder(prepared, split, training.sequence_length, seed, epoch)
        if not folder.exists():
            if torch.distributed.is_initialized():
                raise RuntimeError("prepare_data must be called before the process groups exist")
            temporary = folder.with_name(f"{folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            _open(prepared, split, training.sequence_length, seed, epoch, False, temporary)
            os.rename(temporary, folder)


def _order_folder(prepared: PreparedData, split: str, length: int, seed: int, epoch: int) -> Path:
    return Path(prepared.cache) / f"{split}-length{length}-seed{seed}-epoch{epoch}"


def _open(
    prepared: PreparedData, split: str, length: int, seed: int, epoch: int, isolate: bool, folder: Path | None
) -> Dataset[Sample]:
    """The GPTDataset of one epoch; reads the order of its samples from `folder`, or writes it there.

    Args:
        isolate: whether the loss of positions that predict across the end of a document does not count.
        folder: folder of the sample order; None: the order is built in memory.
    """
    from linear_moe.training import platform

    platform.install()
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    prefix = prepared.prefix(split)
    assert prefix is not None
    tokens = IndexedDataset(prefix)
    config = GPTDatasetConfig(
        random_seed=int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]),
        sequence_length=length,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache="" if folder is None else str(folder),  # with None, Megatron would write beside the tokens
        tokenizer=_Tokenizer(prepared.vocab_size, prepared.eod_id),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=isolate,
        create_attention_mask=False,
    )
    documents = prepared.sequences(split, len(tokens))
    # GPTDataset hashes the dataset's name into the names of its files. A fingerprint instead of a path keeps them valid
    # when the folder moves.
    return GPTDataset(tokens, f"{prepared.fingerprint}/{split}", documents, None, Split.train, config)


class TextDataset(Dataset[Sample]):
    """Samples of a split of prepared text by number, epoch after epoch without end."""

    def __init__(self, prepared: PreparedData, split: str, length: int, seed: int, isolate: bool):
        self.prepared, self.split, self.length, self.seed, self.isolate = prepared, split, length, seed, isolate
        self.per_epoch = samples_per_epoch(prepared, split, length)
        self.epoch = -1
        self.current: Any = None

    def __getitem__(self, number: int) -> Sample:
        epoch, offset = divmod(max(number, 0), self.per_epoch)
        if epoch != self.epoch:
            where = (self.prepared, self.split, self.length, self.seed, epoch)
            folder = _order_folder(*where)
            self.current = _open(*where, self.isolate, folder if folder.exists() else None)
            assert len(self.current) == self.per_epoch, (len(self.current), self.per_epoch)
            self.epoch = epoch
        sample = self.current[offset]
        mask = sample["loss_mask"] if number != PADDING else torch.zeros_like(sample["loss_mask"])
        return {"tokens": sample["tokens"], "labels": sample["labels"], "loss_mask": mask}


class SyntheticDataset(Dataset[Sample]):
    """Samples of uniformly random tokens. Token 0 ends a document, so documents are `vocab_size` long on average."""

    def __init__(self, vocab_size: int, length: int, seed: int, isolate: bool):
        self.vocab_size, self.length, self.seed, self.isolate = vocab_size, length, seed, isolate

    def __getitem__(self, number: int) -> Sample:
        random = np.random.default_rng([self.seed, number])
        text = torch.from_numpy(random.integers(0, self.vocab_size, self.length + 1))
        tokens, labels = text[:-1], text[1:]
        counted = tokens != 0 if self.isolate else torch.ones_like(tokens)
        return {"tokens": tokens, "labels": labels, "loss_mask": counted.float()}


def open_dataset(prepared: PreparedData, config: Config, split: str) -> Dataset[Sample]:
    """The samples of a split: "train" in the order of `training.seed`, "validation" always in the same order."""
    length, isolate = config.training.sequence_length, config.data.isolate_documents
    seed = config.training.seed if split == "train" else VALIDATION_SEED
    if prepared.synthetic:
        return SyntheticDataset(prepared.vocab_size, length, 2 * seed + (split == "train"), isolate)
    return TextDataset(prepared, split, length, seed, isolate)
