"""Stand-ins that let Megatron-Core run on CPUs with gloo. Installed only where there is no GPU.

Megatron-Core 0.16 to 0.19 writes `device="cuda"`, asks `torch.cuda` for streams and random states, and compares type
names with "torch.cuda.FloatTensor". On a machine without CUDA each of these raises an error. The stand-ins answer for
the CPU instead; the docstring of each names the defect that it works around.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

CPU = torch.device("cpu")


def install() -> None:
    """Puts all stand-ins in place. Must run before `megatron.core` is imported (see `disable_compile`)."""
    assert "megatron.core" not in sys.modules, "platform.install() must run before megatron.core is imported"
    disable_compile()
    replace_streams()
    replace_random_state()
    redirect_factories()

    expose_cuda_type_names()
    convert_splits()
    replace_uneven_collectives()


def disable_compile() -> None:
    """Turns torch.compile off.

    Defect: Megatron decorates small functions with torch.compile while it is imported. On a CPU, compiling them takes
    minutes and needs a C++ compiler, and gains nothing.
    """
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if "torch._dynamo" in sys.modules:  # _dynamo reads the variable only when it is imported
        import torch._dynamo

        torch._dynamo.config.disable = True


class Stream:
    """Stream of a CPU, on which all work is done at once, so that there is nothing to wait for.

    It is a class and not an object, because Megatron annotates with `Stream | None`.
    """

    def __init__(self, *args: object, **kwargs: object): ...

    # All streams are equal, because the all-to-all dispatcher makes a stream wait for any stream unequal to it.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0

    def record_event(self, event: object = None) -> Stream:
        return self

    def synchronize(self) -> None: ...


def replace_streams() -> None:
    """Replaces the current device, streams and synchronisation of `torch.cuda`.

    Defect: collectives, pipeline communication and the all-to-all dispatcher call these functions on every machine.
    """
    stream = Stream()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.synchronize = lambda device=None: None
    cuda.Stream = Stream
    cuda.current_stream = lambda device=None: stream
    cuda.stream = lambda stream: contextlib.nullcontext()


def replace_random_state() -> None:
    """Puts the CPU's default generator in the place of the CUDA generator.

    Defect: `model_parallel_cuda_manual_seed` and the random-state tracker know only the CUDA generator.
    (`torch.manual_seed` calls `torch.cuda.manual_seed_all`, so the stand-in seeds the generator directly.)
    """
    cuda: Any = torch.cuda
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()

    import megatron.core.tensor_parallel.random as megatron_random

    def set_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    megatron_random._set_cuda_rng_state = set_state


def redirect_factories() -> None:
    """Makes `torch.tensor` and `torch.zeros` use the CPU where they are asked for a CUDA device.

    Defect: literal `device="cuda"`, for token counts of the schedules and for norms of clipping.

    `with torch.device("meta")` recognises the functions that it serves by identity, from a set that torch collects at
    the first use. So the set is collected first: collected after the replacement, it would lack the real
    `torch.tensor` and `torch.zeros`, which the context would then not serve.
    """
    from torch.utils import _device

    _device._device_constructors()

    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def create(*args: Any, **kwargs: Any) -> torch.Tensor:
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cuda":
                kwargs["device"] = CPU
            return factory(*args, **kwargs)

        return create

    torch.tensor, torch.zeros = on_cpu(torch.tensor), on_cpu(torch.zeros)


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    original = torch.Tensor.type

    def typed(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = typed  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def expose_cuda_type_names() -> None:
    """Makes `type()` of CPU tensors return CUDA type names inside the mixed-precision optimizers and clipping.

    Defect: these accept a parameter or gradient only if its `type()` is "torch.cuda.FloatTensor" (or HalfTensor,
    BFloat16Tensor).
    """
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(function)(_cuda_type_names()(function))

    for cls in (optimizer.Float16OptimizerWithFloat16Params, distrib_optimizer.DistributedOptimizer):
        cls.__init__ = wrapped(cls.__init__)
    clip = wrapped(clip_grads.clip_grad_by_total_norm_fp32)
    clip_grads.clip_grad_by_total_norm_fp32 = optimizer.clip_grad_by_total_norm_fp32 = clip


def convert_splits() -> None:
    """Converts the all-to-all dispatcher's split sizes to numpy arrays.

    Defect: it converts them only when they come from a GPU, but `all_to_all_single` does not take tensors.
    """
    from megatron.core.transformer.moe import token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_host


def replace_uneven_collectives() -> None:
    """Replaces gathers and reduce-scatters of pieces of different sizes by all-to-alls.

    Defect: with expert tensor parallelism the all-to-all dispatcher gathers and reduce-scatters such pieces, which gloo
    refuses in these two collectives, but not in an all-to-all.
    """
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def uneven_gather(x: torch.Tensor, group: Any, sizes: list[int] | None = None, *args: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return gather(x, group, sizes, *args)
        output = x.new_empty(sum(sizes), *x.shape[1:])
        copies = torch.cat([x] * group.size())
        torch.distributed.all_to_all_single(output, copies, sizes, [x.shape[0]] * group.size(), group=group)
        return output

    def uneven_reduce_scatter(x: torch.Tensor, group: Any, sizes: list[int] | None = None, *args: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return reduce_scatter(x, group, sizes, *args)
        parts = x.new_empty(group.size(), sizes[group.rank()], *x.shape[1:])
        received = [parts.shape[1]] * group.size()
        torch.distributed.all_to_all_single(parts.flatten(0, 1), x.contiguous(), received, sizes, group=group)
        return parts.sum(0)

    mappings._gather_along_first_dim = uneven_gather
    mappings._reduce_scatter_along_first_dim = uneven_reduce_scatter
