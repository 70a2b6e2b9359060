"""Repairs that the parts we use of Megatron-Core need on any device. (The optimizer's are in `optimizer.py`.)"""

from __future__ import annotations

from typing import Any

import torch


def install() -> None:
    """Apply the repairs that the releases we run on need."""
    repair_all_reduce()


def repair_all_reduce() -> None:
    """Defects of `_reduce`, the all-reduce inside `copy_to_...` and `reduce_from_tensor_model_parallel_region`.

    0.16.1 (right in 0.19.2) returns a non-contiguous tensor unreduced: it reduces a contiguous copy and drops it, so
    that gradients that arrive transposed or expanded are silently those of one rank. 0.16.1 and 0.19.2 reduce a
    contiguous one in place, which changes what autograd keeps of a region's output, and a gradient that it has handed
    to another branch.
    """
    from megatron.core.tensor_parallel import mappings

    def reduce(input_: torch.Tensor, group: Any) -> torch.Tensor:
        if group.size() == 1:
            return input_
        output = input_.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(output, group=group)
        return output

    mappings._reduce = reduce
