from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from linear_moe.config.load import load_config, save_config
from linear_moe.config.schema import Config
from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.mixers.registry import MIXERS, mixer_config
from linear_moe.options.errors import ConfigError
from linear_moe.options.load import from_dict, parse_overrides

CONFIGS = sorted((Path(__file__).parents[3] / "configs").rglob("*.yaml"))


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def load(folder: Path, text: str, *overrides: str) -> Config:
    return load_config(write(folder, text), overrides)


def test_defaults_file_overrides(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "training: {steps: 7, global_batch: 16}\noptimizer: {lr: 1e-4, eps: 1}\n",
        "training.steps=9",
        "model.vocab_size=null",
        "parallel.tensor_sequence=true",
        "optimizer.clip=5e-1",
    )
    assert (config.training.steps, config.training.global_batch) == (9, 16)
    assert config.training.micro_batch == Config().training.micro_batch
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.clip) == (1e-4, 1.0, 0.5)
    assert all(isinstance(v, float) for v in (config.optimizer.lr, config.optimizer.eps, config.optimizer.clip))
    assert config.model.vocab_size is None
    assert config.parallel.tensor_sequence is True


def test_override_values_are_yaml() -> None:
    assert parse_overrides(["a.b=1", "a.c={d: [x, 2]}", "e=", "f=a=b"]) == {
        "a": {"b": 1, "c": {"d": ["x", 2]}},
        "e": None,
        "f": "a=b",
    }


def test_includes_merge_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, "model: {hidden_size: 64, num_heads: 2}\ntraining: {steps: 1}\n", "one.yaml")
    write(tmp_path / "sub", "include: ../one.yaml\ntraining: {steps: 2, seed: 5}\n", "two.yaml")
    write(tmp_path, "model: {num_heads: 8}\n", "three.yaml")
    config = load(tmp_path, "include: [sub/two.yaml, three.yaml]\ntraining: {seed: 6}\n")
    assert (config.model.hidden_size, config.model.num_heads) == (64, 8)
    assert (config.training.steps, config.training.seed) == (2, 6)


def test_new_mixer_type_starts_afresh(tmp_path: Path) -> None:
    base = "model: {mixer: {type: gla, expand_k: 1.0, num_heads: 2}}\n"
    same = load(tmp_path, base, "model.mixer.type=gla", "model.mixer.qkv_bias=true")
    assert same.model.mixer == mixer_config("gla", expand_k=1.0, num_heads=2, qkv_bias=True)
    # num_heads was set for gla, and gated_deltanet knows the name too: it still does not leak
    other = load(tmp_path, base, "model.mixer.type=gated_deltanet")
    assert other.model.mixer == mixer_config("gated_deltanet")
    both = load(tmp_path, base, "model.mixer.num_heads=8", "model.mixer.type=gated_deltanet")
    assert both.model.mixer == mixer_config("gated_deltanet", num_heads=8)
    with pytest.raises(ConfigError, match=r"model.mixer.expand_k: unknown key of model.mixer \(type attention\)"):
        load(tmp_path, base, "model.mixer.type=attention", "model.mixer.expand_k=1")


def test_symbols_merge_by_letter(tmp_path: Path) -> None:
    text = "model: {symbols: {M: {mixer: {type: mamba2}, ffn: dense}}}"
    config = load(tmp_path, text, "model.symbols.M.ffn=moe", "model.symbols.A.mixer.type=attention")
    assert list(config.model.symbols) == ["M", "A"]
    assert config.model.symbols["M"].mixer == mixer_config("mamba2")
    assert config.model.symbols["M"].ffn == "moe"
    assert config.model.symbols["A"].mixer == mixer_config("attention")


