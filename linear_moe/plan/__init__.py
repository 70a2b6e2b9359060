"""`linear-moe plan`: what a configuration costs, and how to spread it; no GPU, no process groups."""

from __future__ import annotations

from linear_moe.plan.activations import micro_batches_in_flight
from linear_moe.commands.plan import main
from linear_moe.plan.plan import Plan, make_plan
from linear_moe.layout.flops import flops_per_token
from linear_moe.plan.show import human

__all__ = ["Plan", "flops_per_token", "human", "main", "make_plan", "micro_batches_in_flight"]
