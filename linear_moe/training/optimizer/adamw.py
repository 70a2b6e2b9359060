"""AdamW with the interface that Megatron-Core expects of Apex's, without Transformer Engine or Apex."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**25
"""Number of elements whose bf16 moments are converted to fp32 at a time."""


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) in one fused kernel on GPU and on CPU.

    Its state is that of Apex's FusedAdam, which Megatron-Core expects: one int `step` per parameter group, so that
    restoring a group restores the bias correction, and `exp_avg` and `exp_avg_sq` per parameter.

    Args:
        params: parameters or groups of them; all tensors of one device and dtype are updated in one call.
        lr, betas, eps, weight_decay: defaults of the groups.
        moments: dtype of the moments; None: the parameters' dtype. bf16 moments are rounded stochastically: a decayed
            second moment may differ from the old one by less than half a bit, and would never shrink if it were rounded
            to nearest.
        adam_w_mode, capturable: Apex's flags, which Megatron-Core passes; only True and False, respectively.

    Raises:
        ValueError: another value of these flags, or moments that are neither fp32 nor bf16.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        moments: torch.dtype | None = None,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        if not adam_w_mode or capturable:
            raise ValueError("AdamW has decoupled weight decay only, and does not run inside a CUDA graph")
        if moments not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"moments in {moments}: must be fp32 or bf16")
        self.moments = moments
        self.names: dict[Tensor, str] = {}
        """Names of parameters, from which (with the step) the random numbers of stochastic rounding are derived.

        Replicas must have equal names, so that they round alike.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    def state_names(self, parameter: Tensor) -> tuple[str, ...]:
        """Names of the tensors of a parameter's state."""
        return "exp_avg", "exp_avg_sq"

    def initialize(self) -> None:
        """Allocates the state of all parameters, which is otherwise allocated in a parameter's first step."""
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state_of(parameter)

    def state_of(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """The tensors of a parameter's state, in the order of `state_names`; allocates missing ones as zeros."""
        state = self.state[parameter]
        for name in self.state_names(parameter):
            if name not in state:
                state[name] = torch.zeros_like(parameter.data, dtype=self.moments)
        return tuple(state[name] for name in self.state_names(parameter))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient. `closure` is not supported (ValueError)."""
        if closure is not None:
            raise ValueError("AdamW takes no closure")
        for group in self.param_groups:
            group["step"] += 1  # even if this rank has no parameter of the group, so that ranks agree on the step
            self.update(group, [p for p in group["params"] if p.grad is not None and p.numel()])

    def update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Updates parameters of one group, all of which have a gradient."""
        kinds: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, ...]]] = {}
        for p in parameters:
            assert p.grad is not None
            moments = self.state_of(p)
            if moments[0].dtype == p.dtype:
                kinds.setdefault((p.device, p.dtype), []).append((p.data, p.grad, *moments))
            else:
                self._update_rounded(group, self.names.get(p, ""), p.data, p.grad, *moments)
        for kind in kinds.values():
            fused_adamw(group, *(list(t) for t in zip(*kind, strict=True)))

    def _update_rounded(self, group: dict[str, Any], name: str, *tensors: Tensor) -> None:
        """Updates a parameter with bf16 moments, CHUNK elements at a time, and rounds the moments stochastically.

        Args:
            tensors: parameter, gradient, `exp_avg` and `exp_avg_sq`.
        """
        for begin, (p, g, *low) in buffer_chunks(*tensors):
            high = [moment.to(p.dtype) for moment in low]
            fused_adamw(group, [p], [g], *([moment] for moment in high))
            for target, moment, kind in zip(low, high, ("exp_avg", "exp_avg_sq"), strict=True):
                round_stochastically(target, moment, f"{name}/{kind}/{begin}/{group['step']}")


def buffer_chunks(*tensors: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
    """Cuts contiguous tensors of one size into flat chunks of CHUNK elements: yields (begin, chunk of each tensor)."""
    for begin in range(0, tensors[0].numel(), CHUNK):
        yield begin, [t.view(-1)[begin : begin + CHUNK] for t in tensors]


def fused_adamw(
    group: dict[str, Any],
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
) -> None:
    """Makes one AdamW step in place, with the group's settings. All tensors have one device and dtype."""
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


def round_stochastically(target: Tensor, value: Tensor, key: str) -> None:
    """Rounds fp32 `value` to bf16 `target`, up or down at random, so that the mean is exact. Overwrites `value`.

    The random numbers are a function of `key` (and of the device type) alone. So a resumed run rounds like an
    uninterrupted one, and replicas round alike.
    """
    generator = torch.Generator(value.device)
    generator.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1)
    bits = value.view(torch.int32)
    bits += torch.empty_like(bits).random_(0, 2**16, generator=generator)
    bits &= -(2**16)
    target.copy_(value)
