"""Errors for sizes that a mixer cannot have: one line with the option, the constraint and values that work."""

from __future__ import annotations

import re
from typing import Any

import pytest

from linear_moe.modeling.mixers.registry import mixer_class, mixer_config
from linear_moe.options.errors import ConfigError
from tests.unit.modeling.mixers.common import case_ids, cases, dims


@pytest.mark.parametrize(
    ("name", "fields", "tensor", "field", "near"),
    [
        ("gla", {"num_heads": 3}, 1, "num_heads", [2, 4]),
        ("gla", {}, 8, "num_heads", [8]),
        ("gla", {"num_heads": 5, "expand_k": 0.75}, 2, "num_heads", [4, 8]),
        ("gla", {"expand_v": 0.3}, 1, "expand_v", [9 / 32, 10 / 32]),
        ("gated_deltanet", {"num_heads": 5}, 1, "num_heads", [4, 6]),
        ("gated_deltanet", {"num_heads": 6}, 4, "num_heads", [4, 8]),
        ("gated_deltanet", {"num_v_heads": 6}, 1, "num_v_heads", [4, 8]),
        ("gated_deltanet", {"head_dim": 300}, 1, "head_dim", [256]),
        ("gated_deltanet", {"head_dim": 3, "expand_v": 1.5}, 1, "expand_v", [4 / 3, 5 / 3]),
        ("deltanet", {"num_heads": 3}, 1, "num_heads", [2, 4]),
        ("deltanet", {"expand_k": 64.0, "num_heads": 4}, 4, "num_heads", [8]),
        ("kda", {"num_heads": 3}, 1, "num_heads", [2, 4]),
        ("kda", {"head_dim": 8, "num_heads": 3}, 2, "num_heads", [2, 4]),
        ("kda", {"num_v_heads": 6}, 1, "num_v_heads", [4, 8]),
        ("kda", {"head_dim": 300}, 1, "head_dim", [256]),
        ("rwkv7", {"num_heads": 3}, 1, "num_heads", [2, 4]),
        ("gated_deltaproduct", {"num_heads": 6}, 4, "num_heads", [4, 8]),
        ("gated_deltaproduct", {"head_dim": 300}, 1, "head_dim", [256]),
        ("mamba2", {"head_dim": 48}, 1, "head_dim", [32, 64]),
        ("mamba2", {"head_dim": 64}, 2, "head_dim", [32]),
        ("mamba2", {"head_dim": 8, "num_groups": 3}, 1, "num_groups", [2, 4]),
        ("mamba2", {"head_dim": 8}, 2, "num_groups", [2]),
        ("rwkv6", {"num_heads": 3}, 1, "num_heads", [2, 4]),
        ("rwkv6", {"expand_v": 0.3}, 1, "expand_v", [9 / 32, 10 / 32]),
        ("gsa", {"num_kv_heads": 3}, 1, "num_kv_heads", [2, 4]),
        ("gsa", {"num_kv_heads": 1}, 2, "num_kv_heads", [2]),
        ("gated_linear_fast_weight", {}, 8, "num_heads", [8]),
        ("attention", {"num_heads": 6}, 1, "num_heads", [4, 8]),
        ("attention", {"num_heads": 6, "head_dim": 8}, 4, "num_heads", [4, 8]),
        ("attention", {"num_kv_heads": 3}, 1, "num_kv_heads", [2, 4]),
        ("attention", {"num_kv_heads": 1}, 2, "num_kv_heads", [2]),
        ("attention", {"rotary_fraction": 0.3}, 1, "rotary_fraction", [0.25]),
        ("attention", {"head_dim": 96, "rotary_fraction": 0.34}, 1, "rotary_fraction", [1 / 3]),
        ("titans", {"num_heads": 6}, 4, "num_heads", [4, 8]),
        ("ttt_linear", {"num_heads": 20}, 1, "num_heads", [16]),
        ("mom", {"num_heads": 5}, 1, "num_heads", [4, 8]),
        ("mom", {"num_heads": 6, "head_dim": 4}, 4, "num_heads", [4, 8]),
        ("mom", {"num_memories": 3, "top_k": 4}, 1, "top_k", [3]),
        ("mom", {"head_dim": 257}, 1, "head_dim", [256]),
        ("mom", {"expand_v": 0.6}, 1, "expand_v", [0.5, 0.75]),
        ("mom", {"head_dim": 192, "expand_v": 0.3}, 1, "expand_v", [57 / 192, 58 / 192]),
        ("mla", {"num_heads": 6}, 4, "num_heads", [4, 8]),
        ("mla", {"qk_rope_head_dim": 7}, 1, "qk_rope_head_dim", [6, 8]),
        ("hgrn", {"expand": 3 / 32}, 2, "expand", [2 / 32, 4 / 32]),
        ("mamba", {"expand": 0.3}, 1, "expand", [9 / 32, 10 / 32]),
        ("s4", {"state_size": 7}, 1, "state_size", [6, 8]),
        ("gateloop", {"num_heads": 3}, 1, "num_heads", [2, 4]),
        ("rebased", {"feature_dim": 1}, 1, "feature_dim", [2]),
        ("rwkv6", {"expand_v": 0.5, "num_heads": 16}, 1, "num_heads", [8]),
        ("rwkv7", {"expand_v": 0.5, "num_heads": 16}, 1, "num_heads", [8]),
    ],
)
def test_names_field_and_working_values(
    name: str, fields: dict[str, Any], tensor: int, field: str, near: list[float]
) -> None:
    cls = mixer_class(name)
    with pytest.raises(ConfigError) as caught:
        cls.validate(mixer_config(name, **fields), dims(), tensor, "model.mixer")
    message = str(caught.value)
    assert message.startswith(f"model.mixer.{field} = ") and "\n" not in message
    offered = [float(n) for n in re.findall(r"[\d.]+", message.split("nearest")[1])]
    assert offered == pytest.approx(near, rel=1e-4)
    kind = float if isinstance(getattr(cls.Config(), field), float) else int
    for value in offered:  # an offered value passes the check that offered it, though another option may not fit it
        changed, refused = mixer_config(name, **fields | {field: kind(value)}), ""
        try:
            cls.validate(changed, dims(), tensor, "model.mixer")
        except ConfigError as error:
            refused = error.path
        assert refused != f"model.mixer.{field}"


