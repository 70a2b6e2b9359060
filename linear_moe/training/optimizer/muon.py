"""Muon, an optimizer that orthogonalises the momentum of matrices, with equal numbers in every parallel layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from linear_moe.config.schema import MuonConfig
from linear_moe.modeling.host import ParameterSpec
from linear_moe.training.optimizer.adamw import AdamW, buffer_chunks, round_stochastically

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients (a, b, c) of the quintic iteration x <- a x + (b x x^T + c (x x^T)^2) x."""

CHUNK = 2**26
"""Number of elements orthogonalised at a time; at least one matrix."""


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """Orthogonalises matrices `x [..., rows, columns]`: their singular values become about 1 (0.7 to 1.2 in 5 steps).

    The quintic Newton-Schulz iteration of Jordan et al. 2024, also arXiv:2502.16982, eq. 2, computed in the dtype of
    `x`. A matrix of zeros stays zeros.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


@dataclass(frozen=True)
class Share:
    """The stretch of a parameter that this rank updates, and the tensor ranks that hold the rest of its matrices.

    Attributes:
        name: the parameter's name, equal on all ranks.
        spec: the parameter's specification.
        shape: shape `[..., rows, columns]` of the rank's local tensor, after the tensor- and expert-parallel split.
        start, stop: the stretch of the flattened local tensor.
        group: process group over which tensor parallelism splits the parameter.
    """

    name: str
    spec: ParameterSpec
    shape: tuple[int, ...]
    start: int
    stop: int
    group: dist.ProcessGroup | None = None

    @property
    def unit(self) -> int:
        """Number of elements of a local matrix, the last two dimensions."""
        return self.shape[-2] * self.shape[-1]

    def gather(self, x: Tensor) -> Tensor:
        """Gathers whole matrices from the local `x [n, rows, columns]` of every tensor rank. Collective."""
        dim = self._split
        if dim is None:
            return x
        assert self.group is not None
        parts = [torch.empty_like(x) for _ in range(self.group.size())]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim)

    def own(self, x: Tensor) -> Tensor:
        """Undoes `gather`: cuts this tensor rank's part out of whole matrices."""
        dim = self._split
        return x if dim is None or self.group is None else x.chunk(self.group.size(), dim)[self.group.rank()]

    @property
    def _split(self) -> int | None:
        """Dimension of `[n, rows, columns]` that is split over tensor ranks into equal chunks; None: it is whole."""
        if self.group is None or self.group.size() == 1:
            return None
        dims = [d - len(self.shape) + 3 for d, axis in self.spec.axes.items() if axis != "expert"]
        assert len(dims) <= 1 and all(d > 0 for d in dims), (self.name, self.spec.axes)
        return dims[0] if dims else None


@dataclass(frozen=True)
class MatrixPiece:
    """Elements `start` to `stop` of the flattened local tensor of parameter `name`."""

    name: str
    start: int
    stop: int


class MatrixExchange:
    """Exchange that completes the matrices which are cut by the ends of data-parallel ranks' stretches.

    Every rank that has a piece of such a matrix receives the other pieces, orthogonalises the matrix, and keeps its own
    piece of the result, as in arXiv:2502.16982, section 2.3. A matrix that lies in one stretch is not sent. Building an
    exchange is collective, and so is calling it.

    Args:
        shares: this rank's shares.
        group: data-parallel ranks over which parameters are divided into stretches.
    """

    def __init__(self, shares: Iterable[Share], group: dist.ProcessGroup):
        self.group = group
        everyone: list[Any] = [None] * group.size()
        dist.all_gather_object(everyone, {s.name: (s.start, s.stop, s.unit) for s in shares}, group=group)
        rank = group.rank()
        self.sent = [_missing(everyone[rank], there) if i != rank else [] for i, there in enumerate(everyone)]
        self.received = [_missing(there, everyone[rank]) if i != rank else [] for i, there in enumerate(everyone)]

    def __call__(
        self, value: Callable[[MatrixPiece], Tensor], dtype: torch.dtype, device: torch.device
    ) -> dict[str, list[tuple[MatrixPiece, Tensor]]]:
        """Sends `value(piece)`, a flat tensor of `dtype`, for every piece that other ranks need. Collective.

        Returns:
            the received pieces with their values, by parameter name.
        """
        sent, received = ([sum(p.stop - p.start for p in pieces) for pieces in r] for r in (self.sent, self.received))
        nothing = torch.empty(0, dtype=dtype, device=device)
        buffer = nothing.new_empty(sum(received))
        outgoing = torch.cat([nothing, *(value(piece) for pieces in self.sent for piece in pieces)])
        dist.all_to_all_single(buffer, outgoing, received, sent, group=self.group)
        pieces = [piece for pieces in self.received for piece in pieces]
        by_name: dict[str, list[tuple[MatrixPiece, Tensor]]] = {piece.name: [] for piece in pieces}
        for piece, part in zip(pieces, buffer.split([p.stop - p.start for p in pieces]), strict=True):
            by_name[piece.name].append((piece, part))
        return by_name


Stretches = dict[str, tuple[int, int, int]]
"""A rank's stretches by parameter name: start, stop, and the number of elements of a matrix."""


