"""Short causal depthwise convolution in front of a recurrence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from linear_moe.modeling.host import Host, constant
from linear_moe.modeling.layers.initializers import uniform
from linear_moe.modeling.ops.fused.short_conv import short_conv
from linear_moe.modeling.tokens import Cache, TokenLayout


class ShortConv(nn.Module):
    """Convolution `y_t = activation(b + sum_i w_i x_{t-size+1+i})` of each channel, inside a tensor-parallel region.

    The weight `[channels, size]` (`[channels, 1, size]` in flash-linear-attention and `nn.Conv1d`) is split over the
    tensor ranks by channels. The decoding state `cache[name] [B, channels / tensor, size - 1]` holds the last inputs.

    Args:
        name: key of the state in the layer's cache.
        norm_size: if given, `l2_norm` follows, of each group of this many neighbouring channels.
    """

    def __init__(
        self,
        host: Host,
        channels: int,
        size: int,
        *,
        name: str,
        bias: bool = False,
        activation: Literal["silu"] | None = "silu",
        norm_size: int | None = None,
    ):
        super().__init__()
        self.norm_size = norm_size
        self.channels, self.size, self.name, self.activation = host.split(channels), size, name, activation
        # The initial weights are those of nn.Conv1d: the fan-in of a depthwise filter is its size.
        self.weight = host.parameter(channels, size, init=uniform(size**-0.5), axes={0: "tensor"})
        if bias:
            self.bias = host.parameter(channels, init=constant(0.0), axes={0: "tensor"}, decay=False)
        else:
            self.register_parameter("bias", None)

    def forward(
        self, x: Tensor, layout: TokenLayout, cache: Cache | None = None, before: Tensor | None = None
    ) -> Tensor:
        """Convolves `x [B, T, channels / tensor]`; updates `cache[name]` in place. `before`: see `short_conv`."""
        state = None if cache is None else cache[self.name]
        y, final = short_conv(
            x,
            self.weight,
            self.bias,
            activation=self.activation,
            state=state,
            before=before,
            cu_seqlens=layout.cu_seqlens,
            output_state=state is not None,
            norm_size=self.norm_size,
        )
        if state is not None and final is not None and final is not state:
            state.copy_(final)
        return y

    def extra_repr(self) -> str:
        return f"{self.channels}, size={self.size}, activation={self.activation}"


def conv_states(mixer: nn.Module, batch: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Entries of `Mixer.state_shapes` for the short convolutions of `mixer`."""
    convs = [m for m in mixer.children() if isinstance(m, ShortConv)]
    return {conv.name: ((batch, conv.channels, conv.size - 1), None) for conv in convs}


def shift_state(x: Tensor, cache: Cache | None, name: str = "shift") -> Tensor | None:
    """Returns the token `[B, C]` before each row of `x [B, T, C]`, for `shift_mix`; None without a cache.

    `cache[name] [B, C]` is updated in place with the last token of each row.
    """
    if cache is None:
        return None
    before = cache[name].clone()
    cache[name].copy_(x[:, -1])
    return before
