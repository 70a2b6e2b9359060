"""Options of the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from linear_moe.modeling.mixers.base import MixerConfig
from linear_moe.modeling.mixers.registry import MIXERS, mixer_config
from linear_moe.modeling.moe.config import MoEConfig
from linear_moe.options.fields import Variants, opt

MIXER = Variants("mixer", MIXERS, mixer_config)


@dataclass
class LayerConfig:
    """Mixer and channel mixer that one symbol of the layer pattern stands for."""

    mixer: MixerConfig | None = opt(
        None, "token mixer; null: model.mixer (model.attention for the symbol N)", variants=MIXER
    )
    ffn: str | None = opt(None, "channel mixer; null: model.ffn", choices=(None, "moe", "dense"))


@dataclass
class ModelConfig:
    hidden_size: int = opt(256, "width of the residual stream", ge=1, le=2**20)
    num_layers: int = opt(4, "number of layers", ge=1, le=2**12)
    num_heads: int = opt(4, "heads of every mixer that does not set its own num_heads", ge=1, le=2**16)
    pattern: str = opt("L * 4", 'one symbol per layer; letters, "* n", "+" and brackets: LLLN * 3')
    mixer: MixerConfig = opt(partial(mixer_config, "gla"), "the mixer of symbol L, named by `type`", variants=MIXER)
    attention: MixerConfig = opt(partial(mixer_config, "attention"), "the mixer of symbol N", variants=MIXER)
    symbols: dict[str, LayerConfig] = opt(
        dict, "more symbols, or other meanings of L and N: {M: {mixer: {type: mamba2}}}"
    )
    ffn: str = opt("moe", "channel mixer of every layer whose symbol sets none", choices=("moe", "dense"))
    ffn_size: int = opt(1024, "hidden size of a dense SwiGLU", ge=1, le=2**20)
    moe: MoEConfig = opt(MoEConfig, "mixture of experts")
    vocab_size: int | None = opt(
        None,
        "rows of the embedding; null: the tokenizer's size, rounded up to a multiple of vocab_multiple",
        ge=1,
        le=2**31,
    )
    vocab_multiple: int = opt(128, "see vocab_size", ge=1, le=2**20)
    tie_embeddings: bool = opt(False, "one matrix for embedding and head")
    norm_eps: float = opt(1e-5, "RMSNorm epsilon", gt=0)
    init_std: float = opt(0.02, "standard deviation of the initial weights", gt=0)
    scale_output_init: bool = opt(True, "divide the init of residual output projections by sqrt(2 * num_layers)")
