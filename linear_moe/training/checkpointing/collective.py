"""Actions that rank 0 alone runs while the other ranks wait for the outcome."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def on_rank_0(action: Callable[[], T]) -> T:
    """Runs `action` on rank 0, and returns its result, or raises its error, on every rank. Collective.

    So no rank waits for a rank 0 that has failed. An OSError is raised as an OSError, any other error as a RuntimeError
    that quotes it.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except OSError as error:
            outcome[1] = OSError(error.errno, error.strerror or str(error))
        except Exception as error:
            outcome[1] = RuntimeError(f"{type(error).__name__} on rank 0: {error}")
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
