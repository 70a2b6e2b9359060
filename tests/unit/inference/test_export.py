"""Export of a run: the folder is a verified copy of the weights, and appears complete or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from linear_moe.cli import main
from linear_moe.inference import export as module
from linear_moe.inference.export import export
from linear_moe.inference.generate import generate
from linear_moe.options.errors import ConfigError
from tests.unit.inference.common import CASES, TOKENS, VOCAB, build, byte_tokenizer, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    write_run(folder)
    return folder


@pytest.mark.parametrize(
    ("case", "trained", "asks"),
    [*((case, "bf16", [None]) for case in CASES), ("hybrid", "bf16", ["fp32"]), ("hybrid", "fp32", [None, "bf16"])],
)
def test_export_is_a_copy(case: str, trained: str, asks: list[str | None], tmp_path: Path) -> None:
    write_run(tmp_path / "run", case, steps=(10,), dtype=trained)
    original = build(case, seed=10).model
    for asked in asks:
        out = tmp_path / f"out-{asked}"
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[asked or trained]
        record = export(tmp_path / "run", out, dtype=asked)
        parameters = dict(AutoModelForCausalLM.from_pretrained(out).model.named_parameters())
        assert parameters.keys() == {name for name, _ in original.named_parameters()}
        for name, expected in original.named_parameters():
            assert torch.equal(parameters[name], expected.to(torch.float32 if expected.spec.fp32 else kind)), name
        assert record["step"] == 10 and record["dtype"] == str(kind).removeprefix("torch.")
        assert record["parameters"] == sum(p.numel() for p in original.parameters())
        assert record["bytes"] <= sum(f.stat().st_size for f in out.glob("*.safetensors"))


def test_folder_has_all_a_user_needs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    assert main(["export", str(run), str(out), "--json", "--max-shard-size", "50KB"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["step"] == 20 and record["checkpoint"].endswith("step_00000020")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1 and len(index["weight_map"]) == record["tensors"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("naïve").input_ids == byte_tokenizer()("naïve").input_ids
    model = AutoModelForCausalLM.from_pretrained(out)
    generation = model.generation_config
    assert generation.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id == TOKENS - 1
    assert generation.suppress_tokens == list(range(TOKENS, VOCAB)) and model.config.tokenizer_size == TOKENS
    card = (out / "README.md").read_text()
    assert "validation loss | 2.5000" in card and "training loss | 2.7500" in card and "pattern: LGMN" in card
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert len({p.stat().st_mode for p in out.iterdir()}) == 1  # who may read one file may read all


def test_hf_generate_of_an_export_leaves_padding_rows_alone(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model.model.head.weight[TOKENS:] = 10 * model.model.head.weight[:1]
        model.model.head.weight[TOKENS + 1 :] *= -1
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    assert model.generate(torch.tensor([[1, 2]]), **options).max() < TOKENS
    assert model.generate(torch.tensor([[1, 2]]), **options, suppress_tokens=None).max() >= TOKENS


def continuation(folder: Path, text: str, new: int) -> str:
    """Text that our own generation adds to `text`, with the stop token."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    options = {"max_new_tokens": new, "stop": [TOKENS - 1], "tokenizer_size": TOKENS}
    return tokenizer.decode(generate(model.model, [tokenizer(text).input_ids], **options).tokens[0])


def test_the_cards_example_works_as_printed(run: Path, tmp_path: Path) -> None:
    out = tmp_path / run.name  # the card calls the model by the run's name
    export(run, out)
    (example,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    path = os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", example],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "PYTHONUTF8": "1"},
        cwd=tmp_path, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.decode() == "import os" + continuation(out, "import os", 64) + "\n"


def test_text_generation_pipeline(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    generator = pipeline("text-generation", model=str(tmp_path / "out"), device="cpu")
    texts = ["import os", "naïve"]
    results = generator(texts, max_new_tokens=12, do_sample=False)
    assert [r[0]["generated_text"] for r in results] == [t + continuation(tmp_path / "out", t, 12) for t in texts]


def test_steps_and_incomplete_checkpoints(tmp_path: Path) -> None:
    run = tmp_path / "step_by_step"  # a run folder, although its name begins as that of a checkpoint
    write_run(run, "tied", steps=(10, 20, 30))
    assert export(run, tmp_path / "a", step=10)["step"] == 10
    victim = max((run / "checkpoints" / "step_00000030").glob("*.distcp"), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])  # the last byte is missing
    assert export(run, tmp_path / "b")["step"] == 20
    with pytest.raises(ConfigError, match=r"--step = 30: .*\.distcp is incomplete: .* bytes; complete are: 10, 20"):
        export(run, tmp_path / "c", step=30)
    assert not (tmp_path / "c").exists()


def test_a_run_on_random_tokens_has_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", "tied", steps=(10,))
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    export(tmp_path / "run", tmp_path / "out")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert config.tokenizer_size is None and config.eos_token_id is None and config.vocab_size == VOCAB
    assert main(["generate", str(tmp_path / "out"), "--prompt", "x"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_existing_folder_is_kept_unless_told_otherwise(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export(run, out)  # an empty folder is no obstacle
    (out / "mine").write_text("x")
    with pytest.raises(ConfigError, match="exists; give --overwrite"):
        export(run, out)
    assert (out / "mine").exists()
    export(run, out, overwrite=True)
    assert not (out / "mine").exists() and (out / "config.json").exists()
    assert list(tmp_path.iterdir()) == [out]


def test_failures_leave_nothing_behind(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    export(run, out, step=10)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(ConfigError, match="cannot be written: no space left"):
            export(run, out, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(module, "verify_export", lambda *a: (_ for _ in ()).throw(AssertionError("changed")))
        with pytest.raises(AssertionError):
            export(run, out, overwrite=True)
    assert list(tmp_path.iterdir()) == [out]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_verification_sees_one_changed_bit(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    module.verify_export(tmp_path / "out", expected)
    name = "model.layers.2.mixer.A_log"
    expected[name].view(torch.int32)[0] ^= 1
    with pytest.raises(AssertionError, match=name):
        module.verify_export(tmp_path / "out", expected)


@pytest.mark.parametrize("out", ["file/out", "file"])
def test_a_path_that_cannot_be_written(out: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"cannot be written: Not a directory|exists; give --overwrite"):
        export(run, tmp_path / out)
    with pytest.raises(ConfigError, match="cannot be written: No such file or directory"):
        export(run, Path("/proc/out"))
    with pytest.raises(SystemExit):
        main(["export", str(run), str(tmp_path / "out"), "--max-shard-size", "foo"])
    assert "argument --max-shard-size: 'foo': must be a whole number of KB" in capsys.readouterr().err
    assert [p.read_text() for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: shutil.rmtree(run), "is not a run folder"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "has no complete checkpoint yet"),
        (lambda run: [p.unlink() for p in run.glob("checkpoints/*/checkpoint.json")], "incomplete"),
        (lambda run: (run / "config.yaml").write_text("model: {hidden_size: 64, num_heads: 4}"), "does not fit"),
        (lambda run: (run / "config.yaml").write_text("model: {hiden_size: 64}"), "did you mean 'hidden_size'"),
    ],
)
def test_user_errors_are_one_line(make, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    write_run(tmp_path / "run", "tied", steps=(10,))
    make(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
