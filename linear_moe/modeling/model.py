"""Language model, written once for every host: embedding -> layers -> norm -> head."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.dims import Dims
from linear_moe.modeling.ffn import build_ffn
from linear_moe.modeling.host import Host, normal
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import RMSNorm
from linear_moe.modeling.mixers.registry import mixer_class
from linear_moe.modeling.pattern import ResolvedLayer, resolve_layers
from linear_moe.modeling.tokens import Cache, TokenLayout


def layer_dims(config: ModelConfig, layer: int) -> Dims:
    """Makes the sizes and constants that the mixer and FFN of one layer depend on."""
    scale = 1 / math.sqrt(2 * config.num_layers) if config.scale_output_init else 1.0
    return Dims(
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_layers=config.num_layers,
        layer=layer,
        norm_eps=config.norm_eps,
        init_std=config.init_std,
        output_init_std=config.init_std * scale,
    )


class Embedding(nn.Module):
    """Token embedding, vocabulary split over the tensor ranks: `[N]` -> this rank's tokens `[n, D]`.

    Called without tokens, the module returns its weight `[V/tensor, D]` for a tied head. The head must call it instead
    of reading the attribute, because Megatron-Core's DDP waits for newly gathered weights when a module is called.
    """

    def __init__(self, vocab_size: int, hidden_size: int, std: float, host: Host):
        super().__init__()
        self.host = host
        self.weight = host.parameter(vocab_size, hidden_size, init=normal(std), axes={0: "tensor"})

    def forward(self, tokens: Tensor | None = None) -> Tensor:
        return self.weight if tokens is None else self.host.embed(self.weight, tokens)


class Head(Linear):
    """Output projection: `x [N, D]` inside a region -> logits `[N, V/tensor]`; with labels `[N]`, loss `[N]` fp32."""

    def __init__(self, vocab_size: int, hidden_size: int, std: float, host: Host):
        super().__init__(host, hidden_size, vocab_size, split="column", std=std, matrices=None)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(x) if labels is None else loss_per_token(self.host, x, self.weight, labels)


def loss_per_token(host: Host, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Loss per token `[N]` fp32 of `x [N, D]` with the head's `weight [V/tensor, D]` and `labels [N]`."""
    if "logits" in host.activations.modules:
        return host.linear_cross_entropy(x, weight, labels)
    return host.cross_entropy(F.linear(x, weight), labels)


class Layer(nn.Module):
    """Pre-norm residual layer: `x + mixer(norm(x))`, then `x + ffn(norm(x))`, on `[n, D]`."""

    def __init__(self, layer: ResolvedLayer, config: ModelConfig, dims: Dims, host: Host):
        super().__init__()
        self.mixer_norm = RMSNorm(host, dims.hidden_size, dims.norm_eps)
        self.mixer = mixer_class(layer.mixer.type)(layer.mixer, dims, host)
        self.ffn_norm = RMSNorm(host, dims.hidden_size, dims.norm_eps)
        self.ffn = build_ffn(layer.ffn, config, dims, host)

    def forward(self, x: Tensor, layout: TokenLayout, cache: Cache | None = None) -> Tensor:
        activations = self.mixer_norm.host.activations
        y = activations.transient("norm", self.mixer_norm, x)
        x = x + activations.region("mixer", self.mixer, y, layout, cache)
        y = activations.transient("norm", self.ffn_norm, x)
        return x + activations.region("ffn", self.ffn, y, layout)


