"""Muon: momentum, orthogonalised. The same numbers however the matrices are spread over ranks."""

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
CHUNK = 2**26
"""Elements orthogonalised at a time, where matrices are smaller."""


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """Matrices `x [..., rows, columns]` with their singular values moved to about 1 (0.7 to 1.2 after 5 steps).

    The quintic iteration of Jordan et al. 2024, also arXiv:2502.16982, eq. 2; computed in the dtype of `x`. A matrix of
    zeros stays zeros.
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
    """The stretch of a parameter that this rank updates, and who has the rest.

    Attributes:
        name: the parameter's, the same on all ranks.
        spec: the parameter's.
        shape: of its local tensor `[..., rows, columns]`: all of it, but for the tensor-parallel split.
        start, stop: the stretch of the flattened local tensor.
        group: over whose ranks tensor parallelism splits it.
    """

    name: str
    spec: ParameterSpec
    shape: tuple[int, ...]
    start: int
    stop: int
    group: dist.ProcessGroup | None = None

    @property
    def unit(self) -> int:
        """Elements of the last two dimensions."""
        return self.shape[-2] * self.shape[-1]

    def gather(self, x: Tensor) -> Tensor:
        """`x [n, rows, columns]` of every tensor rank -> whole matrices."""
        dim = self._split
        if dim is None:
            return x
        assert self.group is not None
        parts = [torch.empty_like(x) for _ in range(self.group.size())]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim)

    def own(self, x: Tensor) -> Tensor:
        """Undoes `gather`: this tensor rank's part."""
        dim = self._split
        return x if dim is None or self.group is None else x.chunk(self.group.size(), dim)[self.group.rank()]

    @property
    def _split(self) -> int | None:
        """The dimension of `[n, rows, columns]` that is split; `initialize` cuts parameters in the same way."""
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
    """Pieces of matrices that lie in several data-parallel ranks' stretches, to the ranks that have others of them.

    Each of these orthogonalises the matrix and keeps its own piece of the result, as in arXiv:2502.16982, section 2.3.
    Whole matrices are not sent: only those at the ends of the stretches.

    Args:
        shares: this rank's.
        group: the ranks among whom parameters are divided. Building an exchange is collective, as is using it.
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
        """Send every `value(piece)`, flat and of that dtype; what came, by parameter."""
        sent, received = ([sum(p.stop - p.start for p in pieces) for pieces in r] for r in (self.sent, self.received))
        nothing = torch.empty(0, dtype=dtype, device=device)
        buffer = nothing.new_empty(sum(received))
        outgoing = torch.cat([nothing, *(value(piece) for pieces in self.sent for piece in pieces)])
        dist.all_to_all_single(buffer, outgoing, received, sent, group=self.group)
        pieces = [piece for pieces in self.received for piece in pieces]
        found: dict[str, list[tuple[MatrixPiece, Tensor]]] = {piece.name: [] for piece in pieces}
        for piece, part in zip(pieces, buffer.split([p.stop - p.start for p in pieces]), strict=True):
            found[piece.name].append((piece, part))
        return found


Stretches = dict[str, tuple[int, int, int]]
"""By parameter: start, stop, and the elements of a matrix."""


def _missing(source: Stretches, target: Stretches) -> list[MatrixPiece]:
    """What `target` needs of `source`'s stretches to complete the matrices that it has a part of."""
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

    A rank keeps the momentum of the stretch of a parameter that Megatron-Core gives it to update. To be orthogonalised,
    matrices are completed by pieces of other data-parallel ranks (`MatrixExchange`), then of tensor ranks (`Share`).

    Args:
        muon: the settings.
        dtype: what matrices are exchanged and orthogonalised in.
        params, options: as of AdamW.
    """

    def __init__(self, params: Iterable[Any], *, muon: MuonConfig, dtype: torch.dtype, **options: Any):
        super().__init__(params, **options)
        self.muon, self.dtype = muon, dtype
        self.shares: dict[Tensor, Share] = {}
        self.exchange: MatrixExchange | None = None

    def orthogonalize(self, shares: dict[Tensor, Share], group: dist.ProcessGroup | None) -> None:
        """Say which of the parameters are Muon's; with `group`, its ranks have other stretches of them (collective)."""
        self.shares = dict(sorted(shares.items(), key=lambda item: item[1].name))  # an order that all ranks have
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
        momenta = {p: self.state_of(p)[0] for p in groups}
        exact = [p for p, momentum in momenta.items() if momentum.dtype == p.dtype]
        if exact:
            torch._foreach_mul_([momenta[p] for p in exact], self.muon.momentum)
            torch._foreach_add_([momenta[p] for p in exact], [p.grad for p in exact])  # type: ignore[misc]
        for p, group in groups.items():
            if momenta[p].dtype != p.dtype:
                assert p.grad is not None
                for begin, (low, gradient) in buffer_chunks(momenta[p], p.grad):
                    sums = low.to(p.dtype).mul_(self.muon.momentum).add_(gradient)
                    round_stochastically(low, sums, f"{self.names.get(p, '')}/momentum/{begin}/{group['step']}")

    def _direction(self, parameter: Tensor, piece: MatrixPiece) -> Tensor:
        """Part of what is to be orthogonalised."""
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
        """Complete the matrices, a few at a time, orthogonalise them, and update this rank's stretch."""
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
        return newton_schulz(x, self.muon.steps).to(dtype) * (self.muon.scale * math.sqrt(max(x.shape[-2:])))
