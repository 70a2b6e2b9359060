"""`linear-moe checkpoint`: its reports on checkpoints, and training from the checkpoints that it rewrites."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, filesystem

from linear_moe.checkpoints.reader import INFO
from linear_moe.cli import main
from tests.distributed.harness import all_tensors, run
from tests.distributed.test_checkpoint import OVERLAP, config
from tests.tolerances import FP32, assert_close

AFTER = 4
LAYOUTS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "dp2": ({}, OVERLAP),
    "tp2-ep2": ({"tensor": 2, "expert": 2}, {}),
}


def tree(folder: Path, layout: str) -> dict[str, Any]:
    parallel, sections = LAYOUTS[layout]
    return config(folder, "fp32", parallel, **sections)


def command(*words: str | Path) -> Any:
    """Runs `linear-moe checkpoint` with `--json`, and returns the parsed output. Asserts that it succeeds."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["checkpoint", *map(str, words), "--json"]) == 0
    return json.loads(out.getvalue())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs of each layout, saved at step 3 and continued; reports of their rewriting; and runs from the results."""
    root = tmp_path_factory.mktemp("reshard")
    writes = {name: ("write", {"config": tree(root / name, name), "steps": 3, "after": AFTER}) for name in LAYOUTS}
    outcomes: dict[str, Any] = {"root": root} | run(2, writes)
    outcomes["same"] = command("reshard", root / "dp2", root / "same", "--files", "3")
    outcomes["other"] = command("reshard", root / "dp2", root / "other", "--files", 2, "--tensor", 2, "--expert", 2)
    bare = ("reshard", root / "tp2-ep2" / "checkpoints" / "step_00000003", root / "bare", "--no-optimizer")
    outcomes["bare"] = command(*bare, "--files", 1)
    reads = {"same": "dp2", "other": "tp2-ep2", "bare": "dp2"}
    return outcomes | run(
        2,
        {
            f"{name} read": (
                "rewrite",
                {"config": tree(root / name, layout), "run": str(root / f"{name} again"), "after": AFTER},
            )
            for name, layout in reads.items()
        },
    )


def test_every_tensor_is_the_same(runs: dict[str, Any]) -> None:
    source = all_tensors(Path(runs["same"]["source"]))
    for name in ("same", "other"):
        copy = all_tensors(Path(runs[name]["checkpoint"]))
        assert copy.keys() == source.keys()
        assert all(torch.equal(copy[key], value) and copy[key].dtype is value.dtype for key, value in source.items())
    bare, source = all_tensors(Path(runs["bare"]["checkpoint"])), all_tensors(Path(runs["bare"]["source"]))
    assert bare.keys() == {key for key in source if key.startswith("model.")}
    assert all(torch.equal(bare[key], source[key]) for key in bare)


def test_files_and_pieces(runs: dict[str, Any]) -> None:
    for name, files in (("same", 3), ("other", 2), ("bare", 1)):
        folder = Path(runs[name]["checkpoint"])
        assert len(list(folder.glob("*.distcp"))) == runs[name]["files"] == files
    sizes = [f.stat().st_size for f in Path(runs["same"]["checkpoint"]).glob("*.distcp")]
    assert max(sizes) < 1.5 * min(sizes), "files of about the same size"
    assert runs["bare"]["bytes"] < 0.5 * runs["bare"]["source_bytes"]

    def pieces(name: str) -> dict[str, int]:
        entries = FileSystemReader(runs[name]["checkpoint"]).read_metadata().state_dict_metadata
        return {key: len(entry.chunks) for key, entry in entries.items() if hasattr(entry, "chunks")}

    whole, cut = pieces("same"), pieces("other")
    assert set(whole.values()) == {1}
    assert cut["model.embedding.weight"] == cut["optimizer.exp_avg.embedding.weight"] == 2
    assert cut["model.norm.weight"] == 1
    assert {count for key, count in cut.items() if ".ffn.experts" in key} == {2}


def test_training_goes_on(runs: dict[str, Any]) -> None:
    """Training goes on from a rewritten checkpoint: bit for bit in the layout that saved it, else to rounding."""
    expected = runs["dp2"][0]["results"]
    assert runs["same read"][0]["results"] == expected
    for step, (a, b) in enumerate(zip(runs["other read"][0]["results"], expected, strict=True)):
        assert_close(torch.tensor(a), torch.tensor(b), FP32, f"step {step}")
    with_moments, without = runs["tp2-ep2"][0]["results"], runs["bare read"][0]["results"]
    assert_close(torch.tensor(without[0]), torch.tensor(with_moments[0]), FP32, "the first step sees the same weights")
    assert abs(without[-1][0] - with_moments[-1][0]) > 3e-5, "moments that begin anew make other updates"


def test_inspect(runs: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    root = runs["root"]
    report = command("inspect", root / "tp2-ep2", "--tensors", "model.*")
    info = json.loads((root / "tp2-ep2" / "checkpoints" / "step_00000003" / INFO).read_text())
    tensors = all_tensors(root / "tp2-ep2" / "checkpoints" / "step_00000003")
    model = {key: value for key, value in tensors.items() if key.startswith("model.")}
    assert report["step"] == 3 and report["samples"] == 12 and report["tokens"] == 12 * 16
    assert report["layout"]["world"] == 2 and report["layout"]["tensor"] == report["layout"]["expert"] == 2
    assert report["layout"]["distributed_optimizer"] == info["config"]["optimizer"]["distributed"]
    assert report["verified"] and report["data"] == "these tokens" and report["versions"] == info["versions"]
    assert report["parameters"] == sum(value.numel() for value in model.values())
    for entry in report["tensors"]:
        value = model.pop(entry["name"])
        assert entry["shape"] == list(value.shape) and entry["dtype"] == str(value.dtype).removeprefix("torch.")
        assert entry["bytes"] == value.nbytes
    assert not model
    trained = [key for key in tensors if key.startswith("optimizer.exp_avg.")]
    assert report["optimizer"]["step"] == 3 and report["optimizer"]["tensors"] == 2 * len(trained)
    other, bare = command("inspect", root / "dp2"), command("inspect", root / "bare")
    assert other["config_digest"] != report["config_digest"] == command("inspect", root / "tp2-ep2")["config_digest"]
    assert bare["optimizer"] is None and bare["step"] == 3 and bare["tensors"] == []
    assert main(["checkpoint", "inspect", str(root / "bare")]) == 0
    assert "optimizer   none" in capsys.readouterr().out


@pytest.fixture
def copied(runs: dict[str, Any], tmp_path: Path) -> Path:
    """Folder of the only checkpoint of a copied run, which has no optimizer state."""
    shutil.copytree(runs["root"] / "bare", tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "step_00000003"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "bit": (lambda f: flip(next(f.glob("*.distcp"))), "content is not what was written"),
    "metadata": (lambda f: flip(f / ".metadata"), "content is not what was written"),
    "short": (lambda f: next(f.glob("*.distcp")).write_bytes(b"x"), "is incomplete: 1 of"),
    "gone": (lambda f: next(f.glob("*.distcp")).unlink(), "is missing"),
    "no json": (lambda f: (f / INFO).unlink(), "is not a checkpoint"),
    "bad json": (lambda f: (f / INFO).write_text("{"), "is not valid JSON"),
    "old": (lambda f: (f / INFO).write_text('{"format": 0}'), "reads checkpoint format"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("action", ["inspect", "reshard"])
def test_damage_is_one_line(
    copied: Path, kind: str, action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, part = DAMAGE[kind]
    damage(copied)
    out = tmp_path / "out"
    for place in (copied, copied.parent.parent):
        assert main(["checkpoint", action, str(place), *([str(out)] if action == "reshard" else [])]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1, printed.err
        assert part in printed.err or place != copied, printed.err
    assert not list(out.rglob("step_*"))


def test_a_full_disk_leaves_nothing_that_counts(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If a file cannot be written, the command prints one line and leaves no checkpoint; later the command succeeds."""
    from linear_moe.training.checkpointing import reshard  # not above: needs Megatron-Core, which the fixture prepares

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    out, write = tmp_path / "out", filesystem._write_item

    def full_later(*args: Any) -> Any:
        """Fails in every thread but the main thread, which waits for the others."""
        return write(*args) if threading.current_thread() is threading.main_thread() else full()

    for where, name, broken in (
        (reshard, "save_config", full),
        (reshard, "save_pieces", full),
        (filesystem, "_write_item", full_later),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, broken)
            assert main(["checkpoint", "reshard", str(copied), str(out)]) == 2
        printed = capsys.readouterr()
        assert "No space left" in printed.err and printed.err.count("\n") == 1
        assert not list(out.rglob("*step_*"))
    assert main(["checkpoint", "reshard", str(copied), str(out)]) == 0
    assert {path.name for path in out.iterdir()} >= {"config.yaml", "checkpoints"}


def test_what_is_refused(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str | Path) -> str:
        assert main(["checkpoint", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    run_folder = copied.parent.parent
    assert "has checkpoints already" in refused("reshard", run_folder, run_folder)
    assert "complete are: 3" in refused("inspect", run_folder, "--step", 4)
    assert "no tensor" in refused("inspect", run_folder, "--tensors", "nothing*")
    assert "is no folder" in refused("inspect", tmp_path / "nowhere")
    assert "neither a run folder" in refused("inspect", tmp_path)
    error = refused("reshard", run_folder, tmp_path / "out", "--tensor", 3)
    assert "--tensor = 3" in error and "does not divide" in error
    assert not (tmp_path / "out" / "checkpoints").exists()
    copied.rename(copied.with_name(".step_00000003.partial"))
    assert "a save that did not end" in refused("inspect", copied.with_name(".step_00000003.partial"))
