"""Memory that a mixer keeps for its backward pass, measured on the meta device with stand-ins for kernels.

No mixer declares this: the tensors that autograd and the kernels' stand-ins (`modeling/ops/kernels.py`) keep have the
sizes that they have on a GPU.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from linear_moe.modeling.activations import Activations
from linear_moe.modeling.mixers.base import Mixer
from linear_moe.modeling.ops.kernels import stand_ins
from linear_moe.modeling.tokens import TokenLayout

TOKENS = 128  # a whole number of any recurrence's chunks

_known: dict[tuple[Any, ...], SavedBytes] = {}


@dataclass(frozen=True)
class SavedBytes:
    """Bytes that a forward pass keeps for the backward pass.

    Attributes:
        by_token: bytes for each token.
        fixed: bytes that do not depend on the number of tokens, of tensors that are computed from parameters.
    """

    by_token: float
    fixed: float

    def of(self, tokens: int) -> float:
        """Bytes for a micro-batch of so many tokens."""
        return self.fixed + self.by_token * tokens


def mixer_saved(mixer: Mixer, recompute: Collection[str] = ()) -> SavedBytes:
    """Measures what a mixer on the meta device keeps besides its input and its parameters; mixers alike only once.

    Args:
        recompute: modules that are computed again in the backward pass, as `Activations` names them.
    """
    modules = tuple(sorted(recompute))
    parameters = ((p.shape, p.dtype, p.requires_grad) for p in mixer.parameters())
    dims = replace(mixer.dims, layer=min(mixer.dims.layer, 1))  # layers differ in whether they are the first
    key = type(mixer), repr(mixer.config), dims, mixer.host.dtype, modules, *parameters
    if key not in _known:
        once, twice = (_saved(mixer, n * TOKENS, modules) for n in (1, 2))
        _known[key] = SavedBytes((twice - once) / TOKENS, 2 * once - twice)
    return _known[key]


def _saved(mixer: Mixer, tokens: int, modules: Collection[str]) -> int:
    """Bytes of the storages that a forward pass of one row of `tokens` tokens keeps."""
    host, empty = mixer.host, partial(torch.empty, tokens, device="meta", dtype=mixer.host.dtype, requires_grad=True)
    x = empty(mixer.dims.hidden_size)
    crossing = mixer.crossing(mixer.config, mixer.dims) if mixer.dims.layer > 0 else {}
    shared = {name: empty(host.split(n)) for name, n in crossing.items()}
    outside = {_address(t) for t in (x, *shared.values(), *mixer.parameters())}
    kept: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        if _address(t) not in outside:
            kept[_address(t)] = t.untyped_storage()
        return t

    before, host.activations = host.activations, Activations(modules)
    try:
        with torch.enable_grad(), stand_ins(), saved_tensors_hooks(pack, lambda t: t):
            host.activations.layer(0, mixer, x, TokenLayout(1, tokens, shared=shared))
    finally:
        host.activations = before
    return sum(storage.nbytes() for storage in kept.values())


def _address(t: Tensor) -> int:
    return t.untyped_storage()._cdata
