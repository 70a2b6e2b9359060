"""Output of the Hugging Face model, and the two names that transformers has had for a decoding state.

Until version 5.23 of transformers, `generate` passes the decoding state to `forward` as `past_key_values` and reads it
from the output's field `past_key_values`; from 5.24 on, argument and field are called `cache`. Only this module knows
the name in the installed version. Users may read either name as an attribute of the output; as a key
(`output["cache"]`) the decoding state has only the name of the installed version.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter

from transformers.modeling_outputs import CausalLMOutputWithPast

_FIELDS = [field.name for field in fields(CausalLMOutputWithPast)]
CACHE_NAME, _OTHER_NAME = ("cache", "past_key_values") if "cache" in _FIELDS else ("past_key_values", "cache")


@dataclass
class LinearMoEOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with one stored decoding state, which both `cache` and `past_key_values` read."""


# The class body cannot define this property, because which of the two names is already a field depends on transformers.
setattr(LinearMoEOutput, _OTHER_NAME, property(attrgetter(CACHE_NAME)))
