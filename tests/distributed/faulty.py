"""A training in which rank RANK goes wrong: `torchrun ... -m tests.distributed.faulty FAULT RANK train ...`."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from linear_moe.cli import main

STEP = 3


def inject(fault: str) -> None:
    """Makes this rank go wrong in step `STEP`: it hangs, or data or memory raise an error."""
    from linear_moe.training import platform

    platform.install()
    import torch

    from linear_moe.training import step
    from linear_moe.training.data import TrainLoader
    from linear_moe.training.supervision import watch

    def due() -> bool:
        return watch._current is not None and watch._current.step == STEP

    read, layout_of = TrainLoader.__next__, step.token_layout

    def reading(self: Any) -> Any:
        if due() and fault == "hang":
            time.sleep(1000)
        if due() and fault == "data":
            raise ValueError("document 7 is damaged")
        return read(self)

    def computing(*arguments: Any) -> Any:
        if due() and fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB")
        return layout_of(*arguments)

    TrainLoader.__next__, step.token_layout = reading, computing  # type: ignore[method-assign]


if __name__ == "__main__":
    fault, rank = sys.argv[1], sys.argv[2]
    if os.environ["RANK"] == rank:
        if fault == "late":
            time.sleep(1000)
        inject(fault)
    sys.exit(main(sys.argv[3:]))
