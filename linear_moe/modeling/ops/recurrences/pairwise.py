"""Products of pairs of tokens within chunks, with the decay per channel between them, which one matmul cannot compute.

The decay from token j to token i is a product of gates in [0, 1]. At a point between the two tokens it splits into a
factor of i and a factor of j, which are products of gates too. So blocks of tokens are merged in pairs, from single
tokens to the whole chunk: tokens of the second block and tokens of the first are decayed from and to the boundary
between the blocks. No gate is divided by, so any log-decay <= 0 is safe.

Gradients are written by hand: they compute the decays again, which autograd would save at every level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.ops.autograd import Function


def pairwise(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], g: Tensor, before_gate: bool = False
) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor], Tensor]:
    """Computes `sum_k left[i, k] right[j, k] exp(g[j+1, k] + ... + g[i, k])` at (i, j), 0 where j > i.

    Args:
        lefts, rights: tensors `[N, X, C, K]`, C a power of two, contiguous.
        g: `[N, X, C, K]` log-decay.
        before_gate: whether lefts come before the gate of their own token: g[i] is then left out of the sum, and
            products are 0 where j = i.

    Returns:
        For every left, the products `[N, X, C, C]` with every right; the lefts decayed from the chunk's start to each
        token, the token's own gate included unless `before_gate`; the rights decayed from after each token to the
        chunk's end; the decay of the whole chunk `[N, X, K, 1]`.
    """
    rows, columns = len(lefts), len(rights)
    *results, whole = _Pairwise.apply(g, before_gate, rows, *lefts, *rights)
    products = [results[i * columns : (i + 1) * columns] for i in range(rows)]
    decayed = results[rows * columns :]
    return products, decayed[:rows], decayed[rows:], whole.mT


def pairwise_sum(scores: Tensor, v: Tensor, g: Tensor, before_gate: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes `sum_j scores[i, j] v[j, k] exp(g[j+1, k] + ... + g[i, k])` at (i, k), over j <= i.

    Args:
        scores: `[N, X, C, C]`, C a power of two.
        v, g: `[N, X, C, K]` values and their log-decay, contiguous.
        before_gate: whether g[i] is left out of the sum; the scores must then be 0 where j = i.

    Returns:
        The sums; the decay from the chunk's start to each token, the token's own gate included unless `before_gate`; v
        decayed from after each token to the chunk's end (all `[N, X, C, K]`); the decay of the whole chunk
        `[N, X, 1, K]`.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _PairwiseSum.apply(scores, v, g, before_gate)
    return result


def _halves(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Returns the first and the second blocks of all pairs of blocks: views `[pairs, block, K]` of `x [..., C, K]`."""
    first, second = x.view(-1, 2, block, x.shape[-1]).unbind(1)
    return first, second


