"""Input checks and choice of implementation, the same for every family of recurrences."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from linear_moe.modeling.ops import tuned
from linear_moe.modeling.ops.kernels import stand_in, stood_in

BACKENDS = ("auto", "reference", "chunk", "gpu")

Result = TypeVar("Result")

_auto: ContextVar[str] = ContextVar("backend", default="auto")


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Makes ops that are called with backend "auto", as mixers call them, use `backend` within the context.

    The purpose is to compare implementations.

    Raises:
        ValueError: `backend` is not one of BACKENDS.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    token = _auto.set(backend)
    try:
        yield
    finally:
        _auto.reset(token)


def requested(backend: str) -> str:
    """Returns `backend`, or for "auto" the backend that `use_backend` has set. Every op begins with this call."""
    return _auto.get() if backend == "auto" else backend


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, tuple[Tensor | None, Sequence[tuple[int, ...]]]],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raises ValueError for shapes and dtypes that no implementation takes.

    Args:
        gates: for each gate's name, its tensor (or None) and the shapes that the tensor may have.
    """
    if q.ndim != 4 or q.shape != k.shape:
        raise ValueError(f"q and k must both be [B, T, H, K], got {tuple(q.shape)} and {tuple(k.shape)}")
    batch, length, heads, key_dim = q.shape
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] with [B, T, H] = {(batch, length, heads)}, got {tuple(v.shape)}")
    if length == 0:
        raise ValueError("T must be at least 1")
    for name, (gate, shapes) in gates.items():
        if gate is not None and tuple(gate.shape) not in shapes:
            raise ValueError(f"{name} must be {' or '.join(map(str, shapes))}, got {tuple(gate.shape)}")
    for name, x in {"q": q, "k": k, "v": v, **{name: gate for name, (gate, _) in gates.items()}}.items():
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    sequences = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, length)
        sequences = len(cu_seqlens) - 1
    shape = (sequences, heads, key_dim, v.shape[-1])
    if initial_state is not None and (tuple(initial_state.shape) != shape or initial_state.dtype != torch.float32):
        raise ValueError(
            f"initial_state must be float32 {shape}, got {initial_state.dtype} {tuple(initial_state.shape)}"
        )


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, length: int) -> None:
    """Raises ValueError unless `cu_seqlens` holds offsets of packed documents.

    The values are read only if the tensor is on the CPU: reading them from a GPU would wait for the device.
    """
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype != torch.int64:
        raise ValueError(f"cu_seqlens must be int64 [documents + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if batch != 1:
        raise ValueError(f"packed documents (cu_seqlens) need B = 1, got B = {batch}")
    if cu_seqlens.device.type != "cpu":
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != length or sorted(offsets) != offsets:
        raise ValueError(f"cu_seqlens must rise from 0 to T = {length}, got {offsets}")


def decodes(length: int, state: Tensor | None, cu_seqlens: Tensor | None) -> bool:
    """Whether a call with backend "auto" is one step of decoding, which updates the state in place."""
    return length == 1 and state is not None and cu_seqlens is None and not torch.is_grad_enabled()


def choose(
    backend: str,
    implementations: dict[str, Callable[..., Result]],
    v: Tensor,
    unsupported: str | None,
) -> Callable[..., Result]:
    """Returns the implementation that `backend` names.

    "auto" names the GPU kernels for 16-bit tensors on CUDA, if the kernels are installed and take the inputs; otherwise
    "chunk". The kernels multiply in bf16 or tf32, so tensors that were kept in fp32 go to "chunk", which multiplies in
    fp32. The implementation runs outside of `torch.autocast`, which would change the dtypes of its products.

    Args:
        implementations: functions by backend.
        v: an input whose dtype and device decide.
        unsupported: why the kernels cannot take these inputs; None: they can.

    Raises:
        ValueError: an unknown backend, or "gpu" for inputs that the kernels do not take.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        there = stood_in() or (v.is_cuda and has_fla())
        fits = there and v.element_size() == 2 and unsupported is None
        backend = "gpu" if fits else "chunk"
    if backend == "gpu":
        if not v.is_cuda and not stood_in():
            raise ValueError(f"backend 'gpu' needs CUDA tensors, got tensors on {v.device}")
        if unsupported is not None:
            raise ValueError(f"backend 'gpu': {unsupported}")
    chosen, device = implementations[backend], v.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # "meta" has none
    return _without_autocast(chosen, device) if autocast else chosen


def _without_autocast(function: Callable[..., Result], device: str) -> Callable[..., Result]:
    """Returns a function that calls `function` with `torch.autocast` disabled."""

    def run(*args: Any, **options: Any) -> Result:
        with torch.autocast(device, enabled=False):
            return function(*args, **options)

    return run


@cache
def has_fla() -> bool:
    """Whether flash-linear-attention and Triton are installed; a broken installation raises only when it is used."""
    return find_spec("fla") is not None and find_spec("triton") is not None


def import_fla(module: str) -> ModuleType:
    """Imports `fla.<module>`, which needs Triton and is therefore not imported with this package.

    Raises:
        ImportError: flash-linear-attention or Triton is not installed.
    """
    if not has_fla():
        raise ImportError("the GPU kernels need fla-core and triton: pip install 'linear-moe[gpu]'")
    tuned.install()
    return importlib.import_module(f"fla.{module}")


def run_fla(
    module: str, name: str, kept: Callable[..., Iterable[Tensor | None]], q: Tensor, **inputs: Any
) -> tuple[Tensor, Tensor]:
    """The output `[B, T, H, V]` and the final state `[N, H, K, V]` of the recurrence `fla.<module>.<name>`.

    Args:
        kept: `kept(q, **inputs)`, which tensors the kernel keeps of contiguous inputs for its backward pass; what a
            stand-in keeps.
        q: `[B, T, H, K]`.
        inputs: by the names of the kernel's arguments, `v [B, ..., H, V]` among them.
    """
    found: tuple[Tensor, Tensor]
    if not stood_in():
        found = getattr(import_fla(module), name)(q, **inputs)
        return found
    q, inputs = q.contiguous(), {key: x.contiguous() if isinstance(x, Tensor) else x for key, x in inputs.items()}
    v, offsets = inputs["v"], inputs["cu_seqlens"]
    o = v.new_zeros(*q.shape[:3], v.shape[-1])
    sequences = len(q) if offsets is None else len(offsets) - 1
    state = v.new_zeros(sequences, *q.shape[2:], v.shape[-1], dtype=torch.float32)
    found = stand_in((o, state), kept(q, **inputs), [q, *(x for x in inputs.values() if isinstance(x, Tensor))])
    return found


def tiled(key_dim: int) -> int:
    """Returns `key_dim` rounded up to a multiple of 64, the size that the kernels are given.

    For K below 64, the tuner of flash-linear-attention 0.6.0's `chunk_bwd_dqkwg` may choose configurations that, under
    Triton 3.7.1 on an H100, give wrong gradients (K = 32) or fault (K = 24). Channels of zeros change no result.
    """
    return -(-key_dim // 64) * 64


def pad_keys(x: Tensor, dim: int, size: int) -> Tensor:
    """Appends zeros to `x` along `dim`, up to `size`."""
    missing = size - x.shape[dim]
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_zeros(shape)], dim)
