"""Sequence parallelism: every mixer gives the numbers of one process, for every distribution of tokens over ranks."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from linear_moe.layout.sequence import PieceOrder
from linear_moe.modeling.mixers.registry import mixer_class
from linear_moe.training.sequence.cut import cut, share
from tests.distributed import sequences
from tests.distributed.harness import run
from tests.distributed.sequences import ROWS, SHORT, one_pass, settings, stream, whole_layout
from tests.tolerances import FP32, FP32_GRADIENT_FLOOR, assert_close, assert_gradients_close
from tests.unit.modeling.mixers.common import build, case_ids, cases

WORLDS = (2, 4)
IDS = dict(zip(case_ids(), cases(), strict=True))
SPLIT = [key for key, (name, _) in IDS.items() if mixer_class(name).capabilities.sequence_parallel]
Results = dict[int, dict[str, list[Any]]]
NAMES = sorted({IDS[key][0] for key in SPLIT})
# Settings (layout, packed, recomputed modules, attention strategy) of the models below.
SETTINGS = [
    ("zigzag", True, ["layer"], "all_gather"),
    ("contiguous", False, ["norm", "core", "activation"], "ring"),
    ("zigzag", False, [], "ulysses"),
]
# Every mixer once, three in a model, with a last layer of softmax attention; the settings take turns.
MODELS = {"-".join(NAMES[i : i + 3]): SETTINGS[i // 3 % len(SETTINGS)] for i in range(0, len(NAMES), 3)}


def model_of(key: str) -> dict[str, Any]:
    """The config of the model `key`, with weights of the scale of the mixers' unit tests."""
    names = key.split("-")
    symbols = {
        letter: {"mixer": {"type": name} | IDS[f"{name}-0"][1]} for letter, name in zip("ABC", names, strict=False)
    }
    sizes = {"hidden_size": 32, "num_heads": 4, "ffn_size": 48, "ffn": "dense", "num_layers": len(names) + 1}
    scale = {"init_std": 0.15, "norm_eps": 1e-2, "scale_output_init": False}
    return {"pattern": "ABC"[: len(names)] + "N", "symbols": symbols} | sizes | scale


@pytest.fixture(scope="module")
def models() -> dict[str, list[dict[str, Tensor]]]:
    """Losses and gradients of every rank of a sequence; under `one-NAME`, those of one process."""
    todo: dict[str, Any] = {}
    for key, (layout, packed, modules, attention) in MODELS.items():
        common = {"model": model_of(key), "packed": packed}
        todo[key] = "sequence_model", common | {"layout": layout, "modules": modules, "attention": attention}
        todo[f"one-{key}"] = "sequence_model", common | {"layout": None, "modules": []}
    return run(4, todo)


@pytest.mark.parametrize("model", MODELS)
def test_model_is_that_of_one_process(models: dict[str, list[dict[str, Tensor]]], model: str) -> None:
    layout, packed, *_ = MODELS[model]
    expected, ranks = dict(models[f"one-{model}"][0]), models[model]
    losses = joined([rank["losses"] for rank in ranks], PieceOrder(4, layout), packed)
    assert_close(losses, expected.pop("losses"), FP32, model)
    gradients = {name: x for name, x in ranks[0].items() if name != "losses"}
    assert_gradients_close(gradients, expected, FP32, FP32_GRADIENT_FLOOR)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Results:
    """Results for the mixers of the selected tests, by number of ranks."""
    chosen = [
        item.callspec.params["key"]  # type: ignore[attr-defined]
        for item in request.session.items
        if item.path == request.path and "key" in getattr(item, "fixturenames", ())
    ]
    todo = {key: ("sequence_mixer", dict(zip(("name", "fields"), IDS[key], strict=True))) for key in chosen}
    firsts = {key: case for key, case in todo.items() if key.endswith("-0")}
    return {4: run(4, todo), 2: run(2, firsts)}


def joined(parts: list[Tensor], order: PieceOrder, packed: bool) -> Tensor:
    """The tokens of all ranks, put together in order of time."""
    rows, length = (1 if packed else ROWS), sum(part.shape[1] for part in parts)
    places = [share(torch.arange(rows * length).view(rows, -1), cut(rows, length, order, r)) for r in range(len(parts))]
    whole = torch.empty(rows * length, parts[0].shape[-1])
    for part, place in zip(parts, places, strict=True):
        whole[place.flatten()] = part.flatten(0, 1)
    return whole.view(rows, length, -1)


@pytest.mark.parametrize("key", SPLIT)
def test_mixer_is_that_of_one_process(results: Results, key: str) -> None:
    assert_one_process(results, key)


def test_pieces_shorter_than_what_reaches_over_them() -> None:
    """Convolutions, token shift, windows and chunks that reach over several pieces give one process's numbers."""
    names = ("deltanet", "gated_deltaproduct", "mamba", "mom", "rwkv6", "attention", "titans", "ttt_linear")
    cases = {f"{name}-0": IDS[f"{name}-0"] for name in names} | {"window-0": ("attention", {"window": 5})}
    todo = {key: dict(zip(("name", "fields"), case, strict=True)) for key, case in cases.items()}
    ranks_by_key = run(4, {key: ("sequence_mixer_on_short_pieces", case) for key, case in todo.items()})
    with mock.patch.multiple(sequences, **SHORT), mock.patch.dict(IDS, cases):
        for key in cases:
            assert_one_process({4: ranks_by_key}, key)


def assert_one_process(results: Results, key: str) -> None:
    mixer = build(*IDS[key])
    for packed in (False, True):
        expected = one_pass(mixer, stream(packed, 0), stream(packed, 1), whole_layout(packed))
        for world, ranks_by_key in results.items():
            for layout, strategy, attention, whether in settings(mixer, world):
                if key not in ranks_by_key or whether != packed:
                    continue
                ranks = [rank[f"{layout}-{strategy}-{attention}-{packed}"] for rank in ranks_by_key[key]]
                actual = dict(ranks[0])
                for name in ("output", "tokens"):
                    actual[name] = joined([rank[name] for rank in ranks], PieceOrder(world, layout), packed)
                what = f"{key} on {world} ranks, {layout}, {strategy}, {attention}, packed: {packed}"
                assert_close(actual.pop("output"), expected["output"], FP32, what)
                gradients = {name: x for name, x in expected.items() if name != "output"}
                assert_gradients_close(actual, gradients, FP32, FP32_GRADIENT_FLOOR)
