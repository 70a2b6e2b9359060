"""Generation: state cache = no cache, batches, sampling, streaming, and the command."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from linear_moe.cli import main
from linear_moe.config.load import load_config, save_config
from linear_moe.inference.cache import DecodingState, prefill
from linear_moe.inference.export import export
from linear_moe.inference.generate import Sampling, TextStream, generate, load_model, sample
from linear_moe.modeling.tokens import TokenLayout
from tests.tolerances import DECODE, assert_close
from tests.unit.inference.common import CASES, TOKENS, VOCAB, build, byte_tokenizer, prompt, write_run

every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_with_cache_equals_without(case: str) -> None:
    model, prompts = build(case).model, [prompt(9), prompt(9, seed=1)]
    cached = generate(model, prompts, max_new_tokens=16)
    recomputed = generate(model, prompts, max_new_tokens=16, use_cache=False)
    assert cached.tokens == recomputed.tokens
    assert cached.state_bytes > 0 and recomputed.state_bytes == 0


@every_case
def test_prompts_of_different_lengths_are_as_each_alone(case: str) -> None:
    model, prompts = build(case).model, [prompt(n, seed=n) for n in (1, 13, 6)]
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=7)):
        batch = generate(model, prompts, max_new_tokens=10, sampling=sampling).tokens
        for i, alone in enumerate(prompts):
            one = Sampling(sampling.temperature, seed=sampling.seed + i)
            assert generate(model, [alone], max_new_tokens=10, sampling=one).tokens[0] == batch[i]


@every_case
def test_prefill_then_steps_equals_the_full_forward_pass(case: str) -> None:
    model, rows = build(case).model, [torch.tensor(prompt(n, seed=n)) for n in (14, 5)]
    with torch.no_grad():
        logits, state = prefill(model, [rows[0][:10], rows[1][:1]], room=2)
        steps = [logits]
        for t in range(4):
            steps.append(state.advance(model, torch.stack([rows[0][10 + t], rows[1][1 + t]])[:, None])[:, 0])
        for i, row in enumerate(rows):
            full = model(row[None], TokenLayout(1, len(row)))[0, -5:]
            assert_close(torch.stack([s[i] for s in steps]), full, DECODE)
    assert state.positions.tolist() == [14, 5]


def test_selected_rows_go_on_as_they_would_have() -> None:
    model, rows = build("hybrid").model, [torch.tensor(prompt(n, seed=n)) for n in (9, 4)]
    with torch.no_grad():
        _, state = prefill(model, rows, room=1)
        state.select(torch.tensor([1, 0, 1]))
        logits = state.advance(model, torch.tensor([[7], [8], [9]]))[:, 0]
        for actual, row, token in zip(logits, (rows[1], rows[0], rows[1]), (7, 8, 9), strict=True):
            full = model(torch.cat([row, torch.tensor([token])])[None], TokenLayout(1, len(row) + 1))[0, -1]
            assert_close(actual, full, DECODE)


def test_state_bytes_are_what_the_mixers_declare() -> None:
    model = build("hybrid").model
    state = DecodingState.empty(model, batch=3, capacity=50)
    declared = 0
    for layer in model.layers.values():
        for shape, dtype in layer.mixer.state_shapes(1, 50).values():
            declared += torch.empty(shape, dtype=dtype or torch.float32).nbytes
    assert state.bytes_per_sequence() == declared


def test_padding_of_the_vocabulary_is_never_chosen() -> None:
    model = build("hybrid").model
    with torch.no_grad():
        model.head.weight[TOKENS:] = 10 * model.head.weight[:1]  # padding rows that would have the largest logits
        model.head.weight[TOKENS + 1 :] *= -1
    options = {"max_new_tokens": 20, "sampling": Sampling(temperature=2.0)}
    assert max(generate(model, [prompt(5)], **options).tokens[0]) >= TOKENS
    assert max(generate(model, [prompt(5)], tokenizer_size=TOKENS, **options).tokens[0]) < TOKENS


def test_a_stop_token_ends_its_row_only() -> None:
    model, prompts = build("hybrid").model, [prompt(4), prompt(4, seed=1)]
    free = generate(model, prompts, max_new_tokens=12).tokens
    stop = next(t for t in free[0] if t not in free[1])
    result = generate(model, prompts, max_new_tokens=12, stop={stop})
    assert result.tokens[0] == free[0][: free[0].index(stop) + 1] and result.finish[0] == "stop"
    assert result.tokens[1] == free[1] and result.finish[1] == "length"


def test_on_token_and_bad_arguments() -> None:
    model, heard = build("tied").model, []
    result = generate(model, [prompt(3), prompt(2)], max_new_tokens=4, on_token=lambda row, t: heard.append((row, t)))
    assert heard == [(row, result.tokens[row][i]) for i in range(4) for row in range(2)]
    for prompts, new in (([[]], 4), ([], 4), ([[1]], 0)):
        with pytest.raises(ValueError, match=r"at least one token|max_new_tokens"):
            generate(model, prompts, max_new_tokens=new)
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}):
        with pytest.raises(ValueError, match="top_p"):
            Sampling(**bad)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6), (4, 0.7), (1, 1.0), (0, 1e-9)])
def test_sampled_frequencies_follow_the_filtered_distribution(top_k: int, top_p: float) -> None:
    logits, temperature, draws = torch.randn(1, 8, generator=torch.Generator().manual_seed(3)), 1.3, 20_000
    expected = logits / temperature
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    expected = expected.softmax(-1)[0]
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature, top_k, top_p)
    tokens = sample(logits.expand(draws, -1), sampling, [generator] * draws)
    counts = torch.bincount(torch.tensor(tokens), minlength=8) / draws
    assert torch.equal(counts > 0, expected > 0)
    assert (counts - expected).abs().max() < 0.015  # four standard deviations


def test_text_stream_writes_whole_characters_and_all_of_them() -> None:
    tokenizer, text, written = byte_tokenizer(), "naïve 🦊 text\n", []
    stream = TextStream(tokenizer, written.append)
    for token in tokenizer(text).input_ids:
        stream.put(token)
    stream.end()
    assert "".join(written) == text and not any("\ufffd" in piece for piece in written) and len(written) > 5
    stream = TextStream(tokenizer, written.append)
    stream.put(tokenizer("é").input_ids[0])
    stream.end()
    assert written[-1] == "\ufffd"  # an unfinished character is shown as such at the end


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "run"
    write_run(folder)
    return folder


def test_command_on_an_export_and_on_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), str(tmp_path / "model")]) == 0
    capsys.readouterr()
    records = []
    common = ["--prompt", "def f(", "--prompt", "x", "--max-new-tokens", "12", "--ignore-eos", "--json"]
    exported = str(tmp_path / "model")
    for arguments in ([exported], [exported, "--no-cache"], [str(run)], [str(run), "--step", "10"]):
        assert main(["generate", *arguments, *common]) == 0
        records.append(json.loads(capsys.readouterr().out))
    cached, recomputed, from_run, other_step = records
    assert cached["tokens"] == recomputed["tokens"] == from_run["tokens"] != other_step["tokens"]
    assert [len(t) for t in cached["tokens"]] == [12, 12] and max(map(max, cached["tokens"])) < TOKENS < VOCAB
    assert cached["completions"] == [byte_tokenizer().decode(t, skip_special_tokens=True) for t in cached["tokens"]]
    assert cached["cache"] and not recomputed["cache"]
    assert cached["state_bytes_per_sequence"] > 0 and cached["tokens_per_second"] > 0


def test_command_streams_what_json_reports(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.txt").write_text("import os")
    arguments = ["generate", str(run), "--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "9"]
    arguments += ["--temperature", "0.8", "--top-k", "50", "--top-p", "0.9", "--seed", "3"]
    assert main([*arguments, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert main(arguments) == 0
    streamed = capsys.readouterr()
    assert streamed.out == f"import os{record['completions'][0]}\n"
    assert "tokens/s" in streamed.err and "KiB per sequence" in streamed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}"], "--prompt"),
        (["{run}", "--prompt", ""], "no tokens"),
        (["{run}", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens: '0': must be a whole number >= 1"),
        (["{run}", "--prompt", "x", "--top-p", "2"], "--top-p: '2': must be a number in (0, 1]"),
        (["{run}", "--prompt", "x", "--temperature", "-1"], "--temperature: '-1': must be a number >= 0"),
        (["{run}", "--prompt", "x", "--temperature", "nan"], "--temperature: 'nan': must be a number >= 0"),
        (["{run}", "--prompt", "x", "--seed", "99999999999999999999"], "from 0 to 2**63 - 1"),
        (["{run}", "--prompt", "x", "--device", "foo"], "--device = 'foo': must be cpu, cuda or cuda:INDEX"),
        (["{run}", "--prompt", "x", "--device", "cuda:99"], "--device = 'cuda:99': this machine has"),
        (["{run}", "--prompt", "x", "--step", "11"], "complete are: 10, 20"),
        (["{run}", "--prompt-file", "{run}/absent"], "cannot be read: No such file"),
        (["{run}/tokenizer", "--prompt", "x"], "neither an exported folder nor a run folder"),
    ],
)
def test_user_errors_are_one_line(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(["generate", *(a.format(run=run) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def code(argv: list[str]) -> int:
    """Returns the exit code of a command, also where argparse raises SystemExit."""
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "weights cut off": ("model.safetensors", lambda p: os.truncate(p, 1000), "cannot be loaded: "),
    "weights missing": ("model.safetensors", Path.unlink, "has no weights"),
    "config cut off": ("config.json", lambda p: os.truncate(p, 20), "config.json': is not a model's configuration"),
    "config of nothing": ("config.json", lambda p: p.write_text("[]"), "is not a model's configuration"),
    "config without model": (
        "config.json", lambda p: p.write_text('{"model_type": "linear_moe"}'), "LinearMoEConfig.model is not set"
    ),
    "tokenizer missing": ("tokenizer.json", Path.unlink, "has no tokenizer.json"),
    "tokenizer cut off": ("tokenizer.json", lambda p: os.truncate(p, 100), "cannot be loaded: "),
}  # fmt: skip


def test_a_damaged_export_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(run, tmp_path / "good")
    for name, (file, damage, message) in DAMAGE.items():
        bad = tmp_path / name
        shutil.copytree(tmp_path / "good", bad)
        damage(bad / file)
        assert main(["generate", str(bad), "--prompt", "x"]) == 2, name
        error = capsys.readouterr().err
        assert message in error and str(bad) in error and error.count("\n") == 1, error


def test_a_run_trained_with_quack(tmp_path: Path) -> None:
    """A model trained with experts=quack runs and is exported on machines without such a GPU, also in fp32."""
    write_run(tmp_path / "run", dtype="bf16")
    config = load_config(tmp_path / "run" / "config.yaml", ["model.moe.experts=quack"])
    save_config(config, tmp_path / "run" / "config.yaml")
    for dtype in ("bf16", "fp32"):
        export(tmp_path / "run", tmp_path / dtype, dtype=dtype)
    for folder in ("run", "bf16", "fp32"):
        model, _ = load_model(tmp_path / folder, device="cpu")
        assert model(torch.tensor([prompt(9)])).logits.isfinite().all()


def test_dtype_that_the_experts_cannot_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CASES, "odd", CASES["tied"] | {"moe": {"num_experts": 4, "expert_ffn_size": 20}})
    write_run(tmp_path / "run", "odd", steps=(10,))
    assert main(["generate", str(tmp_path / "run"), "--prompt", "x", "--max-new-tokens", "2"]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    capsys.readouterr()
    for folder in ("run", "out"):
        assert main(["generate", str(tmp_path / folder), "--prompt", "x", "--dtype", "bf16"]) == 2
        assert "--dtype = 'bf16': model.moe.expert_ffn_size 20 must be divisible by 8" in capsys.readouterr().err
