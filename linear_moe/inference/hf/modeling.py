"""Hugging Face model: wraps `LanguageModel` in one process; its parameters have the prefix `model.`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel

from linear_moe.inference.cache import DecodingState
from linear_moe.inference.hf.configuration import REMOTE_MODULE, LinearMoEConfig
from linear_moe.inference.hf.output import CACHE_NAME, LinearMoEOutput
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.model import LanguageModel
from linear_moe.modeling.tokens import TokenLayout

REMOTE_SOURCE = '''"""Loads the model with `trust_remote_code=True`; needs the linear-moe package."""

from linear_moe.inference.hf import LinearMoEConfig, LinearMoEForCausalLM

__all__ = ["LinearMoEConfig", "LinearMoEForCausalLM"]
'''


class LinearMoECache(Cache):
    """Decoding state as a cache of transformers: recurrent states and key-value caches, updated in place.

    Attributes:
        state: DecodingState of all rows.
        columns: number of columns of `input_ids` seen so far, left padding included.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, state: DecodingState, columns: int):
        super().__init__(layers=[])
        self.state, self.columns = state, columns

    def __len__(self) -> int:
        return len(self.state.layers)

    @property
    def is_linear(self) -> list[bool]:
        # If all layers of a cache are linear, generate() feeds its whole input again, because the linear layers of
        # transformers do not know how many tokens they have seen. This cache knows, and so calls no layer linear.
        return [False] * len(self)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # no limit: the cache grows

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.state.positions), device=self.state.positions.device)
        self.state.select(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a recurrent state cannot forget its last tokens")

    def reset(self) -> None:
        raise NotImplementedError("start without a cache instead")


def _given(past_key_values: LinearMoECache | None, cache: LinearMoECache | None) -> LinearMoECache | None:
    """Returns the cache that a caller gave under one of its two names, or None; ValueError for two different caches."""
    if past_key_values is not None and cache is not None and cache is not past_key_values:
        raise ValueError("past_key_values and cache are two names of one argument; two different caches were given")
    return cache if past_key_values is None else past_key_values


def left_padding(mask: Tensor) -> list[int]:
    """Counts the padding columns before each row's tokens in `mask [B, T]`; ValueError for padding elsewhere."""
    real = mask.bool()
    starts = (~real).sum(1)
    columns = torch.arange(mask.shape[1], device=mask.device)
    if not torch.equal(real, columns >= starts[:, None]) or not bool(real[:, -1].all()):
        raise ValueError(
            "attention_mask: only left padding can be decoded, and every row needs a token; use padding_side='left'"
        )
    return starts.tolist()


def _pad(logits: Tensor, length: int) -> Tensor:
    """Pads `[1, T, V]` to `[1, length, V]` with zeros on the left."""
    return F.pad(logits, (0, 0, length - logits.shape[1], 0))


class LinearMoEForCausalLM(PreTrainedModel, GenerationMixin):
    """Model of a training run, for transformers; parameters declared fp32 stay fp32 whatever `dtype` is loaded."""

    config_class = LinearMoEConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True

    def __init__(self, config: LinearMoEConfig):
        super().__init__(config)
        host = Host()  # dtype and device are torch's defaults, which from_pretrained sets
        self.model = LanguageModel(config.model_config(), config.vocab_size, host)
        assert not list(self.model.buffers()), "from_pretrained would not restore non-persistent buffers"
        if not next(self.model.parameters()).is_meta:
            initialize(self.model, host, int(torch.randint(2**31, ())))
            for parameter in self.model.parameters():
                parameter._is_hf_initialized = True
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() leaves the cache to forward()

    def _init_weights(self, module: nn.Module) -> None:
        """Raises ValueError: transformers calls it for parameters that a checkpoint lacks, which must not be random."""
        missing = [n for n, p in self.named_parameters() if not getattr(p, "_is_hf_initialized", False)]
        raise ValueError(f"the checkpoint lacks {len(missing)} parameters of the model: {', '.join(missing[:5])} ...")

    def get_input_embeddings(self) -> nn.Module:
        assert self.model.embedding is not None
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: LinearMoECache | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        cache: LinearMoECache | None = None,
        **loss_kwargs: Any,
    ) -> LinearMoEOutput:
        """Computes the logits of `input_ids [B, T]`, and the mean next-token loss if labels are given.

        Args:
            input_ids: `[B, T]` tokens; with a cache, only the tokens that the cache has not seen.
            attention_mask: `[B, T]` (with a cache: `[B, seen + T]`), 0 for padding. Padding on the right is allowed
                only without a cache. It does not change the logits to its left; its labels must be -100.
            past_key_values, cache: the decoding state that an earlier call with `use_cache` returned, updated in place.
                Both are names of one argument, whichever version of transformers is installed.
            labels: `[B, T]`, equal to `input_ids` (the shift by one happens here); -100 is ignored.
            use_cache: return the decoding state, under both of its names; not possible while gradients are recorded.
            logits_to_keep: compute only the logits of this many last positions; 0: of all.
            return_dict: only True is supported.
            loss_kwargs: arguments of the loss (num_items_in_batch of the Trainer).

        Raises:
            ValueError: an unsupported argument, padding in a wrong place, or `use_cache` while gradients are recorded.
        """
        items = {"num_items_in_batch": loss_kwargs.pop("num_items_in_batch", None)}
        if not return_dict or any(loss_kwargs.values()):
            raise ValueError(f"not supported: return_dict={return_dict}, {loss_kwargs}")
        cache = _given(past_key_values, cache)
        if cache is not None or use_cache:
            if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
                raise ValueError("decoding state is updated in place: use torch.no_grad() with use_cache")
            logits, cache = self._decode(input_ids, attention_mask, cache, logits_to_keep)
        else:
            logits = self._full(input_ids, attention_mask, logits_to_keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **items)
        fields: dict[str, Any] = {"loss": loss, "logits": logits, CACHE_NAME: cache}
        return LinearMoEOutput(**fields)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Calls `GenerationMixin.generate`; a cache to continue from may be called `past_key_values` or `cache`."""
        cache = _given(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        return super().generate(*args, **kwargs)

    def _full(self, tokens: Tensor, mask: Tensor | None, keep: int) -> Tensor:
        """Computes logits `[B, T, V]` without a cache.

        If any row has padding on the left, every row runs by itself, and the logits at padding are zeros.
        """
        batch, length = tokens.shape
        if mask is None or not bool((mask[:, 1:] > mask[:, :-1]).any()):  # tokens never see padding to their right
            return self.model(tokens, TokenLayout(batch, length), keep=keep)
        rows = []
        for row, start in zip(tokens, left_padding(mask), strict=True):
            rows.append(_pad(self.model(row[None, start:], TokenLayout(1, length - start), keep=keep), keep or length))
        return torch.cat(rows)

    def _decode(
        self, tokens: Tensor, mask: Tensor | None, cache: LinearMoECache | None, keep: int
    ) -> tuple[Tensor, LinearMoECache]:
        """Computes logits as `_full` does, with `cache` (None: a new one); returns the logits and the cache."""
        batch, length = tokens.shape
        if cache is not None:
            if mask is not None and length > 1 and not bool(mask[:, -length:].all()):
                raise ValueError("attention_mask: tokens that follow a cache cannot be padding")
            cache.columns += length
            return cache.state.advance(self.model, tokens, keep), cache
        starts = [0] * batch if mask is None else left_padding(mask)
        capacity = length + 256
        if not any(starts):
            state = DecodingState.empty(self.model, batch, capacity)
            return state.advance(self.model, tokens, keep), LinearMoECache(state, length)
        rows, states = [], []
        for row, start in zip(tokens, starts, strict=True):
            states.append(DecodingState.empty(self.model, 1, capacity))
            rows.append(_pad(states[-1].advance(self.model, row[None, start:], keep), keep or length))
        return torch.cat(rows), LinearMoECache(DecodingState.stack(states), length)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / f"{REMOTE_MODULE}.py").write_text(REMOTE_SOURCE)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModelForCausalLM") -> None:
        """Does nothing: `save_pretrained` writes REMOTE_MODULE instead of a copy of our sources."""
