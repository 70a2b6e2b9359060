from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from linear_moe.checks.validate import validate
from linear_moe.config.load import load_config
from linear_moe.config.schema import Config
from linear_moe.config.vocabulary import embedding_rows, vocab_size
from linear_moe.layout.processes import parallel_layout, smallest_world
from linear_moe.layout.sequence import padded_length
from linear_moe.modeling.mixers.base import Capabilities
from linear_moe.modeling.mixers.registry import mixer_class
from linear_moe.options.errors import ConfigError
from linear_moe.options.load import from_dict, parse_overrides
from linear_moe.training import platform

CONFIGS = sorted((Path(__file__).parents[3] / "configs").rglob("*.yaml"))


def config(*overrides: str) -> Config:
    return from_dict(Config, parse_overrides(overrides))


def test_every_shipped_config_is_valid() -> None:
    assert len(CONFIGS) >= 6
    for path in CONFIGS:
        loaded = load_config(path)
        validate(loaded, smallest_world(loaded.parallel), files=False)


# overrides of the defaults (4 layers "L * 4", 4 heads, hidden 256, 8 experts, top-2), world, parts of the message
BAD: list[tuple[str, int | None, list[str]]] = [
    ("model.num_layers=6", None, ["model.pattern", "4 layers", "num_layers = 6"]),
    ("model.num_heads=3", None, ["model.mixer.num_heads = 3", "divide", "nearest valid: 2 or 4"]),
    ("model.pattern=LLLN model.attention.num_heads=3", None, ["model.attention.num_heads = 3"]),
    (
        "model.pattern=LLLM model.symbols.M.mixer.type=gla model.symbols.M.mixer.num_heads=3",
        None,
        ["model.symbols.M.mixer.num_heads = 3"],
    ),
    (
        "model.mixer.type=rwkv7 model.pattern=LLLM model.symbols.M.mixer.type=rwkv7 model.symbols.M.mixer.expand_v=2",
        None,
        ["model.symbols.M.mixer.expand_v = 2.0: must be model.mixer.expand_v = 1.0"],
    ),
    (
        "parallel.sequence=2 parallel.sequence_pieces=3",
        2,
        ["parallel.sequence_pieces = 3", "even", "nearest valid: 2 or 4, or parallel.sequence_layout=contiguous"],
    ),
    ("model.pattern=N*4 parallel.sequence_pieces=2", 1, ["parallel.sequence_pieces = 2", "have a layer with a state"]),
    ("parallel.tensor=8", None, ["model.mixer.num_heads = 4", "parallel.tensor = 8"]),
    ("model.moe.top_k=9", None, ["model.moe.top_k = 9", "model.moe.num_experts = 8", "nearest valid: 8"]),
    (
        "model.moe.num_groups=3",
        None,
        ["model.moe.num_groups = 3", "divide model.moe.num_experts = 8", "nearest valid: 2 or 4"],
    ),
    ("model.moe.top_k_groups=2", None, ["model.moe.top_k_groups = 2", "model.moe.num_groups = 1", "nearest valid: 1"]),
    (
        "model.moe.num_groups=4 model.moe.top_k=3",
        None,
        ["model.moe.top_k = 3", "1 groups (top_k_groups) of 2", "nearest valid: 2, or model.moe.top_k_groups=2"],
    ),
    (
        "model.moe.num_groups=8 model.moe.top_k_groups=2 model.moe.group_score=sum_top_2",
        None,
        ["model.moe.group_score = 'sum_top_2'", "one expert", "set it to max"],
    ),
    ("model.moe.group_score=sum_top_2", None, ["model.moe.group_score", "does nothing", "set num_groups"]),
    ("model.moe.top_k_first=true model.moe.score=sigmoid", None, ["model.moe.top_k_first", "score: softmax"]),
    ("model.moe.top_k=1", None, ["model.moe.normalize_top_k = True", "cannot learn", "raise top_k"]),
    (
        "model.moe.top_k=1 model.moe.normalize_top_k=false model.moe.top_k_first=true",
        None,
        ["model.moe.top_k_first = True", "cannot learn"],
    ),
    ("model.moe.top_k_first=true model.moe.normalize_top_k=false", None, ["normalize_top_k = False", "sum to 1"]),
    ("model.moe.shared_gate=true", None, ["model.moe.shared_gate", "set shared_ffn_size"]),
    ("model.moe.overlap_shared_expert=true", None, ["model.moe.overlap_shared_expert", "set shared_ffn_size"]),
    ("model.moe.bias_update_rate=0.1", None, ["model.moe.bias_update_rate = 0.1", "set expert_bias"]),
    ("model.moe.capacity_pad=true", None, ["model.moe.capacity_pad", "set capacity_factor"]),
    (
        "model.moe.capacity_factor=1.25 model.moe.capacity_pad=true model.moe.dispatcher=allgather",
        None,
        ["model.moe.capacity_pad", "dispatcher=alltoall"],
    ),
    ("model.moe.capacity_factor=4", None, ["model.moe.capacity_factor = 4", "num_experts / top_k = 4", "null"]),
    ("model.moe.drop_policy=position", None, ["model.moe.drop_policy = 'position'", "set capacity_factor"]),
    ("model.moe.first_dense_layers=4", None, ["model.moe.first_dense_layers = 4", "model.num_layers - 1 = 3"]),
    ("parallel.expert=3", None, ["model.moe.num_experts = 8", "parallel.expert = 3", "6 or 9, or parallel.expert=2"]),
    ("parallel.expert=16", None, ["model.moe.num_experts = 8", "nearest valid: 16, or parallel.expert=8"]),
    ("parallel.expert_tensor=3", None, ["model.moe.expert_ffn_size = 256", "parallel.expert_tensor 3"]),
    ("model.moe.shared_ffn_size=7 parallel.tensor=2", None, ["model.moe.shared_ffn_size = 7", "parallel.tensor = 2"]),
    ("model.ffn=dense model.ffn_size=7 parallel.tensor=2", None, ["model.ffn_size = 7", "6 or 8"]),
    ("model.ffn=dense parallel.expert=2", None, ["parallel.expert = 2", "no layer has experts"]),
    ("parallel.tensor=2 parallel.tensor_sequence=false", None, ["parallel.tensor_sequence = False", "true or null"]),
    ("parallel.pipeline=5", None, ["parallel.pipeline = 5", "model.num_layers = 4", "nearest valid: 4"]),
    (
        "parallel.pipeline=2 parallel.virtual_pipeline=3",
        None,
        ["parallel.virtual_pipeline = 3", "model.num_layers = 4 into 6 chunks", "nearest valid: 2"],
    ),
    ("parallel.virtual_pipeline=2", None, ["parallel.virtual_pipeline = 2", "there is one", "parallel.pipeline=2"]),
    (
        "parallel.pipeline=2 parallel.pipeline_layers=[4]",
        None,
        ["parallel.pipeline_layers = [4]", "parallel.pipeline 2 * parallel.virtual_pipeline 1 = 2", "[2, 2]"],
    ),
    ("parallel.pipeline=2 parallel.pipeline_layers=[4,0]", None, ["parallel.pipeline_layers", ">= 1", "[2, 2]"]),
    ("parallel.pipeline=2 parallel.pipeline_layers=[2,1]", None, ["add up to model.num_layers = 4, not 3", "[2, 2]"]),
    (
        "parallel.pipeline=2 parallel.virtual_pipeline=2 training.global_batch=20",
        2,
        ["training.global_batch = 20", "5 micro-batches", "16 or 24", "parallel.virtual_pipeline=1"],
    ),
    ("parallel.tensor=2 training.sequence_length=255", None, ["training.sequence_length = 255", "254 or 256"]),
    ("model.vocab_size=4097 parallel.tensor=2", None, ["model.vocab_size = 4097", "4096 or 4098"]),
    ("model.vocab_size=4095", None, ["model.vocab_size = 4095", "4096 tokens"]),
    (
        "model.vocab_multiple=1 data.tokenizer.type=bytes parallel.tensor=2",
        None,
        ["model.vocab_multiple = 1", "parallel.tensor = 2"],
    ),
    ("model.vocab_multiple=1 parallel.tensor=2", None, ["model.vocab_multiple = 1", "nearest valid: 2"]),
    (
        "model.hidden_size=100 model.mixer.expand_k=1 model.num_heads=4",
        None,
        ["model.hidden_size = 100", "by 8 (bf16: 16 bytes)", "96 or 104", "model.moe.experts=sequential"],
    ),
    (
        "model.moe.expert_ffn_size=36 parallel.expert_tensor=4 training.dtype=fp32",
        None,
        ["model.moe.expert_ffn_size = 36", "4 (fp32: 16 bytes) times parallel.expert_tensor 4 = 16", "32 or 48"],
    ),
    (
        "model.moe.experts=quack training.dtype=fp32",
        None,
        ["model.moe.experts = 'quack'", "multiplies bf16, not fp32", "set it to auto"],
    ),
    ("run=''", None, ["run = ''", "must not be empty"]),
    ("data.cache='' ", None, ["data.cache = ''", "must not be empty"]),
    ("parallel.tensor=2", -2, ["world size = -2", "nearest valid: 2"]),
    ("", 10**12, ["world size = 1000000000000", "nearest valid: 1048576"]),
    ("data.tokenizer.type=hf", None, ["data.tokenizer.path", "needs its folder"]),
    ("schedule.warmup_steps=300", None, ["schedule.warmup_steps = 300", "training.steps = 200"]),
    ("schedule.min_lr=1", None, ["schedule.min_lr = 1.0", "optimizer.lr = 0.001"]),
    ("schedule.decay_steps=10", None, ["schedule.decay_steps = 10", "warmup_steps (20)"]),
    ("schedule.type=wsd schedule.decay_steps=190", None, ["schedule.decay_steps = 190", "= 180"]),
    ("parallel.tensor=2", 3, ["world size = 3", "parallel.tensor 2 * parallel.pipeline 1 = 2", "2 or 4"]),
    ("parallel.expert=4", 6, ["world size = 6", "parallel.expert 4", "4 or 8"]),
    ("training.global_batch=12", 2, ["training.global_batch = 12", "4 * 2 data-parallel ranks = 8", "8 or 16"]),
    ("training.global_batch=2", 1, ["training.global_batch = 2", "nearest valid: 4"]),
]


