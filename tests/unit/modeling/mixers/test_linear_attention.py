"""Linear attention against the papers' formulas and flash-linear-attention's recordings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.modeling.layers.feature_maps import TRAINED
from linear_moe.options.errors import ConfigError
from tests.golden.golden import compare_golden
from tests.unit.modeling.mixers.common import build
from tests.unit.modeling.mixers.truth import compare, randomise

VARIANTS: list[dict[str, Any]] = [
    {},
    {"feature_map": "elu", "normalize": True, "output_norm": "none"},
    {"feature_map": "softmax", "num_kv_heads": 2, "expand_v": 2.0, "normalize": True, "normalizer_eps": 0.1},
    {"feature_map": "dpfp", "dpfp_nu": 2, "norm_q": True, "norm_k": True},
    {"feature_map": "hedgehog", "normalize": True, "output_norm": "none"},
    {"feature_map": "t2r", "expand_k": 2.0, "tie_feature_map_qk": True},
    {"feature_map": "elementwise_product", "num_heads": 2},
    {"feature_map": "relu"},
    {"feature_map": "swish"},
    {"feature_map": "identity"},
]


def dpfp(x: Tensor, nu: int) -> Tensor:
    """Equation 37 of arXiv 2102.11174, element by element."""
    r, n = torch.cat([x, -x]).relu(), 2 * len(x)
    return torch.stack([r[i] * r[i - j] for j in range(1, nu + 1) for i in range(n)])


def hedgehog(x: Tensor, w: dict[str, Tensor], which: str) -> Tensor:
    y = w[f"{which}.layer.weight"] @ x + w[f"{which}.layer.bias"]
    positive, negative = (2 * y).exp(), (-2 * y).exp()
    return torch.cat([positive, negative]) / (positive.sum() + negative.sum())


def product(x: Tensor, w: dict[str, Tensor], which: str) -> Tensor:
    a, b = (w[f"{which}.layer{i}.weight"] @ x + w[f"{which}.layer{i}.bias"] for i in (1, 2))
    return a * b


MAPS: dict[str, Any] = {
    "elu": lambda x, w, _: torch.where(x > 0, x + 1, x.exp()),
    "relu": lambda x, w, _: x.clamp_min(0),
    "swish": lambda x, w, _: x / (1 + (-x).exp()),
    "softmax": lambda x, w, _: x.exp() / x.exp().sum(),
    "dpfp": lambda x, w, _: dpfp(x, 2),
    "hedgehog": hedgehog,
    "t2r": lambda x, w, which: (w[f"{which}.layer.weight"] @ x).clamp_min(0),
    "elementwise_product": product,
    "identity": lambda x, w, _: x,
}


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for name in MAPS for option in (None, "normalize", "norm_q", "norm_k")]
    + [(name, "tie_feature_map_qk") for name in TRAINED],
)
def test_linear_attention_is_the_papers_equations(name: str, option: str | None) -> None:
    """Equations 18 to 20 of arXiv 2006.16236 for each map, one token and one head at a time, in fp64."""
    fields: dict[str, Any] = {"feature_map": name, "output_norm": "none", "num_kv_heads": 2}
    fields |= {"dpfp_nu": 2} if name == "dpfp" else {}
    fields |= {option: True} if option else {}
    tied = option == "tie_feature_map_qk"
    if option and not tied and name in ("swish", "elementwise_product", "identity"):
        with pytest.raises(ConfigError, match="may be negative"):
            build("linear_attention", fields)
        return
    ours = build("linear_attention", fields)
    randomise(ours)
    w = {key: value.double() for key, value in ours.state_dict().items()}

    def theirs(x: Tensor) -> Tensor:
        outputs = []
        for sequence in x.double():
            s, z, row = [0.0] * 4, [0.0] * 4, []
            for token in sequence:
                q, k, v = (w[f"{n}_proj.weight"] @ token for n in "qkv")
                heads = []
                for h in range(4):
                    key, value = (t[8 * (h // 2) : 8 * (h // 2) + 8] for t in (k, v))
                    phi_q = MAPS[name](q[8 * h : 8 * h + 8], w, "feature_map_q")
                    phi_k = MAPS[name](key, w, "feature_map_q" if tied else "feature_map_k")
                    phi_q = phi_q / (phi_q.sum() + 1e-4) if option == "norm_q" else phi_q
                    phi_k = phi_k / (phi_k.sum() + 1e-4) if option == "norm_k" else phi_k
                    s[h], z[h] = s[h] + torch.outer(phi_k, value), z[h] + phi_k
                    o = phi_q @ s[h]
                    heads.append(o / (phi_q @ z[h] + 1e-10) if option == "normalize" else o / len(phi_q) ** 0.5)
                row.append(w["o_proj.weight"] @ torch.cat(heads))
            outputs.append(torch.stack(row))
        return torch.stack(outputs)

    compare(ours, theirs)


def test_hedgehog_begins_as_the_identity() -> None:
    for which in "qk":
        layer: Any = build("linear_attention", {"feature_map": "hedgehog"}).get_submodule(f"feature_map_{which}.layer")
        assert torch.equal(layer.weight, torch.eye(8)) and not layer.bias.any()


def test_linear_attention_is_flash_linear_attentions() -> None:
    compare_golden("linear_attention", "linear_attention", {"feature_map": "elu", "normalize": True}, dict)
    compare_golden("linear_attention_hedgehog", "linear_attention", {"feature_map": "hedgehog"}, dict)
