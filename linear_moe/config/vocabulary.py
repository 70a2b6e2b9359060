"""How many tokens the configured tokenizer knows, and how many rows the embedding gets; builds no tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from linear_moe.config.errors import ConfigError
from linear_moe.config.schema import Config, ModelConfig, TokenizerConfig


def tokenizer_size(config: TokenizerConfig) -> int:
    """Tokens of the tokenizer the config describes; raises ConfigError for a folder that holds none.

    A trained BPE may come out smaller than asked for, on a tiny corpus; never larger.
    """
    if config.type == "bytes":
        return 257  # one more for the end of a document
    if config.type == "bpe":
        return config.vocab_size
    path, fix = "data.tokenizer.path", "save one with save_pretrained of a fast tokenizer"
    if config.path is None:
        raise ConfigError(path, None, "an hf tokenizer needs its folder", fix=f"set {path}=FOLDER")
    if not Path(config.path).is_dir():
        raise ConfigError(path, config.path, "is not a folder", fix=fix)
    fast = Path(config.path) / "tokenizer.json"
    if not fast.is_file():
        raise ConfigError(path, config.path, "holds no tokenizer.json", fix=fix)
    try:
        content = json.loads(fast.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
        return max(ids + [token["id"] for token in content.get("added_tokens", [])]) + 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(str(fast), ..., f"is not a tokenizers file: {error!r}") from None


def embedding_rows(model: ModelConfig, tokens: int) -> int:
    """Rows of the embedding for a tokenizer of `tokens` tokens; ConfigError when model.vocab_size is too small."""
    if model.vocab_size is None:
        return -(-tokens // model.vocab_multiple) * model.vocab_multiple
    if model.vocab_size < tokens:
        constraint = f"smaller than the tokenizer's {tokens} tokens"
        raise ConfigError("model.vocab_size", model.vocab_size, constraint, fix=f"nearest valid: {tokens}, or null")
    return model.vocab_size


def vocab_size(config: Config) -> int:
    """Rows of the embedding, from the config alone."""
    if config.model.vocab_size is not None and config.data.tokenizer.type == "hf":
        return config.model.vocab_size  # so that a plan needs no tokenizer folder
    return embedding_rows(config.model, tokenizer_size(config.data.tokenizer))
