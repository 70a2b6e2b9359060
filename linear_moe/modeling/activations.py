"""What a forward pass keeps for its backward pass: everything, or less, the rest being computed again."""

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
    "norm": "what both norms of a layer give, as all tensor ranks gather it",
    "mixer": "all of the mixer",
    "core": "the recurrence, or softmax attention, from its inputs",
    "ffn": "all of the channel mixer, with router and exchange of tokens",
    "experts": "the routed experts' gate and up projections",
    "activation": "the activation of a dense or shared SwiGLU, from its gate and up projections",
    "logits": "the logits, which are then made in blocks of the vocabulary",
}
"""What can be computed again by itself; "layer" stands for whole layers."""


class Activations:
    """A host's bookkeeping. Layers run through `layer`; their parts name themselves to `region` and `transient`.

    Args:
        modules: of MODULES, or "layer".
        layers: global indices of the layers concerned; None: all. The logits belong to no layer.
    """

    def __init__(self, modules: Collection[str] = (), layers: Container[int] | None = None):
        assert {"layer", *MODULES}.issuperset(modules), modules
        self.modules, self.layers = frozenset(modules), layers
        self._active: frozenset[str] = frozenset()  # modules to be computed again, here and now
        self._transients: _Transients | None = None  # of the layer being computed
        self._region: _Region | None = None  # being computed, the first time or again

    @property
    def again(self) -> bool:
        """Whether what is computed now was computed before: nothing must be counted or reported."""
        return self._region is not None and self._region.replay is not None

    def layer(self, index: int, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Run layer number `index`, keeping no more for the backward pass than `modules` allows."""
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
        """Whether the backward pass finds what `module` made; else an op has to make it again, as a `region` would."""
        return module not in self._active

    def region(self, module: str, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """`function(*args)`, of which only tensors among `args` are kept if `module` is to be computed again."""
        if self.keeps(module) or not torch.is_grad_enabled():
            return function(*args)
        region = _Region(self)
        contexts = lambda: (region.running(False), region.running(True))  # noqa: E731
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def transient(self, module: str, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """`function(*args)`, which what follows does not keep if `module` is to be computed again.

        The function must be cheap, give equal tensors for equal ones and, for its own gradient, keep what `args` need
        anyway: it is called again without gradients.
        """
        y = function(*args)
        if module in self._active and self._transients is not None and torch.is_grad_enabled():
            self._transients.add(y, function, args)
        return y

    def once(self, function: Callable[[], T]) -> T:
        """`function()`, a choice or count: where something is computed again, what it was the first time."""
        if self._region is None:
            return function()
        if self._region.replay is not None:
            return next(self._region.replay)
        value = function()
        self._region.values.append(value)
        return value


class _Region:
    """One call whose inside is computed again, and what it must not decide again."""

    def __init__(self, owner: Activations):
        self.owner, self.values = owner, list[Any]()
        self.replay: Iterator[Any] | None = None

    @contextmanager
    def running(self, again: bool) -> Iterator[None]:
        """Regions inside this one are part of it, and so is what it makes in passing."""
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
    """A tensor that is made when first asked for and kept as long as someone may ask, on whichever stream."""

    def __init__(self, function: Callable[..., Tensor], args: tuple[Any, ...]):
        self.function, self.args = function, args
        self.value: Tensor | None = None
        self.ready: torch.cuda.Event | None = None

    def get(self) -> Tensor:
        if self.value is None:
            args = [a.get() if isinstance(a, _Remade) else a for a in self.args]
            with torch.no_grad():
                self.value = self.function(*args)
            if self.value.is_cuda:  # a shared expert on a stream of its own may be the first or the last to ask
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
    """Of one layer. In place of a tensor that shares a transient's storage, autograd keeps how to make it again."""

    def __init__(self) -> None:
        # By the address of their storage; which lives, so that no other tensor has it.
        self._found: dict[int, tuple[Tensor, _Remade]] = {}

    def add(self, y: Tensor, function: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        address = y.untyped_storage().data_ptr()
        if address and address not in inputs and address not in self._found:
            kept = tuple(self._remade(a) or a.detach() if isinstance(a, Tensor) else a for a in args)
            self._found[address] = y.detach(), _Remade(function, kept)

    def _remade(self, x: Tensor) -> _Remade | None:
        """How to make `x`, a transient itself."""
        y, remade = self._found.get(x.untyped_storage().data_ptr(), (None, None))
        same = y is not None and (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride())
        return remade if same else None

    def pack(self, t: Tensor) -> _Packed:
        y, remade = self._found.get(t.untyped_storage().data_ptr(), (None, None))
        if y is None or remade is None or t.dtype != y.dtype:
            return t
        return remade, t.size(), t.stride(), t.storage_offset()

    def clear(self) -> None:
        self._found.clear()


def _unpack(packed: _Packed) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    remade, size, stride, offset = packed
    return remade.get().as_strided(size, stride, offset)