@pytest.mark.parametrize(("overrides", "world", "parts"), BAD, ids=[case[0] for case in BAD])
def test_refuses(overrides: str, world: int | None, parts: list[str]) -> None:
    bad = config(*overrides.split())
    with pytest.raises(ConfigError) as caught:
        validate(bad, world, files=False)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_nearest_values_are_valid() -> None:
    """Values that error messages offer as nearest pass the validation."""
    for overrides, world in (
        ("model.num_heads=2", 1),
        ("model.hidden_size=104 model.mixer.expand_k=1 model.num_heads=4", 1),
        ("model.hidden_size=100 model.mixer.expand_k=1 model.moe.experts=sequential", 1),
        ("model.moe.expert_ffn_size=48 parallel.expert_tensor=4 training.dtype=fp32 training.global_batch=16", 4),
        ("model.vocab_multiple=2 parallel.tensor=2", 2),
        ("parallel.tensor=2 training.sequence_length=254", 2),
        ("training.global_batch=16", 2),
        ("parallel.expert=4", 8),
        ("schedule.type=wsd schedule.decay_steps=180", 1),
    ):
        good = config(*overrides.split())
        if world == 8:
            good.training.global_batch = 32
        validate(good, world, files=False)


def test_unwritable_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for override, path in (("run=FILE/run", "run"), ("data.cache=FILE", "data.cache")):
        bad = config(f"run={tmp_path / 'fresh'}", override.replace("FILE", str(tmp_path / "file")))
        with pytest.raises(ConfigError, match=f"^{path} = .*cannot be written"):
            validate(bad)
    validate(config(f"run={tmp_path / 'a/b'}", f"data.cache={tmp_path / 'c'}"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]  # checking leaves nothing behind


LAYOUTS: list[tuple[int, dict[str, int]]] = [
    (1, {}),
    (8, {"tensor": 2, "pipeline": 2, "expert": 2}),
    (8, {"expert": 4}),
    (16, {"tensor": 4, "pipeline": 2, "expert": 4, "expert_tensor": 2}),
    (12, {"pipeline": 3, "tensor": 2, "expert": 2}),
    (16, {"tensor": 1, "expert": 2, "expert_tensor": 4}),
]


def test_pieces_without_ranks_to_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces on one rank are padded to equal lengths, over tensor ranks too, and every mixer must support them."""
    pieces = config("parallel.sequence_pieces=3", "parallel.tensor=2", "training.sequence_length=101")
    validate(pieces, 2, files=False)
    assert padded_length(pieces) == 102 and padded_length(config("training.sequence_length=101")) == 101
    monkeypatch.setattr(mixer_class("gla"), "capabilities", Capabilities(sequence_parallel=False))
    with pytest.raises(ConfigError, match=r"does not support parallel\.sequence_pieces > 1"):
        validate(pieces, 2, files=False)


@pytest.mark.parametrize(("world", "sizes"), LAYOUTS)
def test_groups_are_megatrons(world: int, sizes: dict[str, int]) -> None:
    platform.install()
    from megatron.core.parallel_state import RankGenerator

    layout = parallel_layout(config(*(f"parallel.{k}={v}" for k, v in sizes.items())), world)
    size: dict[str, int] = {"tensor": 1, "pipeline": 1, "expert": 1, "expert_tensor": 1} | sizes
    order = "tp-cp-ep-dp-pp"
    dp = world // (size["tensor"] * size["pipeline"])
    edp = world // (size["expert"] * size["expert_tensor"] * size["pipeline"])
    assert (layout.data, layout.expert_data) == (dp, edp)
    dense = RankGenerator(tp=size["tensor"], ep=1, dp=dp, pp=size["pipeline"], cp=1, order=order)
    experts = RankGenerator(tp=size["expert_tensor"], ep=size["expert"], dp=edp, pp=size["pipeline"], cp=1, order=order)
    want: dict[str, Any] = {"tensor": (dense, "tp"), "data": (dense, "dp"), "pipeline": (dense, "pp")}
    want |= {"expert_tensor": (experts, "tp"), "expert": (experts, "ep"), "expert_data": (experts, "dp")}
    assert layout.groups == {axis: generator.get_ranks(token) for axis, (generator, token) in want.items()}


NEAREST = {
    ("parallel.tensor=3", 2): "parallel.tensor=2",
    ("parallel.tensor=8 training.global_batch=16", 8): "parallel.tensor=4",
    ("parallel.pipeline=3", 4): "parallel.pipeline=4",
    ("parallel.pipeline=2 parallel.virtual_pipeline=3", 2): "parallel.virtual_pipeline=2",
    ("parallel.pipeline=8 training.global_batch=8", 8): "parallel.pipeline=4",
    ("parallel.expert=3", 6): "parallel.pipeline=3 parallel.expert=2",
    ("parallel.expert=4", 2): "parallel.expert=2",
    ("parallel.expert=2 model.ffn=dense", 2): "parallel.expert=1",
    ("parallel.tensor=2 parallel.expert=4 parallel.expert_tensor=2", 4): "parallel.expert=2",
    ("parallel.expert_tensor=2 model.moe.expert_ffn_size=24", 2): "parallel.expert_tensor=1",
    ("parallel.pipeline=7", 720720): None,  # no batch is so large; and the search is short
    ("model.moe.top_k=9 parallel.tensor=3", 2): None,  # no layout makes this top_k valid
    ("training.global_batch=12", 2): None,  # the message says to change the batch
}


@pytest.mark.parametrize(("words", "world"), NEAREST)
def test_an_impossible_layout_comes_with_one_that_works(words: str, world: int) -> None:
    model = ("model.num_layers=4", "model.num_heads=4", "model.moe.num_experts=8", "data.corpus=synthetic")
    changes = (*model, "model.moe.expert_ffn_size=128", *words.split())
    with pytest.raises(ConfigError) as error:
        validate(config(*changes), world, files=False)
    before, separator, after = str(error.value).partition(f"; nearest layout that works at world size {world}: ")
    assert before and (after if separator else None) == NEAREST[words, world]
    if separator:
        validate(config(*changes, *after.split()), world, files=False)


def test_smallest_world_is_valid_and_smallest() -> None:
    for _, sizes in LAYOUTS:
        tree = config(*(f"parallel.{k}={v}" for k, v in sizes.items()))
        valid = []
        for world in range(1, 33):
            try:
                parallel_layout(tree, world)
                valid.append(world)
            except ConfigError:
                pass
        assert valid[0] == smallest_world(tree.parallel)


def test_vocabulary(tmp_path: Path) -> None:
    assert vocab_size(config("data.tokenizer.vocab_size=1000")) == 1024
    assert vocab_size(config("data.tokenizer.type=bytes", "model.vocab_multiple=1")) == 257
    assert vocab_size(config("model.vocab_size=5000")) == 5000
    assert vocab_size(config("model.vocab_size=100", "data.corpus=synthetic")) == 100
    assert embedding_rows(Config().model, 4097) == 4224

    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0, "b": 7}}, "added_tokens": [{"id": 500}]})
    )
    hf = ("data.tokenizer.type=hf", f"data.tokenizer.path={tmp_path}", "model.vocab_multiple=1")
    assert vocab_size(config(*hf)) == 501
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="is not a tokenizer"):
        vocab_size(config(*hf))