BAD_FILES = {
    "training: {stepz: 1}": ["training.stepz", "unknown key of training", "'steps'"],
    "trainning: {}": ["trainning", "unknown key", "'training'"],
    "model: {mixer: {type: gla, expandk: 1}}": ["model.mixer.expandk", "model.mixer (type gla)", "'expand_k'"],
    "model: {mixer: {type: glaa}}": ["model.mixer.type = 'glaa'", "unknown mixer", "'gla'", *MIXERS],
    "model: {mixer: gla}": ["model.mixer = 'gla'", "mapping", "model.mixer.type=gla"],
    "model: {symbols: {M: {mixer: {expand_k: 1}}}}": ["model.symbols.M.mixer.type", "must name a mixer", *MIXERS],
    "model: {symbols: {M: {ffn: moee}}}": ["model.symbols.M.ffn = 'moee'", "'moe'"],
    "training: {steps: abc}": ["training.steps = 'abc'", "an integer"],
    "training: {steps: true}": ["training.steps = True", "an integer"],
    "training: {steps: 10.0}": ["training.steps = 10.0", "an integer", "nearest valid: 10"],
    "training: {steps: 1e3}": ["training.steps = '1e3'", "an integer", "nearest valid: 1000"],
    "training: {steps: null}": ["training.steps = None", "cannot be null"],
    "training: {steps: 0}": ["training.steps = 0", "must be >= 1", "nearest valid: 1"],
    "training: {dtype: fp8}": ["training.dtype = 'fp8'", "choices", "bf16"],
    "training: 3": ["training = 3", "mapping"],
    "optimizer: {lr: fast}": ["optimizer.lr = 'fast'", "a number"],
    "optimizer: {lr: true}": ["optimizer.lr = True", "a number"],
    "optimizer: {lr: .inf}": ["optimizer.lr = inf", "a number"],
    "optimizer: {lr: 0}": ["optimizer.lr = 0.0", "must be > 0"],
    "optimizer: {beta1: 1}": ["optimizer.beta1 = 1.0", "must be < 1"],
    "optimizer: {distributed: 1}": ["optimizer.distributed = 1", "true or false"],
    "data: {validation_fraction: 0.9}": ["data.validation_fraction = 0.9", "must be <= 0.5", "nearest valid: 0.5"],
    "run: 3": ["run = 3", "a string", "quote it: '3'"],
    "run: [a]": ["run = ['a']", "a string"],
    "- a": ["config.yaml", "must hold a mapping"],
    "": ["config.yaml", "must hold a mapping"],
    "training:\n  steps: [1\nrun: x": ["config.yaml", "not valid YAML", "line 3, column"],
    "training:\n\tsteps: 1": ["config.yaml", "not valid YAML", "line 2, column 1"],
    "run: a\nrun: b": ["config.yaml", "line 2, column 1", "'run' is given twice"],
    "include: missing.yaml": ["missing.yaml", "does not exist"],
    "include: 3": ["include = 3", "file name"],
    "include: config.yaml": ["config.yaml", "includes", "circle"],
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_refuses_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in BAD_FILES[text]), message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.steps", ["'training.steps'", "a.b=c"]),
        ("=3", ["'=3'", "a.b=c"]),
        ("training..steps=3", ["a.b=c"]),
        ("training.steps=[1", ["override 'training.steps=[1'", "not valid YAML"]),
        ("training.steps.x=1", ["training.steps", "an integer"]),
        ("model.mixer.conv_sice=4", ["model.mixer.conv_sice", "'conv_size'"]),
    ],
)
def test_refuses_override(tmp_path: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "{}", override)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_missing_file_names_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "{}", "quickstart.yaml")
    with pytest.raises(ConfigError, match=r"does not exist; did you mean '.*/quickstart.yaml'"):
        load_config(tmp_path / "quickstar.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_save_and_load_give_an_equal_tree(tmp_path: Path, path: Path) -> None:
    overrides = ["model.symbols.M.mixer.type=mamba2", "optimizer.eps=1e-20", "run='1e-4'", "data.tokenizer.path=null"]
    config = load_config(path, overrides)
    save_config(config, tmp_path / "saved.yaml")
    again = load_config(tmp_path / "saved.yaml")
    assert again == config
    assert dataclasses.asdict(again) == dataclasses.asdict(config)
    assert type(again.model.symbols["M"].mixer) is type(mixer_config("mamba2"))
    assert from_dict(ModelConfig, config.to_dict()["model"]) == config.model


def test_save_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    save_config(Config(), path)
    before = path.read_text()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_config(Config(run="other"), path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_loading_leaves_the_defaults_alone(tmp_path: Path) -> None:
    before = yaml.safe_dump(Config().to_dict())
    load(tmp_path, "{}", "model.mixer.expand_k=0.25", "model.symbols.M.mixer.type=mamba2", "model.moe.num_experts=3")
    assert yaml.safe_dump(Config().to_dict()) == before
