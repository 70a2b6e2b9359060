"""Mixers against what flash-linear-attention's layers computed on a GPU, recorded by scripts/golden/record.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host
from linear_moe.modeling.mixers.registry import mixer_class, mixer_config
from linear_moe.modeling.tokens import TokenLayout
from tests.tolerances import BF16, BF16_GRADIENT_FLOOR, assert_close

FOLDER = Path(__file__).parent
Names = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def load(recording: str) -> dict[str, Tensor]:
    """The recorded tensors, in fp32."""
    return {key: value.float() for key, value in load_file(FOLDER / f"{recording}.safetensors").items()}


def compare_golden(
    recording: str,
    name: str,
    fields: dict[str, Any],
    names: Names,
    prepare: Callable[..., None] | None = None,
    gradient_tolerance: float = BF16,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Output and gradients of mixer `name` with the recorded layer's weights, to bf16's tolerance.

    Args:
        fields: of the mixer's config, at hidden size 128 and 2 heads.
        names: fla's tensors by fla's names -> ours by ours; only renames, cuts and reshapes, so that it maps gradients
            like weights. Tensors that the layer has and does not use may be left out.
        prepare: called with (mixer, layout, recorded tensors) before the forward pass, for what a layer is given
            besides `x`, `input.NAME`.
        gradient_tolerance: of the parameters' gradients.
        dtype: of the mixer; bf16 for a layer whose own roundings exceed the tolerance.
    """
    tensors = load(recording)
    batch, length, hidden = tensors["x"].shape
    layer = int(any(key.startswith("input.") for key in tensors))  # only later layers are given more than x
    at = Dims(hidden, 2, num_layers=2, layer=layer, norm_eps=1e-5, init_std=0.02, output_init_std=0.02)
    cls, config = mixer_class(name), mixer_config(name, **fields)
    cls.validate(config, at, 1, "model.mixer")
    mixer = cls(config, at, Host(dtype))

    def by_prefix(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    mixer.load_state_dict(names(by_prefix("weight.")), strict=True)
    layout = TokenLayout(batch, length)
    if prepare is not None:
        prepare(mixer, layout, tensors)
    x = tensors["x"].flatten(0, 1).to(dtype).requires_grad_()
    y = mixer(x, layout)
    assert_close(y.view_as(tensors["y"]), tensors["y"], BF16, "output")
    parameters = dict(mixer.named_parameters())
    loss = (y * tensors["cotangent"].flatten(0, 1)).sum()
    dx, *gradients = torch.autograd.grad(loss, [x, *parameters.values()])
    assert_close(dx.view_as(tensors["x"]), tensors["grad.x"], BF16, "input gradient")
    expected = names(by_prefix("grad."))
    floor = BF16_GRADIENT_FLOOR * max(float(g.norm()) for g in expected.values())
    errors = {
        key: float((g - expected[key]).norm()) / max(float(expected[key].norm()), floor)
        for key, g in zip(parameters, gradients, strict=True)
        if key in expected
    }
    assert errors and all(error <= gradient_tolerance for error in errors.values()), errors  # NaN is not
