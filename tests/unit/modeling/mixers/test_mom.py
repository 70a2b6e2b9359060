"""Mixture of memories against flash-linear-attention's layer and the paper's equations."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.host import Host
from linear_moe.modeling.tokens import TokenLayout
from tests.golden.golden import compare_golden
from tests.tolerances import BF16_ROUNDING, FP32, assert_close
from tests.unit.modeling.mixers.common import build, dims, packed, stream
from tests.unit.modeling.mixers.truth import compare, randomise

VARIANTS: list[dict[str, Any]] = [
    {},
    {"single_kv_proj": True, "num_memories": 3, "shared_memory": False, "head_dim": 6, "expand_v": 1.5},
    {"memory": "gla", "num_memories": 5, "top_k": 3, "conv_size": 3, "num_heads": 2, "balance_loss": 0.1},
    {"memory": "gla", "single_kv_proj": True, "gate_rank": 4, "gate_normalizer": 4.0},
]
HEADS = 2  # heads of the recorded layers


def names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Joins lists of projections, and shared ones, to our weights, with rows by head, then memory, then channel."""
    ours = {key: value.squeeze(1) if "conv1d" in key else value for key, value in theirs.items()}
    for name in "kvba":
        lists = [ours.pop(f"{name}_proj.{i}.weight") for i in range(4) if f"{name}_proj.{i}.weight" in ours]
        shared = [ours.pop(f"shared_{name}.weight")] if f"shared_{name}.weight" in ours else []
        joined = torch.stack([w.unflatten(0, (HEADS, -1)) for w in lists + shared], dim=1)
        ours[f"{name}_proj.weight"] = joined.flatten(0, 2)
    return ours


def decide_as_recorded(token: int, mixer: Any, layout: TokenLayout, tensors: dict[str, Tensor]) -> None:
    """Makes the router choose the recorded memories for one token.

    fla's router works in bf16, where the second and third memory of this token tie, and chose the third. The router's
    input of this token is moved by less than its rounding to bf16, so that our router chooses the third, too.
    """
    x, weight = tensors["x"].flatten(0, 1)[token], tensors["weight.gate.weight"]
    order = (weight @ x).argsort(descending=True)
    difference = weight[order[2]] - weight[order[1]]
    move = -1.01 * (difference @ x) * difference / difference.square().sum()
    assert move.norm() < BF16_ROUNDING * x.norm()
    moves = torch.zeros(layout.batch * layout.length, len(x)).index_copy(0, torch.tensor([token]), move[None])
    route = mixer.route
    mixer.route = lambda x, padding: route(x + moves, padding)


@pytest.mark.parametrize(
    ("recording", "fields", "tie"),
    [("mom", {"shared_memory": False}, 162), ("mom_shared", {"single_kv_proj": True}, 40)],
)
def test_mom_is_flas(recording: str, fields: dict[str, Any], tie: int) -> None:
    compare_golden(recording, "mom", {"head_dim": 64, **fields}, names, partial(decide_as_recorded, tie))


def test_mom_of_gla_is_the_papers_equations() -> None:
    """Sections 3.1 and 3.2 of arXiv 2502.13685 with GLA's update, one token and one memory at a time, in fp64."""
    ours = build("mom", {"memory": "gla", "num_heads": 2})
    randomise(ours)
    w = {name: value.double() for name, value in ours.state_dict().items()}
    k_weight, v_weight = (w[f"{n}_proj.weight"].view(2, 5, 8, 32) for n in "kv")  # heads, memories, channels

    def convolved(name: str, inputs: list[Tensor]) -> Tensor:
        """Convolution of the last of a memory's inputs with the three before it."""
        taps = w[f"{name}_conv1d.weight"].flip(1).T
        return F.silu(sum((tap * x for tap, x in zip(taps, reversed(inputs), strict=False)), torch.zeros(16)))

    def one_token(token: Tensor, states: Tensor, seen: list[dict[str, list[Tensor]]]) -> Tensor:
        scores = torch.softmax(w["gate.weight"] @ token, 0)
        top = scores.topk(2)
        chosen = {int(m): p / top.values.sum() for m, p in zip(top.indices, top.values, strict=True)} | {4: 1.0}
        o = torch.zeros(2, 8, dtype=torch.float64)
        for m, weight in chosen.items():
            seen[m]["q"].append(w["q_proj.weight"] @ token)
            seen[m]["k"].append((k_weight[:, m] @ token).flatten())
            seen[m]["v"].append((v_weight[:, m] @ token).flatten())
            q, k, v = (convolved(n, seen[m][n]).view(2, 8) for n in "qkv")
            low = w["gk_down.weight"].view(5, 16, 32)[m] @ token
            alpha = torch.sigmoid(w["gk_up"][:, m] @ low + w["gk_bias"][:, m]) ** (1 / 16)
            states[m] = alpha[..., None] * states[m] + k[..., None] * v[:, None]
            o = o + weight * torch.einsum("hk,hkv->hv", q, states[m]) / 8**0.5
        o = o / (o.square().mean(-1, keepdim=True) + dims().norm_eps).sqrt() * w["o_norm.weight"]
        return w["o_proj.weight"] @ (o.flatten() * F.silu(w["g_proj.weight"] @ token))

    def theirs(x: Tensor) -> Tensor:
        rows = []
        for sequence in x.double():
            states = list(torch.zeros(5, 2, 8, 8, dtype=torch.float64))
            seen: list[dict[str, list[Tensor]]] = [{"q": [], "k": [], "v": []} for _ in range(5)]
            rows.append(torch.stack([one_token(token, states, seen) for token in sequence]))
        return torch.stack(rows)

    compare(ours, theirs)


