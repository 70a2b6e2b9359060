"""Samples by number: Megatron's GPT dataset, one per epoch, and random tokens.

Sample `i` is a function of (data, sequence length, seed, i) alone. Every epoch is a GPTDataset of its own with a seed
of its own, so that the order does not depend on how many steps a run is planned for, and a run can be made longer.
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

VALIDATION_SEED = 0  # the same sequences whatever training.seed is
AHEAD = 4  # epochs whose orders are written ahead
PADDING = -1  # the number of a sample whose positions do not count

Sample = dict[str, Tensor]
"""tokens, labels `[T]` int64; loss_mask `[T]` fp32."""


@dataclass(frozen=True)
class _Tokenizer:
    """As much of a tokenizer as GPTDataset asks for."""

    vocab_size: int
    eod: int
    unique_identifiers: dict[str, Any] = field(default_factory=dict)


def samples_per_epoch(prepared: PreparedData, split: str, length: int) -> int:
    """Whole sequences in a split: one more token than `length` is needed for the last label."""
    return (prepared.tokens[split] - 1) // length


def build_orders(prepared: PreparedData, config: Config) -> None:
    """Writes the sample orders of the first AHEAD epochs that `training.steps` reads, and of the validation set.

    Written, a host's ranks share an order in the page cache. Ahead of training and of the process groups, because
    GPTDataset otherwise writes on rank 0 only and does not wait. Later epochs' orders each rank builds when it gets
    there, in its own memory: a small corpus is read thousands of times, and a large one hardly more than AHEAD times.
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
    """The GPTDataset of one epoch; reads its order from `folder`, or builds it there (None: in memory)."""
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
        path_to_cache="" if folder is None else str(folder),  # None would mean beside the tokens
        tokenizer=_Tokenizer(prepared.vocab_size, prepared.eod_id),  # type: ignore[arg-type]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=isolate,
        create_attention_mask=False,
    )
    documents = prepared.sequences(split, len(tokens))
    # GPTDataset hashes the name it is given into its files' names; ours stays the same when the folder moves.
    return GPTDataset(tokens, f"{prepared.fingerprint}/{split}", documents, None, Split.train, config)


class TextDataset(Dataset[Sample]):
    """An endless stream of epochs, by sample number."""

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
    """Uniformly random tokens; token 0 ends documents, so that they are `vocab_size` long on average."""

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
