"""`linear-moe import`: weights of a run or an export begin another run; upcycled experts compute what the FFN did."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from linear_moe.checkpoints.weights import RunWeights
from linear_moe.cli import main
from linear_moe.config.schema import Config
from linear_moe.inference.export import export, load_run
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.model import LanguageModel
from linear_moe.options.load import from_dict
from linear_moe.training import platform
from tests.tolerances import FP32, assert_close
from tests.unit.inference.common import CASES, VOCAB, build, prompt, sizes, write_run

platform.install()

FFN = 48
DENSE = sizes(pattern="LN", ffn="dense", ffn_size=FFN)
COPIES = {"num_experts": 4, "top_k": 2, "expert_ffn_size": FFN}
PARTS = {"num_experts": 12, "top_k": 3, "expert_ffn_size": 16}
SHARED = {"num_experts": 4, "top_k": 2, "expert_ffn_size": 16, "shared_ffn_size": 16}
V3 = {"score": "sigmoid", "expert_bias": True, "routed_scaling_factor": 2.5}
GROUPS = {"num_groups": 2, "top_k_groups": 1}
EXACT: dict[str, tuple[int, dict[str, Any]]] = {  # granularity, model.moe
    "copies": (1, COPIES),
    "mixtral": (1, COPIES | {"top_k_first": True, "experts": "sequential"}),
    "capacity": (1, COPIES | {"capacity_factor": 1.0}),
    "parts": (3, PARTS),
    "two-copies": (3, PARTS | {"top_k": 6}),
    "v3": (3, PARTS | V3 | GROUPS | {"group_score": "sum_top_2"}),
    "shared": (2, SHARED),
    "shared-gate": (2, SHARED | V3 | {"shared_gate": True}),
}
TOKENS = torch.tensor([prompt(24), prompt(24, seed=1)])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of a dense model at steps 10 and 20, which are also the seeds of its weights; its export lies beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CASES, "dense", DENSE)
        root = tmp_path_factory.mktemp("import")
        write_run(root / "dense", "dense")
        export(root / "dense", root / "exported")
        yield root / "dense"


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., list[str]]:
    """Function that writes a config, and returns the command line that begins the run `moe` with this config."""

    def config(moe: dict[str, Any], source: Path, *words: str, **model: Any) -> list[str]:
        tree = {"run": str(tmp_path / "moe"), "model": DENSE | {"ffn": "moe", "moe": moe} | model}
        tree["training"] = {"dtype": "fp32"}
        (tmp_path / "moe.yaml").write_text(yaml.safe_dump(tree))
        return ["import", str(source), str(tmp_path / "moe.yaml"), *words]

    return config


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("name", EXACT)
def test_upcycled_model_computes_the_same(
    name: str, dense: Path, config: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts, moe = EXACT[name]
    assert main(config(moe, dense, "--upcycle", "--json")) == 0
    record = json.loads(capsys.readouterr().out)
    model = load_run(tmp_path / "moe").model
    assert_close(logits(model), logits(build("dense", 20)), FP32, "logits")
    assert record["granularity"] == parts and record["upcycled"] == [0, 1] and record["exact"]
    assert record["checkpoint"] == str(tmp_path / "moe" / "checkpoints" / "step_00000000")
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    gate = model.model.layers["0"].ffn.experts.gate_up_proj.detach()
    assert len(gate) == moe["num_experts"] and torch.equal(gate[:parts], gate[-parts:])
    assert parts == 1 or not torch.equal(gate[0], gate[1])


def test_what_is_copied_and_what_is_drawn(dense: Path, config: Callable[..., list[str]], tmp_path: Path) -> None:
    assert main(config(COPIES | {"expert_bias": True}, dense, "--upcycle", "--step", "10", "training.seed=7")) == 0
    tree = from_dict(Config, yaml.safe_load((tmp_path / "moe" / "config.yaml").read_text()))
    assert tree.training.seed == 7
    fresh = LanguageModel(tree.model, VOCAB, Host())
    initialize(fresh, fresh.host, 7)
    old, new = dict(build("dense", 10).model.named_parameters()), load_run(tmp_path / "moe").model.model
    for name, parameter in new.named_parameters():
        if ".router." in name:
            assert torch.equal(parameter, fresh.get_parameter(name))
        elif "experts.gate_up_proj" in name:
            for i, kind in enumerate(("gate", "up")):
                expected = old[name.replace("experts.gate_up_proj", f"{kind}_proj.weight")]
                assert all(torch.equal(expert[i], expected) for expert in parameter)
        elif "experts.down_proj" in name:
            expected = old[name.replace("experts.down_proj", "down_proj.weight")]
            assert all(torch.equal(expert, expected) for expert in parameter)
        else:
            assert torch.equal(parameter, old[name]), name
    info = json.loads((tmp_path / "moe" / "checkpoints" / "step_00000000" / "checkpoint.json").read_text())
    assert (info["step"], info["samples"], info["optimizer_step"]) == (0, 0, 0)
    assert info["imported"]["source"].endswith("step_00000010")


def test_parts_of_a_copy_share_their_score(dense: Path, config: Callable[..., list[str]], tmp_path: Path) -> None:
    assert main(config(PARTS, dense, "--upcycle")) == 0
    weight = load_run(tmp_path / "moe").model.model.layers["1"].ffn.router.weight
    copies = weight.unflatten(0, (4, 3))
    assert torch.equal(copies, copies[:, :1].expand(-1, 3, -1)) and len(weight.unique(dim=0)) == 4


@pytest.mark.parametrize("moe", [COPIES | {"num_experts": 8}, PARTS | {"num_groups": 2}], ids=["copies", "parts"])
def test_without_a_fixed_sum_it_is_the_same_on_average(
    moe: dict[str, Any],
    dense: Path,
    config: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(config(moe | {"normalize_top_k": False}, dense, "--upcycle")) == 0
    assert "on average only" in capsys.readouterr().out
    layers = load_run(tmp_path / "moe").model.model.layers, build("dense", 20).model.layers
    x = torch.nn.functional.rms_norm(torch.randn(4096, 32, generator=torch.Generator().manual_seed(0)), (32,))
    with torch.no_grad():
        y, expected = (side["0"].ffn(x) for side in layers)
    factor = (y * expected).sum(-1) / expected.square().sum(-1)
    assert_close(y, factor[:, None] * expected, FP32, "outputs, up to a factor per token")
    assert factor.std() > 0.02 and abs(float(factor.mean()) - 1) < 0.05


@pytest.mark.parametrize("kind", ["run", "export"])
def test_the_same_model(
    kind: str, dense: Path, config: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = dense if kind == "run" else dense.with_name("exported")
    assert main(config({}, source, "--json", ffn="dense")) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["upcycled"] == [] and record["granularity"] is None and record["exact"]
    new = dict(load_run(tmp_path / "moe").model.model.named_parameters())
    old = dict(build("dense", 20).model.named_parameters())
    assert new.keys() == old.keys() and all(torch.equal(new[name], old[name]) for name in old)
    tokenizer = json.loads((tmp_path / "moe" / "tokenizer" / "tokenizer.json").read_text())
    assert tokenizer == json.loads((dense / "tokenizer" / "tokenizer.json").read_text())
    assert not list((tmp_path / "moe" / "tokenizer").glob("*.safetensors"))


def test_upcycling_an_export_and_some_layers(dense: Path, config: Callable[..., list[str]], tmp_path: Path) -> None:
    words = config(COPIES | {"first_dense_layers": 1}, dense.with_name("exported"), "--upcycle")
    assert main(words) == 0
    model = load_run(tmp_path / "moe").model
    assert not hasattr(model.model.layers["0"].ffn, "router") and hasattr(model.model.layers["1"].ffn, "router")
    assert_close(logits(model), logits(build("dense", 20)), FP32, "logits")


def test_every_tensor_is_read_once(
    dense: Path, config: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = RunWeights._read
    monkeypatch.setattr(RunWeights, "_read", lambda self, name: read.append(name) or original(self, name))
    assert main(config(PARTS, dense, "--upcycle")) == 0
    assert sorted(read) == sorted(name for name, _ in build("dense").model.named_parameters())


def test_an_export_in_several_files(dense: Path, config: Callable[..., list[str]], tmp_path: Path) -> None:
    export(dense, tmp_path / "exported", step=10, max_shard_size="20KB")
    assert len(list((tmp_path / "exported").glob("*.safetensors"))) > 2
    assert main(config(PARTS, tmp_path / "exported", "--upcycle")) == 0
    assert_close(logits(load_run(tmp_path / "moe").model), logits(build("dense", 10)), FP32, "logits")


MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {  # model.moe, model, parts of the message
    "hidden size": (
        COPIES,
        {"hidden_size": 64},
        ["model.hidden_size = 64", "step_00000020 has 32", "set model.hidden"],
    ),
    "layers": (COPIES, {"num_layers": 3, "pattern": "LLN"}, ["model.num_layers = 3", "has 2"]),
    "pattern": (COPIES, {"pattern": "NL"}, ["model.pattern = 'NL'", "has 'LN'"]),
    "heads": (COPIES, {"num_heads": 2}, ["model.num_heads = 2", "has 4"]),
    "vocabulary": (COPIES, {"vocab_size": 4096}, ["model.vocab_size = 4096", "320 rows", "model.vocab_size=320"]),
    "tied": (COPIES, {"tie_embeddings": True}, ["model.tie_embeddings = True", "has False"]),
    "ffn of dense layers": (COPIES | {"first_dense_layers": 1}, {"ffn_size": 64}, ["model.ffn_size = 64", "has 48"]),
    "nothing to upcycle": (COPIES, {"ffn": "dense"}, ["--upcycle", "no layer", "model.ffn=moe"]),
    "expert size": (COPIES | {"expert_ffn_size": 20}, {}, ["expert_ffn_size = 20", "divide", "48", "16 or 24"]),
    "large experts": (COPIES | {"expert_ffn_size": 64}, {}, ["expert_ffn_size = 64", "nearest valid: 48"]),
    "shared size": (COPIES | {"shared_ffn_size": 48}, {}, ["shared_ffn_size = 48", "smaller than the dense", "48"]),
    "expert beside shared": (SHARED | {"expert_ffn_size": 48}, {}, ["48 - 16 (shared_ffn_size) = 32"]),
    "top-k": (PARTS | {"top_k": 2}, {}, ["top_k = 2", "divisible by 3", "nearest valid: 3"]),
    "experts": (PARTS | {"num_experts": 10}, {}, ["num_experts = 10", "divisible by 3", "9 or 12"]),
    "groups": (PARTS | {"num_groups": 6, "top_k_groups": 2}, {}, ["num_groups = 6", "2 experts", "nearest valid: 4"]),
}


def fails(words: list[str], parts: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert all(part in captured.err for part in parts), captured.err
    assert not (run / "checkpoints" / "latest").exists() and not list(run.glob("checkpoints/*"))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(
    name: str, dense: Path, config: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moe, model, parts = MISTAKES[name]
    fails(config(moe, dense, "--upcycle", **model), parts, tmp_path / "moe", capsys)


def test_wrong_sources(
    dense: Path, config: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported, run = dense.with_name("exported"), tmp_path / "moe"

    def check(source: Path, *parts: str, words: tuple[str, ...] = ("--upcycle",)) -> None:
        fails(config(COPIES, source, *words), list(parts), run, capsys)

    check(dense, "model.ffn = 'moe'", "has 'dense'", "give --upcycle", words=())
    check(tmp_path / "nowhere", "source", "does not exist")
    check(tmp_path, "neither a run folder nor an exported one")
    check(dense, "--step = 15", "complete are: 10, 20", words=("--upcycle", "--step", "15"))
    check(exported, "--step = 10", "has no steps", words=("--upcycle", "--step", "10"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    check(other, "'llama'", "not one of linear-moe export")
    (other / "config.json").write_text("{")
    check(other, "not valid JSON")
    (other / "config.json").write_bytes((exported / "config.json").read_bytes())
    check(other, "model.safetensors", "does not exist")
    tensors = load_file(exported / "model.safetensors")
    missing = {name: t for name, t in tensors.items() if name != "model.layers.1.ffn.up_proj.weight"}
    save_file(missing, other / "model.safetensors", {"format": "pt"})
    check(other, "parameter layers.1.ffn.up_proj.weight is missing there and 48x32 here")
    save_file(tensors | {"model.extra": torch.zeros(3)}, other / "model.safetensors", {"format": "pt"})
    check(other, "parameter extra is 3 there and missing here")
    (other / "model.safetensors").write_bytes(b"x" * 100)
    check(other, "model.safetensors: is damaged")


def test_a_run_begins_once(
    dense: Path, config: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = config(COPIES, dense, "--upcycle")
    assert main(words) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "moe").rglob("*")}
    capsys.readouterr()
    assert main(words) == 2
    assert "has checkpoints already" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "moe").rglob("*")}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a defect")], ids=["interrupt", "defect"])
def test_other_errors_come_through_and_leave_nothing(
    error: BaseException,
    dense: Path,
    config: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: RunWeights, name: str) -> None:
        raise error

    monkeypatch.setattr(RunWeights, "_read", fail)
    if isinstance(error, KeyboardInterrupt):
        assert main(config(COPIES, dense, "--upcycle")) == 130
    else:
        with pytest.raises(ValueError, match="a defect"):
            main(config(COPIES, dense, "--upcycle"))
    assert not list((tmp_path / "moe" / "checkpoints").iterdir())


@pytest.mark.parametrize("failing", ["space", "writing"])
def test_all_or_nothing(
    failing: str,
    dense: Path,
    config: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, run = config(COPIES, dense, "--upcycle"), tmp_path / "moe"
    with monkeypatch.context() as patch:
        if failing == "space":
            patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        else:
            read = RunWeights._read

            def full(self: RunWeights, name: str) -> torch.Tensor:
                if name == "norm.weight":
                    raise OSError(errno.ENOSPC, "No space left on device")
                return read(self, name)

            patch.setattr(RunWeights, "_read", full)
        reason = "are free" if failing == "space" else "No space left"
        fails(words, ["step_00000000", "checkpoint not saved", reason, "free some space"], run, capsys)
    assert main(words) == 0
    assert_close(logits(load_run(run).model), logits(build("dense", 20)), FP32, "logits")
