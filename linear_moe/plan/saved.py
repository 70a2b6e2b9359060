"""What a mixer keeps for its backward pass, measured by running it on the meta device with stand-ins for kernels.

No mixer declares this: the tensors that autograd and the kernels' stand-ins (`modeling/ops/stand_ins.py`) keep have the
sizes that they have on a GPU.
"""

from __future__ import annotations

from contextlib import contextmanager
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from linear_moe.modeling.activations import Activations
from linear_moe.modeling.mixers.base import Mixer
from linear_moe.modeling.ops.stand_ins import stand_ins
from linear_moe.modeling.tokens import TokenLayout

TOKENS = 128  # a whole number of any recurrence's chunks

_known: dict[tuple[Any, ...], float] = {}


def mixer_saved(mixer: Mixer, *, core: bool = False) -> float:
    """Bytes per token that a mixer on the meta device keeps besides its input and its parameters.

    Measured once for mixers alike.

    Args:
        core: only those that it does not keep if its recurrence is computed again, from the recurrence's inputs.
    """
    dims, dtype = mixer.dims, mixer.host.dtype
    key = type(mixer), repr(mixer.config), dtype, core, *((p.shape, p.dtype) for p in mixer.parameters())
    if key not in _known:
        _known[key] = _by_token(mixer, ()) - (_by_token(mixer, ("core",)) if core else 0.0)
        if core:
            pass
    return _known[key]


def _by_token(mixer: Mixer, modules: tuple[str, ...]) -> float:
    """Bytes per token, without what does not depend on the number of tokens."""
    return (_saved(mixer, 2 * TOKENS, modules) - _saved(mixer, TOKENS, modules)) / TOKENS


def _saved(mixer: Mixer, tokens: int, modules: tuple[str, ...]) -> int:
    """Bytes of the storages that a forward pass of one row of `tokens` tokens keeps."""
    empty = {"dtype": mixer.host.dtype, "device": "meta"}
    x = torch.empty(tokens, mixer.dims.hidden_size, **empty).requires_grad_()
    share = mixer.host.size("tensor")
    crossing = mixer.crossing(mixer.config, mixer.dims) if mixer.dims.layer > 0 else {}
    shared = {name: torch.empty(tokens, n // share, **empty).requires_grad_() for name, n in crossing.items()}
    outside = {_address(t) for t in (x, *shared.values(), *mixer.parameters())}
    found: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        if _address(t) not in outside:
            found[_address(t)] = t.untyped_storage()
        return t

    host = mixer.host
    before, host.activations = host.activations, Activations(modules)
    try:
        with torch.enable_grad(), stand_ins(), saved_tensors_hooks(pack, lambda t: t):
            host.activations.layer(0, mixer, x, TokenLayout(1, tokens, shared=shared))
    finally:
        host.activations = before
    return sum(storage.nbytes() for storage in found.values())


def _address(t: Tensor) -> int:
    return t.untyped_storage()._cdata
