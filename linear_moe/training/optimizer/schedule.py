"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Any

from linear_moe.config.schema import Config


def learning_rate(step: int, config: Config) -> float:
    """The learning rate of optimizer step `step`, counted from 1.

    Linear warm-up that reaches `optimizer.lr` at step `warmup_steps`; then constant; or cosine to `min_lr` at
    `decay_steps` (SGDR, arXiv:1608.03983), constant afterwards; or warmup-stable-decay: constant, then linear to
    `min_lr` over the last `decay_steps` steps of the training (MiniCPM, arXiv:2404.06395; arXiv:2405.18392).
    """
    if step < 1:
        raise ValueError(f"step {step}: steps are counted from 1")
    s, peak, steps = config.schedule, config.optimizer.lr, config.training.steps
    if step <= s.warmup_steps:
        return peak * step / s.warmup_steps
    if s.type == "constant":
        return peak
    if s.type == "cosine":
        end = steps if s.decay_steps is None else s.decay_steps
        done = _progress(step, s.warmup_steps, end)
        return s.min_lr + (peak - s.min_lr) * (1 + math.cos(math.pi * done)) / 2
    length = max(1, steps // 5) if s.decay_steps is None else s.decay_steps
    return peak + (s.min_lr - peak) * _progress(step, max(s.warmup_steps, steps - length), steps)


def _progress(step: int, start: int, end: int) -> float:
    """Progress of `step` from `start` to `end`: linear, 0 at `start` and before, 1 at `end` and after."""
    return min(1.0, max(0.0, (step - start) / (end - start))) if end > start else 1.0


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Sets the learning rate of every parameter group of a (Megatron or PyTorch) optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = lr
