"""The baseline that a trained model must beat: a smoothed bigram count model of the same training tokens.

The smoothing is interpolated Witten-Bell (Witten & Bell 1991; Chen & Goodman 1998, section 2.4), with nothing to tune:
    P(b | a) = (c(a, b) + n(a) P(b)) / (c(a) + n(a)),   P(b) = (c(b) + 1) / (tokens + vocabulary),
where n(a) is the number of different tokens seen after a.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from linear_moe.config.schema import Config
from linear_moe.options.errors import ConfigError
from linear_moe.training.data import indexed
from linear_moe.training.data.loader import validation_batches
from linear_moe.training.data.prepared import PreparedData

CHUNK = 1 << 24  # number of tokens counted at a time


class Bigram:
    """A bigram model of `tokens`.

    Args:
        tokens: int arrays in order; each array continues the one before.
        vocab_size: number of token ids.
    """

    def __init__(self, tokens: Iterable[np.ndarray], vocab_size: int):
        self.vocab_size = vocab_size
        unigrams = np.zeros(vocab_size, dtype=np.int64)
        pairs, counts = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        last = np.empty(0, dtype=np.int64)
        for chunk in tokens:
            chunk = chunk.astype(np.int64)
            unigrams += np.bincount(chunk, minlength=vocab_size)
            stream = np.concatenate([last, chunk])
            new, new_counts = np.unique(stream[:-1] * vocab_size + stream[1:], return_counts=True)
            pairs, inverse = np.unique(np.concatenate([pairs, new]), return_inverse=True)
            merged = np.zeros(len(pairs), dtype=np.int64)
            np.add.at(merged, inverse, np.concatenate([counts, new_counts]))
            counts, last = merged, stream[-1:]
        self.pairs, self.counts = pairs, counts
        self.unigram = (unigrams + 1) / (unigrams.sum() + vocab_size)
        first = pairs // vocab_size
        self.followers = np.bincount(first, minlength=vocab_size)
        self.context = np.bincount(first, weights=counts, minlength=vocab_size)

    def log_probability(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """log P(b | a) of token ids, elementwise, in nats; the unigram P(b) if no training token follows a."""
        keys = a.astype(np.int64) * self.vocab_size + b
        place = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
        count = np.where(self.pairs[place] == keys, self.counts[place], 0)
        followers = np.where(self.context[a] > 0, self.followers[a], 1)
        return np.log((count + followers * self.unigram[b]) / (self.context[a] + followers))


def training_tokens(prepared: PreparedData) -> Iterator[np.ndarray]:
    """Yields the tokens of the training set in file order, in chunks or by document."""
    assert prepared.train_prefix is not None
    index = indexed.read_index(prepared.train_prefix, "prepare it again")
    tokens = np.memmap(prepared.train_prefix + ".bin", dtype=index.dtype, mode="r")
    if prepared.held_out == 0:
        yield from (tokens[i : i + CHUNK] for i in range(0, len(tokens), CHUNK))
        return
    ends = np.cumsum(index.lengths, dtype=np.int64)
    for number in prepared.sequences("train", len(index.lengths)):
        yield tokens[ends[number] - index.lengths[number] : ends[number]]


def bigram_loss(prepared: PreparedData, config: Config) -> float:
    """Cross-entropy of the bigram model, in nats per token, on exactly the positions that a validation scores.

    Raises:
        ConfigError: the data is synthetic, or nothing is held out for validation.
    """
    if prepared.synthetic:
        raise ConfigError("data.corpus", config.data.corpus, "random tokens have no bigram baseline")
    if not prepared.has_validation:
        raise ConfigError("data.validation_fraction", 0.0, "nothing is held out to score the bigram model on")
    model = Bigram(training_tokens(prepared), prepared.vocab_size)
    loss, counted = 0.0, 0.0
    for batch in validation_batches(prepared, config, 0, 1):
        mask = batch["loss_mask"].numpy().astype(np.float64)
        loss -= float((model.log_probability(batch["tokens"].numpy(), batch["labels"].numpy()) * mask).sum())
        counted += float(mask.sum())
    return loss / counted
