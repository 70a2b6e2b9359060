"""Repairs of defects of Megatron-Core on any device. (Those of its optimizer are in `training/optimizer/build.py`.)"""

from __future__ import annotations

from typing import Any

import torch


def install() -> None:
    """Applies the repairs that the supported releases of Megatron-Core need."""
    repair_all_reduce()


def repair_all_reduce() -> None:
    """Replaces `_reduce`, the all-reduce inside `copy_to_...` and `reduce_from_tensor_model_parallel_region`.

    Defects: 0.16.1 (right in 0.19.2) returns a non-contiguous tensor unreduced: it reduces a contiguous copy and drops
    this copy, so that gradients that arrive transposed or expanded are silently those of one rank. 0.16.1 and 0.19.2
    reduce a contiguous tensor in place. That changes a region's output after autograd has saved it, and a gradient that
    autograd has also handed to another branch.
    """
    from megatron.core.tensor_parallel import mappings

    def reduce(input_: torch.Tensor, group: Any) -> torch.Tensor:
        if group.size() == 1:
            return input_
        output = input_.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(output, group=group)
        return output

    mappings._reduce = reduce
