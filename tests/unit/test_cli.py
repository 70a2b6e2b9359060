"""The command line: every mistake is one line on stderr and exit code 2, before any process group exists."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from linear_moe.cli import COMMANDS, main
from linear_moe.training.supervision.faults import TrainingError

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "models" / "tiny.yaml")
Result = tuple[int, str, str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Result]:
    def run(*argv: str) -> Result:
        try:
            code = main([word.replace("TMP", str(tmp_path)) for word in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


BAD: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["training.stepz=3"], ["training.stepz", "'steps'"]),
    "wrong type": (["training.steps=abc"], ["training.steps = 'abc'", "integer"]),
    "pattern length": (["model.num_layers=5"], ["4 layers", "model.num_layers = 5"]),
    "pattern syntax": (["model.pattern=L *"], ["model.pattern", "position"]),
    "unknown mixer": (["model.mixer.type=gated_deltanett"], ["unknown mixer", "'gated_deltanet'", "mamba2"]),
    "unknown symbol": (["model.pattern=LLLX"], ["unknown symbol 'X'"]),
    "heads": (["model.num_heads=5"], ["model.mixer.num_heads = 5", "nearest valid"]),
    "heads of a symbol": (
        ["model.symbols.L.mixer.type=gated_deltanet", "model.symbols.L.mixer.num_heads=0"],
        ["model.symbols.L.mixer.num_heads = 0", ">= 1"],
    ),
    "world size": (["parallel.tensor=2", "--world", "5"], ["world size = 5", "parallel.tensor 2"]),
    "world of nothing": (["--world", "0"], ["world size = 0"]),
    "batch": (["training.global_batch=9", "--world", "1"], ["training.global_batch = 9", "8 or 12"]),
    "no override": (["training.steps"], ["'training.steps'", "a.b=c"]),
    "no option": (["--wrold", "5"], ["unrecognized arguments: --wrold", "--help"]),
    "no number": (["--world", "two"], ["--world", "two"]),
    "missing corpus": (["data.corpus=TMP/nowhere"], ["data.corpus", "nowhere", "no such file"]),
    "empty corpus": (["data.corpus=TMP"], ["data.corpus", "no text files"]),
    "missing tokenizer": (["data.tokenizer.type=hf"], ["data.tokenizer.path"]),
    "no run": (["run="], ["run", "cannot be null"]),
    "empty run": (["run=''"], ["run = ''", "must not be empty"]),
    "unwritable run": (["run=/dev/null/run"], ["run = '/dev/null/run'", "cannot be written"]),
    "unwritable cache": (["data.cache=/dev/null"], ["data.cache = '/dev/null'", "cannot be written"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(run: Callable[..., Result], name: str) -> None:
    words, parts = BAD[name]
    code, out, err = run("check", TINY, "run=TMP/run", "data.cache=TMP/cache", *words)
    assert (code, out) == (2, "")
    assert err.startswith("linear-moe: ")
    assert err.count("\n") == 1
    assert all(part in err for part in parts), err
    assert not dist.is_initialized()


@pytest.mark.parametrize("command", ["plan", "train", "data", "check"])
def test_every_command_that_takes_a_config(run: Callable[..., Result], command: str) -> None:
    code, out, err = run(command, TINY, "training.steps=0")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "training.steps = 0" in err


def test_only_the_config_is_required(run: Callable[..., Result]) -> None:
    for command in ("train", "plan", "check", "data"):
        assert run(command)[2] == (
            f"linear-moe: the following arguments are required: config (see linear-moe {command} --help)\n"
        )


@pytest.mark.parametrize("argv", [[], ["trian"], ["plan"], ["plan", "TMP/none.yaml"]])
def test_bad_command(run: Callable[..., Result], argv: list[str]) -> None:
    code, out, err = run(*argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("linear-moe: ")


def test_good_input(run: Callable[..., Result], tmp_path: Path) -> None:
    code, out, err = run("check", TINY, "--world", "2", "run=TMP/run", "data.cache=TMP/cache")
    assert (code, err) == (0, "")
    assert "ok on 2 ranks" in out
    assert list(tmp_path.iterdir()) == []  # checking leaves nothing behind


def test_overrides_between_options(run: Callable[..., Result]) -> None:
    code, out, _ = run("plan", TINY, "model.num_layers=8", "--world", "2", "model.pattern=LLLN*2", "--json", "run=x")
    assert code == 0
    assert out.count('"mixer"') == 8


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(run: Callable[..., Result], command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"usage: linear-moe {command}" in out
    assert "example:\n  " in out


def fails_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(args: Any) -> None:
        raise error

    for command in COMMANDS.values():
        monkeypatch.setattr(command, "main", raises)


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.EROFS])
def test_user_os_errors_are_one_line(code: int, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    fails_with(OSError(code, os.strerror(code), "some/file"), monkeypatch)
    assert run("plan", TINY) == (2, "", f"linear-moe: some/file: {os.strerror(code)}\n")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert run("plan", TINY) == (2, "", f"linear-moe: [rank 3] some/file: {os.strerror(code)}\n")


def test_other_errors_keep_their_traceback(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ValueError("a bug"), ConnectionResetError(errno.ECONNRESET, "peer"), OSError(errno.EIO, "disk")):
        fails_with(error, monkeypatch)
        with pytest.raises(type(error)):
            run("plan", TINY)


def test_training_errors_are_one_line_of_rank_0(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    fails_with(TrainingError("step 3: loss nan"), monkeypatch)
    assert run("train", TINY) == (3, "", "linear-moe: step 3: loss nan\n")
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")  # the first rank of the second node
    assert run("train", TINY) == (3, "", "")
    fails_with(RuntimeError("a bug"), monkeypatch)
    with pytest.raises(RuntimeError, match="a bug"):
        run("train", TINY)


def test_only_one_rank_of_a_node_prints(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        code, _, err = run("plan", TINY, "training.steps=0")
        assert (code, err.count("\n")) == (2, lines)


def test_as_a_program(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "linear_moe", "train", TINY, "model.mixer.type=glaa", f"run={tmp_path}/run"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("linear-moe: model.mixer.type = 'glaa': unknown mixer; did you mean 'gla'")
    assert list(tmp_path.iterdir()) == []
