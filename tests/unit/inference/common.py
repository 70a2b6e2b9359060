"""Tiny models of every mixer, and of a hybrid, for the inference tests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from linear_moe.config.load import save_config
from linear_moe.config.schema import Config
from linear_moe.inference.hf import LinearMoEConfig, LinearMoEForCausalLM
from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.mixers.registry import MIXERS
from linear_moe.options.load import from_dict
from tests.unit.modeling.mixers.common import variants

VOCAB, TOKENS = 320, 257  # rows of the embedding; ids of the tokenizer
MOE = {"num_experts": 4, "expert_ffn_size": 16, "shared_ffn_size": 16}


def mixer(name: str) -> dict[str, Any]:
    return {"type": name, **variants(name)[0]}


def sizes(**fields: Any) -> dict[str, Any]:
    # Large weights keep greedy choices far from ties, and gates and norms far from their linear ranges.
    return {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "init_std": 0.3, "ffn_size": 48, "moe": MOE, **fields}


CASES: dict[str, dict[str, Any]] = {name: sizes(pattern="LL", mixer=mixer(name)) for name in sorted(MIXERS)}
CASES["hybrid"] = sizes(
    pattern="LGMN",
    num_layers=4,
    mixer=mixer("gla"),
    attention={"type": "attention", "num_kv_heads": 2, "qk_norm": True, "output_gate": True},
    symbols={"G": {"mixer": mixer("gated_deltanet"), "ffn": "dense"}, "M": {"mixer": mixer("mamba2")}},
)
CASES["tied"] = sizes(pattern="LN", tie_embeddings=True)


def model_config(case: str) -> ModelConfig:
    return from_dict(ModelConfig, CASES[case])


def build(case: str, seed: int = 0) -> LinearMoEForCausalLM:
    """Builds an initialised model in fp32."""
    torch.manual_seed(seed)
    config = LinearMoEConfig(model=dataclasses.asdict(model_config(case)), vocab_size=VOCAB, tokenizer_size=TOKENS)
    return LinearMoEForCausalLM(config).eval()


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, TOKENS, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer of 256 bytes and an end-of-text token."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", clean_up_tokenization_spaces=False)


def write_run(run: Path, case: str = "hybrid", steps: tuple[int, ...] = (10, 20), dtype: str = "fp32") -> None:
    """Writes a run folder as training does: fp32 weights, seeded with the step, and the dtypes of the training."""
    config = Config(run=str(run), model=model_config(case))
    config.training.dtype = dtype
    run.mkdir(parents=True)
    save_config(config, run / "config.yaml")
    byte_tokenizer().save_pretrained(run / "tokenizer")
    records = [
        {"step": 10, "loss": 3.25},
        {"event": "validation", "step": 20, "loss": 2.5, "tokens": 99},
        {"step": 20, "loss": 2.75},
        {"step": 30, "loss": 1.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 4')
    for step in steps:
        folder = run / "checkpoints" / f"step_{step:08d}"
        parameters = dict(build(case, seed=step).model.named_parameters())
        weights = {f"model.{name}": p.detach() for name, p in parameters.items()}
        moments = {f"optimizer.exp_avg.{name}": torch.zeros_like(p) for name, p in parameters.items()}
        dcp.save({**weights, **moments}, checkpoint_id=folder, no_dist=True)
        kind = "bfloat16" if dtype == "bf16" else "float32"
        info = {
            "format": 1,
            "step": step,
            "dtypes": {name: "float32" if p.spec.fp32 else kind for name, p in parameters.items()},
            "files": {p.name: p.stat().st_size for p in folder.iterdir()},
        }
        (folder / "checkpoint.json").write_text(json.dumps(info))
        (run / "checkpoints" / "latest").write_text(folder.name)