class Attach(torch.autograd.Function):
    """Attaches a loss to its carrier: the backward pass gives the loss a gradient of 1."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor) -> Tensor:
        return carrier.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return gradient, torch.ones(())


class Training(Host):
    """Host that attaches auxiliary losses and keeps their values."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: dict[str, Tensor] = {}

    def auxiliary_loss(self, carrier: Tensor, name: str, value: Tensor, coefficient: float, tokens: int) -> Tensor:
        assert name not in self.losses
        self.losses[name] = value
        return Attach.apply(carrier, coefficient * tokens * value)


def test_balance_loss_is_switch_transformers() -> None:
    """The loss is M sum_m f_m P_m, with a memory's share f_m of all choices and its mean score P_m over all tokens."""
    host = Training()
    ours, x = build("mom", {"balance_loss": 0.3}, host), stream(2, 9)
    y, gate = ours(x, TokenLayout(2, 9)), ours.get_parameter("gate.weight")
    weight = gate.detach().clone().requires_grad_()
    scores = (x @ weight.T).softmax(-1)
    shares = torch.bincount(scores.topk(2).indices.flatten(), minlength=4) / 18
    expected = 4 * (shares * scores.mean(0)).sum()
    assert_close(host.losses.pop("memory_balance_loss"), expected, FP32)
    (actual,) = torch.autograd.grad((0 * y).sum(), [gate])
    assert_close(actual, torch.autograd.grad(0.3 * 18 * expected, [weight])[0], FP32)
    with torch.no_grad():
        ours(x, TokenLayout(2, 9))
    build("mom", {"balance_loss": 0.0}, host)(x, TokenLayout(2, 9))
    assert not host.losses


@pytest.mark.parametrize("fields", VARIANTS)
@torch.no_grad()
def test_other_tokens_leave_a_memory_unchanged(fields: dict[str, Any]) -> None:
    """Tokens of other memories do not change a bit of a memory, nor of its convolutions' inputs."""
    ours: Any = build("mom", fields)
    cache = ours.init_cache(3, 16, torch.float32, torch.device("cpu"))
    for t in range(6):
        x, before = stream(3, 1, seed=t), {name: state.clone() for name, state in cache.items()}
        ours(x, TokenLayout(3, 1, positions=torch.full((3, 1), t)), cache)
        _, chosen = ours.route(x)
        for name, state in cache.items():
            old, new = (
                s.view(3, ours.heads, ours.memories, -1).transpose(1, 2).flatten(2) for s in (before[name], state)
            )
            assert torch.equal((old != new).any(-1), chosen), name


def test_no_token_depends_on_later_ones_of_its_row() -> None:
    """A memory has no capacity that later tokens could use up: a row's beginning is the same whatever follows."""
    ours, x = build("mom", {}), stream(1, 64)
    full = ours(x, TokenLayout(1, 64))
    changed = ours(torch.cat([x[:40], -3.0 * x[40:]]), TokenLayout(1, 64))
    assert_close(changed[:40], full[:40], FP32)
    assert_close(ours(x, packed([40, 24]))[:40], full[:40], FP32)
