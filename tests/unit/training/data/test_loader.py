"""Micro-batches: order, resumption, layouts, labels, masks and document boundaries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from linear_moe.config.schema import Config
from linear_moe.training.data import dataset
from linear_moe.training.data.dataset import samples_per_epoch
from linear_moe.training.data.loader import Batch, TrainLoader, validation_batches, validation_sequences
from linear_moe.training.data.prepare import prepare_data
from linear_moe.training.data.prepared import PreparedData

ConfigOf = Callable[..., Config]


def rows(batches: Iterable[Batch]) -> np.ndarray:
    """Tokens and last label of every row, `[samples, T + 1]`."""
    return torch.cat([torch.cat([b["tokens"], b["labels"][:, -1:]], 1) for b in batches]).numpy()


def global_batches(prepared: PreparedData, config: Config, ranks: int, steps: int, consumed: int = 0) -> np.ndarray:
    """Global batches `[steps, global_batch, T + 1]`, put together from all ranks."""
    per_step = config.training.global_batch // (config.training.micro_batch * ranks)
    loaders = [TrainLoader(prepared, config, rank, ranks, consumed) for rank in range(ranks)]
    return np.stack([np.concatenate([rows(islice(loader, per_step)) for loader in loaders]) for _ in range(steps)])


def stream(prepared: PreparedData, split: str) -> list[np.ndarray]:
    """Token ids of the documents of a split, read from the raw files."""
    prefix = str(prepared.prefix(split))
    tokens = np.fromfile(prefix + ".bin", dtype=np.uint16).astype(np.int64)
    return np.split(tokens, np.flatnonzero(tokens == prepared.eod_id)[:-1] + 1)


def test_order_does_not_depend_on_the_layout(config_of: ConfigOf) -> None:
    prepared = prepare_data(config_of(), progress=False)
    expected = global_batches(prepared, config_of(), ranks=1, steps=30)
    for micro, ranks in ((1, 1), (8, 1), (2, 2), (1, 4), (1, 8)):
        np.testing.assert_array_equal(global_batches(prepared, config_of(micro_batch=micro), ranks, 30), expected)
    with pytest.raises(ValueError, match="no multiple"):
        TrainLoader(prepared, config_of(micro_batch=3), 0, 1)


def test_resume_is_the_tail(config_of: ConfigOf) -> None:
    """A resumed loader yields the rest of the batches, across epochs, and in a run that has been made longer."""
    config = config_of(steps=120)
    prepared = prepare_data(config, progress=False)
    assert 2 * samples_per_epoch(prepared, "train", 16) < 120 * 8
    whole = global_batches(prepared, config, 2, 120)
    for step in (1, 17, 64, 119):
        np.testing.assert_array_equal(global_batches(prepared, config, 1, 120 - step, step * 8), whole[step:])
    shorter = config_of(steps=20)
    np.testing.assert_array_equal(global_batches(prepare_data(shorter, progress=False), shorter, 1, 20), whole[:20])
    assert next(TrainLoader(prepared, config, 0, 1, 120 * 8), None) is None


def test_orders_are_the_same_in_memory(config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders in files and in memory are equal; only the first AHEAD epochs get files, however long the run is."""
    config = config_of(steps=10**8)
    monkeypatch.setattr(dataset, "AHEAD", 10)
    ahead = prepare_data(config, progress=False)
    expected = global_batches(ahead, config, 1, 300)
    assert 4 < 300 * 8 / samples_per_epoch(ahead, "train", 16) < 10
    monkeypatch.setattr(dataset, "AHEAD", 1)
    later = prepare_data(config_of({"cache": config.data.cache + "2"}, steps=10**8), progress=False)
    assert [path.name for path in sorted(Path(later.cache).glob("train-*"))] == ["train-length16-seed1234-epoch0"]
    np.testing.assert_array_equal(global_batches(later, config, 2, 300), expected)
    np.testing.assert_array_equal(global_batches(later, config, 1, 10, 290 * 8), expected[290:])


