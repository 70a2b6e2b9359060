"""RWKV-6 against the paper's equations and flash-linear-attention's recordings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.golden import compare_golden
from tests.tolerances import FP32, assert_close
from tests.unit.modeling.mixers.common import build, dims
from tests.unit.modeling.mixers.truth import compare, randomise

# A large epsilon here, too (see `dims`): with 0.02 a document of one token, whose q diag(bonus) k is a sum that cancels
# to a 27th, makes all of the error of the bonus' gradient in bf16, 0.5 to 11 % of it by how q and k happen to round.
VARIANTS: list[dict[str, Any]] = [
    {"shift_rank": 4, "decay_rank": 8},
    {"num_heads": 2, "expand_k": 0.5, "expand_v": 2.0, "shift_rank": 2, "decay_rank": 4, "norm_eps": 0.2},
]


def test_rwkv6_is_the_papers_equations() -> None:
    """Equations 12 to 19 of arXiv 2404.05892, one token and one head at a time, in fp64."""
    ours = build("rwkv6", VARIANTS[0])
    randomise(ours)
    w = {name: value.double() for name, value in ours.state_dict().items()}

    def lora(i: int, x: Tensor) -> Tensor:
        return w["x_up"][:, 4 * i : 4 * i + 4] @ torch.tanh(w["x_down"][4 * i : 4 * i + 4] @ x) + w["x_bias"][i]

    def theirs(x: Tensor) -> Tensor:
        outputs = []
        for sequence in x.double():
            before, row = torch.zeros(32, dtype=torch.float64), []
            states = [torch.zeros(8, 8, dtype=torch.float64) for _ in range(4)]
            for token in sequence:
                mixed = token + (before - token) * w["x_mu"]
                x_r, x_w, x_k, x_v, x_g = (token + (before - token) * lora(i, mixed) for i in range(5))
                r, k, v, gate = (w[f"{n}_proj.weight"] @ y for n, y in {"r": x_r, "k": x_k, "v": x_v, "g": x_g}.items())
                d = w["w_proj.2.bias"] + w["w_proj.2.weight"] @ torch.tanh(w["w_proj.0.weight"] @ x_w)
                decay, heads = torch.exp(-torch.exp(d)), []
                for h in range(4):
                    one = slice(8 * h, 8 * h + 8)
                    update = torch.outer(k[one], v[one])
                    o = (states[h] + w["bonus"][h, :, None] * update).T @ r[one]
                    states[h] = decay[one, None] * states[h] + update
                    o = (o - o.mean()) / (o.var(correction=0) + dims().norm_eps).sqrt()
                    heads.append(o * w["g_norm.weight"][one] + w["g_norm.bias"][one])
                row.append(w["o_proj.weight"] @ (torch.cat(heads) * gate * torch.sigmoid(gate)))
                before = token
            outputs.append(torch.stack(row))
        return torch.stack(outputs)

    compare(ours, theirs)


def test_rwkv6_is_flash_linear_attentions() -> None:
    new = {
        "x_proj.0.mu": "x_mu",
        "x_proj.0.linear.weight": "x_down",
        "x_proj.2.weight": "x_up",
        ".linear.lora.": ".",
        ".linear.": ".",
    }

    def names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for key, value in tensors.items():
            for old, name in new.items():
                key = key.replace(old, name)
            renamed[key] = value
        return renamed

    compare_golden("rwkv6", "rwkv6", {}, names, dtype=torch.bfloat16)


def test_rwkv6_begins_as_rwkv_lm() -> None:
    """Initial values of the last of 2 layers are those of RWKV-LM: token shifts, decays, bonus and low-rank factors."""
    from dataclasses import replace

    last = build("rwkv6", VARIANTS[0], at=replace(dims(), layer=1))
    channels = torch.arange(32) / 32
    assert_close(last.get_parameter("x_bias")[0], 1 - channels**0.25, FP32)
    assert_close(last.get_parameter("x_bias")[3], 1 - channels**0.5 - 0.3, FP32)
    assert_close(last.get_parameter("w_proj.2.bias"), -6 + 5 * (torch.arange(32) / 31) ** 2, FP32)
    assert_close(last.get_parameter("bonus")[0, :3], 1 - torch.arange(3) / 31 + torch.tensor([0.0, 0.1, -0.1]), FP32)
    assert F.relu(last.get_parameter("x_up").abs() - 0.01).sum() == 0
