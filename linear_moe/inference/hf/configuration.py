"""The Hugging Face configuration: our own model section, unchanged, in `config.json`."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from linear_moe import __version__
from linear_moe.modeling.config import ModelConfig
from linear_moe.options.load import from_dict

REMOTE_MODULE = "modeling_linear_moe"
"""Module in an exported folder that brings the classes in for `trust_remote_code=True`."""


class LinearMoEConfig(PretrainedConfig):
    """Configuration of `LinearMoEForCausalLM`.

    Args:
        model: the resolved `model` section of a training config, as a plain dict.
        vocab_size: rows of the embedding, padding included.
        tokenizer_size: ids the tokenizer knows; rows from there on are padding and never generated.
        bos_token_id, eos_token_id, pad_token_id: of the tokenizer, where it has them.
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
        """Nothing to do: the model's `save_pretrained` writes what remote loading needs, and no copy of our sources."""

    def model_config(self) -> ModelConfig:
        """The model section as its dataclass; raises ConfigError for what this version does not know."""
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
