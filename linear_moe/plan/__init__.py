"""`linear-moe plan`: costs of a configuration and layouts that spread it over GPUs; needs no GPU, no process group."""

from __future__ import annotations

from linear_moe.plan.activations import micro_batches_in_flight
from linear_moe.plan.plan import Plan, make_plan
from linear_moe.plan.show import human

__all__ = ["Plan", "human", "make_plan", "micro_batches_in_flight"]
