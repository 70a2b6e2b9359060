"""Hugging Face configuration; `config.json` holds the `model` section of a training config unchanged."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from linear_moe import __version__
from linear_moe.modeling.config import ModelConfig
from linear_moe.options.load import from_dict

REMOTE_MODULE = "modeling_linear_moe"
"""Module in an exported folder from which `trust_remote_code=True` loads the classes."""


class LinearMoEConfig(PretrainedConfig):
    """Configuration of `LinearMoEForCausalLM`.

    Args:
        model: the resolved `model` section of a training config, as a plain dict.
        vocab_size: rows of the embedding, padding included.
        tokenizer_size: number of token ids; rows of the embedding from this id on are padding and never generated.
        bos_token_id, eos_token_id, pad_token_id: the tokenizer's special tokens; None where it has none.
    """

    model_type = "linear_moe"

    model: dict | None = None
    vocab_size: int = 0
    tokenizer_size: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    linear_moe_version: str = __version__

    def __post_init__(self, **kwargs: Any) -> None:
        self.auto_map = {
            "AutoConfig": f"{REMOTE_MODULE}.LinearMoEConfig",
            "AutoModelForCausalLM": f"{REMOTE_MODULE}.LinearMoEForCausalLM",
        }
        kwargs.pop("auto_map", None)
        if self.model is not None:
            self.tie_word_embeddings = bool(self.model["tie_embeddings"])
        super().__post_init__(**kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoConfig") -> None:
        """Does nothing: the model's `save_pretrained` writes REMOTE_MODULE instead of a copy of our sources."""

    def model_config(self) -> ModelConfig:
        """Returns the model section as its dataclass; raises ConfigError for options unknown to this version."""
        if self.model is None:
            raise ValueError("LinearMoEConfig.model is not set")
        return from_dict(ModelConfig, self.model)

    @property
    def hidden_size(self) -> int:
        return self.model_config().hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.model_config().num_layers

    @property
    def num_attention_heads(self) -> int:
        return self.model_config().num_heads
