"""Checkpoints: exact resume, any layout into any other, torn and failing saves, other models."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.checkpoints.reader import complete_checkpoints, latest_checkpoint, load_full_weights
from linear_moe.config.load import save_config
from linear_moe.config.schema import Config
from linear_moe.options.errors import ConfigError
from linear_moe.options.load import from_dict
from linear_moe.training.import_weights import import_weights
from tests.distributed.harness import ROOT, all_tensors, run
from tests.tolerances import BF16_ROUNDING, FP32, assert_close

AFTER = 20  # number of steps that are compared after a resume


def config(
    folder: Path, dtype: str = "fp32", parallel: dict[str, int] | None = None, **sections: Any
) -> dict[str, Any]:
    """A hybrid model with shared and routed experts.

    Some of its weights (Mamba2's) are fp32 even in bf16 training. No gradient trains the experts' bias.
    """
    tree: dict[str, Any] = {
        "run": str(folder),
        "model": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "pattern": "LN",
            "mixer": {"type": "mamba2", "head_dim": 16, "num_groups": 2, "state_size": 16},
            "moe": {
                "num_experts": 4,
                "top_k": 2,
                "expert_ffn_size": 16,
                "shared_ffn_size": 16,
                "shared_gate": True,
                "expert_bias": True,
            },
        },
        "training": {"sequence_length": 16, "micro_batch": 2, "global_batch": 4, "dtype": dtype, "steps": 200},
        "data": {"tokenizer": {"type": "bytes"}},
        "parallel": parallel or {},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return tree


# -- resume -----------------------------------------------------------------------------------------------------------
PLAIN = {"optimizer": {"distributed": False}}
OVERLAP = {"optimizer": {"overlap": True}}
DTYPES = ("fp32", "bf16")
RESUME: dict[str, tuple[int, str, dict[str, int], dict[str, Any]]] = {
    "one": (1, "bf16", {}, {}),
    "one-fp32": (1, "fp32", {}, {}),
    "one-plain-fp32": (1, "fp32", {}, PLAIN),
    "dp2": (2, "bf16", {}, {}),
    "dp2-fp32-overlap": (2, "fp32", {}, OVERLAP),
    "dp2-plain": (2, "bf16", {}, PLAIN),
    "ep2-overlap": (2, "bf16", {"expert": 2}, OVERLAP),
    "ep2-plain-fp32": (2, "fp32", {"expert": 2}, PLAIN),
    "tp2": (2, "bf16", {"tensor": 2}, {}),
    "pp2-fp32": (2, "fp32", {"pipeline": 2}, {}),
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    root = tmp_path_factory.mktemp("resume")
    results: dict[str, list[Any]] = {}
    for world in (1, 2):
        cases = {}
        for name, (size, dtype, parallel, sections) in RESUME.items():
            tree = config(root / name, dtype, parallel, **sections)
            if size == world:
                cases[name] = ("resume", {"config": tree, "before": 3, "after": AFTER})
        results |= run(world, cases)
    return results


@pytest.mark.parametrize("name", RESUME)
def test_resume_is_exact(resumed: dict[str, list[Any]], name: str) -> None:
    kinds = set()
    for rank in resumed[name]:
        assert rank["step"] == 3
        went_on, again = rank["results"]
        assert len(went_on) == AFTER and went_on == again
        assert len({loss for loss, _ in went_on}) == AFTER
        expected, actual = rank["weights"]
        assert expected.keys() == actual.keys()
        for parameter, (_, value) in expected.items():
            assert torch.equal(actual[parameter][1], value), parameter
            kinds.add(value.dtype)
        changed = [not torch.equal(rank["fresh"][p][1], expected[p][1]) for p in expected]
        assert all(changed), "the model that resumes must begin with other weights"
        numbers, numbers_again = rank["random"]
        assert numbers == numbers_again and len(set(numbers)) > 1
    assert kinds == {torch.float32} | ({torch.bfloat16} if RESUME[name][1] == "bf16" else set())


# -- weight decay -----------------------------------------------------------------------------------------------------
def test_weight_decay_follows_the_specs(tmp_path: Path) -> None:
    cases = {
        f"{kind}-{dtype}": ("decay", {"config": config(tmp_path, dtype, **sections), "lr": 0.5})
        for kind, sections in {"zero": {}, "plain": PLAIN}.items()
        for dtype in DTYPES
    }
    factor = 1 - 0.5 * 0.1  # lr * weight_decay
    for ranks in run(1, cases).values():
        (rank,) = ranks
        assert set(rank["decays"].values()) == {True, False}
        for name, decays in rank["decays"].items():
            before, after = rank["before"][name], rank["after"][name]
            if decays:
                assert_close(after, before * factor, FP32 if before.dtype is torch.float32 else BF16_ROUNDING, name)
            else:
                assert torch.equal(after, before), name


# -- layouts ----------------------------------------------------------------------------------------------------------
LAYOUTS: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "dp2": (2, {}, {}),
    "ep2-plain": (2, {"expert": 2}, PLAIN),
    "tp2": (2, {"tensor": 2}, {}),
    "tp2-ep2": (2, {"tensor": 2, "expert": 2}, OVERLAP),
    "tp2-etp2": (2, {"tensor": 2, "expert_tensor": 2}, {}),
    "pp2": (2, {"pipeline": 2}, {}),
}
SEQUENTIAL = {"ep2-plain", "tp2-etp2"}  # layouts that compute expert after expert; the others use grouped GEMMs
WRITERS = {"one": "fp32", "tp2-ep2": "bf16", "tp2-etp2": "fp32"}
PAIRS = [(writer, reader) for writer in ("one", "tp2-ep2") for reader in LAYOUTS if writer != reader]
PAIRS += [("tp2-etp2", reader) for reader in ("one", "ep2-plain", "tp2-ep2")]


Results = dict[str, list[Any]]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of the runs "WRITER", and "WRITER-READER", which resumes the writer's checkpoint in another layout."""
    root = tmp_path_factory.mktemp("layouts")

    def tree(layout: str, writer: str) -> dict[str, Any]:
        _, parallel, sections = LAYOUTS[layout]
        tree = config(root / writer, WRITERS[writer], parallel, **sections)
        tree["model"]["moe"]["experts"] = "sequential" if layout in SEQUENTIAL else "grouped"
        return tree

    def writing(world: int) -> dict[str, Any]:
        return {w: ("write", {"config": tree(w, w), "steps": 3, "after": 3}) for w in WRITERS if LAYOUTS[w][0] == world}

    def reading(world: int) -> dict[str, Any]:
        return {
            f"{w}-{r}": ("rewrite", {"config": tree(r, w), "run": str(root / f"{w}-{r}"), "after": 3})
            for w, r in PAIRS
            if LAYOUTS[r][0] == world
        }

    return run(1, writing(1)) | run(2, writing(2) | reading(2)) | run(1, reading(1))


def assert_parts(ranks: list[Any], full: dict[str, Tensor]) -> None:
    """Asserts that every rank's parameters are parts of the full ones, and that together they cover all names."""
    seen = set()
    for rank in ranks:
        for name, (offset, value) in rank["weights"].items():
            part = full[name][tuple(slice(o, o + n) for o, n in zip(offset, value.shape, strict=True))]
            assert torch.equal(part, value) and part.dtype == value.dtype, name
            seen.add(name)
    assert seen == full.keys()


@pytest.mark.parametrize("writer", WRITERS)
def test_full_weights(layouts: Results, writer: str) -> None:
    ranks = layouts[writer]
    full = load_full_weights(ranks[0]["folder"])
    assert_parts(ranks, full)
    for name, master in load_full_weights(ranks[0]["folder"], fp32=True).items():
        assert master.dtype is torch.float32 and torch.equal(master.to(full[name].dtype), full[name])


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_other_layout(layouts: Results, writer: str, reader: str) -> None:
    """Weights and optimizer state pass through another layout unchanged, bit for bit, and training goes on alike."""
    before, ranks = layouts[writer], layouts[f"{writer}-{reader}"]
    assert_parts(ranks, load_full_weights(before[0]["folder"]))
    expected, actual = all_tensors(before[0]["folder"]), all_tensors(ranks[0]["folder"])
    assert expected.keys() == actual.keys()
    assert {key.split(".")[0] for key in expected} == {"model", "optimizer"}
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key
        assert value.any(), f"{key} is all zero"
    if WRITERS[writer] == "fp32":
        losses = [torch.tensor(side[0]["results"], dtype=torch.float64) for side in (before, ranks)]
        assert_close(losses[1], losses[0], FP32, "losses and norms after the resume")


def test_is_a_megatron_checkpoint(layouts: Results, tmp_path: Path) -> None:
    folder = layouts["tp2-ep2"][0]["folder"]
    case = ("read_with_megatron", {"config": config(tmp_path), "folder": str(folder)})
    ((actual,),) = run(1, {"read": case}).values()
    expected = all_tensors(folder)
    assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)


