from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from linear_moe.cli import main
from linear_moe.config.load import load_config
from linear_moe.config.schema import Config
from linear_moe.layout.flops import flops_per_token
from linear_moe.layout.recompute import recomputed
from linear_moe.modeling.activations import Activations
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.mixers.registry import MIXERS
from linear_moe.modeling.model import LanguageModel
from linear_moe.modeling.tokens import TokenLayout
from linear_moe.options.load import from_dict
from linear_moe.plan import human, make_plan

MODELS = Path(__file__).parents[3] / "configs" / "models"


@pytest.mark.parametrize(
    ("name", "total", "active", "layers"),
    [("a0.3b_2b", (2.4e9, 2.6e9), (0.32e9, 0.34e9), 12), ("a1b_7b", (7.3e9, 7.5e9), (1.1e9, 1.2e9), 16)],
)
def test_shipped_models_have_the_papers_sizes(
    name: str, total: tuple[float, float], active: tuple[float, float], layers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(MODELS / f"{name}.yaml"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert total[0] <= plan["total_params"] <= total[1]
    assert active[0] <= plan["active_params_without_embeddings"] <= active[1]
    assert [layer["mixer"] for layer in plan["layers"]] == ["gla", "gla", "gla", "attention"] * (layers // 4)
    assert {layer["ffn"] for layer in plan["layers"]} == {"moe"}
    memory = plan["memory_per_rank_bytes"]
    assert list(memory) == ["weights", "gradients", "optimizer", "activations", "logits", "total"]
    assert memory["total"] == sum(memory[k] for k in list(memory)[:-1])
    # Qwen2's 151936 rows, once for the embedding and once for the head
    hidden = load_config(MODELS / f"{name}.yaml").model.hidden_size
    assert plan["active_params"] - plan["active_params_without_embeddings"] == 2 * 151936 * hidden
    assert plan["flops_per_token"] == 3 * plan["forward_flops_per_token"]


def tiny(**sections: Any) -> Config:
    model = {
        "hidden_size": 32,
        "num_layers": 4,
        "pattern": "N * 4",
        "vocab_size": 96,
        "ffn_size": 48,
        "moe": {"num_experts": 8, "top_k": 2, "expert_ffn_size": 24, "experts": "sequential"},
    } | sections.pop("model", {})
    training = {"dtype": "fp32", "sequence_length": 64, "micro_batch": 2} | sections.pop("training", {})
    return from_dict(Config, {"model": model, "training": training, "data": {"corpus": "synthetic"}} | sections)


def test_parameters_by_hand() -> None:
    symbols = {"D": {"mixer": {"type": "attention"}, "ffn": "dense"}}
    plan = make_plan(tiny(model={"pattern": "NNND", "symbols": symbols}))
    attention, norms = 4 * 32 * 32, 2 * 32
    expert = 3 * 32 * 24
    moe, moe_active, dense = 8 * 32 + 8 * expert, 8 * 32 + 2 * expert, 3 * 32 * 48
    assert [layer.params for layer in plan.layers] == [attention + norms + moe] * 3 + [attention + norms + dense]
    outside = 2 * 96 * 32 + 32
    assert plan.total_params == 4 * (attention + norms) + 3 * moe + dense + outside
    assert plan.active_params == 4 * (attention + norms) + 3 * moe_active + dense + outside
    assert plan.active_params_without_embeddings == plan.active_params - 2 * 96 * 32


@pytest.mark.parametrize("ffn", ["moe", "dense"])
@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_of_the_matrix_products(ffn: str, tied: bool) -> None:
    """FLOPs equal those that PyTorch counts in a real forward pass; tests of the mixers check the recurrences."""
    config = tiny(model={"ffn": ffn, "tie_embeddings": tied})
    host = Host(torch.float32)
    model = LanguageModel(config.model, 96, host)
    initialize(model, host, 0)
    tokens = torch.randint(96, (2, 64))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, TokenLayout(2, 64))
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    recurrences = sum(layer.mixer.recurrence_flops(64) for layer in model.layers.values())
    assert products > 0
    assert recurrences > 0
    plan = make_plan(config)
    assert plan.forward_flops - recurrences == pytest.approx(products / tokens.numel(), rel=1e-9)
    assert flops_per_token(config) == 3 * plan.forward_flops


def test_memory_of_a_rank_by_hand() -> None:
    """Two stages of two layers, two tensor and four expert ranks; the last stage is the fullest: it has the norm."""
    config = tiny(parallel={"tensor": 2, "pipeline": 2, "expert": 4}, training={"dtype": "bf16", "global_batch": 8})
    config.optimizer.distributed = False  # because it pads its buffers
    memory = make_plan(config, 16).memory
    attention, router, norms = 4 * 32 * 32 // 2, 8 * 32, 2 * 32
    head = 96 * 32 // 2 + 32
    dense, experts = 2 * (attention + router + norms) + head, 2 * (8 // 4) * 3 * 32 * 24
    assert memory["weights"] == 2 * (dense + experts)
    assert memory["gradients"] == 4 * (dense + experts)
    assert memory["optimizer"] == 12 * (dense + experts)
    config.training.dtype = "fp32"
    memory = make_plan(config, 16).memory
    assert (memory["weights"], memory["optimizer"]) == (4 * (dense + experts), 8 * (dense + experts))
    config.optimizer.distributed = True
    data, expert_data = 16 // 4, 16 // 8
    sharded = make_plan(config, 16).memory
    assert sharded["optimizer"] == pytest.approx(8 * (dense / data + experts / expert_data), rel=0.05)
    assert memory["weights"] <= sharded["weights"] <= 1.05 * memory["weights"]


def kept_bytes(function: Callable[[], Tensor], model: LanguageModel) -> int:
    """Bytes that autograd keeps of a forward pass, besides the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for address, storage in saved.items() if address not in weights)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    ("pattern", "ffn"), [("N * 4", "dense"), ("N * 4", "moe"), ("LLLN", "moe")], ids=lambda v: v.replace(" ", "")
)
def test_activations_are_about_what_autograd_keeps(pattern: str, ffn: str, recompute: str) -> None:
    """PyTorch's CPU kernels keep more than the GPU's fused ones, which the estimate means: hence the wide bounds."""
    sizes = {"pattern": pattern, "ffn": ffn, "hidden_size": 128, "ffn_size": 256, "vocab_size": 512}
    moe = {"num_experts": 8, "top_k": 2, "expert_ffn_size": 64, "experts": "grouped"}
    config = tiny(model=sizes | {"moe": moe}, training={"sequence_length": 256, "recompute": recompute})
    host = Host(torch.float32, activations=Activations(*recomputed(config)))
    model = LanguageModel(config.model, 512, host)
    initialize(model, host, 0)
    tokens, layout = torch.randint(512, (2, 256)), TokenLayout(2, 256)
    kept = kept_bytes(lambda: model(tokens, layout, labels=tokens).mean(), model)
    if recompute == "full":
        x = torch.randn(512, 128, requires_grad=True)
        kept += kept_bytes(lambda: model.layers["0"](x, layout), model)
    memory = make_plan(config).memory
    # The logits give way to the layer that is computed again, which is larger here: activations have the rest of it.
    estimate = memory["activations"] + (memory["logits"] if recompute == "full" else 0)
    assert 0.7 * kept < estimate < 1.3 * kept, estimate / kept


def test_activations_scale_as_1f1b() -> None:
    """The first stage holds the activations of as many micro-batches as there are stages, if there are so many."""
    training = {"global_batch": 16, "micro_batch": 1}
    model = {"num_layers": 4, "pattern": "N * 4", "vocab_size": 8}
    one = make_plan(tiny(model=model, training=training), 1).memory["activations"]
    four = make_plan(tiny(model=model, training=training, parallel={"pipeline": 4}), 4).memory["activations"]
    head = one - four  # the first of four stages has a quarter of the layers, and four micro-batches in flight
    assert 0 < head < 0.1 * one
    training["global_batch"] = 1
    single = make_plan(tiny(model=model, training=training, parallel={"pipeline": 4}), 4).memory["activations"]
    assert single == four // 4 + head  # the last stage


def test_tables_name_everything(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    config = str(MODELS / "a0.3b_2b.yaml")
    assert main(["plan", config, "parallel.expert=8", "--world", "8", "model.mixer.type=mamba2"]) == 0
    out = capsys.readouterr().out
    assert out.count("mamba2") == 9
    for part in ("world size 8", "expert_data", "0 1 2 3 4 5 ...", "151,936", "GFLOP", "optimizer", "GiB"):
        assert part in out, part


def test_human() -> None:
    assert [human(n) for n in (0, 999, 1000, 2_489_000_000)] == ["0", "999", "1.00 k", "2.49 B"]
    assert [human(2.94e9, "FLOP"), human(1536 * 2**20, "B", 1024)] == ["2.94 GFLOP", "1.50 GiB"]


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_sizes_beyond_any_tensor_are_one_line(mixer: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(MODELS / "tiny.yaml")
    assert main(["plan", config, "model.hidden_size=100000000000"]) == 2
    assert capsys.readouterr().err == (
        "linear-moe: model.hidden_size = 100000000000: must be <= 1048576; nearest valid: 1048576\n"
    )
    largest = ["model.hidden_size=1048576", f"model.mixer.type={mixer}", "model.vocab_size=2147483648"]
    largest += ["model.num_heads=4096", "model.moe.num_experts=65536"]
    largest += ["model.moe.expert_ffn_size=1048576", "model.moe.shared_ffn_size=1048576"]
    assert main(["plan", config, "--json", *largest]) == 0  # the largest allowed sizes do not overflow
    assert json.loads(capsys.readouterr().out)["total_params"] > 2**53
