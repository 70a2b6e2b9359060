"""The output of the Hugging Face model, and the two names transformers has had for a decoding state.

Until 5.23 `generate` hands it to `forward` as `past_key_values` and finds it in the output's field of that name; from
5.24 on both are called `cache`. Only this module knows which one the installed version uses. Users may read either name
as an attribute of the output; as a key (`output["cache"]`) it has the installed version's name.
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


# not in the class body: which of the names is a field, and must not become a property, is known only here
setattr(LinearMoEOutput, _OTHER_NAME, property(attrgetter(CACHE_NAME)))
