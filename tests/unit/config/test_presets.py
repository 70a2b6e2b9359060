"""Base models in configs/models: their published sizes, and any mixer in any pattern by one override."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from linear_moe.checks.validate import validate
from linear_moe.cli import main
from linear_moe.config.load import load_config
from linear_moe.layout.processes import smallest_world
from linear_moe.modeling.mixers.registry import MIXERS
from linear_moe.modeling.pattern import resolve_layers

MODELS = Path(__file__).parents[3] / "configs" / "models"
PRESETS = sorted(path.stem for path in MODELS.glob("*.yaml"))

QWEN = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
QWEN |= {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 2560, "vocab_size": 151936}
LITE = {"hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16}
LITE |= {"intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2}
LITE |= {"q_lora_rank": None, "num_experts_per_tok": 6, "vocab_size": 102400}
V2 = LITE | {"hidden_size": 5120, "num_hidden_layers": 60, "num_attention_heads": 128, "num_key_value_heads": 128}
V2 |= {"intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160, "q_lora_rank": 1536}
LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
SMALL_LLAMA = LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}

# Preset -> published total and active (None: dense) parameters, transformers' model and its configuration.
PUBLISHED: dict[str, tuple[float, float | None, str, dict[str, Any]]] = {
    "mixtral_8x7b": (46.7e9, 12.9e9, "mixtral:Mixtral", {"num_key_value_heads": 8}),
    "qwen2_57b_a14b": (57.4e9, 14.2e9, "qwen2_moe:Qwen2Moe", QWEN | {"shared_expert_intermediate_size": 20480}),
    "deepseek_v2_lite": (15.7e9, 2.4e9, "deepseek_v2:DeepseekV2", LITE | {"first_k_dense_replace": 1}),
    "deepseek_v2": (236e9, 21e9, "deepseek_v2:DeepseekV2", V2 | {"first_k_dense_replace": 1}),
    "llama3_8b": (8.03e9, None, "llama:Llama", LLAMA),
    "llama3_1b": (1.24e9, None, "llama:Llama", SMALL_LLAMA | {"tie_word_embeddings": True}),
}


def plan(preset: str, capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, Any]:
    assert main(["plan", str(MODELS / f"{preset}.yaml"), "--json", *overrides]) == 0
    return json.loads(capsys.readouterr().out)


def hugging_face_parameters(model: str, config: dict[str, Any]) -> int:
    module, _, name = model.partition(":")
    configuration = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    with torch.device("meta"):
        theirs = getattr(modeling, f"{name}ForCausalLM")(getattr(configuration, f"{name}Config")(**config))
    return sum(p.numel() for p in theirs.parameters())


def test_published_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    """Presets have the published sizes within 1 %, and exactly the parameters of transformers' model of that name.

    DeepSeek counts the head among the active parameters but not the embedding, and prints 2.4 B for 2.45 B.
    """
    for preset, (total, active, model, config) in PUBLISHED.items():
        ours = plan(preset, capsys)
        assert ours["total_params"] == pytest.approx(total, rel=0.01), preset
        assert ours["total_params"] == hugging_face_parameters(model, config), preset
        if active is None:
            assert ours["active_params"] == ours["total_params"]
            continue
        lookup = (ours["active_params"] - ours["active_params_without_embeddings"]) // 2
        counted = ours["active_params"] - (lookup if model.startswith("deepseek") else 0)
        assert counted == pytest.approx(active, rel=0.022 if preset == "deepseek_v2_lite" else 0.01), preset


@pytest.mark.parametrize("preset", [*PUBLISHED, "mixtral_small", "deepseek_small", "llama3_small"])
def test_any_pattern_and_mixer_by_one_override(preset: str) -> None:
    path = MODELS / f"{preset}.yaml"
    layers = load_config(path).model.num_layers
    hybrid = "+".join(["LLLN"] * (layers // 4) + (["L" * (layers % 4 - 1) + "N"] if layers % 4 else []))
    kinds = [layer.ffn for layer in resolve_layers(load_config(path).model)]
    for pattern in (f"N * {layers}", hybrid, f"L * {layers}"):
        for mixer in MIXERS if "L" in pattern else ["gla"]:
            overrides = [f"model.pattern={pattern}", f"model.mixer.type={mixer}", "parallel.pipeline=1"]
            config = load_config(path, overrides)
            validate(config, smallest_world(config.parallel), files=False)
            assert [layer.ffn for layer in resolve_layers(config.model)] == kinds  # whatever mixes the tokens


SCRIPTS = sorted((MODELS.parents[1] / "examples").glob("pretrain_*.sh"))


def test_every_family_has_a_launch_script() -> None:
    scripts = " ".join(path.read_text() for path in SCRIPTS)
    for preset in (*PUBLISHED, "a0.3b_2b", "a1b_7b"):
        assert preset in scripts, preset


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_launch_scripts_start_a_valid_configuration(script: Path, tmp_path: Path) -> None:
    """Launch scripts run with a stand-in for the launcher, which records its arguments; they pass the validation."""
    checkout = tmp_path / "checkout"
    (checkout / "scripts").mkdir(parents=True)
    (checkout / "examples").mkdir()
    (checkout / "scripts" / "launch.sh").write_text('printf "%s\\n" "$@" > called\n')
    copy = checkout / "examples" / script.name
    copy.write_text(script.read_text())
    subprocess.run(["bash", str(copy), "data.tokenizer.path=/nowhere"], check=True)
    config, *overrides = (checkout / "called").read_text().splitlines()
    assert overrides[-1] == "data.tokenizer.path=/nowhere"
    tree = load_config(MODELS.parents[1] / config, overrides)
    validate(tree, smallest_world(tree.parallel), files=False)
