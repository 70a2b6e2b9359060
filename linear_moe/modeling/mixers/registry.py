"""Registry of token mixers: a table of names and classes, which are imported when used.

A new mixer is one file and one line in this table, with a test file, and docs/mixers.md made anew
(docs/adding_a_mixer.md).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linear_moe.modeling.mixers.base import Mixer, MixerConfig

MIXERS: dict[str, str] = {
    "attention": "linear_moe.modeling.mixers.attention:Attention",
    "based": "linear_moe.modeling.mixers.based:Based",
    "deltanet": "linear_moe.modeling.mixers.deltanet:DeltaNet",
    "gated_deltanet": "linear_moe.modeling.mixers.gated_deltanet:GatedDeltaNet",
    "gated_deltaproduct": "linear_moe.modeling.mixers.gated_deltaproduct:GatedDeltaProduct",
    "gated_linear_fast_weight": "linear_moe.modeling.mixers.gated_linear_fast_weight:GatedLinearFastWeight",
    "gateloop": "linear_moe.modeling.mixers.gateloop:GateLoop",
    "gla": "linear_moe.modeling.mixers.gla:GatedLinearAttention",
    "gsa": "linear_moe.modeling.mixers.gsa:GatedSlotAttention",
    "hgrn": "linear_moe.modeling.mixers.hgrn:HGRN",
    "hgrn2": "linear_moe.modeling.mixers.hgrn2:HGRN2",
    "kda": "linear_moe.modeling.mixers.kda:KimiDeltaAttention",
    "lightning": "linear_moe.modeling.mixers.lightning:LightningAttention",
    "linear_attention": "linear_moe.modeling.mixers.linear_attention:LinearAttention",
    "mamba": "linear_moe.modeling.mixers.mamba:Mamba",
    "mamba2": "linear_moe.modeling.mixers.mamba2:Mamba2",
    "mla": "linear_moe.modeling.mixers.mla:MultiHeadLatentAttention",
    "mom": "linear_moe.modeling.mixers.mom:MixtureOfMemories",
    "rebased": "linear_moe.modeling.mixers.rebased:ReBased",
    "retention": "linear_moe.modeling.mixers.retention:Retention",
    "rwkv6": "linear_moe.modeling.mixers.rwkv6:RWKV6",
    "rwkv7": "linear_moe.modeling.mixers.rwkv7:RWKV7",
    "s4": "linear_moe.modeling.mixers.s4:S4",
    "titans": "linear_moe.modeling.mixers.titans:Titans",
    "ttt_linear": "linear_moe.modeling.mixers.ttt_linear:TTTLinear",
}


def mixer_class(name: str) -> type[Mixer]:
    """Imports the mixer class called `name`; raises KeyError for an unknown name."""
    module, _, cls = MIXERS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def mixer_config(name: str, **fields: Any) -> MixerConfig:
    """Makes the config of mixer `name` with its defaults, changed by `fields`."""
    return mixer_class(name).Config(type=name, **fields)