def _missing(source: Stretches, target: Stretches) -> list[MatrixPiece]:
    """The pieces of `source`'s stretches that `target` needs to complete the matrices of which it has a part."""
    pieces = []
    for name in sorted(source.keys() & target.keys()):
        (start, stop, unit), (first, last, _) = source[name], target[name]
        start, stop = max(start, first // unit * unit), min(stop, -(-last // unit) * unit)
        if start < stop:
            pieces.append(MatrixPiece(name, start, stop))
    return pieces


class Muon(AdamW):
    """Muon (Jordan et al. 2024; scale and decay of Moonlight, arXiv:2502.16982) for matrices, AdamW for the rest.

    `m <- momentum m + g`, `W <- W (1 - lr weight_decay) - lr scale sqrt(max(rows, columns)) NS(g + momentum m)` for
    each matrix of a parameter (`ParameterSpec.matrices`; each expert has its own). State: `momentum`.

    A rank keeps the momentum of the stretch of a parameter that Megatron-Core gives it to update. Before they are
    orthogonalised, matrices are completed with pieces of other data-parallel ranks (`MatrixExchange`), then with the
    parts of the tensor ranks (`Share`).

    Args:
        muon: settings of Muon.
        dtype: dtype in which matrices are exchanged and orthogonalised.
        params, options: arguments of AdamW.
    """

    def __init__(self, params: Iterable[Any], *, muon: MuonConfig, dtype: torch.dtype, **options: Any):
        super().__init__(params, **options)
        self.muon, self.dtype = muon, dtype
        self.shares: dict[Tensor, Share] = {}
        self.exchange: MatrixExchange | None = None

    def orthogonalize(self, shares: dict[Tensor, Share], group: dist.ProcessGroup | None) -> None:
        """Sets the parameters that Muon updates. Collective over `group`.

        Args:
            shares: this rank's shares of these parameters; AdamW updates all other parameters.
            group: data-parallel ranks, which have other stretches of the parameters; None: stretches are whole.
        """
        self.shares = dict(sorted(shares.items(), key=lambda item: item[1].name))  # in one order on all ranks
        self.exchange = MatrixExchange(self.shares.values(), group) if group is not None and group.size() > 1 else None

    def state_names(self, parameter: Tensor) -> tuple[str, ...]:
        return ("momentum",) if parameter in self.shares else super().state_names(parameter)

    def update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        super().update(group, [p for p in parameters if p not in self.shares])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        super().step(closure)
        groups = {p: group for group in self.param_groups for p in group["params"] if p in self.shares}
        self._accumulate(groups)
        received: dict[str, list[tuple[MatrixPiece, Tensor]]] = {}
        if self.exchange is not None:
            by_name = {share.name: p for p, share in self.shares.items()}
            device = next(iter(by_name.values())).device if by_name else torch.device(torch.cuda.current_device())
            received = self.exchange(lambda piece: self._direction(by_name[piece.name], piece), self.dtype, device)
        for parameter, share in self.shares.items():
            self._apply(parameter, share, groups[parameter], received.get(share.name, []))

    def _accumulate(self, groups: dict[Tensor, dict[str, Any]]) -> None:
        """Updates the momenta of Muon's parameters: m <- momentum m + g. `groups` has each parameter's group."""
        momenta = {p: self.state_of(p)[0] for p in groups}
        exact = [p for p, momentum in momenta.items() if momentum.dtype == p.dtype]
        if exact:
            torch._foreach_mul_([momenta[p] for p in exact], self.muon.momentum)
            torch._foreach_add_([momenta[p] for p in exact], [p.grad for p in exact if p.grad is not None])
        for p, group in groups.items():
            if momenta[p].dtype != p.dtype:
                assert p.grad is not None
                for begin, (low, gradient) in buffer_chunks(momenta[p], p.grad):
                    sums = low.to(p.dtype).mul_(self.muon.momentum).add_(gradient)
                    round_stochastically(low, sums, f"{self.names.get(p, '')}/momentum/{begin}/{group['step']}")

    def _direction(self, parameter: Tensor, piece: MatrixPiece) -> Tensor:
        """The update before orthogonalisation, m or (with Nesterov momentum) g + momentum m, of a piece; flat."""
        share, (momentum,) = self.shares[parameter], self.state_of(parameter)
        part = slice(piece.start - share.start, piece.stop - share.start)
        momentum = momentum.view(-1)[part]
        if not self.muon.nesterov:
            return momentum.to(self.dtype)
        assert parameter.grad is not None
        return torch.add(parameter.grad.view(-1)[part], momentum, alpha=self.muon.momentum).to(self.dtype)

    def _apply(
        self, parameter: Tensor, share: Share, group: dict[str, Any], received: list[tuple[MatrixPiece, Tensor]]
    ) -> None:
        """Completes the matrices, a few at a time, orthogonalises them, and updates this rank's stretch."""
        assert share.spec.matrices is not None
        first, last = share.start // share.unit * share.unit, -(-share.stop // share.unit) * share.unit
        size = max(1, CHUNK // share.unit) * share.unit
        for begin in range(first, last, size):
            end = min(begin + size, last)
            own = MatrixPiece(share.name, max(begin, share.start), min(end, share.stop))
            window = torch.empty(end - begin, dtype=self.dtype, device=parameter.device)
            for piece, part in [(own, self._direction(parameter, own)), *received]:
                low, high = max(piece.start, begin), min(piece.stop, end)
                if low < high:
                    window[low - begin : high - begin] = part[low - piece.start : high - piece.start]
            whole = share.gather(window.view(-1, *share.shape[-2:]))
            matrices = tuple(self._orthogonal(m, parameter.dtype) for m in share.spec.matrices.split(whole))
            update = share.own(share.spec.matrices.join(matrices)).reshape(-1)[own.start - begin : own.stop - begin]
            stretch = parameter.data.view(-1)[own.start - share.start : own.stop - share.start]
            stretch.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _orthogonal(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Orthogonalised matrices `x [..., rows, columns]`, times scale sqrt(max(rows, columns)), in `dtype`."""
        return newton_schulz(x, self.muon.steps).to(dtype) * (self.muon.scale * math.sqrt(max(x.shape[-2:])))