def _across(products: Tensor, block: int) -> Tensor:
    """Returns a view of the products of each pair's second block (rows) with its first (columns).

    The view is `[N, X, pairs, block, block]` of `products [N, X, C, C]`.
    """
    pairs = (products.shape[-1] // (2 * block), 2, block)
    blocks = products.unflatten(-1, pairs).unflatten(-4, pairs)[..., 1, :, :, 0, :]
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _levels(a: Tensor, lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Iterator[int]:
    """Yields the sizes of blocks, from one token up; lefts and rights are decayed in place from size to size.

    At each size, lefts are decayed from the start of their block, and rights to the end of theirs. After the last size,
    blocks are whole chunks.
    """
    whole, block = a, 1
    while block < a.shape[-2]:
        yield block
        first, second = _halves(whole, 1)
        for left in lefts:
            _halves(left, block)[1].mul_(first)
        for right in rights:
            _halves(right, block)[0].mul_(second)
        whole, block = first * second, 2 * block


def _products(a: Tensor, before_gate: bool, lefts: list[Tensor], rights: list[Tensor]) -> list[Tensor]:
    """Computes the products of every left with every right; decays both in place to those that `pairwise` returns."""
    if before_gate:
        products = [left.new_zeros(*left.shape[:-1], left.shape[-2]) for left in lefts for _ in rights]
    else:
        products = [torch.diag_embed((left * right).sum(-1)) for left in lefts for right in rights]
        for left in lefts:
            left.mul_(a)
    for block in _levels(a, lefts, rights):
        pairs = [(_halves(left, block)[1], _halves(right, block)[0]) for left in lefts for right in rights]
        for product, (left, right) in zip(products, pairs, strict=True):
            view = _across(product, block)
            view.copy_((left @ right.mT).view(view.shape))
    return products


def _gradients(
    a: Tensor,
    before_gate: bool,
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    dproducts: Sequence[Tensor],
    ddecayed_lefts: Sequence[Tensor],
    ddecayed_rights: Sequence[Tensor],
    dwhole: Tensor,
    dsince: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Computes the gradients of the log-decay, the lefts and the rights from those of the results of `pairwise`.

    Args:
        a: the decays, exp(g).
        before_gate, lefts, rights: as for `pairwise`.
        dproducts, ddecayed_lefts, ddecayed_rights: gradients of the products and of the decayed lefts and rights.
        dwhole: gradient of the decay of the whole chunk `[N, X, 1, K]`.
        dsince: gradient of the decay from the chunk's start to each token, in place of those of the decayed lefts.
    """
    since, until = torch.ones_like(a) if before_gate else a.clone(), torch.ones_like(a)
    moved_lefts, moved_rights = [left * since for left in lefts], [right.clone() for right in rights]
    columns = len(rights)
    rows = [dproducts[i * columns : (i + 1) * columns] for i in range(len(lefts))]
    if before_gate:
        dlefts, drights = ([torch.zeros_like(x) for x in xs] for xs in (lefts, rights))
    else:
        own = [[p.diagonal(dim1=-2, dim2=-1)[..., None] for p in row] for row in rows]
        dlefts = [_dot(row, rights) for row in own]
        drights = [_dot(column, lefts) for column in zip(*own, strict=True)]
    sums: list[tuple[int, Tensor, Tensor]] = []  # gradients of the log of `since` and of `until` by level
    for block in _levels(a, [since, *moved_lefts], [until, *moved_rights]):
        second, first = [_halves(x, block)[1] for x in moved_lefts], [_halves(x, block)[0] for x in moved_rights]
        across = [[_across(p, block).reshape(-1, block, block) for p in row] for row in rows]
        from_rights = [_matmuls(row, first) for row in across]
        from_lefts = [_matmuls([p.mT for p in column], second) for column in zip(*across, strict=True)]
        for d, x in zip(dlefts, from_rights, strict=True):
            _halves(d, block)[1].addcmul_(x, _halves(since, block)[1])
        for d, x in zip(drights, from_lefts, strict=True):
            _halves(d, block)[0].addcmul_(x, _halves(until, block)[0])
        sums.append((block, _dot(from_rights, second), _dot(from_lefts, first)))
    if dsince is None:
        after = _dot(moved_lefts, ddecayed_lefts)
        for d, x in zip(dlefts, ddecayed_lefts, strict=True):
            d.addcmul_(x, since)
    else:
        after = since * dsince
    before, total = _dot(moved_rights, ddecayed_rights), dwhole * a.prod(-2, keepdim=True)
    for d, x in zip(drights, ddecayed_rights, strict=True):
        d.addcmul_(x, until)
    # a gate is a factor of `since` at its own and later tokens, and of `until` at earlier tokens
    total = total.view(-1, 1, a.shape[-1])
    for block, in_second, in_first in reversed(sums):
        after_2, before_1 = _halves(after, block)[1], _halves(before, block)[0]
        total = torch.stack([total + x.sum(1, keepdim=True) for x in (after_2, before_1)], 1).flatten(0, 1)
        after_2 += in_second
        before_1 += in_first
    total = total.view(a.shape)
    return total if before_gate else total.add_(after), dlefts, drights


def _dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Returns the sum of the elementwise products of `xs` and `ys`."""
    result = xs[0] * ys[0]
    for x, y in zip(xs[1:], ys[1:], strict=True):
        result.addcmul_(x, y)
    return result


def _matmuls(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Returns the sum of the matrix products of `xs` and `ys`.

    Products over at most two elements are computed elementwise: batches of such small products are slow in `bmm`.
    """
    inner = xs[0].shape[-1]
    if inner <= 2:
        columns = [x[..., i, None] for x in xs for i in range(inner)]
        return _dot(columns, [y[..., i, None, :] for y in ys for i in range(inner)])
    result = torch.bmm(xs[0], ys[0])
    for x, y in zip(xs[1:], ys[1:], strict=True):
        result.baddbmm_(x, y)
    return result


class _Pairwise(Function):
    """The autograd function of `pairwise`."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, before_gate: bool, rows: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        a = g.exp()
        ctx.save_for_backward(a, *inputs)
        ctx.before_gate, ctx.rows = before_gate, rows
        decayed = [x.clone() for x in inputs]
        products = _products(a, before_gate, decayed[:rows], decayed[rows:])
        return *products, *decayed, a.prod(-2, keepdim=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        a, *inputs = ctx.saved_tensors
        count, rows = len(inputs), ctx.rows
        products, decayed = gradients[: -count - 1], gradients[-count - 1 : -1]
        dg, dlefts, drights = _gradients(
            a, ctx.before_gate, inputs[:rows], inputs[rows:], products, decayed[:rows], decayed[rows:], gradients[-1]
        )
        return dg, None, None, *dlefts, *drights


class _PairwiseSum(Function):
    """The autograd function of `pairwise_sum`."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, v: Tensor, g: Tensor, before_gate: bool) -> tuple[Tensor, ...]:
        a, until = g.exp(), v.clone()
        ctx.save_for_backward(scores, v, a)
        ctx.before_gate = before_gate
        since = torch.ones_like(a) if before_gate else a.clone()
        o = scores.diagonal(dim1=-2, dim2=-1)[..., None] * v
        for block in _levels(a, [since], [until]):
            across = _across(scores, block).reshape(-1, block, block)
            _halves(o, block)[1].addcmul_(_matmuls([across], [_halves(until, block)[0]]), _halves(since, block)[1])
        return o, since, until, a.prod(-2, keepdim=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, do: Tensor, dsince: Tensor, duntil: Tensor, dwhole: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        scores, v, a = ctx.saved_tensors
        do = do.contiguous()
        (dscores,) = _products(a, ctx.before_gate, [do.clone()], [v.clone()])
        dg, _, (dv,) = _gradients(a, ctx.before_gate, [do], [v], [scores], [], [duntil], dwhole, dsince)
        return dscores, dv, dg, None