class LanguageModel(nn.Module):
    """Decoder-only language model, or one chunk of it on a pipeline stage.

    Args:
        config: the model section of the configuration.
        vocab_size: rows of the embedding.
        host: creates the parameters and communicates.
        layers: global indices of this stage's layers; None: all.
        first, last: whether this stage begins with the embedding, and ends with the final norm and head. With tied
            embeddings, the first and the last stage hold the matrix, under one name.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        host: Host,
        layers: range | None = None,
        first: bool = True,
        last: bool = True,
    ):
        super().__init__()
        self.config, self.host, self.vocab_size, self.first = config, host, vocab_size, first
        pattern = resolve_layers(config)
        stage = range(config.num_layers) if layers is None else layers
        self.embedding = Embedding(vocab_size, config.hidden_size, config.init_std, host) if first else None
        # Keyed by the global index, so that a parameter has one name in every pipeline stage and in the export.
        self.layers = nn.ModuleDict({str(i): Layer(pattern[i], config, layer_dims(config, i), host) for i in stage})
        self.norm = RMSNorm(host, config.hidden_size, config.norm_eps) if last else None
        self.head = None
        if last and not config.tie_embeddings:
            self.head = Head(vocab_size, config.hidden_size, config.init_std, host)
        elif last and not first:  # registered after the layers, because DDP gathers weights in the order of parameters
            self.embedding = Embedding(vocab_size, config.hidden_size, config.init_std, host)

    def forward(
        self,
        tokens: Tensor | None,
        layout: TokenLayout,
        *,
        hidden: Tensor | None = None,
        labels: Tensor | None = None,
        caches: list[Cache] | None = None,
        keep: int = 0,
    ) -> Tensor:
        """Runs this stage.

        Args:
            tokens: `[B, T]` int64; the first stage's input.
            layout: batch, length, documents and positions of the tokens.
            hidden: `[n, D]`, the previous stage's output; input of all stages but the first.
            labels: `[B, T]` int64 next tokens.
            caches: decoding state of each layer, from `init_caches`; updated in place.
            keep: compute only the logits of each row's last `keep` positions, as for generation; 0: of all positions.

        Returns:
            The residual stream `[n, D]` if this is not the last stage; else with labels the loss per token `[B, T]`
            fp32, and without labels the logits `[B, T, V/tensor]`.
        """
        if self.first:
            assert tokens is not None and self.embedding is not None
            hidden = self.embedding(tokens.flatten())
        assert hidden is not None
        x = hidden
        for i, (index, layer) in enumerate(self.layers.items()):
            x = self.host.activations.layer(int(index), layer, x, layout, caches[i] if caches is not None else None)
        if self.norm is None:
            return x
        x = self.host.enter(self.norm(x))
        if keep:
            x = x.unflatten(0, (layout.batch, layout.length))[:, -keep:].flatten(0, 1)
        if labels is None:
            logits = self.head(x) if self.head is not None else x @ self.tied_weight().T
            return logits.unflatten(0, (layout.batch, -1))
        if self.head is not None:
            return self.head(x, labels.flatten()).view_as(labels)
        return loss_per_token(self.host, x, self.tied_weight(), labels.flatten()).view_as(labels)

    def tied_weight(self) -> Tensor:
        """Returns the embedding `[V/tensor, D]` as the weight of a tied head."""
        assert self.embedding is not None
        return self.embedding()

    def init_caches(self, batch: int, max_length: int) -> list[Cache]:
        """Makes the empty decoding state of each layer, for `batch` rows of at most `max_length` tokens."""
        first = next(self.parameters())
        dtype = self.norm.weight.dtype if self.norm is not None else first.dtype
        layers = self.numbered_layers().values()
        return [layer.mixer.init_cache(batch, max_length, dtype, first.device) for layer in layers]

    def numbered_layers(self) -> dict[int, Layer]:
        """Returns this stage's layers by their global index, typed, which a ModuleDict is not."""
        layers: dict[int, Layer] = {}
        for index, layer in self.layers.items():
            assert isinstance(layer, Layer)
            layers[int(index)] = layer
        return layers


def crossing(model: ModelConfig, end: int | None = None) -> dict[str, int]:
    """Channels, by name, of the tensors that the first `end` layers (None: all) leave in `TokenLayout.shared`."""
    channels_of: dict[str, int] = {}
    for i, layer in enumerate(resolve_layers(model)[:end]):
        channels_of |= mixer_class(layer.mixer.type).crossing(layer.mixer, layer_dims(model, i))
    return channels_of
