"""The bigram baseline, compared with a direct computation."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import pytest

from linear_moe.config.schema import Config
from linear_moe.options.errors import ConfigError
from linear_moe.training.data.bigram import Bigram, bigram_loss
from linear_moe.training.data.loader import validation_batches
from linear_moe.training.data.prepare import prepare_data


def direct(stream: list[int], vocabulary: int) -> Callable[[int, int], float]:
    """Function (a, b) -> P(b | a) with Witten-Bell smoothing, computed from dictionaries of counts."""
    after: dict[int, Counter[int]] = defaultdict(Counter)
    for a, b in zip(stream, stream[1:], strict=False):
        after[a][b] += 1
    unigram = Counter(stream)

    def probability(a: int, b: int) -> float:
        base = (unigram[b] + 1) / (len(stream) + vocabulary)
        if not after[a]:
            return base
        total, kinds = sum(after[a].values()), len(after[a])
        weight = total / (total + kinds)
        return weight * after[a][b] / total + (1 - weight) * base

    return probability


def test_probabilities_are_witten_bell_and_sum_to_one() -> None:
    rng = np.random.default_rng(0)
    stream = (rng.integers(0, 12, 500) * rng.integers(0, 2, 500)).tolist()
    vocabulary = 14  # two tokens that never occur
    pairs = np.array([(a, b) for a in range(vocabulary) for b in range(vocabulary)])
    expected = np.array([direct(stream, vocabulary)(a, b) for a, b in pairs.tolist()])
    for cuts in ([], [250], [1, 2, 499]):  # in chunks of any size
        model = Bigram(np.split(np.array(stream, dtype=np.uint16), cuts), vocabulary)
        actual = np.exp(model.log_probability(pairs[:, 0], pairs[:, 1]))
        np.testing.assert_allclose(actual, expected, rtol=1e-12)
        np.testing.assert_allclose(actual.reshape(vocabulary, vocabulary).sum(1), 1, rtol=1e-12)


@pytest.mark.parametrize("isolate", [False, True])
def test_loss_is_of_the_validation_positions(config_of: Callable[..., Config], isolate: bool) -> None:
    config = config_of({"isolate_documents": isolate}, eval_batches=20)
    prepared = prepare_data(config, progress=False)
    stream = np.fromfile(f"{prepared.train_prefix}.bin", dtype=np.uint16).tolist()
    probability = direct(stream, prepared.vocab_size)
    losses = []
    for batch in validation_batches(prepared, config, 0, 1):
        for a, b, counted in zip(
            *(batch[k].flatten().tolist() for k in ("tokens", "labels", "loss_mask")), strict=True
        ):
            if counted:
                losses.append(-math.log(probability(a, b)))
    assert bigram_loss(prepared, config) == pytest.approx(sum(losses) / len(losses), rel=1e-10)


def test_held_out_documents_are_not_counted(config_of: Callable[..., Config], tmp_path) -> None:
    """The model is fitted on the training documents only, also if both splits are in one dataset."""
    import shutil

    made = prepare_data(config_of(), progress=False)
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{made.train_prefix}{suffix}", tmp_path / f"theirs{suffix}")
    config = config_of({"corpus": str(tmp_path / "theirs"), "tokenizer": {"type": "hf", "path": made.tokenizer_folder}})
    prepared = prepare_data(config, progress=False)
    tokens = np.fromfile(tmp_path / "theirs.bin", dtype=np.uint16)
    documents = np.split(tokens, np.flatnonzero(tokens == prepared.eod_id)[:-1] + 1)
    stream = np.concatenate([documents[i] for i in prepared.sequences("train", len(documents))]).tolist()
    probability = direct(stream, prepared.vocab_size)
    losses = [
        -math.log(probability(a, b))
        for batch in validation_batches(prepared, config, 0, 1)
        for a, b in np.stack([batch["tokens"], batch["labels"]], -1)[batch["loss_mask"].bool().numpy()].tolist()
    ]
    assert bigram_loss(prepared, config) == pytest.approx(sum(losses) / len(losses), rel=1e-10)


def test_no_baseline(config_of: Callable[..., Config]) -> None:
    synthetic = config_of({"corpus": "synthetic"}, {"vocab_size": 50})
    with pytest.raises(ConfigError, match="no bigram baseline"):
        bigram_loss(prepare_data(synthetic, progress=False), synthetic)
    nothing = config_of({"validation_fraction": 0.0})
    with pytest.raises(ConfigError, match="nothing is held out"):
        bigram_loss(prepare_data(nothing, progress=False), nothing)