def test_read_without_megatron(layouts: Results) -> None:
    rank = layouts["tp2-ep2"][0]
    code = (
        "import sys; sys.modules['megatron'] = None\n"
        "from linear_moe.checkpoints.reader import load_full_weights\n"
        f"print(len(load_full_weights({str(rank['folder'])!r})))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(rank["weights"])


# -- imported weights -------------------------------------------------------------------------------------------------
UPCYCLED = {"num_experts": 4, "top_k": 2, "expert_ffn_size": 16, "shared_ffn_size": 32, "shared_gate": True}
UPCYCLED |= {"expert_bias": True}
READERS = ("one", "ep2-plain", "tp2-ep2", "pp2")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """A checkpoint whose experts are upcycled from a dense run, and results of training from it in every layout.

    The result "dense" is of a training from the dense weights themselves.
    """
    root = tmp_path_factory.mktemp("imported")

    def tree(name: str, ffn: str, layout: str = "one", dtype: str = "fp32") -> dict[str, Any]:
        _, parallel, sections = LAYOUTS[layout]
        model = {"pattern": "LN", "ffn": ffn, "ffn_size": 64, "moe": UPCYCLED}
        tree = config(root / name, dtype, parallel, **sections)
        return tree | {"model": tree["model"] | model}

    def training(layout: str, name: str, ffn: str, as_name: str) -> tuple[str, dict[str, Any]]:
        return "rewrite", {"config": tree(name, ffn, layout), "run": str(root / as_name), "after": 3}

    source = tree("source", "dense", "tp2", "bf16")
    run(2, {"source": ("write", {"config": source, "steps": 3, "after": 0})})
    save_config(from_dict(Config, source), root / "source" / "config.yaml")
    import_weights(root / "source", from_dict(Config, tree("same", "dense")))
    record = import_weights(root / "source", from_dict(Config, tree("moe", "moe")), upcycle=True)
    results: Results = {}
    for world in (1, 2):
        cases = {r: training(r, "moe", "moe", f"moe-{r}") for r in READERS if LAYOUTS[r][0] == world}
        results |= run(world, cases | ({"dense": training("one", "same", "dense", "again")} if world == 1 else {}))
    return Path(record["checkpoint"]), results


@pytest.mark.parametrize("layout", READERS)
def test_imported_weights_in_every_layout(imported: tuple[Path, Results], layout: str) -> None:
    """All layouts read equal weights and train alike; the first loss, before any update, is the dense model's."""
    checkpoint, results = imported
    assert_parts(results[layout], load_full_weights(checkpoint))
    again = all_tensors(results[layout][0]["folder"])  # saved before the first step
    for name, value in load_full_weights(checkpoint).items():
        assert torch.equal(again[f"model.{name}"], value)
        if "expert_bias" not in name:
            assert not again[f"optimizer.exp_avg.{name}"].any(), "the optimizer begins anew"
    steps = [torch.tensor(results[name][0]["results"], dtype=torch.float64) for name in (layout, "one", "dense")]
    assert_close(steps[0], steps[1], FP32, "losses and norms")
    assert_close(steps[0][0, :1], steps[2][0, :1], FP32, "the first loss and the dense model's")
    assert steps[0][2, 0] != steps[2][2, 0]


def test_imported_is_a_megatron_checkpoint(imported: tuple[Path, Results], tmp_path: Path) -> None:
    case = ("read_with_megatron", {"config": config(tmp_path), "folder": str(imported[0])})
    ((actual,),) = run(1, {"read": case}).values()
    expected = all_tensors(imported[0])
    assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)