@pytest.mark.parametrize(
    ("name", "fields", "field"),
    [
        ("attention", {"rope": False, "rope_base": 100.0}, "rope_base"),
        ("attention", {"rope": False, "rotary_fraction": 0.5}, "rotary_fraction"),
        ("hgrn", {"conv_bias": True}, "conv_bias"),
        ("hgrn2", {"conv_bias": True}, "conv_bias"),
        ("linear_attention", {"dpfp_nu": 2}, "dpfp_nu"),
        ("linear_attention", {"normalizer_eps": 1e-3}, "normalizer_eps"),
        ("linear_attention", {"tie_feature_map_qk": True}, "tie_feature_map_qk"),
        ("mom", {"gate_rank": 4}, "gate_rank"),
        ("mom", {"gate_normalizer": 4.0}, "gate_normalizer"),
        ("rebased", {"use_gamma": False, "use_beta": False, "tie_feature_map_qk": False}, "tie_feature_map_qk"),
        ("ttt_linear", {"share_qk": False, "conv_size": 3}, "conv_size"),
    ],
)
def test_refuses_what_would_do_nothing(name: str, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model.mixer.{field} = .*: does nothing here; set .* or leave it at"):
        mixer_class(name).validate(mixer_config(name, **fields), dims(), 1, "model.mixer")


def test_accepts_fractions_that_are_whole_but_for_rounding() -> None:
    assert 0.56 * 25 > 14
    fields = {"head_dim": 25, "rotary_fraction": 0.56}
    mixer_class("attention").validate(mixer_config("attention", **fields), dims(), 1, "model.mixer")


@pytest.mark.parametrize(("name", "fields"), cases(), ids=case_ids())
def test_accepts_what_the_other_tests_run(name: str, fields: dict[str, Any]) -> None:
    for tensor in (1, 2):
        mixer_class(name).validate(mixer_config(name, **fields), dims(), tensor, "model.mixer")
