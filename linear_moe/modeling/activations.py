"""Activation recomputation: choice of the tensors that a forward pass keeps, or computes again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")

MODULES = {
    "norm": "the outputs of a layer's two norms, gathered over the tensor ranks",
    "mixer": "the whole mixer",
    "core": "the recurrence, or softmax attention, from its inputs",
    "ffn": "the whole channel mixer, with router and exchange of tokens",
    "experts": "the routed experts' gate and up projections",
    "activation": "the activation of a dense or shared SwiGLU, from its gate and up projections",
    "logits": "the logits, which are then computed in blocks of the vocabulary",
}
"""Modules that can be recomputed by themselves, with documentation; the name "layer" stands for whole layers."""


class Activations:
    """Recomputation of a model's activations, one object per host.

    The model runs every layer through `layer`, and the parts of a layer through `region` or `transient` under their
    names in MODULES.

    Args:
        modules: names in MODULES to recompute, or "layer".
        layers: global indices of the layers that recompute; None: all. The logits belong to no layer.
    """

    def __init__(self, modules: Collection[str] = (), layers: Container[int] | None = None):
        assert {"layer", *MODULES}.issuperset(modules), modules
        self.modules, self.layers = frozenset(modules), layers
        self._active: frozenset[str] = frozenset()  # modules to recompute in the layer being computed
        self._transients: _Transients | None = None  # transients of the layer being computed
        self._region: _Region | None = None  # region being computed, for the first time or again

    @property
    def again(self) -> bool:
        """Whether activations are being recomputed, so that nothing must be counted or reported a second time."""
        return self._region is not None and self._region.replay is not None

    def layer(self, index: int, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Runs layer number `index` as `function(*args)`, recomputing `modules` in the backward pass."""
        concerned = self.layers is None or index in self.layers
        if not (self.modules and concerned and torch.is_grad_enabled()):
            return function(*args)
        self._active = self.modules
        try:
            if self._active.isdisjoint(("norm", "activation")):
                return self.region("layer", function, *args)
            self._transients = _Transients()
            with saved_tensors_hooks(self._transients.pack, _unpack):
                return self.region("layer", function, *args)
        finally:
            if self._transients is not None:
                self._transients.clear()
            self._active, self._transients = frozenset(), None

    def keeps(self, module: str) -> bool:
        """Whether the output of `module` is kept for the backward pass; if not, the op must recompute it by itself."""
        return module not in self._active

    def region(self, module: str, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Returns `function(*args)`; if `module` is recomputed, autograd keeps only the tensors among `args`."""
        if self.keeps(module) or not torch.is_grad_enabled():
            return function(*args)
        region = _Region(self)
        contexts = lambda: (region.running(False), region.running(True))  # noqa: E731
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def transient(self, module: str, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Returns `function(*args)`; if `module` is recomputed, later ops do not keep this output for their gradients.

        They keep `function` and `args` instead, and call the function again without gradients. The function must be
        cheap and deterministic, and for its own gradient save only tensors that are kept anyway.
        """
        y = function(*args)
        if module in self._active and self._transients is not None and torch.is_grad_enabled():
            self._transients.add(y, function, args)
        return y

    def once(self, function: Callable[[], T]) -> T:
        """Returns `function()`, a choice or a count; during recomputation, returns the value of the first time."""
        if self._region is None:
            return function()
        if self._region.replay is not None:
            return next(self._region.replay)
        value = function()
        self._region.values.append(value)
        return value


class _Region:
    """One call that is recomputed in the backward pass, with the values of `once` that it must not decide again."""

    def __init__(self, owner: Activations):
        self.owner, self.values = owner, list[Any]()
        self.replay: Iterator[Any] | None = None

    @contextmanager
    def running(self, again: bool) -> Iterator[None]:
        """Context of the first computation, or of the recomputation (`again`).

        Regions and transients inside this region do nothing of their own, because all of it is recomputed.
        """
        owner = self.owner
        before = owner._active, owner._region
        owner._active, owner._region = frozenset(), self
        self.replay = iter(self.values) if again else None
        try:
            yield
        finally:
            owner._active, owner._region = before
            self.replay = None


class _Remade:
    """Tensor that is computed when it is first asked for, and kept as long as this object lives, for any stream."""

    def __init__(self, function: Callable[..., Tensor], args: tuple[Any, ...]):
        self.function, self.args = function, args
        self.value: Tensor | None = None
        self.ready: torch.cuda.Event | None = None

    def get(self) -> Tensor:
        if self.value is None:
            args = [a.get() if isinstance(a, _Remade) else a for a in self.args]
            with torch.no_grad():
                self.value = self.function(*args)
            if self.value.is_cuda:  # a shared expert on a second stream may be the first or the last to ask
                stream = torch.cuda.current_stream()
                self.ready = stream.record_event()
                for tensor in (a for a in args if isinstance(a, Tensor)):
                    tensor.record_stream(stream)
        elif self.ready is not None:
            torch.cuda.current_stream().wait_event(self.ready)
            self.value.record_stream(torch.cuda.current_stream())
        return self.value


_Packed = Tensor | tuple[_Remade, torch.Size, tuple[int, ...], Any]


class _Transients:
    """Transients of one layer: autograd saves a `_Remade` in place of any tensor that shares a transient's storage."""

    def __init__(self) -> None:
        # Transients by the address of their storage. Holding the tensor keeps the address from being used again.
        self._by_address: dict[int, tuple[Tensor, _Remade]] = {}

    def add(self, y: Tensor, function: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        address = y.untyped_storage().data_ptr()
        if address and address not in inputs and address not in self._by_address:
            kept = tuple(self._remade(a) or a.detach() if isinstance(a, Tensor) else a for a in args)
            self._by_address[address] = y.detach(), _Remade(function, kept)

    def _remade(self, x: Tensor) -> _Remade | None:
        """Returns the `_Remade` of `x` if `x` is itself a transient, else None."""
        y, remade = self._by_address.get(x.untyped_storage().data_ptr(), (None, None))
        same = y is not None and (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride())
        return remade if same else None

    def pack(self, t: Tensor) -> _Packed:
        y, remade = self._by_address.get(t.untyped_storage().data_ptr(), (None, None))
        if y is None or remade is None or t.dtype != y.dtype:
            return t
        return remade, t.size(), t.stride(), t.storage_offset()

    def clear(self) -> None:
        self._by_address.clear()


def _unpack(packed: _Packed) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    remade, size, stride, offset = packed
    return remade.get().as_strided(size, stride, offset)