# -- torn and failing saves -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints folder of a run that saved steps 1, 2 and 4 and kept two."""
    root = tmp_path_factory.mktemp("torn") / "run"
    tree = config(root, checkpoint={"keep": 2})
    run(1, {f"step {step}": ("write", {"config": tree, "steps": step, "after": 0}) for step in (1, 2, 4)})
    return root / "checkpoints"


@pytest.fixture
def copied(checkpoints: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints, tmp_path / "checkpoints"))


def test_latest(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert [f.name for f in complete_checkpoints(copied)] == ["step_00000002", "step_00000004"]
    assert latest_checkpoint(copied) == copied / "step_00000004" and not caplog.records
    (copied / "latest").write_text("step_00000002\n")
    assert latest_checkpoint(copied) == copied / "step_00000002" and not caplog.records


@pytest.mark.parametrize(
    "damage", ["latest missing", "latest elsewhere", "file missing", "file short", "no info", "bad info"]
)
def test_torn_checkpoint_is_not_taken(copied: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    newest = copied / "step_00000004"
    data = next(newest.glob("*.distcp"))
    if damage == "latest missing":
        (copied / "latest").unlink()
    elif damage == "latest elsewhere":
        (copied / "latest").write_text("step_00000007\n")
    elif damage == "file missing":
        data.unlink()
    elif damage == "file short":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "no info":
        (newest / "checkpoint.json").unlink()
    else:
        (newest / "checkpoint.json").write_text('{"files": {')
    whole = damage.startswith("latest")
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(copied) == copied / ("step_00000004" if whole else "step_00000002")
    (record,) = caplog.records
    assert "taking the newest complete checkpoint" in record.getMessage()


def test_nothing_complete_is_an_error(copied: Path) -> None:
    for info in copied.glob("*/checkpoint.json"):
        info.unlink()
    with pytest.raises(ConfigError, match="so is every other checkpoint"):
        latest_checkpoint(copied)
    assert latest_checkpoint(copied / "elsewhere") is None


@pytest.mark.parametrize("keep", [1, 2])
def test_rolled_back_run_keeps_what_it_saves(tmp_path: Path, keep: int) -> None:
    """A run that goes back to an earlier checkpoint drops those of later steps, and keeps the one it has just saved."""
    tree = config(tmp_path / "run", checkpoint={"keep": keep})
    ((there,),) = run(1, {"back": ("roll_back", {"config": tree})}).values()
    expected = {100: [100], 200: [100, 200][-keep:], 150: [100, 150][-keep:], 160: [150, 160][-keep:]}
    if keep == 1:  # step 100 was removed when 200 was saved, so the run goes on from 200
        expected[150] = [150]
    for step, steps in expected.items():
        names = [f"step_{s:08d}" for s in steps]
        assert there[str(step)] == ["latest", *names, names[-1]], step


FAILURES = {  # kind of failure, bytes that still fit, rank
    "data of rank 0": ("file size", 20_000, 0),
    "data of rank 1": ("file size", 20_000, 1),
    "at the first byte": ("file size", 0, 1),
    "no space beforehand": ("free space", 100_000, 0),
}


def test_failing_saves(tmp_path: Path) -> None:
    tree = config(tmp_path / "run", checkpoint={"keep": 1})
    (ranks,) = run(2, {"failing": ("failing_saves", {"config": tree, "failures": FAILURES})}, timeout=240).values()
    for name, (kind, _, _) in FAILURES.items():
        for rank in ranks:
            assert rank["errors"][name] == ranks[0]["errors"][name]
            assert rank["folders"][name] == ["latest", "step_00000002"]
            assert rank["previous is good"][name]
        reason = "File too large" if kind == "file size" else "are free"
        message = ranks[0]["errors"][name]
        assert reason in message and "step_00000002 stays valid" in message and "\n" not in message
    assert all(rank["last"] == "step_00000100" and rank["loads"] == 100 for rank in ranks)
    assert [f.name for f in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["latest", "step_00000100"]


# -- other models -----------------------------------------------------------------------------------------------------
CHECK_DATA = "from linear_moe.training import platform; platform.install()\n" + (
    "import sys, json; from linear_moe.options.load import from_dict; from linear_moe.config.schema import Config\n"
    "from linear_moe.training.checkpointing import check_data_unchanged\n"
    "for tree, data in json.loads(sys.argv[1]):\n"
    "    try: check_data_unchanged(from_dict(Config, tree), data); print('ok')\n"
    "    except ValueError as error: print(error)\n"
)


def test_other_data(copied: Path) -> None:
    """Data is compared by fingerprint: a corpus in another folder is equal, a corpus with changed files is not."""
    same = config(copied.parent)
    moved = same | {"data": same["data"] | {"corpus": "moved/elsewhere"}}
    larger = same | {"data": {"tokenizer": {"type": "bpe"}}}
    cases = [(same, "these tokens"), (moved, "these tokens"), (same, "others"), (larger, "others")]
    code = [sys.executable, "-c", CHECK_DATA]
    done = subprocess.run([*code, json.dumps(cases)], cwd=ROOT, capture_output=True, text=True, check=True)
    *equal, other, hinted = done.stdout.splitlines()
    assert equal == ["ok", "ok"]
    assert other.startswith("data.corpus = 'stdlib': the run was trained on other data") and "another run" in other
    assert "(data.tokenizer.type was 'bytes')" in hinted and "(data." not in other
    for info in copied.glob("*/checkpoint.json"):
        info.write_text(json.dumps(json.loads(info.read_text()) | {"data": None}))  # saved without a fingerprint
    done = subprocess.run([*code, json.dumps(cases)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["ok"] * len(cases)


def test_damaged_files_are_named(copied: Path) -> None:
    """A training's loading and the reader of full weights name a damaged file, and the remedy, in one line."""
    newest = copied / "step_00000004"
    cases = {}
    data, info = next(newest.glob("*.distcp")), newest / "checkpoint.json"
    whole = {path.name: path.read_bytes() for path in (data, info, newest / ".metadata")}

    def damage(name: str) -> Path:
        """Copies the checkpoints to the run `name`, and returns the newest one's folder, to be damaged."""
        run_folder = copied.parent / name
        shutil.copytree(copied, run_folder / "checkpoints")
        cases[name] = ("load_error", {"config": config(run_folder)})
        return run_folder / "checkpoints" / newest.name

    content = whole[data.name]
    middle = len(content) // 2
    (damage("bytes") / data.name).write_bytes(b"x" * len(content))
    (damage("a bit") / data.name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    (damage("metadata") / ".metadata").write_bytes(bytes(len(whole[".metadata"])))
    tree = json.loads(whole[info.name])
    for key in ("dtypes", "world", "optimizer_step"):
        (damage(key) / info.name).write_text(json.dumps({k: v for k, v in tree.items() if k != key}))
    for name, (message,) in run(1, cases).items():
        file = {"bytes": data.name, "a bit": data.name, "metadata": ".metadata"}.get(name, info.name)
        folder = copied.parent / name / "checkpoints" / newest.name
        reason = f"it has no '{name}'" if file == info.name else "its content is not what was written"
        assert message.startswith(f"{folder / file}: is damaged: {reason}"), message
        assert message.endswith(f"remove {folder}; step_00000002 is then the newest one")
        if name in ("bytes", "a bit", "metadata", "dtypes"):
            with pytest.raises(ConfigError, match="is damaged"):
                load_full_weights(folder)
    assert load_full_weights(newest).keys()
    (newest / info.name).write_text(json.dumps({k: v for k, v in tree.items() if k != "config"}))
    line = [sys.executable, "-c", CHECK, json.dumps([config(copied.parent)])]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{newest / info.name}: is damaged: it has no 'config'")


CHECK = "from linear_moe.training import platform; platform.install()\n" + (
    "import sys, json; from linear_moe.options.load import from_dict; from linear_moe.config.schema import Config\n"
    "from linear_moe.training.checkpointing import check_resume\n"
    "for tree in json.loads(sys.argv[1]):\n"
    "    try: check_resume(from_dict(Config, tree)); print('ok')\n"
    "    except ValueError as error: print(error)\n"
)


def test_other_model(checkpoints: Path) -> None:
    """A checkpoint of another model is refused by its configuration, before process groups, or by its parameters."""
    same = config(checkpoints.parent)
    changes: dict[str, Any] = {
        "ok": {},
        "model.hidden_size = 64": {"hidden_size": 64},
        "model.pattern = 'NL'": {"pattern": "NL"},
        "model.mixer.state_size = 32": {"mixer": same["model"]["mixer"] | {"state_size": 32}},
        "model.mixer.type = 'gla'": {"mixer": {"type": "gla"}},
        "model.num_heads = 8": {"num_heads": 8},
        "model.attention.rope_base = 5.0": {"attention": {"type": "attention", "rope_base": 5.0}},
        "model.ffn = 'dense'": {"ffn": "dense"},
        "model.num_layers = 4": {"num_layers": 4, "pattern": "LNLN"},
        "model.moe.num_experts = 8": {"moe": same["model"]["moe"] | {"num_experts": 8}},
    }
    trees = [same | {"model": same["model"] | change} for change in changes.values()]
    order: dict[str, dict[str, Any]] = {
        "training.global_batch = 64": {"training": same["training"] | {"global_batch": 64}},
        "training.seed = 9": {"training": same["training"] | {"seed": 9}},
        "optimizer.type = 'muon'": {"optimizer": {"type": "muon"}},
    }
    trees += [same | change for change in order.values()]
    free = same["model"]["moe"] | {"aux_loss": 0.5, "dispatcher": "allgather", "experts": "sequential"}
    free |= {"overlap_shared_expert": True, "z_loss": 0.0}
    sameness = [  # other spellings of the same model, and settings that no layer uses
        {"moe": free},
        {"pattern": '"L" + [N] * 1'},
        {"pattern": "MN", "symbols": {"M": {"mixer": same["model"]["mixer"], "ffn": "moe"}}, "mixer": {"type": "gla"}},
        {"ffn_size": 333, "vocab_multiple": 64},
        {"num_heads": 8, "attention": {"type": "attention", "num_heads": 4}},
    ]
    trees += [same | {"model": same["model"] | change, "parallel": {"tensor": 2}} for change in sameness]
    elsewhere = {"data": same["data"] | {"corpus": "moved/elsewhere"}, "optimizer": {"lr": 1.0}}
    trees.append(same | elsewhere)
    done = subprocess.run(
        [sys.executable, "-c", CHECK, json.dumps(trees)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert set(lines[len(changes) + len(order) :]) == {"ok"}, "what leaves the weights' meaning alone is no error"
    assert len(lines) == len(trees)
    for line, start in zip(lines, [*changes, *order], strict=False):
        assert line.startswith(start), line
        assert start == "ok" or "step_00000004 has" in line
    cases = {
        "missing": ("load_error", {"config": same | {"model": same["model"] | {"tie_embeddings": True}}}),
        "shape": ("load_error", {"config": same | {"model": same["model"] | {"vocab_size": 640}}}),
        "layer": ("load_error", {"config": same | {"model": same["model"] | {"num_layers": 3, "pattern": "LNN"}}}),
    }
    results = run(1, cases)
    assert "parameter head.weight is 384x32 there and missing here" in results["missing"][0]
    assert "parameter embedding.weight is 384x32 there and 640x32 here" in results["shape"][0]
    assert "parameter layers.2." in results["layer"][0] and "missing there" in results["layer"][0]
