"""AdamW as Megatron-Core wants its optimizer, without Transformer Engine or Apex."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) in one fused kernel on GPU and on CPU.

    State as Apex's FusedAdam keeps it, which is what Megatron-Core expects: the step is one int per parameter group,
    so that restoring a group restores the bias correction; `exp_avg` and `exp_avg_sq` per parameter.

    Args:
        params: parameters or groups of them; all tensors of one device and dtype are updated in one call.
        lr, betas, eps, weight_decay: defaults of the groups.
        adam_w_mode, capturable: Apex's flags, which Megatron-Core passes; only True and False, respectively.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        if not adam_w_mode or capturable:
            raise ValueError("AdamW has decoupled weight decay only, and does not run inside a CUDA graph")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` is not supported."""
        if closure is not None:
            raise ValueError("AdamW takes no closure")
        for group in self.param_groups:
            group["step"] += 1  # also where this rank has no parameter of the group: groups stay alike on all ranks
            for tensors in self._by_kind(group["params"]).values():
                parameters, gradients, exp_avgs, exp_avg_sqs = (list(t) for t in zip(*tensors, strict=True))
                step = torch.full((), float(group["step"]), device=parameters[0].device)
                torch._fused_adamw_(
                    parameters,
                    gradients,
                    exp_avgs,
                    exp_avg_sqs,
                    [],
                    [step] * len(parameters),
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                )

    def _by_kind(self, parameters: list[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, ...]]]:
        kinds: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, ...]]] = {}
        for p in parameters:
            if p.grad is None or p.numel() == 0:
                continue
            state = self.state[p]
            if not state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p.data), torch.zeros_like(p.data)
            kinds.setdefault((p.device, p.dtype), []).append((p.data, p.grad, state["exp_avg"], state["exp_avg_sq"]))
        return kinds