def test_workers_and_the_global_generator(config_of: ConfigOf) -> None:
    prepared = prepare_data(config_of(), progress=False)
    expected = global_batches(prepared, config_of(), 1, 12, 8)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    actual = global_batches(prepared, config_of({"workers": 2}), 1, 12, 8)
    np.testing.assert_array_equal(actual, expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_epochs_read_everything_in_another_order(config_of: ConfigOf) -> None:
    config = config_of(steps=120)
    prepared = prepare_data(config, progress=False)
    per_epoch = samples_per_epoch(prepared, "train", 16)
    whole = global_batches(prepared, config, 1, 120).reshape(-1, 17)
    documents = stream(prepared, "train")
    counts = np.bincount(np.concatenate(documents), minlength=prepared.vocab_size)
    epochs = [whole[i * per_epoch : (i + 1) * per_epoch] for i in range(2)]
    for epoch in epochs:
        missing = counts - np.bincount(epoch[:, :-1].ravel(), minlength=prepared.vocab_size)
        assert missing.min() >= 0 and missing.sum() <= 16  # every token once, but those of the incomplete last sequence
    assert not np.array_equal(*epochs)
    other = config_of(seed=99)
    assert not np.array_equal(global_batches(prepare_data(other, progress=False), other, 1, 1)[0], whole[:8])


def test_labels_are_the_next_tokens_of_real_documents(config_of: ConfigOf) -> None:
    prepared = prepare_data(config_of(), progress=False)
    documents = [document.tolist() for document in stream(prepared, "train")]
    text = [f" {' '.join(map(str, document))} " for document in documents]
    for batch in islice(TrainLoader(prepared, config_of(), 0, 1), 20):
        assert batch["tokens"].dtype == batch["labels"].dtype == batch["positions"].dtype == torch.int64
        assert batch["loss_mask"].dtype == torch.float32 and batch["loss_mask"].min() == 1
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
        assert torch.equal(batch["positions"], torch.arange(16).expand(2, 16))
        assert set(batch) == {"tokens", "labels", "loss_mask", "positions"}
        for row in rows([batch]):
            ends = np.flatnonzero(row == prepared.eod_id) + 1
            for part in np.split(row, ends[ends < len(row)]):
                assert any(f" {' '.join(map(str, part))} " in document for document in text)


def brute_force(tokens: np.ndarray, eod: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    """cu_seqlens, positions and loss mask of `tokens [b, T]`, computed token by token."""
    offsets, positions, mask = [0], np.zeros_like(tokens), np.ones(tokens.shape)
    for b in range(len(tokens)):
        position = 0
        for t in range(tokens.shape[1]):
            positions[b, t] = position
            position += 1
            if tokens[b, t] == eod:
                mask[b, t] = 0
            if tokens[b, t] == eod or t == tokens.shape[1] - 1:
                offsets.append(b * tokens.shape[1] + t + 1)
                position = 0
    return offsets, positions, mask


@pytest.mark.parametrize("corpus", ["text", "synthetic"])
def test_isolated_documents(config_of: ConfigOf, corpus: str) -> None:
    data = {"isolate_documents": True} | ({"corpus": "synthetic"} if corpus == "synthetic" else {})
    config = config_of(data, {"vocab_size": 20 if corpus == "synthetic" else 300}, sequence_length=64)
    prepared = prepare_data(config, progress=False)
    seen_ends = 0
    for batch in [*TrainLoader(prepared, config, 0, 2), *validation_batches(prepared, config, 1, 2)]:
        tokens = batch["tokens"].numpy()
        offsets, positions, mask = brute_force(tokens, prepared.eod_id)
        assert batch["cu_seqlens"].dtype == torch.int64 and batch["cu_seqlens"].tolist() == offsets
        assert batch["max_document"] == max(np.diff(offsets)) and isinstance(batch["max_document"], int)
        np.testing.assert_array_equal(batch["positions"], positions)
        if batch["loss_mask"].any():  # otherwise all rows are padding
            padding = ~batch["loss_mask"].any(dim=1).numpy()
            np.testing.assert_array_equal(batch["loss_mask"][~padding], mask[~padding])
        seen_ends += int((tokens == prepared.eod_id).sum())
    assert seen_ends > 10


def test_validation_is_the_same_everywhere_and_always(config_of: ConfigOf) -> None:
    prepared = prepare_data(config_of(), progress=False)
    expected = rows(validation_batches(prepared, config_of(), 0, 1))
    assert len(expected) == 24
    for micro, ranks, seed in ((1, 1, 1), (4, 2, 2), (2, 4, 3)):
        config = config_of(micro_batch=micro, seed=seed)
        parts = [rows(validation_batches(prepared, config, rank, ranks)) for rank in range(ranks)]
        whole = np.stack(parts).reshape(ranks, 3, -1, 17).swapaxes(0, 1).reshape(-1, 17)
        np.testing.assert_array_equal(whole, expected)
    held_out = np.bincount(np.concatenate(stream(prepared, "validation")), minlength=prepared.vocab_size)
    assert (np.bincount(expected[:, :-1].ravel(), minlength=prepared.vocab_size) <= held_out).all()


def test_small_validation_set_is_padded(config_of: ConfigOf) -> None:
    config = config_of(eval_batches=100)
    prepared = prepare_data(config, progress=False)
    available = samples_per_epoch(prepared, "validation", 16)
    assert available == (prepared.tokens["validation"] - 1) // 16 == validation_sequences(prepared, config) < 800
    batches = list(validation_batches(prepared, config, 0, 1))
    assert len(batches) == 400  # eval_batches global batches of four micro-batches
    assert sum(float(batch["loss_mask"].sum()) for batch in batches) == available * 16
    nothing = config_of({"validation_fraction": 0.0})
    with pytest.raises(ValueError, match="nothing is held out"):
        next(validation_batches(prepare_data(nothing, progress=False), nothing, 0, 1))


def test_synthetic(config_of: ConfigOf) -> None:
    config = config_of({"corpus": "synthetic"}, {"vocab_size": 50})
    prepared = prepare_data(config, progress=False)
    whole = global_batches(prepared, config, 1, 30)
    np.testing.assert_array_equal(
        global_batches(prepared, config_of({"corpus": "synthetic"}, micro_batch=1), 4, 10, 160), whole[20:]
    )
    assert set(np.unique(whole)) == set(range(50)) and len(np.unique(whole.reshape(-1, 17), axis=0)) == 240
    assert not np.array_equal(rows(validation_batches(prepared, config, 0, 1))[:8], whole[0])


def test_moved_cache_keeps_its_orders(config_of: ConfigOf, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copied or moved cache serves the same order without building it again."""
    expected = global_batches(prepare_data(config_of(), progress=False), config_of(), 1, 5)
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    moved = config_of({"cache": str(tmp_path / "elsewhere")})
    monkeypatch.setattr(np, "save", lambda *_, **__: pytest.fail("built again"))
    np.testing.assert_array_equal(global_batches(prepare_data(moved, progress=False), moved, 1, 5), expected)
